"""Many bytes over raw streams: pushed to a peer, or fetched from peers by their hash.

push    sender    u32 header bytes | u8 kind bytes | kind | header | u32 buffers | u64 bytes of each | the bytes
        receiver  any number of BEAT | OK or REFUSED, u32 bytes, reply or reason
fetch   asker     u8 kind bytes | kind | digest
        donor     FOUND, u64 bytes, the bytes | GONE

The kind is what both ends count the bytes as. Numbers are big-endian. A push is sent without waiting to be accepted;
a receiver may refuse at any moment, and then the sender stops. Nothing limits how long a transfer takes, only how
long it may stand still: bytes that we wrote may wait in buffers on the way, so a receiver beats while it is at work.
"""

import asyncio
import contextlib
import re
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence

from blake3 import blake3

from dugnad.dht.chunks import Cancel, Effect, Failure, Fetcher, Request, Stuck
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Stream, Transport, TransportError, Unreachable

BLOB_CHANNEL = "dugnad/blob/1"
REPLY_BYTES = 64 * 1024
"""The longest reply to a push."""
MAX_BUFFERS = 16 * 1024
"""How many buffers one push may have."""
STREAMS_PER_PEER = 8
"""How many transfers of one channel a peer may have under way with us."""
READ_BYTES = 16 * 1024
"""Read at once: a peer that sends less than this in a timeout counts as silent."""
WRITE_BYTES = 256 * 1024

Accept = Callable[[PeerId, bytes, tuple[int, ...]], str | None]
"""Called with (sender, header, bytes of each buffer) before anything is allocated; a reason refuses the push."""
Done = Callable[[PeerId, bytes, list[bytearray]], Awaitable[bytes]]
"""Called with (sender, header, buffers); returns the reply, or raises Refused."""
Lookup = Callable[[bytes], bytes | memoryview | None]
"""The blob of a digest, if we have it."""
OnBlob = Callable[[bytes, bytes], None]
"""Called with (digest, blob)."""

_OK, _REFUSED, _BEAT = b"\0", b"\1", b"\2"
_FOUND, _GONE = b"\0", b"\1"
_KIND = re.compile(rb"[a-z][a-z0-9-]{0,15}")
_DIGEST_BYTES = 32
_BEATS_PER_TIMEOUT = 5
_Heard = Callable[[], None]


class Refused(TransportError):
    """A push is not wanted; says why."""

    def __init__(self, peer: PeerId, reason: str) -> None:
        super().__init__(f"{peer}: refused: {reason}")
        self.peer = peer
        self.reason = reason


class Malformed(TransportError):
    """A peer sent bytes that make no sense here."""

    def __init__(self, peer: PeerId, what: str) -> None:
        super().__init__(f"{peer}: malformed: {what}")
        self.peer = peer


class WrongHash(TransportError):
    """A donor gave other bytes than those that were asked for."""

    def __init__(self, peer: PeerId, digest: bytes) -> None:
        super().__init__(f"{peer} gave something else for blob {digest.hex()[:16]}")
        self.peer = peer
        self.digest = digest


class Gone(TransportError):
    """A donor does not have a blob."""

    def __init__(self, peer: PeerId, digest: bytes) -> None:
        super().__init__(f"{peer} does not have blob {digest.hex()[:16]}")
        self.peer = peer
        self.digest = digest


