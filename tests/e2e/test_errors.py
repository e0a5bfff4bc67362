"""Every error that a joiner can meet, provoked with real processes and real peers, its whole text compared.

One run is launched, some peers answer as no good peer would, and all joins that must fail are started at once. What a
ban leads to stands in test_admission.py.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dugnad.configs.recipe import encode, load
from dugnad.coordinator import sync
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Genesis, Welcome
from dugnad.dht import hello
from dugnad.dht.hello import Answer, Verdict
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.invite import Invite, Pass, encode_invite, parse_invite
from dugnad.dht.ticket import Terms
from dugnad.dht.wire import PROTOCOL, seal
from dugnad.peer import doctor, measure
from dugnad.peer.doctor import Check
from dugnad.peer.doctor import Verdict as Grade
from dugnad.peer.folder import Folder
from dugnad.peer.network import Network
from tests.e2e.processes import QUICK, Running, dugnad, endless
from tests.net.hosts import ignore, owner_of

pytestmark = pytest.mark.timeout(240)

Told = dict[str, "subprocess.CompletedProcess[str]"]
ORGANIZER = Identity.from_seed(b"o" * 32)
RUN = b"r" * 32


def huge() -> Genesis:
    """A run that no machine has the memory for."""
    recipe = load(str(QUICK))
    recipe = replace(recipe, model=replace(recipe.model, layers=256, width=16384))
    return Genesis(encode(recipe), ORGANIZER.peer_id, ORGANIZER.peer_id, bytes(8), bytes(32))


def invite_to(*addresses: str, run: bytes = RUN, expires: int = 0) -> str:
    ticket = Pass.issue(ORGANIZER, run, bytes(32), Terms(expires=expires))
    return encode_invite(Invite(run, ORGANIZER.public_key, addresses, "quick", ticket))


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port that answers no SYN any more: its queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            knocking = stack.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Stage:
    """What the joins below are told about."""

    directory: Path
    coordinator: Running
    victim: Running
    """A volunteer, whose key is copied."""
    invite: Invite
    unreachable: list[Check] = field(default_factory=list)
    """What the doctor found where nobody can be reached."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("errors")
    coordinator = Running(directory / "coordinator", "launch", endless(directory))
    victim = Running(directory / "victim", "join", coordinator.invite())
    try:
        victim.until(lambda said: True, "a sign of life")
        yield Stage(directory, coordinator, victim, parse_invite(coordinator.invite()))
    finally:
        for one in (victim, coordinator):
            one.close()


@pytest.fixture(scope="module")
def told(stage: Stage) -> Told:
    """What each join said that could not work, and two looks of the doctor."""
    return asyncio.run(provoke(stage))


async def provoke(stage: Stage) -> Told:
    there, folder = stage.invite, stage.directory
    text = encode_invite(there)
    copy, foreign = folder / "copy", folder / "foreign"
    copy.mkdir()
    shutil.copy(stage.victim.directory / "identity.key", copy)
    foreign.mkdir()
    with contextlib.closing(Chain(foreign / "chain.sqlite")) as chain:
        chain.found(huge())
    async with contextlib.AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(odd_host(folder, number)) for number in range(3)]
        later, vast, choosy = (host.addresses()[0] for host in hosts)
        await serve_as_later(hosts[0])
        await serve_welcome(hosts[1])
        await hello.serve(hosts[2], RUN, "quick", judge=lambda peer: Verdict("E401"))
        deaf, shut = stack.enter_context(deaf_port()), closed_port()
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        nobody = Identity.from_seed(b"n" * 32).peer_id
        stale = f"{there.addresses[0].rpartition('/p2p/')[0]}/p2p/{nobody}"
        unreachable = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{nobody}" for port in (shut, deaf)] + [stale]
        joins: dict[str, list[str | Path]] = {
            "E101": [text[:137]],
            "E102": [invite_to(*there.addresses, run=there.run, expires=1_763_596_800)],
            "E201": [invite_to(*unreachable)],
            "E202": [text, "--port", str(taken), "--bulk-port", "0"],
            "E301": [invite_to(later)],
            "E302": [invite_to(vast, run=huge().run)],
            "E304": [invite_to(*there.addresses)],
            "E304 folder": [text, "--dir", foreign],
            "E401": [invite_to(choosy)],
            "E402": [text, "--dir", copy],
        }
        commands: dict[str, list[str | Path]] = {
            name: ["join", *words] if "--dir" in words else ["join", *words, "--dir", folder / name]
            for name, words in joins.items()
        }
        commands["doctor"] = ["doctor", text, "--json"]
        looking = asyncio.create_task(looked_at(invite_to(*unreachable), folder))
        done = await asyncio.gather(*(asyncio.to_thread(dugnad, *words, timeout_s=120) for words in commands.values()))
        stage.unreachable.extend(await looking)
    placed = {"SHUT": shut, "DEAF": deaf, "STALE": int(stale.split("/")[4]), "TAKEN": taken}
    stage.directory.joinpath("ports.json").write_text(json.dumps(placed))
    return dict(zip(commands, done, strict=True))


