"""A peer in the network: libp2p's daemon, our streams and requests on it, and the DHT that finds a run's peers.

A request is a short stream: u32 length and payload there, one status byte, u32 length and reply back. hivemind's unary
calls would save half a millisecond, but one of them that ends badly can take the shared connection with it.
Whoever opens a stream closes it first: the daemon may reset a stream on closing, with what is still under way.
"""

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from dugnad.dht import bootstrap as first_contact
from dugnad.dht.clock import Clock
from dugnad.dht.daemon import BUFFER_BYTES, Daemon, DaemonRefused
from dugnad.dht.directory import Directory, OwnerOf, import_hivemind
from dugnad.dht.identity import Identity, PeerId, peer_id_of, public_key_of, write_private
from dugnad.dht.streams import HostStream, end
from dugnad.dht.transport import (
    REQUEST_BYTES,
    Meter,
    NetworkDown,
    RequestHandler,
    RequestRefused,
    Stream,
    StreamHandler,
    TransportError,
    Unreachable,
)
from dugnad.dht.wire import WireError

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
_ADDRESSES_PER_PEER = 16
_PEERS_REMEMBERED = 4096
_ID_PREFIX = bytes.fromhex("002408011220")  # what a peer id of an ed25519 key has before the key
_REFUSED, _ANSWERED = b"\x01", b"\x00"


