"""The end of a swarm: gossip may still arrive, and is ignored."""

import asyncio
from typing import Any

import pytest

from dugnad.dht.gossip import Summary
from dugnad.dht.identity import Identity
from dugnad.dht.records import ProgressBody
from dugnad.dht.swarm import CODEC, Swarm
from dugnad.dht.wire import seal

ME, OTHER = Identity.from_seed(bytes(32)), Identity.from_seed(bytes([1] * 32))
RUN = b"r" * 32
GOSSIP = seal(OTHER, RUN, CODEC, Summary((), b"", answer=False))


class QuietHost:
    """Nobody else is there; `heard` is who takes messages."""

    def __init__(self) -> None:
        self.heard: Any = None

    def addresses(self) -> tuple[str, ...]:
        return ("/ip4/127.0.0.1/tcp/1",)

    async def announce(self, run: bytes, raw: bytes, *, expires_s: float) -> bool:
        return True

    async def peers(self) -> list[str]:
        return []

    async def learn(self, peer: str, addresses: tuple[str, ...]) -> None:
        pass

    async def request(self, peer: str, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        return b""

    async def serve(self, channel: str, handler: Any) -> None:
        self.heard = handler


def broken() -> ProgressBody | None:
    raise ArithmeticError("a bug")


def swarm(host: Any, progress: Any = lambda: None) -> Swarm:
    return Swarm(host, ME, RUN, role="volunteer", refused=pytest.fail, progress=progress)


async def test_gossip_that_arrives_after_the_end_is_ignored() -> None:
    host = QuietHost()
    async with swarm(host):
        assert await host.heard(OTHER.peer_id, GOSSIP) == b""
    assert await host.heard(OTHER.peer_id, GOSSIP) == b""


async def test_gossip_that_arrives_while_a_failure_ends_the_swarm_is_ignored() -> None:
    host = QuietHost()

    async def take_part() -> None:
        async with swarm(host, broken):
            try:
                await asyncio.Event().wait()
            finally:
                assert await host.heard(OTHER.peer_id, GOSSIP) == b""

    with pytest.raises(ExceptionGroup) as raised:
        await take_part()
    assert [type(error) for error in raised.value.exceptions] == [ArithmeticError]


class SilentHost(QuietHost):
    """Another peer is connected, and never replies."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.anyone_asked = asyncio.Event()

    async def peers(self) -> list[str]:
        return [OTHER.peer_id]

    async def request(self, peer: str, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        self.asked.append(peer)
        self.anyone_asked.set()
        await asyncio.Event().wait()
        return b""


async def test_a_peer_that_never_replies_is_answered_once_at_a_time_and_does_not_hold_up_the_end() -> None:
    host, stranger = SilentHost(), Identity.from_seed(bytes([2] * 32))
    gossip = seal(stranger, RUN, CODEC, Summary((), b"", answer=False))
    async with asyncio.timeout(5.0), swarm(host):
        for _ in range(1000):
            await host.heard(stranger.peer_id, gossip)
        await host.anyone_asked.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        assert host.asked.count(stranger.peer_id) == 1


async def test_who_is_connected_is_gossiped_with_though_no_record_names_it() -> None:
    host = SilentHost()
    async with asyncio.timeout(5.0), swarm(host):
        await host.anyone_asked.wait()
    assert host.asked == [OTHER.peer_id]


async def test_each_message_of_gossip_is_counted() -> None:
    host, passed = SilentHost(), list[tuple[str, str]]()
    made = Swarm(
        host,  # type: ignore[arg-type]
        ME,
        RUN,
        role="volunteer",
        refused=pytest.fail,
        progress=lambda: None,
        passed=lambda *what: passed.append(what),
    )
    async with made:
        await host.heard(OTHER.peer_id, GOSSIP)
        await host.anyone_asked.wait()
    assert ("received", "summary") in passed
    assert ("sent", "summary") in passed or ("sent", "buckets") in passed
