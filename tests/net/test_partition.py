"""The network falls into two: at most one side commits, and when it is whole again all agree."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Running, endless
from tests.e2e.test_commands import at_round, audited
from tests.e2e.test_survival import blocks
from tests.net.internet import Internet, internet, why_not

pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

HOSTS = 4
APART_S = 20.0
"""Long enough for every view of the smaller side to be given up more than once."""
AGREED_S = 90.0


@pytest.fixture
def net() -> Iterator[Internet]:
    with internet(HOSTS) as made:
        yield made


@pytest.fixture
def roles(net: Internet, tmp_path: Path) -> Iterator[list[Running]]:
    """A coordinator and three volunteers, each on a host of its own, all in the committee."""
    started: list[Running] = []

    def begin(number: int, name: str, *arguments: str | Path) -> Running:
        one = Running(tmp_path / name, *arguments, "--host", Internet.address(number), within=net.command(number))
        started.append(one)
        return one

    try:
        coordinator = begin(1, "coordinator", "launch", endless(tmp_path))
        invite = coordinator.invite()
        for number in range(2, HOSTS + 1):
            begin(number, f"v{number}", "join", invite)
        coordinator.until(lambda said: at_round(2)(said) and len(said["committee"]) == HOSTS, "a full committee")
        yield started
    finally:
        for one in started:
            one.close()


def chains(roles: list[Running]) -> list[list[bytes]]:
    return [blocks(one.directory) for one in roles]


def committed_since(before: list[list[bytes]], now: list[list[bytes]]) -> set[int]:
    """Which of the peers have more blocks than anyone had."""
    most = max(len(chain) for chain in before)
    return {index for index, chain in enumerate(now) if len(chain) > most}


def agreed_after_s(roles: list[Running], beyond: int) -> float:
    """How long it takes until everyone has a round after `beyond`, all the same one."""
    began = time.monotonic()
    while time.monotonic() < began + 2 * AGREED_S:
        if all(len(chain) > beyond for chain in chains(roles)):
            assert len({chain[beyond] for chain in chains(roles)}) == 1
            return time.monotonic() - began
        time.sleep(0.1)
    raise AssertionError("no agreement\n" + "\n".join(one.text()[-2000:] for one in roles))


@pytest.mark.parametrize(
    "apart", [(3, 4), pytest.param((4,), marks=pytest.mark.soak)], ids=["two and two", "three and one"]
)
def test_of_two_sides_at_most_one_commits_and_all_agree_once_they_meet_again(
    net: Internet, roles: list[Running], apart: tuple[int, ...]
) -> None:
    net.split(*apart)
    time.sleep(2.0)  # what was on its way may still be committed
    before = chains(roles)
    time.sleep(APART_S)
    went_on = committed_since(before, chains(roles))
    alone = {number - 1 for number in apart}
    assert went_on <= alone or not went_on & alone, f"both sides committed: {went_on}"
    assert bool(went_on) == (len(apart) == 1), "a half has no quorum, and three of four have one"
    stood_at = max(len(chain) for chain in chains(roles))
    net.heal(*apart)
    took_s = agreed_after_s(roles, stood_at)
    print(f"\n{len(apart)} of {HOSTS} apart for {APART_S:.0f} s: all agree again after {took_s:.0f} s")
    assert took_s <= AGREED_S
    longest = max(chains(roles), key=len)
    assert all(chain == longest[: len(chain)] for chain in chains(roles))
    for one in roles:
        found = audited(one.directory)
        assert found["ranges_lost"] == found["ranges_doubled"] == []
        assert found["digests_agree"]
