"""What a stranger's own software can do on a direct connection that it was let onto: little, and not for long."""

import asyncio
import contextlib
import gc
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dugnad.dht import mux, wires
from dugnad.dht.carrier import _MAGIC, Carrier
from dugnad.dht.certificate import Certificate
from dugnad.dht.connection import Connection
from dugnad.dht.endpoint import Endpoint
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.mux import HEADER, Kind
from dugnad.dht.transport import Stream

pytestmark = [pytest.mark.net, pytest.mark.timeout(60)]

BOB, EVE = (Identity.from_seed(bytes([k]) * 32) for k in (2, 3))
CHANNEL = "test/idle/1"
STREAM = 1 if EVE.public_key < BOB.public_key else 2
"""The first that Eve may open."""


class Eve:
    """A blocking TLS socket to Bob, on which anything can be said, and Bob's end of it."""

    def __init__(self, sock: ssl.SSLSocket, bob: Connection) -> None:
        self._sock = sock
        self.bob = bob

    async def say(self, raw: bytes, *, within_s: float = 10.0) -> None:
        """Send all of it, or as much as is taken."""

        def send() -> None:
            self._sock.settimeout(within_s)
            with contextlib.suppress(OSError):
                self._sock.sendall(raw)

        await asyncio.to_thread(send)

    async def takes(self, num_bytes: int) -> None:
        """Read so much."""

        def receive() -> None:
            self._sock.settimeout(10.0)
            left = num_bytes
            while left:
                left -= len(self._sock.recv(left))

        await asyncio.to_thread(receive)

    async def is_cut_off(self, *, within_s: float = 10.0) -> bool:
        """Whether Bob ends it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self.bob.alive:
                    await asyncio.sleep(0.01)
        return not self.bob.alive


@contextlib.asynccontextmanager
async def met(folder: Path) -> AsyncIterator[Eve]:
    """Eve on a connection to Bob, whose handler never reads."""
    certificates = {who: Certificate.load_or_create(folder / who.peer_id[-6:], who.peer_id) for who in (BOB, EVE)}
    there: list[Connection] = []

    async def idle(peer: PeerId, stream: Stream) -> None:
        await asyncio.Event().wait()

    carrier = Carrier(
        BOB, certificates[BOB], listen=Endpoint("127.0.0.1", 0), meter=lambda direction, kind, count: None,
        expects={EVE.peer_id: certificates[EVE].der}.get, established=there.append, over=lambda connection, why: None,
    )  # fmt: skip

    def dial() -> ssl.SSLSocket:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        plain.connect(("127.0.0.1", carrier.port))
        plain.sendall(_MAGIC + EVE.public_key)
        waiting = len(_MAGIC) + 32
        while waiting:
            waiting -= len(plain.recv(waiting))
        client = EVE.public_key < BOB.public_key
        context = certificates[EVE].context(dialler=client, trusted=certificates[BOB].der)
        secure = context.wrap_socket(plain, server_side=not client)
        secure.sendall(mux.seen("127.0.0.1:4002"))
        return secure

    async with carrier:
        carrier.handlers[CHANNEL] = idle
        with await asyncio.to_thread(dial) as sock:
            async with asyncio.timeout(10):
                while not there:
                    await asyncio.sleep(0.01)
            try:
                yield Eve(sock, there[0])
            finally:
                await there[0].close()


def data(payload: bytes) -> bytes:
    return HEADER.pack(Kind.DATA, STREAM, len(payload)) + payload


@pytest.mark.parametrize("num_bytes", [1, 4096, mux.FRAME_BYTES - 1])
async def test_what_nobody_reads_takes_no_more_memory_than_is_said_however_small_its_frames(
    tmp_path: Path, num_bytes: int
) -> None:
    async with met(tmp_path) as eve:
        await eve.say(mux.frame(Kind.OPEN, STREAM, CHANNEL.encode()))
        flood = data(bytes(num_bytes)) * (mux.WINDOW_BYTES // num_bytes)
        gc.collect()
        tracemalloc.start()
        try:
            await eve.say(flood, within_s=1.0)
            await asyncio.sleep(0.2)
            taken = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert taken < 2 * wires.UNREAD_BYTES
        assert eve.bob.alive, "it was within what was granted"


async def test_who_sends_data_without_data_is_cut_off(tmp_path: Path) -> None:
    async with met(tmp_path) as eve:
        await eve.say(mux.frame(Kind.OPEN, STREAM, CHANNEL.encode()) + data(b""))
        assert await eve.is_cut_off()


async def test_who_asks_on_and_on_and_does_not_take_the_answers_is_cut_off(tmp_path: Path) -> None:
    async with met(tmp_path) as eve:
        pings = mux.ping(b"12345678") * 20_000
        async with asyncio.timeout(30):
            while not await eve.is_cut_off(within_s=0.01):
                await eve.say(pings, within_s=1.0)


async def test_who_tells_how_it_sees_us_and_hangs_up_at_once_leaves_nothing_behind(tmp_path: Path) -> None:
    async with met(tmp_path) as eve:
        eve._sock.close()
        assert await eve.is_cut_off()
        with pytest.raises(EOFError):
            await eve.bob.taken()


async def test_bytes_are_seen_to_move_long_before_a_frame_has_left(tmp_path: Path) -> None:
    async with met(tmp_path) as eve:
        stream = eve.bob.open(CHANNEL, kind="upload")
        writing = asyncio.create_task(stream.write(bytes(mux.WINDOW_BYTES)))
        seen = {stream.moved_bytes}
        for _ in range(8):
            await eve.takes(64 * 1024)
            await asyncio.sleep(0.05)
            seen.add(stream.moved_bytes)
        assert not writing.done()
        assert len(seen) > 4, "on a slow line nobody takes that for a stall"
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
