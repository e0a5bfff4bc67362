"""One thread that moves frames between TLS sockets and the event loop.

TLS in the event loop would cost three times the processor time, and hold up what decides rounds. The thread only moves
bytes: what a frame means, and whether there may be one, `mux.py` says on the loop's side.
"""

import asyncio
import contextlib
import logging
import selectors
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from dugnad.dht.mux import FRAME_BYTES, HEADER, Kind, check_header
from dugnad.dht.wire import WireError

log = logging.getLogger(__name__)

TURN_BYTES = 2**20
"""How much one connection may read before others have their turn."""
UNREAD_BYTES = 8 * 2**20
"""How much of a connection may lie here, not read by anyone: then no more is taken from its socket."""
FRAME_COST_BYTES = 512
"""What a frame takes here besides its payload, more or less: many small ones must not fill the memory either."""
MAX_QUEUED = 2048
"""Frames that wait to be sent: more come together only where the other side asks, and does not take the answers."""
CLOSE_S = 5.0
"""How long a connection that is closed may take to send what was to be sent."""

POOL = 64
"""Buffers that are kept to be used again: fresh memory for each frame would cost more than its decryption."""
_AT_ONCE_BYTES = 64 * 1024
"""What is handed to OpenSSL in one piece: it tells of no byte before all of them are gone."""
_ENOUGH_BYTES = 192 * 1024
_ENOUGH_S = 0.02
"""What comes in this time is waited for, up to _ENOUGH_BYTES: so that on a slow line bytes are seen to move."""
_UNSENT_BYTES = 64 * 1024
"""What the kernel takes ahead of the line: else it takes megabytes, and then nothing for as long as those need."""
_IN_OPENSSL_BYTES = 17 * 1024
"""A record that is not whole yet lies there, and no longer in the socket."""

Frame = tuple[Kind, int, memoryview]
OnFrames = Callable[[list[Frame]], None]
OnEnd = Callable[[str], None]
Data = Sequence[tuple[bytes, memoryview]]
"""Frames: the header of each, and its payload."""
Sent = asyncio.Future[None]


