"""What must hold in any run, whatever fails in it: a simulated one is checked by these as it happens.

They know more than any peer does: every disk, every signature, every sample that was trained on. They share no code
with the checks that peers make, beyond the words of the messages, so that a rule which is missing there is missed here.
A peer among the `liars` may say anything. What it says must change nothing for the others.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Protocol

from blake3 import blake3

from dugnad.coordinator import ranges
from dugnad.coordinator.effects import Promises
from dugnad.coordinator.ledger import Charter
from dugnad.coordinator.messages import (
    PRECOMMIT,
    PREVOTE,
    Block,
    Commit,
    Lock,
    ViewChange,
    Vote,
    Voter,
    epoch_payload,
    vote_payload,
)
from dugnad.coordinator.votes import MIN_EARNERS
from dugnad.dht.identity import PeerId
from dugnad.dht.ticket import parse_claim

Verify = Callable[[PeerId, bytes, bytes], bool]


class InvariantBroken(AssertionError):
    """A rule of the protocol did not hold; the message names the seed, the time and the rule."""


class Counted(Protocol):
    """One contribution in a frozen set, as a reducer or a block names it."""

    @property
    def peer(self) -> PeerId:
        """Whose it is."""

    @property
    def root(self) -> bytes:
        """What it was promised as."""

    @property
    def tokens(self) -> int:
        """What it weighs."""


class Disk(Protocol):
    """What a peer holds, as far as the rules ask."""

    @property
    def blobs(self) -> Set[bytes]:
        """Digests of the averages on it."""

    @property
    def promises(self) -> Promises | None:
        """What was promised in the round under way."""


def average(round_: int, part: int, entries: Iterable[Counted]) -> bytes:
    """The digest of a part's average in a simulated run: whatever it was folded from makes it another."""
    said = b"".join(entry.peer.encode() + entry.root + str(entry.tokens).encode() for entry in entries)
    return blake3(str((round_, part)).encode() + said).digest()


