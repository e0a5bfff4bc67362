"""The chain of committed rounds, and what folds out of it: head, committee, data still to do, credit.

A block is valid on top of its parent when it continues the chain, moves the data ranges without losing or doubling a
sample, and names a committee that may vote next. A commit is valid when, besides, a quorum of the parent's committee
precommitted to the block. Nothing else makes the head move, and it never moves back inside an epoch. The organizer's
key alone begins another epoch: a block without work on any block of this chain, after which what followed that one
counts no more. Who may contribute at all is the `roll`'s.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from dugnad.coordinator import ranges
from dugnad.coordinator.messages import (
    MAX_VOTERS,
    PRECOMMIT,
    Ballot,
    Block,
    Commit,
    Genesis,
    Voter,
    epoch_payload,
    vote_payload,
)
from dugnad.coordinator.roll import OPEN, Gate, Roll, RollError
from dugnad.coordinator.votes import QuorumRule, Signer, leaders
from dugnad.dht.delegation import Delegation, is_delegated
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Verify

KEPT_BLOCKS = 64
"""How many of the newest blocks are kept in memory: a new epoch may begin on any of them."""


class LedgerError(Exception):
    """A block or commit that this chain refuses; the message says why."""


@dataclass(frozen=True, slots=True)
class Charter:
    """What the genesis fixes for all rounds."""

    run: bytes
    organizer: PeerId
    founder: PeerId
    incarnation: bytes
    """Of the founder."""
    rule: QuorumRule
    admission: str
    """Whom it admits: `roll.OPEN`, `roll.INVITED` or `roll.ALLOW_LIST`."""

    @classmethod
    def of(cls, genesis: Genesis, admission: str) -> "Charter":
        """The charter of that genesis; admission is its recipe's word."""
        rule = QuorumRule(open=admission == OPEN)
        return cls(genesis.run, genesis.organizer, genesis.founder, genesis.incarnation, rule, admission)

    def gate(self, verify: Verify) -> Gate:
        """What reads the proofs of those who want in."""
        return Gate(self.run, self.organizer, self.founder, self.admission, verify)

    def first_head(self) -> "Head":
        """The head of a chain without blocks."""
        committee = (Voter(self.founder, 1, self.incarnation),)
        return Head(0, 0, self.run, 0, (), 0, committee, self.founder, 0)


