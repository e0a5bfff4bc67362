"""The half of a round that only its leader runs: plan, freeze, propose, lock, commit.

    FOLLOWING  another peer leads      until the view is ours                                         -> IDLE
    IDLE       who is ready?           -> Plan to the members                                         -> GATHER
    GATHER     Contribution, Have      -> everyone here is held whole, or the deadline: Freeze        -> REDUCE
    REDUCE     result bytes arrive     -> every part is here: Proposal to the committee               -> VOTE
    VOTE       prevotes: a quorum      -> Lock;   precommits: a quorum -> Commit, durable before said -> IDLE

A member that is lost is no longer waited for. A lost *owner* of parts, or one that does not deliver by the deadline,
costs an attempt: the same round is planned again, the backups of the lost take over their parts, and every contribution
that is still held whole counts. Nothing is undone by a failed attempt, since nothing was done: the model moves by
commits alone. In one view a leader proposes one block at most; where a lock says which, it proposes that one.

Reports say what each member last saw, so what was lost on the way is said again; Standing does the same for the leader.
In a swarm of more than MAX_VOTERS a leader would spend its uplink on repeating long lists. There the whole plan goes to
voters and owners, and to others what concerns them; the Freeze to owners; the Proposal to voters; and voters pass the
Commit on.
Every voter carries this machine, and the follower says when it is its turn.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec

from dugnad.configs.recipe import Recipe
from dugnad.coordinator import equivocation, ranges
from dugnad.coordinator import follower as following
from dugnad.coordinator.effects import Accuse, Cost, Effect, Keep, LeftOut, Refused, Send, Store
from dugnad.coordinator.equivocation import side
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.ledger import Head
from dugnad.coordinator.membership import Membership, Stage, stretch
from dugnad.coordinator.messages import (
    MAX_PEERS,
    MAX_VOTERS,
    PRECOMMIT,
    PREVOTE,
    Applied,
    Ballot,
    Block,
    Commit,
    Contribution,
    Delegation,
    Entry,
    Freeze,
    Have,
    Lock,
    Message,
    Plan,
    Proposal,
    Report,
    Seat,
    Standing,
    ViewChange,
    Vote,
    Voter,
    applied_payload,
    vote_payload,
)
from dugnad.coordinator.votes import Signer, chosen, weight_of
from dugnad.dht.identity import PeerId

MAX_VECTORS = 2
"""How many vectors of one contributor an owner holds: the newest, and one of a seat that was changed."""
MAX_OWNERS = 64
"""How many reduce at most: above that, connections and messages cost more than the work that is shared."""
SETTLE_S = 5.0
"""How long those of the last round are awaited, after a commit or a start, to say that they stand at the head.

Who says that it is getting there is awaited for as long as an exchange may take.
"""
COUNT_S = 0.5
"""How often it is counted how many of more than MAX_VOTERS are still awaited."""
PASS_ON_S = 3.0
"""How long voters may take to pass a commit on, before a member that lacks it is told by the leader."""
SHOWN_ROUNDS = 8
"""Of how many rounds the signed model digests are kept to show to joiners."""


class Assign(Protocol):
    """`optim.plan.assign_parts`, which this floor does not import."""

    def __call__(
        self, num_parts: int, members: Sequence[tuple[PeerId, float]], *, previous: tuple[PeerId, ...] | None
    ) -> tuple[PeerId, ...]:
        """Return the owner of each part."""


class Phase(StrEnum):
    """Where the leader is in a round."""

    FOLLOWING = following.FOLLOWING
    IDLE = "idle"
    GATHER = "gather"
    REDUCE = "reduce"
    VOTE = "vote"
    FINISHED = "finished"


@dataclass(slots=True)
class _Round:
    """One round in the making; `seats` holds everyone who was ever given work in it, for the data ranges' sake."""

    redo: ranges.Ranges
    cursor: int
    steps: int
    plan: Plan
    deadline: float
    seats: dict[PeerId, Seat] = field(default_factory=dict)
    contributions: dict[PeerId, Contribution] = field(default_factory=dict)
    held: dict[tuple[PeerId, PeerId], tuple[bytes, ...]] = field(default_factory=dict)
    """(owner, contributor) -> roots of what the owner holds whole in this attempt: MAX_VECTORS at most, newest last."""
    holders: Counter[tuple[PeerId, bytes]] = field(default_factory=Counter)
    """(contributor, root) -> how many owners hold it: the same, counted."""
    owners: tuple[PeerId, ...] = ()
    """Who owns parts in the plan, in peer-id order."""
    owners_seen: int = -1
    """At which `Membership.changes` all of them were there."""
    whole: set[PeerId] = field(default_factory=set)
    """Whose contributions every owner holds whole."""
    awaited: PeerId | None = None
    """Who was waited for when we looked last: while it still is, nobody else needs a look."""
    slow: set[PeerId] = field(default_factory=set)
    """Owners that were here and did not deliver."""
    freeze: Freeze | None = None
    results: dict[int, bytes] = field(default_factory=dict)
    proposal: Proposal | None = None
    ballots: dict[int, dict[PeerId, Ballot]] = field(default_factory=lambda: {PREVOTE: {}, PRECOMMIT: {}})
    """phase -> who voted for the proposal."""
    lock: Lock | None = None
    strange: dict[tuple[PeerId, int], Vote] = field(default_factory=dict)
    """(voter, phase) -> a vote in this view for another block than ours."""


