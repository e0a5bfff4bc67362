"""A damaged checkpoint is made whole from another keeper's copy: of exactly what is lost, and never at a loss."""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dugnad.coordinator import repair
from dugnad.coordinator.checkpoint import MANIFEST, MODEL, Checkpoint, inspect, manifest_of
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.damage import CheckpointError, Damage
from dugnad.coordinator.durable import NewFile, in_thread
from dugnad.coordinator.tensorfile import MOMENTUM, WEIGHTS, files_of
from dugnad.dht.budget import Budget
from dugnad.dht.bulk import OnBlob, fetch_all, serve_blobs
from dugnad.dht.identity import PeerId
from dugnad.dht.manifest import CHUNK_BYTES
from tests.unit.keepers import ANN, BOB, Asking, content, group, meta_of, model, nobody, same, save
from tests.unit.memory_transport import network

FILES = (MANIFEST, MODEL, MOMENTUM, WEIGHTS)
TENSORS = model(5, wide=True)
META = meta_of(TENSORS)
MANIFEST_BYTES = len(manifest_of(TENSORS).encode())
MODEL_DIGEST = bytes.fromhex(META.model_digest)
ROUND = "round-000005"
EVE = PeerId("eve")
CHUNKS = [chunk for file in files_of(manifest_of(TENSORS)).values() for chunk in file.chunks]

Harm = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with one of round 5, by Ann."""
    kept = Checkpoints(tmp_path_factory.mktemp("whole"), keep=3, signer=ANN)
    save(kept, 5, TENSORS)
    return kept.folder


@pytest.fixture
def ann(whole: Path) -> Checkpoints:
    """The other keeper, whose copy is whole."""
    return Checkpoints(whole, keep=3, signer=ANN)


@pytest.fixture
def bob(whole: Path, tmp_path: Path) -> Checkpoints:
    """A keeper of a copy."""
    return copy_of(whole, tmp_path / "bob")


def copy_of(whole: Path, folder: Path) -> Checkpoints:
    shutil.copytree(whole, folder)
    return Checkpoints(folder, keep=3, signer=BOB)


def damage_of(kept: Checkpoints) -> Damage:
    found = inspect(kept.folder / ROUND)
    assert isinstance(found, Damage)
    return found


def flip(name: str, at: int) -> Harm:
    def harm(path: Path) -> None:
        raw = bytearray((path / name).read_bytes())
        raw[at % len(raw)] ^= 0x10
        (path / name).write_bytes(raw)

    return harm


def cut(name: str, rest: int) -> Harm:
    return lambda path: os.truncate(path / name, rest % (path / name).stat().st_size)


def lose(name: str) -> Harm:
    return lambda path: (path / name).unlink()


def behead(name: str, num_bytes: int) -> Harm:
    """The first bytes are gone, and all others stand so much earlier."""
    return lambda path: void((path / name).write_bytes((path / name).read_bytes()[num_bytes:]))


def void(_: object) -> None:
    pass


def digests(name: str) -> set[bytes]:
    """The chunks of a file."""
    return {chunk.digest for chunk in files_of(manifest_of(TENSORS))[name].chunks}


async def mended(kept: Checkpoints, ask: repair.Fetch) -> Checkpoint:
    return await kept.repair(damage_of(kept), ask, meta=META, model_manifest_bytes=MANIFEST_BYTES)


def assert_whole(kept: Checkpoints, whole: Path) -> None:
    """Bob's copy is as it was, but that he has signed it."""
    again = kept.load(kept.folder / ROUND)
    assert (again.writer, again.round, again.meta) == (BOB.peer_id, 5, META)
    assert same(again.weights, group(TENSORS, "weights"))
    mine, theirs = content(kept.folder), content(whole)
    assert mine.keys() == theirs.keys(), "and nothing else lies there"
    assert {name for name, data in mine.items() if theirs[name] != data} == {f"{ROUND}/{MANIFEST}"}


