"""Bulk bytes over raw streams: pushed to a peer that expects them, or fetched by their hash from whoever has them.

    push    u8 kind length, kind, u32 header length, header, u32 count, u64 sizes       ->
            u8 verdict, u32 length, words                                               <-   1 refuses, and that is all
            the payloads, one after the other                                           ->
            u8 verdict, u32 length, reply                                               <-
    fetch   u8 kind length, kind, digest (32), u64 size                                 ->
            u8 2 wait, again and again while others are served                          <-
            u8 0 gone / 1 here, then the bytes                                          <-

Every length is checked before anything is allocated for it, and every wait is for progress: a peer that sends nothing
for a while is given up, one that is slow is not. All that is given to those who fetch stays within a budget.
"""

import asyncio
import contextlib
import itertools
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from blake3 import blake3

from dugnad.dht.budget import PIECE_BYTES, Budget
from dugnad.dht.chunks import Cancel, Failure, Fetcher, Request, Stuck
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Stream, Transport, TransportError, printable

T = TypeVar("T")

BLOB_CHANNEL = "dugnad/blob/1"
SLOWEST_BYTES_PER_S = 64 * 1024
"""How fast what lies in buffers on the way is assumed to drain, at least."""
LARGE_PIECE_BYTES = 2**20
"""What is moved at once where the piece before moved in no time; PIECE_BYTES where it did not."""
AT_ONCE_S = 0.5
_LOOKS = 10
"""How often it is looked, within the silence limit, whether a piece gets on."""
MAX_BUFFERS = 8192
KIND_CHARACTERS = 16
SILENCE_S = 5.0
"""How long who accepts a stream waits for the next bytes."""
SAID_EVERY_S = 2.0
"""How often who waits in line is told so."""
IN_LINE_S = 300.0
"""How long who fetches stays in a line."""
_WORDS_BYTES = 64 * 1024
_REFUSED, _FINE = 1, 0
_GONE, _HERE, _WAIT = b"\0", b"\1", b"\2"

Accept = Callable[[PeerId, bytes, tuple[int, ...]], str | None]
"""(sender, header, sizes): why the payloads are not wanted, or None."""
Take = Callable[[PeerId, bytes, list[memoryview]], Awaitable[bytes]]
"""(sender, header, payloads): the reply; raises PushRefused."""
OnBlob = Callable[[bytes, memoryview], None]
"""(digest, bytes) of a blob that has come and is what its digest says; called in a thread, one at a time."""
OnGiven = Callable[[PeerId, int], None]
"""(donor, bytes) of a blob that has come and is right."""
Lookup = Callable[[bytes], bytes | memoryview | None]
"""The bytes under a digest, where they are here; called in a thread."""


class PushRefused(TransportError):
    """The other side does not take these bytes, for a reason in words."""

    def __init__(self, peer: PeerId, reason: str) -> None:
        self.peer, self.reason = peer, printable(reason)
        super().__init__(f"{peer} refused: {self.reason}")


class Stalled(TransportError):
    """The other side sent or took nothing for too long."""


class Nonsense(TransportError):
    """The other side does not keep to the framing."""


class WrongHash(TransportError):
    """A donor gave other bytes than those that were asked for."""


class Gone(TransportError):
    """A donor does not have the blob (any more)."""


class Unavailable(TransportError):
    """No donor is left that could give what is missing."""


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
    """Send `buffers` to `peer`, and return its reply; nothing but the header travels if it refuses.

    kind: what the bytes are counted as. timeout_s: how long nothing may move. Raises PushRefused, Stalled, Unreachable.
    """
    stream = await transport.open(peer, channel, kind=kind)
    try:
        sizes = [len(memoryview(buffer).cast("B")) for buffer in buffers]
        opening = _kind_bytes(kind) + _length(header) + header + struct.pack(f">I{len(sizes)}Q", len(sizes), *sizes)
        await _moving(stream.write(opening), peer, timeout_s)
        await _verdict(stream, peer, timeout_s)
        for buffer in buffers:
            await _write_pieces(stream, peer, memoryview(buffer).cast("B"), timeout_s)
        return await _verdict(stream, peer, timeout_s + sum(sizes) / SLOWEST_BYTES_PER_S)
    finally:
        await stream.close()


