"""Many streams on one connection: frames, credit, and what is wrong with what the other side sends. Pure.

    frame   u8 kind, u32 stream, u32 length, payload                                              big-endian
    OPEN    payload: the channel           begins a stream; the dialler's are odd, the other side's even
    DATA    1 to FRAME_BYTES bytes         spends the sender's credit
    CREDIT  payload: u32 bytes             the receiver has taken so many: as many more may come
    CLOSE                                  no more will come of this side, and nothing more is read here
    PING    payload: 8 bytes               answered by PONG with the same
    PONG
    SEEN    payload: "HOST:PORT"           the address under which the sender sees the receiver

Credit bounds what lies here unread of a stream: WINDOW_BYTES, of MAX_STREAMS streams that the other side opened. A
stream that one side has closed may still get frames that were under way: they are dropped.
"""

import struct
from dataclasses import dataclass, field
from enum import IntEnum

from dugnad.dht.endpoint import Endpoint
from dugnad.dht.wire import WireError

HEADER = struct.Struct(">BII")
FRAME_BYTES = 1024 * 1024
WINDOW_BYTES = 4 * 2**20
"""320 Mbit/s at a round trip of 100 ms."""
MAX_STREAMS = 32
"""That each side may have opened at a time."""
CHANNEL_BYTES = 64
_TOKEN_BYTES = 8
_CREDIT = struct.Struct(">I")


class Kind(IntEnum):
    """Of a frame."""

    OPEN = 1
    DATA = 2
    CREDIT = 3
    CLOSE = 4
    PING = 5
    PONG = 6
    SEEN = 7


_LONGEST = {
    Kind.OPEN: CHANNEL_BYTES,
    Kind.DATA: FRAME_BYTES,
    Kind.CREDIT: _CREDIT.size,
    Kind.CLOSE: 0,
    Kind.PING: _TOKEN_BYTES,
    Kind.PONG: _TOKEN_BYTES,
    Kind.SEEN: 64,
}


@dataclass(frozen=True, slots=True)
class Opened:
    """The other side opened a stream."""

    stream: int
    channel: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """Bytes of a stream; `consumed` is to be called once they are taken."""

    stream: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class MayWrite:
    """A stream that was out of credit has some again."""

    stream: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The other side closed a stream: what has arrived may still be read."""

    stream: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A frame that is to be sent back."""

    frame: bytes


@dataclass(frozen=True, slots=True)
class Ponged:
    """An answer to our ping of that token."""

    token: bytes


@dataclass(frozen=True, slots=True)
class SeenAs:
    """The other side sees us under this address."""

    address: str


Event = Opened | Arrived | MayWrite | Closed | Reply | Ponged | SeenAs


def check_header(raw: bytes | bytearray) -> tuple[Kind, int, int]:
    """(kind, stream, length) of a frame. Raises WireError before anything is allocated for it."""
    number, stream, length = HEADER.unpack(raw)
    try:
        kind = Kind(number)
    except ValueError:
        raise WireError("malformed", f"a frame of kind {number}") from None
    if length > _LONGEST[kind]:
        raise WireError("too large", f"a {kind.name} frame of {length} bytes, at most {_LONGEST[kind]}")
    return kind, stream, length


