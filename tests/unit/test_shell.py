"""The world around a machine: what ends a role, what is durable before it is said, and how the model comes here."""

import asyncio
import errno
import logging
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3

from dugnad.coordinator import effects, ranges, sources, sync
from dugnad.coordinator import follower as following
from dugnad.coordinator.averages import RESULTS_CHANNEL, ResultsHeader
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.checkpoint import Checkpoint, inspect, read_head
from dugnad.coordinator.effects import Promises, Remember, Rewind, Send, Store
from dugnad.coordinator.membership import Stage
from dugnad.coordinator.messages import Commits, CommitsRequest, Plan, Proposal, Report, StateOffer, StateRequest
from dugnad.coordinator.replica import REPLAY_ROUNDS
from dugnad.coordinator.service import Coordinator, Dismissed
from dugnad.coordinator.shell import CODEC, ROUND_CHANNEL, Shell
from dugnad.coordinator.state import Model
from dugnad.coordinator.surroundings import Surroundings
from dugnad.coordinator.tensorfile import WEIGHTS
from dugnad.dht import bulk
from dugnad.dht.blobs import Blobs
from dugnad.dht.budget import Budget
from dugnad.dht.decisions import Decision
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.paths import Reach
from dugnad.dht.transport import Transport, TransportError, Unreachable
from dugnad.dht.wire import Message, open_sealed, seal
from dugnad.monitoring.metrics import Metrics
from dugnad.peer.errors import sentence_of
from dugnad.peer.lifecycle import Work
from dugnad.peer.session import Session, _without
from tests.unit.memory_transport import MemoryTransport, network
from tests.unit.shells import ANN, BOB, EVE, LAYOUT, ORGANIZER, RECIPE, Role, Run, SmallNumerics, serving
from tests.unit.still import Still

SHORT = Run(ANN)
PARTS = (SHORT.grow(2), SHORT.parts)[1]
GENESIS = SHORT.genesis
HELLO = seal(BOB, GENESIS.run, CODEC, Delegation(BOB.peer_id, 1, 0, b"\0" * 64))
QUESTION = seal(BOB, GENESIS.run, sync.CODEC, CommitsRequest(0, 0))
FULL = OSError(errno.ENOSPC, "No space left on device")
PLAN = Plan(0, 1, 1, 0, GENESIS.run, 0, (), (BOB.peer_id,) * len(LAYOUT.parts), (), 1.0, 1.0)
LONG_S = 20.0


class Script(Still):
    """Answers every message with the effects it was given; those that are functions are called."""

    def __init__(self) -> None:
        super().__init__(PLAN)
        self.on_message: Sequence[object] = ()
        self.is_always_due = False

    def receive(self, sender: PeerId, message: Message, *, now: float) -> Sequence[object]:
        return self.on_message

    def wake_at(self) -> float:
        return 0.0 if self.is_always_due else float("inf")


def scripted(transport: Transport, directory: Path) -> tuple[Role, Script]:
    script = Script()
    return Role(transport, directory, GENESIS, machine=script), script


Play = Callable[[Role, Script, MemoryTransport], Coroutine[Any, Any, None]]


async def ending(directory: Path, play: Play) -> list[BaseException]:
    """What a scripted role ended with after `play`, which gets the transport of Bob, a stranger, too."""
    async with network() as net, asyncio.timeout(LONG_S):
        role, script = scripted(net.join(ANN.peer_id), directory)
        stranger = net.join(BOB.peer_id)
        running = asyncio.create_task(role.serve())
        await role.begun.wait()
        await play(role, script, stranger)
        await asyncio.wait([running])
        assert await stranger.request(ANN.peer_id, sync.CHANNEL, QUESTION, timeout_s=1) == b"", "answered after its end"
        return _leaves(running.exception())


def _leaves(error: BaseException | None) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [] if error is None else [error]


async def greet(stranger: Transport) -> None:
    await stranger.request(ANN.peer_id, ROUND_CHANNEL, HELLO, timeout_s=1)


def fail(*_: object, **__: object) -> None:
    raise FULL


async def fail_beside() -> None:
    raise FULL


# -- how a role ends


