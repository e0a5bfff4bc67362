"""Real `dugnad` processes for tests: started as a user would, ended with the test."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from dugnad.configs.recipe import load
from dugnad.coordinator.chain import Chain
from dugnad.peer import ask

QUICK = Path(__file__).parent / "quick.toml"
PATIENCE_S = 60.0


def endless(directory: Path, *, seed: int = 1, train_s: float | None = None) -> Path:
    """The quick recipe with steps for days, in that directory; another seed makes another model of other data.

    train_s: how long one core of this machine trains in a round if it has nothing else to do; else it is very short.
    """
    text = QUICK.read_text()
    assert text.count("10000") == 3
    text = re.sub("^seed = 1$", f"seed = {seed}", text.replace("10000", "10000000"), flags=re.MULTILINE)
    if train_s is not None:
        assert text.count("steps = 50 ") == 1
        text = text.replace("steps = 50 ", f"steps = {max(1, round(train_s / _step_s()))} ")
    recipe = directory / "endless.toml"
    recipe.write_text(text)
    return recipe


@functools.cache
def _step_s() -> float:
    """How long a training step of the quick recipe takes."""
    from dugnad.peer.numerics import Numerics

    recipe, steps, took_s = load(QUICK), 30, list[float]()
    numerics = Numerics(recipe)
    weights, samples = numerics.first_model().weights, [(0, steps * recipe.inner.batch_sequences)]
    for _ in range(2):  # the first time, much is made that stays
        since = time.perf_counter()
        numerics.trainer.train(
            weights, ranges=samples, steps=steps, global_step=0, stop=lambda: False, on_step=lambda step: None
        )
        took_s.append(time.perf_counter() - since)
    return min(took_s) / steps


def dugnad(
    *arguments: str | Path, timeout_s: float = PATIENCE_S, within: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run one command to its end. within: what to put before it, as to run it on another host."""
    command = [*within, sys.executable, "-m", "dugnad.peer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


class Running:
    """A command that runs beside the test, where `within` says; killed with its daemon when the test ends."""

    def __init__(self, directory: Path, *arguments: str | Path, within: Sequence[str] = ()) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.within = within
        self.log = directory.with_suffix(".out")
        self.seen: set[psutil.Process] = set()
        with self.log.open("ab") as log:
            where = [] if "--resume" in arguments else ["--dir", str(directory)]
            self.process = subprocess.Popen(
                [*within, sys.executable, "-m", "dugnad.peer", *map(str, arguments), *where],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def status(self) -> dict[str, Any] | None:
        """What the role says of itself, or None while it can't."""
        self.look()
        if self.within:  # its loopback may be another than ours
            asked = dugnad("status", "--dir", self.directory, "--json", within=self.within)
            return json.loads(asked.stdout) if asked.returncode == 0 else None
        try:
            return ask.status(self.directory)  # what the command does, without starting an interpreter each time
        except ask.AskError:
            return None

    def look(self) -> None:
        """Remember the processes below this one."""
        if self.process.poll() is None:
            self.seen.update(psutil.Process(self.process.pid).children(recursive=True))

    def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Wait until the status fulfils `condition`."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            said = self.status()
            if said and condition(said):
                return said
            time.sleep(0.02)
            assert self.process.poll() is None, f"it ended before {what}:\n{self.text()}"
        raise AssertionError(f"no {what} in {PATIENCE_S:.0f} s:\n{self.text()}")

    def interrupt(self) -> None:
        """Ctrl+C."""
        self.look()
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL."""
        self.look()
        self.process.kill()
        self.process.wait()

    def ended(self, within_s: float = PATIENCE_S) -> int:
        """Wait for the end, and return the exit status."""
        return self.process.wait(within_s)

    def text(self) -> str:
        """All that it printed."""
        return self.log.read_text("utf-8", errors="replace")

    def assert_nothing_left(self, within_s: float = 5.0) -> None:
        """None of the processes below it outlives it for long."""
        _, alive = psutil.wait_procs(list(self.seen), timeout=within_s)
        assert not alive, f"left behind: {alive}"

    def invite(self) -> str:
        """The invite that a coordinator printed."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            words = [word for word in self.text().split() if word.startswith("dugnad1:") and len(word) > 50]
            if words:
                return words[-1]
            assert self.process.poll() is None, f"the coordinator ended:\n{self.text()}"
            time.sleep(0.1)
        raise AssertionError(f"no invite:\n{self.text()}")

    def close(self) -> None:
        """End it, whatever it does."""
        self.look()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


Start = Callable[..., Running]
"""Starts a command: its name, then its arguments."""


def counted(one: Running) -> list[int]:
    """The rounds in which the work of `one` counted, by its own chain."""
    peer = one.until(lambda said: True, "a word")["peer"]
    chain = Chain(one.directory / "chain.sqlite", read_only=True)
    try:
        blocks = [commit.block for commit in chain.commits()]
        return [block.round for block in blocks if peer in {entry.peer for entry in block.entries}]
    finally:
        chain.close()
