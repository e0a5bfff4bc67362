"""Who sends through a relay keeps to what it gives; a relay that does not say is not waited for."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dugnad.dht import allowance
from dugnad.dht.allowance import CHANNEL, FREE_BYTES, MOST_BYTES, UNASKED_S, Allowance
from dugnad.dht.budget import PIECE_BYTES, Budget
from dugnad.dht.bulk import SILENCE_S
from dugnad.dht.direct import MAX_RELAYS, Direct
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Reach
from dugnad.dht.transport import RequestRefused, Stream
from tests.unit.memory_transport import MemoryTransport, Net, NoDirect, network

ANN, BOB, EVE, HUB = (PeerId(name) for name in ("ann", "bob", "eve", "hub"))
RATE = 8 * 2**20
LONG_S = 30.0


class Counting(Budget):
    """A budget that knows what was paid from it."""

    spent = 0

    def spend(self, num_bytes: int, *, now: float) -> float:
        self.spent += num_bytes
        return super().spend(num_bytes, now=now)


def number(value: int) -> bytes:
    return struct.pack(">I", value)


@asynccontextmanager
async def relay(rate: float = RATE, *, barred: frozenset[PeerId] = frozenset()) -> AsyncIterator[tuple[Net, Counting]]:
    """A network with a relay that gives so much."""
    budget = Counting(rate)
    async with network() as net, asyncio.timeout(LONG_S):
        await allowance.serve(net.join(HUB), budget, bars=barred.__contains__)
        yield net, budget


async def send(me: Allowance, num_bytes: int) -> float:
    """Spend so much, in pieces; the seconds that it took."""
    return sum(await waits(me, num_bytes))


async def waits(me: Allowance, num_bytes: int) -> list[float]:
    """How long each piece of so much had to wait."""
    now, waited = asyncio.get_running_loop().time, []
    for left in range(num_bytes, 0, -PIECE_BYTES):
        since = now()
        await me.spend(PIECE_BYTES, of=left)
        waited.append(now() - since)
    return waited


async def test_two_who_send_through_a_relay_share_what_it_gives() -> None:
    async with relay() as (net, budget):
        both = [Allowance(net.join(peer), HUB) for peer in (ANN, BOB)]
        took = await asyncio.gather(*(send(one, RATE // 2) for one in both))
    owed = RATE - 2 * FREE_BYTES - budget.burst_bytes
    assert min(took) >= 0.9 * owed / RATE
    assert max(took) <= 2 * min(took)


async def test_all_streams_through_a_relay_come_out_of_one_allowance() -> None:
    async with relay() as (net, budget):
        ann = Allowance(net.join(ANN), HUB)
        took = await asyncio.gather(*(send(ann, RATE // 4) for _ in range(4)))
    assert max(took) >= 0.9 * (RATE - FREE_BYTES - budget.burst_bytes) / RATE


async def test_no_stream_through_a_slow_relay_waits_while_another_sends_and_sends() -> None:
    async with relay(8 * PIECE_BYTES) as (net, _):
        ann = Allowance(net.join(ANN), HUB)
        waited = await asyncio.gather(*(waits(ann, 4 * PIECE_BYTES) for _ in range(4)))
    assert max(max(of_one) for of_one in waited) <= 1.5, "in turn, each gets two pieces a second"


async def test_a_slow_relay_answers_often() -> None:
    async with relay(2 * PIECE_BYTES) as (net, _):
        ann = net.join(ANN)
        first, second = [await ann.request(HUB, CHANNEL, number(MOST_BYTES), timeout_s=5) for _ in range(2)]
    assert 0 < int.from_bytes(first) <= 2 * PIECE_BYTES
    assert int.from_bytes(second) == PIECE_BYTES


async def test_what_goes_directly_asks_nobody_and_what_is_relayed_asks_the_relay() -> None:
    taken = asyncio.Event()

    async def take(sender: PeerId, stream: Stream) -> None:
        await stream.read_exactly(FREE_BYTES + PIECE_BYTES)
        taken.set()

    async with relay() as (net, _):
        ann, bob = net.join(ANN), net.join(BOB)
        await bob.serve_stream("test/1", take)
        for through in (None, HUB):
            ann.relay = through
            stream = await direct(ann).open(BOB, "test/1", kind="upload")
            await stream.write(bytes(FREE_BYTES + PIECE_BYTES))
            await taken.wait()
            taken.clear()
            await stream.close()
            assert (ann.metered["sent", "message"] > 0) == (through == HUB)


async def test_of_relays_not_used_for_long_nothing_is_remembered() -> None:
    async def take(sender: PeerId, stream: Stream) -> None:
        await stream.read_exactly(1)

    async with relay() as (net, _):
        ann, bob = net.join(ANN), net.join(BOB)
        await bob.serve_stream("test/1", take)
        way = direct(ann)
        for number in range(3 * MAX_RELAYS):
            for ann.relay in (HUB, PeerId(f"relay {number}")):
                stream = await way.open(BOB, "test/1", kind="upload")
                await stream.write(b"x")
                await stream.close()
        assert len(way._allowances) == MAX_RELAYS
        assert way._allowances[HUB]._left == FREE_BYTES - 3 * MAX_RELAYS


async def test_what_is_answered_through_a_relay_comes_out_of_its_budget_too() -> None:
    async def give(sender: PeerId, stream: Stream) -> None:
        await stream.write(bytes(2 * FREE_BYTES))

    async with relay() as (net, _):
        ann, bob = net.join(ANN), net.join(BOB)
        ann.relay = HUB
        await direct(ann).serve_stream("test/1", give)
        stream = await bob.open(ANN, "test/1", kind="fetch")
        await stream.read_exactly(2 * FREE_BYTES)
        assert ann.metered["sent", "message"] > 0


@pytest.mark.parametrize("answer", [b"", number(0), number(MOST_BYTES + 1), b"12345"])
async def test_a_relay_that_answers_nonsense_is_not_asked_for_a_while(answer: bytes) -> None:
    asked = 0

    async def nonsense(peer: PeerId, payload: bytes) -> bytes:
        nonlocal asked
        asked += 1
        return answer

    async with network() as net, asyncio.timeout(UNASKED_S / 2):
        await net.join(HUB).serve(CHANNEL, nonsense)
        await send(Allowance(net.join(ANN), HUB), 2 * MOST_BYTES)
    assert asked == 1


async def test_a_relay_that_never_answers_is_given_up_before_a_stream_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allowance.ANSWER_S < SILENCE_S
    monkeypatch.setattr(allowance, "ANSWER_S", 0.05)

    async def say_nothing(peer: PeerId, payload: bytes) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async with network() as net, asyncio.timeout(UNASKED_S / 2):
        await net.join(HUB).serve(CHANNEL, say_nothing)
        waited = await waits(Allowance(net.join(ANN), HUB), 2 * MOST_BYTES)
    assert max(waited) <= SILENCE_S
    assert sum(wait > 0.04 for wait in waited) == 1, "it is asked once"


async def test_who_gives_up_waiting_leaves_the_turn_to_the_next() -> None:
    async with relay(2 * PIECE_BYTES) as (net, _):
        ann = Allowance(net.join(ANN), HUB)
        await send(ann, FREE_BYTES)
        first, second = (asyncio.create_task(send(ann, 2 * PIECE_BYTES)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await second


async def test_a_relay_that_does_not_know_of_this_or_is_gone_holds_nobody_up() -> None:
    async with network() as net, asyncio.timeout(UNASKED_S / 2):
        net.join(EVE)
        for other in (EVE, PeerId("gone")):
            await send(Allowance(net.join(ANN), other), 2 * MOST_BYTES)


async def test_a_relay_gives_to_each_one_answer_at_a_time_and_nothing_to_whom_it_bars() -> None:
    async with relay(PIECE_BYTES, barred=frozenset({EVE})) as (net, _):
        ann, bob, eve = (net.join(peer) for peer in (ANN, BOB, EVE))
        waiting = [asyncio.create_task(ask(one, MOST_BYTES)) for one in (ann, bob)]
        await asyncio.sleep(0)
        with pytest.raises(RequestRefused, match="busy"):
            await ask(ann, MOST_BYTES)
        with pytest.raises(RequestRefused, match="busy"):
            await ask(eve, MOST_BYTES)
        assert all(given > 0 for given in await asyncio.gather(*waiting))


async def test_no_more_is_asked_for_than_is_to_be_sent() -> None:
    async with relay() as (net, budget):
        await send(Allowance(net.join(ANN), HUB), FREE_BYTES + 3 * PIECE_BYTES)
        assert budget.spent == 3 * PIECE_BYTES


@pytest.mark.parametrize("payload", [b"", b"123", b"12345", number(0), number(MOST_BYTES + 1), number(2**32 - 1)])
async def test_whoever_asks_a_relay_for_nonsense_is_refused(payload: bytes) -> None:
    async with relay() as (net, budget):
        with pytest.raises(RequestRefused):
            await net.join(ANN).request(HUB, CHANNEL, payload, timeout_s=5)
        assert budget.spent == 0


async def ask(me: MemoryTransport, wanted: int) -> int:
    return int.from_bytes(await me.request(HUB, CHANNEL, number(wanted), timeout_s=5))


def direct(me: MemoryTransport) -> Direct:
    meeting: Any = NoDirect(Reach.CONE)
    return Direct(me, meeting)
