"""A peer in the network: libp2p's daemon, our streams and requests on it, and the DHT that finds a run's peers.

A request is a short stream: u32 length and payload there, one status byte, u32 length and reply back. hivemind's unary
calls would save half a millisecond, but one of them that ends badly can take the shared connection with it.
Whoever opens a stream closes it first: the daemon may reset a stream on closing, with what is still under way.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from dugnad.dht import bootstrap as first_contact
from dugnad.dht import control, reachability
from dugnad.dht.clock import Clock
from dugnad.dht.control import CONNECT_S
from dugnad.dht.daemon import BUFFER_BYTES, Daemon, DaemonRefused
from dugnad.dht.directory import Directory, OwnerOf, import_hivemind
from dugnad.dht.identity import Identity, PeerId, write_private
from dugnad.dht.multiaddrs import IpAddress, ip_of, is_direct, is_public, peer_of, relay_of, usable
from dugnad.dht.outside import Outside, Ways
from dugnad.dht.paths import Reach, Route
from dugnad.dht.reachability import DialBack
from dugnad.dht.streams import HostStream, end
from dugnad.dht.transport import (
    REQUEST_BYTES,
    Meter,
    RequestHandler,
    RequestRefused,
    Stream,
    StreamHandler,
    TransportError,
    Unreachable,
)
from dugnad.dht.wire import WireError

logger = logging.getLogger(__name__)

REPLY_S = 10.0
"""For how long a reply may be on its way: nobody who asks waits longer."""
_ADDRESSES_PER_PEER = 16
_PEERS_REMEMBERED = 4096
_BACKLOG = 4096
"""Streams that may come while the event loop stands still; the daemon resets all that there is no room for."""
_STREAMS_PER_PEER = 64
"""Of one peer's that are served at once: each holds a file open, of which a process may have few."""
_REFUSED, _ANSWERED = b"\x01", b"\x00"


