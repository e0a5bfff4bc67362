"""How two peers come to a direct connection: what they tell each other, and who then does what. Pure.

They meet over libp2p, which always works and knows for sure who is who: each names its certificate and its addresses.
Then one dials the other, or both dial at the same moment, or nothing can be done and libp2p carries the bytes too.
"""

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from dugnad.dht.endpoint import Endpoint
from dugnad.dht.paths import Reach
from dugnad.dht.ticket import CLAIM_BYTES
from dugnad.dht.wire import WireError, strictly

CHANNEL = "dugnad/meet/1"
CERTIFICATE_BYTES = 1024
"""Of a certificate, in DER; ours have about 350."""
_CAP_BYTES = 4096

_Text = Annotated[str, Meta(max_length=64)]
"""Of an endpoint; `decode` sees to it that it is one."""
_Texts = Annotated[tuple[_Text, ...], Meta(max_length=8)]


class Meet(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one peer tells another that it wants a direct connection with, and what that answers."""

    certificate: Annotated[bytes, Meta(min_length=1, max_length=CERTIFICATE_BYTES)]
    """DER."""
    reach: Reach
    open: _Texts
    """Where anyone may dial its carrier, "HOST:PORT"."""
    local: _Texts
    """Where those in the same network may."""
    outside: _Text
    """How others see its carrier's port; "" if nobody has told it."""
    second: _Text
    """Another place of an open carrier, through which to see whether a router keeps one port for all."""
    claim: Annotated[bytes, Meta(max_length=CLAIM_BYTES)] = b""
    """Why it may take part, of one who was not let in yet."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Meet)


def encode(said: Meet) -> bytes:
    """The words on the wire."""
    return _encoder.encode(said)


def decode(raw: bytes) -> Meet:
    """The words in some bytes. Raises WireError."""
    if len(raw) > _CAP_BYTES:
        raise WireError("too large", f"{len(raw)} bytes, at most {_CAP_BYTES}")
    said = strictly(_decoder, raw, "meet")
    for text in (*said.open, *said.local, *filter(None, (said.outside, said.second))):
        try:
            Endpoint.parse(text)
        except ValueError as error:
            raise WireError("malformed", f"meet: {error}") from error
    return said


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect to one of these."""

    places: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Punch:
    """Connect to this at the same moment as the other does to us."""

    place: Endpoint


@dataclass(frozen=True, slots=True)
class Wait:
    """The other side dials."""


@dataclass(frozen=True, slots=True)
class Give:
    """Nothing can be done, for a reason in words."""

    reason: str


Step = Dial | Punch | Wait | Give


def step(mine: Meet, theirs: Meet, *, first: bool) -> Step:
    """What we do, where `mine` and `theirs` were said; first: whether we spoke first. The other side's step fits it."""
    if theirs.open and (first or not mine.open):
        return Dial(_places(theirs.open))
    if mine.open:
        return Wait()
    near = _host(mine.outside) == _host(theirs.outside)  # behind one router, or nobody has seen either of them
    if near and mine.local and theirs.local:
        return Dial(_places(theirs.local)) if first else Wait()
    for who, said in (("you are", mine), ("it is", theirs)):
        if said.reach is Reach.SYMMETRIC:
            return Give(f"{who} behind a router that takes another port for each connection")
        if not said.outside:
            return Give(f"how {'you are' if said is mine else 'it is'} seen from outside, nobody has said yet")
    return Punch(Endpoint.parse(theirs.outside))


def _places(texts: tuple[str, ...]) -> tuple[Endpoint, ...]:
    return tuple(Endpoint.parse(text) for text in texts)


def _host(text: str) -> str:
    return Endpoint.parse(text).host if text else ""
