"""Rates are measured within caps, with one at a time, and nobody who stalls or lies does harm."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from dugnad.dht import speed
from dugnad.dht.bulk import Nonsense, Stalled
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Path, Reach
from dugnad.dht.speed import AGAIN_S, CHANNEL, FIRST_PIECES, MAX_REMEMBERED, NUM_PIECES, PIECE_BYTES, Busy, Turns
from dugnad.dht.transport import Stream, Unreachable
from dugnad.peer import probe
from dugnad.peer.probe import Reached
from tests.unit.memory_transport import Fault, MemoryTransport, Net, NoDirect, network

ANN, BOB, EVE = (PeerId(name) for name in ("ann", "bob", "eve"))
UP, DOWN, BUSY, GO = b"\1", b"\2", b"\0", b"\1"
ALL_BYTES = NUM_PIECES * PIECE_BYTES


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Net, MemoryTransport, MemoryTransport]]:
    """Ann, who asks, and Bob, who lets everyone measure but Eve."""
    async with network() as net:
        ann, bob = net.join(ANN), net.join(BOB)
        await bob.serve_stream(CHANNEL, speed.service(bars=lambda peer: peer == EVE))
        yield net, ann, bob


async def test_both_directions_are_measured_with_4_mib_each_and_counted_as_speed() -> None:
    async with serving() as (_, ann, bob):
        found = await speed.measure(ann, BOB)
    assert found.up_mbit > 1
    assert found.down_mbit > 1
    marks = 4 * NUM_PIECES
    assert ann.metered["sent", "speed"] == bob.metered["sent", "speed"] == 2 + ALL_BYTES + marks
    assert ALL_BYTES == 4 * 2**20


async def test_the_same_direction_again_within_10_s_is_busy_and_costs_nothing() -> None:
    async with serving() as (_, ann, bob):
        await speed.measure(ann, BOB)
        before = bob.metered["sent", "speed"]
        with pytest.raises(Busy):
            await speed.measure(ann, BOB)
        assert bob.metered["sent", "speed"] == before + 1


async def test_while_one_measures_another_is_told_that_it_is_busy() -> None:
    async with serving() as (net, ann, _):
        stream = await ann.open(BOB, CHANNEL, kind="speed")
        await stream.write(UP)
        assert await stream.read_exactly(1) == GO
        with pytest.raises(Busy):
            await speed.measure(net.join(PeerId("cid")), BOB)


def test_turns_come_back_one_at_a_time_and_what_is_remembered_is_bounded() -> None:
    turns = Turns()
    assert turns.take(ANN, UP, now=0.0)
    assert not turns.take(BOB, UP, now=0.0)
    assert turns.take(ANN, DOWN, now=0.1), "its other direction, while the first is ending"
    turns.give_back(ANN)
    assert not turns.take(BOB, UP, now=0.2)
    turns.give_back(ANN)
    assert not turns.take(ANN, UP, now=AGAIN_S - 1)
    assert turns.take(BOB, UP, now=AGAIN_S - 1)
    turns.give_back(BOB)
    for number in range(MAX_REMEMBERED - 1):
        assert turns.take(PeerId(str(number)), UP, now=AGAIN_S + 1)
        turns.give_back(PeerId(str(number)))
    assert not turns.take(EVE, UP, now=AGAIN_S + 1)
    assert turns.take(EVE, UP, now=3 * AGAIN_S)


async def test_who_is_barred_gets_nothing() -> None:
    async with serving() as (net, _, bob):
        with pytest.raises(Unreachable):
            await speed.measure(net.join(EVE), BOB)
        assert bob.metered["sent", "unknown"] == bob.metered["sent", "speed"] == 0


async def test_a_direction_that_there_is_not_ends_the_stream() -> None:
    async with serving() as (_, ann, _):
        stream = await ann.open(BOB, CHANNEL, kind="speed")
        await stream.write(b"\7")
        with pytest.raises(Unreachable):
            await stream.read_exactly(1)


async def test_who_reads_nothing_is_sent_no_more_than_the_first_pieces_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed, "TIME_S", 0.05)
    async with network(buffer_bytes=2 * ALL_BYTES) as net:
        ann, bob = net.join(ANN), net.join(BOB)
        await bob.serve_stream(CHANNEL, speed.service(bars=lambda peer: False))
        stream = await ann.open(BOB, CHANNEL, kind="speed")
        await stream.write(DOWN)
        await stream.read_exactly(1 + FIRST_PIECES * PIECE_BYTES)
        with pytest.raises(Unreachable):
            await stream.read_exactly(1)
        # and the next one gets its turn
        assert (await speed.measure(net.join(PeerId("cid")), BOB)).up_mbit > 0


async def test_a_peer_that_says_go_and_no_more_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "TIME_S", 0.05)
    async with serving() as (net, ann, _):
        net.faults[BOB, ANN] = Fault(stall_after=1)
        with pytest.raises(Stalled, match="32 KiB"):
            await speed.measure(ann, BOB)


async def test_a_peer_that_says_nothing_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SILENCE_S", 0.05)
    async with serving() as (net, ann, _):
        net.faults[BOB, ANN] = Fault(stall_after=0)
        with pytest.raises(Stalled, match="no answer"):
            await speed.measure(ann, BOB)


async def test_what_came_in_time_counts_though_the_rest_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "TIME_S", 0.2)
    async with serving() as (net, ann, _):
        net.faults[ANN, BOB] = Fault(stall_after=1 + 100 * PIECE_BYTES)
        found = await speed.measure(ann, BOB)
        assert found.up_mbit > 0
        assert found.down_mbit > 0


async def test_a_peer_for_whom_time_runs_backwards_talks_nonsense() -> None:
    async def lie(peer: PeerId, stream: Stream) -> None:
        await stream.write(GO + struct.pack(">3I", 0, 5, 4))
        await asyncio.Event().wait()

    async with network() as net:
        ann, bob = net.join(ANN), net.join(BOB)
        await bob.serve_stream(CHANNEL, lie)
        with pytest.raises(Nonsense):
            await speed._try(ann, BOB, UP)


# -- the probe


async def probed(ann: Any, reach: Reach, members: list[PeerId]) -> Reached:
    meeting: Any = NoDirect(reach)
    found = await probe.probe(ann, meeting, members, b"claim")
    assert meeting.claim == b"claim"
    return found


@pytest.mark.parametrize(
    ("seen_ip", "open_ports", "reach", "inbound"),
    [
        (None, {}, Reach.UNKNOWN, None),
        ("11.0.0.2", {}, Reach.CONE, False),
        ("11.0.0.2", {4001: 4001}, Reach.OPEN, True),
    ],
)
async def test_the_probe_tells_what_members_saw_and_rates_of_the_first_that_answers(
    seen_ip: str | None, open_ports: dict[int, int], reach: Reach, inbound: bool | None
) -> None:
    async with serving() as (_, ann, _):
        ann.__dict__.update(SimpleNamespace(seen_ip=seen_ip, open_ports=open_ports).__dict__)
        found = await probed(ann, reach, [PeerId("gone"), BOB])
    assert found.reach == (reach if reach is not Reach.UNKNOWN else None)
    assert found.inbound is inbound
    assert found.path is Path.RELAYED
    assert found.up_mbit
    assert found.down_mbit


async def test_where_nobody_measures_and_nobody_says_how_it_sees_us_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "REACH_S", 0.05)
    async with network() as net:
        ann = net.join(ANN)
        ann.__dict__.update(seen_ip="11.0.0.2", open_ports={})
        assert await probed(ann, Reach.UNKNOWN, [PeerId("gone")]) == Reached(inbound=False)
