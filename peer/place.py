"""A peer in the network of a run, before it has a role: host, direct connections, swarm and exporter together."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from dugnad.coordinator import equivocation
from dugnad.coordinator.messages import Genesis
from dugnad.coordinator.surroundings import Surroundings
from dugnad.dht import allowance, hello, speed
from dugnad.dht.budget import Budget
from dugnad.dht.direct import Direct
from dugnad.dht.evidence import Proofs
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId, nickname, peer_id_of, public_key_of, verify
from dugnad.dht.invite import Invite, Pass
from dugnad.dht.listening import everywhere
from dugnad.dht.multiaddrs import is_direct, port_of, reaching_out
from dugnad.dht.outside import Ways
from dugnad.dht.paths import Abilities
from dugnad.dht.records import owner_of
from dugnad.dht.rendezvous import Acquaintances, Rendezvous
from dugnad.dht.swarm import Swarm
from dugnad.dht.transport import BootstrapError, NetworkDown
from dugnad.monitoring.exporter import Exporter
from dugnad.monitoring.metrics import Metrics
from dugnad.peer.face import Face
from dugnad.peer.folder import Folder, RoleName
from dugnad.peer.network import Listened, Network

log = logging.getLogger(__name__)

_REMEMBER_S = 5.0
_GREET_AGAIN_S = 5.0
UNKNOWN_UPLINK = 1.0
"""Until uplinks are measured, all count as the same."""


@dataclass(frozen=True, slots=True)
class Way:
    """Into which run, 32 bytes and its recipe's name, and through whom: the addresses of an invite, or none."""

    run: bytes
    name: str
    organizer: PeerId
    bootstrap: tuple[str, ...] = ()
    invite: Invite | None = None
    """What lets us in, if we need that."""

    @classmethod
    def of(cls, invite: Invite) -> Self:
        """The way that an invite shows."""
        return cls(invite.run, invite.name, peer_id_of(invite.organizer), invite.addresses, invite)

    @property
    def invited(self) -> list[PeerId]:
        """The peers that the invite names."""
        return list(dict.fromkeys(map(_peer_at, self.bootstrap)))


@dataclass(frozen=True, slots=True)
class Place:
    """A peer in the network, before it has a role."""

    identity: Identity
    host: Host
    direct: Direct
    rendezvous: Rendezvous
    swarm: Swarm
    face: Face
    budget: Budget
    """What we give away: to those who fetch, and to those for whom we relay."""
    url: str
    """Of the exporter."""

    def contacts(self) -> list[PeerId]:
        """The members of the run that gossip tells of."""
        return list(self.swarm.roles())

    def abilities(self) -> Abilities:
        """Where and how we can be reached."""
        return Abilities(self.host.addresses(), self.rendezvous.reach, UNKNOWN_UPLINK, self.face.claim)

    def surroundings(self, genesis: Genesis, folder: Folder) -> Surroundings:
        """What a role here is given."""
        return Surroundings(
            identity=self.identity,
            genesis=genesis,
            transport=self.direct,
            directory=folder.path,
            metrics=self.face.metrics,
            budget=self.budget,
            abilities=self.abilities,
            contacts=self.contacts,
            quarantined=self.swarm.quarantined,
            decisions=self.swarm.decisions,
            clock=self.swarm.now,
            accuse=self.accuse,
        )

    def accuse(self, first: bytes, second: bytes) -> None:
        """Spread the proof that a voter lies."""
        self.swarm.accuse(equivocation.SORT, first, second)

    def shown(self) -> tuple[str, ...]:
        """The addresses that lead to us from as far away as can be."""
        return reaching_out(self.host.addresses())

    def invite(self, genesis: Genesis, name: str, ticket: Pass | None) -> Invite:
        """An invite that leads to us."""
        return Invite(genesis.run, public_key_of(genesis.organizer), self.shown(), name, ticket)


@contextlib.asynccontextmanager
async def placed(role: RoleName, folder: Folder, way: Way, network: Network, *, may_wait: bool) -> AsyncIterator[Place]:
    """Be a peer of the run, whom others can see and ask; may_wait: also while none of them is there.

    The folder keeps where that was.
    """
    known = tuple(dict.fromkeys((*way.bootstrap, *folder.remembered())))
    peers = [peer for peer in dict.fromkeys(map(_peer_at, known)) if peer != folder.identity().peer_id]
    try:
        async with _connected(role, folder, way, network, known, peers) as place:
            yield place
    except BootstrapError as error:
        if not may_wait:
            raise
        tried = ", ".join(f"{address} {reason}" for address, reason in error.failures)
        log.info("nobody is there yet, and we wait for them: %s", tried)
    else:
        return
    async with _connected(role, folder, way, network, (), peers) as place:
        for address in known:
            await place.host.learn(_peer_at(address), (address,))
        yield place


def _peer_at(address: str) -> PeerId:
    """Whose multiaddr that is."""
    return PeerId(address.rpartition("/p2p/")[2])


