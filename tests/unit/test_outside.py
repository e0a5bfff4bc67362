"""Who is open: what members say of our ports, and what stands between them and us, decide it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from dugnad.dht import control, outside, relays
from dugnad.dht.control import Connection
from dugnad.dht.identity import PeerId
from dugnad.dht.outside import Outside, Ways
from dugnad.dht.paths import Reach
from dugnad.dht.reachability import Request, Tried
from dugnad.dht.transport import NetworkDown

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
        self.outside_ip = self.next_ip = outside_ip
        self.outside_ports = {port: port for port in ports}

    async def discover(self) -> None:
        self.outside_ip = self.next_ip

    async def pass_on(self, ports: object) -> None:
        pass

    async def forget(self) -> None:
        self.outside_ports = {}


def seen(ip: str, *open_ports: int) -> Request:
    """A hub that sees us there and reaches these ports."""

    async def tried(peer: PeerId, raw: bytes) -> bytes:
        return msgspec.msgpack.encode(Tried(open_ports, ip))

    return tried


async def found_out(*open_ports: int, router: RouterAt | None = None, announce: str | None = None) -> Outside:
    """What we conclude when the hub sees us at WAN and reaches these ports."""
    daemon: Any = SimpleNamespace(listen=("/ip4/0.0.0.0/tcp/4001",))
    ways = Ways(announce=announce, extra_ports=(BULK_PORT,))
    it = Outside(daemon, ME, ways, request=seen(WAN, *open_ports), open_members=dict)
    it._router = router or RouterAt(None)  # type: ignore[assignment]
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


class Fickle:
    """Says whom the daemon is connected to, after it has failed with `errors` in turn."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.says_it = asyncio.Event()

    async def connections(self, daemon: object) -> list[Connection]:
        if self.errors:
            raise self.errors.pop(0)
        self.says_it.set()
        return [Connection(HUB, "/ip4/11.0.0.1/tcp/4001")]


@contextlib.asynccontextmanager
async def kept(
    it: Outside, monkeypatch: pytest.MonkeyPatch, *, look_s: float = 0, recheck_s: float = 0
) -> AsyncIterator[None]:
    """It is looked after, without rest."""
    monkeypatch.setattr(outside, "LOOK_S", look_s)
    monkeypatch.setattr(outside, "RECHECK_S", recheck_s)
    keeping = asyncio.create_task(it.keep())
    try:
        async with asyncio.timeout(5):
            yield
        assert not keeping.done()
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


@pytest.mark.parametrize("loop", ["look_s", "recheck_s"])
async def test_what_fails_is_said_once_and_done_again(
    loop: str, cards: set[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    it = await found_out()
    daemon = Fickle(NetworkDown("too many open files"), NetworkDown("too many open files"), KeyError("our own fault"))
    monkeypatch.setattr(control, "connections", daemon.connections)
    other = "recheck_s" if loop == "look_s" else "look_s"
    async with kept(it, monkeypatch, **{loop: 0, other: 60}):
        await daemon.says_it.wait()
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.endswith("failed, and is tried again: too many open files")


@pytest.mark.parametrize("fault", [KeyError("our own fault"), NetworkDown("too many open files")])
async def test_a_relay_is_asked_again_whatever_went_wrong_with_it(
    fault: Exception, cards: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, again = list[PeerId](), asyncio.Event()

    async def connect(daemon: object, peer: PeerId, addresses: object) -> None:
        asked.append(peer)
        if len(asked) == 2:
            again.set()
        raise fault

    it = await found_out()
    it._open_members = lambda: {HUB: "/ip4/11.0.0.1/tcp/4001"}
    monkeypatch.setattr(control, "connect", connect)
    monkeypatch.setattr(relays, "RETRY_S", 0)
    async with kept(it, monkeypatch, recheck_s=60):
        await again.wait()


async def test_who_is_open_thanks_to_a_router_stays_so_when_the_line_gets_another_address(
    cards: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    router, other = RouterAt(WAN, PORT, BULK_PORT), "11.0.0.77"
    it = await found_out(PORT, BULK_PORT, router=router)
    assert it.addresses[0] == f"/ip4/{WAN}/tcp/{PORT}"
    router.next_ip, it._request = other, seen(other, PORT, BULK_PORT)
    it.changed.clear()
    async with kept(it, monkeypatch, look_s=60):
        while it.addresses[0] != f"/ip4/{other}/tcp/{PORT}":
            await it.changed.wait()
            it.changed.clear()
        assert it.reach is Reach.OPEN
        assert it.is_open_at(BULK_PORT)


async def test_of_whom_was_tried_directly_long_ago_nothing_is_kept(
    cards: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    it, now_s = await found_out(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for number in range(100):
        now_s += outside.STRAIGHT_S / 4
        await it._go_straight(PeerId(f"peer {number}"), "/nowhere")
    assert len(it._straight_s) == 4
