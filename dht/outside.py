"""How the world reaches a host: whether it is open to all, and else through which relays.

Found out at the start, while nothing runs on the daemon yet: members that we are connected to try our ports. Who is
open restarts its daemon as a relay for others, and makes sure that it is a good one. Who is not takes places at relays.
A router that lets members in may do so because we are connected to them (address-dependent filtering, RFC 4787), and
keep all others out: who is behind one is open only if the router, or the user, says so.
Both are looked after as long as the host lives. Where only this machine may connect, nothing of all that happens; and
within a private network nobody judges, and no relay is at hand, so that nothing comes of it either.
"""

import asyncio
import contextlib
import ipaddress
import logging
import random
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dugnad.dht import circuit, control, reachability
from dugnad.dht.circuit import RelayRefused
from dugnad.dht.control import Connection
from dugnad.dht.daemon import Daemon, DaemonRefused
from dugnad.dht.identity import PeerId, nickname
from dugnad.dht.listening import card_addresses
from dugnad.dht.multiaddrs import host_of, in_order, ip_of, is_direct, is_local, is_public, on_tcp, port_of
from dugnad.dht.paths import Reach
from dugnad.dht.reachability import Reachability
from dugnad.dht.relaying import restart_as_relay
from dugnad.dht.relays import Relays
from dugnad.dht.router import LEASE_S, Router
from dugnad.dht.transport import TransportError
from dugnad.dht.wire import WireError

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often it is looked whether the connections to relays are there."""
RECHECK_S = 300.0
RECHECK_UNKNOWN_S = 30.0
STRAIGHT_S = 120.0
"""How long an open member is left behind a relay when it could not be reached directly."""
MAP_AGAIN_S = LEASE_S / 2
RESOLVE_S = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ways:
    """What is known beforehand of how the world reaches a host."""

    announce: str | None = None
    """A multiaddr of a TCP port at which, by the user's word, all reach us: as behind a router told to forward it."""
    extra_ports: tuple[int, ...] = ()
    """TCP ports on which others of our services listen, at most 3: it is found out whether all reach them, too."""


