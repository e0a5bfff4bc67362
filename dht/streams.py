"""A stream between two peers as the daemon hands it to us: a unix socket, whose bytes we count."""

import asyncio
import contextlib
import struct

from dugnad.dht.daemon import BUFFER_BYTES
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import REQUEST_BYTES, Meter, Unreachable

CLOSE_S = 5.0
_PIECE_BYTES = 128 * 1024


class HostStream:
    """A `Stream` over the daemon's unix socket; counts what passes."""

    def __init__(
        self, peer: PeerId, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, meter: Meter
    ) -> None:
        self.kind = kind
        self.moved_bytes = 0
        """See Stream."""
        self._peer = peer
        self._reader = reader
        self._writer = writer
        self._meter = meter
        writer.transport.set_write_buffer_limits(high=BUFFER_BYTES)

    async def read_exactly(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes. Raises Unreachable if the stream ends first."""
        try:
            data = await self._reader.readexactly(num_bytes)
        except (OSError, EOFError) as error:
            raise Unreachable(self._peer, "the stream broke off") from error
        self._meter("received", self.kind, num_bytes)
        return data

    async def read_into(self, buffer: memoryview) -> None:
        """Fill a writable `buffer` of bytes. Raises Unreachable if the stream ends first."""
        filled = 0
        while filled < len(buffer):
            try:
                piece = await self._reader.read(len(buffer) - filled)
            except OSError as error:
                raise Unreachable(self._peer, "the stream broke off") from error
            if not piece:
                raise Unreachable(self._peer, "the stream ended early")
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
            self.moved_bytes += len(piece)
            self._meter("received", self.kind, len(piece))

    async def write(self, data: bytes | memoryview) -> None:
        """Send `data`; returns once the way is clear for more. Raises Unreachable on a broken stream."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            piece = bytes(view[start : start + _PIECE_BYTES])  # asyncio may keep it; the caller may change `data`
            try:
                self._writer.write(piece)
                await self._writer.drain()
            except OSError as error:
                raise Unreachable(self._peer, "the stream broke off") from error
            self.moved_bytes += len(piece)
            self._meter("sent", self.kind, len(piece))

    async def close(self) -> None:
        """End the stream, after what was written; never raises."""
        await end(self._writer)

    def abort(self) -> None:
        """End the stream at once; what was written may get lost."""
        self._writer.transport.abort()

    async def wait_taken(self, *, timeout_s: float = CLOSE_S) -> None:
        """Wait until the other side, which has all then, closes, or says more than it should, or takes too long."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(timeout_s):
                await self._reader.read(1)

    async def write_message(self, status: bytes, payload: bytes) -> None:
        """A framed request or reply; its payload counts as "message"."""
        try:
            self._writer.write(status + struct.pack(">I", len(payload)))
        except OSError as error:
            raise Unreachable(self._peer, "the stream broke off") from error
        self.kind = "message"
        await self.write(payload)

    async def read_message(self, status_bytes: int) -> tuple[bytes, bytes]:
        """(status, payload) of a framed request or reply. Raises Unreachable, also for one above the cap."""
        try:
            header = await self._reader.readexactly(status_bytes + 4)
        except (OSError, EOFError) as error:
            raise Unreachable(self._peer, "the stream broke off") from error
        (length,) = struct.unpack(">I", header[status_bytes:])
        if length > REQUEST_BYTES:
            raise Unreachable(self._peer, f"it sent a message of {length} bytes, at most {REQUEST_BYTES} are allowed")
        self.kind = "message"
        return header[:status_bytes], await self.read_exactly(length)


async def end(writer: asyncio.StreamWriter) -> None:
    """Close after what was written, or at once if that takes more than 5 s; never raises."""
    writer.close()
    try:
        async with asyncio.timeout(CLOSE_S):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()