@st.composite
def harms(draw: st.DrawFn) -> tuple[str, Harm]:
    """A file, and any one thing that happens to it."""
    name = draw(st.sampled_from(FILES))
    edges = st.sampled_from([0, 8, 16, -1, CHUNK_BYTES, 2 * CHUNK_BYTES])
    at = draw(edges | st.integers(0, 2**40))
    return name, draw(st.sampled_from([flip(name, at), cut(name, at), lose(name)]))


@settings(max_examples=60)
@given(harms())
def test_any_one_flipped_byte_or_cut_or_lost_file_is_named_and_made_good_by_another_keeper(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, harm: tuple[str, Harm]
) -> None:
    name, do = harm
    ann, bob = Checkpoints(whole, keep=3), copy_of(whole, tmp_path_factory.mktemp("bob") / "kept")
    do(bob.folder / ROUND)
    damage = damage_of(bob)
    assert [one.file for one in damage.broken] == [name]
    harmed = {chunk for one in damage.broken for chunk in one.chunks}
    lost = {chunk.digest for chunk in harmed} - {chunk.digest for chunk in CHUNKS if chunk not in harmed}
    ask = Asking(ann)
    asyncio.run(mended(bob, ask))
    assert_whole(bob, whole)
    assert ask.asked.keys() == lost | ({MODEL_DIGEST} if name == MODEL else set()), "and nothing that is whole here"


@settings(max_examples=20)
@given(st.lists(harms(), min_size=2, max_size=6))
def test_any_harm_to_several_files_is_made_good(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, harm: list[tuple[str, Harm]]
) -> None:
    bob = copy_of(whole, tmp_path_factory.mktemp("bob") / "kept")
    for name, do in harm:
        if (bob.folder / ROUND / name).exists() and (bob.folder / ROUND / name).stat().st_size:
            do(bob.folder / ROUND)
    if isinstance(inspect(bob.folder / ROUND), Damage):
        asyncio.run(mended(bob, Asking(Checkpoints(whole, keep=3))))
        assert_whole(bob, whole)


@pytest.mark.parametrize("num_bytes", [1, 8, 100])
async def test_where_the_head_of_a_file_is_gone_nothing_behind_it_is_asked_for(
    ann: Checkpoints, bob: Checkpoints, num_bytes: int
) -> None:
    behead(WEIGHTS, num_bytes)(bob.folder / ROUND)
    ask = Asking(ann)
    await mended(bob, ask)
    assert_whole(bob, ann.folder)
    assert ask.asked == {}


async def test_a_lost_manifest_alone_is_written_again_without_asking_anyone(ann: Checkpoints, bob: Checkpoints) -> None:
    lose(MANIFEST)(bob.folder / ROUND)
    await bob.repair(damage_of(bob), nobody, meta=META)
    assert_whole(bob, ann.folder)


async def test_a_checkpoint_that_is_not_there_at_all_comes_from_another_keeper(
    ann: Checkpoints, tmp_path: Path
) -> None:
    bob = Checkpoints(tmp_path / "new", keep=3, signer=BOB)
    ask = Asking(ann)
    loaded = await bob.repair(damage_of(bob), ask, meta=META, model_manifest_bytes=MANIFEST_BYTES)
    assert loaded.path == bob.folder / ROUND
    assert_whole(bob, ann.folder)
    assert ask.asked.keys() == {MODEL_DIGEST} | digests(WEIGHTS) | digests(MOMENTUM)


async def test_what_another_checkpoint_on_this_disk_holds_is_not_asked_for(bob: Checkpoints) -> None:
    newer = TENSORS | {"weights/bias": model(6)["weights/bias"]}
    save(bob, 6, newer)
    for name in (MODEL, MOMENTUM, WEIGHTS):
        lose(name)(bob.folder / "round-000006")
    save(bob, 7, newer)
    damage = inspect(bob.folder / "round-000006")
    assert isinstance(damage, Damage)
    await bob.repair(damage, nobody)
    assert bob.load(bob.folder / "round-000006").round == 6


async def test_a_repaired_checkpoint_is_of_those_who_can_be_asked(ann: Checkpoints, bob: Checkpoints) -> None:
    chunk = next(chunk for chunk in files_of(manifest_of(TENSORS))[WEIGHTS].chunks if chunk.tensor == "wide")
    flip(WEIGHTS, -31)(bob.folder / ROUND)
    assert bob.lookup(chunk.digest) is None, "a damaged chunk is not given"
    await mended(bob, Asking(ann))
    given = bob.lookup(chunk.digest)
    assert given is not None
    assert blake3(given).digest() == chunk.digest


