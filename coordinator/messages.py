"""The words of a round: every message that leader, members and joiners say to each other.

All travel sealed (`dht.wire`): signed by their sender, bound to the run, capped before they are parsed. A message says
what its sender knows, never what the receiver must do next: it may be lost, repeated or reordered, and saying it again
is always harmless.

    leader -> members   Standing  Plan  Freeze  Proposal  Commit
    member -> leader    Report  Contribution  Have  Vote  Applied
    joiner <-> anyone   Welcome  CommitsRequest/Commits  StateRequest/StateOffer
"""

from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Kind

MAX_PEERS = 1024
MAX_PARTS = 8192
MAX_RANGES = 4096
COMMIT_BYTES = 1024 * 1024 + 160 * 1024
"""The largest commit: the largest proposal, and a ballot of everyone."""

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Positive = Annotated[int, Meta(ge=1, lt=2**53)]
Text = Annotated[str, Meta(max_length=200)]
Address = Annotated[str, Meta(max_length=256)]
Addresses = Annotated[tuple[Address, ...], Meta(max_length=16)]
Member = Annotated[PeerId, Meta(min_length=1, max_length=80)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Rate = Annotated[float, Meta(ge=0, le=1e15)]
"""Bytes per second."""
Range = tuple[Count, Count]
"""Half-open range [start, end) of sample indices."""
Ranges = Annotated[tuple[Range, ...], Meta(max_length=MAX_RANGES)]


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every message: immutable, encoded as a msgpack array, unknown fields refused."""


class Delegation(Message, frozen=True):
    """The organizer's word that `coordinator` leads in `term`; of two, the higher term holds.

    Signed with the run key over `delegation_payload`.
    """

    coordinator: Member
    term: Count
    signature: Signature


class Seat(Message, frozen=True):
    """One member's work in a round: which samples, in how many inner steps, and where it can be reached."""

    peer: Member
    steps: Count
    ranges: Ranges
    addresses: Addresses


class Plan(Message, frozen=True):
    """What this round is: who works on what, and who owns which part of the vector.

    `owners[k]` reduces part k. A higher (term, view) replaces a lower one of the same round; a member whose seat is
    unchanged by it keeps its work. Durations count from receipt.
    """

    epoch: Count
    round: Count
    term: Count
    view: Count
    head: Digest
    global_step: Count
    seats: Annotated[tuple[Seat, ...], Meta(max_length=MAX_PEERS)]
    owners: Annotated[tuple[Member, ...], Meta(max_length=MAX_PARTS)]
    train_s: Seconds
    exchange_s: Seconds

    def seat_of(self, peer: PeerId) -> Seat | None:
        """The seat of `peer`, or None where it has none."""
        return next((seat for seat in self.seats if seat.peer == peer), None)

    @property
    def members(self) -> tuple[PeerId, ...]:
        """Everyone with a seat, in the plan's order."""
        return tuple(seat.peer for seat in self.seats)

    @property
    def order(self) -> tuple[int, int, int]:
        """What orders two plans: the greater replaces the other."""
        return (self.round, self.term, self.view)


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
    """An owner's word that it holds, checked, all of its parts of `contributor`'s vector with that root."""

    round: Count
    term: Count
    view: Count
    contributor: Member
    root: Digest


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
    term: Count
    view: Count
    entries: Annotated[tuple[Entry, ...], Meta(min_length=1, max_length=MAX_PEERS)]


class Voter(Message, frozen=True):
    """A committee member and the weight of its vote."""

    peer: Member
    weight: Count


class Block(Message, frozen=True):
    """One round of the chain: what was counted, what came out, and who votes on the next.

    `parts` are the digests of the encoded averages, in part order; empty in a block that only changes the committee.
    `redo` and `cursor` say which samples are still to be trained on: those in `redo`, and all from `cursor` on.
    `model_before` is the digest of the model that the parts are applied to.
    """

    epoch: Count
    round: Count
    term: Count
    view: Count
    parent: Digest
    model_before: Digest
    global_step: Count
    steps: Count
    entries: Annotated[tuple[Entry, ...], Meta(max_length=MAX_PEERS)]
    parts: Annotated[tuple[Digest, ...], Meta(max_length=MAX_PARTS)]
    redo: Ranges
    cursor: Count
    committee: Annotated[tuple[Voter, ...], Meta(min_length=1, max_length=MAX_PEERS)]

    @property
    def hash(self) -> bytes:
        """blake3 of the block's canonical encoding: 32 bytes."""
        return blake3(b"dugnad/block/1" + msgspec.msgpack.encode(self)).digest()


class Proposal(Message, frozen=True):
    """The leader asks the committee to vote on `block`."""

    block: Block


class Vote(Message, frozen=True):
    """A voter's word that it holds, has checked and has stored all bytes of the block. Signed over `vote_payload`."""

    epoch: Count
    round: Count
    term: Count
    view: Count
    block: Digest
    signature: Signature


class Ballot(Message, frozen=True):
    """One vote inside a certificate."""

    peer: Member
    signature: Signature


class Commit(Message, frozen=True):
    """A block and the votes of a quorum of its parent's committee: proof for anyone, from whoever it comes."""

    block: Block
    ballots: Annotated[tuple[Ballot, ...], Meta(max_length=MAX_PEERS)]


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

    `term` is the newest that it has heard of, `stage` a `Stage` value; `round` and `view` are of the plan of that term
    which it follows (zeros without one).
    `uplink` is its sending rate in bytes/s, 0 where unknown; a peer that can't accept connections owns no part.
    """

    term: Count
    head_round: Count
    head: Digest
    stage: Annotated[str, Meta(max_length=16)]
    round: Count
    view: Count
    step: Count
    of_steps: Count
    leaving: bool
    accepts: bool
    uplink: Rate
    addresses: Addresses


class Standing(Message, frozen=True):
    """Where the run stands, from the leader to everyone it knows, each `report_s`."""

    term: Count
    head_round: Count
    head: Digest
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
    first_model: Digest

    @property
    def run(self) -> bytes:
        """The run's id, 32 bytes."""
        return blake3(b"dugnad/genesis/1" + msgspec.msgpack.encode(self)).digest()


class Welcome(Message, frozen=True):
    """What the run is, and who leads it now."""

    genesis: Genesis
    delegation: Delegation


class CommitsRequest(Message, frozen=True):
    """Asks for committed rounds after `after_round`, oldest first."""

    after_round: Count


class Commits(Message, frozen=True):
    """A run of consecutive commits, and the round of the sender's head."""

    head_round: Count
    commits: Annotated[tuple[Commit, ...], Meta(max_length=1024)]


class StateRequest(Message, frozen=True):
    """Asks for the manifest of the model at the sender's head."""


class StateOffer(Message, frozen=True):
    """The model after `round`: its manifest, and those who signed that digest (`Applied` ballots)."""

    round: Count
    manifest: Annotated[bytes, Meta(max_length=1024 * 1024)]
    ballots: Annotated[tuple[Ballot, ...], Meta(max_length=MAX_PEERS)]


ROUND_KINDS: tuple[Kind, ...] = (
    Kind("delegation", Delegation, 1024),
    Kind("plan", Plan, 1024 * 1024),
    Kind("contribution", Contribution, 64 * 1024),
    Kind("have", Have, 1024),
    Kind("freeze", Freeze, 1024 * 1024),
    Kind("proposal", Proposal, 1024 * 1024),
    Kind("vote", Vote, 1024),
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


def delegation_payload(run: bytes, coordinator: PeerId, term: int) -> bytes:
    """What the organizer signs so that `coordinator` leads in `term`."""
    return b"dugnad/delegation/1" + msgspec.msgpack.encode((run, coordinator, term))


def vote_payload(run: bytes, epoch: int, round_: int, term: int, view: int, block: bytes) -> bytes:
    """What a voter signs."""
    return b"dugnad/vote/1" + msgspec.msgpack.encode((run, epoch, round_, term, view, block))


def applied_payload(run: bytes, round_: int, block: bytes, model: bytes) -> bytes:
    """What a peer signs to say that `model` is the digest after `round_`."""
    return b"dugnad/applied/1" + msgspec.msgpack.encode((run, round_, block, model))