async def looked_at(invite: str, folder: Path) -> list[Check]:
    """What the doctor finds of an invite; in this process, which spares the time of starting one."""
    machine = measure.machine(folder, threads=1, look_for_gpu=False)
    return doctor.checks(await measure.everything(parse_invite(invite), machine, (), Network(), Folder(folder)))


@contextlib.asynccontextmanager
async def odd_host(folder: Path, number: int) -> AsyncIterator[Host]:
    host = Host(Identity.generate(), meter=ignore, owner_of=owner_of, state_dir=folder / f"odd-{number}")
    async with host:
        yield host


async def serve_as_later(host: Host) -> None:
    """Be of a release that speaks another protocol."""

    async def answer(peer: PeerId, raw: bytes) -> bytes:
        return hello.encode(Answer(PROTOCOL + 1, "9.0.0", "quick", "", "", ""))

    await host.serve(hello.CHANNEL, answer)


async def serve_welcome(host: Host) -> None:
    """Be a member of a run that is too large."""
    run, identity = huge().run, host._identity
    await hello.serve(host, run, "quick")

    async def answer(peer: PeerId, raw: bytes) -> bytes:
        return seal(identity, run, sync.CODEC, Welcome(huge()))

    await host.serve(sync.CHANNEL, answer)


def key_in(directory: Path) -> PeerId:
    return Identity.load_or_create(directory / "identity.key").peer_id


def texts(stage: Stage) -> dict[str, str]:
    """Exit status and text of each, as a regular expression."""
    folder, whole = stage.directory, re.escape
    ports = json.loads((folder / "ports.json").read_text())
    peer, nobody = stage.invite.addresses[0].rpartition("/p2p/")[2], Identity.from_seed(b"n" * 32).peer_id
    total = len(encode_invite(stage.invite))
    said = {
        "E101": f"2 E101 invite not readable: it ends early (137 of {total} characters). Copy it again; it starts with "
        "dugnad1: and ends with a checksum.",
        "E102": "2 E102 invite expired on 2025-11-20. Ask the organizer for a new one.",
        "E201": "1 E201 each of the 3 known addresses of the run leads to nobody.\n"
        + "\n".join(
            f"     {'127.0.0.1:' + str(ports[name]):<15}  {why}"
            for name, why in {
                "SHUT": "refused (host up, nothing listening)",
                "DEAF": "no answer in 5 s (firewall, or host down)",
                "STALE": f"answered as {peer}, the invite says {nobody} (re-installed? the invite is stale)",
            }.items()
        )
        + "\nAsk for a new invite: any peer of the run prints one with dugnad invite.",
        "E202": f"1 E202 ports: --port {ports['TAKEN']}. 127.0.0.1:{ports['TAKEN']}: another program already "
        "listens on this port. Stop it (is a dugnad still running?), or choose another port; port 0 takes any free "
        "one.",
        "E301": f"1 E301 this run speaks protocol {PROTOCOL + 1}, you have {PROTOCOL}; update your clone: git pull "
        "&& make setup",
        "E304": f'1 E304 {peer} takes part in another run, "quick", and not in the one of this invite. Ask the '
        "organizer for a new invite.",
        "E304 folder": f"2 E304 {folder / 'foreign'}: this folder belongs to run {huge().run.hex()[:8]}, the invite "
        f"to run {stage.invite.run.hex()[:8]}. Give each run a folder of its own with --dir.",
        "E401": f"1 E401 you are not on the allow-list. Your key: {key_in(folder / 'E401')} (send it to the "
        "organizer).",
        "E402": "1 E402 your key is in use by another running peer. A copied key?  "
        f"dugnad identity new --force --dir {folder / 'copy'}",
    }
    expressions = {name: whole(text) for name, text in said.items()}
    free = r"\d+\.\d GB free, needs \d+\.\d"
    expressions["E302"] = rf"1 E302 memory: {free}\. Close other programs, or join a smaller run\."
    return expressions