async def test_an_effect_that_fails_ends_the_role_with_its_error_and_nothing_more_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []

    async def play(role: Role, script: Script, stranger: Transport) -> None:
        script.on_message = [lambda: done.append("before"), fail, lambda: done.append("after")]
        for _ in range(3):
            await greet(stranger)

    assert await ending(tmp_path, play) == [FULL]
    assert done == ["before"]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_what_fails_twice_in_one_breath_ends_the_role_once(tmp_path: Path) -> None:
    async def play(role: Role, script: Script, stranger: Transport) -> None:
        role.fail(FULL)
        role.fail(OSError("another"))

    assert await ending(tmp_path, play) == [FULL]


async def test_a_message_that_comes_while_work_beside_fails_starts_nothing(tmp_path: Path) -> None:
    started: list[str] = []

    async def play(role: Role, script: Script, stranger: Transport) -> None:
        script.on_message = [lambda: started.append("more")]
        failing = role.spawn(fail_beside())
        while not failing.done():
            await asyncio.sleep(0)
        await greet(stranger)

    assert await ending(tmp_path, play) == [FULL]
    assert started == []


async def test_work_that_is_given_up_before_it_began_leaves_nothing_behind(tmp_path: Path) -> None:
    async def play(role: Role, script: Script, stranger: Transport) -> None:
        role.spawn(asyncio.sleep(0, None))
        role.fail(FULL)

    assert await ending(tmp_path, play) == [FULL]


async def test_a_role_that_is_done_answers_nothing_any_more(tmp_path: Path) -> None:
    async def play(role: Role, script: Script, stranger: Transport) -> None:
        assert await stranger.request(ANN.peer_id, sync.CHANNEL, QUESTION, timeout_s=1) != b""
        role.done.set()

    assert await ending(tmp_path, play) == []


async def test_a_machine_that_is_always_due_leaves_time_for_everything_else(tmp_path: Path) -> None:
    async def play(role: Role, script: Script, stranger: Transport) -> None:
        script.is_always_due = True
        for _ in range(20):
            await greet(stranger)
        role.done.set()

    assert await ending(tmp_path, play) == []


async def test_a_machine_that_fails_on_a_message_ends_the_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = AssertionError("a rule of the machine does not hold")

    def receive(*_: object, **__: object) -> Sequence[object]:
        raise mistake

    async def play(role: Role, script: Script, stranger: Transport) -> None:
        monkeypatch.setattr(script, "receive", receive)
        await greet(stranger)

    assert await ending(tmp_path, play) == [mistake]


# -- what is counted


async def test_whoever_leads_counts_how_long_its_phases_took_and_which_attempts_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Chain(tmp_path / "chain.sqlite")) as chain:
        run = Run(ANN, incarnation=chain.incarnation())
    async with network() as net:
        role = Role(net.join(ANN.peer_id), tmp_path, run.genesis)
    now = 0.0
    monkeypatch.setattr(role, "now", lambda: now)
    monkeypatch.setattr(role, "_perform_one", lambda effect: None)
    volunteer, head = role.volunteer, role.follower.ledger.head
    report = Report(
        epoch=0, head_round=0, head=head.hash, in_view=0, incarnation=bytes(8), trains=True, stage=Stage.WAITING,
        round=0, view=0, attempt=0, step=0, of_steps=0, leaving=False, reach=Reach.OPEN, uplink=1e6, addresses=(),
    )  # fmt: skip

    def counted(metric: str, **labels: str) -> float | None:
        return role.metrics.registry.get_sample_value(metric, labels)

    def took(phase: str) -> float | None:
        return counted("dugnad_phase_duration_seconds_sum", phase=phase)

    def plan() -> Plan:
        assert volunteer.plan is not None
        return volunteer.plan

    role.perform(volunteer.synced(0, run.models[0].digest(), (), now=now))
    role.perform(volunteer.receive(BOB.peer_id, report, now=now))
    assert plan().members == tuple(sorted([ANN.peer_id, BOB.peer_id]))
    assert counted("dugnad_failed_attempts_total") == 0
    now = 3.0
    role.perform(volunteer.lost(BOB.peer_id, "no route", now=now))
    assert plan().members == (ANN.peer_id,)
    assert counted("dugnad_failed_attempts_total") == 1
    now = 10.0
    samples = ranges.count(plan().seats[0].ranges)
    work = Work(blake3(b"root").digest(), samples, samples * RECIPE.model.context, 2.0)
    role.perform(volunteer.trained(plan(), work, now=now))
    assert took("gather") == 10.0
    now = 14.0
    results = {part: blake3(bytes([part])).digest() for part in range(len(LAYOUT.parts))}
    role.perform(volunteer.folded(plan(), results, now=now))
    assert took("reduce") == 4.0
    assert role.follower.ledger.head.round == 1
    role.chain.close()


