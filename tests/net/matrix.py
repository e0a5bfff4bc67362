"""Who reaches whom, by which way, and after how long: all pairs of the five kinds of hosts.

python -m tests.net.matrix [--public N]        prints the table; needs root
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path

from tests.net.fleet import fleet
from tests.net.lab import KINDS, Kind, lab

PAIRS = tuple(combinations_with_replacement(KINDS, 2))
WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Pair:
    """How a peer on a host of kind `b` came to a way for bulk bytes to one on a host of kind `a`."""

    a: Kind
    b: Kind
    path: str | None
    """direct, punched or relayed; None if it did not reach it at all."""
    seconds: float
    """From the start of the second process."""

    @property
    def connected(self) -> bool:
        """Whether it reached it."""
        return self.path is not None


def measure(public: int = 1) -> list[Pair]:
    """All 15 pairs, with so many public peers through whom the others join."""
    hosts: dict[str, Kind] = {f"hub{k}": "public" for k in range(public)}
    hosts |= {f"one-{kind}": kind for kind in KINDS} | {f"two-{kind}": kind for kind in KINDS}
    with lab(hosts) as net, tempfile.TemporaryDirectory() as folder, fleet(net, Path(folder)) as peers:
        for hub in range(public):
            peers.begin(f"hub{hub}")
        ones = {
            one.peer: kind for kind, one in zip(KINDS, peers.begin(*(f"one-{kind}" for kind in KINDS)), strict=True)
        }
        found = []
        for number, kind in enumerate(KINDS, 1):
            (two,) = peers.begin(f"two-{kind}")
            ways = two.ask(do="connect", to=list(ones)[:number], within_s=WITHIN_S)
            found += [Pair(ones[peer], kind, way["path"], way["seconds"]) for peer, way in ways.items()]
        return found


def median_s(pairs: list[Pair]) -> float:
    """Of the time from start to connection."""
    return statistics.median(pair.seconds for pair in pairs)


def best(a: str, b: str) -> str:
    """The best way between two kinds of hosts."""
    if "public" in (a, b):
        return "direct"
    return "relayed" if "symmetric" in (a, b) else "punched"


def faults(pairs: list[Pair]) -> list[str]:
    """What is not as it should be."""
    found = [f"{pair.a} - {pair.b}: {pair.path}" for pair in pairs if pair.path != best(pair.a, pair.b)]
    return found + [f"{pair} was not tried" for pair in PAIRS if pair not in {(one.a, one.b) for one in pairs}]


def table(pairs: list[Pair]) -> str:
    """For people: a row for each kind."""
    ways: Mapping[tuple[str, str], Pair] = {(pair.a, pair.b): pair for pair in pairs}
    lines = ["".join(f"{word:<17}" for word in ("", *KINDS))]
    for b in KINDS:
        cells = [ways.get((a, b)) for a in KINDS]
        shown = [f"{pair.path or 'nothing'} {pair.seconds:.1f} s" if pair is not None else "" for pair in cells]
        lines.append("".join(f"{word:<17}" for word in (b, *shown)).rstrip())
    return "\n".join([*lines, f"median {median_s(pairs):.1f} s from the start of the second peer's process"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=int, default=1)
    print(table(measure(parser.parse_args().public)))
