"""One block put to the vote in one view: who voted for it, the lock, and who contradicts itself.

prevotes, a quorum  -> Lock      precommits, a quorum  -> the ballots of a Commit
"""

from dataclasses import dataclass, field

import msgspec

from dugnad.coordinator import equivocation
from dugnad.coordinator.effects import Accuse, Effect, Refused
from dugnad.coordinator.equivocation import side
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.messages import (
    PRECOMMIT,
    PREVOTE,
    Ballot,
    Lock,
    Proposal,
    ViewChange,
    Vote,
    Voter,
    vote_payload,
)
from dugnad.coordinator.votes import Signer, weight_of
from dugnad.dht.identity import PeerId


@dataclass(slots=True)
class Poll:
    """The votes on `proposal` of the committee at the head of `ledger`."""

    proposal: Proposal
    ledger: Ledger
    signer: Signer
    lock: Lock | None = None
    ballots: dict[int, dict[PeerId, Ballot]] = field(default_factory=lambda: {PREVOTE: {}, PRECOMMIT: {}})
    """phase -> who voted for the proposal."""
    strange: dict[tuple[PeerId, int], Vote] = field(default_factory=dict)
    """(voter, phase) -> a vote in this view for another block than ours."""

    @property
    def given(self) -> dict[PeerId, Ballot]:
        """The votes that count now: until there is a lock the prevotes, then the precommits."""
        return self.ballots[PREVOTE if self.lock is None else PRECOMMIT]

    @property
    def is_decided(self) -> bool:
        """Whether they are a quorum."""
        return self.ledger.rule.decided(self.ledger.head.committee, self.given)

    def certificate(self) -> tuple[Ballot, ...]:
        """They, in peer-id order."""
        return tuple(ballot for peer, ballot in sorted(self.given.items()))

    def progress(self) -> str:
        """How many have voted, in words."""
        committee = self.ledger.head.committee
        have, need = weight_of(committee, self.given), self.ledger.rule.needed(committee)
        return f"{have} of {need} {'votes' if self.lock is None else 'votes to commit'}"

    def unheard(self, peer: PeerId) -> Lock | Proposal | None:
        """What a voter that has not voted yet has to hear again."""
        return None if peer in self.given else self.lock or self.proposal

    def count(self, sender: PeerId, said: Vote) -> list[Effect]:
        """Take a vote, of this round or another."""
        block, view, voter = self.proposal.block, self.proposal.view, self.ledger.head.voter(sender)
        if (said.epoch, said.round, said.view) != (block.epoch, block.round, view):
            return []
        if voter is None:
            return [Refused(sender, "not a member", "it has no vote in this round")]
        ours = said.block == block.hash
        if sender in self.ballots[said.phase] if ours else (sender, said.phase) in self.strange:
            return []
        if not self.signer.verify(sender, self._payload(said, voter), said.signature):
            return [Refused(sender, "bad signature", f"vote on round {said.round}, maybe of another disk of that peer")]
        if ours:
            self.ballots[said.phase][sender] = Ballot(sender, said.signature)
        else:
            self.strange[sender, said.phase] = said
        return self._accuse(voter, said)

    def _payload(self, said: Vote, voter: Voter) -> bytes:
        run = self.ledger.run
        return vote_payload(run, said.epoch, said.round, said.view, said.phase, said.block, voter.incarnation)

    def _accuse(self, voter: Voter, said: Vote) -> list[Effect]:
        """A voter that voted for our block and for another in one view, if that is what `said` shows."""
        ballot, strange = self.ballots[said.phase].get(voter.peer), self.strange.get((voter.peer, said.phase))
        if ballot is None or strange is None:
            return []
        true = msgspec.structs.replace(said, block=self.proposal.block.hash, signature=ballot.signature)
        return [Accuse(*(side(voter.peer, self._payload(vote, voter), vote.signature) for vote in (true, strange)))]

    def given_up(self, sender: PeerId, said: ViewChange) -> list[Effect]:
        """A voter goes on to a later view: it has not voted to commit our block and forgotten that."""
        block, view, voter = self.proposal.block, self.proposal.view, self.ledger.head.voter(sender)
        ballot = self.ballots[PRECOMMIT].get(sender)
        same_round = (said.epoch, said.round) == (block.epoch, block.round)
        if ballot is None or voter is None or not same_round or not said.view > view >= said.pledge.locked:
            return []
        vote = Vote(block.epoch, block.round, view, PRECOMMIT, block.hash, ballot.signature)
        pledged = equivocation.pledge(
            self.ledger.run, said.epoch, said.round, said.view, said.pledge, voter.incarnation
        )  # fmt: skip
        return [Accuse(side(sender, self._payload(vote, voter), vote.signature), pledged)]
