"""Runs across routers: volunteers join with nothing but the invite, train, and lose a relay."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dugnad.coordinator.chain import Chain
from tests.e2e.processes import Running, endless
from tests.e2e.test_commands import at_round, audited
from tests.net.lab import Kind, Lab, lab, why_not

pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

HOSTS: dict[str, Kind] = {
    "hub": "public", "other": "public", "ann": "cone", "bob": "carrier", "sym": "symmetric",
}  # fmt: skip


class Roles:
    """Roles on the hosts of a lab, each in its folder."""

    def __init__(self, net: Lab, folder: Path) -> None:
        self.there: dict[str, Running] = {}
        self._net = net
        self._folder = folder

    def launch(self) -> str:
        """A coordinator on the hub; its invite."""
        recipe = endless(self._folder)  # with rounds of some seconds: in short ones many pass while one is joining
        recipe.write_text(recipe.read_text().replace("steps = 50 ", "steps = 200 "))
        self.begin("hub", "launch", recipe, "--host", "0.0.0.0", "--port", "4001")
        return self.there["hub"].invite()

    def join(self, name: str, invite: str) -> Running:
        """Join with default settings."""
        return self.begin(name, "join", invite)

    def begin(self, name: str, *arguments: str | Path) -> Running:
        self.there[name] = Running(self._folder / name, *arguments, within=self._net.command(name))
        return self.there[name]

    def close(self) -> None:
        for one in self.there.values():
            one.close()


@pytest.fixture
def roles(tmp_path: Path) -> Iterator[Roles]:
    with lab(HOSTS) as net:
        made = Roles(net, tmp_path)
        try:
            yield made
        finally:
            made.close()


def counted(one: Running) -> list[int]:
    """The rounds in which the work of `one` counted, by its own chain."""
    chain = Chain(one.directory / "chain.sqlite", read_only=True)
    said = one.status()
    assert said is not None, one.text()
    try:
        return [
            commit.block.round
            for commit in chain.commits()
            if said["peer"] in {entry.peer for entry in commit.block.entries}
        ]
    finally:
        chain.close()


def paths(said: dict[str, Any]) -> dict[str, str]:
    return {pair["peer"]: pair["path"] for pair in said["paths"]}


def test_volunteers_behind_routers_train_and_a_relay_that_is_killed_costs_at_most_one_round(roles: Roles) -> None:
    invite = roles.launch()
    ann, bob = roles.join("ann", invite), roles.join("bob", invite)
    first, second = (one.until(at_round(2), "two rounds") for one in (ann, bob))
    assert counted(ann)[0] <= 2
    assert counted(bob)[0] <= 2
    assert (first["reach"], second["reach"]) == ("cone", "cone")
    assert paths(first)[second["peer"]] == "punched", "with one public coordinator, who owns no parts"

    # one whose router can't be punched, and one whom all can reach
    sym, other = roles.join("sym", invite), roles.join("other", invite)
    came = sym.until(lambda said: said["model_digest"] is not None, "the model")
    sym.until(lambda said: bool(counted(sym)), "its first counted round")
    assert counted(sym)[0] <= came["round"] + 2
    public = other.until(lambda said: said["reach"] == "open", "a public volunteer")["peer"]

    def through_it(said: dict[str, Any]) -> bool:
        return any(f"{public}/p2p-circuit" in address for address in said["addresses"])

    said = sym.until(lambda said: through_it(said) and public in paths(said), "its place at a relay, and bytes")
    assert said["reach"] == "symmetric"
    assert paths(said)[public] == "direct"

    other.kill()
    said = sym.until(lambda said: True, "a word")
    after = {said["round"] + 1, said["round"] + 2, said["round"] + 3}
    for one in (ann, bob, sym):
        one.until(at_round(max(after)), "three more rounds")
        assert len(after - set(counted(one))) <= 1, f"{one.directory.name} was not counted in more than one"
    said = sym.until(lambda said: "relayed" in paths(said).values(), "bytes through the relay that is left")
    found = audited(sym.directory)
    assert found["ranges_lost"] == found["ranges_doubled"] == []
    assert found["digests_agree"]
