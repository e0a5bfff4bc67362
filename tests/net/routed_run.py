"""A run across routers, with the real commands: two behind cone NATs, one behind a symmetric one, and a public one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.processes import Running, counted, endless
from tests.e2e.test_commands import at_round, audited
from tests.net.lab import Kind, Lab, lab

HOSTS: dict[str, Kind] = {"hub": "public", "other": "public", "ann": "cone", "bob": "carrier", "sym": "symmetric"}
TRAIN_S = 1.5
"""Of a round: in short ones many pass while one is joining."""


class Roles:
    """Roles on the hosts of a lab, each in a folder named for its host."""

    def __init__(self, net: Lab, folder: Path) -> None:
        self._net = net
        self._folder = folder
        self._there: list[Running] = []

    def launch(self) -> str:
        """Begin a run on the hub; the invite to it."""
        recipe = endless(self._folder, train_s=TRAIN_S)
        return self.begin("hub", "launch", recipe, "--host", "0.0.0.0", "--port", "4001").invite()

    def join(self, name: str, invite: str) -> Running:
        """Join with nothing but the invite."""
        return self.begin(name, "join", invite)

    def begin(self, name: str, *arguments: str | Path) -> Running:
        """Start a command on that host."""
        self._there.append(Running(self._folder / name, *arguments, within=self._net.command(name)))
        return self._there[-1]

    def close(self) -> None:
        """End all."""
        for one in self._there:
            one.close()


@contextlib.contextmanager
def roles(folder: Path) -> Iterator[Roles]:
    """A lab of HOSTS, and nobody there yet."""
    with lab(HOSTS) as net, contextlib.closing(Roles(net, folder)) as made:
        yield made


def paths(said: dict[str, Any]) -> dict[str, str]:
    """By which way bytes go to whom."""
    return {pair["peer"]: pair["path"] for pair in said["paths"]}


def measure(folder: Path) -> dict[str, Any]:
    """What came of it; the folder gets everyone's.

    first_counted: after how many rounds each was counted first, from the one whose model it had when that was the
    newest. reach: as each sees itself. paths: between whom bytes went how. missed: in how many of the three rounds
    after the death of the public volunteer, through whom `sym` was reached too, each was not counted. audit: of the
    chain of `sym`.
    """
    with roles(folder) as here:
        invite = here.launch()
        ann, bob = here.join("ann", invite), here.join("bob", invite)
        alone = {one: one.until(at_round(2), "two rounds") for one in (ann, bob)}
        first_counted = {"ann": counted(ann)[0], "bob": counted(bob)[0]}
        ways = {"ann - bob": paths(alone[ann])[alone[bob]["peer"]]}

        sym, other = here.join("sym", invite), here.join("other", invite)

        def caught_up(said: dict[str, Any]) -> bool:
            return said["model_digest"] is not None and said["round"] >= ann.until(lambda it: True, "a word")["round"]

        came = sym.until(caught_up, "the newest model")["round"]
        sym.until(lambda said: bool(counted(sym)), "its first counted round")
        first_counted["sym"] = counted(sym)[0] - came
        public = other.until(lambda said: said["reach"] == "open", "a public volunteer")["peer"]

        def through_it(said: dict[str, Any]) -> bool:
            return any(f"{public}/p2p-circuit" in address for address in said["addresses"]) and public in paths(said)

        said = sym.until(through_it, "its place at a relay, and bytes")
        reach = {name: one["reach"] for name, one in (("ann", alone[ann]), ("bob", alone[bob]), ("sym", said))}
        ways["sym - other"] = paths(said)[public]

        other.kill()
        died_in = sym.until(lambda said: True, "a word")["round"]
        after = {died_in + 1, died_in + 2, died_in + 3}
        missed = {}
        for name, one in (("ann", ann), ("bob", bob), ("sym", sym)):
            one.until(at_round(max(after)), "three more rounds")
            missed[name] = len(after - set(counted(one)))
        said = sym.until(lambda said: "relayed" in paths(said).values(), "bytes through the relay that is left")
        ways["sym - ann"] = paths(said)[alone[ann]["peer"]]
        return {
            "rounds": said["round"], "first_counted": first_counted, "reach": reach, "paths": ways, "missed": missed,
            "audit": audited(sym.directory),
        }  # fmt: skip