# -- the network


@asynccontextmanager
async def asking_two(ann: Checkpoints) -> AsyncIterator[repair.Fetch]:
    """A `Fetch` from Ann, and from Eve, who gives other bytes."""
    async with network() as net:
        me = net.join(BOB.peer_id)
        await serve_blobs(net.join(ANN.peer_id), ann.lookup, budget=Budget.of_mbit(10_000))

        def lie(digest: bytes) -> bytes | None:
            return bytes(len(found)) if (found := ann.lookup(digest)) else None

        await serve_blobs(net.join(EVE), lie, budget=Budget.of_mbit(10_000))

        async def fetch(wanted: Mapping[bytes, int], on_blob: OnBlob) -> None:
            await fetch_all(me, [EVE, ANN.peer_id], wanted, kind="checkpoint", timeout_s=60.0, on_blob=on_blob)

        yield fetch


async def test_over_a_network_in_which_one_keeper_lies(ann: Checkpoints, bob: Checkpoints) -> None:
    for harm in (lose(WEIGHTS), lose(MODEL), flip(MOMENTUM, -1)):
        harm(bob.folder / ROUND)
    async with asking_two(ann) as fetch:
        await bob.repair(damage_of(bob), fetch)
    assert_whole(bob, ann.folder)


# -- when it fails


async def assert_refused(kept: Checkpoints, fetch: repair.Fetch, words: str) -> None:
    before, damage = content(kept.folder), damage_of(kept)
    with pytest.raises(CheckpointError, match=words) as caught:
        await kept.repair(damage, fetch)
    assert caught.value.damage == damage
    assert content(kept.folder) == before, "nothing is lost, and nothing left behind"


async def test_without_another_keeper_everything_stays_as_it_is(bob: Checkpoints) -> None:
    flip(WEIGHTS, -1)(bob.folder / ROUND)
    await assert_refused(bob, nobody, "could not be repaired: 1 of 1 blobs can't be had.* It is as it was: try again")


async def test_bytes_that_are_not_what_was_asked_for_are_not_taken(ann: Checkpoints, bob: Checkpoints) -> None:
    async def lie(wanted: Mapping[bytes, int], on_blob: OnBlob) -> None:
        for digest, size in wanted.items():
            on_blob(digest, memoryview(bytes(size)))
            on_blob(bytes(32), memoryview(bytes(size)))

    flip(WEIGHTS, -1)(bob.folder / ROUND)
    await assert_refused(bob, lie, "1 chunks did not come")
    lose(MODEL)(bob.folder / ROUND)
    await assert_refused(bob, lie, "the manifest of its model did not come")


async def test_without_its_manifest_someone_has_to_say_what_it_was(ann: Checkpoints, bob: Checkpoints) -> None:
    lose(MANIFEST)(bob.folder / ROUND)
    await assert_refused(bob, Asking(ann), "Nobody here knows what it is of: put back a copy")
    lose(MODEL)(bob.folder / ROUND)
    with pytest.raises(CheckpointError, match=r"Nobody here knows how large its model\.msgpack was"):
        await bob.repair(damage_of(bob), Asking(ann), meta=META)


