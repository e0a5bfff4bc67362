"""The facts that the doctor judges by: of this machine at once, of the network by joining it for some seconds."""

import asyncio
import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from dugnad.configs.recipe import Recipe, RecipeError, decode
from dugnad.coordinator.sync import Asker, SyncError
from dugnad.dht import clock as clocks
from dugnad.dht import hello, timekeeping
from dugnad.dht.clock import Sample
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.invite import Invite, InviteError, check
from dugnad.dht.listening import check_free
from dugnad.dht.outside import Ways
from dugnad.dht.paths import Path as Way
from dugnad.dht.records import owner_of
from dugnad.dht.rendezvous import Rendezvous
from dugnad.dht.transport import BootstrapError, Direction, TransportError
from dugnad.dht.wire import WireError
from dugnad.peer.doctor import Facts, Machine, NetworkFacts, Port, Software
from dugnad.peer.folder import Folder, nearest
from dugnad.peer.needs import Needs, needs_of
from dugnad.peer.network import Network
from dugnad.peer.probe import Reached, probe

NETWORK_S = 14.0
"""How long all of the network's part may take."""
_ASK_S = 3.0
_RECIPE_S = 5.0
_NO_LIMIT = 2**60


def software(*, daemon_fault: str | None = None) -> Software:
    """What is installed; nothing of it is imported."""
    return Software(
        dugnad=_version("dugnad"),
        python=platform.python_version(),
        torch=_version("torch"),
        hivemind=_version("hivemind"),
        daemon_fault=daemon_fault,
    )


def machine(folder: Path, *, threads: int, look_for_gpu: bool) -> Machine:
    """What is free now; folder: where a role would keep its things, there or not. A GPU is looked for with torch."""
    name, gpu_free_bytes = _gpu() if look_for_gpu else (None, 0)
    return Machine(
        memory_free_bytes=memory_free_bytes(),
        disk_free_bytes=shutil.disk_usage(nearest(folder)).free,
        folder=str(folder),
        folder_fault=Folder(folder).fault(),
        cores=os.cpu_count() or 1,
        threads=threads,
        gpu=name,
        gpu_free_bytes=gpu_free_bytes,
    )


def memory_free_bytes() -> int:
    """What this process may take altogether, what it has already included; a container's limit counts."""
    own = psutil.Process().memory_info().rss
    return min(psutil.virtual_memory().available, _free_in_cgroup(Path("/sys/fs/cgroup"))) + own


