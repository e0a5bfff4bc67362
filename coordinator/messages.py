"""The words of a round: every message that leader, members and joiners say to each other.

All travel sealed (`dht.wire`): signed by their sender, bound to the run, capped before they are parsed. A message says
what its sender knows, never what the receiver must do next: it may be lost, repeated or reordered, and saying it again
is always harmless.

    leader -> members   Standing  Plan  Freeze  Proposal  Lock  Commit
    member -> leader    Report  Contribution  Have  Vote  Applied  Delegation
    voter -> voters     ViewChange, and from the new leader NewView
    joiner <-> anyone   Welcome  CommitsRequest/Commits  StateRequest/StateOffer
"""

from bisect import bisect_left
from functools import cached_property
from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta

from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Reach
from dugnad.dht.ticket import CLAIM_BYTES
from dugnad.dht.wire import Kind, Message

MAX_PEERS = 1024
MAX_PARTS = 8192
MAX_RANGES = 4096
MAX_VOTERS = 64
"""The largest committee."""
ADMISSION_BYTES = 1536
"""The largest proof that somebody may be a member: a claim to a ticket, or a decision of the organizer."""
ADMISSIONS_BYTES = 384 * 1024
"""The most that all such proofs in one block may have together."""
BLOCK_BYTES = 1024 * 1024 + ADMISSIONS_BYTES
"""The largest block."""
COMMIT_BYTES = BLOCK_BYTES + 32 * 1024
"""The largest commit: the largest block, and a ballot of each voter; a lock and a new view are no larger."""

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Positive = Annotated[int, Meta(ge=1, lt=2**53)]
Text = Annotated[str, Meta(max_length=200)]
Address = Annotated[str, Meta(max_length=256)]
Addresses = Annotated[tuple[Address, ...], Meta(max_length=16)]
Member = Annotated[PeerId, Meta(min_length=1, max_length=80)]
Incarnation = Annotated[bytes, Meta(min_length=8, max_length=8)]
"""Names one disk of a voter: its votes and locks live there, so a voter with another disk is another voter."""
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Admission = Annotated[bytes, Meta(min_length=1, max_length=ADMISSION_BYTES)]
"""A proof that somebody may be a member, as `roll.Gate` reads it."""
Rate = Annotated[float, Meta(ge=0, le=1e15)]
"""Bytes per second."""
Range = tuple[Count, Count]
"""Half-open range [start, end) of sample indices."""
Ranges = Annotated[tuple[Range, ...], Meta(max_length=MAX_RANGES)]


class Seat(Message, frozen=True):
    """One member's work in a round: which samples, in how many inner steps, and where it can be reached."""

    peer: Member
    steps: Count
    ranges: Ranges
    addresses: Addresses


class Plan(Message, frozen=True):
    """What this round is: who works on what, and who owns which part of the vector.

    `owners[k]` reduces part k; when that owner is lost, `backups[k]` takes the part over, or else any survivor. A
    higher (view, attempt) replaces a lower one of the same round: a view has one leader, who may attempt it again. A
    member whose seat is unchanged by it keeps its work. Durations count from receipt. In a large swarm a member that
    neither owns nor votes is shown the seats of the owners and its own alone.
    """

    epoch: Count
    round: Count
    view: Count
    attempt: Count
    head: Digest
    global_step: Count
    seats: Annotated[tuple[Seat, ...], Meta(max_length=MAX_PEERS)]
    owners: Annotated[tuple[Member, ...], Meta(max_length=MAX_PARTS)]
    backups: Annotated[tuple[Member, ...], Meta(max_length=MAX_PARTS)]
    train_s: Seconds
    exchange_s: Seconds

    def seat_of(self, peer: PeerId) -> Seat | None:
        """The seat of `peer`, or None where it has none; the seats stand in peer-id order."""
        at = bisect_left(self.seats, peer, key=lambda seat: seat.peer)
        return self.seats[at] if at < len(self.seats) and self.seats[at].peer == peer else None

    @property
    def members(self) -> tuple[PeerId, ...]:
        """Everyone with a seat, in the plan's order."""
        return tuple(seat.peer for seat in self.seats)

    @property
    def order(self) -> tuple[int, int, int]:
        """What orders two plans: the greater replaces the other."""
        return (self.round, self.view, self.attempt)


