"""Peers in one process: a `Transport` without sockets, and what a network and strangers can do to a stream.

    async with network() as net:
        ann, bob = net.join(ANN), net.join(BOB)
        net.faults[ann.peer_id, bob.peer_id] = Fault(cut_after=100)

A stream handler that raises anything but a TransportError fails the test, as it would be a bug in a real peer.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Path, Reach, Route
from dugnad.dht.transport import (
    REQUEST_BYTES,
    Direction,
    RequestHandler,
    RequestRefused,
    StreamHandler,
    TransportError,
    Unreachable,
)
from dugnad.dht.wire import WireError

BUFFER_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls the bytes that one peer writes to another, on each stream; places count from its first byte."""

    cut_after: int | None = None
    """The stream ends after so many bytes."""
    stall_after: int | None = None
    """No more than so many bytes arrive, until the stream is closed."""
    corrupt_at: int | None = None
    """All bits of this byte are flipped."""


class _Pipe:
    """One direction of a stream: who writes waits while `buffer_bytes` are unread."""

    def __init__(self, fault: Fault, buffer_bytes: int) -> None:
        self._fault = fault
        self._buffer_bytes = buffer_bytes
        self._unread = bytearray()
        self._num_written = 0
        self._num_read = 0
        self._ended = False
        self._moved = asyncio.Event()

    def end(self) -> None:
        """Nothing more can be written; what was written can still be read."""
        self._ended = True
        self._moved.set()

    async def taken(self) -> None:
        """Wait until all is read, or nobody is left to read it."""
        while self._unread and not self._ended:
            await self._change()

    async def write(self, data: memoryview) -> int:
        """Take some of `data` once there is room; how many bytes. Raises BrokenPipeError."""
        while len(self._unread) >= self._buffer_bytes and not self._ended:
            await self._change()
        if self._ended:
            raise BrokenPipeError
        piece = bytearray(data[: self._buffer_bytes - len(self._unread)])
        cut, at = self._fault.cut_after, self._fault.corrupt_at
        if cut is not None and self._num_written + len(piece) >= cut:
            del piece[cut - self._num_written :]
            self.end()
        if at is not None and self._num_written <= at < self._num_written + len(piece):
            piece[at - self._num_written] ^= 0xFF
        self._unread += piece
        self._num_written += len(piece)
        self._moved.set()
        return len(piece)

    async def read(self, limit: int) -> bytes:
        """Up to `limit` bytes, at least one. Raises EOFError."""
        while not (arrived := self._arrived()):
            if self._ended:
                raise EOFError
            await self._change()
        piece = bytes(self._unread[: min(arrived, limit)])
        del self._unread[: len(piece)]
        self._num_read += len(piece)
        self._moved.set()
        return piece

    def _arrived(self) -> int:
        stall = self._fault.stall_after
        return len(self._unread) if stall is None else min(len(self._unread), stall - self._num_read)

    async def _change(self) -> None:
        self._moved.clear()
        await self._moved.wait()


