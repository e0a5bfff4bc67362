"""What giving a model costs who trains, and what more donors bring: python tests/bench/bench_state.py

Training with and without giving alternate, and so do one donor and four. All ends of all transfers share this machine,
so the ratios are worse than between machines; absolute numbers of a shared machine mean little.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dugnad.configs.recipe import load
from dugnad.dht.budget import GIVE_MBIT, Budget
from dugnad.dht.bulk import fetch_all, serve_blobs
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId
from dugnad.optim.layout import Layout
from dugnad.optim.outer import SharedModel, wanted_blobs
from dugnad.peer.numerics import Numerics
from dugnad.peer.trainer import StepResult

LAYOUT = Layout([("embed", (512, 4096)), ("head", (512, 4096))], 1024, 2**20)
"""33 MB of state."""


def state() -> SharedModel:
    """The same in all processes."""
    chance = np.random.default_rng(1)
    return SharedModel(LAYOUT, *(chance.standard_normal(LAYOUT.total_elements, dtype=np.float32) for _ in range(2)))


def host(folder: Path) -> Host:
    """A peer on loopback."""
    return Host(Identity.generate(), meter=lambda *_: None, state_dir=folder, owner_of=lambda raw: None)


class Process:
    """This file as another process, which answers each line with one."""

    def __init__(self, what: str, folder: Path, **told: Any) -> None:
        command = [sys.executable, __file__, "--as", what, json.dumps({"folder": str(folder), **told})]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question: Any) -> Any:
        """What it says to that."""
        self.tell(**question)
        return self.hear()

    def tell(self, **question: Any) -> None:
        """Have it begin."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)

    def hear(self) -> Any:
        """What it says next."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        """Its stdin ends, and so does it."""
        self._process.communicate()


async def give(told: dict[str, Any]) -> None:
    """Serve the state until our stdin ends."""
    async with host(Path(told["folder"])) as donor:
        await serve_blobs(donor, state().blob, budget=Budget.of_mbit(told["give_mbit"]))
        print(json.dumps(donor.addresses()[0]), flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def take(told: dict[str, Any]) -> None:
    """For each line of our stdin: fetch the state, once or for so many seconds, and say the bytes per second."""
    wanted = wanted_blobs(LAYOUT, state().manifest())
    async with host(Path(told["folder"])) as taker:
        print(json.dumps("ready"), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            question, fetched, since = json.loads(line), 0, time.perf_counter()
            donors = {PeerId(address.rpartition("/p2p/")[2]): address for address in question["donors"]}
            for peer, address in donors.items():
                await taker.learn(peer, (address,))

            def count(digest: bytes, data: memoryview) -> None:
                nonlocal fetched
                fetched += len(data)

            try:
                async with asyncio.timeout(question.get("seconds")):
                    while "seconds" in question or not fetched:
                        await fetch_all(taker, tuple(donors), wanted, kind="state", timeout_s=5, on_blob=count)
            except TimeoutError:
                pass
            print(json.dumps(fetched / (time.perf_counter() - since)), flush=True)


def more_donors(folder: Path, repeat: int, give_mbit: float) -> None:
    """Print how much faster four donors are than one."""
    donors = [Process("give", folder / f"donor-{k}", give_mbit=give_mbit) for k in range(4)]
    addresses = [donor.hear() for donor in donors]
    taker = Process("take", folder / "taker")
    taker.hear()
    speeds: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(repeat):
        for count, seen in speeds.items():
            seen.append(taker.ask(donors=addresses[:count]))
    for process in (taker, *donors):
        process.end()
    one, four = (statistics.median(speeds[count]) for count in (1, 4))
    print(
        f"4 donors of {give_mbit:g} Mbit/s each   {four / one:4.2f} x the speed of one   "
        f"(one gave {8e-6 * one:.0f} Mbit/s, four {8e-6 * four:.0f})"
    )


class Training:
    """The trainer of tiny-books, with one thread of torch."""

    def __init__(self) -> None:
        self._numerics = Numerics(load("tiny-books"), threads=1)
        self._theta = self._numerics.first_model().weights
        self.cpu_s = 0.0
        """Of the thread that trained, in the last run."""
        self.run(1.0)

    def run(self, seconds: float) -> float:
        """Train for so long; tokens per second."""
        done, since, cpu_since = 0, time.perf_counter(), time.thread_time()

        def on_step(step: StepResult) -> None:
            nonlocal done
            done += step.tokens

        self._numerics.trainer.train(
            self._theta,
            ranges=[(0, 10**6)],
            steps=10**6,
            global_step=0,
            stop=lambda: time.perf_counter() - since > seconds,
            on_step=on_step,
        )
        self.cpu_s = time.thread_time() - cpu_since
        return done / (time.perf_counter() - since)


async def slower_training(folder: Path, repeat: int, give_mbit: float, seconds: float) -> None:
    """Print by how much training slows while the same process gives at its budget, as a volunteer's does."""
    training = await asyncio.to_thread(Training)
    alone, giving, given, cores = list[float](), list[float](), list[float](), list[float]()
    taker = Process("take", folder / "taker")
    await asyncio.to_thread(taker.hear)
    async with host(folder / "donor") as donor:
        await serve_blobs(donor, state().blob, budget=Budget.of_mbit(give_mbit))
        daemon = psutil.Process(donor.daemon_pid)
        for _ in range(repeat):
            alone.append(await asyncio.to_thread(training.run, seconds))
            taker.tell(donors=donor.addresses()[:1], seconds=seconds)
            before_s = time.process_time() + sum(daemon.cpu_times()[:2])
            giving.append(await asyncio.to_thread(training.run, seconds))
            spent_s = time.process_time() + sum(daemon.cpu_times()[:2]) - before_s - training.cpu_s
            cores.append(spent_s / seconds)
            given.append(await asyncio.to_thread(taker.hear))
    taker.end()
    ratio = statistics.median(slow / fast for slow, fast in zip(giving, alone, strict=True))
    print(
        f"training while giving {8e-6 * statistics.median(given):.0f} of {give_mbit:g} Mbit/s   "
        f"{ratio:4.2f} x the speed of training alone   "
        f"(giving took {100 * statistics.median(cores):.0f} % of one core, its daemon included; "
        f"spread of training alone {100 * (max(alone) - min(alone)) / statistics.median(alone):.0f} %)"
    )


def main() -> None:
    """Print one line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--give-mbit", type=float, default=GIVE_MBIT)
    parser.add_argument("--as", dest="role", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is not None:
        what, told = options.role
        asyncio.run({"give": give, "take": take}[what](json.loads(told)))
        return
    print(f"{options.repeat} interleaved repetitions, medians")
    with tempfile.TemporaryDirectory() as folder:
        more_donors(Path(folder), options.repeat, options.give_mbit)
        asyncio.run(slower_training(Path(folder), options.repeat, options.give_mbit, options.seconds))


if __name__ == "__main__":
    main()
