"""The organizer's word that a peer may act for it: keep the coordinator's seat, sign tickets, decide who is let in.

A delegation is bound to the run and ends by itself, so that the run's key may stay offline: whoever steals the
coordinator's machine has its powers until then and no longer.
"""

from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message, Verify

LASTS_S = 30 * 86400.0
"""How long a delegation holds that a coordinator gives itself with the run's key."""
RENEW_S = 86400.0
"""How old it gets before that coordinator renews it."""
LAST_S = 253_402_300_799
"""The last second of the year 9999, in unix seconds: later times are nonsense."""

Member = Annotated[PeerId, Meta(min_length=1, max_length=80)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
UnixSeconds = Annotated[int, Meta(ge=0, le=LAST_S)]
"""0 for never."""


class Signs(Protocol):
    """Signs as one key."""

    @property
    def peer_id(self) -> PeerId:
        """The key's name."""

    def sign(self, payload: bytes) -> bytes:
        """The 64-byte signature of `payload`, which begins with its own domain tag."""


class Delegation(Message, frozen=True):
    """The organizer's word that `coordinator` may have the coordinator's seat; of two, the one of the later term.

    Signed with the run key over `delegation_payload`. The chain never looks at `until`, as it knows no time: whoever
    gives a seat or a vote does.
    """

    coordinator: Member
    term: Annotated[int, Meta(ge=0, lt=2**53)]
    until: UnixSeconds
    """When it ends; 0: never."""
    signature: Signature

    def over(self, now: float) -> bool:
        """Whether it has ended at `now`, unix seconds."""
        return ends(self.until) <= now


def ends(until: int) -> float:
    """A moment that may be 0 for never, so that moments can be compared."""
    return until or float("inf")


def delegation_payload(run: bytes, coordinator: PeerId, term: int, until: int) -> bytes:
    """What the organizer signs so that `coordinator` may act for it, from `term` on."""
    return b"dugnad/delegation/2" + msgspec.msgpack.encode((run, coordinator, term, until))


def delegate(organizer: Signs, run: bytes, coordinator: PeerId, term: int, until: int = 0) -> Delegation:
    """The organizer's word that `coordinator` may act for it, until that unix second; 0: for ever."""
    signature = organizer.sign(delegation_payload(run, coordinator, term, until))
    return Delegation(coordinator, term, until, signature)


def is_delegated(said: Delegation, run: bytes, organizer: PeerId, verify: Verify) -> bool:
    """Whether the organizer of that run signed `said`, be it over or not."""
    return verify(organizer, delegation_payload(run, said.coordinator, said.term, said.until), said.signature)
