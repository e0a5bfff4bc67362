"""libp2p's control plane between the five kinds of hosts: real hosts and daemons, behind real routers."""

import contextlib
import os
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from dugnad.dht import circuit
from dugnad.dht.directory import import_hivemind
from dugnad.dht.host import Host
from dugnad.dht.paths import Path as Way
from dugnad.dht.paths import Reach
from tests.net.lab import Kind, Lab, lab, why_not
from tests.net.reach_peer import CHANNEL, PlacedHost

pytestmark = [pytest.mark.net, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

BEHIND: dict[str, Kind] = {"cone": "cone", "symmetric": "symmetric", "carrier": "carrier", "firewall": "firewall"}
HOSTS: dict[str, Kind] = {"hub": "public", "other": "public", **BEHIND}
REACHED_S = 10.0
RUN = b"r" * 32


class Peers(dict[str, PlacedHost]):
    """The hosts, by name."""

    def __init__(self, net: Lab, folder: Path) -> None:
        import_hivemind()
        super().__init__()
        self._net = net
        self._folder = folder

    def begin(self, name: str, **settings: Any) -> PlacedHost:
        """Start the host of that name."""
        self[name] = PlacedHost(self._net, name, self._folder, **settings)
        self[name].start()
        return self[name]

    def asks(self, one: str, other: str, num_bytes: int) -> tuple[float, Way | None]:
        """How long it takes one host to be answered by another, in seconds, and by which way."""
        asked, payload = self[other].host, os.urandom(num_bytes)

        async def ask(host: Host) -> tuple[float, Way | None]:
            await host.learn(asked.peer_id, asked.addresses())
            since = time.perf_counter()
            assert await host.request(asked.peer_id, CHANNEL, payload, timeout_s=REACHED_S) == payload
            return time.perf_counter() - since, await host.path_of(asked.peer_id)

        return self[one].call(ask)

    def close(self) -> None:
        """End all."""
        for peer in self.values():
            peer.close()


@pytest.fixture(scope="module")
def net() -> Iterator[Lab]:
    with lab(HOSTS) as made:
        yield made


@pytest.fixture(scope="module")
def peers(net: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    """All hosts, joined through the hub and nobody else."""
    with contextlib.closing(Peers(net, tmp_path_factory.mktemp("peers"))) as made:
        hub = made.begin("hub").host
        for name in HOSTS:
            if name != "hub":
                made.begin(name, bootstrap=hub.addresses()[:1])
        for peer in made.values():
            assert peer.host
        yield made


def relays(host: Host) -> set[str]:
    """Names of the relays by which a host says that it is reached."""
    return {address.split("/")[6] for address in host.addresses() if "/p2p-circuit" in address}


def test_who_is_reached_by_others_is_open_and_the_others_say_which_relay_leads_to_them(net: Lab, peers: Peers) -> None:
    for name, peer in peers.items():
        host, hidden = peer.host, name in BEHIND
        assert host.reach is (Reach.UNKNOWN if hidden else Reach.OPEN), name
        assert (peers["hub"].host.peer_id in relays(host)) == hidden, name
        assert ("/p2p-circuit" in host.addresses()[0]) == hidden, "what reaches farthest comes first"
        assert host.seen_ip == (None if name == "hub" else net.address(name))
        assert len(host.open_ports) == (name == "other"), name


def test_any_two_reach_each_other_and_more_than_128_kib_pass_a_relay(peers: Peers) -> None:
    ways = dict[tuple[str, str], Way | None]()
    for one, other in permutations(HOSTS, 2):
        took_s, ways[one, other] = peers.asks(one, other, 1_000_000)
        assert took_s < REACHED_S, (one, other)
    assert ways["hub", "other"] is Way.DIRECT
    assert all(ways["hub", name] is Way.DIRECT for name in BEHIND), "over the connection that they opened"
    assert ways["cone", "symmetric"] is Way.RELAYED


def test_who_is_behind_a_router_leaves_the_relay_where_it_can_and_takes_a_place_at_each_open_member(
    peers: Peers,
) -> None:
    both = {peers[name].host.peer_id for name in ("hub", "other")}
    for name in BEHIND:
        peers[name].until(lambda host: relays(host) == both, 10, "second relay")
        assert peers.asks(name, "other", 1)[1] is Way.DIRECT
    for relay in both:
        place = peers["cone"].call(lambda host, relay=relay: circuit.reserve(host._daemon, relay))  # type: ignore[misc]
        assert place.data_bytes == 2**32, "no relay of ours has the small limits"


def test_what_anyone_announces_is_found_by_those_behind_routers_and_of_them(peers: Peers) -> None:
    records = {name: f"{peer.host.peer_id} here".encode() for name, peer in peers.items()}
    for name, raw in records.items():
        assert peers[name].call(lambda host, raw=raw: host.announce(RUN, raw, expires_s=60))  # type: ignore[misc]
    for name in ("other", "symmetric", "firewall"):
        assert set(peers[name].call(lambda host: host.discover(RUN))) == set(records.values())


def test_when_a_relay_is_killed_another_open_member_takes_over(peers: Peers) -> None:
    left = {peers["other"].host.peer_id}
    peers["hub"].kill()
    since = time.monotonic()
    for name in BEHIND:
        peers[name].until(lambda host: relays(host) == left, 5, "other relay")
    for one, other in permutations(BEHIND, 2):
        peers.asks(one, other, 1000)
    print(f"\nall reach each other again {time.monotonic() - since:.1f} s after the relay was killed")
    peers.pop("hub").close()


def test_who_joins_through_the_circuit_of_someone_behind_a_router_finds_out_that_it_is_open(peers: Peers) -> None:
    behind = peers["carrier"].host.addresses()[0]
    assert "/p2p-circuit" in behind
    assert peers.begin("hub", bootstrap=(behind,)).host.reach is Reach.OPEN
