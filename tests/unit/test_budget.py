"""What is given away stays within the budget in every stretch of time, and everyone who asks gets the same of it."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dugnad.dht import budget as budgets
from dugnad.dht import bulk
from dugnad.dht.budget import AT_ONCE, LEAST_BYTES_PER_S, MAX_WAITING, PER_ASKER, PIECE_BYTES, Budget, LineFull
from dugnad.dht.bulk import SAID_EVERY_S, SILENCE_S, Stalled, fetch, serve_blobs
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Direction, Unreachable
from tests.unit.memory_transport import Net, network

ANN, BOB, EVE, JOE = PEERS = tuple(PeerId(name) for name in ("ann", "bob", "eve", "joe"))
ME = PeerId("me")
TICK_S = 0.01
NARROW, WIDE = LEAST_BYTES_PER_S, 100 * LEAST_BYTES_PER_S


def worst_excess(given: list[tuple[float, int]], budget: Budget) -> float:
    """By how many bytes the worst stretch of time is over the budget; `given` is (second, bytes) in order."""
    most, least_before, total = -math.inf, math.inf, 0
    for at_s, num_bytes in given:  # what was given, less what might have been, before and after each of them
        allowed = budget.bytes_per_s * at_s
        least_before = min(least_before, total - allowed)
        total += num_bytes
        most = max(most, total - allowed - least_before)
    return most - budget.burst_bytes


# -- the bucket


@given(
    st.sampled_from([NARROW, 3 * NARROW, WIDE]),
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, PIECE_BYTES)), min_size=1, max_size=60),
)
def test_no_stretch_of_time_sees_more_than_the_rate_and_the_burst(rate: int, asked: list[tuple[float, int]]) -> None:
    budget, now = Budget(rate), 1000.0
    paid: list[tuple[float, int]] = []
    for pause_s, num_bytes in asked:
        now += pause_s
        at = budget.spend(num_bytes, now=now)
        assert at >= now
        assert not paid or at >= paid[-1][0], "in the order of asking"
        paid.append((at, num_bytes))
    assert worst_excess(paid, budget) < 1


@pytest.mark.parametrize("rate", [NARROW, WIDE])
def test_who_always_wants_more_gets_the_whole_rate(rate: int) -> None:
    budget = Budget(rate)
    now, given = 0.0, 0
    while now < 100:
        now = budget.spend(PIECE_BYTES, now=now)
        given += PIECE_BYTES
    assert given == pytest.approx(100 * rate + budget.burst_bytes, rel=0.02)


def test_what_is_not_given_for_long_is_given_later_up_to_the_burst() -> None:
    budget = Budget(WIDE)
    budget.spend(PIECE_BYTES, now=0)
    at_once = 0
    while budget.spend(PIECE_BYTES, now=1e6) == 1e6:
        at_once += PIECE_BYTES
    assert budget.burst_bytes - PIECE_BYTES <= at_once <= budget.burst_bytes


def test_a_budget_that_would_stall_who_asks_is_refused() -> None:
    for rate in (0, -1, LEAST_BYTES_PER_S - 1):
        with pytest.raises(ValueError, match=f"at least {LEAST_BYTES_PER_S} are needed"):
            Budget(rate)
    assert Budget.of_mbit(1).bytes_per_s == 125_000


# -- the line


@pytest.mark.parametrize(("rate", "at_once"), [(NARROW, 1), (3.9 * NARROW, 3), (WIDE, AT_ONCE)])
def test_no_more_are_served_at_once_than_get_enough_each(rate: float, at_once: int) -> None:
    budget = Budget(rate)
    called = [ticket for k in range(40) for ticket in budget.enter(k, PeerId(f"peer {k}"))]
    assert called == list(range(at_once))
    assert [budget.leave(k) for k in range(40 - at_once)] == [[k + at_once] for k in range(40 - at_once)]


def test_who_asks_for_much_waits_behind_who_asks_for_little() -> None:
    budget = Budget(3 * NARROW)
    assert [budget.enter(k, ANN) for k in range(5)] == [[0], [1], [], [], []]  # there is room, but not for Ann
    assert [budget.enter(5, BOB), budget.enter(6, BOB), budget.enter(7, EVE)] == [[5], [], []]
    assert budget.leave(0) == [7]  # Ann and Bob have one each, Eve has none
    assert budget.leave(1) == [2]  # Ann has none now, and has waited longest
    assert budget.leave(6) == []  # Bob will wait no more
    assert budget.leave(7) == [3]
    assert budget.leave(5) == []


def test_who_waits_too_many_times_gets_in_line_no_more_and_others_do() -> None:
    budget = Budget(NARROW)
    assert budget.enter(0, ANN) == [0]
    for ticket in range(1, 1 + MAX_WAITING):
        assert budget.enter(ticket, EVE) == []
    with pytest.raises(LineFull):
        budget.enter(1000, EVE)
    assert budget.leave(1000) == [], "as whoever was turned away does"
    assert budget.enter(1001, BOB) == []
    assert budget.leave(0) == [1], "Eve has waited longest"
    assert budget.enter(1002, EVE) == []


async def test_who_is_turned_away_from_the_line_hears_so_at_once(
    run_on: Callable[[asyncio.Future[Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "MAX_WAITING", 1)
    wanted = blobs(4, 4 * NARROW)
    async with network() as net:
        await give(net, Budget(NARROW), wanted)
        asker = net.join(EVE)
        asked = [
            asyncio.ensure_future(fetch(asker, ME, digest, len(blob), kind="state", timeout_s=SILENCE_S))
            for digest, blob in wanted.items()
        ]
        await run_on(asyncio.ensure_future(asyncio.sleep(1)))
        assert [one.done() for one in asked] == [False, False, True, True]
        for one in asked[2:]:
            with pytest.raises(Unreachable):
                one.result()
        await run_on(asyncio.gather(*asked[:2]))


class Line(RuleBasedStateMachine):
    """The line against what it promises."""

    @initialize(rate=st.sampled_from([NARROW, 3 * NARROW, WIDE]))
    def begin(self, rate: int) -> None:
        self.budget = Budget(rate)
        self.waiting: dict[int, PeerId] = {}
        self.served: dict[int, PeerId] = {}
        self.last = 0

    def take(self, called: list[int]) -> None:
        for ticket in called:
            asker, turns = self.waiting.pop(ticket), Counter(self.served.values())
            assert turns[asker] < PER_ASKER, "nobody has more turns than he may have"
            assert turns[asker] == min(turns[peer] for peer in (asker, *self.waiting.values())), (
                "the least served first"
            )
            assert all(turns[peer] > turns[asker] for other, peer in self.waiting.items() if other < ticket), "then age"
            self.served[ticket] = asker

    @rule(asker=st.sampled_from(PEERS))
    def enter(self, asker: PeerId) -> None:
        self.last += 1
        self.waiting[self.last] = asker
        self.take(self.budget.enter(self.last, asker))

    @precondition(lambda self: self.waiting or self.served)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting | self.served)))
        self.waiting.pop(ticket, None)
        self.served.pop(ticket, None)
        self.take(self.budget.leave(ticket))

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        assert len(self.served) <= self.budget.at_once
        if len(self.served) < self.budget.at_once:
            turns = Counter(self.served.values())
            assert all(turns[peer] == PER_ASKER for peer in self.waiting.values())


Line.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLine = Line.TestCase


# -- blobs given over streams, in virtual time


class Timed(Counter[tuple[Direction, str]]):
    """A meter that keeps when how many bytes were sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[float, int]] = []

    def __setitem__(self, key: tuple[Direction, str], value: int) -> None:
        if key[0] == "sent":
            self.sent.append((asyncio.get_running_loop().time(), value - self[key]))
        super().__setitem__(key, value)