@contextlib.asynccontextmanager
async def _connected(
    role: RoleName,
    folder: Folder,
    way: Way,
    network: Network,
    bootstrap: tuple[str, ...],
    known: Sequence[PeerId],
) -> AsyncIterator[Place]:
    identity = folder.identity()
    face = Face(Metrics(role, way.run.hex()[:8], nickname=nickname(identity.peer_id)))
    face.claim = way.invite.claim(identity.peer_id) if way.invite is not None else b""
    metrics = face.metrics
    async with (
        Exporter(
            metrics, face.status, port=network.metrics_port, decide=face.decide, decisions=face.decisions
        ) as exporter,
        Rendezvous(
            identity, listen=network.bulk, folder=folder.path, meter=metrics.bytes_moved, punched=metrics.punched
        ) as rendezvous,
        Host(
            identity,
            listen=everywhere(network.listen),
            bootstrap=bootstrap,
            meter=metrics.bytes_moved,
            state_dir=folder.path,
            owner_of=owner_of,
            ways=Ways(announce=network.announce, extra_ports=(rendezvous.carrier.port,)),
            refused=metrics.rejected_message,
        ) as host,
        _greeted(host, way, face, role, known),
        Swarm(
            host,
            identity,
            way.run,
            role=role,
            directory=folder.path,
            refused=metrics.rejected_message,
            progress=face.progress,
            reach=lambda: rendezvous.reach,
            certificate=rendezvous.certificate.fingerprint,
            passed=metrics.message_passed,
            proofs=Proofs({equivocation.SORT: equivocation.checker(verify)}),
            organizer=way.organizer,
        ) as swarm,
    ):
        budget = Budget.of_mbit(network.give_mbit)
        await allowance.serve(host, budget, bars=face.bars)
        await rendezvous.begin(host, _acquaintances(host, rendezvous, swarm, face))
        face.swarm, face.direct = swarm, Direct(host, rendezvous)
        await _let_measure(host, rendezvous, face)
        place = Place(identity, host, face.direct, rendezvous, swarm, face, budget, exporter.url)
        bulk_port = rendezvous.carrier.port
        folder.keep_listened(
            Listened(said=network.said, port=tcp_port(host), bulk_port=bulk_port, addresses=place.shown())
        )
        yield place


async def _let_measure(host: Host, rendezvous: Rendezvous, face: Face) -> None:
    """Serve strangers too; not on `Direct`, for which whoever looks in once would count as a pair."""
    answer = speed.service(bars=face.bars)
    rendezvous.serve(speed.CHANNEL, answer)
    await host.serve_stream(speed.CHANNEL, answer)


def _acquaintances(host: Host, rendezvous: Rendezvous, swarm: Swarm, face: Face) -> Acquaintances:
    return Acquaintances(
        refuses=face.refuses,
        pinned=swarm.fingerprint_of,
        open_peers=lambda: dict.fromkeys((*host.contacts.peers, *swarm.open_peers())),
        open_hosts=lambda: host.open_hosts(rendezvous.carrier.port),
        is_open=lambda: host.is_open_at(rendezvous.carrier.port),
        claim=lambda: face.claim,
    )


@contextlib.asynccontextmanager
async def _greeted(host: Host, way: Way, face: Face, role: RoleName, known: Sequence[PeerId]) -> AsyncIterator[None]:
    """Say hello, and answer it, before anything else: who does not fit should hear why. Raises TurnedAway.

    If nobody is there who answers, all who are `known` are asked again and again until somebody does; what they say
    against us is raised in a group then.
    """
    await hello.serve(host, way.run, way.name, judge=face.judge, seen=host.seen_at)
    if not known or await _greet_all(host, way, role, host.contacts.peers):
        yield
        return
    async with asyncio.TaskGroup() as tasks:
        greeting = tasks.create_task(_keep_greeting(host, way, role, known))
        yield
        greeting.cancel()


async def _keep_greeting(host: Host, way: Way, role: RoleName, peers: Sequence[PeerId]) -> None:
    while not await _greet_all(host, way, role, peers):
        await asyncio.sleep(_GREET_AGAIN_S)


async def _greet_all(host: Host, way: Way, role: RoleName, peers: Sequence[PeerId]) -> bool:
    """Say hello to those, first to whom the invite names; whether anyone answered. Raises TurnedAway."""
    invited = [peer for peer in way.invited if peer in peers]
    others = [peer for peer in peers if peer not in invited]
    return await _greet(host, way, role, invited) or await _greet(host, way, role, others)


async def _greet(host: Host, way: Way, role: RoleName, peers: Sequence[PeerId]) -> bool:
    """Say hello to those; whether anyone answered. Raises TurnedAway."""
    try:
        return await hello.greet(host, peers, way.run) is not None
    except hello.TurnedAway as error:
        if role == "coordinator" and error.code == hello.NOT_ADMITTED:
            return True  # nobody admits a coordinator: it shows its delegation to those who lead
        if error.code == hello.OTHER_RUN and not set(way.invited).intersection(peers):
            log.info("%s", error)  # one whom we remember, and who is somewhere else by now
            return False
        raise


def tcp_port(host: Host) -> int:
    """The port that the daemon took. Raises NetworkDown if it names none."""
    for address in reversed(host.addresses()):  # the nearest first: a router may give those far away another port
        if is_direct(address) and (port := port_of(address)) is not None:
            return port
    raise NetworkDown("the network daemon names no address at which others could reach us; choose another --host")


async def keep_remembering(place: Place, folder: Folder) -> None:
    """Keep where the others are, so that we find them again when the peers of our invite are gone, and where we are."""
    before: object = None
    failing = False
    while True:
        await asyncio.sleep(_REMEMBER_S)
        others, ours = place.swarm.addresses(), place.shown()
        if (others, ours) == before:
            continue
        try:
            if others:
                folder.remember(others)
            last = folder.listened()
            if last is not None and ours:
                folder.keep_listened(msgspec.structs.replace(last, addresses=ours))
        except OSError as error:  # a full disk: what stands there from before still helps
            if not failing:
                log.warning("%s: addresses can't be kept for the next start: %s", folder.path, error.strerror)
            failing = True
        else:
            before, failing = (others, ours), False
