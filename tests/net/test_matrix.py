"""Every kind of host reaches every other, by the best way that there is."""

import pytest

from tests.net.lab import why_not
from tests.net.matrix import PAIRS, Pair, best, faults, measure, median_s, table

pytestmark = [pytest.mark.net, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

SLOW_S = 20.0
"""Alone on a machine it takes a third of that; see docs/networks.md."""


@pytest.mark.timeout(240)
def test_all_pairs_of_kinds_are_connected_by_the_best_way_with_one_public_peer() -> None:
    pairs = measure(public=1)
    print(table(pairs))
    assert faults(pairs) == []
    assert median_s(pairs) < SLOW_S


def test_a_pair_that_takes_a_worse_way_is_a_fault() -> None:
    pairs = [Pair(a, b, best(a, b), 1.0) for a, b in PAIRS]
    assert faults(pairs) == []
    assert faults([Pair("cone", "cone", "relayed", 1.0), *pairs[1:]]) != []
