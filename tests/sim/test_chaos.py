"""Whole runs under random faults: no rule breaks, a connected quorum goes on, and the run comes to its end."""

from collections import Counter

import pytest

from tests.sim.chaos import KINDS, check


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("volunteers", [3, 7, 16])
def test_no_rule_breaks_under_random_faults(volunteers: int, seed: int) -> None:
    check(seed, volunteers)


@pytest.mark.parametrize(("volunteers", "seed"), [(3, 2199), (7, 2001), (7, 2065)])
def test_who_leaves_waits_for_no_voter_that_was_never_heard_and_leaves_nobody_behind(
    volunteers: int, seed: int
) -> None:
    check(seed, volunteers)


def test_every_kind_of_trouble_comes_up() -> None:
    troubles = sum((check(seed, 7).troubles for seed in range(6)), Counter[str]())
    assert set(KINDS) <= set(troubles)


@pytest.mark.soak
@pytest.mark.parametrize("volunteers", [3, 7, 16])
def test_no_rule_breaks_in_300_seeds(volunteers: int) -> None:
    troubles, longest = Counter[str](), 0.0
    for seed in range(1000, 1300):
        chaos = check(seed, volunteers)
        troubles.update(chaos.troubles)
        longest = max(longest, chaos.longest_lull)
    print(f"\n{volunteers} volunteers, 300 seeds, no rule broken: {dict(sorted(troubles.items()))}")
    print(f"a connected quorum committed within {longest:.0%} of the time that it may take")
    assert troubles["recover"] <= 3, "the organizer is needed only where a block names who has just died, disk and all"
