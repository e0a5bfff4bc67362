"""Peers of a lab as processes, started on its hosts and asked over their standard input."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dugnad.dht.budget import GIVE_MBIT
from tests.net.lab import ROOT, Lab


class Member:
    """One process of `lab_peer`."""

    def __init__(self, net: Lab, name: str, folder: Path, seed: int, bootstrap: list[str], *options: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("w") as log:
            command = [sys.executable, "-m", "tests.net.lab_peer", *options, str(folder / name), str(seed), *bootstrap]
            self.process = subprocess.Popen(
                net.command(name, *command),
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.first: dict[str, Any] = {}
        """What it said once it was there."""

    @property
    def peer(self) -> str:
        """Its peer id."""
        return str(self.first["peer"])

    def await_first(self) -> None:
        """Wait until it is there."""
        self.first = self._hear()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer; see `lab_peer`."""
        print(json.dumps(question), file=_there(self.process.stdin), flush=True)
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        line = _there(self.process.stdout).readline()
        assert line, f"{self.name} ended:\n{self._log.read_text()}"
        said: dict[str, Any] = json.loads(line)
        assert "error" not in said, f"{self.name}: {said['error']}"
        return said

    def close(self) -> None:
        """End it; its daemon ends with it."""
        self.process.kill()
        self.process.communicate()


class Fleet:
    """The peers of a lab. The first is the one through whom the others join."""

    def __init__(self, net: Lab, folder: Path) -> None:
        self.members: dict[str, Member] = {}
        self._net = net
        self._folder = folder

    def begin(self, *names: str, give_mbit: float = GIVE_MBIT) -> list[Member]:
        """Start peers on these hosts, side by side, and wait until they are there."""
        first = next(iter(self.members.values()), None)
        bootstrap = list(first.first["addresses"][:1]) if first is not None else []
        started = []
        for name in names:
            one = self.members[name] = Member(
                self._net, name, self._folder, len(self.members) + 1, bootstrap, "--give-mbit", str(give_mbit)
            )
            started.append(one)
        for one in started:
            one.await_first()
        return started

    def cpu_s(self) -> dict[str, float]:
        """The processor time of each so far, its daemon's included."""
        return {name: one.ask(do="cpu")["cpu_s"] for name, one in self.members.items()}


@contextlib.contextmanager
def fleet(net: Lab, folder: Path) -> Iterator[Fleet]:
    """Peers of `net`, which end with it."""
    made = Fleet(net, folder)
    try:
        yield made
    finally:
        for one in made.members.values():
            one.close()


def _there(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