async def serve_push(
    transport: Transport, channel: str, accept: Accept, take: Take, *, header_cap: int, total_cap: int
) -> None:
    """Take pushes on `channel`, one at a time from each sender.

    `accept` is asked before anything is allocated, `take` gets the payloads. header_cap, total_cap: in bytes.
    """
    busy: set[PeerId] = set()

    async def serve(sender: PeerId, stream: Stream) -> None:
        if sender in busy:  # else one sender could have us hold any number of vectors
            await _moving(stream.write(_said(_REFUSED, b"one push at a time")), sender, SILENCE_S)
            return
        busy.add(sender)
        try:
            await _moving(stream.write(await receive(sender, stream)), sender, SILENCE_S)
        finally:
            busy.discard(sender)

    async def receive(sender: PeerId, stream: Stream) -> bytes:
        try:
            header, sizes = await _read_opening(stream, sender, header_cap, total_cap)
            why = accept(sender, header, sizes)
            if why is not None:
                raise PushRefused(sender, why)
            await _moving(stream.write(_said(_FINE, b"")), sender, SILENCE_S)
            buffers = [await _read_pieces(stream, sender, size, SILENCE_S) for size in sizes]
            return _said(_FINE, await take(sender, header, buffers))
        except PushRefused as error:
            return _said(_REFUSED, error.reason.encode()[:_WORDS_BYTES])

    await transport.serve_stream(channel, serve)


async def fetch(
    transport: Transport, peer: PeerId, digest: bytes, size: int, *, kind: str, timeout_s: float
) -> memoryview:
    """The blob `digest`, `size` bytes, from `peer`. Raises Gone, WrongHash, Stalled, Unreachable."""
    stream = await transport.open(peer, BLOB_CHANNEL, kind=kind)
    try:
        await _moving(stream.write(_kind_bytes(kind) + digest + struct.pack(">Q", size)), peer, timeout_s)
        if await _answer(stream, peer, timeout_s) != _HERE:
            raise Gone(f"{peer} does not have blob {digest.hex()[:12]}")
        data = await _read_pieces(stream, peer, size, timeout_s)
    finally:
        await stream.close()
    if await asyncio.to_thread(lambda: blake3(data).digest()) != digest:
        raise WrongHash(f"{peer} gave other bytes than those of {digest.hex()[:12]}")
    return data


async def serve_blobs(transport: Transport, lookup: Lookup, *, budget: Budget) -> None:
    """Give blobs to whoever asks for them by hash and size, within `budget`."""
    turns = _Turns(budget)

    async def serve(sender: PeerId, stream: Stream) -> None:
        stream.kind = await _read_kind(stream, sender)
        asked = await _moving(stream.read_exactly(40), sender, SILENCE_S)
        (size,) = struct.unpack(">Q", asked[32:])
        async with turns.turn(stream, sender):  # before the blob is read: a long line must not fill the memory
            blob = await asyncio.to_thread(lookup, asked[:32])
            if blob is None or len(memoryview(blob).cast("B")) != size:
                await turns.write(stream, sender, memoryview(_GONE))
                return
            await turns.write(stream, sender, memoryview(_HERE))
            await turns.write(stream, sender, memoryview(blob).cast("B"))
            await stream.wait_taken(timeout_s=SILENCE_S + size / SLOWEST_BYTES_PER_S)

    await transport.serve_stream(BLOB_CHANNEL, serve)


