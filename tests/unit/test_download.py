"""A model's chunks from many donors: each is paid for once, whoever lies, stalls or is killed in the middle."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
from blake3 import blake3

from dugnad.dht.budget import Budget
from dugnad.dht.bulk import BLOB_CHANNEL, Unavailable, serve_blobs
from dugnad.dht.download import Incoming, Progress, download
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Stream
from tests.unit.memory_transport import Fault, MemoryTransport, Net, network

ME, ANN, BOB, EVE = (PeerId(name) for name in ("me", "ann", "bob", "eve"))
SIZE = 1000
PATIENT_S, SHORT_S = 30.0, 0.1


def chunks_of(*contents: int) -> dict[bytes, bytes]:
    """One chunk for each number, by digest."""
    chunks = [bytes([k]) * (SIZE + k) for k in contents]
    return {blake3(chunk).digest(): chunk for chunk in chunks}


MODEL = chunks_of(*range(20))
NEXT = chunks_of(*range(15, 35))
"""The model after a round in which a quarter of it did not change."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "incoming"


async def give(net: Net, peer: PeerId, chunks: Mapping[bytes, bytes]) -> list[bytes]:
    """Have `peer` serve chunks; the list tells which were asked of it."""
    asked: list[bytes] = []

    def lookup(digest: bytes) -> bytes | None:
        asked.append(digest)
        return chunks.get(digest)

    await serve_blobs(net.join(peer), lookup, budget=Budget(1e12))
    return asked


async def take(
    me: MemoryTransport,
    folder: Path,
    model: Mapping[bytes, bytes],
    donors: Sequence[PeerId] = (ANN,),
    *,
    older: Mapping[bytes, bytes] | None = None,
    timeout_s: float = PATIENT_S,
) -> list[Progress]:
    """Download `model`, see that all of it is here, and return what was told on the way."""
    told: list[Progress] = []
    incoming = Incoming(folder, (older or {}).get)
    sizes = {digest: len(chunk) for digest, chunk in model.items()}
    await download(me, donors, sizes, incoming, timeout_s=timeout_s, told=told.append)
    assert {digest: incoming.chunk(digest) for digest in model} == model
    return told


def files(folder: Path) -> dict[bytes, Path]:
    """The chunks on disk; one that is just being written is none yet."""
    return {bytes.fromhex(path.name): path for path in folder.rglob("??/*") if path.is_file()}


async def has_come(folder: Path, model: Mapping[bytes, bytes], count: int) -> None:
    """Have so many chunks of `model`, and no more, lie in the folder, as a killed joiner left them."""
    async with network() as net:
        await give(net, ANN, dict(list(model.items())[:count]))
        with pytest.raises(Unavailable):
            await take(net.join(ME), folder, model)
    assert len(files(folder)) == count


async def test_the_chunks_come_from_all_donors_and_each_once(folder: Path) -> None:
    async with network() as net:
        asked = [await give(net, donor, MODEL) for donor in (ANN, BOB, EVE)]
        told = await take(net.join(ME), folder, MODEL, (ANN, BOB, EVE))
    assert all(asked)
    assert files(folder).keys() == MODEL.keys()
    total = sum(map(len, MODEL.values()))
    assert (told[0], told[-1]) == (Progress(0, 20, 0, total, 0), Progress(20, 20, total, total, 3))
    assert [progress.num_chunks for progress in told] == list(range(21))
    assert [progress.num_bytes for progress in told] == sorted(progress.num_bytes for progress in told)


async def test_large_chunks_are_asked_for_before_small_ones(folder: Path) -> None:
    async with network() as net:
        asked = await give(net, ANN, MODEL)
        await take(net.join(ME), folder, MODEL)
    sizes = [len(MODEL[digest]) for digest in asked]
    assert all(size >= max(sizes[k + 2 :], default=0) for k, size in enumerate(sizes))  # two are asked for at once


async def test_who_was_killed_in_the_middle_does_not_fetch_again_what_came(folder: Path) -> None:
    await has_come(folder, MODEL, 12)
    here = set(files(folder))
    async with network() as net:
        asked = await give(net, ANN, MODEL)
        told = await take(net.join(ME), folder, MODEL)
    assert sorted(asked) == sorted(MODEL.keys() - here)
    assert told[0].num_chunks == 12
    assert told[0].num_bytes == sum(len(MODEL[digest]) for digest in here)


async def test_when_all_has_come_nobody_is_asked_and_nobody_need_be_there(folder: Path) -> None:
    async with network() as net:
        await give(net, ANN, MODEL)
        me = net.join(ME)
        await take(me, folder, MODEL)
        net.leave(ANN)
        (told,) = await take(me, folder, MODEL, donors=())
    assert told.num_chunks == told.of_chunks


