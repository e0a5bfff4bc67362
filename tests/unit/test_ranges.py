from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st

from dugnad.coordinator import ranges

some_ranges = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8)
"""Any ranges: overlapping, empty and backwards ones too."""
forward_ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)).map(lambda r: (r[0], r[0] + r[1])))


def indices(them: ranges.Ranges | list[ranges.Range]) -> list[int]:
    return [index for start, end in them for index in range(start, end)]


@given(some_ranges)
def test_the_normal_form_holds_the_same_indices(them: list[ranges.Range]) -> None:
    assert indices(ranges.normal(them)) == sorted(set(indices(them)))


@given(some_ranges)
def test_normal_ranges_are_sorted_apart_and_not_empty(them: list[ranges.Range]) -> None:
    edges = [edge for r in ranges.normal(them) for edge in r]
    assert edges == sorted(set(edges))


@given(forward_ranges)
def test_count_is_the_number_of_indices_with_repeats(them: list[ranges.Range]) -> None:
    assert ranges.count(them) == len(indices(them))


@given(some_ranges, st.integers(0, 100))
def test_what_is_taken_comes_first_and_the_rest_is_left(them: list[ranges.Range], samples: int) -> None:
    taken, rest = ranges.take(tuple(them), samples)
    assert indices(taken) == indices(them)[:samples]
    assert indices(rest) == indices(them)[samples:]
    assert all(start < end for start, end in (*taken, *rest))


@example([(0, 3), (3, 5)])
@given(some_ranges)
def test_ranges_are_disjoint_when_no_index_repeats(them: list[ranges.Range]) -> None:
    assert ranges.disjoint(them) == (max(Counter(indices(them)).values(), default=1) == 1)


@given(some_ranges, some_ranges)
def test_minus_leaves_exactly_the_indices_that_others_lack(
    them: list[ranges.Range], others: list[ranges.Range]
) -> None:
    left = ranges.minus(them, others)
    assert indices(left) == sorted(set(indices(them)) - set(indices(others)))
    assert left == ranges.normal(left)