@dataclass(frozen=True, slots=True)
class Head:
    """What the newest committed block leaves behind for the next round."""

    epoch: int
    round: int
    hash: bytes
    global_step: int
    redo: ranges.Ranges
    cursor: int
    committee: tuple[Voter, ...]
    coordinator: PeerId | None
    term: int
    """The newest term of a coordinator that the chain has seen."""
    contributors: int = 0
    """Whose work counted in the newest round that had any: the size of the swarm."""
    roll: Roll = field(default_factory=Roll, compare=False, repr=False)
    """Who is admitted."""

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, round): of two heads of one run the later has the higher."""
        return (self.epoch, self.round)

    @property
    def voters(self) -> frozenset[PeerId]:
        """Who is in the committee."""
        return frozenset(voter.peer for voter in self.committee)

    def voter(self, peer: PeerId) -> Voter | None:
        """The seat of `peer` in the committee."""
        return next((voter for voter in self.committee if voter.peer == peer), None)

    def leader(self, view: int) -> PeerId:
        """Who leads the next round in that view."""
        order = leaders(self.hash, self.committee, self.coordinator)
        return order[view % len(order)]

    def after(self, block: Block, roll: Roll) -> "Head":
        """The head that `block` makes of this one; roll: who is admitted after it."""
        seat = block.coordinator
        return Head(
            block.epoch,
            block.round,
            block.hash,
            block.global_step,
            block.redo,
            block.cursor,
            block.committee,
            None if seat is None else seat.coordinator,
            self.term if seat is None else seat.term,
            len(block.entries) or self.contributors,
            roll,
        )


class Ledger:
    """One peer's copy of the chain; gate: what reads its admissions, which a simulation shares among its peers."""

    def __init__(self, charter: Charter, signer: Signer, gate: Gate | None = None) -> None:
        self.charter = charter
        self.gate = gate or charter.gate(signer.verify)
        self.head = charter.first_head()
        self.tip: Commit | None = None
        self.credit: Counter[PeerId] = Counter()
        """Committed tokens per peer."""
        self._signer = signer
        self._recent: deque[tuple[Head, Commit]] = deque(maxlen=KEPT_BLOCKS)
        """The newest commits, each with the head it was appended to."""

    @property
    def run(self) -> bytes:
        """The run's id."""
        return self.charter.run

    @property
    def rule(self) -> QuorumRule:
        """How votes weigh."""
        return self.charter.rule

    def block_hash(self, round_: int) -> bytes | None:
        """The hash of that round's block, if it is one of the newest."""
        return next((commit.block.hash for _, commit in self._recent if commit.block.round == round_), None)

    def knows(self, block: bytes) -> bool:
        """Whether the block of that hash is the head or one of the newest before it."""
        return block == self.head.hash or any(head.hash == block for head, _ in self._recent)

    def check(self, block: Block) -> None:
        """Raise LedgerError unless `block` may follow the head."""
        head = self.head
        if block.round == head.round + 1 == 1 and block.parent != head.hash:
            raise LedgerError("block of round 1 stands on another genesis than the one that names this run")
        if (block.epoch, block.round, block.parent) != (head.epoch, head.round + 1, head.hash):
            raise LedgerError(f"block of round {block.round} does not follow round {head.round} of this chain")
        if block.global_step != head.global_step + block.steps:
            raise LedgerError(f"block says step {block.global_step}; {head.global_step} + {block.steps} was expected")
        if bool(block.entries) != bool(block.parts) or bool(block.entries) != bool(block.steps):
            raise LedgerError("a block has contributions, parts and steps, or none of them")
        _check_entries(block)
        _check_ranges(head, block)
        self._check_committee(head, block)
        self._roll_after(block)

    def check_commit(self, commit: Commit) -> None:
        """Raise LedgerError unless `commit` proves that its block follows the head, or begins an epoch here."""
        block = commit.block
        if block.epoch > self.head.epoch:
            self._check_epoch(commit)
            return
        self.check(block)
        if not self.certifies(block, commit.view, PRECOMMIT, commit.ballots):
            raise LedgerError(f"the votes on round {block.round} are not a quorum of its committee")

    def certifies(self, block: Block, view: int, phase: int, ballots: Iterable[Ballot]) -> bool:
        """Whether `ballots` are a quorum of the head's committee for `block` in that view and phase."""
        digest = block.hash
        true = [
            ballot.peer
            for ballot in ballots
            if (voter := self.head.voter(ballot.peer)) is not None
            and self._signer.verify(
                ballot.peer,
                vote_payload(self.run, block.epoch, block.round, view, phase, digest, voter.incarnation),
                ballot.signature,
            )
        ]
        return self.rule.decided(self.head.committee, true)

    def delegates(self, said: Delegation) -> bool:
        """Whether the organizer signed `said`."""
        return is_delegated(said, self.run, self.charter.organizer, self._signer.verify)

    def append(self, commit: Commit) -> None:
        """Move the head to a commit that `check_commit` passed, or that this peer stored after it had.

        One that begins an epoch must stand on the head: see `rewind`. Raises LedgerError if it does not.
        """
        block = commit.block
        if block.parent != self.head.hash:
            raise LedgerError(f"the block of round {block.round} does not stand on round {self.head.round} before it")
        roll = self._roll_after(block)
        for entry in block.entries:
            self.credit[entry.peer] += entry.tokens
        self._recent.append((self.head, commit))
        self.tip, self.head = commit, self.head.after(block, roll)

    def _roll_after(self, block: Block) -> Roll:
        try:
            return self.gate.after(self.head.roll, block)
        except RollError as error:
            raise LedgerError(f"block of round {block.round}: {error}") from None

    def rewind(self, parent: bytes) -> None:
        """Take blocks back until the head is `parent`, on which a new epoch begins."""
        while self.head.hash != parent:
            before, commit = self._recent.pop()
            for entry in commit.block.entries:
                self.credit[entry.peer] -= entry.tokens
            self.head = before
        self.tip = self._recent[-1][1] if self._recent else None

    def _check_epoch(self, commit: Commit) -> None:
        block = commit.block
        base = next((head for head, _ in self._recent if head.hash == block.parent), None)
        base = self.head if block.parent == self.head.hash else base
        if base is None or block.round != base.round + 1:
            raise LedgerError(f"epoch {block.epoch} begins on a block that is not among the newest of this chain")
        if block.entries or block.parts or block.steps or block.admissions or block.global_step != base.global_step:
            raise LedgerError("a block that begins an epoch holds no work")
        if (block.redo, block.cursor) != (base.redo, base.cursor):
            raise LedgerError("a block that begins an epoch changed the data ranges")
        payload = epoch_payload(self.run, block.hash)
        organizer = self.charter.organizer
        if not any(
            b.peer == organizer and self._signer.verify(organizer, payload, b.signature) for b in commit.ballots
        ):
            raise LedgerError(f"epoch {block.epoch} is not signed by the organizer")
        if block.coordinator is not None and not self.delegates(block.coordinator):
            raise LedgerError("the coordinator of the new epoch is not delegated by the organizer")

    def _check_committee(self, head: Head, block: Block) -> None:
        seat = block.coordinator
        allowed = head.voters | {entry.peer for entry in block.entries} | ({seat.coordinator} if seat else set())
        if not {voter.peer for voter in block.committee} <= allowed:
            raise LedgerError("the next committee holds someone who neither contributed nor voted before")
        if seat is not None and (seat.term < head.term or not self.delegates(seat)):
            raise LedgerError(f"the coordinator's seat goes to term {seat.term}, unsigned or older than {head.term}")
        members = {voter.peer: voter.incarnation for voter in block.committee}
        coordinator = None if seat is None else seat.coordinator
        if len(members) > MAX_VOTERS or (coordinator is not None and coordinator not in members):
            raise LedgerError("the next committee is too large, or lacks the coordinator that it names")
        if block.committee != self.rule.weigh(members, coordinator, self.credit):
            raise LedgerError("the next committee holds someone twice, or weights that the quorum rule does not give")


def _check_entries(block: Block) -> None:
    peers = [entry.peer for entry in block.entries]
    if peers != sorted(set(peers)):
        raise LedgerError("contributions are not in peer-id order, or one peer has two")
    if any(entry.tokens == 0 or ranges.count(entry.ranges) == 0 for entry in block.entries):
        raise LedgerError("a contribution without tokens was counted")


def _check_ranges(head: Head, block: Block) -> None:
    """Every sample that was to be done is done once or stands in redo; none comes from elsewhere."""
    if block.cursor < head.cursor:
        raise LedgerError(f"the data cursor went back from {head.cursor} to {block.cursor}")
    before = ranges.normal((*head.redo, (head.cursor, block.cursor)))
    after = [r for entry in block.entries for r in entry.ranges] + list(block.redo)
    if any(start >= end for start, end in after) or not ranges.disjoint(after):
        raise LedgerError("a data range is doubled, empty or backwards")
    if ranges.normal(after) != before:
        raise LedgerError("data ranges were lost or invented")
