"""Sets of sample indices as sorted half-open ranges: what is to be trained on, what is done."""

from collections.abc import Iterable
from itertools import pairwise

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def normal(ranges: Iterable[Range]) -> Ranges:
    """The same indices as sorted, disjoint, non-adjacent, non-empty ranges."""
    out: list[Range] = []
    for start, end in sorted(r for r in ranges if r[0] < r[1]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return tuple(out)


def count(ranges: Iterable[Range]) -> int:
    """How many indices the ranges hold; overlaps count twice."""
    return sum(end - start for start, end in ranges)


def take(ranges: Ranges, samples: int) -> tuple[Ranges, Ranges]:
    """The first `samples` indices in the order given, and the rest."""
    taken: list[Range] = []
    rest: list[Range] = []
    for start, end in ranges:
        cut = min(end, start + samples)
        if start < cut:
            taken.append((start, cut))
            samples -= cut - start
        if cut < end:
            rest.append((cut, end))
    return tuple(taken), tuple(rest)


def disjoint(ranges: Iterable[Range]) -> bool:
    """Whether no index stands in two of the ranges."""
    ordered = sorted(r for r in ranges if r[0] < r[1])
    return all(left[1] <= right[0] for left, right in pairwise(ordered))


def minus(ranges: Iterable[Range], others: Iterable[Range]) -> Ranges:
    """The indices of `ranges` that none of `others` holds, normal."""
    out = list(normal(ranges))
    for cut_start, cut_end in normal(others):
        pieces: list[Range] = []
        for start, end in out:
            pieces += [(start, min(end, cut_start)), (max(start, cut_end), end)]
        out = [r for r in pieces if r[0] < r[1]]
    return normal(out)
