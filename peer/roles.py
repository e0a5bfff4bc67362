"""The two roles as processes: wire host, swarm, exporter and role together, and end in order.

Ctrl+C (or SIGTERM) once: finish what others count on, then leave. Twice: leave now.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dugnad.configs.recipe import Recipe, decode, encode
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Genesis, Welcome
from dugnad.coordinator.service import Coordinator
from dugnad.coordinator.shell import Shell
from dugnad.coordinator.sync import Asker, SyncError
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, nickname, public_key_of
from dugnad.dht.invite import Invite, encode_invite
from dugnad.dht.records import owner_of
from dugnad.dht.swarm import Swarm
from dugnad.monitoring.exporter import Exporter
from dugnad.monitoring.metrics import Metrics
from dugnad.peer import report
from dugnad.peer.folder import Folder, FolderError
from dugnad.peer.lifecycle import Abilities
from dugnad.peer.numerics import Numerics
from dugnad.peer.session import Session

log = logging.getLogger(__name__)

WELCOME_S = 60.0
"""How long a volunteer looks for someone who can say what the run is."""
UNKNOWN_UPLINK = 1.0
"""Until uplinks are measured all count as the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Where a role listens: `port` and `metrics_port` 0 take any free one."""

    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0

    @property
    def listen(self) -> str:
        """The multiaddr to listen on."""
        return f"/{'ip6' if ':' in self.host else 'ip4'}/{self.host}/tcp/{self.port}"


async def launch(recipe: Recipe, folder: Folder, network: Network, *, told: Callable[[str, str], None]) -> None:
    """Begin a run as its organizer and coordinator; `told` hears of the invite and of the metrics URL."""
    if folder.chain.exists():
        raise FolderError(
            f"{folder.path}: a run was launched here before. Go on with it: dugnad launch --resume {folder.path}. "
            "For another run, choose another folder with --dir."
        )
    folder.create()
    identity, organizer = folder.identity(), folder.organizer()
    numerics = Numerics(recipe)
    first = await asyncio.to_thread(numerics.first_model)
    genesis = Genesis(encode(recipe), organizer.peer_id, identity.peer_id, first.digest())
    await _coordinate(genesis, numerics, folder, network, told=told)


async def resume(folder: Folder, network: Network, *, told: Callable[[str, str], None]) -> None:
    """Go on with the run that was launched in `folder`."""
    folder.check_free()
    genesis = _genesis_of(folder)
    numerics = Numerics(decode(genesis.recipe))
    await _coordinate(genesis, numerics, folder, network, told=told)


def _genesis_of(folder: Folder) -> Genesis:
    genesis = None
    if folder.chain.exists():
        chain = Chain(folder.chain)
        genesis = chain.genesis()
        chain.close()
    if genesis is None:
        raise FolderError(f"{folder.path}: no run was launched here. Name the folder that holds its chain.sqlite.")
    if genesis.organizer != folder.organizer().peer_id or genesis.founder != folder.identity().peer_id:
        raise FolderError(f"{folder.path}: run.key or identity.key is not the one that this run began with.")
    return genesis


async def _coordinate(
    genesis: Genesis, numerics: Numerics, folder: Folder, network: Network, *, told: Callable[[str, str], None]
) -> None:
    folder.check_free()
    identity, organizer, run, name = folder.identity(), folder.organizer(), genesis.run, numerics.recipe.name
    metrics = Metrics("coordinator", run.hex()[:8])
    listen = network.listen if network.port or folder.address is None else folder.address
    status: Callable[[], dict[str, object]] = dict
    async with (
        Host(identity, listen=(listen,), meter=metrics.bytes_moved, state_dir=folder.path, owner_of=owner_of) as host,
        Exporter(metrics, lambda: status(), port=network.metrics_port) as exporter,
    ):
        folder.keep_address(host.listening)
        role = Coordinator(
            identity, genesis, organizer, numerics, transport=host, directory=folder.path, metrics=metrics
        )
        async with Swarm(host, identity, run, role="coordinator") as swarm:
            status = lambda: report.of_coordinator(role, swarm)  # noqa: E731
            invite = Invite(run, public_key_of(genesis.organizer), host.addresses(), name, 0)
            with folder.inhabited("coordinator", run, name, exporter.url):
                told(encode_invite(invite), exporter.url)
                await _until_done(role, role.stop, "finishing the round, then leaving")


async def join(invite: Invite, folder: Folder, network: Network, *, told: Callable[[Recipe, str, str], None]) -> str:
    """Take part in a run; `told` hears of the recipe, of our nickname and of the metrics URL. Returns why it ended."""
    folder.create()
    folder.check_free()
    identity, run = folder.identity(), invite.run
    metrics = Metrics("volunteer", run.hex()[:8])
    status: Callable[[], dict[str, object]] = dict
    async with (
        Host(
            identity, listen=(network.listen,), bootstrap=invite.addresses, meter=metrics.bytes_moved,
            state_dir=folder.path, owner_of=owner_of,
        ) as host,
        Exporter(metrics, lambda: status(), port=network.metrics_port) as exporter,
        Swarm(host, identity, run, role="volunteer") as swarm,
    ):  # fmt: skip
        welcome = await _welcome(host, identity, swarm, run)
        recipe = decode(welcome.genesis.recipe)
        told(recipe, nickname(identity.peer_id), exporter.url)
        abilities = Abilities(addresses=host.addresses(), accepts=True, uplink=UNKNOWN_UPLINK)
        role = Session(
            identity, welcome, Numerics(recipe), transport=host, directory=folder.path, metrics=metrics,
            abilities=abilities,
        )  # fmt: skip
        status = lambda: report.of_volunteer(role, swarm)  # noqa: E731
        with folder.inhabited("volunteer", run, recipe.name, exporter.url):
            await _until_done(role, role.leave, "leaving after this round; again: now")
        return role.left_because


async def _welcome(host: Host, identity: Identity, swarm: Swarm, run: bytes) -> Welcome:
    """What the run is, from whomever the DHT names as its members; the coordinator is asked first."""
    asker = Asker(host, identity, run)
    deadline = asyncio.get_running_loop().time() + WELCOME_S
    while True:
        members = await swarm.look_around()
        try:
            return await asker.welcome(sorted(members, key=lambda peer: members[peer] != "coordinator"))
        except SyncError:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(1.0)


async def _until_done(role: Shell, leave: Callable[[], None], promise: str) -> None:
    """Serve until the role is done, or the user will not wait any longer (then KeyboardInterrupt is raised)."""
    asked = 0
    serving = asyncio.create_task(role.serve())

    def interrupted() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            log.info("%s", promise)
            leave()
        else:
            serving.cancel()

    with _on_interrupt(interrupted):
        try:
            await serving
        except asyncio.CancelledError:
            if asked > 1:
                raise KeyboardInterrupt from None
            raise


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