class Unavailable(TransportError):
    """Blobs that no donor could give; says how many, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# -- push


async def push(
    transport: Transport,
    peer: PeerId,
    channel: str,
    header: bytes,
    buffers: Sequence[bytes | bytearray | memoryview],
    *,
    kind: str,
    timeout_s: float,
) -> bytes:
    """Send `buffers` to `peer`, and return its reply. Counted as `kind`: up to 16 of a-z, 0-9 and "-".

    Raises Refused, or another TransportError if nothing moves for `timeout_s`.
    """
    views = [_bytes_of(buffer) for buffer in buffers]
    head = _push_head(kind, header, [len(view) for view in views])
    stream = await transport.open(peer, channel, kind=kind)
    try:
        async with _patience(peer, timeout_s) as heard, _beside(_send(stream, [head, *views], heard)) as sending:
            status, reply = await _read_reply(peer, stream, heard)
            if status == _REFUSED:
                raise Refused(peer, _readable(reply))
            broke = await sending
            if broke is not None:
                raise broke
    finally:
        await stream.close()
    return reply


async def serve_push(
    transport: Transport,
    channel: str,
    accept: Accept,
    done: Done,
    *,
    header_cap: int,
    total_cap: int,
    timeout_s: float = 10.0,
) -> None:
    """Take pushes on `channel`: headers of at most `header_cap` bytes, payloads of at most `total_cap`.

    A sender from whom nothing comes for `timeout_s` is given up.
    """
    seats = _Seats()

    async def serve(sender: PeerId, stream: Stream) -> None:
        try:
            with seats.of(sender):
                async with _patience(sender, timeout_s) as heard:
                    header, sizes = await _read_push_head(sender, stream, header_cap, total_cap)
                    heard()
                if (reason := accept(sender, header, sizes)) is not None:
                    raise Refused(sender, reason)
                async with _beside(_beat(stream, timeout_s / _BEATS_PER_TIMEOUT)):
                    buffers = await _read_buffers(sender, stream, sizes, timeout_s)
                    reply = await done(sender, header, buffers)
            await _write_reply(sender, stream, _OK, reply, timeout_s)
        except Refused as refused:
            await _write_reply(sender, stream, _REFUSED, refused.reason.encode()[:REPLY_BYTES], timeout_s)
            await _drain(stream, timeout_s)

    await transport.serve_stream(channel, serve)


def _push_head(kind: str, header: bytes, sizes: Sequence[int]) -> bytes:
    assert len(sizes) <= MAX_BUFFERS, f"a push of {len(sizes)} buffers, at most {MAX_BUFFERS}"
    return b"".join(
        (struct.pack(">I", len(header)), _kind_field(kind), header, struct.pack(f">I{len(sizes)}Q", len(sizes), *sizes))
    )


async def _read_push_head(
    sender: PeerId, stream: Stream, header_cap: int, total_cap: int
) -> tuple[bytes, tuple[int, ...]]:
    """(header, sizes); sets the stream's kind. Raises Refused for anything odd or above a cap, unread."""
    (header_bytes,) = struct.unpack(">I", await stream.read_exactly(4))
    if header_bytes > header_cap:
        raise Refused(sender, f"a header of {header_bytes} bytes, at most {header_cap} are taken")
    stream.kind = await _read_kind(sender, stream)
    header = await stream.read_exactly(header_bytes)
    (count,) = struct.unpack(">I", await stream.read_exactly(4))
    if count > MAX_BUFFERS:
        raise Refused(sender, f"{count} buffers, at most {MAX_BUFFERS} are taken")
    sizes = struct.unpack(f">{count}Q", await stream.read_exactly(8 * count))
    if sum(sizes) > total_cap:
        raise Refused(sender, f"{sum(sizes)} bytes, at most {total_cap} are taken")
    return header, sizes


async def _read_buffers(
    sender: PeerId, stream: Stream, sizes: tuple[int, ...], timeout_s: float
) -> list[bytearray]:
    buffers = []
    async with _patience(sender, timeout_s) as heard:
        for size in sizes:
            buffers.append(bytearray(size))  # one by one: a sender costs us little more memory than it has sent
            view = memoryview(buffers[-1])
            for start in range(0, size, READ_BYTES):
                await stream.read_into(view[start : start + READ_BYTES])
                heard()
    return buffers


async def _send(stream: Stream, views: Sequence[bytes | memoryview], heard: _Heard) -> TransportError | None:
    """Write everything; returns what broke, as the peer may have said before why it closed."""
    try:
        for view in views:
            for start in range(0, len(view), WRITE_BYTES):
                await stream.write(view[start : start + WRITE_BYTES])
                heard()
    except TransportError as error:
        return error
    return None


async def _read_reply(peer: PeerId, stream: Stream, heard: _Heard) -> tuple[bytes, bytes]:
    while (status := await stream.read_exactly(1)) == _BEAT:
        heard()
    if status not in (_OK, _REFUSED):
        raise Malformed(peer, f"a reply of status {status[0]}")
    (num_bytes,) = struct.unpack(">I", await stream.read_exactly(4))
    if num_bytes > REPLY_BYTES:
        raise Malformed(peer, f"a reply of {num_bytes} bytes, at most {REPLY_BYTES}")
    return status, await stream.read_exactly(num_bytes)


async def _write_reply(peer: PeerId, stream: Stream, status: bytes, reply: bytes, timeout_s: float) -> None:
    assert len(reply) <= REPLY_BYTES, f"a reply of {len(reply)} bytes, at most {REPLY_BYTES}"
    async with _patience(peer, timeout_s):
        await stream.write(status + struct.pack(">I", len(reply)) + reply)


async def _beat(stream: Stream, every_s: float) -> None:
    """Say that we are at work, until cancelled or nobody listens."""
    with contextlib.suppress(TransportError):
        while True:
            await asyncio.sleep(every_s)
            await stream.write(_BEAT)


async def _drain(stream: Stream, within_s: float) -> None:
    """Read what is under way still: closing on unread bytes resets the stream, and may lose our refusal."""
    with contextlib.suppress(TransportError, TimeoutError):
        async with asyncio.timeout(within_s):
            while True:
                await stream.read_exactly(READ_BYTES)


# -- fetch