@pytest.fixture
async def run_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[asyncio.Future[Any]], Any]:
    """Lets time pass, tick by tick, until something is done; threads take none of it."""
    loop, now_s = asyncio.get_running_loop(), 0.0

    async def at_once(work: Callable[..., Any], *args: Any) -> Any:
        return work(*args)

    async def run_on(work: asyncio.Future[Any]) -> Any:
        nonlocal now_s
        while not work.done():
            for _ in range(30):
                await asyncio.sleep(0)
            now_s += TICK_S
        return work.result()

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    monkeypatch.setattr(loop, "time", lambda: now_s)
    return run_on


def blobs(count: int, size: int) -> dict[bytes, bytes]:
    return {blake3(blob).digest(): blob for blob in (bytes([k]) * size for k in range(count))}


async def give(net: Net, budget: Budget, given: dict[bytes, bytes]) -> Timed:
    donor = net.join(ME)
    donor.metered = meter = Timed()
    await serve_blobs(donor, given.get, budget=budget)
    return meter


async def take(net: Net, peer: PeerId, wanted: dict[bytes, bytes], streams: int) -> list[float]:
    """Fetch all, so many at a time; returns when each came."""
    asker, left, came = net.join(peer), iter(wanted), list[float]()

    async def one_after_the_other() -> None:
        for digest in left:
            size = len(wanted[digest])
            assert await fetch(asker, ME, digest, size, kind="state", timeout_s=SILENCE_S) == wanted[digest]
            came.append(asyncio.get_running_loop().time())

    async with asyncio.TaskGroup() as tasks:
        for _ in range(streams):
            tasks.create_task(one_after_the_other())
    return came