class MemoryStream:
    """One end of a `Stream`; counts what passes."""

    def __init__(self, peer: PeerId, kind: str, incoming: _Pipe, outgoing: _Pipe, metered: "Metered") -> None:
        self.kind = kind
        self._peer = peer
        self._incoming = incoming
        self._outgoing = outgoing
        self._metered = metered
        self.moved_bytes = 0

    async def read_exactly(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes. Raises Unreachable if the stream ends first."""
        data = bytearray(num_bytes)
        await self.read_into(memoryview(data))
        return bytes(data)

    async def read_into(self, buffer: memoryview) -> None:
        """Fill a writable `buffer` of bytes. Raises Unreachable if the stream ends first."""
        filled = 0
        while filled < len(buffer):
            try:
                piece = await self._incoming.read(len(buffer) - filled)
            except EOFError:
                raise Unreachable(self._peer, "the stream ended early") from None
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
            self.moved_bytes += len(piece)
            self._metered["received", self.kind] += len(piece)

    async def write(self, data: bytes | memoryview) -> None:
        """Send `data`; returns once all of it is in the buffer. Raises Unreachable on a broken stream."""
        rest = memoryview(data).cast("B")
        while rest:
            try:
                num_bytes = await self._outgoing.write(rest)
            except BrokenPipeError:
                raise Unreachable(self._peer, "the stream broke off") from None
            rest = rest[num_bytes:]
            self.moved_bytes += num_bytes
            self._metered["sent", self.kind] += num_bytes

    async def wait_taken(self, *, timeout_s: float) -> None:
        """Wait until the other side has all that was written, or is gone; never raises."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._outgoing.taken()

    async def close(self) -> None:
        """End the stream, after what was written; never raises."""
        self._outgoing.end()
        self._incoming.end()


Metered = Counter[tuple[Direction, str]]
"""Bytes by direction and kind."""


class Net:
    """The peers that can reach each other, and what goes wrong between them; `network` makes one."""

    def __init__(self, tasks: asyncio.TaskGroup, buffer_bytes: int) -> None:
        self.faults: dict[tuple[PeerId, PeerId], Fault] = {}
        """(who writes, who reads): what befalls the bytes on streams that are opened from now on."""
        self._peers: dict[PeerId, MemoryTransport] = {}
        self._tasks = tasks
        self._buffer_bytes = buffer_bytes
        self._serving: set[asyncio.Task[None]] = set()

    def join(self, peer: PeerId) -> "MemoryTransport":
        """A new peer, that all others can reach."""
        self._peers[peer] = MemoryTransport(self, peer)
        return self._peers[peer]

    def leave(self, peer: PeerId) -> None:
        """Nobody reaches `peer` from now on."""
        del self._peers[peer]

    def find(self, peer: PeerId) -> "MemoryTransport":
        """The peer of that name. Raises Unreachable."""
        try:
            return self._peers[peer]
        except KeyError:
            raise Unreachable(peer, "nobody knows an address of it") from None

    def pipe(self, writer: PeerId, reader: PeerId) -> _Pipe:
        """A way for bytes from one peer to another, with its fault."""
        return _Pipe(self.faults.get((writer, reader), Fault()), self._buffer_bytes)

    def accept(self, handler: StreamHandler, peer: PeerId, stream: MemoryStream) -> None:
        """Serve an accepted stream, and close it."""
        task = self._tasks.create_task(_serve(handler, peer, stream))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    def stop(self) -> None:
        """Serve nobody any more."""
        for task in self._serving:
            task.cancel()


@asynccontextmanager
async def network(*, buffer_bytes: int = BUFFER_BYTES) -> AsyncIterator[Net]:
    """A network without peers. buffer_bytes: how much may be under way on a stream; 1 sends single bytes."""
    async with asyncio.TaskGroup() as tasks:
        net = Net(tasks, buffer_bytes)
        try:
            yield net
        finally:
            net.stop()


class MemoryTransport:
    """A `Transport` to the peers of a `Net`; `metered` counts what a real one would tell its meter."""

    def __init__(self, net: Net, peer_id: PeerId) -> None:
        self.metered: Metered = Counter()
        self.relay: PeerId | None = None
        self._net = net
        self._peer_id = peer_id
        self._handlers: dict[str, RequestHandler] = {}
        self._stream_handlers: dict[str, StreamHandler] = {}

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self._peer_id

    async def request(self, peer: PeerId, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        """The reply of `peer` to `payload`. Raises Unreachable or RequestRefused."""
        assert len(payload) <= REQUEST_BYTES, f"a request of {len(payload)} bytes, at most {REQUEST_BYTES}"
        try:
            async with asyncio.timeout(timeout_s):
                self.metered["sent", "message"] += len(payload)
                reply = await self._net.find(peer).answer(self._peer_id, channel, payload)
        except TimeoutError:
            raise Unreachable(peer, f"no answer in {timeout_s:g} s") from None
        self.metered["received", "message"] += len(reply)
        return reply

    async def open(self, peer: PeerId, channel: str, *, kind: str) -> MemoryStream:
        """A new stream to `peer`, its bytes counted as `kind`. Raises Unreachable."""
        there, back = self._net.pipe(self._peer_id, peer), self._net.pipe(peer, self._peer_id)
        self._net.find(peer).accept(self._peer_id, channel, incoming=there, outgoing=back)
        return MemoryStream(peer, kind, back, there, self.metered)

    async def serve(self, channel: str, handler: RequestHandler) -> None:
        """Answer requests on `channel`; a handler's exception refuses the request."""
        self._handlers[channel] = handler

    async def serve_stream(self, channel: str, handler: StreamHandler) -> None:
        """Accept streams on `channel`."""
        self._stream_handlers[channel] = handler

    async def route_to(self, peer: PeerId) -> Route | None:
        """As if through `relay`."""
        return Route(Path.RELAYED, self.relay)

    async def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Nothing to remember: names are enough here."""

    async def answer(self, sender: PeerId, channel: str, payload: bytes) -> bytes:
        """What we reply to a request. Raises Unreachable or RequestRefused, which name us."""
        if channel not in self._handlers:
            raise Unreachable(self._peer_id, "it does not offer this service")
        self.metered["received", "message"] += len(payload)
        try:
            reply = await self._handlers[channel](sender, payload)
        except WireError as error:  # the asker hears no more than that
            raise RequestRefused(self._peer_id, error.reason) from error
        except Exception as error:
            raise RequestRefused(self._peer_id, str(error)) from error
        self.metered["sent", "message"] += len(reply)
        return reply

    def accept(self, sender: PeerId, channel: str, *, incoming: _Pipe, outgoing: _Pipe) -> None:
        """Serve a stream that `sender` opens. Raises Unreachable."""
        if channel not in self._stream_handlers:
            raise Unreachable(self._peer_id, "it does not offer this service")
        stream = MemoryStream(sender, "unknown", incoming, outgoing, self.metered)
        self._net.accept(self._stream_handlers[channel], sender, stream)


class NoDirect:
    """A rendezvous by which nobody is reached directly."""

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.claim = b""

    async def begin(self, transport: object, known: Any) -> None:
        """Hear what claim we have, and that is all."""
        self.claim = known.claim()

    async def connect(self, peer: PeerId, *, within_s: float) -> None:
        """There is no way."""

    def connection(self, peer: PeerId) -> None:
        """There is none."""

    def serve(self, channel: str, handler: StreamHandler) -> None:
        """Nobody will come."""


async def _serve(handler: StreamHandler, peer: PeerId, stream: MemoryStream) -> None:
    try:
        await handler(peer, stream)
    except TransportError:
        pass  # the other side's fault: a real peer notes it and goes on
    finally:
        await stream.close()
