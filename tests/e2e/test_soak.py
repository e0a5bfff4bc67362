"""Real processes killed at a hundred random moments: every restart comes up healthy, and the model learns as much."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dugnad.coordinator import history
from dugnad.coordinator.chain import Chain
from tests.e2e.processes import Running, counted, endless
from tests.e2e.test_commands import audited
from tests.e2e.test_survival import assert_one_history

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

KILLS = 100
ROUNDS = 40
TRAIN_S = 1.0
"""Of a round: who restarts should miss a few, not dozens."""
LOSS_WITHIN = 0.02
LAST = 3
"""How many evaluations at the end of a run are compared."""


@pytest.fixture
def running() -> Iterator[list[Running]]:
    """Whatever is put here is ended with the test."""
    started: list[Running] = []
    yield started
    for one in started:
        one.close()


def in_step_beyond(round_: int) -> Callable[[dict[str, Any]], bool]:
    return lambda said: bool(said["round"] > round_ and said["model_round"] == said["round"])


@pytest.mark.parametrize("victim", ["coordinator", "volunteer"])
def test_whoever_is_killed_at_random_moments_comes_up_healthy_every_time(
    tmp_path: Path, running: list[Running], victim: str
) -> None:
    """Healthy: it takes up the round that its peers committed meanwhile, and the chain grows from there."""
    rng = random.Random(victim)
    coordinator = Running(tmp_path / "coordinator", "launch", endless(tmp_path))
    running.append(coordinator)
    invite = coordinator.invite()
    volunteers = [Running(tmp_path / f"v{k}", "join", invite) for k in range(3)]
    running += volunteers
    coordinator.until(lambda said: len(said["committee"]) == 4, "a full committee")
    one, witness = (coordinator, volunteers[1]) if victim == "coordinator" else (volunteers[0], volunteers[1])
    began, slowest_s = time.monotonic(), 0.0
    for kill in range(KILLS):
        if kill % 4:  # at work
            time.sleep(rng.uniform(0.0, 2.0))
        one.kill()
        again = ("launch", "--resume", one.directory) if victim == "coordinator" else ("join", invite)
        one = Running(one.directory, *again)
        running[0 if victim == "coordinator" else 1] = one
        if kill % 4 == 3:  # the next kill comes while it starts
            time.sleep(rng.uniform(0.0, 4.0))
            continue
        since = time.monotonic()
        stands = witness.until(lambda said: True, "a witness")["round"]
        one.until(in_step_beyond(stands), "its next round")
        slowest_s = max(slowest_s, time.monotonic() - since)
    found = audited(one.directory)
    took_s = time.monotonic() - began
    print(
        f"\n{KILLS} kills of a {victim} in {took_s:.0f} s and {found['rounds']} rounds; "
        f"the slowest restart took part after {slowest_s:.1f} s"
    )
    assert_one_history([one.directory for one in running])


def losses(directory: Path) -> list[tuple[int, float]]:
    """(tokens that were committed until then, validation loss) of each evaluation."""
    chain = Chain(directory / "chain.sqlite", read_only=True)
    try:
        out, tokens = list[tuple[int, float]](), 0
        for row in history.rows(chain):
            tokens += row.tokens
            if row.val_loss is not None:
                out.append((tokens, row.val_loss))
        return out
    finally:
        chain.close()


def loss_at(tokens: int, curve: list[tuple[int, float]]) -> float:
    """The loss of a run when so many tokens were committed, between two of its evaluations."""
    for (low, before), (high, after) in itertools.pairwise(curve):
        if low <= tokens <= high:
            return before + (after - before) * (tokens - low) / max(1, high - low)
    raise AssertionError(f"{tokens} tokens are not in a run of {curve[0][0]} to {curve[-1][0]}")


def counted_after(one: Running, round_: int) -> Callable[[dict[str, Any]], bool]:
    """Whether work of `one` counted in a later round."""
    return lambda said: max(counted(one), default=0) > round_


def a_run(tmp_path: Path, running: list[Running], *, seed: int, disturbed: bool) -> list[tuple[int, float]]:
    """What a run of four volunteers learned, if nobody dies, or one after the other.

    The next one dies when the one before has been at work again for a while: where most are dead most of the time, a
    round has fewer tokens, so that at equal tokens there were more rounds, which teach more.
    """
    rng = random.Random(seed)
    tmp_path.mkdir()
    coordinator = Running(tmp_path / "coordinator", "launch", endless(tmp_path, seed=seed, train_s=TRAIN_S))
    running.append(coordinator)
    invite = coordinator.invite()
    volunteers = {k: Running(tmp_path / f"v{k}", "join", invite) for k in range(4)}
    running += volunteers.values()
    before = len(running)
    coordinator.until(lambda said: len(said["committee"]) == 5, "a full committee")
    rounds = ROUNDS if disturbed else 3 * ROUNDS // 2  # with fewer at work a round has fewer tokens, never more
    while (head := coordinator.until(lambda said: True, "status")["round"]) < rounds:
        if not disturbed:
            time.sleep(0.5)
            continue
        victim, since = rng.choice(sorted(volunteers)), time.monotonic()
        volunteers[victim].kill()
        again = volunteers[victim] = Running(tmp_path / f"v{victim}", "join", invite)
        running.append(again)
        again.until(counted_after(again, head + 1), "work that counts again")
        time.sleep(rng.uniform(1.0, 2.0) * (time.monotonic() - since))
    if disturbed:
        print(f"\nseed {seed}: {len(running) - before} volunteers killed in {head} rounds")
    for one in running:
        one.close()
    assert_one_history([coordinator.directory, *(one.directory for one in volunteers.values())])
    return losses(coordinator.directory)


def test_killed_volunteers_cost_time_and_hardly_any_loss(tmp_path: Path, running: list[Running]) -> None:
    apart = list[float]()
    for seed in (1, 2, 3):
        undisturbed = a_run(tmp_path / f"undisturbed-{seed}", running, seed=seed, disturbed=False)
        disturbed = a_run(tmp_path / f"disturbed-{seed}", running, seed=seed, disturbed=True)[-LAST:]
        theirs = sum(loss for _, loss in disturbed) / LAST
        ours = sum(loss_at(tokens, undisturbed) for tokens, _ in disturbed) / LAST
        apart.append(theirs / ours - 1)
        print(
            f"\nseed {seed}: loss {theirs:.4f} with volunteers killed, {ours:.4f} without, "
            f"at {disturbed[-1][0]} tokens: {apart[-1]:+.2%}"
        )
    assert abs(sum(apart) / len(apart)) <= LOSS_WITHIN
    assert max(apart) <= 2 * LOSS_WITHIN
