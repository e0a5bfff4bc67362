import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3

from dugnad.configs import recipe
from dugnad.coordinator import sync
from dugnad.coordinator.messages import CommitsRequest, Delegation, Genesis, Message, Plan
from dugnad.coordinator.shell import CODEC, RESULTS_CHANNEL, ROUND_CHANNEL, ResultsHeader, Shell
from dugnad.dht import bulk
from dugnad.dht.blobs import Blobs
from dugnad.dht.budget import Budget
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.transport import Transport
from dugnad.dht.wire import seal
from dugnad.monitoring.metrics import Metrics
from tests.unit.chains import digest
from tests.unit.memory_transport import network
from tests.unit.still import Still

ME, OTHER = Identity.generate(), Identity.generate()
GENESIS = Genesis(recipe.encode(recipe.load("tiny-books")), ME.peer_id, ME.peer_id, digest("model after round 0"))
HELLO = seal(OTHER, GENESIS.run, CODEC, Delegation(OTHER.peer_id, 1, b"\0" * 64))
QUESTION = seal(OTHER, GENESIS.run, sync.CODEC, CommitsRequest(0))
FULL = OSError(errno.ENOSPC, "No space left on device")

PLAN = Plan(0, 1, 1, 0, GENESIS.run, 0, (), (OTHER.peer_id,), 1.0, 1.0)

Effect = Callable[[], None]


class Script(Still):
    """Answers every message with the effects it was given."""

    def __init__(self) -> None:
        super().__init__(PLAN)
        self.on_message: Sequence[Effect] = ()
        self.is_always_due = False

    def receive(self, sender: PeerId, message: Message, *, now: float) -> Sequence[object]:
        return self.on_message

    def wake_at(self) -> float:
        return 0.0 if self.is_always_due else float("inf")


class Role(Shell):
    """A shell whose machine follows a script; its effects are functions."""

    def __init__(self, transport: Transport, directory: Path) -> None:
        super().__init__(
            ME,
            GENESIS,
            transport=transport,
            directory=directory,
            metrics=Metrics("volunteer", "run"),
            part_bytes=(8,),
            check_part=lambda _: None,
        )
        self.machine = self.script = Script()

    def perform_role(self, effect: object) -> None:
        assert callable(effect)
        effect()


async def ending(directory: Path, play: Callable[[Role, Transport], Coroutine[Any, Any, None]]) -> list[BaseException]:
    """What a role ended with after `play`, which gets the role and a stranger's transport."""
    async with network() as net, asyncio.timeout(10):
        role, stranger = Role(net.join(ME.peer_id), directory), net.join(OTHER.peer_id)
        serving = asyncio.create_task(role.serve())
        await asyncio.sleep(0)
        await play(role, stranger)
        await asyncio.wait([serving])
        assert await stranger.request(ME.peer_id, sync.CHANNEL, QUESTION, timeout_s=1) == b"", "answered after its end"
        return _leaves(serving.exception())


def _leaves(error: BaseException | None) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [] if error is None else [error]


def fail() -> None:
    raise FULL


async def fail_beside() -> None:
    raise FULL


async def test_an_effect_that_fails_ends_the_role_with_its_error_and_nothing_more_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []

    async def play(role: Role, stranger: Transport) -> None:
        role.script.on_message = [lambda: done.append("before"), fail, lambda: done.append("after")]
        for _ in range(3):
            await stranger.request(ME.peer_id, ROUND_CHANNEL, HELLO, timeout_s=1)

    assert await ending(tmp_path, play) == [FULL]
    assert done == ["before"]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_what_fails_twice_in_one_breath_ends_the_role_once(tmp_path: Path) -> None:
    async def play(role: Role, stranger: Transport) -> None:
        role.fail(FULL)
        role.fail(OSError("another"))

    assert await ending(tmp_path, play) == [FULL]


async def test_a_message_that_comes_while_work_beside_fails_starts_nothing(tmp_path: Path) -> None:
    started: list[str] = []

    async def play(role: Role, stranger: Transport) -> None:
        role.script.on_message = [lambda: started.append("more")]
        failing = role.spawn(fail_beside())
        while not failing.done():
            await asyncio.sleep(0)
        await stranger.request(ME.peer_id, ROUND_CHANNEL, HELLO, timeout_s=1)

    assert await ending(tmp_path, play) == [FULL]
    assert started == []


