"""Direct connections to the peers of a run: who is met, trusted and dialled."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, Protocol, Self

from dugnad.dht import meeting
from dugnad.dht.carrier import Carrier, NoConnection, Refused
from dugnad.dht.certificate import Certificate, fingerprint
from dugnad.dht.connection import Connection
from dugnad.dht.endpoint import Endpoint
from dugnad.dht.identity import Identity, PeerId, nickname
from dugnad.dht.meeting import Dial, Favours, Give, Meet, Punch, Wait
from dugnad.dht.observers import Observers
from dugnad.dht.paths import Path, Reach
from dugnad.dht.transport import Meter, StreamHandler, Transport, TransportError
from dugnad.dht.wire import WireError

log = logging.getLogger(__name__)

ASK_S = 3.0
WAIT_S = 4.0
"""How long the side that is dialled waits for that."""
RETRY_S = 5.0
"""After how long a pair that found no direct way tries again; twice as long each time, up to MAX_RETRY_S."""
MAX_RETRY_S = 600.0
LOOK_S = 2.0
SOON_S = 0.3
"""The same, as long as nobody has told us how we are seen; but where all are in one network, nobody ever does."""
SOON_FOR_S = 30.0
FRESH_S = 5.0
"""A connection younger than this is not doubted when its peer wants to meet: both may have begun at once."""
MAX_CONNECTIONS = 1024
"""Peers that are connected."""
MAX_PER_PEER = 4
"""Connections to one: both dialled, through another port one looked how that is seen, and one broke unnoticed."""
MAX_TRUSTED = 4096


class Punched(Protocol):
    """Hears how we are reached, and whether a connection could be punched."""

    def __call__(self, reach: Reach, *, connected: bool) -> None:
        """Count it."""


def _not_counted(reach: Reach, *, connected: bool) -> None:
    """Nobody counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Acquaintances:
    """What a peer knows of the others, and what it is itself to them."""

    refuses: Callable[[PeerId, bytes], str | None]
    """(peer, claim): why it may have no connection with us; None if it may."""
    pinned: Callable[[PeerId], bytes | None]
    """The fingerprint of a peer's certificate in its signed record, if there is one."""
    open_peers: Callable[[], Iterable[PeerId]]
    """Who accepts connections from anywhere."""
    open_hosts: Callable[[], Sequence[str]]
    """Numeric addresses at which others reach our carrier's port."""
    is_open: Callable[[], bool]
    """Whether anyone can do that, and not just some."""
    claim: Callable[[], bytes] = bytes
    """Why we may take part, as long as the others do not know."""


@dataclass(slots=True)
class _Failure:
    reason: str
    pause_s: float
    again_at: float


@dataclass(frozen=True, slots=True)
class _Trusted:
    certificate: bytes
    claim: bytes