class Host:
    """A `Transport` over libp2p (TCP only): `async with Host(...)` starts it; afterwards no process is left.

    listen: multiaddrs, port 0 for any; bootstrap: multiaddrs with /p2p/ID of peers to join through.
    state_dir: for the daemon's key (mode 0600) and log; owner_of: whose record some bytes are, for announcements.
    Entering raises PortInUse, ListenError, NetworkDown or BootstrapError, and OSError if state_dir can't be written.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        bootstrap: Sequence[str] = (),
        meter: Meter,
        state_dir: Path,
        owner_of: OwnerOf,
    ) -> None:
        self._identity = identity
        self._bootstrap = tuple(bootstrap)
        self._meter = meter
        self._state_dir = state_dir
        self._key_file = state_dir / "libp2p.key"
        self._daemon = Daemon(
            identity_file=self._key_file,
            listen=listen,
            relays=first_contact.others(self._bootstrap, identity.peer_id),
            log=state_dir / "p2pd.log",
        )
        self.clock = Clock(identity.peer_id)
        """The run's time; whoever knows the run's peers keeps it right."""
        self.contacts = first_contact.Contacts((), ())
        """Whom the bootstrap addresses led to, once entered."""
        self._directory = Directory(self._daemon, identity, owner_of, self.now)
        self._handlers: dict[str, StreamHandler] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._known: dict[PeerId, tuple[str, ...]] = {}
        self._dialled: set[PeerId] = set()
        self._addresses: tuple[str, ...] = ()
        self._exit = AsyncExitStack()

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self._identity.peer_id

    @property
    def daemon_pid(self) -> int:
        """Process number of the network daemon."""
        return self._daemon.pid

    async def __aenter__(self) -> Self:
        import_hivemind()
        self._state_dir.mkdir(parents=True, exist_ok=True)
        write_private(self._key_file, self._identity.libp2p_private_key())
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._daemon)
            stack.push_async_callback(self._stop_serving)
            server = await asyncio.start_unix_server(self._accept, self._daemon.streams, limit=BUFFER_BYTES)
            stack.callback(server.close)
            await self._look_up_addresses()
            await stack.enter_async_context(self._directory)
            self.contacts = await first_contact.join(self._bootstrap, self.peer_id, self._connect)
            await self._directory.join(self.contacts.peers)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.__aexit__(kind, error, trace)

    def now(self) -> float:
        """The run's time, unix seconds."""
        return self.clock.now(time.time())

    def addresses(self) -> tuple[str, ...]:
        """Our multiaddrs with /p2p/ID, at most 16, those that reach farthest first.

        They are as known at the last `announce`: relays and NATs add some later.
        """
        return self._addresses

    def check_alive(self) -> None:
        """Raises NetworkDown once the daemon has ended."""
        self._daemon.check_alive()

    async def peers(self) -> list[PeerId]:
        """To whom the daemon is connected, sorted. Raises NetworkDown."""
        return sorted(await self.connections())

    async def connections(self) -> dict[PeerId, list[str]]:
        """To whom the daemon is connected, and the other end's multiaddr of each connection. Raises NetworkDown."""
        from hivemind.proto import p2pd_pb2
        from hivemind.utils.multiaddr import Multiaddr

        try:
            answer = await self._daemon.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        except DaemonRefused as error:
            raise NetworkDown(f"the network daemon does not say to whom it is connected: {error}") from error
        found: dict[PeerId, list[str]] = {}
        for one in answer.peers:
            peer = _peer_of(one.id)
            if peer is not None:
                found.setdefault(peer, []).extend(str(Multiaddr(raw)) for raw in one.addrs)
        return found

    async def seen_at(self, peer: PeerId) -> str:
        """From where `peer` is connected to us, directly if it can be; "" if it is not."""
        found = (await self.connections()).get(peer, [])
        return min(found, key=lambda address: "/p2p-circuit" in address, default="")

    async def announce(self, run: bytes, raw: bytes, *, expires_s: float) -> bool:
        """Keep our signed record `raw` in the DHT under `run` for `expires_s` seconds; whether a node took it."""
        await self._look_up_addresses()
        return await self._directory.announce(run, raw, expires_s=expires_s)

    async def discover(self, run: bytes) -> list[bytes]:
        """The signed records of all peers that announced themselves under `run`."""
        self.check_alive()
        return await self._directory.discover(run)

    async def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember TCP multiaddrs under which `peer` can be dialled; others, and more than 16, are ignored."""
        usable = tuple(address for address in addresses if _usable(address))[:_ADDRESSES_PER_PEER]
        if not usable or peer == self.peer_id or self._known.get(peer) == usable:
            return
        self._known.pop(peer, None)
        self._known[peer] = usable
        self._dialled.discard(peer)
        while len(self._known) > _PEERS_REMEMBERED:
            self._known.pop(next(iter(self._known)))

    async def open(self, peer: PeerId, channel: str, *, kind: str) -> "HostStream":
        """A new stream to `peer`, its bytes counted as `kind`. Raises Unreachable, within 10 s, or NetworkDown."""
        from hivemind.proto import p2pd_pb2

        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN)
        request.streamOpen.peer, request.streamOpen.timeout = _id_bytes(peer), int(CONNECT_S)
        request.streamOpen.proto.append(channel)
        try:
            async with asyncio.timeout(CONNECT_S):
                if peer not in self._dialled:
                    await self._connect(peer, self._known.get(peer, ()))
                _, reader, writer = await self._daemon.ask_stream(request)
        except TimeoutError:
            raise Unreachable(peer, f"no connection in {CONNECT_S:.0f} s") from None
        except DaemonRefused as error:
            self._dialled.discard(peer)
            raise Unreachable(peer, _in_short(str(error))) from None
        return HostStream(peer, kind, reader, writer, self._meter)

    async def request(self, peer: PeerId, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        """The reply of `peer`; see Transport. Both payloads count as "message"."""
        assert len(payload) <= REQUEST_BYTES, f"a request of {len(payload)} bytes, at most {REQUEST_BYTES}"
        try:
            async with asyncio.timeout(timeout_s):
                stream = await self.open(peer, channel, kind="message")
                try:
                    await stream.write_message(b"", payload)
                    status, reply = await stream.read_message(1)
                except BaseException:
                    stream.abort()
                    raise
        except TimeoutError:
            raise Unreachable(peer, f"no answer in {timeout_s:g} s") from None
        await stream.close()
        if status != _ANSWERED:
            raise RequestRefused(peer, reply.decode(errors="replace"))
        return reply

    async def serve(self, channel: str, handler: RequestHandler) -> None:
        """Answer requests on `channel`. A WireError's reason goes back to the sender, no other exception's."""

        async def answer(peer: PeerId, stream: Stream) -> None:
            assert isinstance(stream, HostStream)
            async with asyncio.timeout(CONNECT_S):
                _, payload = await stream.read_message(0)
            status, reply = await _answer(handler, peer, channel, payload)
            await stream.write_message(status, reply)

        await self.serve_stream(channel, answer)

    async def serve_stream(self, channel: str, handler: StreamHandler) -> None:
        """Accept streams on `channel`; each is closed when its handler returns."""
        from hivemind.proto import p2pd_pb2
        from hivemind.utils.multiaddr import Multiaddr

        self._handlers[channel] = handler
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER)
        request.streamHandler.addr = Multiaddr(f"/unix{self._daemon.streams}").to_bytes()
        request.streamHandler.balanced = False
        request.streamHandler.proto.append(channel)
        try:
            await self._daemon.ask(request)
        except DaemonRefused as error:
            raise NetworkDown(f"the network daemon does not serve {channel}: {error}") from error

    async def _connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Have the daemon dial `peer`, or find it by itself. Raises DaemonRefused."""
        from hivemind.proto import p2pd_pb2
        from hivemind.utils.multiaddr import Multiaddr

        request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT)
        request.connect.peer, request.connect.timeout = _id_bytes(peer), int(CONNECT_S)
        for address in addresses:
            with contextlib.suppress(ValueError):  # a stranger's text
                request.connect.addrs.append(Multiaddr(address.removesuffix(f"/p2p/{peer}")).to_bytes())
        await self._daemon.ask(request)
        self._dialled.add(peer)

    async def _look_up_addresses(self) -> None:
        from hivemind.proto import p2pd_pb2
        from hivemind.utils.multiaddr import Multiaddr

        answer = await self._daemon.ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        seen = (f"{Multiaddr(raw)}/p2p/{self.peer_id}" for raw in answer.identify.addrs)
        farthest_first = sorted((address for address in seen if _usable(address)), key=_nearness)
        self._addresses = tuple(farthest_first[:_ADDRESSES_PER_PEER])  # no message takes more

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve_one(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a stream that the daemon hands us."""
        from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe
        from hivemind.proto import p2pd_pb2

        try:
            info = p2pd_pb2.StreamInfo()
            await read_pbmsg_safe(reader, info)
            peer = _peer_of(info.peer)
            if peer is None or info.proto not in self._handlers:
                return
            stream = HostStream(peer, "unknown", reader, writer, self._meter)
            await self._handlers[info.proto](peer, stream)
            await stream.wait_taken()
        except (TransportError, TimeoutError, OSError, EOFError) as error:
            logger.debug("a stream broke off: %s", error)
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        except Exception:
            logger.exception("a handler failed")
        finally:
            await end(writer)

    async def _stop_serving(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)


async def _answer(handler: RequestHandler, peer: PeerId, channel: str, payload: bytes) -> tuple[bytes, bytes]:
    """(status, reply): a handler's failure must reach the asker as a refusal, and us as a log line."""
    try:
        reply = await handler(peer, payload)
        assert len(reply) <= REQUEST_BYTES, f"a reply of {len(reply)} bytes, at most {REQUEST_BYTES}"
    except WireError as error:
        return _REFUSED, error.reason.encode()
    except Exception:
        logger.exception("the handler of %s failed on a request from %s", channel, peer)
        return _REFUSED, b"internal error"
    return _ANSWERED, reply


def _id_bytes(peer: PeerId) -> bytes:
    """A peer id in libp2p's bytes. Raises Unreachable for a name that is none of ours."""
    try:
        return _ID_PREFIX + public_key_of(peer)
    except ValueError as error:
        raise Unreachable(peer, str(error)) from error


def _peer_of(raw: bytes) -> PeerId | None:
    """The peer id in libp2p's bytes; None for other kinds of keys, which no peer of ours has."""
    known = raw.startswith(_ID_PREFIX) and len(raw) == len(_ID_PREFIX) + 32
    return peer_id_of(raw.removeprefix(_ID_PREFIX)) if known else None


def _usable(address: str) -> bool:
    """Whether a multiaddr means plain TCP, direct or through a relay: over QUIC the ends of replies get lost."""
    return len(address) <= 256 and "/tcp/" in address and not any(part in address for part in ("/ws", "/udp", "/quic"))


def _nearness(address: str) -> int:
    """From how near a multiaddr can be dialled: 0 from anywhere, 1 in a private network, 2 on this link or machine."""
    try:
        ip = ipaddress.ip_address(address.split("/")[2])
    except ValueError:  # a name
        return 0
    return 2 if ip.is_loopback or ip.is_link_local else int(not ip.is_global)


def _in_short(words: str) -> str:
    """The daemon's explanation in one line, without Go's chain of wrappers."""
    if "no addresses" in words or "failed to find" in words or "not found" in words:
        return "nobody knows an address of it"
    if "protocols not supported" in words:
        return "it does not offer this service"
    return " ".join(words.split())[:200]