# -- averages


def header_of(part: bytes) -> bytes:
    return msgspec.msgpack.encode(ResultsHeader(1, 1, 0, ((0, blake3(part).digest()),)))


async def bring(stranger: Transport, part: bytes) -> None:
    await bulk.push(
        stranger, ANN.peer_id, RESULTS_CHANNEL, header_of(part), [part], kind="result", timeout_s=LONG_S
    )  # fmt: skip


async def test_a_disk_that_is_full_refuses_averages_with_a_reason_and_ends_the_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []

    async def play(role: Role, script: Script, stranger: Transport) -> None:
        monkeypatch.setattr(role.blobs, "put", fail)
        try:
            await bring(stranger, PARTS[0][0])
        except bulk.PushRefused as refused:
            said.append(refused.reason)

    assert await ending(tmp_path, play) == [FULL]
    assert said == ["the disk here takes no more"]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_an_owner_can_bring_a_part_again_but_no_other_bytes_for_it(tmp_path: Path) -> None:
    one, other = PARTS[0][0], PARTS[1][0]

    async def play(role: Role, script: Script, stranger: Transport) -> None:
        await bring(stranger, one)
        await bring(stranger, one)
        with pytest.raises(bulk.PushRefused, match="other averages"):
            await bring(stranger, other)
        assert role.blobs.digests() == {blake3(one).digest()}
        assert script.results == [(BOB.peer_id, (1, 1, 0), {0: blake3(one).digest()})] * 2
        role.done.set()

    assert await ending(tmp_path, play) == []


async def test_bytes_that_were_voted_for_before_a_restart_stay_until_the_round_is_decided(tmp_path: Path) -> None:
    voted = Blobs(tmp_path / "blobs").put(b"averages of an attempt")

    async def play(role: Role, script: Script, stranger: Transport) -> None:
        assert role.blobs.has(voted)
        role.done.set()

    assert await ending(tmp_path, play) == []


async def test_a_part_that_is_on_its_way_is_not_fetched_a_second_time(tmp_path: Path) -> None:
    part, asked = PARTS[0][0], []
    digest = blake3(part).digest()

    def lookup(wanted: bytes) -> bytes:
        asked.append(wanted)
        return part

    async def play(role: Role, script: Script, stranger: Transport) -> None:
        await bulk.serve_blobs(stranger, lookup, budget=Budget.of_mbit(1000))
        fetching = [asyncio.create_task(role._fetch([(0, digest)], [BOB.peer_id])) for _ in range(3)]
        await asyncio.wait(fetching)
        assert role.blobs.get(digest) == part
        await role._fetch([(0, digest)], [BOB.peer_id])
        role.done.set()

    assert await ending(tmp_path, play) == []
    assert asked == [digest]


async def test_what_a_role_gives_comes_out_of_its_budget(tmp_path: Path) -> None:
    class Counting(Budget):
        spent = 0

        def spend(self, num_bytes: int, *, now: float) -> float:
            self.spent += num_bytes
            return super().spend(num_bytes, now=now)

    async with network() as net, asyncio.timeout(LONG_S):
        role, _ = scripted(net.join(ANN.peer_id), tmp_path)
        role.budget = budget = Counting(1e9)
        blob, stranger = role.blobs.put(b"8 bytes."), net.join(BOB.peer_id)
        async with serving(role):
            await role.begun.wait()
            given = await bulk.fetch(stranger, ANN.peer_id, blob, 8, kind="fetch", timeout_s=5)
            assert bytes(given) == b"8 bytes."
    assert budget.spent == 1 + 8


# -- what is durable before it is said

PROMISES = Promises(0, 3, 2, Proposal(2, SHORT.commits[1].block))
SAID = Delegation(ANN.peer_id, 1, 0, b"\0" * 64)


def the_epoch() -> Store:
    run = Run(ANN)
    run.grow(2)
    return Store(run.begin_epoch(1))


def remembered(chain: Chain) -> object:
    return chain.promises()


def chain_of(chain: Chain) -> object:
    return list(chain.commits())


EPOCH = the_epoch()
DURABLE: dict[str, tuple[list[object], Callable[[Chain], object], object]] = {
    "a promise": ([Remember(PROMISES)], remembered, PROMISES),
    "a commit": ([Store(SHORT.commits[1])], chain_of, SHORT.commits),
    "an epoch": ([Store(SHORT.commits[1]), Rewind(1), EPOCH], chain_of, [SHORT.commits[0], EPOCH.commit]),
}


