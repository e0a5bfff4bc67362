"""The chain of committed rounds, and what folds out of it: head, committee, data still to do, credit.

A block is valid on top of its parent when it continues the chain, moves the data ranges without losing or doubling a
sample, and names a committee that may vote next. A commit is valid when, besides, a quorum of the parent's committee
signed the block. Nothing else makes the head move, and it never moves back inside an epoch.
"""

from collections import Counter
from dataclasses import dataclass, field

from dugnad.coordinator import ranges
from dugnad.coordinator.messages import Block, Commit, Voter, vote_payload
from dugnad.coordinator.votes import Signer, certified_by, committee_of, has_quorum
from dugnad.dht.identity import PeerId

KEPT_HASHES = 64


class LedgerError(Exception):
    """A block or commit that this chain refuses; the message says why."""


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


@dataclass(slots=True)
class Ledger:
    """One peer's copy of the chain; `run` is its genesis and `founder` the whole committee of round 1."""

    run: bytes
    founder: PeerId
    head: Head = field(init=False)
    tip: Commit | None = field(init=False, default=None)
    credit: Counter[PeerId] = field(init=False, default_factory=Counter)
    """Committed tokens per peer."""
    hashes: dict[int, bytes] = field(init=False, default_factory=dict)
    """round -> hash of its block, of the newest rounds."""

    def __post_init__(self) -> None:
        self.head = Head(0, 0, self.run, 0, (), 0, committee_of(self.founder, ()))

    def check(self, block: Block) -> None:
        """Raise LedgerError unless `block` may follow the head."""
        head = self.head
        if (block.epoch, block.round, block.parent) != (head.epoch, head.round + 1, head.hash):
            raise LedgerError(f"block of round {block.round} does not follow round {head.round} of this chain")
        if block.global_step != head.global_step + block.steps:
            raise LedgerError(f"block says step {block.global_step}; {head.global_step} + {block.steps} was expected")
        if bool(block.entries) != bool(block.parts) or bool(block.entries) != bool(block.steps):
            raise LedgerError("a block has contributions, parts and steps, or none of them")
        self._check_entries(block)
        self._check_ranges(block)
        allowed = {voter.peer for voter in head.committee} | {entry.peer for entry in block.entries}
        voters = [voter.peer for voter in block.committee]
        if len(set(voters)) != len(voters) or not set(voters) <= allowed:
            raise LedgerError("the next committee holds someone who neither contributed nor voted before, or twice")
        if block.committee != committee_of(block.committee[0].peer, voters):
            raise LedgerError("the weights of the next committee are not those of the quorum rule")

    def check_commit(self, commit: Commit, signer: Signer) -> None:
        """Raise LedgerError unless `commit` proves that its block follows the head."""
        block = commit.block
        self.check(block)
        payload = vote_payload(self.run, block.epoch, block.round, block.term, block.view, block.hash)
        if not has_quorum(self.head.committee, certified_by(signer, payload, commit.ballots)):
            raise LedgerError(f"the votes on round {block.round} are not a quorum of its committee")

    def append(self, commit: Commit) -> None:
        """Move the head to a commit that `check_commit` passed, or that this peer stored after it had."""
        block = commit.block
        self.check(block)
        for entry in block.entries:
            self.credit[entry.peer] += entry.tokens
        self.tip = commit
        self.hashes[block.round] = block.hash
        self.hashes.pop(block.round - KEPT_HASHES, None)
        self.head = Head(
            block.epoch, block.round, block.hash, block.global_step, block.redo, block.cursor, block.committee
        )

    @staticmethod
    def _check_entries(block: Block) -> None:
        peers = [entry.peer for entry in block.entries]
        if peers != sorted(set(peers)):
            raise LedgerError("contributions are not in peer-id order, or one peer has two")
        if any(entry.tokens == 0 or ranges.count(entry.ranges) == 0 for entry in block.entries):
            raise LedgerError("a contribution without tokens was counted")

    def _check_ranges(self, block: Block) -> None:
        """Every sample that was to be done is done once or stands in redo; none comes from elsewhere."""
        if block.cursor < self.head.cursor:
            raise LedgerError(f"the data cursor went back from {self.head.cursor} to {block.cursor}")
        before = ranges.normal((*self.head.redo, (self.head.cursor, block.cursor)))
        after = [r for entry in block.entries for r in entry.ranges] + list(block.redo)
        if any(start >= end for start, end in after) or not ranges.disjoint(after):
            raise LedgerError("a data range is doubled, empty or backwards")
        if ranges.normal(after) != before:
            raise LedgerError("data ranges were lost or invented")
