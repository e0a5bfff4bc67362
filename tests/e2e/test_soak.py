"""Real processes killed at random moments, again and again; the chain must hold and the run must end."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import QUICK, Running, dugnad

pytestmark = pytest.mark.soak
KILLS = 20


@pytest.fixture
def running() -> Iterator[list[Running]]:
    """Whatever is put here is ended with the test."""
    started: list[Running] = []
    yield started
    for one in started:
        one.close()


def audit(directory: Path) -> dict[str, object]:
    asked = dugnad("audit", directory, "--json")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    found: dict[str, object] = json.loads(asked.stdout)
    return found


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_coordinator_killed_at_random_moments_always_comes_back(
    tmp_path: Path, running: list[Running], seed: int
) -> None:
    rng = random.Random(seed)
    directory = tmp_path / "coordinator"
    coordinator = Running(directory, "launch", QUICK, "--rounds", "120")
    running.append(coordinator)
    invite = coordinator.invite()
    volunteers = [Running(tmp_path / f"v{k}", "join", invite) for k in range(2)]
    running += volunteers
    coordinator.until(lambda said: said["round"] >= 1, "first round")
    for _ in range(KILLS):
        time.sleep(rng.uniform(0.5, 8.0))
        if coordinator.process.poll() is not None:
            break
        coordinator.kill()
        coordinator = Running(directory, "launch", "--resume", directory)
        running.append(coordinator)
    assert coordinator.ended(300) == 0, coordinator.text()[-3000:]
    for one in volunteers:
        assert one.ended() == 0, one.text()[-3000:]
    assert audit(directory)["rounds"] == 120


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_volunteers_killed_at_random_moments_are_replaced_and_nothing_is_lost(
    tmp_path: Path, running: list[Running], seed: int
) -> None:
    rng = random.Random(seed)
    coordinator = Running(tmp_path / "coordinator", "launch", QUICK, "--rounds", "150")
    running.append(coordinator)
    invite = coordinator.invite()
    volunteers = {k: Running(tmp_path / f"v{k}", "join", invite) for k in range(4)}
    running += volunteers.values()
    coordinator.until(lambda said: said["round"] >= 1, "first round")
    for _ in range(KILLS):
        time.sleep(rng.uniform(0.5, 6.0))
        if coordinator.process.poll() is not None:
            break
        victim = rng.choice(sorted(volunteers))
        if volunteers[victim].process.poll() is not None:
            continue
        volunteers[victim].kill()
        volunteers[victim] = Running(tmp_path / f"v{victim}", "join", invite)
        running.append(volunteers[victim])
    assert coordinator.ended(400) == 0, coordinator.text()[-3000:]
    found = audit(tmp_path / "coordinator")
    assert found["ranges_lost"] == found["ranges_doubled"] == []