class Contribution(Message, frozen=True):
    """A member's promise, before any byte of it moves: the digests of its parts hash to `root`.

    It binds the round, the head and the samples, not the view: a failed attempt wastes no work. `ranges` are the
    samples that it was trained on: the first of its seat, maybe all.
    """

    epoch: Count
    round: Count
    head: Digest
    root: Digest
    ranges: Ranges
    tokens: Positive
    loss: float


class Have(Message, frozen=True):
    """An owner's word that it holds, checked, all of its parts of these vectors: (contributor, root) each."""

    round: Count
    view: Count
    attempt: Count
    vectors: Annotated[tuple[tuple[Member, Digest], ...], Meta(min_length=1, max_length=2 * MAX_PEERS)]

    @property
    def order(self) -> tuple[int, int, int]:
        """As `Plan.order`."""
        return (self.round, self.view, self.attempt)


class Entry(Message, frozen=True):
    """One counted contribution: its weight is `tokens`; `ranges` are the samples it was trained on."""

    peer: Member
    root: Digest
    tokens: Positive
    loss: float
    ranges: Ranges


class Freeze(Message, frozen=True):
    """The one set of contributions that every part of this attempt is folded from, in peer-id order."""

    round: Count
    view: Count
    attempt: Count
    entries: Annotated[tuple[Entry, ...], Meta(min_length=1, max_length=MAX_PEERS)]

    @property
    def order(self) -> tuple[int, int, int]:
        """As `Plan.order`."""
        return (self.round, self.view, self.attempt)


class Voter(Message, frozen=True):
    """A committee member, the weight of its vote, and which disk of it may vote."""

    peer: Member
    weight: Count
    incarnation: Incarnation


class Block(Message, frozen=True, dict=True):
    """One round of the chain: what was counted, what came out, and who votes on the next.

    `parts` are the digests of the encoded averages, in part order; empty in a block that only changes the committee.
    `redo` and `cursor` say which samples are still to be trained on: those in `redo`, and all from `cursor` on.
    `model_before` is the digest of the model that the parts are applied to. `coordinator` says who of the next
    committee has the coordinator's seat, if someone has. `admissions` prove that those may be members who contribute
    for the first time, in the order of their ids. In which view it was proposed it does not say: a later leader may
    have to propose the same block again.
    """

    epoch: Count
    round: Count
    parent: Digest
    model_before: Digest
    global_step: Count
    steps: Count
    entries: Annotated[tuple[Entry, ...], Meta(max_length=MAX_PEERS)]
    parts: Annotated[tuple[Digest, ...], Meta(max_length=MAX_PARTS)]
    redo: Ranges
    cursor: Count
    committee: Annotated[tuple[Voter, ...], Meta(min_length=1, max_length=MAX_VOTERS)]
    coordinator: Delegation | None
    admissions: Annotated[tuple[Admission, ...], Meta(max_length=MAX_PEERS)] = ()

    @cached_property
    def hash(self) -> bytes:
        """blake3 of the block's canonical encoding: 32 bytes."""
        return blake3(b"dugnad/block/3" + msgspec.msgpack.encode(self)).digest()


class Proposal(Message, frozen=True):
    """The leader of `view` asks the committee to vote on `block`."""

    view: Count
    block: Block


PREVOTE, PRECOMMIT = 1, 2


class Vote(Message, frozen=True):
    """A voter's word in one of the two phases of a view, signed over `vote_payload`.

    PREVOTE: it holds, has checked and has stored all bytes of the block. PRECOMMIT: it is locked on the block.
    """

    epoch: Count
    round: Count
    view: Count
    phase: Annotated[int, Meta(ge=PREVOTE, le=PRECOMMIT)]
    block: Digest
    signature: Signature