def _free_in_cgroup(root: Path) -> int:
    """What is left under the limit of version 2 or 1 of Linux' control groups, if there is one."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()) + _cache_bytes(root))
    return _NO_LIMIT


def _cache_bytes(root: Path) -> int:
    """Files that the kernel keeps in memory, which count as used but are given up first."""
    for name in ("memory.stat", "memory/memory.stat"):
        with contextlib.suppress(OSError):
            lines = (line.split() for line in (root / name).read_text().splitlines())
            return sum(int(words[1]) for words in lines if words[0] in ("inactive_file", "total_inactive_file"))
    return 0


def _gpu() -> tuple[str, int]:
    import torch

    if not torch.cuda.is_available():
        return "", 0
    free_bytes, _ = torch.cuda.mem_get_info()
    return torch.cuda.get_device_name(), free_bytes


def ports(host: str, wanted: Iterable[tuple[str, int]]) -> tuple[Port, ...]:
    """Which of the (option, port) that were asked for can be listened on; the exporter listens on loopback."""
    found = []
    for option, port in wanted:
        where = "127.0.0.1" if option == "--metrics-port" else host
        fault = ""
        try:
            check_free(f"/{'ip6' if ':' in where else 'ip4'}/{where}/tcp/{port}")
        except TransportError as error:
            fault = str(error)
        found.append(Port(option, port, fault))
    return tuple(found)


async def everything(
    invite: Invite | None, machine: Machine, ports: tuple[Port, ...], where: Network, folder: Folder
) -> Facts:
    """All facts, in under 20 s; with an invite by joining as a stranger, whose folder is gone afterwards.

    where: to listen, as in joining. folder: of who would join, there or not; only looked at.
    """
    network, recipe, fault = None, None, ""
    with tempfile.TemporaryDirectory(prefix="dugnad-doctor-") as name:
        try:
            if invite is not None:
                network, recipe = await _look(invite, Path(name), where)
                now = time.time() - (network.clock_error_s or 0.0)
                network = replace(network, invite_fault=invite_fault(invite, folder, now=now))
            else:
                async with _host(Identity.generate(), Path(name), where, ()):
                    pass
        except TransportError as error:
            fault = str(error)
    needs = Needs() if recipe is None else await asyncio.to_thread(needs_of, recipe)
    return Facts(software=software(daemon_fault=fault), machine=machine, needs=needs, ports=ports, network=network)


def invite_fault(invite: Invite, folder: Folder, *, now: float) -> str:
    """Why the invite lets whoever lives in `folder` in no more, or never did, with the code; "" if it does.

    now: unix seconds of the run. Raises IdentityError for a key there that can't be read.
    """
    genesis = folder.genesis()
    if genesis is not None and genesis.run == invite.run:  # the chain knows who was here before
        return ""
    bound = invite.ticket.bound if invite.ticket is not None else PeerId("")
    stranger = bound or Identity.generate().peer_id  # its key may be in another folder
    try:
        check(invite, folder.identity().peer_id if folder.key.exists() else stranger, now=now)
    except InviteError as error:
        return str(error)
    return ""


def _host(
    identity: Identity, directory: Path, where: Network, bootstrap: Sequence[str], ports: tuple[int, ...] = ()
) -> Host:
    return Host(
        identity,
        listen=(where.listen,),
        bootstrap=bootstrap,
        meter=_not_counted,
        state_dir=directory,
        owner_of=owner_of,
        ways=Ways(announce=where.announce, extra_ports=ports),
    )


def _not_counted(direction: Direction, kind: str, num_bytes: int) -> None:
    """Nobody asks how much it was."""


async def _look(invite: Invite, directory: Path, where: Network) -> tuple[NetworkFacts, Recipe | None]:
    """What a stranger with this invite finds. Raises TransportError where the network daemon does not start."""
    me, recipe = Identity.generate(), None
    facts = NetworkFacts(asked=len(invite.addresses))
    try:
        async with (
            asyncio.timeout(NETWORK_S),
            Rendezvous(me, listen=where.bulk, folder=directory, meter=_not_counted) as rendezvous,
            _host(me, directory, where, invite.addresses, (rendezvous.carrier.port,)) as host,
        ):
            failures = host.contacts.failures
            facts = replace(facts, reached=facts.asked - len(failures), failures=failures)
            facts = await _met(facts, host, invite)
            recipe = await _recipe(host, Asker(host, me, invite.run))
            facts = replace(facts, run=f'"{recipe.name}"' if recipe else "")
            # last: it takes the line, and the longest
            facts = _with(facts, await probe(host, rendezvous, host.contacts.peers, invite.claim(me.peer_id)))
    except BootstrapError as error:
        return replace(facts, failures=error.failures), None
    except TimeoutError:
        if not facts.reached:
            return replace(facts, failures=(("all", f"no answer in {NETWORK_S:.0f} s"),)), None
    return facts, recipe


async def _met(facts: NetworkFacts, host: Host, invite: Invite) -> NetworkFacts:
    """What there is to learn of members to whom we are connected."""
    members, refused = host.contacts.peers, ""
    try:
        await hello.greet(host, members, invite.run)
    except hello.TurnedAway as error:
        refused = str(error)
    samples = await _samples(host, members[: timekeeping.NUM_ASKED])
    for peer, sample in samples.items():
        host.clock.take(peer, sample)
    routes = [route for peer in members if (route := await host.route_to(peer)) is not None]
    ways = {route.path for route in routes}
    return replace(
        facts,
        refused=refused,
        clock_error_s=-host.clock.correction.offset_s if samples else None,
        clock_peers=len(samples),
        rtt_s=min((sample.round_trip_s for sample in samples.values()), default=None),
        path=Way.DIRECT if Way.DIRECT in ways else Way.RELAYED if members else None,
    )


def _with(facts: NetworkFacts, found: Reached) -> NetworkFacts:
    return replace(
        facts,
        reach=found.reach,
        inbound=found.inbound,
        path=found.path or facts.path,
        up_mbit=found.up_mbit,
        down_mbit=found.down_mbit,
    )


async def _samples(host: Host, members: Sequence[PeerId]) -> dict[PeerId, Sample]:
    """What time the members say that it is; who does not say is left out."""

    async def ask(peer: PeerId) -> Sample | None:
        sent_s = time.time()
        try:
            raw = await host.request(peer, timekeeping.CHANNEL, b"", timeout_s=_ASK_S)
            return Sample(sent_s, time.time(), clocks.decode_time(raw), time.monotonic())
        except (TransportError, WireError):
            return None

    for _ in range(2):  # the first request opens the way, and so takes longer than a round trip
        said = await asyncio.gather(*(ask(peer) for peer in members))
    return {peer: sample for peer, sample in zip(members, said, strict=True) if sample is not None}


async def _recipe(host: Host, asker: Asker) -> Recipe | None:
    with contextlib.suppress(SyncError, RecipeError, TimeoutError):
        async with asyncio.timeout(_RECIPE_S):
            return decode((await asker.welcome(host.contacts.peers)).genesis.recipe)
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
