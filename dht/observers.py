"""The open peers to whom we are connected from our port: they see it from outside, and keep it open in the router."""

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Protocol

from blake3 import blake3

from dugnad.dht.carrier import Carrier, NoConnection
from dugnad.dht.connection import Connection
from dugnad.dht.endpoint import Endpoint
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Reach
from dugnad.dht.sightings import Judgement, Sighting, counting, judge

OBSERVERS = 2
"""How many open peers tell us how we are seen; one more if they disagree."""
MAX_OBSERVERS = 8
"""The same, those included that see us from within our own network, or tell nothing that makes sense."""
CONNECT_S = 3.0
DIAL_AGAIN_S = 15.0
"""How often an open peer to whom we are connected from another port is tried from ours."""


class Connections(Protocol):
    """Where connections to peers come from."""

    def connection(self, peer: PeerId) -> Connection | None:
        """The newest one to `peer`."""
        ...

    async def connect(self, peer: PeerId, *, within_s: float) -> Connection | None:
        """One to `peer`, sought if there is none."""
        ...

    def pauses(self, peer: PeerId) -> bool:
        """Whether it was sought in vain not long ago."""
        ...


class Observers:
    """Finds them, and knows what they see together."""

    def __init__(self, me: PeerId, carrier: Carrier, connections: Connections) -> None:
        self._me = me
        self._carrier = carrier
        self._connections = connections
        self._dialled: dict[Connection, Endpoint] = {}
        """Where those lead that we dialled; from the port on which we listen, they show how it looks from outside."""
        self._dial_again_at = 0.0
        self._alone_with: set[PeerId] | None = None
        """The observers beside whom no other was found."""

    @property
    def watching(self) -> set[PeerId]:
        """Who sees our port."""
        return {connection.peer for connection in self._dialled if connection.keeps_port}

    @property
    def reach(self) -> Reach:
        """How we are reached, if we are not open."""
        return self._judged(more=self._alone_with != self.watching).reach

    @property
    def outside(self) -> str:
        """How others see our port, "HOST:PORT"; empty while nobody has said."""
        outside = self._judged(more=True).outside
        return str(outside) if outside is not None else ""

    def dialled(self, connection: Connection, place: Endpoint) -> None:
        """We have connected to `place`."""
        self._dialled[connection] = place

    def over(self, connection: Connection) -> None:
        """A connection has ended."""
        self._dialled.pop(connection, None)

    async def look_through(self, second: Endpoint, peer: PeerId) -> None:
        """See whether a router gives us another port towards another place of `peer`, if that is not known yet."""
        if self.reach is Reach.UNKNOWN:
            await self._dial(peer, second)

    async def look(self, open_peers: Iterable[PeerId]) -> None:
        """Be connected to as many of `open_peers` as it takes, if they can be had."""
        watching = self.watching
        others = [peer for peer in open_peers if peer not in watching and self._may_be_tried(peer)]
        # spread over them by hash: everyone has the same list
        others.sort(key=lambda peer: blake3(f"{self._me} {peer}".encode()).digest())
        wanted = others[: max(0, min(self._num_missing(), MAX_OBSERVERS - len(watching)))]
        await asyncio.gather(*(self._try(peer) for peer in wanted))
        if self.watching == watching:
            self._alone_with = watching

    def _num_missing(self) -> int:
        num_heard = len({one.observer for one in counting(self._sightings())})
        in_doubt = num_heard > 0 and self._judged(more=True).reach is Reach.UNKNOWN
        return max(OBSERVERS - num_heard, int(in_doubt))

    def _may_be_tried(self, peer: PeerId) -> bool:
        there = self._connections.connection(peer)
        if there is None:
            return not self._connections.pauses(peer)
        return there in self._dialled and time.monotonic() >= self._dial_again_at

    async def _try(self, peer: PeerId) -> None:
        there = self._connections.connection(peer)
        if there is None:
            await self._connections.connect(peer, within_s=CONNECT_S)
            return
        place = self._dialled.get(there)
        if place is None:  # it came to us this moment
            return
        # our port could not be had then, or it was not open yet; tried again where we reached it, and nowhere else
        self._dial_again_at = time.monotonic() + DIAL_AGAIN_S
        if await self._dial(peer, place) and there.idle:
            await there.close()

    async def _dial(self, peer: PeerId, place: Endpoint) -> bool:
        with contextlib.suppress(NoConnection):
            self._dialled[await self._carrier.dial(peer, place, keep_port=True, or_another=False)] = place
            return True
        return False

    def _sightings(self) -> list[Sighting]:
        seen = [Sighting.of(one.peer, place, one.seen_as) for one, place in self._dialled.items() if one.keeps_port]
        return [one for one in seen if one is not None]

    def _judged(self, *, more: bool) -> Judgement:
        return judge(self._sightings(), port=self._carrier.port, more=more)