class _Turns:
    """Does what a `Budget` says: a stream waits for its turn, and each piece until it may be given."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._tickets = itertools.count()
        self._called: dict[int, asyncio.Event] = {}

    @contextlib.asynccontextmanager
    async def turn(self, stream: Stream, asker: PeerId) -> AsyncIterator[None]:
        """Wait in line, and have the asker know that it does."""
        ticket, called = next(self._tickets), asyncio.Event()
        self._called[ticket] = called
        try:
            self._call(self._budget.enter(ticket, asker))
            while not await _happens(called, within_s=SAID_EVERY_S):
                await self.write(stream, asker, memoryview(_WAIT))
            yield
        finally:
            del self._called[ticket]
            self._call(self._budget.leave(ticket))

    def _call(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            self._called[ticket].set()

    async def write(self, stream: Stream, asker: PeerId, data: memoryview) -> None:
        """Give `data`, as fast as the budget allows."""
        now = asyncio.get_running_loop().time
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            since = now()
            wait_s = self._budget.spend(len(piece), now=since) - since
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            await _moving(stream.write(piece), asker, SILENCE_S)


async def fetch_all(
    transport: Transport,
    donors: Sequence[PeerId],
    wanted: Mapping[bytes, int],
    *,
    kind: str,
    timeout_s: float,
    on_blob: OnBlob,
    on_given: OnGiven = lambda donor, num_bytes: None,
) -> None:
    """Get every blob of `wanted`, {digest: bytes}, from any of `donors`; each is handed to `on_blob` once.

    At most two for each donor are in memory. Raises Unavailable if one can't be had, and what `on_blob` raises in an
    ExceptionGroup.
    """
    machine = Fetcher(wanted)
    ended: asyncio.Queue[tuple[Request, memoryview | Failure]] = asyncio.Queue()
    running: dict[tuple[PeerId, bytes], asyncio.Task[None]] = {}
    stuck: str | None = None if donors else "there is nobody to ask"

    async def run(request: Request) -> None:
        got = await _try_fetch(transport, request, kind=kind, timeout_s=timeout_s)
        ended.put_nowait((request, got))

    async with asyncio.TaskGroup() as tasks:
        pending = machine.add_donors(*donors)
        while not machine.done and stuck is None:
            for effect in pending:
                match effect:
                    case Request(donor, digest):
                        running[donor, digest] = tasks.create_task(run(effect))
                    case Cancel(donor, digest):
                        running.pop((donor, digest)).cancel()
                    case Stuck(reason):
                        stuck = reason
            if stuck is not None or machine.done:
                break
            request, got = await ended.get()
            if running.pop((request.donor, request.digest), None) is None:
                pending = []  # it was cancelled while its result waited here
                continue
            if isinstance(got, Failure):
                pending = machine.failed(request.digest, request.donor, got)
                continue
            await asyncio.to_thread(on_blob, request.digest, got)
            on_given(request.donor, request.size)
            pending = machine.arrived(request.digest, request.donor)
        for task in running.values():
            task.cancel()
    if not machine.done:
        raise Unavailable(f"{len(machine.missing)} of {len(wanted)} blobs can't be had: {stuck}")


async def _try_fetch(transport: Transport, request: Request, *, kind: str, timeout_s: float) -> memoryview | Failure:
    try:
        return await fetch(transport, request.donor, request.digest, request.size, kind=kind, timeout_s=timeout_s)
    except WrongHash:
        return Failure.WRONG_HASH
    except Gone:
        return Failure.GONE
    except TransportError:
        return Failure.BROKEN


# -- framing


def _length(data: bytes) -> bytes:
    return struct.pack(">I", len(data))


def _kind_bytes(kind: str) -> bytes:
    encoded = kind.encode("ascii")
    assert 0 < len(encoded) <= KIND_CHARACTERS, f"{kind!r} is no kind of bytes"
    return bytes([len(encoded)]) + encoded


def _said(verdict: int, words: bytes) -> bytes:
    assert len(words) <= _WORDS_BYTES, f"an answer of {len(words)} bytes, at most {_WORDS_BYTES}"
    return bytes([verdict]) + _length(words) + words


async def _moving(work: Awaitable[T], peer: PeerId, timeout_s: float) -> T:
    """The result of one small piece of work on a stream. Raises Stalled if it takes too long."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise Stalled(f"{peer}: no byte moved for {timeout_s:g} s") from None


