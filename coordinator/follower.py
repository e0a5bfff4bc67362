"""The half of a round that every voter runs, the coordinator too: hold, check, vote, and follow what was committed.

    Proposal   -> all parts held?  no: wait, then fetch them       yes: Vote
    Commit     -> proven?  no: refuse    yes: Store, then hold all parts, then Apply, then Applied
    silence    -> nothing: a follower never concludes anything from it

Two positions move apart for a while: the chain's head (proven commits, stored) and the model (commits applied). The
model only ever takes the next committed bytes, so it is always the model after some round of the chain.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dugnad.coordinator.ledger import Ledger, LedgerError
from dugnad.coordinator.messages import (
    Applied,
    Block,
    Commit,
    Delegation,
    Message,
    Proposal,
    Vote,
    applied_payload,
    delegation_payload,
    vote_payload,
)
from dugnad.coordinator.votes import Signer
from dugnad.dht.identity import PeerId

FETCH_AFTER_S = 2.0
"""How long proposed parts may still be on their way from their owners before a voter asks others for them."""
RETRY_S = 3.0
"""How long a fetch or a catch-up may take before it is asked for again."""
REPLAY_ROUNDS = 32
"""How many committed rounds a follower replays at most; further behind, it takes the state instead."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message`, sealed, to each of `to`."""

    to: tuple[PeerId, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Store:
    """Make `commit` durable; effects after this one must not leave before it is."""

    commit: Commit


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get these parts, (part, digest), from any of `donors`, store them, and say `holds`."""

    wanted: tuple[tuple[int, bytes], ...]
    donors: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply the committed parts of `commit`, all held, to the model, and say `applied`."""

    commit: Commit


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Ask `donor` for the commits after `after_round` and hand them in."""

    donor: PeerId
    after_round: int


@dataclass(frozen=True, slots=True)
class Resync:
    """This model is of no use any more: take the state from peers, and say `synced`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A message was refused; `reason` is counted, `detail` logged."""

    sender: PeerId
    reason: str
    detail: str


Effect = Send | Store | Fetch | Apply | CatchUp | Resync | Refused


@dataclass(frozen=True, slots=True)
class Cost:
    """What a round cost this peer: seconds in training, seconds since the round before, bytes sent by kind."""

    train_s: float
    wall_s: float
    sent_bytes: dict[str, int]


class Follower:
    """Votes and follows as `signer.peer_id`; `organizer` is who may delegate the lead."""

    def __init__(self, signer: Signer, ledger: Ledger, organizer: PeerId) -> None:
        self.ledger = ledger
        self.leader: PeerId | None = None
        self.term = 0
        self.delegation: Delegation | None = None
        """The organizer's word for that leader and term."""
        self.model: bytes | None = None
        """Digest of the model after `model_round`; None until `synced`."""
        self.model_round = -1
        self._signer = signer
        self._organizer = organizer
        self._held: set[bytes] = set()
        self._proposal: Block | None = None
        self._voted: tuple[tuple[int, int, int], bytes] = ((0, 0, 0), b"")
        """(round, term, view) of the newest vote, and for which block."""
        self._said: Applied | None = None
        self._unapplied: deque[Commit] = deque(maxlen=REPLAY_ROUNDS)
        self._applying: Commit | None = None
        self._act_at = float("inf")
        """When to fetch missing parts, first or again."""
        self._catching_up_until = 0.0
        self._handlers: dict[type[Message], Callable[..., list[Effect]]] = {
            Delegation: self._on_delegation,
            Proposal: self._on_proposal,
            Commit: self._on_commit,
        }

    def restore(self, commits: Iterable[Commit], held: Iterable[bytes]) -> None:
        """Take up the chain that this peer's own disk kept, and say which blobs are there; then `synced` may follow."""
        for commit in commits:
            self.ledger.append(commit)
        self._held.update(held)

    def handles(self, message: Message) -> bool:
        """Whether `message` is this machine's to receive."""
        return type(message) in self._handlers

    def receive(self, sender: PeerId, message: Message, *, now: float) -> list[Effect]:
        """Take a Delegation, Proposal or Commit."""
        return self._handlers[type(message)](sender, message, now)

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """The blobs `digests` are checked and on disk."""
        self._held.update(digests)
        return self._advance(now)

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> list[Effect]:
        """The shell holds the model after `round_`, whose digest peers certified; `since` are the commits after it."""
        self._unapplied = deque(since, maxlen=REPLAY_ROUNDS)
        self._has_model(round_, model)
        self._act_at = now
        return self._advance(now)

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> list[Effect]:
        """The model after `round_` is in place."""
        commit = self._applying
        assert commit is not None
        assert commit.block.round == round_ == self.model_round + 1, "commits are applied one by one, in order"
        self._has_model(round_, model)
        self._held.difference_update(commit.block.parts)
        self._act_at = now if self._unapplied else float("inf")
        payload = applied_payload(self.ledger.run, round_, commit.block.hash, model)
        self._said = Applied(
            round_,
            commit.block.hash,
            model,
            self._signer.sign(payload),
            cost.train_s,
            cost.wall_s,
            tuple(sorted(cost.sent_bytes.items())),
        )
        return [*self._say_applied(), *self._advance(now)]

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """These parts of the commit under way are no longer what they were on disk: get them anew."""
        assert self._applying is not None
        self._held.difference_update(digests)
        if not self._unapplied or self._unapplied[0] is not self._applying:
            self._unapplied.appendleft(self._applying)
        self._applying, self._act_at = None, now
        return self._advance(now)

    def forget(self, digests: Iterable[bytes]) -> None:
        """These blobs are no longer on disk, and belong to nothing that was committed."""
        self._held.difference_update(digests)

    def behind(self, head_round: int, donor: PeerId, *, now: float) -> list[Effect]:
        """`donor` says that the chain has reached `head_round`: catch up if that is news."""
        if head_round <= self.ledger.head.round or now < self._catching_up_until:
            return []
        self._catching_up_until = now + RETRY_S
        return [CatchUp(donor, self.ledger.head.round)]

    def tick(self, *, now: float) -> list[Effect]:
        """Fetch what should have come by now."""
        return self._fetch_missing(now) if now >= self._act_at else []

    def wake_at(self) -> float:
        """When `tick` has something to do."""
        return self._act_at

    @property
    def at_head(self) -> bool:
        """Whether the model is that of the chain's head."""
        return self.model is not None and self.model_round == self.ledger.head.round

    def _on_delegation(self, sender: PeerId, said: Delegation, now: float) -> list[Effect]:
        payload = delegation_payload(self.ledger.run, said.coordinator, said.term)
        if said.term > self.term and not self._signer.verify(self._organizer, payload, said.signature):
            return [Refused(sender, "delegation", f"term {said.term} is not signed by the organizer")]
        if said.term <= self.term:
            return []
        self.leader, self.term, self.delegation = said.coordinator, said.term, said
        return self._say_applied()  # the new leader may not have heard it, and vouches for the model with it

    def _on_proposal(self, sender: PeerId, said: Proposal, now: float) -> list[Effect]:
        block, head = said.block, self.ledger.head
        if sender != self.leader or block.term != self.term:
            return [Refused(sender, "not leader", f"proposal of term {block.term}, term {self.term} is led by another")]
        if block.round > head.round + 1:
            return self.behind(block.round - 1, sender, now=now)
        if block.round <= head.round:
            return []
        try:
            self.ledger.check(block)
        except LedgerError as error:
            return [Refused(sender, "invalid block", str(error))]
        if self._proposal is None or (block.term, block.view) > (self._proposal.term, self._proposal.view):
            self._proposal = block
            self._act_at = now + FETCH_AFTER_S
        return self._advance(now)

    def _on_commit(self, sender: PeerId, said: Commit, now: float) -> list[Effect]:
        if said.block.round <= self.ledger.head.round:
            return []
        if said.block.round > self.ledger.head.round + 1:
            return self.behind(said.block.round, sender, now=now)
        try:
            self.ledger.check_commit(said, self._signer)
        except LedgerError as error:
            return [Refused(sender, "invalid commit", str(error))]
        self.ledger.append(said)
        # in the midst of a round its parts are still on their way here: fetching at once would move them twice
        grace_s = FETCH_AFTER_S if self._proposal is not None else 0.0
        self._proposal = None
        self._unapplied.append(said)
        self._catching_up_until = 0.0
        if self._applying is None:
            self._act_at = now + grace_s
        return [Store(said), *self._advance(now)]

    def _has_model(self, round_: int, model: bytes) -> None:
        self.model_round, self.model, self._applying = round_, model, None
        while self._unapplied and self._unapplied[0].block.round <= round_:
            self._unapplied.popleft()

    def _say_applied(self) -> list[Effect]:
        return [] if self._said is None or self.leader is None else [Send((self.leader,), self._said)]

    def _advance(self, now: float) -> list[Effect]:
        """Apply the next commit, or vote on the proposal, as soon as all of its bytes are held."""
        if self.model is None or self._applying is not None:
            return []
        if self._unapplied:
            return self._apply_next(now)
        block = self._proposal
        if block is None or not self.at_head or self._missing(block):
            return []
        self._act_at = float("inf")
        if block.model_before != self.model:
            self._proposal, self.model = None, None
            return [Resync(f"the committee's model after round {self.model_round} differs from ours")]
        if all(voter.peer != self._signer.peer_id for voter in self.ledger.head.committee):
            return []
        vote = ((block.round, block.term, block.view), block.hash)
        if vote[0] <= self._voted[0] and vote != self._voted:
            assert self.leader is not None
            return [Refused(self.leader, "two proposals", f"two blocks in view {block.view} of round {block.round}")]
        self._voted = vote
        payload = vote_payload(self.ledger.run, block.epoch, block.round, block.term, block.view, block.hash)
        signature = self._signer.sign(payload)
        said = Vote(block.epoch, block.round, block.term, block.view, block.hash, signature)
        return [Send((self.leader,) if self.leader else (), said)]

    def _apply_next(self, now: float) -> list[Effect]:
        commit = self._unapplied[0]
        if commit.block.round != self.model_round + 1:
            self._unapplied.clear()
            self.model = None
            return [Resync(f"{self.ledger.head.round - self.model_round} rounds behind: too many to replay")]
        if self._missing(commit.block):
            return self._fetch_missing(now) if now >= self._act_at else []
        self._applying = commit  # kept here: when many more arrive meanwhile, it falls out of `_unapplied`
        self._act_at = float("inf")
        return [Apply(commit)]

    def _missing(self, block: Block) -> tuple[tuple[int, bytes], ...]:
        return tuple((part, digest) for part, digest in enumerate(block.parts) if digest not in self._held)

    def _fetch_missing(self, now: float) -> list[Effect]:
        """Ask for the parts of the next commit, or of the proposal, that are not here."""
        self._act_at = float("inf")
        if self.model is None or self._applying is not None:
            return []
        if self._unapplied:
            commit = self._unapplied[0]
            block, donors = commit.block, [ballot.peer for ballot in commit.ballots]
        elif self._proposal is not None:
            block, donors = self._proposal, [entry.peer for entry in self._proposal.entries]
        else:
            return []
        missing = self._missing(block)
        if not missing:
            return []
        self._act_at = now + RETRY_S
        # the leader last: its uplink serves everyone
        others = [peer for peer in donors if peer not in (self._signer.peer_id, self.leader)]
        return [Fetch(missing, (*others, *((self.leader,) if self.leader else ())))]