@pytest.mark.parametrize(("effects", "read", "there"), DURABLE.values(), ids=DURABLE)
async def test_what_must_be_durable_lies_on_the_disk_before_the_next_word_leaves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    effects: list[object],
    read: Callable[[Chain], object],
    there: object,
) -> None:
    SHORT.keep_in(tmp_path, up_to=1)
    on_disk: list[object] = []

    async def play(role: Role, script: Script, stranger: Transport) -> None:
        post = role._mail.post

        def look_and_post(to: PeerId, raw: bytes) -> None:
            with closing(Chain(tmp_path / "chain.sqlite", read_only=True)) as chain:
                on_disk.append(read(chain))
            post(to, raw)

        monkeypatch.setattr(role._mail, "post", look_and_post)
        script.on_message = [*effects, Send((BOB.peer_id,), SAID)]
        await greet(stranger)
        role.done.set()

    assert await ending(tmp_path, play) == []
    assert on_disk == [there]


@pytest.mark.parametrize("write", ["remember", "append"])
async def test_what_could_not_be_made_durable_is_not_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    effect = Remember(PROMISES) if write == "remember" else Store(SHORT.commits[0])
    heard: list[bytes] = []

    async def play(role: Role, script: Script, stranger: Transport) -> None:
        async def hear(sender: PeerId, raw: bytes) -> bytes:
            heard.append(raw)
            return b""

        await stranger.serve(ROUND_CHANNEL, hear)
        monkeypatch.setattr(role.chain, write, fail)
        script.on_message = [effect, Send((BOB.peer_id,), SAID)]
        await greet(stranger)

    assert await ending(tmp_path, play) == [FULL]
    assert heard == []


async def test_a_promise_is_kept_over_a_restart_and_a_copy_of_the_folder_may_not_vote(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with closing(Chain(home / "chain.sqlite")) as chain:
        run = Run(ANN, incarnation=chain.incarnation())
    run.keep_in(home)
    promises = Promises(0, 1, 3, None, None)

    async def started(folder: Path) -> Role:
        async with network() as net, asyncio.timeout(LONG_S):
            role = Role(net.join(ANN.peer_id), folder, run.genesis)
            async with serving(role):
                await role.stands_at(0)
            return role

    first = await started(home)
    assert first.follower.votes
    with closing(Chain(home / "chain.sqlite")) as chain:
        chain.remember(promises)
    shutil.copytree(home, tmp_path / "copy")
    again, copy = await started(home), await started(tmp_path / "copy")
    assert (again.follower.promises, again.follower.votes) == (promises, True)
    assert again.follower.incarnation == first.follower.incarnation
    assert not copy.follower.votes, "what the original promised since the copy was made is not known here"
    assert copy.follower.incarnation != first.follower.incarnation


# -- how the model comes to be here


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "RETRY_S", 0.01)
    monkeypatch.setattr(sources, "REPAIR_S", 0.01)
    monkeypatch.setattr(sources, "LOOK_S", 1e6)


@pytest.fixture
def run() -> Run:
    """Twelve rounds by Ann and Bob: more than are replayed on the first model."""
    run = Run(ANN, BOB)
    run.grow(12)
    return run


class Donor:
    """A peer that answers as it is told: the whole chain, an offer, and the chunks of some models."""

    def __init__(self, run: Run, identity: Identity) -> None:
        self.run, self.identity = run, identity
        self.offer = StateOffer(11, run.models[11].manifest(), ())
        self.models = run.models[11:12]
        self.asked: list[Message] = []
        self.may_answer, self.may_give = asyncio.Event(), asyncio.Event()
        self.may_answer.set()
        self.may_give.set()

    async def serve(self, transport: Transport) -> None:
        await transport.serve(sync.CHANNEL, self._answer)
        await bulk.serve_blobs(transport, self._lookup, budget=Budget.of_mbit(10_000))

    async def _answer(self, sender: PeerId, raw: bytes) -> bytes:
        _, question = open_sealed(raw, self.run.genesis.run, sync.CODEC)
        assert isinstance(question, Message)
        self.asked.append(question)
        said: Message | None = None
        if isinstance(question, CommitsRequest):
            after = question.after_round if question.epoch == self.run.ledger.head.epoch else 0
            said = Commits(*self.run.ledger.head.place, tuple(self.run.commits[after:]))
        elif isinstance(question, StateRequest):
            await self.may_answer.wait()
            said = self.offer
        assert said is not None
        return seal(self.identity, self.run.genesis.run, sync.CODEC, said)

    def _lookup(self, digest: bytes) -> bytes | memoryview | None:
        parts = {blake3(part).digest(): part for parts in self.run.parts for part in parts}
        if digest in parts:
            return parts[digest]
        if not self.may_give.is_set():
            return None
        return next((blob for model in self.models if (blob := model.blob(digest)) is not None), None)