class Ballot(Message, frozen=True):
    """One vote inside a certificate."""

    peer: Member
    signature: Signature


Ballots = Annotated[tuple[Ballot, ...], Meta(max_length=MAX_VOTERS)]


class Lock(Message, frozen=True):
    """A block and the prevotes of a quorum in one view: no other block can be committed in that view or before."""

    view: Count
    block: Block
    ballots: Ballots


class Pledge(Message, frozen=True):
    """A voter's word to vote in no view before that one, and what it is locked on. Signed over `pledge_payload`.

    `locked` is the view of its lock plus one, and `block` what it is locked on; 0 and nothing without a lock.
    """

    peer: Member
    locked: Count
    block: Annotated[bytes, Meta(max_length=32)]
    signature: Signature


class ViewChange(Message, frozen=True):
    """A voter gives up the leader of the view before `view`; `lock` proves what its pledge says of a lock."""

    epoch: Count
    round: Count
    view: Count
    pledge: Pledge
    lock: Lock | None


class NewView(Message, frozen=True):
    """The pledges of a quorum: proof for anyone that `view` has begun, and of what its leader must propose.

    `lock` is the highest lock that the pledges speak of.
    """

    epoch: Count
    round: Count
    view: Count
    pledges: Annotated[tuple[Pledge, ...], Meta(max_length=MAX_VOTERS)]
    lock: Lock | None


class Commit(Message, frozen=True):
    """A block and the precommits of a quorum of its parent's committee: proof for anyone, from whoever it comes.

    A block that begins an epoch has a single ballot instead, the organizer's.
    """

    block: Block
    view: Count
    ballots: Ballots


class Applied(Message, frozen=True):
    """What a peer's model is after a round, signed over `applied_payload`, and what the round cost the peer.

    The cost (seconds in training, seconds since the round before, (kind, bytes) sent) informs and decides nothing.
    """

    round: Count
    block: Digest
    model: Digest
    signature: Signature
    train_s: Seconds
    wall_s: Seconds
    sent_bytes: Annotated[tuple[tuple[Annotated[str, Meta(max_length=16)], Count], ...], Meta(max_length=16)]


class Report(Message, frozen=True):
    """What a member is doing, said each `report_s` and at every change; silence means that it is lost.

    `in_view` is the view of the next round that it knows of, `stage` a `Stage` value; `round`, `view` and `attempt` are
    of the plan which it follows (zeros without one). `trains`: whether it wants a seat.
    `uplink` is its sending rate in bytes/s, 0 where unknown; who owns parts has to be reached by all (`planning`).
    `claim` is its claim to a ticket, until the chain has admitted it.
    """

    epoch: Count
    head_round: Count
    head: Digest
    in_view: Count
    incarnation: Incarnation
    trains: bool
    stage: Annotated[str, Meta(max_length=16)]
    round: Count
    view: Count
    attempt: Count
    step: Count
    of_steps: Count
    leaving: bool
    reach: Reach
    uplink: Rate
    addresses: Addresses
    claim: Annotated[bytes, Meta(max_length=CLAIM_BYTES)] = b""


class Standing(Message, frozen=True):
    """Where the run stands as its sender knows it; from the leader to everyone it knows, each `report_s`."""

    epoch: Count
    head_round: Count
    head: Digest
    in_view: Count
    phase: Annotated[str, Meta(max_length=16)]
    reason: Text
    finished: bool
    val_round: Count
    val_loss: float | None
    """Nats per byte on the held-out data after `val_round`, as the leader measured it."""


class WelcomeRequest(Message, frozen=True):
    """A stranger, who knows the run's id from an invite, asks what the run is."""


