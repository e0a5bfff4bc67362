"""The transport of a peer: libp2p for words and as the way that always works, direct connections for bulk bytes.

While there is no direct connection to a peer, or when one breaks, streams go over libp2p, through a relay if need be,
and then as fast as that relay can give. What was under way when one broke is sent again by whoever sent it, as with any
stream that breaks off.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dugnad.dht.allowance import Allowance
from dugnad.dht.budget import PIECE_BYTES
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import PairPath, Path, Route
from dugnad.dht.rendezvous import Rendezvous
from dugnad.dht.transport import RequestHandler, Stream, StreamHandler, Transport, Unreachable

WAIT_S = 3.0
"""How long a stream waits for a direct connection before it goes over libp2p; the connection may still come."""
FORGET_S = 600.0
"""After how long without a stream a pair is no longer shown."""
MAX_RELAYS = 64
"""Relays of which it is remembered what we may send through them."""
_LARGE_BYTES = 128 * 1024
"""Transfers below this say nothing of the rate."""


class Libp2p(Transport, Protocol):
    """The transport below."""

    async def route_to(self, peer: PeerId) -> Route | None:
        """By which way it reaches `peer`; None if there is no connection."""
        ...


@dataclass(slots=True)
class Pace:
    """What was last seen of the streams with a peer."""

    path: Path
    used_at: float
    rtt_s: float | None = None
    sent_bytes_per_s: float = 0.0
    received_bytes_per_s: float = 0.0


class Direct:
    """A `Transport` over libp2p and the direct connections of `rendezvous`."""

    def __init__(self, libp2p: Libp2p, rendezvous: Rendezvous) -> None:
        self._libp2p = libp2p
        self.rendezvous = rendezvous
        self._paces: dict[PeerId, Pace] = {}
        self._allowances: dict[PeerId, Allowance] = {}
        """By relay, the one used last at the end."""

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self._libp2p.peer_id

    async def request(self, peer: PeerId, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        """See Transport: always over libp2p."""
        since = time.monotonic()
        reply = await self._libp2p.request(peer, channel, payload, timeout_s=timeout_s)
        pace = self._paces.get(peer)
        if pace is not None:
            took_s = time.monotonic() - since
            pace.rtt_s = min(took_s, 2 * pace.rtt_s) if pace.rtt_s is not None else took_s
        return reply

    async def serve(self, channel: str, handler: RequestHandler) -> None:
        """See Transport."""
        await self._libp2p.serve(channel, handler)

    async def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """See Transport."""
        await self._libp2p.learn(peer, addresses)

    async def open(self, peer: PeerId, channel: str, *, kind: str) -> Stream:
        """A new stream, on a direct connection if one can be had soon. Raises Unreachable."""
        connection = await self.rendezvous.connect(peer, within_s=WAIT_S)
        if connection is not None:
            try:
                stream: Stream = connection.open(channel, kind=kind)
            except Unreachable:
                pass  # it ended this moment, or is crowded
            else:
                return TimedStream(stream, self._pace(peer, connection.path))
        return await self._over_libp2p(peer, await self._libp2p.open(peer, channel, kind=kind))

    async def serve_stream(self, channel: str, handler: StreamHandler) -> None:
        """Accept streams on `channel`, over both."""

        async def directly(peer: PeerId, stream: Stream) -> None:
            connection = self.rendezvous.connection(peer)
            path = connection.path if connection is not None else Path.DIRECT  # it ended this moment
            await handler(peer, TimedStream(stream, self._pace(peer, path)))

        async def over_libp2p(peer: PeerId, stream: Stream) -> None:
            await handler(peer, await self._over_libp2p(peer, stream))

        self.rendezvous.serve(channel, directly)
        await self._libp2p.serve_stream(channel, over_libp2p)

    def paths(self) -> list[PairPath]:
        """The ways in use to other peers, in peer-id order."""
        now = time.monotonic()
        self._paces = {peer: pace for peer, pace in self._paces.items() if now - pace.used_at < FORGET_S}
        shown = []
        for peer, pace in sorted(self._paces.items()):
            connection = self.rendezvous.connection(peer)
            path, rtt_s = (connection.path, connection.rtt_s) if connection is not None else (pace.path, pace.rtt_s)
            shown.append(PairPath(peer, path, rtt_s, pace.sent_bytes_per_s, pace.received_bytes_per_s))
        return shown

    async def _over_libp2p(self, peer: PeerId, stream: Stream) -> "TimedStream":
        route = await self._libp2p.route_to(peer) or Route(Path.RELAYED)
        allowance = self._allowance(route.relay) if route.relay is not None else None
        return TimedStream(stream, self._pace(peer, route.path), allowance)

    def _allowance(self, relay: PeerId) -> Allowance:
        """What all streams through that relay share."""
        self._allowances[relay] = found = self._allowances.pop(relay, None) or Allowance(self._libp2p, relay)
        while len(self._allowances) > MAX_RELAYS:
            self._allowances.pop(next(iter(self._allowances)))
        return found

    def _pace(self, peer: PeerId, path: Path) -> Pace:
        pace = self._paces.setdefault(peer, Pace(path, 0.0))
        pace.path, pace.used_at = path, time.monotonic()
        return pace


class TimedStream:
    """A `Stream` that notes how fast its bytes move; `allowance`: of the relay that it goes through."""

    def __init__(self, stream: Stream, pace: Pace, allowance: Allowance | None = None) -> None:
        self._stream = stream
        self._pace = pace
        self._allowance = allowance
        self._sent = self._received = 0
        self._sending_s = self._receiving_s = 0.0

    @property
    def kind(self) -> str:
        """See Stream."""
        return self._stream.kind

    @kind.setter
    def kind(self, kind: str) -> None:
        self._stream.kind = kind

    @property
    def moved_bytes(self) -> int:
        """See Stream."""
        return self._stream.moved_bytes

    async def read_exactly(self, num_bytes: int) -> bytes:
        """See Stream."""
        return await self._stream.read_exactly(num_bytes)

    async def read_into(self, buffer: memoryview) -> None:
        """See Stream."""
        since = time.monotonic()
        await self._stream.read_into(buffer)
        self._receiving_s += time.monotonic() - since
        self._received += len(buffer)

    async def write(self, data: bytes | memoryview) -> None:
        """See Stream."""
        since, view = time.monotonic(), memoryview(data).cast("B")
        if self._allowance is None:
            await self._stream.write(view)
        else:
            for start in range(0, len(view), PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                await self._allowance.spend(len(piece), of=len(view) - start)
                await self._stream.write(piece)
        self._sending_s += time.monotonic() - since
        self._sent += len(view)

    async def wait_taken(self, *, timeout_s: float) -> None:
        """See Stream."""
        await self._stream.wait_taken(timeout_s=timeout_s)

    async def close(self) -> None:
        """See Stream."""
        if self._sent >= _LARGE_BYTES and self._sending_s > 0:
            self._pace.sent_bytes_per_s = self._sent / self._sending_s
        if self._received >= _LARGE_BYTES and self._receiving_s > 0:
            self._pace.received_bytes_per_s = self._received / self._receiving_s
        await self._stream.close()