class Whys:
    """Why a role could not have the model, each time that it said so."""

    def __init__(self, role: Role) -> None:
        self.said: asyncio.Queue[str] = asyncio.Queue()
        failed = role.volunteer.sync_failed

        def sync_failed(why: str, *, now: float) -> list[Any]:
            self.said.put_nowait(why)
            return failed(why, now=now)

        role.volunteer.sync_failed = sync_failed  # type: ignore[method-assign]


@asynccontextmanager
async def joining(run: Run, directory: Path, donor: Donor) -> AsyncIterator[tuple[Role, Whys]]:
    """Eve, who joins with an empty folder and knows of one donor."""
    async with network() as net, asyncio.timeout(LONG_S):
        await donor.serve(net.join(donor.identity.peer_id))
        role = Role(net.join(EVE.peer_id), directory, run.genesis, me=EVE, contacts=[donor.identity.peer_id])
        whys = Whys(role)
        async with serving(role):
            yield role, whys


def offer(run: Run, round_: int, by: Sequence[Identity] = (), *, model: int | None = None) -> StateOffer:
    """What a donor may say: this is the model after `round_`, where truly it is that after `model`."""
    true = round_ if model is None else model
    digest = run.models[true].digest()
    return StateOffer(round_, run.models[true].manifest(), run.vouched(round_, by, model=digest) if by else ())


TRUE = {
    "which the next block names": lambda run: offer(run, 11),
    "for which a quorum signed": lambda run: offer(run, 12, [ANN, BOB]),
    "which the next block names, whatever else is signed": lambda run: offer(run, 10, [EVE]),
}


@pytest.mark.parametrize("true", TRUE.values(), ids=TRUE)
async def test_a_model_is_taken_of_a_stranger(tmp_path: Path, run: Run, true: Callable[[Run], StateOffer]) -> None:
    donor = Donor(run, BOB)
    donor.offer, donor.models = true(run), run.models
    async with joining(run, tmp_path, donor) as (role, whys):
        assert (await role.stands_at(12)).digest() == run.models[12].digest()
        assert whys.said.empty()
        assert list(role.chain.commits()) == run.commits
    assert donor.asked.count(StateRequest()) == 1
    assert not (tmp_path / "incoming").exists()


FALSE: dict[str, tuple[Callable[[Run], StateOffer], str]] = {
    "another than the next block names": (lambda run: offer(run, 11, [ANN, BOB], model=10), "no quorum stands for"),
    "for which no quorum signed": (lambda run: offer(run, 12, [BOB]), "no quorum stands for"),
    "for which nobody signed": (lambda run: offer(run, 12), "no quorum stands for"),
    "for which strangers signed": (lambda run: offer(run, 12, [BOB, EVE]), "no quorum stands for"),
    "of a round that is not committed": (
        lambda run: StateOffer(13, run.models[12].manifest(), run.vouched(12, [ANN, BOB])),
        "no quorum stands for",
    ),
    "of another run's first model": (
        lambda run: StateOffer(0, SmallNumerics(2).first_model().manifest(), ()),
        "no quorum stands for",
    ),
}


@pytest.mark.parametrize(("false", "why"), FALSE.values(), ids=FALSE)
async def test_a_model_that_nobody_stands_for_is_not_taken_and_no_byte_of_it_is_fetched(
    tmp_path: Path, run: Run, false: Callable[[Run], StateOffer], why: str
) -> None:
    donor = Donor(run, BOB)
    donor.offer, donor.models = false(run), [*run.models, SmallNumerics(2).first_model()]
    async with joining(run, tmp_path, donor) as (role, whys):
        for _ in range(2):
            assert why in await whys.said.get()
        assert role.state.newest is None
        assert not (tmp_path / "incoming").exists()
        donor.offer = offer(run, 11)
        assert (await role.stands_at(12)).digest() == run.models[12].digest()


