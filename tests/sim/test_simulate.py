"""`dugnad simulate`: the same from the same seed, numbers that add up, and a rule that breaks ends the run."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dugnad.configs.recipe import load
from dugnad.coordinator.replica import Replica
from dugnad.peer import cli, simulate
from dugnad.peer.simulate import Asked, Found, SimulationError, bytes_per_s
from dugnad.peer.stage import COORDINATOR
from dugnad.peer.traffic import BULK

RECIPE = load("tiny-books")
PART_BYTES = (66_000,) * 14
KEYS = [
    "seed", "peers", "rounds_committed", "rounds_discarded", "invariants_broken", "utilization", "bytes_per_peer_s",
    "waits",
]  # fmt: skip


def asked(*, peers: int = 6, churn: float = 0.0, seed: int = 1, rounds: int = 6, uplink: str = "50mbit") -> Asked:
    return Asked(recipe="tiny-books", peers=peers, churn=churn, uplink=uplink, seed=seed, rounds=rounds)


def simulated(said: Asked) -> tuple[simulate.Simulation, Found]:
    assert said.rounds is not None
    simulation = simulate.Simulation(RECIPE.cut(said.rounds), said, PART_BYTES)
    return simulation, simulation.run()


def command(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["simulate", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_same_seed_gives_the_same_output_byte_for_byte_and_another_seed_another(tmp_path: Path) -> None:
    said: list[tuple[bytes, bytes]] = []
    for hash_seed, seed in [
        ("1", "4"),
        ("2", "4"),
        ("1", "5"),
    ]:  # in a process of its own each: sets have another order
        file = tmp_path / f"{hash_seed}-{seed}.json"
        words = ["simulate", "tiny-books", "--peers", "5", "--churn", "0.1", "--rounds", "5", "--seed", seed]
        done = subprocess.run(
            [sys.executable, "-m", "dugnad.peer", *words, "--json", str(file)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        )
        said.append((done.stdout, file.read_bytes()))
    assert said[0] == said[1]
    assert said[0][0] != said[2][0]
    assert said[0][1] != said[2][1]
    found = json.loads(said[0][1])
    assert list(found) == KEYS
    assert (found["seed"], found["peers"], found["rounds_committed"], found["invariants_broken"]) == (4, 5, 5, [])


def test_training_and_waits_are_all_of_the_time_that_volunteers_were_up() -> None:
    simulation, found = simulated(asked(rounds=12))
    traffic, world = simulation.world.traffic, simulation.world
    up_s = sum(traffic.up_s.values()) + sum(
        world.now - node.up_since for node in world.nodes.values() if node.peer != COORDINATOR
    )
    assert 0.1 < found.utilization < 1
    assert sum(found.waits.values()) + found.utilization * up_s == pytest.approx(up_s, rel=0.03)


def test_a_thinner_line_means_more_waiting_for_bytes_and_fewer_rounds() -> None:
    (_, fast), (_, slow) = simulated(asked(uplink="1gbit")), simulated(asked(uplink="10mbit"))
    assert slow.rounds_per_hour < fast.rounds_per_hour
    assert slow.utilization < fast.utilization
    for_bytes = [sum(found.waits.get(what, 0.0) for what in (simulate.UPLOAD, simulate.UPLOADS, simulate.AVERAGES))
                 for found in (fast, slow)]  # fmt: skip
    assert for_bytes[1] > 3 * for_bytes[0]


def test_everyone_trained_sends_the_whole_vector_once_and_every_message_is_counted() -> None:
    simulation, found = simulated(asked(rounds=8))
    commits = [commit.block for commit in simulation.world.chain() if commit.block.parts]
    owned = sum(PART_BYTES)
    for name in simulation.world.disks:
        own = [block for block in commits if name in {entry.peer for entry in block.entries}]
        sent = simulation.world.traffic.sent[name]["upload"]
        assert sent <= len(own) * owned  # what it reduces itself goes nowhere
    assert set(found.bytes_per_peer_s) >= BULK - {"state"} | {"plan", "freeze", "vote", "commit", "report", "summary"}


def test_the_churn_is_the_share_that_dies_in_each_round_and_as_many_come() -> None:
    simulation, found = simulated(asked(peers=20, churn=0.1, rounds=15))
    volunteers = simulation.world.traffic.sent.keys() - {COORDINATOR}
    died = sum(1 for peer in volunteers if peer not in simulation.world.nodes)
    assert found.rounds_committed == 15
    assert 0.7 * 2 * 15 <= died <= 2 * 15
    assert len(simulation.world.nodes) - 1 >= 20 - 6, "some have not been replaced yet"


def test_a_broken_rule_ends_the_run_with_its_seed_and_what_replays_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.json"
    arguments = ["tiny-books", "--peers", "4", "--churn", "0.25", "--uplink", "5mbit", "--seed", "7", "--rounds", "5"]
    with monkeypatch.context() as broken:
        broken.setattr(Replica, "missing", lambda self, block: ())  # votes and applies without the bytes
        status, out, _ = command(*arguments, "--json", str(file))
        replayed = next(line for line in out.splitlines() if line.startswith("replay"))
        words = shlex.split(replayed.removeprefix("replay"))
        assert words[:2] == ["dugnad", "simulate"]
        assert command(*words[2:])[1] == out
    assert status == 1
    rules = json.loads(file.read_text())["invariants_broken"]
    assert len(rules) == 1
    assert rules[0].startswith("seed 7, ")
    assert "bytes that it does not hold" in rules[0]
    assert command(*words[2:])[0] == 0, "with the rule in place nothing is broken"


def test_a_chain_that_does_not_hold_is_a_broken_rule_too(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate.Simulation(RECIPE.cut(3), asked(rounds=3), PART_BYTES)
    whole = simulation.world.chain
    monkeypatch.setattr(simulation.world, "chain", lambda: [commit for commit in whole() if commit.block.round != 2])
    found = simulation.run()
    assert found.invariants_broken
    assert "the chain does not hold" in found.invariants_broken[0]


def test_where_everyone_dies_in_every_round_the_run_stands_still_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    status, out, _ = command("tiny-books", "--peers", "4", "--churn", "1", "--rounds", "9", "--json", str(file))
    assert status == 1
    assert "stopped   no round in 800 s: " in out
    found = json.loads(file.read_text())
    assert (found["invariants_broken"], found["rounds_committed"] < 9) == ([], True)


def test_what_cannot_be_written_whole_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "found.json"
    file.write_text("before")

    def full(*_: object) -> None:
        assert file.read_text() == "before"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    status, _, err = command("tiny-books", "--peers", "2", "--rounds", "1", "--json", str(file))
    assert (status, "No space left" in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    assert file.read_text() == "before"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny-books", "--peers", "0"], "--peers is 0: a simulated run has 1 to 1000 volunteers"),
        (["tiny-books", "--peers", "-3"], "--peers is -3"),
        (["tiny-books", "--peers", "1001"], "--peers is 1001"),
        (["tiny-books", "--peers", "1"], "tiny-books waits for 2"),
        (["tiny-books", "--churn", "1.5"], "--churn is 1.5: it is a share, from 0 to 1"),
        (["tiny-books", "--churn", "-0.1"], "--churn is -0.1"),
        (["tiny-books", "--churn", "nan"], "--churn is nan"),
        (["tiny-books", "--uplink", "100mb"], '--uplink "100mb" is no rate: a number above 0 and kbit, mbit or gbit'),
        (["tiny-books", "--uplink", "0mbit"], '"0mbit" is no rate'),
        (["tiny-books", "--uplink", "fast"], '"fast" is no rate'),
        (["tiny-books", "--step-s", "0"], "--step-s is 0"),
        (["tiny-boks"], "tiny-boks: no such recipe or file"),
        (["tiny-books", "--rounds", "1000"], "--rounds is 1000, but tiny-books ends after"),
        (["tiny-books", "--json", "/no/such/folder/x.json"], "can't be written"),
    ],
)
def test_bad_input_is_told_in_a_sentence(arguments: list[str], words: str) -> None:
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("rate", "expected"),
    [("100mbit", 12.5e6), ("1 Gbit/s", 125e6), ("500kbit", 62_500.0), ("2.5Mbit", 312_500.0)],
)
def test_a_rate_is_a_number_and_a_unit(rate: str, expected: float) -> None:
    assert bytes_per_s(rate) == expected


@pytest.mark.parametrize("rate", ["", "mbit", "5", "1e3mbit", "-1mbit", "5 MB/s", "5mbit!"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(SimulationError, match="is no rate"):
        bytes_per_s(rate)


def test_the_help_says_what_churn_is() -> None:
    status, out, _ = command("--help")
    text = " ".join(out.split())
    assert status == 0
    assert "Share of the volunteers, 0 to 1, that die in each round" in text