async def test_a_disk_that_is_full_refuses_averages_with_a_reason_and_ends_the_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    payload = bytes(8)
    header = msgspec.msgpack.encode(ResultsHeader(1, 1, 0, ((0, blake3(payload).digest()),)))
    said: list[str] = []

    async def play(role: Role, stranger: Transport) -> None:
        def full(*_: object) -> None:
            raise FULL

        monkeypatch.setattr(role.blobs, "put", full)
        try:
            await bulk.push(stranger, ME.peer_id, RESULTS_CHANNEL, header, [payload], kind="result", timeout_s=5)
        except bulk.PushRefused as refused:
            said.append(refused.reason)

    assert await ending(tmp_path, play) == [FULL]
    assert said == ["the disk here takes no more"]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_work_that_is_given_up_before_it_began_leaves_nothing_behind(tmp_path: Path) -> None:
    async def play(role: Role, stranger: Transport) -> None:
        role.spawn(asyncio.sleep(0, None))
        role.fail(FULL)

    assert await ending(tmp_path, play) == [FULL]


async def test_a_role_that_is_done_answers_nothing_any_more(tmp_path: Path) -> None:
    async def play(role: Role, stranger: Transport) -> None:
        assert await stranger.request(ME.peer_id, sync.CHANNEL, QUESTION, timeout_s=1) != b""
        role.done.set()

    assert await ending(tmp_path, play) == []


async def test_a_machine_that_is_always_due_leaves_time_for_everything_else(tmp_path: Path) -> None:
    async def play(role: Role, stranger: Transport) -> None:
        role.script.is_always_due = True
        await stranger.request(ME.peer_id, ROUND_CHANNEL, HELLO, timeout_s=1)  # it looks at the clock again
        await asyncio.sleep(0.02)
        role.done.set()

    assert await ending(tmp_path, play) == []


async def test_a_machine_that_fails_on_a_message_ends_the_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = AssertionError("a rule of the machine does not hold")

    def receive(*_: object, **__: object) -> Sequence[object]:
        raise mistake

    async def play(role: Role, stranger: Transport) -> None:
        monkeypatch.setattr(role.script, "receive", receive)
        await stranger.request(ME.peer_id, ROUND_CHANNEL, HELLO, timeout_s=1)

    assert await ending(tmp_path, play) == [mistake]


async def test_bytes_that_were_voted_for_before_a_restart_stay_until_the_round_is_decided(tmp_path: Path) -> None:
    voted = Blobs(tmp_path / "blobs").put(b"averages of an attempt")

    async def play(role: Role, stranger: Transport) -> None:
        assert role.blobs.has(voted)
        role.done.set()

    assert await ending(tmp_path, play) == []


async def test_a_part_that_is_on_its_way_is_not_fetched_a_second_time(tmp_path: Path) -> None:
    part, asked = b"8 bytes.", []
    digest = blake3(part).digest()

    def lookup(wanted: bytes) -> bytes:
        asked.append(wanted)
        return part

    async def play(role: Role, stranger: Transport) -> None:
        await bulk.serve_blobs(stranger, lookup, budget=Budget.of_mbit(1000))
        fetching = [asyncio.create_task(role._fetch([(0, digest)], [OTHER.peer_id])) for _ in range(3)]
        await asyncio.wait(fetching)
        assert role.blobs.get(digest) == part
        await role._fetch([(0, digest)], [OTHER.peer_id])
        role.done.set()

    assert await ending(tmp_path, play) == []
    assert asked == [digest]


async def test_what_a_role_gives_comes_out_of_its_budget(tmp_path: Path) -> None:
    class Counting(Budget):
        spent = 0

        def spend(self, num_bytes: int, *, now: float) -> float:
            self.spent += num_bytes
            return super().spend(num_bytes, now=now)

    async with network() as net, asyncio.timeout(10):
        role, stranger = Role(net.join(ME.peer_id), tmp_path), net.join(OTHER.peer_id)
        role.budget = budget = Counting(1e9)
        blob = role.blobs.put(b"8 bytes.")
        serving = asyncio.create_task(role.serve())
        await asyncio.sleep(0)
        assert await bulk.fetch(stranger, ME.peer_id, blob, 8, kind="fetch", timeout_s=5) == b"8 bytes."
        role.done.set()
        await serving
    assert budget.spent == 1 + 8


async def test_an_owner_can_bring_a_part_again_but_no_other_bytes_for_it(tmp_path: Path) -> None:
    parts = [bytes([k]) * 8 for k in range(2)]

    async def bring(stranger: Transport, part: bytes) -> None:
        header = msgspec.msgpack.encode(ResultsHeader(1, 1, 0, ((0, blake3(part).digest()),)))
        await bulk.push(stranger, ME.peer_id, RESULTS_CHANNEL, header, [part], kind="result", timeout_s=5)

    async def play(role: Role, stranger: Transport) -> None:
        await bring(stranger, parts[0])
        await bring(stranger, parts[0])
        with pytest.raises(bulk.PushRefused, match="other averages"):
            await bring(stranger, parts[1])
        assert role.blobs.digests() == {blake3(parts[0]).digest()}
        role.done.set()

    assert await ending(tmp_path, play) == []
