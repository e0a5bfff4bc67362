"""Machines whose clocks are hours off take part like any other, and are told."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import QUICK, Running
from tests.e2e.test_commands import at_round, audited

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed (Debian package faketime)"),
]


def off_by(seconds: int) -> tuple[str, ...]:
    """What to put before a command so that its clock is off; the steady clock, which nobody sets, is not."""
    # as faketime guesses it, threads that wait for the interpreter's lock would wait by the wrong clock, for ever
    return ("env", "FAKETIME_FORCE_MONOTONIC_FIX=0", "faketime", "--exclude-monotonic", "-f", f"{seconds:+d}s")


@pytest.fixture
def running() -> Iterator[list[Running]]:
    started: list[Running] = []
    yield started
    for one in started:
        one.close()


def test_volunteers_whose_clocks_are_an_hour_off_train_like_any_other(tmp_path: Path, running: list[Running]) -> None:
    coordinator = Running(tmp_path / "coordinator", "launch", QUICK, "--rounds", "30")
    running.append(coordinator)
    invite = coordinator.invite()
    right = Running(tmp_path / "right", "join", invite)
    fast = Running(tmp_path / "fast", "join", invite, within=off_by(3600))
    slow = Running(tmp_path / "slow", "join", invite, within=off_by(-3600))
    running += [right, fast, slow]
    names = {}
    for one, offset_s in ((right, 0), (fast, -3600), (slow, 3600)):
        said = one.until(at_round(2), "second round")
        names[one] = said["peer"]
        assert (said["clock_warning"] is None) == (offset_s == 0)
        assert abs(said["clock_offset_s"] - offset_s) < 2.0
    for one in running:
        assert one.ended(120) == 0, one.text()
    assert "corrected against" in fast.text()
    assert "corrected against" in slow.text()
    found = audited(coordinator.directory)
    assert found["rounds"] == 30
    credit = [found["credit"][names[one]] for one in (right, fast, slow)]
    assert min(credit) > 0.5 * max(credit), credit
