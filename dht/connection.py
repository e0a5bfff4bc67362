"""A direct connection to one peer, and the streams on it, as the event loop sees them."""

import asyncio
import contextlib
import itertools
import logging
import ssl
import time
from collections import deque
from collections.abc import Callable

from dugnad.dht import mux
from dugnad.dht.identity import PeerId, nickname
from dugnad.dht.mux import Mux
from dugnad.dht.paths import Path
from dugnad.dht.transport import Meter, StreamHandler, TransportError, Unreachable
from dugnad.dht.wire import WireError
from dugnad.dht.wires import FRAME_COST_BYTES, Frame, Wires

log = logging.getLogger(__name__)

PING_S = 10.0
"""How often a connection is tried: it keeps the routers' mappings alive, and measures the round trip."""
SILENCE_S = 25.0
"""Without an answer for so long, it is over."""
_LET_IN_BYTES = 128 * 1024


class DirectStream:
    """A `Stream` on a direct connection; counts what passes."""

    def __init__(self, connection: "Connection", number: int, kind: str, meter: Meter) -> None:
        self.kind = kind
        self._connection = connection
        self._number = number
        self._meter = meter
        self._arrived: deque[memoryview] = deque()
        self._ended = False
        """Whether the other side sends and reads no more."""
        self._moved = asyncio.Event()

    @property
    def moved_bytes(self) -> int:
        """See Stream: of the whole connection."""
        return self._connection.moved_bytes

    @property
    def unread_bytes(self) -> int:
        """What has come and was not read yet takes so much memory."""
        return sum(len(piece) + FRAME_COST_BYTES for piece in self._arrived)

    async def read_exactly(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes. Raises Unreachable if the stream ends first."""
        data = bytearray(num_bytes)
        await self.read_into(memoryview(data))
        return bytes(data)

    async def read_into(self, buffer: memoryview) -> None:
        """Fill a writable `buffer` of bytes. Raises Unreachable if the stream ends first."""
        filled = 0
        while filled < len(buffer):
            if not self._arrived:
                await self._more()
            piece = self._arrived.popleft()
            count = min(len(piece), len(buffer) - filled)
            buffer[filled : filled + count] = piece[:count]
            if count < len(piece):
                self._arrived.appendleft(piece[count:])
            else:
                self._connection._wires.reuse(piece)
            filled += count
            self._connection._consumed(self._number, count, last=count == len(piece))
            self._meter("received", self.kind, count)

    async def write(self, data: bytes | memoryview) -> None:
        """Send `data`; returns once all of it has left. Raises Unreachable on a broken stream."""
        view = memoryview(data).cast("B")
        while view:
            credit = self._connection.mux.credit(self._number)
            if self._ended or not self._connection.alive:
                raise self._broken()
            if not credit:
                self._moved.clear()
                await self._moved.wait()
                continue
            piece, view = view[:credit], view[credit:]
            await self._connection._send_data(self._number, piece)
            self._meter("sent", self.kind, len(piece))

    async def wait_taken(self, *, timeout_s: float) -> None:
        """Wait until the other side, which has all then, closes, or says more than it should, or takes too long."""
        with contextlib.suppress(TimeoutError, TransportError):
            async with asyncio.timeout(timeout_s):
                await self.read_exactly(1)

    async def close(self) -> None:
        """End the stream, after what was written; never raises."""
        self._connection._close(self._number)

    async def _more(self) -> None:
        """Wait for bytes. Raises Unreachable if none will come."""
        while not self._arrived:
            if self._ended or not self._connection.alive:
                raise self._broken()
            self._moved.clear()
            await self._moved.wait()

    def _broken(self) -> Unreachable:
        return Unreachable(self._connection.peer, "the stream broke off")

    # -- what the connection says

    def arrive(self, data: memoryview) -> None:
        """Bytes have come."""
        self._arrived.append(data)
        self._moved.set()

    def end(self) -> None:
        """Nothing more will come, and nothing more is read there."""
        self._ended = True
        self._moved.set()

    def may_write(self) -> None:
        """There is credit again."""
        self._moved.set()


class Connection:
    """Streams to and from one peer. handlers: by channel; over: hears once that it is over, with the reason.

    dialler: whose stream numbers are odd; as both sides agree on it, it need not be who dialled.
    """

    def __init__(
        self,
        wires: Wires,
        sock: ssl.SSLSocket,
        peer: PeerId,
        path: Path,
        *,
        dialler: bool,
        handlers: dict[str, StreamHandler],
        meter: Meter,
        over: Callable[["Connection", str], None],
    ) -> None:
        self.peer = peer
        self.path = path
        self.mux = Mux(dialler)
        self.alive = True
        self.seen_as: str | None = None
        """The address under which the other side sees us, "HOST:PORT"."""
        self.keeps_port = False
        """Whether it goes from the port on which we listen, so that `seen_as` is how others would find that."""
        self.rtt_s: float | None = None
        self._began_at = self.used_at = time.monotonic()
        self._wires = wires
        self._handlers = handlers
        self._meter = meter
        self._over = over
        self._streams: dict[int, DirectStream] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._tokens = itertools.count()
        self._pings: dict[bytes, float] = {}
        self._why = ""
        self._settled = asyncio.Event()
        self._gone_bytes = 0
        self._wire = wires.add(sock, self._on_frames, self._on_end)
        self._pinging = asyncio.create_task(self._keep_pinging())

    @property
    def moved_bytes(self) -> int:
        """Both ways, since it began."""
        return self._wire.moved_bytes

    @property
    def age_s(self) -> float:
        """For how long it has been there."""
        return time.monotonic() - self._began_at

    @property
    def idle(self) -> bool:
        """Whether no stream is open."""
        return not self._streams

    async def taken(self) -> None:
        """Wait until the other side has shown that it takes us: told how it sees us. Raises EOFError if it will not."""
        while self.seen_as is None and self.alive:
            self._settled.clear()
            await self._settled.wait()
        if not self.alive:  # it may have told, and hung up at once
            raise EOFError(self._why)

    def tell_seen(self, address: str) -> None:
        """Tell the other side under which address we see it."""
        self._wire.send(mux.seen(address))

    def open(self, channel: str, *, kind: str) -> DirectStream:
        """A new stream, its bytes counted as `kind`. Raises Unreachable."""
        if not self.alive or self.mux.num_ours >= mux.MAX_STREAMS:
            raise Unreachable(self.peer, "too many streams at once" if self.alive else "the connection is over")
        self.used_at = time.monotonic()
        number, opening = self.mux.open(channel)
        self._wire.send(opening)
        stream = self._streams[number] = DirectStream(self, number, kind, self._meter)
        return stream

    async def close(self) -> None:
        """End it and all that runs on it."""
        self._die("")
        self._wire.close()
        await asyncio.gather(*self._serving, return_exceptions=True)

    # -- for the streams

    async def _send_data(self, stream: int, piece: memoryview) -> None:
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        payloads = [piece[start : start + mux.FRAME_BYTES] for start in range(0, len(piece), mux.FRAME_BYTES)]
        self._wire.send_data([(self.mux.data(stream, len(payload)), payload) for payload in payloads], sent)
        await sent

    def _consumed(self, stream: int, num_bytes: int, *, last: bool) -> None:
        """So much of a frame was read; last: the rest of it."""
        credit = self.mux.consumed(stream, num_bytes)
        if credit:
            self._wire.send(credit)
        self._let_in(num_bytes + (FRAME_COST_BYTES if last else 0))

    def _close(self, number: int) -> None:
        closing, stream = self.mux.close(number), self._streams.pop(number, None)
        if stream is None:
            return
        if closing and self.alive:
            self._wire.send_after_data(closing)
        self._let_in(stream.unread_bytes)

    def _let_in(self, num_bytes: int) -> None:
        """So much of what came takes no memory any more: as much may be read from the socket again."""
        self._gone_bytes += num_bytes
        if self._gone_bytes >= _LET_IN_BYTES:
            self._wire.taken(self._gone_bytes)
            self._gone_bytes = 0

    # -- what comes

    def _on_frames(self, frames: list[Frame]) -> None:
        for kind, number, payload in frames:
            if not self.alive:
                return
            try:
                events = self.mux.receive(kind, number, payload)
                for event in events:
                    self._do(event)
                if not (kind is mux.Kind.DATA and events and number in self._streams):
                    self._let_in(FRAME_COST_BYTES + len(payload))  # else once it is read
            except WireError as error:
                log.debug("%s sent nonsense: %s", nickname(self.peer), error)
                self._die(str(error))
                self._wire.abort()

    def _do(self, event: mux.Event) -> None:
        match event:
            case mux.Opened(number, channel):
                self._serve(number, channel)
            case mux.Arrived(number, data) if number in self._streams:
                self._streams[number].arrive(data)
            case mux.MayWrite(number) if number in self._streams:
                self._streams[number].may_write()
            case mux.Closed(number) if number in self._streams:
                self._streams[number].end()
            case mux.Reply(frame):
                self._wire.send(frame)
            case mux.Ponged(token) if token in self._pings:
                self.rtt_s = time.monotonic() - self._pings.pop(token)
            case mux.SeenAs(address):
                self.seen_as = address
                self._settled.set()

    def _serve(self, number: int, channel: str) -> None:
        handler = self._handlers.get(channel)
        stream = self._streams[number] = DirectStream(self, number, "unknown", self._meter)
        if handler is None:
            self._close(number)
            return
        task = asyncio.create_task(self._serve_one(handler, stream))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve_one(self, handler: StreamHandler, stream: DirectStream) -> None:
        try:
            await handler(self.peer, stream)
            await stream.wait_taken(timeout_s=5.0)
        except (TransportError, TimeoutError) as error:
            log.debug("a stream broke off: %s", error)
        except Exception:
            log.exception("a handler failed")
        finally:
            await stream.close()

    async def _keep_pinging(self) -> None:
        heard_bytes, heard_at = 0, time.monotonic()
        while self.alive:
            token = next(self._tokens).to_bytes(8)
            self._pings = {token: time.monotonic()}
            self._wire.send(mux.ping(token))
            await asyncio.sleep(PING_S if self.rtt_s is not None else 1.0)
            if self._wire.received_bytes != heard_bytes:  # of a frame that takes long, too
                heard_bytes, heard_at = self._wire.received_bytes, time.monotonic()
            elif time.monotonic() - heard_at > SILENCE_S:
                self._die(f"silent for {SILENCE_S:.0f} s")
                self._wire.abort()

    def _on_end(self, why: str) -> None:
        self._die(why or "it was closed")

    def _die(self, why: str) -> None:
        if not self.alive:
            return
        self.alive, self._why = False, why
        self._settled.set()
        self._pinging.cancel()
        for stream in self._streams.values():
            stream.end()
        for task in self._serving:
            if task is not asyncio.current_task():
                task.cancel()
        self._over(self, why)