class Wire:
    """One connection, as the event loop sees it; all methods are called there.

    frames: hears what has come. ended: hears once, and last, why it is over; empty if we closed it.
    """

    def __init__(self, wires: "Wires", sock: ssl.SSLSocket, frames: OnFrames, ended: OnEnd) -> None:
        self._wires = wires
        self._sock = sock
        self._frames = frames
        self._ended = ended
        self._closing = False
        self.received_bytes = self.sent_bytes = 0
        """Counted by the thread as they move, and not only where a frame is whole."""
        # of the thread alone:
        self._urgent: deque[bytes] = deque()
        self._queued: deque[tuple[tuple[bytes | memoryview, ...], Sent | None]] = deque()
        self._begun: deque[memoryview] = deque()
        """What is left of the frame that is on its way."""
        self._begun_sent: Sent | None = None
        self._header = bytearray(HEADER.size)
        self._payload: memoryview | None = None
        self._kind, self._stream, self._filled = Kind.PING, 0, 0
        self._unread = 0
        self._over = False
        self._reads = self._interest = 0
        self._enough = 1
        self._patient_since, self._patient_from = time.monotonic(), 0

    def send(self, frame: bytes) -> None:
        """Send a frame ahead of all data that is not on its way yet: credit and pings must not wait for megabytes."""
        self._wires._do(lambda: self._queue(urgent=frame))

    def send_data(self, data: Data, sent: Sent) -> None:
        """Send frames of data; `sent` is done once the last byte has left, or the connection is over."""
        self._wires._do(lambda: self._queue(data, sent))

    def send_after_data(self, frame: bytes) -> None:
        """Send a frame after all data."""
        self._wires._do(lambda: self._queue([(frame, memoryview(b""))]))

    def taken(self, num_bytes: int) -> None:
        """So much of what has come was looked at: as much more may be read."""
        self._wires._do(lambda: self._took(num_bytes))

    @property
    def moved_bytes(self) -> int:
        """Both ways."""
        return self.received_bytes + self.sent_bytes

    def close(self) -> None:
        """End the connection after what was to be sent, or in CLOSE_S."""
        if not self._closing:
            self._closing = True
            self._wires._do(self._finish)
            asyncio.get_running_loop().call_later(CLOSE_S, self.abort)

    def abort(self) -> None:
        """End the connection now; its port is free at once."""
        self._closing = True
        self._wires._do(self._cut)

    # -- in the thread

    def _queue(self, data: Data = (), sent: Sent | None = None, *, urgent: bytes = b"") -> None:
        if self._over:
            self._wires._tell(_resolve, [sent])
            return
        if urgent:
            self._urgent.append(urgent)
        for frame in data:
            self._queued.append((frame, sent if frame is data[-1] else None))
        if len(self._urgent) + len(self._queued) > MAX_QUEUED:
            self._end("it does not take what it is sent")
        else:
            self._turn(read=False)

    def _took(self, num_bytes: int) -> None:
        held_up = self._unread >= UNREAD_BYTES
        self._unread -= num_bytes
        if held_up and not self._over:
            self._turn()

    def _finish(self) -> None:
        if not self._has_outgoing:
            self._end("")

    def _cut(self) -> None:
        if not self._over:
            # else what can't be delivered any more keeps the socket, and with it our port, for minutes
            with contextlib.suppress(OSError):
                leave_nothing_behind(self._sock)
            self._end("")

    def _turn(self, *, read: bool = True) -> None:
        """Write, and read, what can be."""
        try:
            writes = self._write()
            if read:
                self._reads = self._read()
        except (OSError, WireError) as error:
            self._end(str(error) or type(error).__name__)
            return
        except Exception as error:  # ours; the other connections go on
            log.exception("a direct connection failed")
            self._end(f"internal error: {error}")
            return
        if self._closing and not self._has_outgoing:
            self._end("")
            return
        wants = writes | self._reads
        if wants != self._interest:
            self._interest = wants
            self._wires._watch(self._sock, wants, self)

    def _write(self) -> int:
        """Returns what to wait for: EVENT_WRITE while something could not be sent."""
        done: list[Sent | None] = []
        try:
            while self._begun or self._begin():
                view = self._begun[0]
                # said again with the same bytes after a want: OpenSSL insists on it
                count = self._sock.send(view[:_AT_ONCE_BYTES])
                self.sent_bytes += count
                if count < len(view):
                    self._begun[0] = view[count:]
                    continue
                self._begun.popleft()
                if not self._begun and self._begun_sent is not None:
                    done.append(self._begun_sent)
                    self._begun_sent = None
        except ssl.SSLWantWriteError:
            return selectors.EVENT_WRITE
        except ssl.SSLWantReadError:
            return 0
        finally:
            if done:
                self._wires._tell(_resolve, done)
        return 0

    @property
    def _has_outgoing(self) -> bool:
        return bool(self._begun or self._urgent or self._queued)

    def _begin(self) -> bool:
        """Take the next frame in hand; whether there is one."""
        frame: tuple[bytes | memoryview, ...] = ()
        if self._urgent:
            frame = (self._urgent.popleft(),)
        elif self._queued:
            frame, self._begun_sent = self._queued.popleft()
        self._begun.extend(memoryview(part).cast("B") for part in frame if part)
        return bool(frame)

    def _read(self) -> int:
        """Returns what to wait for: EVENT_READ, as long as the loop keeps up."""
        frames: list[Frame] = []
        budget = TURN_BYTES
        try:
            while budget > 0 and self._unread < UNREAD_BYTES:
                budget -= self._read_some(frames)
        except ssl.SSLWantReadError:
            self._be_patient()
            return selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            return selectors.EVENT_READ | selectors.EVENT_WRITE
        finally:
            if frames:
                self._wires._tell(self._frames, frames)
        if self._unread < UNREAD_BYTES:
            self._wires._again(self)  # what OpenSSL has decrypted already, no selector tells of
            return selectors.EVENT_READ
        return 0

    def _read_some(self, frames: list[Frame]) -> int:
        """Read a header, or what there is of a payload; how many bytes. Raises OSError at the end of the stream."""
        count = self._fill(memoryview(self._header) if self._payload is None else self._payload)
        if self._payload is None:
            self._kind, self._stream, length = check_header(self._header)
            self._payload = self._wires._buffer(length)
            if length:
                return count
        frames.append((self._kind, self._stream, self._payload))
        self._unread += len(self._payload) + FRAME_COST_BYTES
        self._payload = None
        return count

    def _fill(self, target: memoryview) -> int:
        """Fill `target` from where it was left off; how many bytes, once it is full. Raises OSError, also to wait."""
        read: Any = self._sock.read
        size, before = len(target), self._filled
        try:
            while self._filled < size:  # OpenSSL gives a record at a time, 16 KiB: this loop is the hottest
                count = read(size - self._filled, target[self._filled :])
                if not count:
                    raise ConnectionResetError("the other side closed the connection")
                self._filled += count
        finally:
            self.received_bytes += self._filled - before
        self._filled = 0
        return size

    def _be_patient(self) -> None:
        """Be woken once much of the frame has come: waking for each packet costs more than decrypting it."""
        now, missing = time.monotonic(), len(self._payload) - self._filled if self._payload is not None else 0
        came, took_s = self.received_bytes - self._patient_from, now - self._patient_since
        self._patient_since, self._patient_from = now, self.received_bytes
        soon = int(came / took_s * _ENOUGH_S) if took_s > 0 else _ENOUGH_BYTES
        enough = max(1, min(missing - _IN_OPENSSL_BYTES, _ENOUGH_BYTES, soon))
        if enough != self._enough:
            self._enough = enough
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, enough)

    def _end(self, why: str) -> None:
        if self._over:
            return
        self._over = True
        self._wires._forget(self._sock)
        with contextlib.suppress(OSError):
            self._sock.close()
        waiting = [self._begun_sent, *(sent for _, sent in self._queued)]
        for queue in (self._begun, self._urgent, self._queued):
            queue.clear()
        self._wires._tell(_resolve, waiting)
        self._wires._tell(self._ended, why)


