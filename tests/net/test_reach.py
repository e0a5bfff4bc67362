"""libp2p's control plane between the five kinds of hosts: real hosts and daemons, behind real routers."""

import contextlib
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from dugnad.dht import circuit
from dugnad.dht.host import Host
from dugnad.dht.outside import Ways
from dugnad.dht.paths import Path as Way
from dugnad.dht.paths import Reach
from tests.net.internet import run
from tests.net.lab import Kind, Lab, lab, why_not
from tests.net.reach_peer import REACHED_S, Peers

pytestmark = [pytest.mark.net, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

BEHIND: dict[str, Kind] = {"cone": "cone", "symmetric": "symmetric", "carrier": "carrier", "firewall": "firewall"}
HOSTS: dict[str, Kind] = {"hub": "public", "other": "public", **BEHIND}
RUN = b"r" * 32


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


def test_what_the_user_says_where_we_are_reached_counts_and_is_named_first(net: Lab, peers: Peers) -> None:
    place = "/dns4/home.example.org/tcp/4001"
    relay = peers["other"].host.addresses()[:1]
    peers.pop("cone").close()
    told = peers.begin("cone", bootstrap=relay, ways=Ways(announce=place, extra_ports=(4002,))).host
    assert told.reach is Reach.OPEN
    assert told.addresses()[0] == f"{place}/p2p/{told.peer_id}"
    assert told.seen_ip == net.address("cone")
    assert not told.open_ports, "by the word of others"


def test_who_has_ipv6_is_reached_by_it_and_says_so(tmp_path: Path) -> None:
    everywhere = ("/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001")
    with lab({"hub": "public", "six": "public"}) as net, contextlib.closing(Peers(net, tmp_path)) as peers:
        for number, name in enumerate(net.kinds, 1):
            run(*net.command(name, "ip", "addr", "add", f"2a00:1:2:3::{number}/64", "dev", "wan", "nodad"))
        hub = peers.begin("hub", listen=everywhere).host
        by_ipv6 = f"/ip6/2a00:1:2:3::1/tcp/4001/p2p/{hub.peer_id}"
        assert hub.addresses()[:2] == (f"/ip4/11.0.1.1/tcp/4001/p2p/{hub.peer_id}", by_ipv6)
        six = peers.begin("six", listen=("/ip6/::/tcp/4001",), bootstrap=(by_ipv6,)).host
        assert six.reach is Reach.OPEN
        assert six.seen_ip == "2a00:1:2:3::2"
        assert peers.asks("hub", "six", 1)[1] is Way.DIRECT