class Host:
    """A `Transport` over libp2p (TCP only): `async with Host(...)` starts it; afterwards no process is left.

    listen: multiaddrs, port 0 for any; bootstrap: multiaddrs with /p2p/ID of peers to join through.
    state_dir: for the daemon's key (mode 0600) and log; owner_of: whose record some bytes are, for announcements.
    ways: what is known of how the world reaches us; the rest is found out, and relays are found, while it is entered.
    refused: is told why when a stream is turned away.
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
        ways: Ways = Ways(),  # noqa: B008  # frozen
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._identity = identity
        self._bootstrap = tuple(bootstrap)
        self._meter = meter
        self._refused = refused
        self._state_dir = state_dir
        self._key_file = state_dir / "libp2p.key"
        self._daemon = Daemon(identity_file=self._key_file, listen=listen, log=state_dir / "p2pd.log")
        self._outside = Outside(
            self._daemon, identity.peer_id, ways, request=self._ask_to_try, open_members=self._open_members
        )
        self.clock = Clock(identity.peer_id)
        """The run's time; whoever knows the run's peers keeps it right."""
        self.contacts = first_contact.Contacts((), ())
        """Whom the bootstrap addresses led to, once entered."""
        self._directory = Directory(self._daemon, identity, owner_of, self.now)
        self._handlers: dict[str, StreamHandler] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._num_served: Counter[PeerId] = Counter()
        """Streams of each peer that are being served."""
        self._known: dict[PeerId, tuple[str, ...]] = {}
        self._dialled: set[PeerId] = set()
        self._exit = AsyncExitStack()

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self._identity.peer_id

    @property
    def daemon_pid(self) -> int:
        """Process number of the network daemon."""
        return self._daemon.pid

    @property
    def reach(self) -> Reach:
        """How others reach us, as far as libp2p is concerned: OPEN, or UNKNOWN."""
        return self._outside.reach

    @property
    def seen_ip(self) -> str | None:
        """Our IP address as most members see it; None while none was asked."""
        return self._outside.found.seen_ip

    @property
    def open_ports(self) -> dict[int, int]:
        """Those of our TCP ports, libp2p's and `ways.extra_ports`, that members reached when they tried last.

        Each with the port outside that leads to it: another one where a router is in between that said so.
        """
        return self._outside.outside_ports

    def open_hosts(self, port: int) -> tuple[str, ...]:
        """At which IP addresses others reach our TCP `port`: found out by members, or by the user's word.

        Unless `is_open_at` says so too, it may be some of them only.
        """
        if self.open_ports:
            same = self.open_ports.get(port) == port  # a router may have had to pass another one on
            return (self.seen_ip,) if self.seen_ip is not None and same else ()
        if self.reach is not Reach.OPEN:
            return ()
        known = [self._outside.announced_ip, *(ip_of(each) for each in self.addresses() if is_public(each))]
        return tuple(str(ip) for ip in known if ip is not None)[:1]

    def is_open_at(self, port: int) -> bool:
        """Whether anyone reaches a TCP port of ours, and not just some whom a router lets in."""
        return self._outside.is_open_at(port)

    async def __aenter__(self) -> Self:
        import_hivemind()
        self._state_dir.mkdir(parents=True, exist_ok=True)
        write_private(self._key_file, self._identity.libp2p_private_key())
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._daemon)
            self.contacts = await self._join()
            if await self._outside.find_out(self.contacts.peers):
                self._dialled.clear()
                self.contacts = await self._join()
            stack.push_async_callback(self._stop_serving)
            server = await asyncio.start_unix_server(
                self._accept, self._daemon.streams, limit=BUFFER_BYTES, backlog=_BACKLOG
            )
            stack.callback(server.close)
            await self.serve(reachability.CHANNEL, DialBack(self._seen_at).answer)
            await stack.enter_async_context(self._directory)
            await self._directory.join(self.contacts.peers, serves=not self._outside.is_hidden)
            for work in (self._outside.keep(), self._daemon.keep_asking()):
                stack.push_async_callback(self._stop, asyncio.create_task(work))
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
        """Our multiaddrs with /p2p/ID, at most 16, those that reach farthest first: see `addresses_changed`."""
        told = [f"{address}/p2p/{self.peer_id}" for address in self._outside.addresses]
        return tuple(told[:_ADDRESSES_PER_PEER])  # no message takes more

    async def addresses_changed(self) -> None:
        """Returns once our addresses are others than at the last return: a relay was lost, say."""
        await self._outside.changed.wait()
        self._outside.changed.clear()

    def check_alive(self) -> None:
        """Raises NetworkDown once the daemon has ended, or does not answer any more."""
        self._daemon.check_alive()

    async def peers(self) -> list[PeerId]:
        """To whom the daemon is connected, sorted. Raises NetworkDown."""
        return sorted({peer for peer, _ in await control.connections(self._daemon)})

    async def route_to(self, peer: PeerId) -> Route | None:
        """By which way libp2p reaches `peer`; None without a connection. Raises NetworkDown."""
        address = await self.seen_at(peer)
        return Route.of(address) if address else None

    async def seen_at(self, peer: PeerId) -> str:
        """From where `peer` is connected to us, directly if it can be; "" if it is not. Raises NetworkDown."""
        found = [address for other, address in await control.connections(self._daemon) if other == peer]
        return min(found, key=lambda address: not is_direct(address), default="")

    async def announce(self, run: bytes, raw: bytes, *, expires_s: float) -> bool:
        """Keep our signed record `raw` in the DHT under `run` for `expires_s` seconds; whether a node took it."""
        await self._outside.look_up()
        return await self._directory.announce(run, raw, expires_s=expires_s)

    async def discover(self, run: bytes) -> list[bytes]:
        """The signed records of all peers that announced themselves under `run`."""
        self.check_alive()
        return await self._directory.discover(run)

    async def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember TCP multiaddrs under which `peer` can be dialled; others, and more than 16, are ignored."""
        dialled = tuple(address for address in addresses if usable(address))[:_ADDRESSES_PER_PEER]
        if not dialled or peer == self.peer_id or self._known.get(peer) == dialled:
            return
        self._known.pop(peer, None)
        self._known[peer] = dialled
        self._dialled.discard(peer)
        while len(self._known) > _PEERS_REMEMBERED:
            self._known.pop(next(iter(self._known)))

    async def open(self, peer: PeerId, channel: str, *, kind: str) -> "HostStream":
        """A new stream to `peer`, its bytes counted as `kind`. Raises Unreachable, within 10 s, or NetworkDown."""
        try:
            async with asyncio.timeout(CONNECT_S):
                if peer not in self._dialled:
                    await self._connect(peer, self._known.get(peer, ()))
                reader, writer = await control.open_stream(self._daemon, peer, channel)
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
            async with asyncio.timeout(REPLY_S):
                await stream.write_message(status, reply)

        await self.serve_stream(channel, answer)

    async def serve_stream(self, channel: str, handler: StreamHandler) -> None:
        """Accept streams on `channel`; each is closed when its handler returns."""
        self._handlers[channel] = handler
        await control.take_streams(self._daemon, channel)

    # -- reaching others, and being reached

    async def _join(self) -> first_contact.Contacts:
        """Whom of our bootstrap peers we are connected to. Raises BootstrapError."""
        joined = await first_contact.join(self._bootstrap, self.peer_id, self._connect)
        for peer in joined.peers:
            if peer not in self._known:
                await self.learn(peer, [address for address in self._bootstrap if peer_of(address) == peer])
        return joined

    async def _connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Have the daemon dial `peer`, or find it by itself. Raises DaemonRefused."""
        await control.connect(self._daemon, peer, addresses)
        self._dialled.add(peer)
        if len(self._dialled) > _PEERS_REMEMBERED:
            self._dialled &= self._known.keys()

    def _open_members(self) -> dict[PeerId, str]:
        """The peers that are open to all, by what is known of them, each under a multiaddr without its name.

        They say so by naming such an address first; or others name them as their relays.
        """
        first = {peer: addresses[0].removesuffix(f"/p2p/{peer}") for peer, addresses in self._known.items()}
        relays = dict(found for address in first.values() if (found := relay_of(address)) is not None)
        return {peer: address for peer, address in (relays | first).items() if is_public(address)}

    async def _ask_to_try(self, peer: PeerId, raw: bytes) -> bytes:
        return await self.request(peer, reachability.CHANNEL, raw, timeout_s=reachability.ANSWER_S)

    async def _seen_at(self, peer: PeerId) -> IpAddress | None:
        seen = [address for other, address in await control.connections(self._daemon) if other == peer]
        direct = sorted(address for address in seen if is_direct(address))  # ip4 before ip6
        return ip_of(direct[0]) if direct else None

    async def _stop(self, task: "asyncio.Task[None]") -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve_one(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a stream that the daemon hands us."""
        try:
            peer, channel = await control.read_header(reader)
            if peer is None or channel not in self._handlers:
                return
            if self._num_served[peer] >= _STREAMS_PER_PEER:
                self._refused("busy")
                return
            with self._counted(peer):
                stream = HostStream(peer, "unknown", reader, writer, self._meter)
                await self._handlers[channel](peer, stream)
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

    @contextmanager
    def _counted(self, peer: PeerId) -> Iterator[None]:
        self._num_served[peer] += 1
        try:
            yield
        finally:
            self._num_served[peer] -= 1
            self._num_served += Counter()  # which leaves out whoever is at nought

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


def _in_short(words: str) -> str:
    """The daemon's explanation in one line, without Go's chain of wrappers."""
    if "no addresses" in words or "failed to find" in words or "not found" in words:
        return "nobody knows an address of it"
    if "protocols not supported" in words:
        return "it does not offer this service"
    return " ".join(words.split())[:200]
