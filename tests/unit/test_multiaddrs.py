"""What is read off multiaddrs, from strangers too, and the order in which a peer names its own."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht import multiaddrs as ma
from dugnad.dht.identity import Identity

RELAY = Identity.from_seed(bytes(32)).peer_id
OUTSIDE = "/ip4/11.0.3.1/tcp/4001"
CIRCUIT = f"/ip4/11.0.0.9/tcp/4001/p2p/{RELAY}/p2p-circuit"
LAN = "/ip4/192.168.1.7/tcp/4001"
LOOPBACK = "/ip4/127.0.0.1/tcp/4001"


@pytest.mark.parametrize(
    ("address", "short"),
    [
        (LOOPBACK, "127.0.0.1:4001"),
        ("/ip6/::1/tcp/1", "[::1]:1"),
        ("/ip4/0.0.0.0/tcp/0", "0.0.0.0"),
        (CIRCUIT, CIRCUIT),
        ("junk", "junk"),
    ],
)
def test_a_port_is_named_as_people_write_it(address: str, short: str) -> None:
    assert ma.in_short(address) == short


@pytest.mark.parametrize(
    ("address", "nearness"),
    [
        (OUTSIDE, 0),
        ("/ip6/2a00:1450::7/tcp/1", 0),
        ("/dns4/example.org/tcp/1", 0),
        (CIRCUIT, 0),
        (LAN, 1),
        ("/ip4/100.64.0.2/tcp/1", 1),
        ("/ip4/0.0.0.0/tcp/1", 1),
        (LOOPBACK, 2),
        ("/ip6/::1/tcp/1", 2),
        ("/ip6/fe80::1/tcp/1", 2),
        ("/dns4/localhost/tcp/1", 2),
    ],
)
def test_how_far_an_address_reaches(address: str, nearness: int) -> None:
    assert ma.nearness(address) == nearness
    assert ma.is_local(address) == (nearness == 2)
    assert ma.is_public(address) == (nearness == 0 and address != CIRCUIT)


def test_what_is_dialled_first() -> None:
    assert ma.ip_of(CIRCUIT) == ipaddress.ip_address("11.0.0.9")
    assert ma.port_of(CIRCUIT) == ma.port_of(LAN) == 4001
    assert ma.host_of("/dns4/example.org/tcp/1") == "example.org"
    assert ma.peer_of(f"{LAN}/p2p/{RELAY}") == RELAY
    assert ma.relay_of(CIRCUIT) == (RELAY, "/ip4/11.0.0.9/tcp/4001")
    assert ma.relay_of(LAN) is None
    assert ma.relay_of("/p2p-circuit") is None


@given(st.text(max_size=300) | st.from_regex(r"(/(ip4|ip6|tcp|p2p|p2p-circuit|dns4|[0-9:.]{0,9}|x)){0,8}"))
def test_no_text_of_a_stranger_raises(text: str) -> None:
    for read in (ma.usable, ma.is_direct, ma.ip_of, ma.host_of, ma.port_of, ma.nearness, ma.is_public, ma.is_local):
        read(text)
    ma.peer_of(text)
    ma.relay_of(text)
    ma.in_order([text], [text], [text])


@pytest.mark.parametrize(
    "address",
    [OUTSIDE, CIRCUIT, LAN, f"{CIRCUIT}/p2p/{RELAY}", "/ip6/2a00::7/tcp/1", "/dns4/ws.my_host-1.example/tcp/65535"],
)
def test_plain_tcp_is_usable(address: str) -> None:
    assert ma.usable(address)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "/dns4/a..b/tcp/1",
            "/dns4/.b/tcp/1",
            "/dns4/-a/tcp/1",
            f"/dns4/{'a' * 64}/tcp/1",
            f"/dns/{'a.' * 127}b/tcp/1",
        ),
        *("/dns4/a%/tcp/1", "/ip4/a.b/tcp/1", "/ip4/1.2.3/tcp/1", "/ip4/::1/tcp/1", "/ip6/1.2.3.4/tcp/1"),
        *("/ip6/fe80::1%eth0/tcp/1", "/ip6zone/x/ip6/fe80::1/tcp/1", "/unix/x/tcp/1", "x/ip4/8.8.8.8/tcp/1"),
        *("/ip4/8.8.8.8/tcp/99999", "/ip4/8.8.8.8/tcp/0", "/ip4/8.8.8.8/tcp/-1", "/ip4/8.8.8.8/tcp/\u0661"),
        *("/ip4/8.8.8.8/tcp", "/ip4/8.8.8.8/tcp/1/ws", "/ip4/8.8.8.8/udp/1/quic-v1", "/tcp/1", ""),
    ],
)
def test_what_cannot_be_dialled_over_plain_tcp_is_not_usable(address: str) -> None:
    assert not ma.usable(address)


def test_a_peer_names_what_others_reached_first_then_circuits_then_its_networks_and_unreached_cards_last() -> None:
    cards = [LOOPBACK, "/ip4/8.8.8.8/tcp/4001", LAN, OUTSIDE, "/ip4/1.1.1.1/udp/1/quic-v1"]
    assert ma.in_order([OUTSIDE], [CIRCUIT], cards) == (OUTSIDE, CIRCUIT, LAN, LOOPBACK, "/ip4/8.8.8.8/tcp/4001")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("203.0.113.7:4001", "/ip4/203.0.113.7/tcp/4001"),
        ("[2001:db8::7]:4001", "/ip6/2001:db8::7/tcp/4001"),
        ("example.org:80", "/dns/example.org/tcp/80"),
    ],
)
def test_a_place_that_people_write_becomes_a_multiaddr(text: str, address: str) -> None:
    assert ma.place_of(text) == address


@pytest.mark.parametrize(
    "text", ["", "example.org", "example.org:", "example.org:0", "a:65536", "a..b:1", ":1", "a/b:1", "-a:1", "a b:1"]
)
def test_what_is_no_place_is_told_so(text: str) -> None:
    with pytest.raises(ValueError, match="not HOST:PORT"):
        ma.place_of(text)
