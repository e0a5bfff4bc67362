"""Routers that let in whom they know: members reach such a peer and others don't, so that it must not pass for open."""

from collections.abc import Iterator

import pytest

from tests.net.fleet import Fleet, fleet
from tests.net.lab import Kind, lab, why_not

pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(240),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

HOSTS: dict[str, Kind] = {"hub": "public", "ann": "restricted", "bob": "restricted", "sym": "symmetric"}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with lab(HOSTS) as net, fleet(net, tmp_path_factory.mktemp("peers")) as made:
        made.begin("hub")
        made.begin("ann", "bob", "sym")
        yield made


def connected(peers: Fleet, one: str, other: str) -> str | None:
    to = peers.members[other].peer
    path: str | None = peers.members[one].ask(do="connect", to=[to], within_s=30)[to]["path"]
    return path


def test_two_behind_such_routers_are_not_taken_for_open_and_punch(peers: Fleet) -> None:
    assert connected(peers, "ann", "bob") == "punched"
    states = [peers.members[name].ask(do="state") for name in ("ann", "bob")]
    assert [state["reach"] for state in states] == ["cone", "cone"]
    for state in states:
        first, *others = state["addresses"]
        assert "/p2p-circuit" in first, "all reach it there"
        assert any(address.startswith("/ip4/11.0.") and "/p2p-circuit" not in address for address in others)


def test_whoever_it_does_not_know_reaches_it_all_the_same(peers: Fleet) -> None:
    for other in ("ann", "bob"):
        assert connected(peers, "sym", other) in ("relayed", "direct"), "directly if its router has come to know it"
        said = peers.members["sym"].ask(do="give", to=peers.members[other].peer, bytes=2**20)
        assert said["seconds"] < 10
