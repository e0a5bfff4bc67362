"""The commands as a user types them, each role a process with its own libp2p daemon."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dugnad.coordinator.chain import Chain
from tests.e2e.processes import PATIENCE_S, QUICK, Running, Start, dugnad, endless

pytestmark = pytest.mark.timeout(240)


def begin_run(start: Start, volunteers: int, rounds: int) -> tuple[Running, list[Running]]:
    """A coordinator and its volunteers, typed one after the other."""
    coordinator = start("coordinator", "launch", QUICK, "--rounds", str(rounds))
    invite = coordinator.invite()
    return coordinator, [start(f"volunteer-{k}", "join", invite) for k in range(volunteers)]


def at_round(round_: int) -> Callable[[dict[str, Any]], bool]:
    return lambda said: bool(said["round"] >= round_)


def audited(directory: Path) -> dict[str, Any]:
    asked = dugnad("audit", directory, "--json")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    found: dict[str, Any] = json.loads(asked.stdout)
    return found


@pytest.mark.soak  # as the demo does
def test_launch_and_two_joins_train_to_the_end_and_leave_no_process(start: Start) -> None:
    coordinator, volunteers = begin_run(start, 2, rounds=8)
    said = coordinator.until(at_round(2), "second round")
    assert {"round", "head", "leader", "coordinator", "peers", "model_digest", "val_loss"} <= set(said)
    asked = dugnad("status", "--dir", coordinator.directory, "--json")
    assert json.loads(asked.stdout).keys() == said.keys()
    assert {peer["nickname"] for peer in said["peers"]} == {one.status()["nickname"] for one in volunteers}  # type: ignore[index]
    assert coordinator.ended() == 0, coordinator.text()
    for one in volunteers:
        assert one.ended() == 0, one.text()
        assert "the run is finished" in one.text()
    for one in (coordinator, *volunteers):
        one.assert_nothing_left()
    found = audited(coordinator.directory)
    assert found["rounds"] == 8
    assert found["ranges_lost"] == found["ranges_doubled"] == []
    assert len(found["credit"]) == 2
    written = dugnad("sample", coordinator.directory, "--prompt", "KING", "--length", "50")
    assert written.returncode == 0, written.stderr
    assert len(written.stdout) >= 50


@pytest.mark.soak  # as one that comes back on an empty disk
@pytest.mark.parametrize("end", [Running.interrupt, Running.kill], ids=["stopped", "killed"])
def test_a_coordinator_that_is_resumed_takes_what_it_missed_and_leads_again(
    start: Start, end: Callable[[Running], None]
) -> None:
    coordinator, volunteers = begin_run(start, 2, rounds=60)
    coordinator.until(lambda said: at_round(3)(said) and len(said["committee"]) == 3, "round with all")
    end(coordinator)
    coordinator.ended()
    coordinator.assert_nothing_left()
    stood_at = audited(coordinator.directory)["rounds"]
    volunteers[0].until(at_round(stood_at + 2), "rounds without a coordinator")
    resumed = start("coordinator", "launch", "--resume", coordinator.directory)
    resumed.until(lambda said: bool(said["leads"] and said["round"] > stood_at), "the lead again")
    assert resumed.ended(90) == 0, resumed.text()
    for one in volunteers:
        assert one.ended() == 0, one.text()
    for one in (coordinator, *volunteers):
        found = audited(one.directory)
        assert found["rounds"] >= 60
        assert found["digests_agree"]
        assert found["ranges_lost"] == found["ranges_doubled"] == []


@pytest.mark.soak  # as when all are killed at once, but gently
def test_a_run_that_everyone_left_in_order_goes_on_from_their_folders(start: Start) -> None:
    coordinator, volunteers = begin_run(start, 3, rounds=30)
    coordinator.until(lambda said: at_round(3)(said) and len(said["committee"]) == 4, "round with all")
    everyone = [coordinator, *volunteers]
    for one in everyone:
        one.interrupt()
    for one in everyone:
        assert one.ended() == 0, one.text()
        one.assert_nothing_left()
    stood_at = max(audited(one.directory)["rounds"] for one in everyone)
    resumed = start("coordinator", "launch", "--resume", coordinator.directory)
    resumed.until(lambda said: True, "sign of life")
    invite = resumed.invite()
    again = [start(one.directory.name, "join", invite) for one in volunteers]
    assert resumed.ended(120) == 0, resumed.text()
    for one in again:
        assert one.ended() == 0, one.text()
    found = audited(coordinator.directory)
    assert found["rounds"] >= 30 > stood_at
    assert found["digests_agree"]


def test_one_interrupt_leaves_in_order_and_two_leave_now_and_the_others_go_on(start: Start) -> None:
    coordinator, volunteers = begin_run(start, 4, rounds=20)
    coordinator.until(lambda said: at_round(2)(said) and len(said["committee"]) == 5, "round with all")
    polite, hurried = volunteers[0], volunteers[1]
    polite.interrupt()
    assert polite.ended() == 0, polite.text()
    assert "left in order" in polite.text()
    hurried.interrupt()
    hurried.interrupt()
    assert hurried.ended(15) in (0, 130), hurried.text()
    for one in (polite, hurried):
        one.assert_nothing_left()
    assert coordinator.ended() == 0, coordinator.text()
    assert audited(coordinator.directory)["rounds"] >= 20


@pytest.mark.soak  # as one of those who were all killed
def test_a_volunteer_that_comes_back_takes_part_again(start: Start) -> None:
    coordinator, volunteers = begin_run(start, 3, rounds=60)
    volunteers[2].until(at_round(2), "second round")
    volunteers[2].kill()
    volunteers[2].assert_nothing_left()
    before = volunteers[2].text()
    again = start("volunteer-2", "join", coordinator.invite())
    assert coordinator.ended() == 0, coordinator.text()
    assert again.ended() == 0, again.text()
    assert "counted" in again.text().removeprefix(before)
    assert audited(again.directory)["rounds"] == audited(coordinator.directory)["rounds"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["join", "dugnad1:abc"], 2, "E101"),
        (["join", "hello"], 2, "E101"),
        (["launch", "tiny-bokos"], 2, "did you mean tiny-books"),
        (["launch"], 2, "--resume"),
        (["launch", "--resume", "nowhere"], 2, "there is no such folder"),
        (["status", "--dir", "nowhere"], 1, "no role is running here"),
        (["audit", "nowhere"], 2, "there is no such folder"),
        (["audit", "."], 2, "no chain.sqlite"),
        (["sample", "nowhere"], 2, "there is no such folder"),
        (["sample", "."], 2, "no checkpoint here"),
        (["checkpoints", "nowhere"], 2, "there is no such folder"),
        (["checkpoints", "."], 2, "no checkpoint here"),
        (["launch", "tiny-books", "--host", "banana"], 2, "--host banana"),
        (["launch", "tiny-books", "--rounds", "9999"], 2, "39 rounds"),
        (["demo", "--json", "missing/x.json"], 2, "missing/x.json can't be written"),
        (["demo", "--json", "."], 2, "can't be written"),
        (["demo", "--rounds", "11"], 2, "take at least 12"),
    ],
)
def test_bad_input_is_told_in_a_sentence(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    tried = dugnad(*(str(tmp_path / word) if word == "nowhere" else word for word in arguments))
    assert tried.returncode == status, tried.stderr
    assert words in tried.stderr
    assert "Traceback" not in tried.stderr


@pytest.mark.parametrize(
    ("line", "instead", "words"),
    [
        ("lr = 2e-3", "learning_rate = 2e-3", ["inner.learning_rate", "inner.lr"]),
        ("heads = 2", "heads = 3", ["model.width", "model.heads"]),
        ("momentum = 0.9", "momentum = 1.5", ["outer.momentum"]),
        ("[codec]", "[codec", ["line", "column"]),
    ],
)
def test_a_bad_recipe_names_file_key_and_what_is_allowed(
    tmp_path: Path, line: str, instead: str, words: list[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(QUICK.read_text().replace(line, instead, 1))
    tried = dugnad("launch", recipe, "--dir", tmp_path / "run")
    assert tried.returncode == 2
    for word in ["mine.toml", *words]:
        assert word in tried.stderr
    assert "Traceback" not in tried.stderr


@pytest.mark.parametrize(
    ("line", "instead", "words"),
    [
        ("part_elements = 8192", "part_elements = 64", "codec.part_elements is 64 (with codec.block_elements = 64)"),
        ("validation_bytes = 65536", "validation_bytes = 99999999", "data.validation_bytes is 99999999"),
    ],
)
def test_a_recipe_that_does_not_go_with_its_model_or_corpus_begins_no_run(
    tmp_path: Path, line: str, instead: str, words: str
) -> None:
    recipe = tmp_path / "mine.toml"
    text = QUICK.read_text().replace("width = 64", "width = 256").replace("block_elements = 256", "block_elements = 64")
    recipe.write_text(text.replace(line, instead))
    tried = dugnad("launch", recipe, "--dir", tmp_path / "run")
    assert tried.returncode == 2
    assert f"{recipe}: {words}" in tried.stderr
    assert "Traceback" not in tried.stderr
    assert not (tmp_path / "run" / "chain.sqlite").exists()


def test_an_occupied_port_is_named_and_nothing_is_started(tmp_path: Path, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for option in ("--port", "--metrics-port"):
            tried = dugnad("launch", QUICK, "--dir", tmp_path / option, option, port)
            assert tried.returncode == 1
            assert port in tried.stderr
            assert "Traceback" not in tried.stderr


def test_a_folder_is_lived_in_by_one_role_at_a_time(start: Start) -> None:
    coordinator = start("coordinator", "launch", QUICK)
    coordinator.until(lambda said: True, "status")
    commands: list[list[str | Path]] = [
        ["launch", "--resume", coordinator.directory],
        ["launch", QUICK, "--dir", coordinator.directory],
        ["join", coordinator.invite(), "--dir", coordinator.directory],
    ]
    for command in commands:
        tried = dugnad(*command)
        assert tried.returncode == 2
        assert f"lives here (pid {coordinator.process.pid})" in tried.stderr
    coordinator.interrupt()
    assert coordinator.ended(20) == 0
    again = dugnad("launch", QUICK, "--dir", coordinator.directory)
    assert again.returncode == 2
    assert "--resume" in again.stderr


@pytest.mark.parametrize("left", ["an empty file", "tables without a genesis"])
def test_a_launch_killed_before_its_run_began_is_launched_again(tmp_path: Path, start: Start, left: str) -> None:
    chain = tmp_path / "coordinator" / "chain.sqlite"
    chain.parent.mkdir()
    chain.touch()
    if left == "tables without a genesis":
        Chain(chain).close()
    refused = dugnad("launch", "--resume", chain.parent)
    assert refused.returncode == 2
    assert "no run.key here" in refused.stderr
    assert start("coordinator", "launch", QUICK).invite()


def test_of_two_joins_started_at_once_in_one_folder_one_is_refused(start: Start) -> None:
    coordinator = start("coordinator", "launch", QUICK)
    invite = coordinator.invite()
    twins = [start("both", "join", invite) for _ in range(2)]
    deadline = time.monotonic() + PATIENCE_S
    while all(twin.process.poll() is None for twin in twins) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sorted(twin.process.poll() or 0 for twin in twins) == [0, 2], "one goes on, one does not begin"
    assert f"dugnad: {twins[0].directory}: " in twins[0].text()


@pytest.mark.soak
def test_a_corrupt_checkpoint_is_named_and_what_is_damaged_comes_from_other_keepers(
    start: Start, tmp_path: Path
) -> None:
    coordinator = start("coordinator", "launch", endless(tmp_path))
    for k in range(2):
        start(f"volunteer-{k}", "join", coordinator.invite())
    coordinator.until(at_round(5), "fifth round")
    coordinator.interrupt()
    assert coordinator.ended() == 0, coordinator.text()
    newest = sorted((coordinator.directory / "checkpoints").glob("round-*"))[-1]
    weights = newest / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    listed = dugnad("checkpoints", coordinator.directory, "--json")
    assert listed.returncode == 1
    assert [row["intact"] for row in json.loads(listed.stdout)] == [False, True]
    resumed = start("coordinator", "launch", "--resume", coordinator.directory)
    resumed.until(lambda said: bool(said["leads"]), "the lead again")
    assert str(weights) in resumed.text()
    assert "Traceback" not in resumed.text()
    found = audited(coordinator.directory)
    assert found["digests_agree"]
    assert not found["ranges_lost"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB of its own."""
    place = tmp_path / "coordinator"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.soak
def test_a_full_disk_ends_the_coordinator_with_a_sentence_and_nothing_is_lost(small_disk: Path, start: Start) -> None:
    coordinator, volunteers = begin_run(start, 2, rounds=60)
    coordinator.until(at_round(2), "second round")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # else closing it fails as well
        while True:
            file.write(bytes(64 * 1024))
    assert coordinator.ended() == 1, coordinator.text()
    assert re.search("disk is full|No space left|takes no more", coordinator.text())
    assert "Traceback" not in coordinator.text()
    filler.unlink()
    stood_at = audited(small_disk)["rounds"]
    resumed = start("coordinator", "launch", "--resume", small_disk)
    assert resumed.ended(90) == 0, resumed.text()
    assert audited(small_disk)["rounds"] >= 60 > stood_at
    for one in volunteers:
        assert one.ended() == 0
