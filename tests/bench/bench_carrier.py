"""A punched connection against libp2p through a relay, between two volunteers behind routers and one public peer.

    python tests/bench/bench_carrier.py        needs root: it builds a small internet of network namespaces

The same bytes go both ways in turn, and all processor time counts: both volunteers, the relay, and all their daemons.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.net.fleet import Fleet, Member, fleet
from tests.net.lab import lab, why_not


def measure(turns: int = 5, num_bytes: int = 256 * 2**20) -> dict[str, Any]:
    """Rates in bytes/s and processor seconds a gigabyte, of the median turn, and how long it took the two to meet."""
    with (
        lab({"hub": "public", "ann": "cone", "bob": "cone"}) as net,
        tempfile.TemporaryDirectory() as folder,
        fleet(net, Path(folder)) as peers,
    ):
        peers.begin("hub")
        ann, bob = peers.begin("ann", "bob")
        for one in (ann, bob):
            while one.ask(do="state")["reach"] == "unknown":
                pass
        ann.ask(do="connect", to=[peers.members["hub"].peer], within_s=20)
        met_s = ann.ask(do="meet", to=bob.peer)["seconds"]
        both = [[_give(peers, ann, bob, num_bytes, relayed=way) for way in (False, True)] for _ in range(turns + 1)]
    punched, relayed = (_median(list(turns)) for turns in zip(*both[1:], strict=True))  # the first warms up
    return {
        "met_s": met_s,
        "punched": punched,
        "relayed": relayed,
        "rate_ratio": punched["bytes_per_s"] / relayed["bytes_per_s"],
        "cpu_ratio": punched["cpu_s_per_gb"] / relayed["cpu_s_per_gb"],
    }


def _give(peers: Fleet, ann: Member, bob: Member, num_bytes: int, *, relayed: bool) -> dict[str, float]:
    before = sum(peers.cpu_s().values())
    said = ann.ask(do="give", to=bob.peer, bytes=num_bytes, relayed=relayed)
    assert said["path"] == ("relayed" if relayed else "punched"), said
    cpu_s = sum(peers.cpu_s().values()) - before
    return {"bytes_per_s": num_bytes / said["seconds"], "cpu_s_per_gb": cpu_s / num_bytes * 1e9}


def _median(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    if (reason := why_not()) is not None:
        print(f"left out: {reason}")
    else:
        result = measure(parser.parse_args().turns)
        print(json.dumps(result, indent=2))
        rate, cpu = result["rate_ratio"], result["cpu_ratio"]
        print(f"punched: {rate:.1f} x as fast as relayed, at {cpu:.0%} of its processor time")
