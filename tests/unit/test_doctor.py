"""The doctor's verdicts over measured facts: one table, and what people and programs read."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dugnad.configs.recipe import load
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Genesis
from dugnad.dht.identity import Identity
from dugnad.dht.invite import Invite, Pass
from dugnad.dht.paths import Path as Way
from dugnad.dht.paths import Reach
from dugnad.dht.ticket import Terms
from dugnad.peer import cli, doctor, gate, measure
from dugnad.peer.doctor import Check, CheckFailed, Facts, Machine, NetworkFacts, Port, Software, Verdict
from dugnad.peer.errors import sentence_of
from dugnad.peer.folder import Folder
from dugnad.peer.needs import FOLDER_BYTES, PROCESS_BYTES, Needs, needs_of
from dugnad.peer.network import Network

OK, SKIPPED, WARNING, FAILURE = Verdict.OK, Verdict.SKIPPED, Verdict.WARNING, Verdict.FAILURE
SOFTWARE = Software(dugnad="0.1.0", python="3.11.7", torch="2.13.0", hivemind="1.1.12", daemon_fault="")
MACHINE = Machine(
    memory_free_bytes=8_050_000_000, disk_free_bytes=41 * 10**9, folder="/data", cores=4, threads=2, gpu=""
)
NEEDS = Needs(3_120_000_000, 1_900_000_000, "tiny")
NETWORK = NetworkFacts(asked=3, reached=3, run='"tiny"', clock_error_s=0.2, clock_peers=3)
STALE = ("192.0.2.4:4001", "answered as 12D3..aa, the invite says 12D3..bb (re-installed? the invite is stale)")


def found(name: str, facts: Facts) -> Check:
    (check,) = [check for check in doctor.checks(facts) if check.name == name]
    return check


def facts(**changed: Any) -> Facts:
    whole: dict[str, Any] = {"software": SOFTWARE, "machine": MACHINE, "needs": NEEDS, "network": NETWORK}
    return Facts(**whole | changed)


def with_network(**changed: Any) -> Facts:
    return facts(network=replace(NETWORK, **changed))


CASES: list[tuple[str, Facts, Verdict, str, str, str]] = [
    ("software", facts(), OK, "dugnad 0.1.0, python 3.11.7, torch 2.13.0, libp2p starts", "", ""),
    (
        "software",
        facts(software=replace(SOFTWARE, torch="")),
        FAILURE,
        "dugnad 0.1.0, python 3.11.7, torch missing",
        "torch is not installed:  make setup, in your clone",
        "",
    ),
    (
        "software",
        facts(software=replace(SOFTWARE, daemon_fault="it said nothing")),
        FAILURE,
        "dugnad 0.1.0, python 3.11.7, torch 2.13.0",
        "the network daemon does not start: it said nothing",
        "",
    ),
    ("memory", facts(), OK, "8.0 GB free, needs 3.2", "", ""),
    (
        "memory",
        facts(needs=Needs(11_200_000_000)),
        FAILURE,
        "8.0 GB free, needs 11.2",
        "Close other programs, or join a smaller run.",
        "E302",
    ),
    ("disk", facts(), OK, "41.0 GB free, needs 1.9", "", ""),
    (
        "disk",
        facts(machine=replace(MACHINE, disk_free_bytes=10**9)),
        FAILURE,
        "1.0 GB free, needs 1.9",
        "Make room in /data, or choose a folder on another disk with --dir.",
        "E303",
    ),
    (
        "disk",
        facts(machine=replace(MACHINE, folder_fault="can't be made: Permission denied")),
        FAILURE,
        "/data can't be made: Permission denied",
        "Choose another folder with --dir.",
        "",
    ),
    ("cpu", facts(), OK, "2 of 4 cores to train with", "", ""),
    (
        "cpu",
        facts(machine=replace(MACHINE, threads=8)),
        WARNING,
        "8 of 4 cores to train with",
        "more threads than cores slow it down: --threads 4",
        "",
    ),
    ("gpu", facts(), OK, "none", "", ""),
    ("gpu", facts(machine=replace(MACHINE, gpu=None)), SKIPPED, "not looked for", "", ""),
    (
        "gpu",
        facts(machine=replace(MACHINE, gpu="NVIDIA H100", gpu_free_bytes=79 * 10**9)),
        OK,
        "NVIDIA H100, 79.0 GB free",
        "",
        "",
    ),
    (
        "gpu",
        facts(needs=replace(NEEDS, gpu=True)),
        FAILURE,
        "none",
        "tiny trains with adamw8bit, on NVIDIA GPUs only",
        "",
    ),
    ("ports", facts(), OK, "any free ones", "", ""),
    ("ports", facts(ports=(Port("--port", 4001, ""), Port("--metrics-port", 0, ""))), OK, "--port 4001", "", ""),
    (
        "ports",
        facts(ports=(Port("--port", 4001, ""), Port("--bulk-port", 4002, "E202 0.0.0.0:4002: it is taken"))),
        FAILURE,
        "--bulk-port 4002",
        "0.0.0.0:4002: it is taken",
        "E202",
    ),
    ("invite", facts(), OK, "readable and not expired", "", ""),
    (
        "invite",
        with_network(invite_fault="E102 invite expired on 2025-11-20. Ask the organizer for a new one."),
        FAILURE,
        "invite expired on 2025-11-20",
        "Ask the organizer for a new one.",
        "E102",
    ),
    (
        "ports",
        facts(ports=(Port("--port", 0, "E202 192.0.2.1: not an address of this machine"),)),
        FAILURE,
        "--host",
        "192.0.2.1: not an address of this machine",
        "E202",
    ),
    ("network", facts(network=None), SKIPPED, "not looked at: give an invite", "", ""),
    ("network", facts(), OK, '3 of 3 known addresses answer: "tiny"', "", ""),
    (
        "network",
        with_network(reached=2, failures=(STALE,)),
        WARNING,
        '2 of 3 known addresses answer: "tiny"',
        f"{STALE[0]} {STALE[1]}",
        "",
    ),
    (
        "network",
        with_network(reached=0, failures=(STALE, ("198.51.100.9:4001", "no answer in 5 s (firewall, or host down)"))),
        FAILURE,
        "0 of 3 known addresses answer",
        f"{STALE[0]} {STALE[1]}; 198.51.100.9:4001 no answer in 5 s (firewall, or host down). Ask for a new invite: "
        "any peer of the run prints one with dugnad invite.",
        "E201",
    ),
    (
        "network",
        with_network(refused="E301 this run speaks protocol 3, you have 1; update your clone: git pull && make setup"),
        FAILURE,
        "3 of 3 known addresses answer",
        "this run speaks protocol 3, you have 1; update your clone: git pull && make setup",
        "E301",
    ),
    (
        "network",
        with_network(refused="E401 you are not on the allow-list."),
        OK,
        "3 of 3 known addresses answer; whether you are admitted shows in joining",
        "",
        "",
    ),
    (
        "network",
        with_network(refused="E403 the organizer has banned your key.", stranger=False),
        FAILURE,
        "3 of 3 known addresses answer",
        "the organizer has banned your key.",
        "E403",
    ),
    (
        "network",
        with_network(run=""),
        WARNING,
        "3 of 3 known addresses answer",
        "none of them says what the run is: it may be starting",
        "",
    ),
    ("clock", facts(network=None), SKIPPED, "not looked at: give an invite", "", ""),
    ("clock", with_network(clock_error_s=None), SKIPPED, "not compared: nobody answered", "", ""),
    ("clock", facts(), OK, "right, by 3 peers", "", ""),
    ("clock", with_network(clock_error_s=-2.0, clock_peers=1), OK, "2 s slow, corrected against 1 peer", "", ""),
    (
        "clock",
        with_network(clock_error_s=3720.0),
        WARNING,
        "1 h 2 min fast, corrected against 3 peers",
        "set it: what else runs here goes by it",
        "",
    ),
    ("nat", facts(), SKIPPED, "not measured", "", ""),
    ("nat", with_network(reach=Reach.UNKNOWN), SKIPPED, "not measured", "", ""),
    ("nat", with_network(reach=Reach.OPEN), OK, "none in the way: others can connect to this machine", "", ""),
    ("nat", with_network(reach=Reach.CONE), OK, "cone: through your router direct paths can be opened", "", ""),
    (
        "nat",
        with_network(reach=Reach.SYMMETRIC),
        WARNING,
        "symmetric: most paths go through a relay",
        doctor.SYMMETRIC_ADVICE,
        "",
    ),
    ("inbound", facts(), SKIPPED, "not measured", "", ""),
    (
        "inbound",
        with_network(inbound=False, reach=Reach.CONE),
        OK,
        "by paths that both sides open at once",
        "",
        "",
    ),
    ("inbound", with_network(inbound=True, reach=Reach.OPEN), OK, "a member connected to this machine", "", ""),
    (
        "inbound",
        with_network(inbound=True, reach=Reach.CONE),
        OK,
        "a member connected to this machine; your router may keep others out (if not, say --announce)",
        "",
        "",
    ),
    (
        "inbound",
        with_network(inbound=False),
        WARNING,
        "no member can connect to this machine",
        "inbound blocked: it works through others, slower. Switch on UPnP, or forward two ports and say --announce",
        "E203",
    ),
    ("path", facts(), SKIPPED, "not measured", "", ""),
    ("path", with_network(path=Way.RELAYED, rtt_s=0.0421), OK, "relayed to a member, 42 ms there and back", "", ""),
    ("rates", facts(), SKIPPED, "not measured", "", ""),
    ("rates", with_network(up_mbit=18.2, down_mbit=92.0), OK, "up 18 / down 92 Mbit/s to a member", "", ""),
    ("rates", with_network(down_mbit=92.0), OK, "up ? / down 92 Mbit/s to a member", "", ""),
    (
        "rates",
        with_network(up_mbit=0.4, down_mbit=92.0),
        WARNING,
        "up 0.4 / down 92 Mbit/s to a member",
        "a line this slow holds up each exchange; is another upload running?",
        "",
    ),
]


@pytest.mark.parametrize(("name", "given", "verdict", "what", "advice", "code"), CASES)
def test_each_check_says_what_was_found_and_the_one_thing_to_do(
    name: str, given: Facts, verdict: Verdict, what: str, advice: str, code: str
) -> None:
    check = found(name, given)
    assert (check.verdict, check.found, check.advice, check.code) == (verdict, what, advice, code)


def test_every_check_is_in_the_table() -> None:
    assert {name for name, *_ in CASES} == {check.name for check in doctor.checks(facts())}


def test_only_a_failure_makes_it_not_ok_and_every_failure_says_what_to_do() -> None:
    for name, given, verdict, _, advice, _ in CASES:
        said = doctor.as_json([found(name, given)])
        assert said["ok"] == (verdict is not FAILURE)
        assert said["checks"][0].keys() == {"name", "verdict", "found", "advice", "code"}
        assert bool(advice) == (verdict in (WARNING, FAILURE)), f"{name}: {advice}"


def test_programs_get_what_was_measured_as_numbers() -> None:
    measured = replace(NETWORK, reach=Reach.CONE, path=Way.DIRECT, up_mbit=19.5)
    said = json.loads(json.dumps(doctor.as_json([], measured)))["network"]
    assert (said["reach"], said["path"], said["up_mbit"], said["down_mbit"]) == ("cone", "direct", 19.5, None)
    assert "network" not in doctor.as_json([])


def test_lines_are_what_people_were_promised() -> None:
    assert str(found("memory", facts())) == "check  memory    8.0 GB free, needs 3.2 " + "." * 32 + " ok"
    assert str(found("nat", facts())) == "check  nat       not measured " + "." * 42 + " -"
    assert str(found("memory", facts(needs=Needs(11_200_000_000)))) == (
        "check  memory    8.0 GB free, needs 11.2 " + "." * 31 + " failure    "
        "(E302 Close other programs, or join a smaller run.)"
    )


def test_a_check_that_fails_is_an_error_that_begins_with_its_code() -> None:
    error = CheckFailed(found("memory", facts(needs=Needs(11_200_000_000))))
    text = "E302 memory: 8.0 GB free, needs 11.2. Close other programs, or join a smaller run."
    assert sentence_of(error) == (text, 1)
    assert error.code == "E302"
    assert str(CheckFailed(Check("software", FAILURE, "torch missing", "pip install torch"))).startswith("software: ")


def test_what_a_run_needs_grows_with_model_batch_and_checkpoints() -> None:
    recipe = load("tiny-books")
    needs = needs_of(recipe)
    assert PROCESS_BYTES < needs.memory_bytes < PROCESS_BYTES + 500 * 2**20
    assert FOLDER_BYTES < needs.disk_bytes < FOLDER_BYTES + 200 * 2**20
    assert (needs.recipe, needs.gpu) == ("tiny-books", False)
    more = replace(recipe, inner=replace(recipe.inner, batch_sequences=10 * recipe.inner.batch_sequences))
    assert Needs.of(more, 10**6).memory_bytes > Needs.of(recipe, 10**6).memory_bytes
    keeps = replace(recipe, checkpoints=replace(recipe.checkpoints, keep=recipe.checkpoints.keep + 10))
    assert Needs.of(keeps, 10**6).disk_bytes == Needs.of(recipe, 10**6).disk_bytes + 80 * 10**6
    on_gpu = replace(recipe, inner=replace(recipe.inner, optimizer="adamw8bit"))
    assert Needs.of(on_gpu, 10**6).gpu


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, measure._NO_LIMIT),
        ({"memory.max": "max", "memory.current": "5"}, measure._NO_LIMIT),
        ({"memory.max": "100", "memory.current": "60"}, 40),
        ({"memory.max": "100", "memory.current": "60", "memory.stat": "anon 1\ninactive_file 30\n"}, 70),
        ({"memory.max": "100", "memory.current": "130"}, 0),
        ({"memory/memory.limit_in_bytes": "100", "memory/memory.usage_in_bytes": "90"}, 10),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str], free: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert measure._free_in_cgroup(tmp_path) == free


ORGANIZER, ANN = (Identity.from_seed(bytes([k]) * 32) for k in (1, 2))
GENESIS = Genesis(b"{}", ORGANIZER.peer_id, ORGANIZER.peer_id, bytes(8), bytes(32))
EXPIRED = "E102 invite expired on 2025-11-20. Ask the organizer for a new one."
EXPIRES = 1_763_596_800


def invite_by(signer: Identity = ORGANIZER, **terms: Any) -> Invite:
    ticket = Pass.issue(signer, GENESIS.run, b"t" * 32, Terms(**terms))
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{ORGANIZER.peer_id}"
    return Invite(GENESIS.run, ORGANIZER.public_key, (address,), "tiny", ticket)


def stranger(folder: Folder) -> None:
    """There is no such folder yet."""


def member(folder: Folder) -> None:
    folder.create()
    with contextlib.closing(Chain(folder.chain)) as chain:
        chain.found(GENESIS)


def someone(folder: Folder) -> None:
    folder.identity()


@pytest.mark.parametrize(
    ("invite", "who", "now", "fault"),
    [
        (invite_by(), stranger, EXPIRES, ""),
        (invite_by(expires=EXPIRES), stranger, EXPIRES - 1, ""),
        (invite_by(expires=EXPIRES), stranger, EXPIRES, EXPIRED),
        (invite_by(expires=EXPIRES), member, EXPIRES, ""),
        (invite_by(ANN), stranger, 0, "E401 altered ticket"),
        (invite_by(bound=ANN.peer_id), stranger, 0, ""),
        (invite_by(bound=ANN.peer_id), someone, 0, "E401 this invite is for another key, "),
    ],
)
def test_the_doctor_tells_an_invite_that_lets_us_in_no_more_as_joining_would(
    tmp_path: Path, invite: Invite, who: Callable[[Folder], None], now: int, fault: str
) -> None:
    folder = Folder(tmp_path / "role")
    who(folder)
    said = measure.invite_fault(invite, folder, now=now)
    assert said.startswith(fault)
    assert bool(said) == bool(fault)
    assert folder.key.exists() == (who is someone), "looking makes no key"


@pytest.mark.parametrize(("clock_error_s", "verdict"), [(None, FAILURE), (3600.0, OK)])
async def test_an_invite_is_expired_by_the_clock_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock_error_s: float | None, verdict: Verdict
) -> None:
    async def look(*_: object) -> tuple[NetworkFacts, None]:
        return replace(NETWORK, clock_error_s=clock_error_s), None

    monkeypatch.setattr(measure, "_look", look)
    monkeypatch.setattr("dugnad.peer.measure.time.time", lambda: EXPIRES + 60.0)
    invite = invite_by(expires=EXPIRES)
    looked = await measure.everything(invite, MACHINE, (), Network(), Folder(tmp_path / "role"))
    assert found("invite", looked).verdict is verdict


def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    here = measure.machine(tmp_path / "not" / "there" / "yet", threads=1, look_for_gpu=False)
    assert here.memory_free_bytes > 0
    assert here.disk_free_bytes > 0
    assert (here.gpu, here.folder_fault) == (None, "")
    assert measure.software().torch
    assert measure._version("no-such-package") == ""


def test_more_threads_than_cores_are_told_before_joining(tmp_path: Path) -> None:
    told: list[Check] = []
    for threads in (1, 900):
        gate.check_machine(Folder(tmp_path), "127.0.0.1", (), threads=threads, told=told.append)
    assert [check.name for check in told] == ["software", "software", "cpu"]
    assert told[-1].verdict is WARNING


def test_a_port_that_a_router_passes_on_can_be_tried_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Network] = []

    async def everything(invite: object, machine: object, ports: object, where: Network, folder: object) -> Facts:
        looked.append(where)
        return facts()

    monkeypatch.setattr(measure, "everything", everything)
    run = CliRunner().invoke
    assert run(cli.app, ["doctor", "--port", "4001", "--announce", "203.0.113.7:4001"]).exit_code == 0
    assert looked[0].announce == "/ip4/203.0.113.7/tcp/4001"
    assert run(cli.app, ["doctor", "--announce", "203.0.113.7"]).exit_code == 2