async def _happens(event: asyncio.Event, *, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            return await event.wait()
    except TimeoutError:
        return False


async def _answer(stream: Stream, peer: PeerId, timeout_s: float) -> bytes:
    """What `peer` says to a fetch, once it is our turn. Raises Stalled if it is silent, or lets us wait too long."""
    try:
        async with asyncio.timeout(IN_LINE_S):
            while (said := await _moving(stream.read_exactly(1), peer, timeout_s)) == _WAIT:
                pass
    except TimeoutError:
        raise Stalled(f"{peer}: not our turn in {IN_LINE_S:g} s") from None
    return said


async def _read_kind(stream: Stream, peer: PeerId) -> str:
    (length,) = await _moving(stream.read_exactly(1), peer, SILENCE_S)
    if not 0 < length <= KIND_CHARACTERS:
        raise Nonsense(f"{peer}: a kind of {length} characters")
    try:
        return (await _moving(stream.read_exactly(length), peer, SILENCE_S)).decode("ascii")
    except UnicodeDecodeError as error:
        raise Nonsense(f"{peer}: a kind that is no word") from error


async def _read_opening(stream: Stream, peer: PeerId, header_cap: int, total_cap: int) -> tuple[bytes, tuple[int, ...]]:
    """(header, sizes) of a push. Raises PushRefused for more than is allowed, Nonsense for bad framing."""
    stream.kind = await _read_kind(stream, peer)
    (length,) = struct.unpack(">I", await _moving(stream.read_exactly(4), peer, SILENCE_S))
    if length > header_cap:
        raise PushRefused(peer, f"a header of {length} bytes; at most {header_cap} are allowed")
    header = await _moving(stream.read_exactly(length), peer, SILENCE_S)
    (count,) = struct.unpack(">I", await _moving(stream.read_exactly(4), peer, SILENCE_S))
    if count > MAX_BUFFERS:
        raise PushRefused(peer, f"{count} payloads; at most {MAX_BUFFERS} are allowed")
    sizes = struct.unpack(f">{count}Q", await _moving(stream.read_exactly(8 * count), peer, SILENCE_S))
    if sum(sizes) > total_cap:
        raise PushRefused(peer, f"{sum(sizes)} bytes; at most {total_cap} are allowed")
    return header, sizes


async def _verdict(stream: Stream, peer: PeerId, timeout_s: float) -> bytes:
    """What the other side says. Raises PushRefused where it refuses."""
    said = await _moving(stream.read_exactly(5), peer, timeout_s)
    verdict, length = said[0], int.from_bytes(said[1:])
    if verdict not in (_FINE, _REFUSED) or length > _WORDS_BYTES:
        raise Nonsense(f"{peer}: a verdict {verdict} of {length} bytes")
    words = await _moving(stream.read_exactly(length), peer, timeout_s)
    if verdict == _REFUSED:
        raise PushRefused(peer, words.decode(errors="replace")[:200])
    return words


async def _write_pieces(stream: Stream, peer: PeerId, data: memoryview, timeout_s: float) -> None:
    await _in_pieces(stream, len(data), lambda piece: stream.write(data[piece]), peer, timeout_s)


async def _read_pieces(stream: Stream, peer: PeerId, size: int, timeout_s: float) -> memoryview:
    data = np.empty(size, np.uint8).data  # not zeroed, and in large pages: half the cost of a bytearray
    await _in_pieces(stream, size, lambda piece: stream.read_into(data[piece]), peer, timeout_s)
    return data


async def _in_pieces(
    stream: Stream, size: int, move: Callable[[slice], Awaitable[None]], peer: PeerId, timeout_s: float
) -> None:
    """Move `size` bytes. Raises Stalled once nothing moves for too long."""
    now = asyncio.get_running_loop().time
    start, longest = 0, PIECE_BYTES
    while start < size:
        piece, since = slice(start, min(size, start + longest)), now()
        await _moving_on(stream, move(piece), peer, timeout_s)
        start, longest = piece.stop, LARGE_PIECE_BYTES if now() - since < AT_ONCE_S else PIECE_BYTES


async def _moving_on(stream: Stream, work: Awaitable[None], peer: PeerId, timeout_s: float) -> None:
    """As `_moving`, of a piece that may take long: bytes must move meanwhile."""
    task, now = asyncio.ensure_future(work), asyncio.get_running_loop().time
    moved_bytes, moved_at = stream.moved_bytes, now()
    try:
        while not (await asyncio.wait([task], timeout=min(timeout_s / _LOOKS, moved_at + timeout_s - now())))[0]:
            if stream.moved_bytes != moved_bytes:
                moved_bytes, moved_at = stream.moved_bytes, now()
            elif now() >= moved_at + timeout_s:
                raise Stalled(f"{peer}: no byte moved for {timeout_s:g} s")
        await task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
