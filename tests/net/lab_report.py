"""All that the lab shows, as a file for machines and tables for people: `make lab OUT=FILE`.

{pairs: [{a, b, connected, path, seconds}], pairs_with_five_public: the same, run: see `routed_run.measure`,
bulk: see `tests/bench/bench_carrier.py`}. Ends with status 1 if a pair took another way than the best.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import bench_carrier
from tests.net import matrix, routed_run
from tests.net.lab import why_not
from tests.net.matrix import Pair


def _pairs(pairs: list[Pair]) -> list[dict[str, Any]]:
    return [
        {"a": one.a, "b": one.b, "connected": one.connected, "path": one.path, "seconds": round(one.seconds, 2)}
        for one in pairs
    ]


def measure() -> tuple[dict[str, Any], list[str]]:
    """Everything, and which pairs are not as they should be; tells it on the way. Takes some minutes."""
    found: dict[str, Any] = {}
    faults: list[str] = []
    for name, public in (("pairs", 1), ("pairs_with_five_public", 5)):
        pairs = matrix.measure(public)
        print(f"\n{public} public peer{'s' * (public > 1)} to join through\n{matrix.table(pairs)}", flush=True)
        found[name] = _pairs(pairs)
        faults += matrix.faults(pairs)
    with tempfile.TemporaryDirectory() as folder:
        found["run"] = routed_run.measure(Path(folder))
    print(f"\na run across routers\n{json.dumps(found['run'], indent=2)}", flush=True)
    found["bulk"] = bench_carrier.measure()
    print(f"\nbulk bytes between two behind routers\n{json.dumps(found['bulk'], indent=2)}", flush=True)
    return found, faults


def main() -> None:
    """Measure, and write the file whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if (reason := why_not()) is not None:
        sys.exit(f"no lab: {reason}")
    if not os.access(out.absolute().parent, os.W_OK) or out.is_dir():
        sys.exit(f"{out} can't be written: name a file in a folder that is there")
    found, faults = measure()
    new = out.with_name(f".{out.name}.new")
    new.write_text(json.dumps(found, indent=2) + "\n")
    new.replace(out)
    if faults:
        sys.exit("not by the best way: " + ", ".join(faults))


if __name__ == "__main__":
    main()
