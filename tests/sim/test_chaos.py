"""Whole runs under random faults: no rule breaks, a connected quorum goes on, and the run comes to its end."""

from collections import Counter

import pytest

from tests.sim.chaos import KINDS, check


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("volunteers", [3, 7, 16])
def test_no_rule_breaks_under_random_faults(volunteers: int, seed: int) -> None:
    check(seed, volunteers)


def test_every_kind_of_trouble_comes_up() -> None:
    troubles = sum((check(seed, 7).troubles for seed in range(6)), Counter[str]())
    assert set(troubles) == set(KINDS)


@pytest.mark.soak
@pytest.mark.parametrize("volunteers", [3, 7, 16])
def test_no_rule_breaks_in_300_seeds(volunteers: int) -> None:
    for seed in range(1000, 1300):
        check(seed, volunteers)