async def test_a_true_model_that_is_too_old_to_replay_from_is_not_fetched(tmp_path: Path) -> None:
    run = Run(ANN, BOB)
    run.grow(REPLAY_ROUNDS + 3)
    donor = Donor(run, BOB)
    donor.offer, donor.models = offer(run, 2), run.models
    async with joining(run, tmp_path, donor) as (role, whys):
        assert "the model after round 2, which is too old to replay from" in await whys.said.get()
        assert not (tmp_path / "incoming").exists()
        donor.offer = offer(run, 3)
        await role.stands_at(REPLAY_ROUNDS + 3)


async def test_a_download_that_fails_is_told_in_words_and_tried_again(tmp_path: Path, run: Run) -> None:
    donor = Donor(run, BOB)
    donor.may_give.clear()
    async with joining(run, tmp_path, donor) as (role, whys):
        for _ in range(3):
            why = await whys.said.get()
            assert "blobs can't be had" in why
            assert role.volunteer.reason == why
        donor.may_give.set()
        assert (await role.stands_at(12)).digest() == run.models[12].digest()
        assert role.sources.downloading is None


async def test_the_model_is_asked_for_once_at_a_time(tmp_path: Path, run: Run) -> None:
    donor = Donor(run, BOB)
    donor.may_answer.clear()
    async with joining(run, tmp_path, donor) as (role, _):
        while StateRequest() not in donor.asked:
            await asyncio.sleep(0.001)
        for _ in range(3):
            role.perform([effects.Resync("the machine is impatient")])
            await asyncio.sleep(0.001)
        assert donor.asked.count(StateRequest()) == 1
        donor.may_answer.set()
        await role.stands_at(12)
        assert donor.asked.count(StateRequest()) == 1
        role.perform([effects.Resync("the model is of no use any more")])
        while donor.asked.count(StateRequest()) < 2:
            await asyncio.sleep(0.001)