class Outside:
    """The outer side of a host on `daemon`, which is called `peer_id`.

    request: asks a peer on the dial-back channel. open_members: the members that are open to all, each under a
    multiaddr without its name.
    """

    def __init__(
        self,
        daemon: Daemon,
        peer_id: PeerId,
        ways: Ways,
        *,
        request: reachability.Request,
        open_members: Callable[[], Mapping[PeerId, str]],
    ) -> None:
        self.reach = Reach.UNKNOWN
        self.found = Reachability()
        """What others found out when they tried last."""
        self.announced_ip: str | None = None
        """The IP address of what the user announced, be it by name."""
        self.changed = asyncio.Event()
        """Set whenever `addresses` changed; whoever tells others of them clears it."""
        self._daemon = daemon
        self._peer_id = peer_id
        self._ways = ways
        self._request = request
        self._open_members = open_members
        self._relays = Relays(peer_id)
        self._far = not all(is_local(address) for address in daemon.listen)
        self._router = Router()
        self._map_again_s = 0.0
        """When the router is asked again to pass our ports on."""
        self._straight_s: dict[PeerId, float] = {}
        """When it is tried again to connect to an open member directly."""
        self._cards: frozenset[str] = frozenset()
        """Their IP addresses, in words."""
        self._own: tuple[str, ...] = ()
        """The multiaddrs of those on which the daemon listens."""
        self._addresses: tuple[str, ...] = ()
        self._failing: set[str] = set()
        """What went wrong when it was done last."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Our multiaddrs without our name, those that reach farthest first."""
        return self._addresses

    @property
    def outside_ports(self) -> dict[int, int]:
        """Those of our TCP ports that others reached, and the ports outside that lead to them, mostly the same."""
        ports = (self._port(), *self._ways.extra_ports)
        pairs = {port: self._outside_port(port) for port in ports if port is not None}
        return {port: outside for port, outside in pairs.items() if outside in self.found.open_ports}

    @property
    def is_hidden(self) -> bool:
        """Whether others were seen not to reach us, or not all of them."""
        return self.found.num_answers > 0 and self.reach is not Reach.OPEN

    def is_open_at(self, port: int) -> bool:
        """Whether anyone reaches a TCP port of ours, and not just some whom a router lets in."""
        if self._ways.announce is not None or not self.found.num_answers:
            return self.reach is Reach.OPEN
        return self._is_reached(port) and self._is_for_all(port)

    async def look_up(self) -> None:
        """Learn anew which addresses the network cards have, and the one announced. Raises NetworkDown."""
        self.announced_ip = await _ip_behind(self._ways.announce) if self._ways.announce else None
        self._cards = frozenset(map(str, card_addresses()))
        # the daemon takes what four others say that they see of it for an address of its own
        self._own = tuple(one for one in await control.identify(self._daemon) if str(ip_of(one)) in self._cards)
        self._arrange()

    async def find_out(self, members: Sequence[PeerId]) -> bool:
        """Whether we are open, by the word of whom we are connected to; True if the daemon was restarted for that.

        members: those of them that we joined through. Raises NetworkDown.
        """
        await self.look_up()
        if not self._far:
            return False
        judges, alone = self._judges(await control.connections(self._daemon)), not members
        looking = [self._router.discover()] if (judges or alone) and self._behind_router() else []
        found, _ = await asyncio.gather(self._ask(judges), asyncio.gather(*looking, *self._due_places()))
        self._learn(found, alone=alone)
        if self.reach is not Reach.OPEN and looking:
            await self._have_passed_on(judges, alone=alone)
        if self.reach is not Reach.OPEN:
            return False
        listen = [self._with_port(address) for address in self._daemon.listen]
        await restart_as_relay(self._daemon, self._peer_id, listen)
        return True

    async def keep(self) -> None:
        """Look after it, until cancelled; what fails is done again, whatever it was: nobody else would."""
        if not self._far:
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_open())
                while True:
                    await asyncio.sleep(LOOK_S)
                    await self._attempt("looking after relays", self._look(tasks))
        finally:
            await self._router.forget()

    async def _attempt(self, what: str, work: Awaitable[None]) -> None:
        """Do it, and say that it failed if it did not fail before."""
        try:
            await work
        except Exception as error:
            if what not in self._failing:
                ours = not isinstance(error, TransportError)
                logger.warning("%s failed, and is tried again: %s", what, error, exc_info=ours)
            self._failing.add(what)
        else:
            self._failing.discard(what)

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        """See to what is lost, or could be better. Raises NetworkDown."""
        connected = await control.connections(self._daemon)
        if self.reach is not Reach.OPEN:
            self._relays.connected({peer for peer, at in connected if is_direct(at)}, now=time.monotonic())
            self._arrange()
            for place in self._due_places():
                tasks.create_task(self._attempt("taking a place at a relay", place))
        for peer, address in self._detours(connected).items():
            tasks.create_task(self._attempt("leaving a relay", self._go_straight(peer, address)))

    # -- open or not

    async def _keep_open(self) -> None:
        """See again and again whether others reach us, and renew what the router does for us."""
        self._map_again_s = time.monotonic() + MAP_AGAIN_S
        while True:
            await asyncio.sleep(RECHECK_S if self.found.num_answers else RECHECK_UNKNOWN_S)
            await self._attempt("having our ports tried", self._recheck())

    async def _recheck(self) -> None:
        """Have others try anew, with what the router does for us, as long as that helps. Raises NetworkDown."""
        if is_due := time.monotonic() >= self._map_again_s:
            await self._renew()
        judges = self._judges(await control.connections(self._daemon))
        self._learn(await self._ask(judges), alone=False)
        # the line may have another address, as some have every morning, or the router may have been restarted
        if self.reach is not Reach.OPEN and self._router.outside_ports and not is_due:
            await self._renew()
            self._learn(await self._ask(judges), alone=False)

    async def _renew(self) -> None:
        """Have the router, as it is now, go on passing on what it was told to."""
        if self._router.outside_ports:
            await self._router.discover()
            await self._router.pass_on(list(self._router.outside_ports))
        self._map_again_s = time.monotonic() + MAP_AGAIN_S

    @staticmethod
    def _judges(connected: Sequence[Connection]) -> set[PeerId]:
        """Who sees us from outside."""
        return {peer for peer, at in connected if is_public(at)}

    def _behind_router(self) -> bool:
        """Whether we let everyone in, and may be in a private network."""
        any_card = any(host_of(address) in ("0.0.0.0", "::") for address in self._daemon.listen)
        return any_card and self._global_ip() is None

    async def _have_passed_on(self, judges: Collection[PeerId], *, alone: bool) -> None:
        """Ask the router for our ports, and others again."""
        port = self._port()
        if port is not None:
            await self._router.pass_on((port, *self._ways.extra_ports))
        if port in self._router.outside_ports:
            self._learn(await self._ask(judges), alone=alone)
        if self.reach is not Reach.OPEN:
            await self._router.forget()

    async def _ask(self, judges: Collection[PeerId]) -> Reachability:
        """What some of `judges` find out; of ports that the router passes on, they try those outside."""
        port = self._port()
        if port is None or not judges:
            return Reachability()
        ports = [self._outside_port(port) for port in (port, *self._ways.extra_ports)]
        chosen = random.sample(sorted(judges), min(len(judges), reachability.MAX_ASKED))
        return await reachability.ask(chosen, ports, self._request)

    def _learn(self, found: Reachability, *, alone: bool) -> None:
        """Draw the conclusion; alone: nobody is there who could have been asked."""
        if found.num_answers or alone:
            self.found = found
        elif self._ways.announce is None:
            return
        trusted, port = self._ways.announce is not None or (alone and self._outside_ip() is not None), self._port()
        reached = port is not None and self._is_reached(port)
        reach = Reach.OPEN if trusted or (reached and self._is_for_all(port)) else Reach.UNKNOWN
        if reach is not self.reach:
            hidden = "not all others reach us" if reached else "others do not reach us"
            words = "others reach us from anywhere" if reach is Reach.OPEN else f"{hidden}: we go through relays"
            logger.info("%s", words)
        self.reach = reach
        self._arrange()

    def _is_reached(self, port: int) -> bool:
        return self._outside_port(port) in self.found.open_ports

    def _is_for_all(self, port: int | None) -> bool:
        """Whether a port that some reach is open to all: no router is there, or the only one was told to pass it on."""
        told = port in self._router.outside_ports and self._router.outside_ip in (None, self.found.seen_ip)
        return told or self.found.seen_ip in self._cards

    def _outside_ip(self) -> str | None:
        """As others saw it; or else that of a network card, or of the router, if it is one that all can dial."""
        router = self._router.outside_ip if self._router.outside_ports else None
        believed = router if router is not None and ipaddress.ip_address(router).is_global else None
        return self.found.seen_ip or self._global_ip() or believed

    def _global_ip(self) -> str | None:
        """Of our network cards, if one has such an address; of IPv6 only where there is no other, as not all use it."""
        by_ipv4 = [address for address in self._own if address.startswith("/ip4/") and not is_local(address)]
        return next((str(ip_of(address)) for address in by_ipv4 or self._own if is_public(address)), None)

    def _port(self) -> int | None:
        """On which the daemon listens."""
        ports = [port_of(address) for address in self._own if is_direct(address)]
        return next((port for port in ports if port is not None), None)

    def _outside_port(self, port: int) -> int:
        """By which others reach a port of ours."""
        return self._router.outside_ports.get(port, port)

    def _arrange(self) -> None:
        outside: list[str] = []
        for_some: list[str] = []
        ip, port = self._outside_ip(), self._port()
        if self.reach is Reach.OPEN:
            outside += [self._ways.announce] if self._ways.announce else []
            if ip and port and (self._is_reached(port) or not self._ways.announce):
                outside.append(on_tcp(ip, self._outside_port(port)))
            outside += [address for address in self._own if is_public(address) and address.startswith("/ip6/")]
        elif ip and port and self._is_reached(port):
            for_some.append(on_tcp(ip, self._outside_port(port)))
        circuits = self._relays.addresses() if self.reach is not Reach.OPEN else ()
        arranged = in_order(outside, circuits, (*self._own, *for_some))
        if arranged != self._addresses:
            self._addresses = arranged
            self.changed.set()

    def _with_port(self, address: str) -> str:
        """A multiaddr to listen on again, with the port that the daemon took."""
        family = address.split("/")[1]
        ports = (port_of(own) for own in self._own if own.startswith(f"/{family}/"))
        return address.removesuffix("/tcp/0") + f"/tcp/{next(ports)}" if address.endswith("/tcp/0") else address

    # -- behind others

    def _due_places(self) -> list[Coroutine[Any, Any, None]]:
        """What there is to do to have as many places at relays as we want; each takes 5 s at most."""
        self._relays.know(self._open_members())
        return [self._take_place(peer, at) for peer, at in self._relays.to_ask(now=time.monotonic())]

    async def _take_place(self, peer: PeerId, address: str) -> None:
        place = None
        try:
            async with asyncio.timeout(circuit.ANSWER_S):
                await control.connect(self._daemon, peer, (address,))
                place = await circuit.reserve(self._daemon, peer)
                await control.keep_connected(self._daemon, peer, "relay")
        except (TransportError, TimeoutError, DaemonRefused, RelayRefused, WireError) as error:
            logger.debug("no place at the relay %s: %s", nickname(peer), error)
            place = None
        finally:  # without an outcome, be it a fault of ours, it would never be asked again
            if place is None:
                self._relays.failed(peer, now=time.monotonic())
            else:
                self._relays.granted(peer, place, now=time.monotonic())
        self._arrange()

    def _detours(self, connected: Sequence[Connection]) -> dict[PeerId, str]:
        """The open members to whom we are connected through a relay only: they dialled us first."""
        direct, now = {peer for peer, at in connected if is_direct(at)}, time.monotonic()
        relayed = {peer for peer, at in connected if not is_direct(at)} - direct
        opened = self._open_members() if relayed else {}
        return {peer: opened[peer] for peer in relayed & opened.keys() if now >= self._straight_s.get(peer, 0.0)}

    async def _go_straight(self, peer: PeerId, address: str) -> None:
        """Connect anew, as libp2p dials nobody to whom it is connected; what was under way is lost, and said again."""
        now = time.monotonic()
        self._straight_s = {other: at_s for other, at_s in self._straight_s.items() if now < at_s}
        self._straight_s[peer] = now + STRAIGHT_S
        host, port = host_of(address), port_of(address)
        if host is None or port is None or not await reachability.accepts(host, port):
            return
        with contextlib.suppress(TransportError, DaemonRefused):
            await control.disconnect(self._daemon, peer)
            await control.connect(self._daemon, peer, (address,))


async def _ip_behind(address: str) -> str | None:
    """The IP address that a multiaddr leads to; of a name, what it stands for now."""
    if (ip := ip_of(address)) is not None:
        return str(ip)
    with contextlib.suppress(OSError, TimeoutError, ValueError):  # the last of a name that can't be
        async with asyncio.timeout(RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(host_of(address), None, type=socket.SOCK_STREAM)
            return str(found[0][4][0])
    return None
