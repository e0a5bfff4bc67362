"""The first words of a role that starts: to whom it says hello, and what it takes from the answers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dugnad.dht import hello
from dugnad.dht.bootstrap import Contacts
from dugnad.dht.hello import TurnedAway, Verdict
from dugnad.dht.identity import Identity, PeerId
from dugnad.monitoring.metrics import Metrics
from dugnad.peer import place
from dugnad.peer.face import Face
from dugnad.peer.place import Way
from tests.unit.memory_transport import Net, network

ME, ANN, BOB = (Identity.from_seed(bytes([k]) * 32).peer_id for k in range(1, 4))
RUN, OTHER = b"r" * 32, b"o" * 32


def way(*invited: PeerId) -> Way:
    return Way(RUN, "tiny", PeerId("organizer"), tuple(f"/ip4/127.0.0.1/tcp/1/p2p/{peer}" for peer in invited))


async def says(net: Net, peer: PeerId, code: str, *, run: bytes = RUN) -> None:
    await hello.serve(net.join(peer), run, "tiny", judge=lambda asker: Verdict(code))


@asynccontextmanager
async def greeted(
    net: Net, way: Way, *, there: Sequence[PeerId], known: Sequence[PeerId] = (ANN, BOB), role: Any = "volunteer"
) -> AsyncIterator[None]:
    host: Any = net.join(ME)
    host.contacts, host.seen_at = Contacts(tuple(there), ()), hello.unseen
    async with place._greeted(host, way, Face(Metrics("volunteer", "ab" * 4)), role, known):
        yield


@pytest.mark.parametrize("code", ["E301", "E401", "E403"])
@pytest.mark.parametrize("invited", [(), (BOB,)])
async def test_who_comes_by_remembered_peers_hears_from_them_why_it_may_not(code: str, invited: Any) -> None:
    async with network() as net:
        await says(net, ANN, code)
        with pytest.raises(TurnedAway, match=f"^{code}"):
            async with greeted(net, way(*invited), there=[ANN]):
                pass


@pytest.mark.parametrize(("code", "enters"), [("E401", True), ("E403", False), ("E301", False)])
async def test_a_coordinator_needs_to_be_on_no_list(code: str, enters: bool) -> None:
    async with network() as net:
        await says(net, ANN, code)
        try:
            async with greeted(net, way(ANN), there=[ANN], role="coordinator"):
                entered = True
        except TurnedAway:
            entered = False
        assert entered == enters


async def test_of_those_in_another_run_only_whom_the_invite_names_matter() -> None:
    async with network() as net:
        await says(net, ANN, "", run=OTHER)
        await says(net, BOB, "")
        async with greeted(net, way(), there=[ANN, BOB]):
            pass
        with pytest.raises(TurnedAway, match=r"^E304"):
            async with greeted(net, way(ANN), there=[ANN]):
                pass


async def banned_meanwhile(net: Net) -> None:
    async with greeted(net, way(), there=[]):
        await says(net, ANN, "E403")
        await asyncio.Event().wait()


async def test_those_who_come_back_later_are_greeted_until_one_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_GREET_AGAIN_S", 0.001)
    async with network() as net, asyncio.timeout(5.0):
        with pytest.raises(ExceptionGroup) as raised:
            await banned_meanwhile(net)
        assert raised.group_contains(TurnedAway, match=r"^E403")
        async with greeted(net, way(), there=[]):
            await says(net, BOB, "")
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.001)


async def test_who_launches_a_run_waits_for_nobody() -> None:
    async with network() as net, greeted(net, way(), there=[], known=[]):
        assert len(asyncio.all_tasks()) == 1
