"""Two things that one voter signed and that no honest voter signs both: proof that it lies, for everyone to check.

A voter says one thing in one view and phase, and pledges itself to a view once, with the highest lock that it has. So
these convict whoever signed both, as one incarnation, in one round:

    two votes      of one view and phase, for different blocks
    two pledges    to one view, that speak of different locks
    vote, pledge   a vote to commit in a view, and a pledge to a later one that knows of no lock so new

What is carried is what was signed, so a vote from a certificate is as good as one that came in a message.
"""

from collections.abc import Callable, Iterable
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from dugnad.coordinator.messages import (
    PLEDGE_DOMAIN,
    PRECOMMIT,
    PREVOTE,
    VOTE_DOMAIN,
    Lock,
    Pledge,
    Voter,
    pledge_payload,
    vote_payload,
)
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import WireError

SORT = "votes"
"""What this sort of evidence is called."""

Verify = Callable[[PeerId, bytes, bytes], bool]


class Signed(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What `peer` signed, as it was signed."""

    peer: Annotated[str, Meta(max_length=128)]
    payload: Annotated[bytes, Meta(max_length=512)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class _Vote(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    run: bytes
    epoch: int
    round: int
    view: int
    phase: int
    block: bytes
    incarnation: bytes


class _Pledge(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    run: bytes
    epoch: int
    round: int
    view: int
    locked: int
    block: bytes
    incarnation: bytes


_encoder = msgspec.msgpack.Encoder()
_signed = msgspec.msgpack.Decoder(Signed)
_votes = msgspec.msgpack.Decoder(_Vote)
_pledges = msgspec.msgpack.Decoder(_Pledge)


def side(peer: PeerId, payload: bytes, signature: bytes) -> bytes:
    """One half of a proof: what `peer` signed, as bytes."""
    return _encoder.encode(Signed(peer, payload, signature))


def prevotes(run: bytes, lock: Lock, committee: Iterable[Voter]) -> dict[PeerId, bytes]:
    """Whoever's prevote is in `lock`, and that vote as half of a proof."""
    disks, block = {voter.peer: voter.incarnation for voter in committee}, lock.block
    return {
        ballot.peer: side(
            ballot.peer,
            vote_payload(run, block.epoch, block.round, lock.view, PREVOTE, block.hash, disks[ballot.peer]),
            ballot.signature,
        )
        for ballot in lock.ballots
        if ballot.peer in disks
    }


def pledge(run: bytes, epoch: int, round_: int, view: int, given: Pledge, incarnation: bytes) -> bytes:
    """A pledge to `view` as half of a proof."""
    payload = pledge_payload(run, epoch, round_, view, given.locked, given.block, incarnation)
    return side(given.peer, payload, given.signature)


def checker(verify: Verify) -> Callable[[bytes, bytes, bytes], PeerId | None]:
    """The `dht.evidence.Checker` of this sort."""

    def check(run: bytes, first: bytes, second: bytes) -> PeerId | None:
        one, other = _parse(first), _parse(second)
        if one.peer != other.peer or not _contradict(run, _words(one), _words(other)):
            return None
        peer = PeerId(one.peer)
        honest = all(verify(peer, said.payload, said.signature) for said in (one, other))
        return peer if honest else None

    return check


def _contradict(run: bytes, one: _Vote | _Pledge, other: _Vote | _Pledge) -> bool:
    place = (run, one.epoch, one.round, one.incarnation)
    if any((said.run, said.epoch, said.round, said.incarnation) != place for said in (one, other)):
        return False
    match one, other:
        case _Vote(), _Vote():
            return (one.view, one.phase) == (other.view, other.phase) and one.block != other.block
        case _Pledge(), _Pledge():
            return one.view == other.view and (one.locked, one.block) != (other.locked, other.block)
        case (_Vote() as vote, _Pledge() as pledged) | (_Pledge() as pledged, _Vote() as vote):
            return vote.phase == PRECOMMIT and pledged.view > vote.view >= pledged.locked  # `locked` is its view + 1
    return False


def _parse(raw: bytes) -> Signed:
    try:
        return _signed.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("malformed", f"something signed: {error}") from error


def _words(said: Signed) -> _Vote | _Pledge:
    try:
        if said.payload.startswith(VOTE_DOMAIN):
            return _votes.decode(said.payload.removeprefix(VOTE_DOMAIN))
        if said.payload.startswith(PLEDGE_DOMAIN):
            return _pledges.decode(said.payload.removeprefix(PLEDGE_DOMAIN))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("malformed", f"a vote or a pledge: {error}") from error
    raise WireError("malformed", "neither a vote nor a pledge")