async def test_a_model_that_an_epoch_undid_while_it_came_is_not_taken(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = Donor(run, BOB)
    undone = run.models[11]
    async with joining(run, tmp_path, donor) as (role, whys):
        downloaded = role.sources.download

        async def download(manifest: bytes, peer: PeerId) -> Model:
            model = await downloaded(manifest, peer)
            if model.digest() == undone.digest():
                epoch = run.begin_epoch(9)
                donor.offer, donor.models = offer(run, 10, [ANN, BOB]), run.models
                role.perform(role.volunteer.receive(BOB.peer_id, epoch, now=role.now()))
            return model

        monkeypatch.setattr(role.sources, "download", download)
        assert "an epoch began before round 11 while its model came" in await whys.said.get()
        assert (await role.stands_at(10)).digest() == run.models[9].digest()
        assert list(role.chain.commits()) == run.commits


async def test_a_model_that_an_epoch_undid_while_it_was_read_from_the_disk_is_not_gone_on_from(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.keep_in(tmp_path)
    run.checkpoint_in(tmp_path, 11)
    donor = Donor(run, BOB)
    async with network() as net, asyncio.timeout(LONG_S):
        await donor.serve(net.join(BOB.peer_id))
        role = Role(net.join(EVE.peer_id), tmp_path, run.genesis, me=EVE, contacts=[BOB.peer_id])
        take_up, loop = role.state.take_up, asyncio.get_running_loop()
        epoch = run.begin_epoch(9)
        donor.offer, donor.models = offer(run, 10, [ANN, BOB]), run.models

        def slowly(head: int, blocks: Mapping[int, bytes]) -> tuple[int, Model] | None:
            found, heard = take_up(head, blocks), threading.Event()

            def hear() -> None:
                role.perform(role.volunteer.receive(BOB.peer_id, epoch, now=role.now()))
                heard.set()

            loop.call_soon_threadsafe(hear)
            assert heard.wait(LONG_S)
            return found

        monkeypatch.setattr(role.state, "take_up", slowly)
        async with serving(role):
            assert (await role.stands_at(10)).digest() == run.models[9].digest()
    assert StateRequest() in donor.asked


async def test_a_role_gives_what_it_has_taken_and_nobody_had_to_be_there_from_the_start(
    tmp_path: Path, run: Run
) -> None:
    run.keep_in(tmp_path / "bob")
    run.checkpoint_in(tmp_path / "bob", 10)
    async with network() as net, asyncio.timeout(LONG_S):
        bob = Role(net.join(BOB.peer_id), tmp_path / "bob", run.genesis, me=BOB)
        async with serving(bob):
            assert (await bob.stands_at(12)).digest() == run.models[12].digest(), "the founder is not needed"
            (tmp_path / "eve").mkdir()
            eve = Role(net.join(EVE.peer_id), tmp_path / "eve", run.genesis, me=EVE, contacts=[BOB.peer_id])
            async with serving(eve):
                assert (await eve.stands_at(12)).digest() == run.models[12].digest()


# -- checkpoints


def harm(path: Path) -> None:
    raw = bytearray((path / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (path / WEIGHTS).write_bytes(raw)


async def becomes_whole(path: Path) -> None:
    while not isinstance(inspect(path), Checkpoint):
        await asyncio.sleep(0.001)


async def test_behind_a_damaged_checkpoint_an_older_one_is_taken_up_and_it_is_repaired_from_another_keeper(
    tmp_path: Path, run: Run
) -> None:
    for name in ("ann", "bob"):
        run.keep_in(tmp_path / name)
        for round_ in (9, 11):
            run.checkpoint_in(tmp_path / name, round_)
    damaged = tmp_path / "ann" / "checkpoints" / "round-000011"
    harm(damaged)
    async with network() as net, asyncio.timeout(LONG_S):
        ann = Role(net.join(ANN.peer_id), tmp_path / "ann", run.genesis)
        async with serving(ann):
            assert (await ann.stands_at(12)).digest() == run.models[12].digest()
            assert [damage.path for damage in ann.state.damaged] == [damaged]
            assert not isinstance(inspect(damaged), Checkpoint)
            bob = Role(net.join(BOB.peer_id), tmp_path / "bob", run.genesis, me=BOB)
            async with serving(bob):
                await becomes_whole(damaged)


async def test_a_checkpoint_that_nobody_can_make_good_does_not_keep_another_from_it(tmp_path: Path, run: Run) -> None:
    run.keep_in(tmp_path)
    _, mendable, lost = (run.checkpoint_in(tmp_path, round_) for round_ in (9, 10, 11))
    harm(lost)
    harm(mendable)
    donor = Donor(run, BOB)
    donor.models = [run.models[10]]
    async with network() as net, asyncio.timeout(LONG_S):
        await donor.serve(net.join(BOB.peer_id))
        ann = Role(net.join(ANN.peer_id), tmp_path, run.genesis)
        async with serving(ann):
            await ann.stands_at(12)
            assert [damage.path for damage in ann.state.damaged] == [lost, mendable]
            await becomes_whole(mendable)
            assert not isinstance(inspect(lost), Checkpoint)


async def test_a_checkpoint_of_a_round_that_the_chain_has_otherwise_is_left_alone(tmp_path: Path, run: Run) -> None:
    other = Run(ANN, BOB)
    other.grow(8)
    other.begin_epoch(8)
    folder = run.keep_in(tmp_path / "ann")
    run.checkpoint_in(folder, 7)
    kept = other.checkpoint_in(folder, 9)
    before = read_head(kept)
    async with network() as net, asyncio.timeout(LONG_S):
        role = Role(net.join(ANN.peer_id), folder, run.genesis)
        async with serving(role):
            assert (await role.stands_at(12)).digest() == run.models[12].digest()
            assert role.state.damaged == []
    assert read_head(kept) == before


def around(transport: Transport, folder: Path, run: Run, *contacts: PeerId) -> Surroundings:
    return Surroundings(
        identity=EVE, genesis=run.genesis, transport=transport, directory=folder, metrics=Metrics("volunteer", "run"),
        contacts=lambda: contacts,
    )  # fmt: skip


def volunteer(transport: Transport, folder: Path, run: Run) -> tuple[Shell, Callable[[], None]]:
    numerics: Any = SmallNumerics()
    session = Session(around(transport, folder, run), numerics)
    return session, session.leave


def coordinator(transport: Transport, folder: Path, run: Run) -> tuple[Shell, Callable[[], None]]:
    role = Coordinator(around(transport, folder, run), ORGANIZER, SmallNumerics())
    return role, role.stop


ROLES: Mapping[str, Callable[[Transport, Path, Run], tuple[Shell, Callable[[], None]]]] = {
    "volunteer": volunteer,
    "coordinator": coordinator,
}


async def test_a_banned_coordinator_saves_its_model_and_ends_with_the_words_of_the_organizer(tmp_path: Path) -> None:
    run = Run(ANN, BOB)
    run.grow(5)
    run.keep_in(tmp_path)
    async with network() as net, asyncio.timeout(LONG_S):
        here = around(net.join(EVE.peer_id), tmp_path, run)
        said = Decision(EVE.peer_id, "ban", "poison", 0.0, float("inf"), b"")
        role = Coordinator(here, ORGANIZER, SmallNumerics())
        running = asyncio.create_task(role.serve())
        while not role.follower.at_head:
            await asyncio.sleep(0.001)
        here.decisions.take(said)
        with pytest.raises(Dismissed, match=r"^E403 the organizer has banned your key \(poison\)"):
            await running
    assert (tmp_path / "checkpoints" / "round-000005").exists()
    assert sentence_of(ExceptionGroup("", [Dismissed("E403 so")])) == ("E403 so", 1)


@pytest.mark.parametrize("kind", ROLES)
async def test_every_role_saves_its_last_model_when_it_ends(tmp_path: Path, kind: str) -> None:
    run = Run(ANN, BOB)
    run.grow(5)
    run.keep_in(tmp_path)
    async with network() as net, asyncio.timeout(LONG_S):
        role, leave = ROLES[kind](net.join(EVE.peer_id), tmp_path, run)
        running = asyncio.create_task(role.serve())
        while not role.follower.at_head:
            await asyncio.sleep(0.001)
        leave()
        leave()
        await running
    saved = {path.name: inspect(path) for path in (tmp_path / "checkpoints").iterdir()}
    assert saved.keys() == {"round-000004", "round-000005"}
    last = saved["round-000005"]
    assert isinstance(last, Checkpoint)
    assert last.meta.block == run.commits[4].block.hash.hex()
    assert last.meta.model_digest == run.models[5].digest().hex()
    assert last.writer == EVE.peer_id


async def test_the_last_model_is_saved_though_one_of_its_round_was_in_an_epoch_that_is_over(tmp_path: Path) -> None:
    run = Run(ANN, BOB)
    run.grow(5)
    run.keep_in(tmp_path)
    async with network() as net, asyncio.timeout(LONG_S):
        role, leave = volunteer(net.join(EVE.peer_id), tmp_path, run)
        running = asyncio.create_task(role.serve())
        while not role.follower.at_head:
            await asyncio.sleep(0.001)
        role.state.checkpoint, role.state.saved = tmp_path / "checkpoints" / "round-000005", b"a block of before"
        leave()
        await running
    last = inspect(tmp_path / "checkpoints" / "round-000005")
    assert isinstance(last, Checkpoint)
    assert last.meta.block == run.commits[4].block.hash.hex()


async def test_a_volunteer_that_leaves_before_it_has_a_model_saves_none(tmp_path: Path, run: Run) -> None:
    async with network() as net, asyncio.timeout(LONG_S):
        role, leave = volunteer(net.join(EVE.peer_id), tmp_path, run)
        running = asyncio.create_task(role.serve())
        await asyncio.sleep(0)
        leave()
        await running
    assert not (tmp_path / "checkpoints").exists()


async def test_a_coordinator_that_could_not_have_the_model_asks_again_until_it_has(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dugnad.coordinator.keeper.RETRY_S", 0.01)
    donor = Donor(run, BOB)
    donor.offer = offer(run, 12)
    async with network() as net, asyncio.timeout(LONG_S):
        await donor.serve(net.join(BOB.peer_id))
        here = around(net.join(EVE.peer_id), tmp_path, run, BOB.peer_id)
        role = Coordinator(here, ORGANIZER, SmallNumerics())
        async with serving(role):
            while donor.asked.count(StateRequest()) < 3:
                await asyncio.sleep(0.001)
            assert "no model yet: " in role.machine.reason
            assert "that no quorum stands for" in role.machine.reason
            donor.offer = offer(run, 11)
            while not role.follower.at_head:
                await asyncio.sleep(0.001)
            assert "no model" not in role.machine.reason


@pytest.mark.parametrize("error", [Unreachable(PeerId("12D3ann"), "gone"), bulk.PushRefused(PeerId("12D3ann"), "gone")])
def test_a_line_names_a_peer_once(error: TransportError) -> None:
    assert _without(PeerId("12D3ann"), error) in ("gone", "refused: gone")
