"""How peers reach each other, in words that records, status, metrics and people share."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from dugnad.dht.identity import PeerId
from dugnad.dht.multiaddrs import is_direct, relay_of


class Reach(StrEnum):
    """How others can reach a peer."""

    OPEN = "open"
    """It accepts connections from anywhere."""
    CONE = "cone"
    """Behind a router or firewall that keeps one outside port for all destinations: connections can be punched."""
    SYMMETRIC = "symmetric"
    """Behind a router that takes another outside port for each destination: through a relay, or by its own dialling."""
    UNKNOWN = "unknown"
    """Not found out yet, or there was nobody to ask."""


class Path(StrEnum):
    """By which way the bytes of a pair of peers go."""

    DIRECT = "direct"
    """One of the two accepts connections."""
    PUNCHED = "punched"
    """Neither does; both dialled at the same moment."""
    RELAYED = "relayed"
    """Through a third peer."""


@dataclass(frozen=True, slots=True)
class Route:
    """The way of a connection of libp2p's: DIRECT, or RELAYED through `relay`."""

    path: Path
    relay: PeerId | None = None

    @classmethod
    def of(cls, address: str) -> Self:
        """The way of a connection that has this multiaddr at its other end."""
        if is_direct(address):
            return cls(Path.DIRECT)
        relay = relay_of(address)
        return cls(Path.RELAYED, relay[0] if relay is not None else None)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a peer says of itself: where and how it can be reached, and its sending rate in bytes/s (0: unknown).

    claim: to a ticket, empty without one.
    """

    addresses: tuple[str, ...] = ()
    reach: Reach = Reach.UNKNOWN
    uplink: float = 0.0
    claim: bytes = b""


@dataclass(frozen=True, slots=True)
class PairPath:
    """The way to one peer that is in use, as this side measures it."""

    peer: PeerId
    path: Path
    rtt_s: float | None
    """Round trip; None while it was not measured."""
    sent_bytes_per_s: float
    """Of the newest transfers over this path that were large enough to tell; 0 while there was none."""
    received_bytes_per_s: float