def frame(kind: Kind, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return HEADER.pack(kind, stream, len(payload)) + payload


def seen(address: str) -> bytes:
    """What tells the other side how we see it."""
    return frame(Kind.SEEN, 0, address.encode("ascii"))


def ping(token: bytes) -> bytes:
    """A question that is answered at once; token: 8 bytes."""
    return frame(Kind.PING, 0, token)


@dataclass(slots=True)
class _Side:
    """One stream: what we may still send, what may still come, and what was taken and not yet given back."""

    credit_bytes: int = WINDOW_BYTES
    expected_bytes: int = WINDOW_BYTES
    taken_bytes: int = 0


@dataclass(slots=True)
class Mux:
    """The streams of one side of a connection; `dialler`: which numbers are ours."""

    dialler: bool
    _streams: dict[int, _Side] = field(default_factory=dict)
    _next: int = 0
    _newest_of_theirs: int = -1

    def __post_init__(self) -> None:
        self._next = 1 if self.dialler else 2

    @property
    def num_ours(self) -> int:
        """How many of the open streams we opened."""
        return sum(self._is_ours(stream) for stream in self._streams)

    def open(self, channel: str) -> tuple[int, bytes]:
        """A new stream, and the frame that opens it. There must be fewer than MAX_STREAMS of ours."""
        assert self.num_ours < MAX_STREAMS, "too many streams"
        stream, self._next = self._next, self._next + 2
        self._streams[stream] = _Side()
        return stream, frame(Kind.OPEN, stream, channel.encode("ascii"))

    def credit(self, stream: int) -> int:
        """How many bytes may be sent on a stream now; 0 also for one that is closed."""
        side = self._streams.get(stream)
        return side.credit_bytes if side is not None else 0

    def data(self, stream: int, num_bytes: int) -> bytes:
        """The header of a DATA frame, whose payload follows it; spends credit, which must be there."""
        side = self._streams[stream]
        assert 0 < num_bytes <= min(side.credit_bytes, FRAME_BYTES), f"{num_bytes} bytes are too many"
        side.credit_bytes -= num_bytes
        return HEADER.pack(Kind.DATA, stream, num_bytes)

    def consumed(self, stream: int, num_bytes: int) -> bytes:
        """Bytes that arrived were taken; the frame that says so, once it is worth one, else nothing."""
        side = self._streams.get(stream)
        if side is None:
            return b""
        side.taken_bytes += num_bytes
        if side.taken_bytes < WINDOW_BYTES // 4:
            return b""
        granted, side.taken_bytes = side.taken_bytes, 0
        side.expected_bytes += granted
        return frame(Kind.CREDIT, stream, _CREDIT.pack(granted))

    def close(self, stream: int) -> bytes:
        """Forget a stream; the frame that tells the other side, nothing if that closed it before."""
        return frame(Kind.CLOSE, stream) if self._streams.pop(stream, None) is not None else b""

    def receive(self, kind: Kind, stream: int, payload: memoryview) -> list[Event]:
        """What a frame means. Raises WireError for what no honest peer sends: the connection is no good then."""
        match kind:
            case Kind.OPEN:
                return self._opened(stream, bytes(payload))
            case Kind.DATA:
                return self._arrived(stream, payload)
            case Kind.CREDIT:
                return self._credited(stream, bytes(payload))
            case Kind.CLOSE:
                return [Closed(stream)] if self._streams.pop(stream, None) is not None else []
            case Kind.PING:
                return [Reply(frame(Kind.PONG, 0, bytes(payload)))]
            case Kind.PONG:
                return [Ponged(bytes(payload))]
            case Kind.SEEN:
                return [SeenAs(_place(payload))]
        raise AssertionError(kind)

    def _opened(self, stream: int, payload: bytes) -> list[Event]:
        if stream == 0 or self._is_ours(stream) or stream <= self._newest_of_theirs:
            raise WireError("malformed", f"stream {stream} can't be opened by the other side")
        if len(self._streams) - self.num_ours >= MAX_STREAMS:
            raise WireError("too many", f"{MAX_STREAMS} streams are open already")
        self._newest_of_theirs = stream
        self._streams[stream] = _Side()
        return [Opened(stream, _text(memoryview(payload)))]

    def _arrived(self, stream: int, payload: memoryview) -> list[Event]:
        side = self._streams.get(stream)
        if side is None:
            return []  # it was under way when we closed
        if not payload:
            raise WireError("malformed", "a DATA frame without data")
        if len(payload) > side.expected_bytes:
            raise WireError("too many", f"{len(payload)} bytes on stream {stream}, {side.expected_bytes} were granted")
        side.expected_bytes -= len(payload)
        return [Arrived(stream, payload)]

    def _credited(self, stream: int, payload: bytes) -> list[Event]:
        side = self._streams.get(stream)
        if side is None:
            return []
        granted = _CREDIT.unpack(payload)[0] if len(payload) == _CREDIT.size else 0
        if not 0 < granted <= WINDOW_BYTES - side.credit_bytes:
            raise WireError("malformed", f"credit of {granted} bytes with {side.credit_bytes} left")
        side.credit_bytes += granted
        return [MayWrite(stream)]

    def _is_ours(self, stream: int) -> bool:
        return bool(stream % 2) == self.dialler


def _place(payload: memoryview) -> str:
    text = _text(payload)
    try:
        Endpoint.parse(text)
    except ValueError as error:
        raise WireError("malformed", f"a place that is none: {error}") from error
    return text


def _text(payload: memoryview) -> str:
    try:
        text = bytes(payload).decode("ascii")
    except UnicodeDecodeError as error:
        raise WireError("malformed", f"a word that is none: {error}") from error
    if not text.isprintable():
        raise WireError("malformed", "a word that is not printable")
    return text