async def test_a_full_disk_leaves_everything_as_it_was(
    ann: Checkpoints, bob: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(WEIGHTS)(bob.folder / ROUND)

    async def full(wanted: Mapping[bytes, int], on_blob: OnBlob) -> None:
        def fails(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", fails)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(Asking(ann)(wanted, on_blob))

    await assert_refused(bob, full, "could not be repaired: .*No space left on device")


async def test_a_disk_that_gives_back_other_bytes_than_it_took_is_found_before_the_old_is_touched(
    ann: Checkpoints, bob: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = NewFile.put

    def rotten(file: NewFile, offset: int, data: bytes) -> None:
        put(file, offset, data if offset < 100 else bytes(len(data)))

    lose(WEIGHTS)(bob.folder / ROUND)
    monkeypatch.setattr(NewFile, "put", rotten)
    await assert_refused(bob, Asking(ann), "this disk seems to fail")


async def test_who_is_cancelled_leaves_everything_as_it_was_and_can_try_again(
    ann: Checkpoints, bob: Checkpoints
) -> None:
    under_way = asyncio.Event()

    async def endless(wanted: Mapping[bytes, int], on_blob: OnBlob) -> None:
        under_way.set()
        await asyncio.Event().wait()

    lose(WEIGHTS)(bob.folder / ROUND)
    before = content(bob.folder)
    task = asyncio.create_task(mended(bob, endless))
    await under_way.wait()
    with pytest.raises(CheckpointError, match="is being repaired already"):
        await mended(bob, Asking(ann))
    save(bob, 6)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    shutil.rmtree(bob.folder / "round-000006")
    assert content(bob.folder) == before
    await mended(bob, Asking(ann))
    assert_whole(bob, ann.folder)


async def test_a_cancelled_wait_for_a_thread_lasts_until_the_thread_is_done() -> None:
    began, may_end, ended = asyncio.Event(), asyncio.Event(), []
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(began.set)
        asyncio.run_coroutine_threadsafe(may_end.wait(), loop).result()
        ended.append(True)
        raise ValueError("nobody hears this")

    task = asyncio.create_task(in_thread(work))
    await began.wait()
    task.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


def test_a_file_that_was_closed_takes_nothing_from_a_thread_that_comes_late(tmp_path: Path) -> None:
    with NewFile(tmp_path / "file", 4) as file:
        file.put(1, b"x")
    with pytest.raises(ValueError, match="is not open"):
        file.put(0, b"y")
    assert (tmp_path / "file").read_bytes() == b"\0x\0\0"


# -- giving to others


def test_every_chunk_and_the_manifest_of_the_model_are_given_by_hash(ann: Checkpoints) -> None:
    for digest in digests(WEIGHTS) | digests(MOMENTUM) | {MODEL_DIGEST}:
        given = ann.lookup(digest)
        assert given is not None
        assert given.readonly
        assert blake3(given).digest() == digest


def test_what_is_not_here_costs_no_look_at_the_disk(ann: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ann.lookup(MODEL_DIGEST) is not None

    def looked(*_: object, **__: object) -> None:
        raise AssertionError("the disk was looked at")

    for name in ("open", "listdir", "stat", "scandir"):
        monkeypatch.setattr(os, name, looked)
    monkeypatch.setattr(Path, "open", looked)
    assert ann.lookup(bytes(32)) is None


def test_what_is_saved_is_given_from_then_on_and_what_is_dropped_no_longer(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "kept", keep=2, signer=ANN)
    models = {round_: bytes.fromhex(meta_of(model(round_)).model_digest) for round_ in (1, 2, 3)}
    assert kept.lookup(models[1]) is None
    held = None
    for round_ in (1, 2, 3):
        save(kept, round_)
        assert kept.lookup(models[round_]) is not None
        held = held or kept.lookup(models[1])
    assert kept.lookup(models[1]) is None
    assert held is not None
    assert blake3(held).digest() == models[1], "what was given stays readable"


@pytest.mark.parametrize("harm", [flip(WEIGHTS, -1), cut(WEIGHTS, -1), lose(WEIGHTS)], ids=["flipped", "cut", "lost"])
def test_a_chunk_that_was_damaged_since_is_not_given(bob: Checkpoints, harm: Harm) -> None:
    last = files_of(manifest_of(TENSORS))[WEIGHTS].chunks[-1].digest
    assert bob.lookup(last) is not None
    harm(bob.folder / ROUND)
    assert bob.lookup(last) is None
    assert bob.lookup(MODEL_DIGEST) is not None


def test_a_chunk_damaged_in_one_checkpoint_is_given_from_another(bob: Checkpoints) -> None:
    save(bob, 6, TENSORS)
    flip(WEIGHTS, -1)(bob.folder / ROUND)
    assert all(bob.lookup(digest) is not None for digest in digests(WEIGHTS))
