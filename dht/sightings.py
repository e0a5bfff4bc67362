"""How the router in front of us treats our port, by what others see of it. Pure.

Each observer may lie, or see us from within our own network, where no router shows: most of those outside must agree.
"""

import ipaddress
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from dugnad.dht.endpoint import Endpoint
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Reach

TO_SETTLE = 3
"""How many observers tell who is right where two disagree."""
OF_ONE_MIND = 2
"""So many need no other."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """As what `observer` sees our end of a connection, from the port on which we listen to `place`."""

    observer: PeerId
    place: Endpoint
    seen: Endpoint

    @classmethod
    def of(cls, observer: PeerId, place: Endpoint, said: str | None) -> Self | None:
        """Of what it said; None if that can't be so."""
        try:
            seen = Endpoint.parse(said or "")
        except ValueError:
            return None
        return cls(observer, place, seen) if seen.is_ipv6 == place.is_ipv6 else None


@dataclass(frozen=True, slots=True)
class Judgement:
    """How we are reached, and where others see our port, as far as that is known."""

    reach: Reach
    outside: Endpoint | None


def counting(sightings: Iterable[Sighting]) -> list[Sighting]:
    """Those that can be compared: from outside our own network, if there are any, and of one family.

    IPv4 if there is a choice: not everyone can use the other.
    """
    ranked = [(_rank(one), one) for one in sightings]
    best = min((rank for rank, _ in ranked), default=None)
    return [one for rank, one in ranked if rank == best]


def judge(sightings: Iterable[Sighting], *, port: int, more: bool) -> Judgement:
    """What more than half of the observers that count agree on.

    port: on which we listen. more: whether another observer may still come; then two that disagree leave it UNKNOWN,
    and so does one that sees two ports: it shows a router that takes another each time only as far as it is honest.
    """
    useful = counting(sightings)
    seen_by: dict[PeerId, set[Endpoint]] = {}
    for one in useful:
        seen_by.setdefault(one.observer, set()).add(one.seen)
    if not seen_by:
        return Judgement(Reach.UNKNOWN, None)
    same = Counter(next(iter(seen)) for seen in seen_by.values() if len(seen) == 1)
    outside = same.most_common(1)[0][0] if same else useful[0].seen
    if 2 * same[outside] > len(seen_by):
        to_two = len({(one.observer, one.place) for one in useful if one.seen == outside}) > 1
        return Judgement(Reach.CONE if to_two or outside.port == port else Reach.UNKNOWN, outside)
    num_turning = sum(len(seen) > 1 for seen in seen_by.values())
    settled = not more or len(seen_by) >= TO_SETTLE or num_turning >= OF_ONE_MIND
    return Judgement(Reach.SYMMETRIC if settled else Reach.UNKNOWN, outside)


def _rank(one: Sighting) -> tuple[bool, bool]:
    inside = not all(ipaddress.ip_address(each.host).is_global for each in (one.place, one.seen))
    return inside, one.seen.is_ipv6
