"""The two roles as processes: host, swarm, exporter and role together, ended in order.

Ctrl+C (or SIGTERM) once: finish what others count on, then leave. Twice: leave now.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from dugnad.configs.recipe import Recipe, decode, encode
from dugnad.coordinator import equivocation
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Genesis, Welcome
from dugnad.coordinator.service import Coordinator
from dugnad.coordinator.surroundings import Surroundings
from dugnad.coordinator.sync import Asker, SyncError
from dugnad.dht.budget import GIVE_MBIT
from dugnad.dht.daemon import everywhere
from dugnad.dht.evidence import Proofs
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId, nickname, public_key_of, verify
from dugnad.dht.invite import Invite, check_expiry, encode_invite
from dugnad.dht.multiaddrs import is_direct, is_local, on_tcp, port_of
from dugnad.dht.outside import Ways
from dugnad.dht.records import owner_of
from dugnad.dht.swarm import Swarm
from dugnad.dht.transport import BootstrapError, NetworkDown
from dugnad.monitoring.exporter import Exporter
from dugnad.monitoring.metrics import Metrics
from dugnad.peer.face import Face
from dugnad.peer.folder import Folder, FolderError, RoleName
from dugnad.peer.lifecycle import Abilities
from dugnad.peer.numerics import Numerics
from dugnad.peer.session import Session
from dugnad.peer.terminal import live_line

log = logging.getLogger(__name__)

WELCOME_S = 60.0
"""How long a volunteer looks for someone who can say what the run is."""
_REMEMBER_S = 5.0
_LOOK_S = 1.0
"""How often it is seen to that the network daemon is there."""
UNKNOWN_UPLINK = 1.0
"""Until uplinks are measured, all count as the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Where a role listens (`port` and `metrics_port` 0 take any free one), and what it gives to those who fetch."""

    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0
    give_mbit: float = GIVE_MBIT
    """Megabits a second."""
    announce: str | None = None
    """A multiaddr at which, by the user's word, everyone reaches this role; see `Ways`."""

    @property
    def listen(self) -> str:
        """The multiaddr to listen on."""
        return self.listen_on(self.port)

    def listen_on(self, port: int) -> str:
        """The multiaddr of another port on the same host."""
        return on_tcp(self.host, port)


@dataclass(frozen=True, slots=True)
class Place:
    """A peer in the network, before it has a role."""

    identity: Identity
    host: Host
    swarm: Swarm
    face: Face
    url: str
    """Of the exporter."""

    def contacts(self) -> list[PeerId]:
        """The members of the run that gossip tells of."""
        return list(self.swarm.roles())

    def surroundings(self, genesis: Genesis, folder: Folder, network: Network) -> Surroundings:
        """What a role here is given."""
        return Surroundings(
            identity=self.identity,
            genesis=genesis,
            transport=self.host,
            directory=folder.path,
            metrics=self.face.metrics,
            give_mbit=network.give_mbit,
            contacts=self.contacts,
            barred=self.swarm.quarantined,
            accuse=self.accuse,
        )

    def accuse(self, first: bytes, second: bytes) -> None:
        """Spread the proof that a voter lies."""
        self.swarm.accuse(equivocation.SORT, first, second)

    def invite(self, genesis: Genesis, name: str) -> Invite:
        """An invite that leads to us: from other machines, if any reaches us."""
        addresses = self.host.addresses()
        far = tuple(address for address in addresses if not is_local(address))
        return Invite(genesis.run, public_key_of(genesis.organizer), far or addresses, name, 0)


def host_for(invite: Invite) -> str:
    """Where a volunteer listens that was not told: all interfaces, unless the whole run is on this machine."""
    return "127.0.0.1" if all(is_local(address) for address in invite.addresses) else "0.0.0.0"


async def launch(recipe: Recipe, folder: Folder, network: Network, *, told: Callable[[str, str], None]) -> None:
    """Begin a run as its organizer and coordinator; `told` hears the invite and the exporter's URL."""
    with folder.occupied():
        if _kept_genesis(folder) is not None:
            raise FolderError(
                f"{folder.path}: a run was launched here before. Go on with it: dugnad launch --resume {folder.path}. "
                "For another run, choose another folder with --dir."
            )
        numerics = Numerics(recipe)
        await asyncio.to_thread(numerics.prepare, to_train=False)  # before anything is written: it may not go together
        first = await asyncio.to_thread(numerics.first_model)
        founder, organizer = folder.identity().peer_id, folder.organizer().peer_id
        with contextlib.closing(Chain(folder.chain)) as chain:
            incarnation = chain.incarnation()
        genesis = Genesis(encode(recipe), organizer, founder, incarnation, first.digest())
        async with _coordinator_placed(folder, genesis.run, network, ()) as place:
            await _coordinate(genesis, numerics, place, folder, network, told)