async def test_what_the_disk_damaged_is_fetched_again_and_nothing_else(folder: Path) -> None:
    async with network() as net:
        asked = await give(net, ANN, MODEL)
        me = net.join(ME)
        await take(me, folder, MODEL)
        asked.clear()
        first, second, *_ = paths = files(folder)
        paths[first].write_bytes(MODEL[first][:-1])
        paths[second].write_bytes(bytes(len(MODEL[second])))
        (folder / "incoming.tmp").write_bytes(b"half a chunk")
        await take(me, folder, MODEL)
    assert sorted(asked) == sorted([first, second])


async def test_of_the_next_model_only_what_changed_is_fetched_and_what_it_lacks_is_removed(folder: Path) -> None:
    async with network() as net:
        asked = await give(net, ANN, MODEL | NEXT)
        me = net.join(ME)
        await take(me, folder, MODEL)
        asked.clear()
        await take(me, folder, NEXT)
    assert sorted(asked) == sorted(NEXT.keys() - MODEL.keys())
    assert files(folder).keys() == NEXT.keys()


async def test_what_an_older_model_here_holds_is_neither_fetched_nor_stored(folder: Path) -> None:
    async with network() as net:
        asked = await give(net, ANN, NEXT)
        await take(net.join(ME), folder, NEXT, older=MODEL)
    assert sorted(asked) == sorted(files(folder)) == sorted(NEXT.keys() - MODEL.keys())


async def test_an_older_model_that_is_damaged_is_not_believed(folder: Path) -> None:
    damaged, *_ = same = sorted(MODEL.keys() & NEXT.keys())
    older = MODEL | {damaged: bytes(len(MODEL[damaged]))}
    async with network() as net:
        asked = await give(net, ANN, NEXT)
        await take(net.join(ME), folder, NEXT, older=older)
    assert set(asked) & set(same) == {damaged}


async def test_a_donor_that_lies_is_not_believed_and_what_it_gave_comes_from_others(folder: Path) -> None:
    async with network() as net:
        for donor in (ANN, EVE):
            await give(net, donor, MODEL)
        net.faults[EVE, ME] = Fault(corrupt_at=SIZE // 2)
        told = await take(net.join(ME), folder, MODEL, (EVE, ANN))
    assert told[-1].num_donors == 1


async def test_a_donor_that_stalls_is_left_and_what_came_stays_when_nobody_else_is_there(folder: Path) -> None:
    async def stall(sender: PeerId, stream: Stream) -> None:
        await stream.write(b"\1")
        await asyncio.Event().wait()

    some = dict(list(MODEL.items())[:5])
    async with network() as net:
        await give(net, ANN, some)
        await net.join(EVE).serve_stream(BLOB_CHANNEL, stall)
        with pytest.raises(Unavailable, match="15 of 20 blobs can't be had"):
            await take(net.join(ME), folder, MODEL, (EVE, ANN), timeout_s=SHORT_S)
    assert files(folder).keys() == some.keys()


async def test_the_end_does_not_wait_for_a_slow_donor(folder: Path) -> None:
    slow: list[PeerId] = []

    async def never_end(sender: PeerId, stream: Stream) -> None:
        slow.append(sender)
        await stream.write(b"\1")
        await asyncio.Event().wait()  # a byte now and then would do as well

    async with network() as net, asyncio.timeout(PATIENT_S / 2):
        await give(net, ANN, MODEL)
        await net.join(EVE).serve_stream(BLOB_CHANNEL, never_end)
        await take(net.join(ME), folder, MODEL, (EVE, ANN))
    assert slow == [ME, ME]


async def test_no_more_is_in_memory_than_two_chunks_for_each_donor(folder: Path) -> None:
    under_way: set[bytes] = set()
    most = 0

    async def count(net: Net, peer: PeerId, chunks: Iterable[bytes]) -> None:
        async def serve(sender: PeerId, stream: Stream) -> None:
            nonlocal most
            digest = (await stream.read_exactly(6 + 40))[6:38]
            under_way.add(digest)
            most = max(most, len(under_way - set(files(folder))))
            await stream.write(b"\1" + MODEL[digest])

        await net.join(peer).serve_stream(BLOB_CHANNEL, serve)

    async with network() as net:
        for donor in (ANN, BOB):
            await count(net, donor, MODEL)
        await take(net.join(ME), folder, MODEL, (ANN, BOB))
    assert most <= 4


def test_a_model_in_use_leaves_nothing_behind(folder: Path) -> None:
    incoming = Incoming(folder, lambda digest: None)
    for digest, chunk in MODEL.items():
        incoming.keep(digest, chunk)
    incoming.clear()
    assert not folder.exists()
    incoming.clear()


def test_progress_is_told_in_words() -> None:
    assert str(Progress(3, 64, 3_145_728, 67_108_864, 1)) == "3.1 of 67.1 MB, 3 of 64 chunks, from 1 donor"
    assert str(Progress(64, 64, 67_108_864, 67_108_864, 4)).endswith("from 4 donors")