NAMES = ("E101", "E102", "E201", "E202", "E301", "E302", "E304", "E304 folder", "E401", "E402")


@pytest.mark.parametrize("name", NAMES)
def test_a_join_that_cannot_work_says_which_error_it_is_why_and_what_to_do(name: str, stage: Stage, told: Told) -> None:
    tried = told[name]
    said = [line for line in tried.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d  ", line)]  # the log's
    assert re.fullmatch(texts(stage)[name], f"{tried.returncode} " + "\n".join(said).removeprefix("dugnad: "))


def test_what_could_be_seen_before_joining_leaves_nothing_behind(stage: Stage, told: Told) -> None:
    for name in ("E101", "E202"):
        assert told[name].returncode
        assert not (stage.directory / name).exists()
    for name in ("E301", "E302", "E401"):
        assert told[name].returncode
        assert not (stage.directory / name / "chain.sqlite").exists()


def test_the_one_whose_key_was_copied_goes_on_undisturbed(stage: Stage, told: Told) -> None:
    assert told["E402"].returncode == 1
    here = stage.victim.until(lambda said: said["state"] == "waiting", "the model")
    assert not here["out"]
    assert not here["key_in_use"], "the other one said something"
    assert here["quarantined"] == 0
    assert "E402" not in stage.victim.text()


def test_the_doctor_finds_nothing_in_the_way_of_a_good_invite_and_leaves_no_trace(stage: Stage, told: Told) -> None:
    looked = told["doctor"]
    said = json.loads(looked.stdout)
    assert (looked.returncode, said["ok"]) == (0, True), looked
    found = {check["name"]: check for check in said["checks"]}
    assert found["network"]["found"] == '1 of 1 known addresses answer: "quick"'
    assert re.fullmatch(r"right, by 1 peer", found["clock"]["found"])
    assert re.fullmatch(r"direct to a member, \d+ ms there and back", found["path"]["found"])
    assert re.fullmatch(r"\d+\.\d GB free, needs 0\.\d", found["memory"]["found"])
    assert re.fullmatch(r"up [\d.]+ / down [\d.]+ Mbit/s to a member", found["rates"]["found"])
    assert len((stage.coordinator.status() or {})["peers"]) == 1


def test_the_doctor_tells_the_addresses_of_a_bad_invite_apart(stage: Stage, told: Told) -> None:
    assert told
    (check,) = [check for check in stage.unreachable if check.name == "network"]
    assert (check.verdict, check.code, check.found) == (Grade.FAILURE, "E201", "0 of 3 known addresses answer")
    for words in ("refused (host up", "no answer in 5 s", "the invite is stale"):
        assert words in check.advice


def test_a_peer_says_why_it_does_what_it_does_and_who_else_is_there(stage: Stage, told: Told) -> None:
    assert told
    why = dugnad("why", "--dir", stage.victim.directory)
    assert why.returncode == 0
    assert re.match(r"(Training|Idle|Exchanging|Not training yet)[:,] ", why.stdout)
    listed = dugnad("peers", "--dir", stage.coordinator.directory, "--json")
    (row,) = json.loads(listed.stdout)
    assert row["peer"] == key_in(stage.victim.directory)
    assert row["state"] in ("training", "waiting", "contributed", "reducing")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB of its own."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(small_disk: Path) -> None:
    tried = dugnad("join", invite_to(f"/ip4/127.0.0.1/tcp/1/p2p/{ORGANIZER.peer_id}"), "--dir", small_disk / "role")
    assert tried.returncode == 1
    assert tried.stderr == (
        f"dugnad: E303 disk: 0.0 GB free, needs 0.1. Make room in {small_disk / 'role'}, or choose a folder on another "
        "disk with --dir.\n"
    )
    assert not (small_disk / "role").exists()