async def fetch(
    transport: Transport, peer: PeerId, digest: bytes, size: int, *, kind: str, timeout_s: float
) -> bytes:
    """The blob of `digest` (32 bytes), which has `size` bytes, from `peer`; its hash is checked.

    Raises WrongHash, Gone, or another TransportError if nothing comes for `timeout_s`.
    """
    stream = await transport.open(peer, BLOB_CHANNEL, kind=kind)
    try:
        async with _patience(peer, timeout_s) as heard:
            await stream.write(_kind_field(kind) + digest)
            status = await stream.read_exactly(1)
            if status == _GONE:
                raise Gone(peer, digest)
            if status != _FOUND:
                raise Malformed(peer, f"an answer of status {status[0]}")
            if struct.unpack(">Q", await stream.read_exactly(8)) != (size,):
                raise WrongHash(peer, digest)
            data = await _read_checked(stream, size, digest, heard)
    finally:
        await stream.close()
    if data is None:
        raise WrongHash(peer, digest)
    return data


async def serve_blobs(transport: Transport, lookup: Lookup, *, timeout_s: float = 30.0) -> None:
    """Give blobs to whoever asks. An asker who takes nothing for `timeout_s` is given up."""
    seats = _Seats()

    async def serve(asker: PeerId, stream: Stream) -> None:
        with contextlib.suppress(Refused), seats.of(asker):  # closing the stream is answer enough
            async with _patience(asker, timeout_s) as heard:
                stream.kind = await _read_kind(asker, stream)
                blob = lookup(await stream.read_exactly(_DIGEST_BYTES))
                if blob is None:
                    await stream.write(_GONE)
                    return
                view = _bytes_of(blob)
                broke = await _send(stream, [_FOUND + struct.pack(">Q", len(view)), view], heard)
                if broke is not None:
                    raise broke

    await transport.serve_stream(BLOB_CHANNEL, serve)


async def fetch_all(
    transport: Transport,
    donors: Sequence[PeerId],
    wanted: Mapping[bytes, int],
    *,
    kind: str,
    timeout_s: float,
    on_blob: OnBlob,
) -> None:
    """Get all blobs `wanted`, {digest: bytes}, from any of `donors`; each goes to `on_blob` once, checked.

    Raises Unavailable when all that can be had is here and something is missing still. What `on_blob` raises ends
    the transfers and passes through.
    """
    fetcher, tasks, reasons = Fetcher(wanted), dict[tuple[PeerId, bytes], asyncio.Task[None]](), ["no donor"]

    async def get(request: Request) -> None:
        donor, digest = request.donor, request.digest
        try:
            data = await fetch(transport, donor, digest, request.size, kind=kind, timeout_s=timeout_s)
        except TransportError as error:
            perform(fetcher.failed(digest, donor, _failure(error)))
        else:
            on_blob(digest, data)
            perform(fetcher.arrived(digest, donor))

    def perform(effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Request(donor, digest):
                    tasks[donor, digest] = group.create_task(get(effect))
                case Cancel(donor, digest):
                    tasks[donor, digest].cancel()
                case Stuck(reason):
                    reasons.append(reason)

    try:
        async with asyncio.TaskGroup() as group:
            for donor in donors:
                perform(fetcher.add_donor(donor))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None  # what on_blob raised: the caller knows of no group
    if not fetcher.done:
        raise Unavailable(reasons[-1])


def _failure(error: TransportError) -> Failure:
    match error:
        case WrongHash():
            return Failure.WRONG_HASH
        case Gone():
            return Failure.GONE
        case _:
            return Failure.BROKEN


async def _read_checked(stream: Stream, size: int, digest: bytes, heard: _Heard) -> bytes | None:
    """The next `size` bytes, or None if they don't have that hash. Hashed as they come: the loop is never held up."""
    pieces, hasher = [], blake3()
    for start in range(0, size, READ_BYTES):
        pieces.append(await stream.read_exactly(min(READ_BYTES, size - start)))
        hasher.update(pieces[-1])
        heard()
    return b"".join(pieces) if hasher.digest() == digest else None


# -- both


@contextlib.asynccontextmanager
async def _patience(peer: PeerId, timeout_s: float) -> AsyncIterator[_Heard]:
    """Ends the block with Unreachable when what it gives hasn't been called for `timeout_s`."""
    now = asyncio.get_running_loop().time

    def heard() -> None:
        if not limit.expired():
            limit.reschedule(now() + timeout_s)

    try:
        async with asyncio.timeout(timeout_s) as limit:
            yield heard
    except TimeoutError:
        raise Unreachable(peer, f"silent for {timeout_s:g} s") from None


@contextlib.asynccontextmanager
async def _beside[T](work: Coroutine[None, None, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Run `work` beside the block, and end it with it; unlike a TaskGroup, it leaves the block's errors bare."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
