"""At which relays a peer behind a router has a place, so that the others reach it through them.

Any member that is open to all can be one. We hold places at two of them, which two a hash decides, so that the load
spreads. A place lasts as long as the connection to its relay, and is renewed often, which also shows whether the relay
is still there; one that is gone, or refuses, is replaced by the next at once and tried again later, or as soon as there
is a connection to it again. A relay that lets only little through (`Reservation.is_small`) counts only while there is
no better one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from blake3 import blake3

from dugnad.dht.circuit import Reservation
from dugnad.dht.identity import PeerId
from dugnad.dht.multiaddrs import CIRCUIT

NUM_PLACES = 2
RENEW_S = 15.0
RETRY_S = 2.0
"""After the first failure of a relay; twice as long after each further one, up to RETRY_MOST_S."""
RETRY_MOST_S = 300.0
SMALL_RETRY_S = 60.0
"""A relay with little to give may have been started anew by then."""


@dataclass(slots=True)
class _Relay:
    """What we know of one."""

    address: str
    """Without its name at the end."""
    rank: bytes
    """Of one with a low rank we rather have a place."""
    place: Reservation | None = None
    """While we hold one."""
    asking: bool = False
    failures: int = 0
    ask_at_s: float = 0.0
    """No earlier."""
    is_connected: bool = False
    """Whether there was a connection at the last look."""


class Relays:
    """Decides whom to ask for a place, and when; `now`: seconds of a clock that nobody sets."""

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self._relays: dict[PeerId, _Relay] = {}

    def know(self, candidates: Mapping[PeerId, str]) -> None:
        """These members, and no others, are open to all, each under a multiaddr without its name."""
        for peer, address in candidates.items():
            if peer not in self._relays and peer != self._me:
                self._relays[peer] = _Relay(address, blake3(self._me.encode() + peer.encode()).digest())
            elif peer != self._me:
                self._relays[peer].address = address
        for peer in self._relays.keys() - candidates.keys():
            if self._relays[peer].place is None and not self._relays[peer].asking:
                del self._relays[peer]  # one at which we have a place shows by itself when it is gone

    def connected(self, peers: Collection[PeerId], *, now: float) -> None:
        """To whom there is a connection now: a place at another is lost, and who is back is asked without waiting."""
        for peer, relay in self._relays.items():
            if relay.asking:
                continue
            if relay.place is not None and peer not in peers:
                relay.place = None
                relay.ask_at_s = now + RETRY_S
            elif relay.place is None and peer in peers and not relay.is_connected:
                relay.failures, relay.ask_at_s = 0, now
            relay.is_connected = peer in peers

    def to_ask(self, *, now: float) -> list[tuple[PeerId, str]]:
        """Whom to ask for a place now, and where; no one is named again before it was `granted`, or has `failed`."""
        renewals = [peer for peer, relay in self._relays.items() if relay.place is not None and self._due(relay, now)]
        missing = NUM_PLACES - sum(_is_good(relay) or _is_hope(relay) for relay in self._relays.values())
        free = [peer for peer, relay in self._relays.items() if relay.place is None and self._due(relay, now)]
        free.sort(key=lambda peer: self._relays[peer].rank)
        chosen = [*renewals, *free[: max(0, missing)]]
        for peer in chosen:
            self._relays[peer].asking = True
            self._relays[peer].is_connected = True  # asking takes a connection: who refuses has not come back by that
        return [(peer, self._relays[peer].address) for peer in chosen]

    def granted(self, peer: PeerId, place: Reservation, *, now: float) -> None:
        """`peer` gives us a place."""
        if (relay := self._relays.get(peer)) is None:
            return
        relay.asking, relay.failures, relay.place, relay.ask_at_s = False, 0, place, now + RENEW_S
        held = [one for one in self._relays.values() if one.place is not None]
        surplus = [one for one in held if not _is_good(one)] if len(held) > NUM_PLACES else []
        for one in surplus[:1]:  # it may be the new one
            one.place, one.ask_at_s = None, now + SMALL_RETRY_S

    def failed(self, peer: PeerId, *, now: float) -> None:
        """`peer` refuses, or does not answer."""
        if (relay := self._relays.get(peer)) is not None:
            relay.asking, relay.place = False, None
            relay.ask_at_s = now + min(RETRY_S * 2**relay.failures, RETRY_MOST_S)
            relay.failures += 1

    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs of the circuits through which we can be reached, without us at their end, in a steady order."""
        held = [(relay.rank, peer, relay) for peer, relay in self._relays.items() if relay.place is not None]
        good = [one for one in held if _is_good(one[2])]
        return tuple(
            f"{relay.address}/p2p/{peer}{CIRCUIT}"
            for _, peer, relay in sorted(good or held, key=lambda one: one[0])[:NUM_PLACES]
        )

    @staticmethod
    def _due(relay: _Relay, now: float) -> bool:
        return not relay.asking and now >= relay.ask_at_s


def _is_good(relay: _Relay) -> bool:
    return relay.place is not None and not relay.place.is_small


def _is_hope(relay: _Relay) -> bool:
    """Whether it is being asked for a first place."""
    return relay.place is None and relay.asking