async def resume(folder: Folder, network: Network, *, invite: Invite | None, told: Callable[[str, str], None]) -> None:
    """Go on as the coordinator of the run in `folder`; in a folder with nothing but run.key, of the run of `invite`."""
    with folder.occupied():
        if not folder.has_run_key:
            raise FolderError(f"{folder.path}: there is no run.key here: only who has the run's key can coordinate it.")
        genesis = _kept_genesis(folder)
        if genesis is None and invite is None:
            raise FolderError(
                f"{folder.path}: no run was launched here. Name the folder that holds its chain.sqlite; or, to go on "
                "from its run.key alone, add --invite with an invite that names a peer who is there."
            )
        if genesis is not None and invite is not None and genesis.run != invite.run:
            raise FolderError(f"{folder.path}: this folder belongs to another run than the invite.")
        run = genesis.run if genesis is not None else invite.run if invite is not None else b""
        async with _coordinator_placed(folder, run, network, invite.addresses if invite else ()) as place:
            if genesis is None and invite is not None:
                genesis = (await _welcome(place, invite)).genesis
            assert genesis is not None
            if genesis.organizer != folder.organizer().peer_id:
                raise FolderError(f"{folder.path}: run.key is not the key of this run.")
            numerics = Numerics(decode(genesis.recipe))
            await asyncio.to_thread(numerics.prepare, to_train=False)
            await _coordinate(genesis, numerics, place, folder, network, told)


async def join(
    invite: Invite, folder: Folder, network: Network, *, threads: int, told: Callable[[Recipe, str, str], None]
) -> str:
    """Take part in a run with so many threads of torch; returns why it ended.

    told: hears the recipe, our nickname and the exporter's URL.
    """
    with folder.occupied():
        kept = _kept_genesis(folder)
        back = kept is not None and kept.run == invite.run
        async with _placed(
            "volunteer", folder, invite.run, network.listen, network, bootstrap=invite.addresses, may_wait=back
        ) as place:
            check_expiry(invite, now=place.swarm.now())
            genesis = kept if back and kept is not None else (await _welcome(place, invite)).genesis
            recipe = decode(genesis.recipe)
            told(recipe, nickname(place.identity.peer_id), place.url)
            numerics = Numerics(recipe, threads=threads)
            await asyncio.to_thread(numerics.prepare, to_train=True)
            abilities = Abilities(addresses=place.host.addresses(), accepts=True, uplink=UNKNOWN_UPLINK)
            role = Session(place.surroundings(genesis, folder, network), numerics, abilities=abilities)
            place.face.role, place.face.invite = role, encode_invite(place.invite(genesis, recipe.name))
            with folder.inhabited("volunteer", invite.run, recipe.name, place.url):
                await _until_done(role, place, folder, role.leave, "leaving after this round; Ctrl+C again leaves now")
    return role.left_because


def _kept_genesis(folder: Folder) -> Genesis | None:
    """What was launched in `folder`; nothing yet if whoever tried was killed after making the file of the chain."""
    if not folder.chain.exists():
        return None
    with contextlib.closing(Chain(folder.chain, read_only=True)) as chain:
        return chain.genesis()


@contextlib.asynccontextmanager
async def _coordinator_placed(
    folder: Folder, run: bytes, network: Network, bootstrap: tuple[str, ...]
) -> AsyncIterator[Place]:
    listen = network.listen if network.port or folder.address is None else folder.address
    async with _placed("coordinator", folder, run, listen, network, bootstrap=bootstrap, may_wait=True) as place:
        folder.keep_address(network.listen_on(_tcp_port(place.host)))  # a resumed run keeps its invites good
        yield place


async def _coordinate(
    genesis: Genesis,
    numerics: Numerics,
    place: Place,
    folder: Folder,
    network: Network,
    told: Callable[[str, str], None],
) -> None:
    around = place.surroundings(genesis, folder, network)
    role = Coordinator(around, folder.organizer(), numerics, addresses=place.host.addresses())
    name = numerics.recipe.name
    place.face.role, place.face.invite = role, encode_invite(place.invite(genesis, name))
    with folder.inhabited("coordinator", genesis.run, name, place.url):
        told(place.face.invite, place.url)
        promise = "finishing the round, then leaving it to the others; Ctrl+C again: now"
        await _until_done(role, place, folder, role.stop, promise)