class Genesis(Message, frozen=True):
    """What a run is, for ever: its hash is the run's id, which the invite pins."""

    recipe: Annotated[bytes, Meta(max_length=256 * 1024)]
    organizer: Member
    """Who delegates the lead."""
    founder: Member
    """The first coordinator: the whole committee of round 1."""
    incarnation: Incarnation
    """Which disk of the founder votes in round 1."""
    first_model: Digest

    @property
    def run(self) -> bytes:
        """The run's id, 32 bytes."""
        return blake3(b"dugnad/genesis/2" + msgspec.msgpack.encode(self)).digest()


class Welcome(Message, frozen=True):
    """What the run is."""

    genesis: Genesis


class CommitsRequest(Message, frozen=True):
    """Asks for what was committed after that round of that epoch, oldest first.

    Where a later epoch began before that round, the answer begins there.
    """

    epoch: Count
    after_round: Count


class Commits(Message, frozen=True):
    """A run of consecutive commits, and the epoch and round of the sender's head."""

    head_epoch: Count
    head_round: Count
    commits: Annotated[tuple[Commit, ...], Meta(max_length=1024)]


class StateRequest(Message, frozen=True):
    """Asks for the manifest of the model at the sender's head."""


class StateOffer(Message, frozen=True):
    """The model after `round`: its manifest, and those who signed that digest (`Applied` ballots).

    Ballots are needed only while the round is the newest: later the next block names the digest.
    """

    round: Count
    manifest: Annotated[bytes, Meta(max_length=1024 * 1024)]
    ballots: Ballots


ROUND_KINDS: tuple[Kind, ...] = (
    Kind("delegation", Delegation, 1024),
    Kind("plan", Plan, 1024 * 1024),
    Kind("contribution", Contribution, 64 * 1024),
    Kind("have", Have, 256 * 1024),
    Kind("freeze", Freeze, 1024 * 1024),
    Kind("proposal", Proposal, BLOCK_BYTES),
    Kind("vote", Vote, 1024),
    Kind("lock", Lock, COMMIT_BYTES),
    Kind("view-change", ViewChange, COMMIT_BYTES),
    Kind("new-view", NewView, COMMIT_BYTES + 32 * 1024),
    Kind("commit", Commit, COMMIT_BYTES),
    Kind("applied", Applied, 4096),
    Kind("report", Report, 8192),
    Kind("standing", Standing, 4096),
)
"""One-way messages of a round."""

SYNC_KINDS: tuple[Kind, ...] = (
    Kind("welcome?", WelcomeRequest, 256),
    Kind("welcome", Welcome, 300 * 1024),
    Kind("commits?", CommitsRequest, 256),
    Kind("commits", Commits, COMMIT_BYTES + 1024),
    Kind("state?", StateRequest, 256),
    Kind("state", StateOffer, 1024 * 1024),
)
"""Questions and answers of one who joins or catches up."""


VOTE_DOMAIN, PLEDGE_DOMAIN = b"dugnad/vote/2", b"dugnad/pledge/1"
"""What signed votes and pledges begin with."""


def vote_payload(run: bytes, epoch: int, round_: int, view: int, phase: int, block: bytes, incarnation: bytes) -> bytes:
    """What a voter signs, as the incarnation that the committee names."""
    return VOTE_DOMAIN + msgspec.msgpack.encode((run, epoch, round_, view, phase, block, incarnation))


def pledge_payload(
    run: bytes, epoch: int, round_: int, view: int, locked: int, block: bytes, incarnation: bytes
) -> bytes:
    """What a voter signs who will vote in no view of that round before `view`."""
    return PLEDGE_DOMAIN + msgspec.msgpack.encode((run, epoch, round_, view, locked, block, incarnation))


def epoch_payload(run: bytes, block: bytes) -> bytes:
    """What the organizer signs to begin an epoch with `block`."""
    return b"dugnad/epoch/1" + msgspec.msgpack.encode((run, block))


def applied_payload(run: bytes, round_: int, block: bytes, model: bytes) -> bytes:
    """What a peer signs to say that `model` is the digest after `round_`."""
    return b"dugnad/applied/1" + msgspec.msgpack.encode((run, round_, block, model))