class Invariants:
    """The rules of one run; `fail` is told of the first that does not hold.

    disks: incarnation -> disk, also of those that are lost. trained: root of a contribution -> the samples it was
    trained on. models: block -> the model after it.
    """

    def __init__(
        self,
        charter: Charter,
        verify: Verify,
        *,
        fail: Callable[[str], None],
        disks: Mapping[bytes, Disk],
        trained: Mapping[bytes, ranges.Ranges],
        models: dict[bytes, bytes],
    ) -> None:
        self.committed: dict[tuple[int, int], Commit] = {}
        """(epoch, round) -> the first commit that some node took for proven."""
        self.liars: set[PeerId] = set()
        self._charter, self._verify, self._fail = charter, verify, fail
        self._disks, self._trained, self._models = disks, trained, models
        self._blocks: dict[bytes, Block] = {}
        self._done: dict[bytes, ranges.Ranges] = {charter.run: ()}
        """Block -> the samples that were trained on in the chain up to it."""
        self._members: dict[bytes, tuple[frozenset[PeerId], Counter[bytes]]] = {
            charter.run: (frozenset((charter.founder,)), Counter())
        }
        """Block -> who was admitted in the chain up to it, and how many by each ticket."""
        self._voted: dict[tuple[bytes, int, int, int, int], bytes] = {}
        """(incarnation, epoch, round, view, phase) -> the block that it voted for."""
        self._pledged: dict[tuple[bytes, int, int], int] = {}
        """(incarnation, epoch, round) -> the view before which it promised to vote no more."""
        self._reached: dict[bytes, tuple[int, int]] = {}
        """Incarnation -> the highest place of its chain."""

    # -- one peer, by itself

    def votes(self, peer: PeerId, incarnation: bytes, vote: Vote) -> None:
        """`peer` says `vote`: once in a view and phase, for bytes that it holds, as its disk can show."""
        if peer in self.liars:
            return
        disk = self._disks[incarnation]
        promises = disk.promises
        place = (incarnation, vote.epoch, vote.round)
        self._voted_once(peer, place, vote.view, vote.phase, vote.block)
        if vote.view < self._pledged.get(place, 0):
            self._fail(f"{peer} votes in view {vote.view}, which it pledged to have given up")
        if vote.phase == PREVOTE:
            said = promises.prevoted if promises is not None else None
            block = None if said is None or said.view != vote.view else said.block
            if block is None or vote.block != block.hash or not disk.blobs >= set(block.parts):
                self._fail(f"{peer} votes for bytes that it does not hold, or forgets its vote")
        else:
            lock = promises.lock if promises is not None else None
            if lock is None or (lock.view, lock.block.hash) != (vote.view, vote.block):
                self._fail(f"{peer} votes to commit what it is not locked on")

    def pledges(self, peer: PeerId, incarnation: bytes, said: ViewChange) -> None:
        """`peer` gives up the views before that one, and its disk remembers it."""
        if peer in self.liars:
            return
        place = (incarnation, said.epoch, said.round)
        self._pledged[place] = max(said.view, self._pledged.get(place, 0))
        promises = self._disks[incarnation].promises
        if promises is None or (promises.epoch, promises.round, promises.pledged) < (said.epoch, said.round, said.view):
            self._fail(f"{peer} pledges itself to view {said.view}, and would forget it")

    def shows(self, lock: Lock, committee: Iterable[Voter]) -> None:
        """A leader shows these prevotes, its own among them, of which nobody heard otherwise."""
        seats = {voter.peer: voter.incarnation for voter in committee}
        for ballot in lock.ballots:
            if ballot.peer in seats and ballot.peer not in self.liars:
                voter = (seats[ballot.peer], lock.block.epoch, lock.block.round)
                self._voted_once(ballot.peer, voter, lock.view, PREVOTE, lock.block.hash)

    def _voted_once(self, peer: PeerId, voter: tuple[bytes, int, int], view: int, phase: int, block: bytes) -> None:
        if self._voted.setdefault((*voter, view, phase), block) != block:
            self._fail(f"{peer} votes for two blocks in view {view} of round {voter[2]}")

    def stores(self, peer: PeerId, incarnation: bytes, commit: Commit, tip: Block | None) -> None:
        """`peer` takes `commit` for proven, and appends it to a chain that ends with `tip`."""
        block = commit.block
        parent, before = (self._charter.run, 0) if tip is None else (tip.hash, tip.round)
        if block.round != before + 1 or block.parent != parent:
            self._fail(f"the chain of {peer} jumps from round {before} to another chain's {block.round}")
        if (block.epoch, block.round) <= self._reached.get(incarnation, (0, 0)):
            self._fail(f"the head of {peer} goes back to round {block.round} of epoch {block.epoch}")
        self._reached[incarnation] = (block.epoch, block.round)
        self.commits(commit)

    def lost(self, incarnation: bytes, place: tuple[int, int]) -> None:
        """That disk lost what followed `place`, by no fault of its peer."""
        self._reached[incarnation] = place

    # -- all of them together

    def commits(self, commit: Commit) -> None:
        """Some node took `commit` for proven."""
        block = commit.block
        known = self.committed.setdefault((block.epoch, block.round), commit)
        if known.block.hash != block.hash:
            self._fail(f"two blocks were committed for round {block.round} of epoch {block.epoch}")
        if block.hash in self._blocks:
            return
        self._blocks[block.hash] = block
        parent = self._blocks.get(block.parent)
        if (parent.round if parent else 0) + 1 != block.round or (parent is None and block.parent != self._charter.run):
            self._fail(f"round {block.round} was committed on top of what was not")
        begins = block.epoch > (parent.epoch if parent else 0)
        if begins:
            self._check_epoch(commit)
        else:
            committee = parent.committee if parent else self._charter.first_head().committee
            self._check_certificate(commit, committee)
        if self._models[block.parent] != block.model_before:
            self._fail(f"round {block.round} stands on another model than the one after the round before")
        self._check_members(block)
        self._check_work(block)

    def applies(self, peer: PeerId, incarnation: bytes, commit: Commit, model: bytes) -> None:
        """`peer` has `model` after the block of `commit`: the same as everyone, from committed bytes that it held."""
        block = commit.block
        if not self._disks[incarnation].blobs >= set(block.parts):
            self._fail(f"{peer} applies bytes that it does not hold")
        if block.hash not in self._blocks:
            self._fail(f"{peer} applies a block that was not committed")
        if self._models.setdefault(block.hash, model) != model:
            self._fail(f"two models after round {block.round}")

    def _check_epoch(self, commit: Commit) -> None:
        payload, organizer = epoch_payload(self._charter.run, commit.block.hash), self._charter.organizer
        if not any(b.peer == organizer and self._verify(organizer, payload, b.signature) for b in commit.ballots):
            self._fail(f"epoch {commit.block.epoch} began without the organizer")

    def _check_certificate(self, commit: Commit, committee: Sequence[Voter]) -> None:
        block, seats = commit.block, {voter.peer: voter for voter in committee}
        place = (self._charter.run, block.epoch, block.round, commit.view, PRECOMMIT, block.hash)
        signed = {
            ballot.peer
            for ballot in commit.ballots
            if (seat := seats.get(ballot.peer)) is not None
            and self._verify(ballot.peer, vote_payload(*place, seat.incarnation), ballot.signature)
        }
        if not self._decides(committee, signed):
            self._fail(f"round {block.round} was committed by {len(signed)} of {len(committee)} voters: too few")
        # not those who signed: who is locked commits without the bytes, on the word of those who prevoted
        held = {p for p, seat in seats.items() if self._disks[seat.incarnation].blobs >= set(block.parts)}
        if not self._decides(committee, held | self.liars):
            self._fail(f"round {block.round} was committed while only {len(held)} of its voters held its bytes")
        for peer in sorted(signed - self.liars):
            voter = (seats[peer].incarnation, block.epoch, block.round)
            self._voted_once(peer, voter, commit.view, PRECOMMIT, block.hash)

    def _decides(self, committee: Sequence[Voter], peers: Set[PeerId]) -> bool:
        weight = sum(voter.weight for voter in committee if voter.peer in peers)
        total = sum(voter.weight for voter in committee)
        open_ = self._charter.rule.open and sum(voter.weight > 0 for voter in committee) >= MIN_EARNERS
        return 3 * weight > 2 * total if open_ else 2 * weight > total

    def _check_members(self, block: Block) -> None:
        """Who contributes was admitted, and by each ticket came no more members than it says."""
        charter = self._charter
        if charter.admission != "invited":
            return
        members, uses = self._members[block.parent]
        claims = [parse_claim(raw, charter.run, charter.organizer, self._verify) for raw in block.admissions]
        if claims:
            members = members | {said.peer for said in claims}
            uses = uses + Counter(said.ticket.id for said in claims)
        self._members[block.hash] = members, uses
        if any(0 < said.ticket.uses < uses[said.ticket.id] for said in claims):
            self._fail(f"round {block.round} admits more members by a ticket than it says")
        for entry in block.entries:
            if entry.peer not in members:
                self._fail(f"round {block.round} counts the work of {entry.peer}, who was never admitted")

    def _check_work(self, block: Block) -> None:
        """Each part reduced once, from the one set of the block; each peer counted once, each sample done or to do."""
        peers = [entry.peer for entry in block.entries]
        if peers != sorted(set(peers)):
            self._fail(f"round {block.round} counts a peer twice")
        for entry in block.entries:
            if entry.peer not in self.liars and self._trained[entry.root] != entry.ranges:
                self._fail(f"round {block.round} says that {entry.peer} did samples that it was not trained on")
        for part, digest in enumerate(block.parts):
            if digest != average(block.round, part, block.entries):
                self._fail(f"part {part} of round {block.round} is folded from another set than the block names")
        done = (*self._done[block.parent], *(r for entry in block.entries for r in entry.ranges))
        if not ranges.disjoint((*done, *block.redo)):
            self._fail(f"round {block.round} trains on samples that were trained on before")
        if ranges.normal((*done, *block.redo)) != (((0, block.cursor),) if block.cursor else ()):
            self._fail(f"round {block.round} loses samples, or invents some")
        self._done[block.hash] = ranges.normal(done)
