"""The dial-back: what the asked does and does not dial, and what the asker makes of the answers."""

import asyncio
import ipaddress

import msgspec
import pytest

from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.multiaddrs import IpAddress
from dugnad.dht.reachability import MAX_AT_ONCE, MAX_WAITING, DialBack, Reachability, Tried, accepts, ask, judge
from dugnad.dht.transport import RequestRefused
from dugnad.dht.wire import WireError

PEERS = [Identity.from_seed(number.to_bytes(32)).peer_id for number in range(MAX_WAITING + 2)]
OUTSIDE = ipaddress.ip_address("11.0.3.1")


class Router:
    """Behind it is the asker, seen at `ip`; it lets in at `open_ports`."""

    def __init__(self, ip: IpAddress | None = OUTSIDE, open_ports: tuple[int, ...] = ()) -> None:
        self.ip = ip
        self.open_ports = open_ports
        self.dialled: list[tuple[str, int]] = []
        self.opens = asyncio.Event()
        self.opens.set()

    async def seen_at(self, peer: PeerId) -> IpAddress | None:
        return self.ip

    async def dial(self, host: str, port: int) -> bool:
        self.dialled.append((host, port))
        await self.opens.wait()
        return port in self.open_ports

    def asked(self) -> DialBack:
        return DialBack(self.seen_at, self.dial)


async def test_the_asker_learns_which_of_its_ports_are_open_and_its_address() -> None:
    router = Router(open_ports=(4001,))
    found = await ask([PEERS[0]], (4001, 4002, 4001), router.asked().answer)
    assert found == Reachability(frozenset({4001}), "11.0.3.1", 1)
    assert router.dialled == [("11.0.3.1", 4001), ("11.0.3.1", 4002)]


@pytest.mark.parametrize("ip", [None, *map(ipaddress.ip_address, ("192.168.1.7", "127.0.0.1", "100.64.0.9", "::1"))])
async def test_nobody_is_dialled_who_is_not_seen_outside(ip: IpAddress | None) -> None:
    router = Router(ip, (4001,))
    with pytest.raises(WireError, match="not outside"):
        await router.asked().answer(PEERS[0], msgspec.msgpack.encode([[4001]]))
    assert router.dialled == []


@pytest.mark.parametrize(
    "asked", [[], [[]], [[0]], [[65536]], [[1, 2, 3, 4, 5]], [["22"]], [[22], 1], {"ports": [22]}, 7]
)
async def test_nonsense_is_refused_and_nothing_dialled(asked: object) -> None:
    router = Router(open_ports=(22,))
    with pytest.raises(WireError, match="malformed"):
        await router.asked().answer(PEERS[0], msgspec.msgpack.encode(asked))
    assert router.dialled == []


async def test_each_asker_is_served_once_at_a_time_few_at_the_same_time_and_too_many_are_turned_away() -> None:
    router = Router(open_ports=(4001,))
    router.opens.clear()
    asked, raw = router.asked(), msgspec.msgpack.encode([[4001]])
    waiting = [asyncio.create_task(asked.answer(peer, raw)) for peer in PEERS[:MAX_WAITING]]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(router.dialled) <= MAX_AT_ONCE
    for peer in (PEERS[0], PEERS[MAX_WAITING]):
        with pytest.raises(WireError, match="busy"):
            await asked.answer(peer, raw)
    router.opens.set()
    await asyncio.gather(*waiting)
    assert len(router.dialled) == MAX_WAITING
    await asked.answer(PEERS[0], raw)


@pytest.mark.parametrize(
    ("ports_of", "open_ports"),
    [
        ([], set()),
        ([(1, 2)], {1, 2}),
        ([(1,), ()], set()),
        ([(1,), (1, 2), ()], {1}),
        ([(1, 1, 1), (), ()], set()),
        ([(9,)], set()),
    ],
)
def test_a_port_is_open_if_most_say_so(ports_of: list[tuple[int, ...]], open_ports: set[int]) -> None:
    found = judge([Tried(ports, "11.0.3.1") for ports in ports_of], (1, 2))
    assert found.open_ports == open_ports
    assert found.num_answers == len(ports_of)


async def test_who_does_not_answer_or_answers_nonsense_does_not_count() -> None:
    async def request(peer: PeerId, raw: bytes) -> bytes:
        if peer == PEERS[0]:
            raise RequestRefused(peer, "busy")
        if peer == PEERS[1]:
            return msgspec.msgpack.encode([[4001], "no address"])
        return msgspec.msgpack.encode([[4001], "11.0.3.1"])

    assert await ask(PEERS[:3], (4001,), request) == Reachability(frozenset({4001}), "11.0.3.1", 1)
    assert await ask(PEERS[:2], (4001,), request) == Reachability(frozenset(), None, 0)


@pytest.mark.parametrize("place", [("8.8.8.8", 99999), ("8.8.8.8", -1), ("a..b", 1), ("a\0b", 1), ("a" * 64, 1)])
async def test_what_cannot_be_dialled_does_not_accept(place: tuple[str, int]) -> None:
    assert not await accepts(*place)


def test_who_is_seen_by_ipv4_is_judged_by_that() -> None:
    answers = [Tried((), "11.0.3.1"), Tried((4001,), "2a00:1::1"), Tried((4001,), "2a00:1::1")]
    assert judge(answers, (4001,)) == Reachability(frozenset(), "11.0.3.1", 1)
    assert judge(answers[1:], (4001,)) == Reachability(frozenset({4001}), "2a00:1::1", 2)
