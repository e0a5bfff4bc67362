"""How two peers come to a direct connection: what they tell each other, and who then does what. Pure.

They meet over libp2p, which always works and knows for sure who is who: each names its certificate and its addresses.
Then one dials the other, or both dial at the same moment, or nothing can be done and libp2p carries the bytes too.
"""

from collections import deque
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from dugnad.dht.endpoint import Endpoint
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Reach
from dugnad.dht.ticket import CLAIM_BYTES
from dugnad.dht.wire import WireError, strictly

CHANNEL = "dugnad/meet/1"
CERTIFICATE_BYTES = 1024
"""Of a certificate, in DER; ours have about 350."""
_CAP_BYTES = 4096
FAVOUR_S = 10.0
PLACES_FOR_ONE = 8
"""How many places we dial in FAVOUR_S because one peer asks us to."""
PLACES_FOR_ALL = 64
"""The same, for all peers together."""
PLACES_FOR_STRANGERS = 16
"""Of these, for those of whom the run knows nothing: names cost nothing, and the others need their room."""

_Text = Annotated[str, Meta(max_length=64)]
"""Of an endpoint; `decode` sees to it that it is one."""
_Texts = Annotated[tuple[_Text, ...], Meta(max_length=8)]


class Meet(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one peer tells another that it wants a direct connection with, and what that answers."""

    certificate: Annotated[bytes, Meta(min_length=1, max_length=CERTIFICATE_BYTES)]
    """DER."""
    reach: Reach
    open: _Texts
    """Where its carrier may be dialled, "HOST:PORT": by anyone if it is OPEN, else by some."""
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
    if (certain := _dial_or_wait(mine, theirs, first=first, certain=True)) is not None:
        return certain
    near = _outside_host(mine) == _outside_host(theirs)  # behind one router, or nobody has seen either of them
    if near and mine.local and theirs.local:
        return Dial(_places(theirs.local)) if first else Wait()
    both = (("you are", mine), ("it is", theirs))
    if all(said.outside and said.reach is not Reach.SYMMETRIC for _, said in both):
        return Punch(Endpoint.parse(theirs.outside))
    if (tried := _dial_or_wait(mine, theirs, first=first, certain=False)) is not None:
        return tried
    for who, said in both:
        if said.reach is Reach.SYMMETRIC:
            return Give(f"{who} behind a router that takes another port for each connection")
    unseen = "you are" if not mine.outside else "it is"
    return Give(f"how {unseen} seen from outside, nobody has said yet")


class Favours:
    """What we dial because others ask us to: too little for anyone to have us knock at a third one's door."""

    def __init__(self) -> None:
        self._done: deque[tuple[float, PeerId, bool, int]] = deque()
        """When, for whom, whether the run knows it, how many places."""

    def grant(self, peer: PeerId, step: Step, *, known: bool, now: float) -> bool:
        """Whether we take the step that `peer` asks of us; it counts then.

        known: whether the run knows `peer`. now: seconds of a clock that nobody sets.
        """
        num_places = len(step.places) if isinstance(step, Dial) else int(isinstance(step, Punch))
        if not num_places:
            return True
        while self._done and self._done[0][0] <= now - FAVOUR_S:
            self._done.popleft()
        for_one = sum(places for _, whose, _, places in self._done if whose == peer)
        for_strangers = sum(places for _, _, was_known, places in self._done if not was_known)
        for_all = sum(places for *_, places in self._done)
        granted = (
            for_one + num_places <= PLACES_FOR_ONE
            and for_all + num_places <= PLACES_FOR_ALL
            and (known or for_strangers + num_places <= PLACES_FOR_STRANGERS)
        )
        if granted:
            self._done.append((now, peer, known, num_places))
        return granted


def _dial_or_wait(mine: Meet, theirs: Meet, *, first: bool, certain: bool) -> Dial | Wait | None:
    """One dials the other, if that can be done for sure, or may succeed; None if it can't."""
    i_can, they_can = (bool(said.open) and (said.reach is Reach.OPEN or not certain) for said in (mine, theirs))
    if they_can and (first or not i_can):
        return Dial(_places(theirs.open))
    return Wait() if i_can else None


def _places(texts: tuple[str, ...]) -> tuple[Endpoint, ...]:
    return tuple(Endpoint.parse(text) for text in texts)


def _outside_host(said: Meet) -> str:
    place = said.outside or next(iter(said.open), "")
    return Endpoint.parse(place).host if place else ""