@contextlib.asynccontextmanager
async def _placed(
    role: RoleName,
    folder: Folder,
    run: bytes,
    listen: str,
    network: Network,
    *,
    bootstrap: tuple[str, ...],
    may_wait: bool,
) -> AsyncIterator[Place]:
    """Be a peer of the run, whom others can see and ask; may_wait: also while none of them is there."""
    known = tuple(dict.fromkeys((*bootstrap, *folder.remembered())))
    try:
        async with _connected(role, folder, run, listen, network, known) as place:
            yield place
    except BootstrapError as error:
        if not may_wait:
            raise
        log.info("nobody is there yet: %s", error)
    else:
        return
    async with _connected(role, folder, run, listen, network, ()) as place:
        for address in known:
            await place.host.learn(PeerId(address.rpartition("/p2p/")[2]), (address,))
        yield place


@contextlib.asynccontextmanager
async def _connected(
    role: RoleName, folder: Folder, run: bytes, listen: str, network: Network, bootstrap: tuple[str, ...]
) -> AsyncIterator[Place]:
    identity = folder.identity()
    face = Face(Metrics(role, run.hex()[:8], nickname=nickname(identity.peer_id)))
    metrics = face.metrics
    async with (
        Exporter(metrics, face.status, port=network.metrics_port) as exporter,
        Host(
            identity,
            listen=everywhere(listen),
            bootstrap=bootstrap,
            meter=metrics.bytes_moved,
            state_dir=folder.path,
            owner_of=owner_of,
            ways=Ways(announce=network.announce),
        ) as host,
        Swarm(
            host,
            identity,
            run,
            role=role,
            directory=folder.path,
            refused=metrics.rejected_message,
            progress=face.progress,
            passed=metrics.message_passed,
            proofs=Proofs({equivocation.SORT: equivocation.checker(verify)}),
        ) as swarm,
    ):
        face.swarm = swarm
        yield Place(identity, host, swarm, face, exporter.url)


def _tcp_port(host: Host) -> int:
    """The port that the daemon took. Raises NetworkDown if it names none."""
    for address in reversed(host.addresses()):  # the nearest first: a router may give those far away another port
        if is_direct(address) and (port := port_of(address)) is not None:
            return port
    raise NetworkDown("the network daemon names no address at which others could reach us; choose another --host")


async def _welcome(place: Place, invite: Invite) -> Welcome:
    """What the run is, from those whom the invite names, or else from whomever the DHT names as its members.

    Those of the invite come first: anyone may call himself the coordinator.
    """
    asker = Asker(place.host, place.identity, invite.run)
    peers = dict.fromkeys(PeerId(address.rpartition("/p2p/")[2]) for address in invite.addresses)
    invited = [peer for peer in peers if peer != place.identity.peer_id]
    found: list[PeerId] = []
    fault = SyncError("nobody could say what this run is: nobody has answered yet")
    try:
        async with asyncio.timeout(WELCOME_S):
            while True:
                try:
                    return await asker.welcome(dict.fromkeys([*invited, *found]))
                except SyncError as error:
                    fault = error
                members = await place.swarm.look_around()
                found = sorted(members, key=lambda peer: members[peer] != "coordinator")
                await asyncio.sleep(1.0)
    except TimeoutError:
        raise fault from None


async def _until_done(
    role: Coordinator | Session, place: Place, folder: Folder, leave: Callable[[], None], promise: str
) -> None:
    """Serve until the role is done; raises KeyboardInterrupt where the user will not wait for that.

    Raises NetworkDown, in a group, once the network daemon has ended.
    """
    serving = asyncio.create_task(_serve(role, place.host))
    looking = asyncio.create_task(place.face.keep_looking())
    moving = asyncio.create_task(_keep_in_touch(role, place, folder))
    asked = 0

    def interrupted() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            log.info(promise)
            leave()
        else:
            serving.cancel()

    try:
        with _on_interrupt(interrupted):
            async with live_line(place.face.line):
                await serving
    except asyncio.CancelledError:
        if asked > 1:
            raise KeyboardInterrupt from None
        raise
    finally:
        looking.cancel()
        moving.cancel()


async def _keep_in_touch(role: Coordinator | Session, place: Place, folder: Folder) -> None:
    """Keep where the others are, so that we find them again when the peers of our invite are gone.

    And say where we are, which changes with the relays that lead to us.
    """
    before: set[str] = set()
    while True:
        await asyncio.sleep(_REMEMBER_S)
        role.moved(place.host.addresses())
        if place.host.addresses():
            place.face.invite = encode_invite(place.invite(role.genesis, role.recipe.name))
        addresses = place.swarm.addresses()
        if addresses and addresses != before:
            folder.remember(addresses)
            before = addresses


async def _serve(role: Coordinator | Session, host: Host) -> None:
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(_watch(host))
        await role.serve()
        watching.cancel()


async def _watch(host: Host) -> None:
    """Raises NetworkDown once the daemon has ended: whoever sends takes that for the other side's silence."""
    while True:
        host.check_alive()
        await asyncio.sleep(_LOOK_S)


@contextlib.contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