@pytest.mark.parametrize("rate", [NARROW, 3 * NARROW, WIDE])
async def test_a_donor_gives_its_budget_and_no_more_and_nobody_who_waits_takes_it_for_stalled(
    rate: int, run_on: Callable[[asyncio.Future[Any]], Any]
) -> None:
    budget, wanted = Budget(rate), blobs(4, int(2 * rate))  # who comes last waits for longer than the silence limit
    async with network() as net:
        meter = await give(net, budget, wanted)
        takes = [asyncio.ensure_future(take(net, peer, wanted, streams=2)) for peer in PEERS]
        came = await run_on(asyncio.gather(*takes))
    total = len(PEERS) * sum(map(len, wanted.values()))
    assert sum(num_bytes for _, num_bytes in meter.sent) >= total
    assert worst_excess(meter.sent, budget) <= rate * TICK_S  # by so much a piece may have been late
    last = max(map(max, came))
    assert last > 3 * SILENCE_S
    assert last == pytest.approx(total / rate, rel=0.1)


async def test_who_opens_many_streams_gets_no_more_than_who_opens_two(
    run_on: Callable[[asyncio.Future[Any]], Any],
) -> None:
    wanted = blobs(20, 2 * NARROW)
    async with network() as net:
        await give(net, Budget(4 * NARROW), wanted)
        greedy = asyncio.ensure_future(take(net, EVE, wanted, streams=20))
        modest = asyncio.ensure_future(take(net, ANN, wanted, streams=2))
        greedy_came, modest_came = await run_on(asyncio.gather(greedy, modest))
    assert modest_came[-1] == pytest.approx(greedy_came[-1], rel=0.1)
    assert modest_came[9] == pytest.approx(greedy_came[9], rel=0.15)


async def test_a_blob_is_not_read_before_it_can_be_given(run_on: Callable[[asyncio.Future[Any]], Any]) -> None:
    wanted, read = blobs(3, 4 * NARROW), list[bytes]()

    def lookup(digest: bytes) -> bytes:
        read.append(digest)
        return wanted[digest]

    async with network() as net:
        await serve_blobs(net.join(ME), lookup, budget=Budget(NARROW))
        taking = asyncio.ensure_future(take(net, ANN, wanted, streams=3))
        await run_on(asyncio.ensure_future(asyncio.sleep(2)))
        assert len(read) == 1
        await run_on(taking)


async def test_who_goes_away_in_line_makes_room_for_the_next(run_on: Callable[[asyncio.Future[Any]], Any]) -> None:
    wanted = blobs(1, 4 * NARROW)
    async with network() as net:
        await give(net, Budget(NARROW), wanted)
        first, gone = (asyncio.ensure_future(take(net, peer, wanted, streams=1)) for peer in (ANN, BOB))
        await run_on(asyncio.ensure_future(asyncio.sleep(1)))
        gone.cancel()
        last = asyncio.ensure_future(take(net, EVE, wanted, streams=1))
        await run_on(first)
        (came,) = await run_on(last)
    assert came < 8 + SAID_EVERY_S


async def test_a_donor_that_lets_us_wait_for_ever_is_given_up(
    run_on: Callable[[asyncio.Future[Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "IN_LINE_S", 4 * SILENCE_S)

    async def wait_for_ever(sender: PeerId, stream: Any) -> None:
        while True:
            await stream.write(b"\2")
            await asyncio.sleep(SAID_EVERY_S)

    async with network() as net:
        await net.join(ME).serve_stream("dugnad/blob/1", wait_for_ever)
        fetching = asyncio.ensure_future(fetch(net.join(ANN), ME, bytes(32), 9, kind="state", timeout_s=SILENCE_S))
        with pytest.raises(Stalled, match="not our turn in 20 s"):
            await run_on(fetching)
