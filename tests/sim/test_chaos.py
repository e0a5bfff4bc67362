"""Whole runs under random faults: no rule breaks, nothing is lost, and the run comes to its end."""

import pytest

from tests.sim.chaos import RECIPE, Chaos


def check(seed: int, volunteers: int) -> None:
    chaos = Chaos(seed, volunteers)
    world = chaos.run()
    found = world.audit()
    assert found.clean, f"seed {seed}: {found}"
    assert chaos.finished(), f"seed {seed}: not finished after {world.now:.0f} s: {world.reason()}"
    assert found.samples_done >= RECIPE.rounds.total_steps * RECIPE.inner.batch_sequences
    assert chaos.troubles > 0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("volunteers", [3, 7])
def test_no_rule_breaks_under_random_faults(seed: int, volunteers: int) -> None:
    check(seed, volunteers)


@pytest.mark.soak
@pytest.mark.parametrize("volunteers", [3, 7, 16])
def test_no_rule_breaks_in_300_seeds(volunteers: int) -> None:
    for seed in range(1000, 1300):
        check(seed, volunteers)
