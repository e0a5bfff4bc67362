"""Direct connections for bulk bytes: TLS 1.3 over TCP, from one port, dialled or punched.

    both    "dugnad-bulk/1", public key (32)      in the clear: it names which certificate is expected, proves nothing
            TLS 1.3, certificates on both sides; whose key is lower is its client
    both    SEEN                                  each is told how it is seen, which also shows that it was taken

Who is not expected is cut off after the first line. Punching is TCP's simultaneous open: both sides connect from the
port that they listen on, so that a router which keeps one outside port for it lets the other's packets in.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from dugnad.dht.certificate import Certificate
from dugnad.dht.connection import Connection
from dugnad.dht.endpoint import Endpoint
from dugnad.dht.identity import Identity, PeerId, nickname, peer_id_of, public_key_of
from dugnad.dht.listening import card_addresses, check_free, why_not
from dugnad.dht.multiaddrs import on_tcp
from dugnad.dht.paths import Path
from dugnad.dht.transport import ListenError, Meter, PortInUse, StreamHandler, TransportError
from dugnad.dht.wires import Wires, leave_nothing_behind

log = logging.getLogger(__name__)

DIAL_S = 4.0
HANDSHAKE_S = 4.0
PUNCH_S = 3.0
"""How long two sides try to meet; with routers that can be punched it takes two round trips."""
_TRY_S = 0.7
_PAUSE_S = 0.05
_PENDING = 64
"""Accepted connections whose other side has not proven who it is."""
_MAGIC = b"dugnad-bulk/1"


class NoConnection(TransportError):
    """A direct connection did not come about, for a reason in words."""


class Refused(NoConnection):
    """The other side is not who it should be, or nobody that we expect."""


class Carrier:
    """Listens, dials and punches: `async with Carrier(...)`; afterwards nothing is left open.

    listen: on which address and port, 0 for any. expects: the certificate (DER) with which a peer must come, None for
    those who may not. established: hears of each connection, dialled or accepted. over: hears when one has ended.
    Entering raises PortInUse or ListenError.
    """

    def __init__(
        self,
        identity: Identity,
        certificate: Certificate,
        *,
        listen: Endpoint,
        meter: Meter,
        expects: Callable[[PeerId], bytes | None],
        established: Callable[[Connection], None],
        over: Callable[[Connection, str], None],
    ) -> None:
        self.port = listen.port
        self.second_port = 0
        """Another one, any: seen through two ports, a router shows whether it keeps one outside port for all."""
        self.handlers: dict[str, StreamHandler] = {}
        self._identity = identity
        self._certificate = certificate
        self._host = listen.host
        self._meter = meter
        self._expects = expects
        self._established = established
        self._over = over
        self._wires: Wires | None = None
        self._pending: set[asyncio.Task[None]] = set()
        self._exit = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            first, second = self._listen(stack, self._host, self.port), self._listen(stack, self._host, 0)
            self.port, self.second_port = first.getsockname()[1], second.getsockname()[1]
            listeners = [first, second]
            if self._host == "0.0.0.0" and socket.has_ipv6:
                with contextlib.suppress(ListenError, PortInUse):  # what there is without it is enough
                    listeners.append(self._listen(stack, "::", self.port))
            self._wires = stack.enter_context(Wires())
            stack.push_async_callback(self._stop)
            for listener in listeners:
                self._spawn(self._keep_accepting(listener))
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.__aexit__(kind, error, trace)

    async def dial(self, peer: PeerId, place: Endpoint, *, keep_port: bool, or_another: bool = True) -> Connection:
        """A connection to `peer`, which accepts some at `place`; keep_port: from the port that we listen on.

        or_another: if that one can't be had. Raises NoConnection, within some seconds.
        """
        try:
            async with asyncio.timeout(DIAL_S):
                sock = await self._connect_from(place, self.port if keep_port else 0, or_another=or_another)
        except (OSError, TimeoutError) as error:
            why = getattr(error, "strerror", None) or f"no answer in {DIAL_S:.0f} s"
            raise NoConnection(f"{place}: {why}") from error
        return await self._establish(sock, peer, Path.DIRECT)

    async def punch(self, peer: PeerId, place: Endpoint) -> Connection:
        """A connection to `peer`, whose router shows it as `place`, and who tries the same now. Raises NoConnection."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PUNCH_S
        fault: Exception = NoConnection(f"{place}: nothing came through in {PUNCH_S:.0f} s")
        while loop.time() < deadline:
            try:
                async with asyncio.timeout(_TRY_S):
                    sock = await self._connect(place, self.port)
            except (OSError, TimeoutError):
                await asyncio.sleep(_PAUSE_S)
                continue
            try:
                return await self._establish(sock, peer, Path.PUNCHED)
            except Refused:
                raise
            except NoConnection as error:
                fault = error
        raise fault

    # -- sockets

    async def _connect_from(self, place: Endpoint, port: int, *, or_another: bool) -> socket.socket:
        """A TCP connection from that port; 0: from any. Raises OSError."""
        try:
            return await self._connect(place, port)
        except OSError as error:
            if not port or not or_another or error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                raise
        return await self._connect(place, 0)  # one from there to here is still dying

    def _listen(self, stack: contextlib.AsyncExitStack, host: str, port: int) -> socket.socket:
        place = Endpoint(host, port)
        if port:
            check_free(on_tcp(host, port))
        listener = stack.enter_context(socket.socket(_family(place), socket.SOCK_STREAM))
        _share_port(listener)
        try:
            if ":" in host:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((place.host, place.port))
        except OSError as error:
            raise ListenError(on_tcp(host, port), why_not(error)) from error
        listener.listen(_PENDING)
        listener.setblocking(False)
        return listener

    async def _connect(self, place: Endpoint, from_port: int) -> socket.socket:
        """A TCP connection. Raises OSError."""
        sock = socket.socket(_family(place), socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            if from_port:
                _share_port(sock)
                sock.bind(("::" if ":" in place.host else "0.0.0.0", from_port))
                # closed, it leaves no state behind in which the pair of ports could not be used again for a minute, or
                # for many after an outage; what was not delivered then is lost, and nobody closes before it has been
                leave_nothing_behind(sock)
            await asyncio.get_running_loop().sock_connect(sock, (place.host, place.port))
        except BaseException:
            sock.close()
            raise
        return sock

    @property
    def hosts(self) -> tuple[str, ...]:
        """The addresses of this machine at which we listen, but not those that are good on its link alone."""
        if self._host not in ("0.0.0.0", "::"):
            return (self._host,)
        usable = [one for one in card_addresses() if not (one.is_link_local or one.is_loopback)]
        return tuple(str(one) for one in usable)

    async def _keep_accepting(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # as when there are too many open files
                log.debug("can't accept: %s", error)
                await asyncio.sleep(1.0)
                continue
            if len(self._pending) >= _PENDING + 3:
                sock.close()
                continue
            self._spawn(self._welcome(sock))

    async def _welcome(self, sock: socket.socket) -> None:
        try:
            await self._establish(sock, None, Path.DIRECT)
        except NoConnection as error:
            log.debug("a connection was refused: %s", error)

    # -- who it is

    async def _establish(self, sock: socket.socket, peer: PeerId | None, path: Path) -> Connection:
        """Make a connection of a socket, if it leads to `peer`, or to anyone we expect. Raises NoConnection."""
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                return await self._shake_hands(sock, peer, path)
        except Refused:
            sock.close()
            raise
        except (OSError, EOFError, TimeoutError) as error:  # ssl.SSLError is an OSError
            sock.close()
            raise NoConnection(f"{nickname(peer) if peer else 'a stranger'}: {error or 'no answer'}") from error
        except BaseException:
            sock.close()
            raise

    async def _shake_hands(self, sock: socket.socket, peer: PeerId | None, path: Path) -> Connection:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        other = await self._exchange_names(sock)
        if peer is not None and other != peer:
            raise Refused(f"{nickname(other)} answered in place of {nickname(peer)}")
        trusted = self._expects(other)
        if trusted is None:
            raise Refused(f"{nickname(other)} is not expected")
        client = self._identity.public_key < public_key_of(other)
        context = self._certificate.context(dialler=client, trusted=trusted)
        host, port = sock.getpeername()[:2]
        seen = Endpoint(host.partition("%")[0], port)  # the zone is ours
        secured = context.wrap_socket(sock, server_side=not client, do_handshake_on_connect=False)
        try:
            await _handshake(secured)
        except ssl.SSLCertVerificationError as error:
            secured.close()
            raise Refused(f"{nickname(other)}: {error.verify_message}") from error
        except BaseException:
            secured.close()
            raise
        return await self._connected(secured, other, path, seen, client)

    async def _connected(
        self, sock: ssl.SSLSocket, peer: PeerId, path: Path, seen: Endpoint, client: bool
    ) -> Connection:
        assert self._wires is not None, "entered"
        connection = Connection(
            self._wires, sock, peer, path,
            dialler=client, handlers=self.handlers, meter=self._meter, over=self._over,
        )  # fmt: skip
        connection.keeps_port = sock.getsockname()[1] == self.port
        connection.tell_seen(str(seen))
        try:
            await connection.taken()
        except BaseException:
            await connection.close()
            raise
        self._established(connection)
        return connection

    async def _exchange_names(self, sock: socket.socket) -> PeerId:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, _MAGIC + self._identity.public_key)
        said = b""
        while len(said) < len(_MAGIC) + 32:
            piece = await loop.sock_recv(sock, len(_MAGIC) + 32 - len(said))
            if not piece:
                raise EOFError("it hung up before it said who it is")
            said += piece
        if not said.startswith(_MAGIC):
            raise Refused("it does not speak our protocol")
        try:
            return peer_id_of(said.removeprefix(_MAGIC))
        except ValueError as error:
            raise Refused(str(error)) from error

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _stop(self) -> None:
        for task in self._pending:
            task.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)


async def _handshake(sock: ssl.SSLSocket) -> None:
    """TLS's, without blocking. Raises OSError."""
    while True:
        try:
            sock.do_handshake()
            return
        except ssl.SSLWantReadError:
            await _ready(sock, to_write=False)
        except ssl.SSLWantWriteError:
            await _ready(sock, to_write=True)


async def _ready(sock: socket.socket, *, to_write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if to_write else (loop.add_reader, loop.remove_reader)
    descriptor = sock.fileno()
    add(descriptor, _once(ready))
    try:
        await ready
    finally:
        remove(descriptor)


def _once(ready: "asyncio.Future[None]") -> Callable[[], None]:
    def resolve() -> None:
        if not ready.done():
            ready.set_result(None)

    return resolve


def _share_port(sock: socket.socket) -> None:
    """So that connections may go out from the port on which we listen."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _family(place: Endpoint) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in place.host else socket.AF_INET