class Leader:
    """Leads the run whenever `follower`, this peer's own voting half, says that it is its turn.

    started: unix seconds when this process began, so that its attempts are told from those before. known_plan: the
    newest plan of the round under way that this peer was given by another leader. barred: who gets no seat and no vote.
    """

    def __init__(
        self,
        follower: Follower,
        signer: Signer,
        recipe: Recipe,
        num_parts: int,
        assign: Assign,
        *,
        started: int,
        known_plan: Callable[[], Plan | None] = lambda: None,
        barred: Callable[[], frozenset[PeerId]] = frozenset,
    ) -> None:
        self.phase = Phase.FOLLOWING
        self.reason = "starting"
        self.leaving = False
        """Whether this peer wants to go, and so to be in no later committee."""
        self.membership = Membership(recipe.rounds.silence_s)
        self.follower = follower
        self.validation: tuple[int, float | None] = (0, None)
        """The newest (round, validation loss) that the shell measured."""
        self.digests: dict[int, dict[PeerId, Applied]] = {}
        """round -> peer -> what it said it applied, of the newest rounds."""
        self._signer = signer
        self._recipe = recipe
        self._num_parts = num_parts
        self._assign = assign
        self._known_plan = known_plan
        self._barred = barred
        self._round: _Round | None = None
        self._led: tuple[bytes, int] | None = None
        """(head, view) that we lead."""
        self._led_at = 0.0
        """When we took the lead, and forgot whom we knew."""
        self._committed_at = 0.0
        self._next_attempt = started
        self._awaited: tuple[PeerId, ...] = ()
        self._held_up_by: PeerId | None = None
        """One of many awaited: while it is not there, who else is missing need not be counted at every message."""
        self._count_at = 0.0
        self._settle_until = 0.0
        self._settle_limit = 0.0
        self._passed_on_by = 0.0
        self._stand_at = 0.0
        self._told_at: dict[PeerId, float] = {}
        self._handlers: dict[type[Message], Callable[..., list[Effect]]] = {
            Report: self._on_report,
            Contribution: self._on_contribution,
            Have: self._on_have,
            Vote: self._on_vote,
            ViewChange: self._on_view_change,
            Applied: self._on_applied,
        }

    # -- what happens to the leader

    def handles(self, message: Message) -> bool:
        """Whether `message` is this machine's or its follower's."""
        return type(message) in self._handlers or self.follower.handles(message)

    def receive(self, sender: PeerId, message: Message, *, now: float) -> list[Effect]:
        """Take one of the messages that `handles` names; effects in the order in which they must happen."""
        self.follower.heard(sender, message, now=now)
        handler = self._handlers.get(type(message))
        if handler is not None:
            return self._settle(handler(sender, message, now), now)
        if self.follower.handles(message):
            return self._settle(self.follower.receive(sender, message, now=now), now)
        return [Refused(sender, "misdirected", f"{type(message).__name__} is for members")]

    def result(
        self, owner: PeerId, order: tuple[int, int, int], parts: dict[int, bytes], *, now: float
    ) -> list[Effect]:
        """The bytes of encoded averages of `owner` are here, {part: digest}, checked and on disk.

        order: the (round, view, attempt) that they were made in.
        """
        out = self.follower.holds(tuple(parts.values()), now=now)
        work = self._round
        if work is not None and self.phase is Phase.REDUCE and order == work.plan.order:
            owned = {part for part, who in enumerate(work.plan.owners) if who == owner}
            work.results.update((part, digest) for part, digest in parts.items() if part in owned)
        return self._settle(out, now)

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """Blobs that were fetched are checked and on disk."""
        return self._settle(self.follower.holds(digests, now=now), now)

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> list[Effect]:
        """This peer's copy of the model has taken `round_`."""
        return self._settle(self.follower.applied(round_, model, cost, now=now), now)

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """Blobs of the round being applied are damaged on this disk."""
        return self._settle(self.follower.damaged(digests, now=now), now)

    def lost(self, peer: PeerId, why: str, *, now: float) -> list[Effect]:
        """The network says that `peer` does not answer."""
        self.membership.lose(peer, why)
        return self._settle([], now)

    def restore(self, digests: Mapping[int, Mapping[PeerId, Applied]], validation: tuple[int, float | None]) -> None:
        """Take up what this peer's own disk kept of what others signed, and the newest validation loss."""
        self.digests.update({round_: dict(said) for round_, said in digests.items()})
        self.validation = validation

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> list[Effect]:
        """The shell holds the model after `round_`; `since` are the commits after it."""
        return self._settle(self.follower.synced(round_, model, since, now=now), now)

    def leave(self, *, now: float) -> list[Effect]:
        """This peer wants to go: it is left out of the next committee, if someone else is in it."""
        self.leaving = True
        return self._settle([], now)

    def tick(self, *, now: float) -> list[Effect]:
        """Let time pass: silences, deadlines, and the leader's own standing."""
        self.membership.tick(now=now)
        out = self._settle(self.follower.tick(now=now), now)
        if self._led is not None and now >= self._stand_at:
            self._stand_at = now + self._recipe.rounds.report_s * stretch(self.follower.ledger.head.contributors)
            others = tuple(peer for peer in self._hearers() if peer != self._signer.peer_id)
            out += self._settle(self.follower.receive(self._signer.peer_id, self.standing(), now=now), now)
            out.append(Send(others, self.standing()))
        return out

    def wake_at(self) -> float:
        """When `tick` has something to do next."""
        if self._led is None:
            return self.follower.wake_at()
        return min(self._stand_at, self.membership.wake_at(), self.follower.wake_at(), self._decide_at())

    def _decide_at(self) -> float:
        """When time alone makes a difference to the round."""
        work = self._round
        if work is None:
            return self._settle_until if self._awaited else float("inf")
        waits_for_us = self.phase is Phase.REDUCE and not self._missing(work)
        return float("inf") if waits_for_us else work.deadline

    # -- what others may ask

    def standing(self) -> Standing:
        """Where the run stands, in words."""
        said = self.follower.position()
        if self._led is None:
            return said
        val_round, val_loss = self.validation
        return msgspec.structs.replace(
            said,
            phase=str(self.phase),
            reason=self.reason[:200],
            finished=self.finished,
            val_round=val_round,
            val_loss=val_loss,
        )

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are done."""
        return self._recipe.rounds.steps_at(self.follower.ledger.head.global_step) == 0

    @property
    def plan(self) -> Plan | None:
        """The plan of the round that we lead."""
        return self._round.plan if self._round and self._round.plan.seats else None

    def expects(self, owner: PeerId, order: tuple[int, int, int], parts: Iterable[int]) -> bool:
        """Whether averages of these parts, made by `owner` in that attempt, are on their way here."""
        plan = self.plan or self._known_plan()
        return plan is not None and plan.order == order and all(plan.owners[part] == owner for part in parts)

    def state_ballots(self, round_: int, model: bytes) -> tuple[Ballot, ...]:
        """Who of those that vote next signed that `model` is the digest after `round_`."""
        said, voters = self.digests.get(round_, {}), self.follower.ledger.head.voters
        signed = (peer for peer in said if said[peer].model == model and peer in voters)
        return tuple(Ballot(peer, said[peer].signature) for peer in signed)

    def deserted(self, *, now: float) -> bool:
        """Whether we lead, and nobody else of the committee is here, though there was time to say so."""
        waits = self.phase in (Phase.IDLE, Phase.FINISHED) and now >= max(self._led_at, self._committed_at) + SETTLE_S
        return waits and not self._others(self.follower.ledger.head)

    def _hearers(self) -> tuple[PeerId, ...]:
        """Whom a leader keeps in touch with: who is here, and the voters, who may not know yet whom to report to."""
        return tuple(sorted({*self.membership.live(), *self.follower.ledger.head.voters}))

    # -- messages

    def _on_report(self, sender: PeerId, said: Report, now: float) -> list[Effect]:
        place, head = (said.epoch, said.head_round), self.follower.ledger.head
        behind = self.follower.behind(place, sender, now=now)  # our disk is an older copy, or another epoch began
        if self._led is None or place != head.place or said.in_view < self.follower.view:
            if self._led is not None:
                self.membership.heard(sender, said, now=now)
            if now < self._passed_on_by and place == (head.epoch, head.round - 1):
                return [*behind]
            return [*behind, *self.follower.put_right(sender, place, said.in_view, now=now)]
        if not self.membership.heard(sender, said, now=now):
            return [Refused(sender, "full", f"{MAX_PEERS} peers are here already")]
        out = self._outbid(said, now)
        again_s = self._recipe.rounds.report_s * stretch(head.contributors)
        if out or now < self._told_at.get(sender, -1e9) + again_s:
            return out
        again = self._unheard(sender, said)
        return self._tell((sender,), again, now) if again is not None else []

    def _outbid(self, said: Report, now: float) -> list[Effect]:
        """A process that led this view before us, and died, may have got further than our attempts: go beyond."""
        if (said.round, said.view) != (self.follower.ledger.head.round + 1, self.follower.view):
            return []
        if said.attempt < self._next_attempt:
            return []
        self._next_attempt = said.attempt + 1
        planning = self._round is not None and self.phase in (Phase.GATHER, Phase.REDUCE)
        return self._attempt(self._round, now) if planning and self._round is not None else []

    def _unheard(self, peer: PeerId, said: Report) -> Message | None:
        """What `peer`, by its own report, has not heard yet."""
        work = self._round
        if work is None:
            return None
        if self.phase is Phase.VOTE:
            if peer not in self.follower.ledger.head.voters:
                return None
            if work.lock is not None:
                return work.lock if peer not in work.ballots[PRECOMMIT] else None
            return work.proposal if peer not in work.ballots[PREVOTE] else None
        if (said.round, said.view, said.attempt) != work.plan.order:
            return self._plan_for(work, peer) if work.plan.seat_of(peer) else None
        if peer not in self._folding(work):
            return None
        return work.freeze if said.stage in (Stage.TRAINING, Stage.CONTRIBUTED) else None

    def _on_contribution(self, sender: PeerId, said: Contribution, now: float) -> list[Effect]:
        work, head = self._round, self.follower.ledger.head
        if (said.epoch, said.round, said.head) != (head.epoch, head.round + 1, head.hash):
            return [LeftOut(sender, "stale contribution", f"round {said.round}; this is round {head.round + 1}")]
        if work is None:
            return []  # we have only just taken the lead; it is said again
        seat = work.seats.get(sender)
        if seat is None:
            return [LeftOut(sender, "no seat", f"no work was given in round {said.round}")]
        samples = ranges.count(said.ranges)
        if not samples or said.ranges != ranges.take(seat.ranges, samples)[0]:
            return [LeftOut(sender, "other samples", "it was trained on others than those of its seat")]
        if said.tokens != samples * self._recipe.model.context:
            return [LeftOut(sender, "bad contribution", f"{said.tokens} tokens in {samples} samples")]
        if not abs(said.loss) < float("inf"):
            return [LeftOut(sender, "non-finite", "its loss is not a finite number")]
        work.contributions[sender] = said
        self._look_whether_whole(work, sender)
        return []

    def _on_have(self, sender: PeerId, said: Have, now: float) -> list[Effect]:
        work = self._round
        if work is None or said.order != work.plan.order:
            return []
        if sender not in work.owners:
            return [Refused(sender, "no seat", "it holds parts that nobody gave it")]
        for contributor, root in said.vectors:
            known = work.held.get((sender, contributor), ())
            if contributor not in work.seats or root in known:
                continue
            work.holders[contributor, root] += 1
            for old in known[: len(known) + 1 - MAX_VECTORS]:
                work.holders[contributor, old] -= 1
            work.held[sender, contributor] = (*known, root)[-MAX_VECTORS:]
            self._look_whether_whole(work, contributor)
        return []

    @staticmethod
    def _look_whether_whole(work: _Round, peer: PeerId) -> None:
        said = work.contributions.get(peer)
        if said is not None and work.holders[peer, said.root] == len(work.owners):
            work.whole.add(peer)
        else:
            work.whole.discard(peer)

    def _on_vote(self, sender: PeerId, said: Vote, now: float) -> list[Effect]:
        work, ledger = self._round, self.follower.ledger
        if work is None or work.proposal is None:
            return []
        block, view, voter = work.proposal.block, work.proposal.view, ledger.head.voter(sender)
        if (said.epoch, said.round, said.view) != (block.epoch, block.round, view):
            return []
        if voter is None:
            return [Refused(sender, "not a member", "it has no vote in this round")]
        ours = said.block == block.hash
        if sender in work.ballots[said.phase] if ours else (sender, said.phase) in work.strange:
            return []
        if not self._signer.verify(sender, self._payload(said, voter), said.signature):
            return [Refused(sender, "bad signature", f"vote on round {said.round}, maybe of another disk of that peer")]
        if ours:
            work.ballots[said.phase][sender] = Ballot(sender, said.signature)
        else:
            work.strange[sender, said.phase] = said
        return self._accuse(work, voter, said)

    def _payload(self, said: Vote, voter: Voter) -> bytes:
        run = self.follower.ledger.run
        return vote_payload(run, said.epoch, said.round, said.view, said.phase, said.block, voter.incarnation)

    def _accuse(self, work: _Round, voter: Voter, said: Vote) -> list[Effect]:
        """A voter that voted for our block and for another in one view, if that is what `said` shows."""
        ballot, strange = work.ballots[said.phase].get(voter.peer), work.strange.get((voter.peer, said.phase))
        if ballot is None or strange is None or work.proposal is None:
            return []
        true = msgspec.structs.replace(said, block=work.proposal.block.hash, signature=ballot.signature)
        return [Accuse(*(side(voter.peer, self._payload(vote, voter), vote.signature) for vote in (true, strange)))]

    def _on_view_change(self, sender: PeerId, said: ViewChange, now: float) -> list[Effect]:
        """A voter gives us up; it has not voted to commit our block and forgotten that."""
        work, accused = self._round, list[Effect]()
        ballot = None if work is None else work.ballots[PRECOMMIT].get(sender)
        if work is not None and work.proposal is not None and ballot is not None:
            block, view, voter = work.proposal.block, work.proposal.view, self.follower.ledger.head.voter(sender)
            same_round = (said.epoch, said.round) == (block.epoch, block.round)
            if voter is not None and same_round and said.view > view >= said.pledge.locked:
                vote = Vote(block.epoch, block.round, view, PRECOMMIT, block.hash, ballot.signature)
                pledged = equivocation.pledge(
                    self.follower.ledger.run, said.epoch, said.round, said.view, said.pledge, voter.incarnation
                )
                accused = [Accuse(side(sender, self._payload(vote, voter), vote.signature), pledged)]
        return [*accused, *self.follower.receive(sender, said, now=now)]

    def _on_applied(self, sender: PeerId, said: Applied, now: float) -> list[Effect]:
        ledger = self.follower.ledger
        if said.block != ledger.block_hash(said.round):
            return [Refused(sender, "foreign chain", f"it applied another block of round {said.round}, or an old one")]
        payload = applied_payload(ledger.run, said.round, said.block, said.model)
        if not self._signer.verify(sender, payload, said.signature):
            return [Refused(sender, "bad signature", f"model digest after round {said.round}")]
        kept: list[Effect] = []
        known_here = sender in (self._signer.peer_id, *ledger.head.voters) or self.membership.report(sender) is not None
        if known_here and said.round > ledger.head.round - SHOWN_ROUNDS:
            known = self.digests.setdefault(said.round, {})
            if sender not in known or known[sender].model != said.model:  # said again, it may have forgotten its cost
                known[sender] = said
                kept = [Keep(sender, said)]
        for old in [r for r in self.digests if r <= ledger.head.round - SHOWN_ROUNDS]:
            del self.digests[old]
        return kept

    # -- decisions

    def _settle(self, effects: Sequence[Effect], now: float) -> list[Effect]:
        """Hand our own messages to ourselves and take every step that is now possible, until nothing changes."""
        done: list[Effect] = []
        pending = effects
        while True:
            for effect in pending:
                if isinstance(effect, Send) and self._signer.peer_id in effect.to and self.handles(effect.message):
                    others = tuple(peer for peer in effect.to if peer != self._signer.peer_id)
                    if others:
                        done.append(Send(others, effect.message))
                    self_said = self._loop_back(effect.message, now)
                    done.extend(self._settle(self_said, now) if self_said else [])
                else:
                    done.append(effect)
            pending = self._step(now)
            if not pending:
                return done

    def _loop_back(self, message: Message, now: float) -> list[Effect]:
        handler, me = self._handlers.get(type(message)), self._signer.peer_id
        return handler(me, message, now) if handler else list(self.follower.receive(me, message, now=now))

    def _step(self, now: float) -> list[Effect]:
        if not self._leads(now):
            return []
        work = self._round
        if work is not None and work.plan.head != self.follower.ledger.head.hash:
            return self._abandon("the chain went on without this round")
        if self.phase is Phase.GATHER:
            return self._gather(now)
        if self.phase is Phase.REDUCE:
            return self._reduce(now)
        if self.phase is Phase.VOTE:
            return self._count_votes(now)
        return self._idle(now)

    def _leads(self, now: float) -> bool:
        """Whether it is our turn; takes up the lead, or lays it down."""
        follower = self.follower
        if not follower.leads or follower.model is None:
            if self._led is not None:
                self._led, self._awaited, self._held_up_by = None, (), None
                self.membership.forget()
            self._round, self.phase, self.reason = None, Phase.FOLLOWING, "another peer leads"
            return False
        led = (follower.ledger.head.hash, follower.view)
        if self._led is None or (self._led != led and follower.view > 0):
            self._round, self.phase, self.reason = None, Phase.IDLE, "taking the lead"
            given_up = {follower.ledger.head.leader(view) for view in range(follower.view)}
            self._awaited = tuple(sorted(follower.ledger.head.voters - given_up - {self._signer.peer_id}))
            self._settle_until, self._settle_limit = now + SETTLE_S, now + self._recipe.rounds.exchange_s
            self._stand_at = self._led_at = now
            self._held_up_by = None
        if self._led != led:
            self.membership.resize(follower.ledger.head.contributors)
        self._led = led
        return True

    def _idle(self, now: float) -> list[Effect]:
        head = self.follower.ledger.head
        bound = self.follower.bound_to
        if bound is not None:
            return self._propose_again(bound, now)
        if now >= self._settle_until:
            arriving = now < self._settle_limit
            self._awaited = tuple(p for p in self._awaited if arriving and self.membership.is_arriving(p, head))
            self._settle_until, self._held_up_by = self._settle_limit, None
        barred, by = self._barred(), self._held_up_by
        if by is not None and now < self._count_at and not self.leaving and self.membership.holds_up(by, head, barred):
            return []
        steps = self._recipe.rounds.steps_at(head.global_step)
        if steps == 0:
            self.phase, self.reason = Phase.FINISHED, f"finished: all {head.global_step} steps are done"
            return []
        self.phase = Phase.IDLE
        decision = self.membership.decide(
            head, min_peers=self._recipe.rounds.min_peers, awaited=self._awaited, barred=barred
        )
        if len(self._awaited) > MAX_VOTERS:
            missing = (peer for peer in self._awaited if self.membership.holds_up(peer, head, barred))
            self._held_up_by, self._count_at = next(missing, None), now + COUNT_S
        self.reason = decision.reason
        if decision.members and not (self.leaving and self._others(head)):
            return self._open(decision.members, steps, now)
        return self._change_committee(now) if self._awaited == () or self.leaving else []

    def _others(self, head: Head) -> bool:
        """Whether someone else is in the committee, and here."""
        return any(self.membership.is_live(peer) for peer in head.voters - {self._signer.peer_id})

    def _open(self, members: Sequence[PeerId], steps: int, now: float) -> list[Effect]:
        head = self.follower.ledger.head
        deadline = now + self._recipe.rounds.train_s + self._recipe.rounds.exchange_s
        work = _Round(head.redo, head.cursor, steps, self._empty_plan(), deadline)
        self._inherit(work, head)
        for peer in sorted(set(members) - work.seats.keys()):
            work.seats[peer] = self._seat(work, peer)
        self._round = work
        return self._attempt(work, now)

    def _inherit(self, work: _Round, head: Head) -> None:
        """Keep the seats that a leader before us gave in this round: work on them may be done already."""
        known = self._known_plan()
        if known is None or known.head != head.hash:
            return
        given = [r for seat in known.seats for r in seat.ranges]
        cursor = max([head.cursor, *(end for _, end in given)])
        allowed = ranges.normal((*head.redo, (head.cursor, cursor)))
        if not ranges.disjoint(given) or ranges.minus(given, allowed):
            return  # no seats at all rather than such as no block may have
        work.cursor, work.redo = cursor, ranges.minus(allowed, given)
        work.seats.update((seat.peer, seat) for seat in known.seats)

    def _seat(self, work: _Round, peer: PeerId) -> Seat:
        """Allot samples to `peer`: first those that others left undone, then new ones."""
        samples = work.steps * self._recipe.inner.batch_sequences
        allotted, work.redo = ranges.take(work.redo, samples)
        fresh = samples - ranges.count(allotted)
        if fresh:
            allotted = (*allotted, (work.cursor, work.cursor + fresh))
            work.cursor += fresh
        report = self.membership.report(peer)
        return Seat(peer, work.steps, allotted, report.addresses if report else ())

    def _empty_plan(self) -> Plan:
        head, rounds = self.follower.ledger.head, self._recipe.rounds
        return Plan(
            head.epoch, head.round + 1, self.follower.view, self._next_attempt, head.hash, head.global_step,
            (), (), (), rounds.train_s, rounds.exchange_s,
        )  # fmt: skip

    def _attempt(self, work: _Round, now: float) -> list[Effect]:
        """Plan the round, first or again, for those who are here; their data ranges stay as they were."""
        seats = tuple(seat for peer, seat in sorted(work.seats.items()) if self._may_reduce(peer))
        if not seats:
            return self._abandon("everyone who had work is gone")
        able = self._able(work, tuple(seat.peer for seat in seats))
        owners = self._owners(work, able)
        backups = self._backups(owners, sorted(able))
        work.plan = msgspec.structs.replace(self._empty_plan(), seats=seats, owners=owners, backups=backups)
        self._next_attempt += 1
        work.deadline = max(work.deadline, now + self._recipe.rounds.exchange_s)
        work.freeze, work.proposal = None, None
        work.owners, work.owners_seen = tuple(sorted(set(owners))), -1
        work.held.clear()
        work.holders.clear()
        work.whole.clear()
        work.results.clear()
        self.phase = Phase.GATHER
        self.reason = f"round {work.plan.round}: {len(seats)} peers work, {len(work.owners)} reduce"
        return self._tell_plan(work, now)

    def _tell_plan(self, work: _Round, now: float) -> list[Effect]:
        whole = tuple(peer for peer in work.plan.members if self._needs_all(work, peer))
        out = self._tell(whole, work.plan, now)
        for peer in work.plan.members:
            if not self._needs_all(work, peer):
                out += self._tell((peer,), self._plan_for(work, peer), now)
        return out

    def _plan_for(self, work: _Round, peer: PeerId) -> Plan:
        """The plan, without the seats that are nothing to `peer`: it sends its work to the owners, and no further."""
        if self._needs_all(work, peer):
            return work.plan
        seats = [seat for other in (*work.owners, peer) if (seat := work.plan.seat_of(other)) is not None]
        return msgspec.structs.replace(work.plan, seats=tuple(sorted(seats, key=lambda seat: seat.peer)))

    def _needs_all(self, work: _Round, peer: PeerId) -> bool:
        """Whether `peer` needs every seat: owners send to all members, and a voter may have to lead this round."""
        few = len(work.plan.seats) <= MAX_VOTERS
        return few or peer in work.owners or peer in self.follower.ledger.head.voters

    def _folding(self, work: _Round) -> tuple[PeerId, ...]:
        """Who is told of the frozen set: owners fold it; others, as long as they are few, see how far the round is."""
        return work.plan.members if len(work.plan.seats) <= MAX_VOTERS else work.owners

    def _able(self, work: _Round, members: tuple[PeerId, ...]) -> dict[PeerId, float]:
        """Who of `members` may own parts, with its uplink."""
        reports = {peer: report for peer in members if (report := self.membership.report(peer))}
        able = [peer for peer in members if reports[peer].accepts and peer not in work.slow]
        if not able:
            work.slow.clear()
            able = list(members)
        # who does not know its uplink counts as the slowest who does
        slowest = min((reports[peer].uplink for peer in able if reports[peer].uplink > 0), default=1.0)
        weighed = {peer: reports[peer].uplink or slowest for peer in able}
        before = set(work.plan.owners)
        fastest = sorted(able, key=lambda peer: (peer not in before, -weighed[peer], peer))[:MAX_OWNERS]
        return {peer: weighed[peer] for peer in fastest}

    def _owners(self, work: _Round, able: Mapping[PeerId, float]) -> tuple[PeerId, ...]:
        plan = work.plan
        if not plan.owners:
            return self._assign(self._num_parts, list(able.items()), previous=None)
        promoted = tuple(
            owner if owner in able else backup for owner, backup in zip(plan.owners, plan.backups, strict=True)
        )
        if set(promoted) <= able.keys():
            return promoted
        return self._assign(self._num_parts, list(able.items()), previous=promoted)

    @staticmethod
    def _backups(owners: tuple[PeerId, ...], able: Sequence[PeerId]) -> tuple[PeerId, ...]:
        """Who takes a part over when its owner is lost: the parts of one owner go to many, one after the other."""
        if len(able) == 1:
            return owners
        nth: Counter[PeerId] = Counter()
        at = {peer: index for index, peer in enumerate(able)}
        backups: list[PeerId] = []
        for owner in owners:
            step = 1 + nth[owner] % (len(able) - 1)
            nth[owner] += 1
            backups.append(able[(at[owner] + step) % len(able)])
        return tuple(backups)

    def _abandon(self, reason: str) -> list[Effect]:
        self._round, self.phase, self.reason = None, Phase.IDLE, reason
        return []

    def _lost_owners(self, work: _Round) -> list[PeerId]:
        if work.owners_seen == self.membership.changes:
            return []
        lost = [peer for peer in work.owners if not self._may_reduce(peer)]
        work.owners_seen = -1 if lost else self.membership.changes
        return lost

    def _may_reduce(self, peer: PeerId) -> bool:
        """Whether `peer` is here and has not started anew, its bytes forgotten."""
        said = self.membership.report(peer)
        return said is not None and said.stage != Stage.SYNCING and self.membership.is_live(peer)

    def _declined(self, work: _Round, peer: PeerId) -> bool:
        """Whether `peer` knows this plan and says that it has nothing to contribute to it."""
        said = self.membership.report(peer)
        known = said is not None and (said.round, said.view, said.attempt) == work.plan.order
        return known and said is not None and said.stage == Stage.WAITING

    def _gather(self, now: float) -> list[Effect]:
        work = self._round
        assert work is not None
        if self._lost_owners(work):
            return self._attempt(work, now)
        waiting = self._waits_for(work) is not None
        self.reason = f"round {work.plan.round}: {len(work.whole)} of {len(work.plan.seats)} contributions held"
        if waiting and now < work.deadline:
            return []
        if work.whole:
            return self._freeze(work, now)
        if not waiting:
            return self._abandon("nobody's work could be gathered")
        self._mark_slow(work, {owner for owner in work.owners if self._holds_nothing(work, owner)})
        return self._attempt(work, now)

    def _waits_for(self, work: _Round) -> PeerId | None:
        """A member that is here and may still contribute, if there is one."""
        if work.awaited is None or not self._may_contribute(work, work.awaited):
            work.awaited = next((peer for peer in work.plan.members if self._may_contribute(work, peer)), None)
        return work.awaited

    def _may_contribute(self, work: _Round, peer: PeerId) -> bool:
        return peer not in work.whole and self.membership.is_live(peer) and not self._declined(work, peer)

    def _holds_nothing(self, work: _Round, owner: PeerId) -> bool:
        promised = {peer: said.root for peer, said in work.contributions.items() if peer != owner}
        return bool(promised) and not any(root in work.held.get((owner, p), ()) for p, root in promised.items())

    @staticmethod
    def _mark_slow(work: _Round, owners: set[PeerId]) -> None:
        if owners != set(work.owners):
            work.slow |= owners

    def _freeze(self, work: _Round, now: float) -> list[Effect]:
        entries = tuple(
            Entry(peer, said.root, said.tokens, said.loss, said.ranges)
            for peer, said in sorted(work.contributions.items())
            if peer in work.whole
        )
        work.freeze = Freeze(*work.plan.order, entries)
        work.deadline = now + self._recipe.rounds.exchange_s
        self.phase = Phase.REDUCE
        counted = {entry.peer for entry in entries}
        late = [
            LeftOut(peer, "late", f"not all of its bytes were there when round {work.plan.round} was frozen")
            for peer in sorted(work.contributions.keys() - counted)
        ]
        return [*late, *self._tell(self._folding(work), work.freeze, now)]

    def _reduce(self, now: float) -> list[Effect]:
        work = self._round
        assert work is not None
        assert work.freeze is not None
        if self._lost_owners(work):
            return self._attempt(work, now)
        missing = self._missing(work)
        self.reason = f"round {work.plan.round}: {self._num_parts - len(missing)} of {self._num_parts} parts reduced"
        if missing and now >= work.deadline:
            self._mark_slow(work, {work.plan.owners[part] for part in missing})
            return self._attempt(work, now)
        if missing or not self.follower.at_head or self.follower.model is None:
            return []
        parts = tuple(work.results[part] for part in range(self._num_parts))
        members = self._next_members(entry.peer for entry in work.freeze.entries) or self._last_member
        return self._propose(work, work.freeze.entries, parts, members, now)

    def _missing(self, work: _Round) -> list[int]:
        return [part for part in range(self._num_parts) if part not in work.results]

    def _change_committee(self, now: float) -> list[Effect]:
        """Between rounds: a block that changes nothing but the committee, where someone is to go or to come."""
        head, follower = self.follower.ledger.head, self.follower
        if not follower.at_head or follower.model is None:
            return []
        heard = {peer for peer in head.voters if self.membership.report(peer) or peer == self._signer.peer_id}
        if heard != head.voters and now < self._led_at + SETTLE_S:
            return []  # the others may be here, and have not said so yet
        here = {*self.membership.live(), self._signer.peer_id}
        if not follower.ledger.rule.decided(head.committee, here):
            return []  # if the others come back, they should find the committee that they know
        members = self._next_members(heard) or self._last_member
        seat = self._coordinator(members)
        stays = members.keys() == head.voters
        if stays and (seat is None or seat.coordinator == head.coordinator):
            return []
        if not self._can_decide(members, seat):
            return []  # it would wait for ever for who has died with the disk that the committee knows
        self._round = _Round(head.redo, head.cursor, 0, self._empty_plan(), float("inf"))
        return self._propose(self._round, (), (), members, now)

    def _next_members(self, stay: Iterable[PeerId]) -> dict[PeerId, bytes]:
        """Who of those that `stay`, and the coordinator, may vote next, {peer: incarnation}; not who leaves."""
        head, mine = self.follower.ledger.head, {self._signer.peer_id: self.follower.incarnation}
        gone = self.membership.leaving() | self._barred() | (mine.keys() if self.leaving else frozenset())
        delegated = self.follower.delegation
        peers = set(stay)
        if delegated is not None and self._is_here(delegated.coordinator):
            peers.add(delegated.coordinator)
        elif head.coordinator is not None and not self._is_here(head.coordinator):
            peers.discard(head.coordinator)
        peers -= {peer for peer in peers if self.membership.report(peer) and not self.membership.is_live(peer)}
        known = {voter.peer: voter.incarnation for voter in head.committee}
        told = {peer: said.incarnation for peer in peers if (said := self.membership.report(peer)) is not None}
        members = {peer: (known | told | mine)[peer] for peer in peers - gone if peer in known | told | mine}
        coordinator = delegated.coordinator if delegated is not None else head.coordinator
        return chosen(members, head.voters, coordinator, head.hash)

    @property
    def _last_member(self) -> dict[PeerId, bytes]:
        """Us: when all are leaving, somebody must be left to let the others go, and to go last."""
        return {self._signer.peer_id: self.follower.incarnation}

    def _is_here(self, peer: PeerId) -> bool:
        return peer == self._signer.peer_id or self.membership.stands(peer, self.follower.ledger.head)

    def _coordinator(self, members: Mapping[PeerId, bytes]) -> Delegation | None:
        """Who has the coordinator's seat in a committee of `members`."""
        delegated = self.follower.delegation
        return delegated if delegated is not None and delegated.coordinator in members else None

    def _can_decide(self, members: Mapping[PeerId, bytes], seat: Delegation | None) -> bool:
        """Whether those of `members` who are here, each with the disk that is named, are a quorum among them."""
        rule, reports = self.follower.ledger.rule, self.membership.report
        committee = rule.weigh(members, None if seat is None else seat.coordinator, self.follower.ledger.credit)
        live = {
            peer for peer in self.membership.live() if (said := reports(peer)) and said.incarnation == members.get(peer)
        }
        return rule.decided(committee, live | {self._signer.peer_id})

    def _propose(
        self,
        work: _Round,
        entries: tuple[Entry, ...],
        parts: tuple[bytes, ...],
        members: Mapping[PeerId, bytes],
        now: float,
    ) -> list[Effect]:
        head = self.follower.ledger.head
        assert self.follower.model is not None
        allotted = [r for seat in work.seats.values() for r in seat.ranges]
        done = [r for entry in entries for r in entry.ranges]
        seat = self._coordinator(members)
        coordinator = None if seat is None else seat.coordinator
        block = Block(
            epoch=head.epoch,
            round=head.round + 1,
            parent=head.hash,
            model_before=self.follower.model,
            global_step=head.global_step + work.steps,
            steps=work.steps,
            entries=entries,
            parts=parts,
            redo=ranges.minus((*work.redo, *allotted), done),
            cursor=work.cursor,
            committee=self.follower.ledger.rule.weigh(members, coordinator, self.follower.ledger.credit),
            coordinator=seat,
        )
        return self._put_to_vote(work, block, now)

    def _propose_again(self, block: Block, now: float) -> list[Effect]:
        """Propose what a lock, or our own prevote of before a restart, binds us to."""
        head = self.follower.ledger.head
        self._round = _Round(head.redo, head.cursor, block.steps, self._empty_plan(), float("inf"))
        return self._put_to_vote(self._round, block, now)

    def _put_to_vote(self, work: _Round, block: Block, now: float) -> list[Effect]:
        work.proposal = Proposal(self.follower.view, block)
        work.deadline = float("inf")
        self.phase = Phase.VOTE
        # members without a vote, if few, get it too: they hold its parts and may apply it without asking for them
        members = set(work.plan.members) if len(work.plan.seats) <= MAX_VOTERS else set()
        to = tuple(sorted(self.follower.ledger.head.voters | members | {self._signer.peer_id}))
        return self._tell(to, work.proposal, now)

    def _count_votes(self, now: float) -> list[Effect]:
        work = self._round
        assert work is not None
        assert work.proposal is not None
        head, rule = self.follower.ledger.head, self.follower.ledger.rule
        phase = PREVOTE if work.lock is None else PRECOMMIT
        given = work.ballots[phase]
        if not rule.decided(head.committee, given):
            have, need = weight_of(head.committee, given), rule.needed(head.committee)
            absent = [peer for peer in head.voters if peer not in given and not self.membership.is_live(peer)]
            gone = f"; {len(absent)} voters are gone" if absent else ""
            what = "votes" if phase == PREVOTE else "votes to commit"
            self.reason = f"round {head.round + 1}: {have} of {need} {what}{gone}"
            return []
        ballots = tuple(ballot for peer, ballot in sorted(given.items()))
        if work.lock is None:
            work.lock = Lock(work.proposal.view, work.proposal.block, ballots)
            return self._tell(tuple(sorted(head.voters)), work.lock, now)
        commit = Commit(work.proposal.block, work.proposal.view, ballots)
        passed_on = {peer for voter in head.voters for peer in self.follower.passes_on(voter, commit)}
        hearers = tuple(peer for peer in self._hearers() if peer not in passed_on)
        self._passed_on_by = now + PASS_ON_S if passed_on else 0.0
        self._round, self.phase, self._committed_at = None, Phase.IDLE, now
        self._awaited = self.membership.ready(head)
        self._settle_until, self._settle_limit = now + SETTLE_S, now + self._recipe.rounds.exchange_s
        self._held_up_by = None
        followed = self.follower.receive(self._signer.peer_id, commit, now=now)
        assert isinstance(followed[0], Store), "a commit is durable before anyone hears of it"
        others = tuple(peer for peer in hearers if peer != self._signer.peer_id)
        return [followed[0], *self._tell(others, commit, now), *followed[1:]]

    def _tell(self, to: tuple[PeerId, ...], message: Message, now: float) -> list[Effect]:
        for peer in to:
            self._told_at[peer] = now
        return [Send(to, message)]