class Rendezvous:
    """`async with Rendezvous(...)` opens the carrier's port; nobody is expected there before `begin`.

    listen: on which address and port, 0 for any; folder: where the certificate is kept. punched: hears of each
    connection that was to be punched. Entering raises PortInUse, ListenError, and OSError if the folder can't be used.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        listen: Endpoint,
        folder: FilePath,
        meter: Meter,
        punched: Punched = _not_counted,
    ) -> None:
        self._identity = identity
        self._listen = listen
        self._file = folder / "carrier.pem"
        self._meter = meter
        self._punched = punched
        self._transport: Transport | None = None
        self._known: Acquaintances | None = None
        self._trusted: dict[PeerId, _Trusted] = {}
        self._connections: dict[PeerId, list[Connection]] = {}
        """Of each peer, the newest last: when two dial each other there are two."""
        self._attempts: dict[PeerId, asyncio.Task[None]] = {}
        self._heard: dict[PeerId, Meet] = {}
        """What was said by those who met us during an attempt."""
        self._arrivals: dict[PeerId, asyncio.Event] = {}
        self._failures: dict[PeerId, _Failure] = {}
        self._favours = Favours()
        self._punching: set[PeerId] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.certificate = await asyncio.to_thread(Certificate.load_or_create, self._file, self._identity.peer_id)
        self.carrier = Carrier(
            self._identity,
            self.certificate,
            listen=self._listen,
            meter=self._meter,
            expects=self._expects,
            established=self._established,
            over=self._over,
        )
        self._observers = Observers(self._identity.peer_id, self.carrier, self)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.carrier)
            stack.push_async_callback(self._stop)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.__aexit__(kind, error, trace)

    async def begin(self, transport: Transport, known: Acquaintances) -> None:
        """Meet others over `transport` from now on."""
        self._transport, self._known = transport, known
        await transport.serve(meeting.CHANNEL, self._on_meet)
        self._spawn(self._keep_looking())

    def serve(self, channel: str, handler: StreamHandler) -> None:
        """Accept streams on `channel`."""
        self.carrier.handlers[channel] = handler

    # -- connections

    def connection(self, peer: PeerId) -> Connection | None:
        """The newest connection to `peer`."""
        found = self._connections.get(peer)
        return found[-1] if found else None

    async def connect(self, peer: PeerId, *, within_s: float) -> Connection | None:
        """A connection to `peer`, sought if there is none and that may help; it may come later than `within_s`."""
        there = self.connection(peer)
        if there is not None or self._known is None:
            return there
        if peer not in self._attempts and self.pauses(peer):
            return None
        attempt = self._attempts.get(peer) or self._attempt(peer, self._meet(peer))
        await asyncio.wait([attempt], timeout=within_s)
        return self.connection(peer)

    def pauses(self, peer: PeerId) -> bool:
        """Whether a connection to `peer` was sought in vain not long ago."""
        failed = self._failures.get(peer)
        return failed is not None and time.monotonic() < failed.again_at

    def why_not(self, peer: PeerId) -> str:
        """Why there is no direct connection to `peer`, in words; empty if none was sought."""
        failed = self._failures.get(peer)
        return failed.reason if failed is not None else ""

    def _expects(self, peer: PeerId) -> bytes | None:
        trusted = self._trusted.get(peer)
        return trusted.certificate if trusted is not None and not self._refused(peer, trusted) else None

    def _established(self, connection: Connection) -> None:
        peer = connection.peer
        if peer in self._punching:
            connection.path = Path.PUNCHED
        found = self._connections.setdefault(peer, [])
        found.append(connection)
        for oldest in found[:-MAX_PER_PEER]:
            self._spawn(oldest.close())
        self._failures.pop(peer, None)
        if (arrival := self._arrivals.get(peer)) is not None:
            arrival.set()
        log.debug("a direct connection to %s (%s)", nickname(peer), connection.path)
        if len(self._connections) > MAX_CONNECTIONS:
            self._close_one_idle()

    def _over(self, connection: Connection, why: str) -> None:
        found = self._connections.get(connection.peer, [])
        if connection in found:
            found.remove(connection)
            log.debug("the direct connection to %s is over: %s", nickname(connection.peer), why)
        if not found:
            self._connections.pop(connection.peer, None)
        self._observers.over(connection)

    def _close_one_idle(self) -> None:
        idle = [found for found in self._connections.values() if all(one.idle for one in found)]
        for one in min(idle, key=lambda found: max(one.used_at for one in found), default=()):
            self._spawn(one.close())

    # -- meeting

    def _attempt(self, peer: PeerId, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Seek a connection to `peer`; there is one attempt at a time, whoever began it."""
        task = self._spawn(work)
        self._attempts[peer] = task
        task.add_done_callback(lambda _: self._attempt_ended(peer))
        return task

    def _attempt_ended(self, peer: PeerId) -> None:
        self._attempts.pop(peer, None)
        self._heard.pop(peer, None)

    async def _meet(self, peer: PeerId) -> None:
        assert self._transport is not None
        mine = self._introduction()
        try:
            raw = await self._transport.request(peer, meeting.CHANNEL, meeting.encode(mine), timeout_s=ASK_S)
            theirs = meeting.decode(raw)
            self._trust(peer, theirs)
        except TransportError as error:
            if peer not in self._heard:
                self._failed(peer, f"it can't be met: {error}")
                return
            theirs = self._heard[peer]  # it has met us meanwhile, and does its part
        except WireError as error:
            self._failed(peer, f"it introduces itself wrongly: {error}")
            return
        await self._act(peer, theirs, meeting.step(mine, theirs, first=True))

    async def _on_meet(self, peer: PeerId, raw: bytes) -> bytes:
        theirs, mine = meeting.decode(raw), self._introduction()
        self._trust(peer, theirs)
        for connection in list(self._connections.get(peer, ())):
            if connection.age_s > FRESH_S:  # it knows of none: it broke, and only one side has noticed
                self._spawn(connection.close())
        step = meeting.step(mine, theirs, first=False)
        if peer in self._attempts:
            self._heard[peer] = theirs
        elif self._grants(peer, step):
            self._attempt(peer, self._act(peer, theirs, step))
        return meeting.encode(mine)

    def _grants(self, peer: PeerId, step: meeting.Step) -> bool:
        """Whether we do as `peer` asks; else nothing has failed, and we may seek it ourselves as before."""
        assert self._known is not None
        known = self._known.pinned(peer) is not None
        granted = self._favours.grant(peer, step, known=known, now=time.monotonic())
        if not granted:
            log.debug("%s, or many, asked for more connections than we make in so short a time", nickname(peer))
        return granted

    async def _act(self, peer: PeerId, theirs: Meet, step: meeting.Step) -> None:
        try:
            match step:
                case Dial(places):
                    await self._dial(peer, theirs, places)
                case Punch(place):
                    await self._punch(peer, place)
                case Wait():
                    await self._arrival(peer, within_s=WAIT_S)
                case Give(reason):
                    raise NoConnection(reason)
        except Refused as error:
            log.warning("no direct connection to %s: %s", nickname(peer), error)
            self._failed(peer, str(error))
        except NoConnection as error:
            self._failed(peer, str(error))

    async def _dial(self, peer: PeerId, theirs: Meet, places: Sequence[Endpoint]) -> None:
        # from the port on which we listen, so that the other side sees how that looks from outside
        seen = theirs.reach is Reach.OPEN and not self._known_open
        fault = NoConnection("it names no place")
        for place in places:
            try:
                connection = await self.carrier.dial(peer, place, keep_port=seen)
            except NoConnection as error:
                fault = error
                continue
            self._observers.dialled(connection, place)
            if connection.keeps_port and theirs.second:
                await self._observers.look_through(Endpoint.parse(theirs.second), peer)
            return
        raise fault

    async def _punch(self, peer: PeerId, place: Endpoint) -> None:
        self._punching.add(peer)
        punching = asyncio.ensure_future(self.carrier.punch(peer, place))
        arriving = asyncio.ensure_future(self._arrival(peer, within_s=WAIT_S))
        try:
            await asyncio.wait([punching, arriving], return_when=asyncio.FIRST_COMPLETED)
            if arriving.done() and arriving.exception() is None:
                return
            await punching
        finally:
            self._punching.discard(peer)
            self._punched(self.reach, connected=self.connection(peer) is not None)
            for task in (punching, arriving):
                task.cancel()
            await asyncio.gather(punching, arriving, return_exceptions=True)

    async def _arrival(self, peer: PeerId, *, within_s: float) -> None:
        """Wait until `peer` has come to us. Raises NoConnection."""
        if self.connection(peer) is not None:
            return
        arrival = self._arrivals.setdefault(peer, asyncio.Event())
        try:
            async with asyncio.timeout(within_s):
                await arrival.wait()
        except TimeoutError:
            raise NoConnection(f"it did not come within {within_s:.0f} s") from None
        finally:
            self._arrivals.pop(peer, None)

    def _failed(self, peer: PeerId, reason: str) -> None:
        if self.connection(peer) is not None:  # it came to us while we went to it in vain
            return
        before = self._failures.get(peer)
        pause_s = min(MAX_RETRY_S, 2 * before.pause_s) if before is not None else RETRY_S
        if len(self._failures) >= MAX_TRUSTED:
            self._failures.pop(next(iter(self._failures)))
        self._failures[peer] = _Failure(reason, pause_s, time.monotonic() + pause_s)
        log.debug("no direct connection to %s: %s", nickname(peer), reason)

    # -- who may

    def _trust(self, peer: PeerId, said: Meet) -> None:
        """Take what `peer` says of itself. Raises WireError if it may not connect, or shows another certificate."""
        assert self._known is not None
        trusted = _Trusted(said.certificate, said.claim)
        refused = self._refused(peer, trusted)
        if refused:
            raise WireError("not expected", refused)
        self._trusted.pop(peer, None)
        self._trusted[peer] = trusted
        if len(self._trusted) > MAX_TRUSTED:  # any number of strangers may meet us, and cost nobody its connection
            self._trusted.pop(next((one for one in self._trusted if one not in self._connections), peer))

    def _refused(self, peer: PeerId, trusted: "_Trusted") -> str:
        """Why `peer` may not connect; empty if it may."""
        if self._known is None:
            return "we are just starting"
        pinned = self._known.pinned(peer)
        if pinned is not None and pinned != fingerprint(trusted.certificate):
            return "another certificate than its record names"
        return self._known.refuses(peer, trusted.claim) or ""

    # -- how we are seen

    @property
    def reach(self) -> Reach:
        """How others can reach our carrier."""
        return Reach.OPEN if self._known_open else self._observers.reach

    @property
    def outside(self) -> str:
        """How others see our carrier's port, "HOST:PORT"; empty while nobody has said."""
        return self._observers.outside

    @property
    def _known_open(self) -> bool:
        return self._known is not None and self._known.is_open() and bool(self._known.open_hosts())

    def _introduction(self) -> Meet:
        assert self._known is not None
        hosts, carrier = self._known.open_hosts(), self.carrier
        return Meet(
            certificate=self.certificate.der,
            reach=self.reach,
            open=tuple(str(Endpoint(host, carrier.port)) for host in hosts)[:8],
            local=tuple(str(Endpoint(host, carrier.port)) for host in carrier.hosts)[:8],
            outside=self.outside,
            second=str(Endpoint(hosts[0], carrier.second_port)) if hosts and self._known_open else "",
            claim=self._known.claim(),
        )

    async def _keep_looking(self) -> None:
        soon_until = time.monotonic() + SOON_FOR_S
        while True:
            await self._cut_refused()
            if self._known is not None and not self._known_open:
                await self._observers.look(self._known.open_peers())
            settled = self.reach is not Reach.UNKNOWN or time.monotonic() > soon_until
            await asyncio.sleep(LOOK_S if settled else SOON_S)

    async def _cut_refused(self) -> None:
        """End the connections of those who may no longer have one."""
        for peer in list(self._connections):
            trusted = self._trusted.get(peer)
            why = self._refused(peer, trusted) if trusted is not None else "it never introduced itself"
            for connection in list(self._connections.get(peer, ())) if why else ():
                log.info("the direct connection to %s is cut: %s", nickname(peer), why)
                await connection.close()

    # -- tasks

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("seeking direct connections failed", exc_info=task.exception())

    async def _stop(self) -> None:
        self._known = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in [one for found in list(self._connections.values()) for one in list(found)]:
            await connection.close()