class Wires:
    """The thread: `with Wires() as wires`, inside a running event loop; at the end all connections are closed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._selector = selectors.DefaultSelector()
        self._commands: deque[Callable[[], None]] = deque()
        self._spare: deque[bytearray] = deque()
        self._eager: list[Wire] = []
        self._wires: dict[int, Wire] = {}
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="dugnad-wires", daemon=True)

    def __enter__(self) -> "Wires":
        self._selector.register(self._ear, selectors.EVENT_READ, None)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._stop)
        self._thread.join()
        self._selector.close()
        self._ear.close()
        self._bell.close()

    def add(self, sock: ssl.SSLSocket, frames: OnFrames, ended: OnEnd) -> Wire:
        """Serve a socket whose handshake is done; it is closed by us."""
        sock.setblocking(False)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        wire = Wire(self, sock, frames, ended)
        self._do(lambda: self._begin(wire))
        return wire

    def reuse(self, data: memoryview) -> None:
        """Nobody reads `data`, of a frame, any more."""
        buffer = data.obj
        if isinstance(buffer, bytearray) and len(buffer) == FRAME_BYTES and len(self._spare) < POOL:
            self._spare.append(buffer)

    def _buffer(self, num_bytes: int) -> memoryview:
        if num_bytes < FRAME_BYTES:
            return memoryview(bytearray(num_bytes))  # no larger than what was sent: that is what is counted
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = bytearray(FRAME_BYTES)
        return memoryview(buffer)

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if len(self._commands) == 1 and not self._stopped:  # else it rings already
            with contextlib.suppress(BlockingIOError):
                self._bell.send(b"\0")

    # -- in the thread

    def _serve(self) -> None:
        while not self._stopped:
            events = self._selector.select(0 if self._eager or self._commands else None)
            while self._commands:
                self._commands.popleft()()
            eager, self._eager = self._eager, []
            ready = {id(wire): wire for wire in eager}
            for key, _ in events:
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        self._ear.recv(4096)
                else:
                    ready[id(key.data)] = key.data
            for wire in ready.values():
                if not wire._over:
                    wire._turn()

    def _begin(self, wire: Wire) -> None:
        self._wires[wire._sock.fileno()] = wire
        wire._turn()

    def _stop(self) -> None:
        for wire in list(self._wires.values()):
            wire._end("")
        self._stopped = True

    def _again(self, wire: Wire) -> None:
        self._eager.append(wire)

    def _watch(self, sock: ssl.SSLSocket, interest: int, wire: Wire) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(sock)
        if interest:
            self._selector.register(sock, interest, wire)

    def _forget(self, sock: ssl.SSLSocket) -> None:
        self._wires.pop(sock.fileno(), None)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def _tell(self, listener: Callable[[Any], None], what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(listener, what)


def leave_nothing_behind(sock: socket.socket) -> None:
    """Have `sock` end at once when it is closed: what was not delivered then is lost, and its port is free."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _resolve(futures: list[Sent | None]) -> None:
    for future in futures:
        if future is not None and not future.done():
            future.set_result(None)
