"""Who is open: what members say of our ports, and what stands between them and us, decide it."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from dugnad.dht import control, outside
from dugnad.dht.control import Connection
from dugnad.dht.identity import PeerId
from dugnad.dht.outside import Outside, Ways
from dugnad.dht.paths import Reach
from dugnad.dht.reachability import Tried

ME, HUB = PeerId("me"), PeerId("hub")
PORT, BULK_PORT = 4001, 4002
LAN, WAN = "192.168.1.2", "11.0.0.2"


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The addresses of our network cards; the daemon names WAN too, as it does once four others have seen us there."""
    found = {LAN}

    async def identify(daemon: object) -> list[str]:
        return [f"/ip4/{ip}/tcp/{PORT}" for ip in (LAN, WAN)]

    async def connections(daemon: object) -> list[Connection]:
        return [Connection(HUB, "/ip4/11.0.0.1/tcp/4001")]

    async def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(control, "identify", identify)
    monkeypatch.setattr(control, "connections", connections)
    monkeypatch.setattr(outside, "card_addresses", lambda: found)
    monkeypatch.setattr(outside, "restart_as_relay", nothing)
    return found


class RouterAt:
    """A router that passes on the ports that it was told to."""

    def __init__(self, outside_ip: str | None, *ports: int) -> None:
        self.outside_ip = outside_ip
        self.outside_ports = {port: port for port in ports}

    async def discover(self) -> None:
        pass

    async def pass_on(self, ports: object) -> None:
        pass

    async def forget(self) -> None:
        self.outside_ports = {}


async def found_out(*open_ports: int, router: RouterAt | None = None, announce: str | None = None) -> Outside:
    """What we conclude when the hub sees us at WAN and reaches these ports."""

    async def tried(peer: PeerId, raw: bytes) -> bytes:
        return msgspec.msgpack.encode(Tried(open_ports, WAN))

    daemon: Any = SimpleNamespace(listen=("/ip4/0.0.0.0/tcp/4001",))
    ways = Ways(announce=announce, extra_ports=(BULK_PORT,))
    it = Outside(daemon, ME, ways, request=tried, open_members=dict)
    if router is not None:
        it._router = router  # type: ignore[assignment]
    await it.find_out([HUB])
    return it


async def test_whose_own_address_is_reached_is_open(cards: set[str]) -> None:
    cards.add(WAN)
    it = await found_out(PORT, BULK_PORT)
    assert it.reach is Reach.OPEN
    assert it.is_open_at(BULK_PORT)
    assert it.addresses[0] == f"/ip4/{WAN}/tcp/{PORT}"


async def test_each_port_is_open_or_not_by_itself(cards: set[str]) -> None:
    cards.add(WAN)
    it = await found_out(BULK_PORT)
    assert it.reach is Reach.UNKNOWN
    assert (it.is_open_at(PORT), it.is_open_at(BULK_PORT)) == (False, True)


async def test_who_is_reached_behind_a_router_that_may_know_who_came_is_not_open(cards: set[str]) -> None:
    it = await found_out(PORT, BULK_PORT)
    assert it.reach is Reach.UNKNOWN
    assert not it.is_open_at(BULK_PORT)
    assert it.addresses == (f"/ip4/{LAN}/tcp/{PORT}", f"/ip4/{WAN}/tcp/{PORT}"), "what is named first is for all"


@pytest.mark.parametrize(
    ("router", "is_open"),
    [
        (RouterAt(WAN, PORT, BULK_PORT), True),
        (RouterAt(None, PORT, BULK_PORT), True),
        (RouterAt("100.64.0.2", PORT, BULK_PORT), False),
        (RouterAt(WAN, BULK_PORT), False),
    ],
    ids=["told", "silent about itself", "behind another", "told of another port"],
)
async def test_a_router_that_was_told_and_stands_alone_lets_everyone_in(
    cards: set[str], router: RouterAt, is_open: bool
) -> None:
    it = await found_out(PORT, BULK_PORT, router=router)
    assert (it.reach is Reach.OPEN) == is_open


async def test_the_users_word_counts_by_name_too(cards: set[str]) -> None:
    it = await found_out(announce="/dns/localhost/tcp/4001")
    assert it.reach is Reach.OPEN
    assert it.announced_ip in ("127.0.0.1", "::1")
    it = await found_out(announce="/ip4/11.0.0.9/tcp/4001")
    assert it.announced_ip == "11.0.0.9"
    assert it.addresses[0] == "/ip4/11.0.0.9/tcp/4001"
