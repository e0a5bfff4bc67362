"""Blobs on disk: whole under their name or not there, whatever fails on the way."""

import errno
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dugnad.dht.blobs import Blobs

DATA, OTHER = b"some bytes", b"others"
DIGEST, OTHER_DIGEST = (blake3(data).digest() for data in (DATA, OTHER))

INCOMING = "incoming.tmp"
"""The file that is being written."""
TOO_LONG_S = 20.0


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def file_of(blobs: Blobs, digest: bytes) -> Path:
    """Where on disk the blob lies."""
    (path,) = blobs.directory.rglob(digest.hex())
    return path


def files(blobs: Blobs) -> set[str]:
    """The names of all files on disk."""
    return {path.name for path in blobs.directory.rglob("*") if path.is_file()}


# -- what is kept


@pytest.mark.parametrize(
    "data", [b"", DATA, bytearray(DATA), memoryview(DATA), memoryview(bytearray(300_000)), memoryview(DATA)[2:5]]
)
def test_what_is_put_is_kept_under_its_hash(blobs: Blobs, data: bytes | bytearray | memoryview) -> None:
    digest = blobs.put(data)
    assert digest == blake3(data).digest()
    assert blobs.get(digest) == data
    assert blobs.has(digest)
    assert files(blobs) == {digest.hex()}


def test_what_was_kept_is_there_for_the_next_process(blobs: Blobs) -> None:
    digests = {blobs.put(DATA), blobs.put(OTHER)}
    again = Blobs(blobs.directory)
    assert again.digests() == digests == {DIGEST, OTHER_DIGEST}
    assert [again.get(DIGEST), again.get(OTHER_DIGEST)] == [DATA, OTHER]


def test_what_was_never_put_is_missing_and_nothing_is_made_to_look_for_it(blobs: Blobs) -> None:
    assert blobs.get(DIGEST) is None
    assert not blobs.has(DIGEST)
    assert blobs.digests() == set()
    blobs.delete(DIGEST)
    assert not blobs.directory.exists()


def test_what_is_put_again_is_not_written_again(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs.put(DATA)
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("it is on disk already"))
    assert blobs.put(bytearray(DATA)) == DIGEST


def test_what_need_not_be_durable_is_whole_or_not_there_all_the_same_without_waiting_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = Blobs(tmp_path / "incoming", durable=False)
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("nobody asked for that"))
    assert blobs.put(DATA) == DIGEST
    assert blobs.get(DIGEST) == DATA
    assert files(blobs) == {DIGEST.hex()}
    file_of(blobs, DIGEST).write_bytes(DATA[:-1])
    assert blobs.get(DIGEST) is None
    assert files(blobs) == set()


def test_what_is_deleted_is_gone_and_can_come_back(blobs: Blobs) -> None:
    blobs.put(DATA)
    blobs.put(OTHER)
    for _ in range(2):
        blobs.delete(DIGEST)
        assert (blobs.get(DIGEST), blobs.has(DIGEST), blobs.digests()) == (None, False, {OTHER_DIGEST})
    blobs.put(DATA)
    assert blobs.get(DIGEST) == DATA


steps = st.lists(st.tuples(st.sampled_from(["put", "delete", "get", "damage"]), st.binary(max_size=3)), max_size=30)


@given(steps)
@settings(max_examples=50)
def test_any_order_of_puts_deletes_and_damage_leaves_what_it_should(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bytes]]
) -> None:
    blobs = Blobs(tmp_path_factory.mktemp("blobs"))
    kept: dict[bytes, bytes] = {}
    damaged: set[bytes] = set()
    for step, data in steps:
        digest = blake3(data).digest()
        match step:
            case "put":
                assert blobs.put(data) == digest
                kept[digest] = data
                damaged.discard(digest)
            case "delete":
                blobs.delete(digest)
                kept.pop(digest, None)
            case "get":
                assert blobs.get(digest) == (None if digest in damaged else kept.get(digest))
                if digest in damaged:
                    del kept[digest]
            case "damage" if digest in kept:
                file_of(blobs, digest).write_bytes(data + b"longer")
                damaged.add(digest)
        damaged &= kept.keys()
        assert blobs.digests() == kept.keys()


# -- writes that fail


class FailingSync:
    """An `os.fsync` of which one call, counted from 1, fails."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.num_calls = 0
        self._at, self._error = at, error
        self._sync = os.fsync

    def __call__(self, descriptor: int) -> None:
        self.num_calls += 1
        if self.num_calls == self._at:
            raise self._error
        self._sync(descriptor)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [FULL, OSError(errno.EIO, "the disk died"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2])  # the new folder, the file
def test_a_write_that_fails_raises_and_keeps_nothing_and_the_next_is_whole(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", FailingSync(at, error))
        with pytest.raises(type(error)) as caught:
            blobs.put(DATA)
    assert caught.value is error
    assert (blobs.get(DIGEST), blobs.has(DIGEST), blobs.digests(), files(blobs)) == (None, False, set(), set())
    assert blobs.put(DATA) == DIGEST
    assert blobs.get(DIGEST) == DATA
    assert files(blobs) == {DIGEST.hex()}


def test_a_write_that_fails_leaves_the_other_blobs_alone(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs.put(OTHER)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", FailingSync(1, FULL))
        with pytest.raises(OSError, match="No space left"):
            blobs.put(DATA)
    assert blobs.digests() == {OTHER_DIGEST}
    assert blobs.get(OTHER_DIGEST) == OTHER


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk here is always full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_raises_and_keeps_nothing_and_the_next_is_whole(blobs: Blobs, size: int) -> None:
    data = bytes(size)
    blobs.put(OTHER)
    (blobs.directory / INCOMING).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        blobs.put(data)
    assert files(blobs) == {OTHER_DIGEST.hex()}
    assert blobs.get(blobs.put(data)) == data


def test_a_place_that_is_no_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="Not a directory"):
        Blobs(tmp_path / "file").put(DATA)


def test_a_blob_is_synced_before_it_has_its_name_and_its_name_after(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    synced: list[tuple[str, bool]] = []

    def watch(descriptor: int) -> None:
        status = os.fstat(descriptor)
        is_file = stat.S_ISREG(status.st_mode)
        assert not is_file or status.st_size == len(DATA), "all is written before it is synced"
        synced.append(("file" if is_file else "folder", blobs.has(DIGEST)))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    blobs.put(DATA)
    assert synced == [("folder", False), ("file", False), ("folder", True)]
    assert file_of(blobs, DIGEST).parent.parent == blobs.directory


# -- what the disk does to it later


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: bytes(len(data)),
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: OTHER,
    ],
    ids=["emptied", "cut", "longer", "zeroed", "one bit", "another blob"],
)
def test_a_damaged_blob_is_noticed_removed_and_missing(blobs: Blobs, damage: Callable[[bytes], bytes]) -> None:
    blobs.put(DATA)
    blobs.put(OTHER)
    file_of(blobs, DIGEST).write_bytes(damage(DATA))
    assert blobs.get(DIGEST) is None
    assert (blobs.has(DIGEST), blobs.digests(), files(blobs)) == (False, {OTHER_DIGEST}, {OTHER_DIGEST.hex()})
    blobs.put(DATA)
    assert blobs.get(DIGEST) == DATA


def test_every_flipped_bit_is_noticed(blobs: Blobs) -> None:
    for at in range(8 * len(DATA)):
        blobs.put(DATA)
        flipped = bytearray(DATA)
        flipped[at // 8] ^= 1 << at % 8
        file_of(blobs, DIGEST).write_bytes(flipped)
        assert blobs.get(DIGEST) is None


@pytest.mark.parametrize("damaged", [b"", DATA[:-1], DATA + b"\0"])
def test_a_blob_that_was_cut_is_whole_again_when_it_is_put(blobs: Blobs, damaged: bytes) -> None:
    blobs.put(DATA)
    file_of(blobs, DIGEST).write_bytes(damaged)
    blobs.put(DATA)
    assert blobs.get(DIGEST) == DATA


def test_what_others_left_in_the_folder_is_ignored(blobs: Blobs) -> None:
    blobs.put(DATA)
    folder = file_of(blobs, DIGEST).parent
    for name in ("notes.txt", f"{DIGEST.hex()}.tmp", DIGEST.hex()[:-1], DIGEST.hex().upper(), "z" * 64):
        (folder / name).write_bytes(OTHER)
    (blobs.directory / OTHER_DIGEST.hex()).write_bytes(OTHER)
    (blobs.directory / "README").write_bytes(OTHER)
    assert blobs.digests() == {DIGEST}
    assert not blobs.has(OTHER_DIGEST)
    assert blobs.get(OTHER_DIGEST) is None


def test_what_a_crash_left_half_written_is_ignored_and_the_next_blob_takes_its_place(blobs: Blobs) -> None:
    blobs.put(OTHER)
    (blobs.directory / INCOMING).write_bytes(DATA * 1000)
    again = Blobs(blobs.directory)
    assert again.digests() == {OTHER_DIGEST}
    again.put(DATA)
    assert again.get(DIGEST) == DATA
    assert files(again) == {DIGEST.hex(), OTHER_DIGEST.hex()}


# -- threads


def test_threads_that_put_the_same_and_other_blobs_at_once_all_find_them(blobs: Blobs) -> None:
    many = [bytes([k]) * (k * 1000) for k in range(20)]
    begin = threading.Barrier(8, timeout=TOO_LONG_S)

    def work(start: int) -> None:
        begin.wait()
        for data in many[start:] + many[:start]:
            digest = blake3(data).digest()
            assert blobs.get(digest) in (None, data), "a blob is there whole or not at all"
            assert blobs.put(data) == digest
            assert blobs.get(digest) == data

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, [0, 0, 0, 0, 5, 10, 15, 19]))
    assert blobs.digests() == {blake3(data).digest() for data in many}
    assert files(blobs) == {digest.hex() for digest in blobs.digests()}


def test_threads_that_delete_meanwhile_disturb_nobody(blobs: Blobs) -> None:
    begin = threading.Barrier(4, timeout=TOO_LONG_S)

    def put_and_get(_: int) -> None:
        begin.wait()
        for _ in range(50):
            blobs.put(DATA)
            assert blobs.get(DIGEST) in (None, DATA)

    def delete_and_list(_: int) -> None:
        begin.wait()
        for _ in range(200):
            blobs.delete(DIGEST)
            assert blobs.digests() <= {DIGEST}

    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work, k) for work in (put_and_get, delete_and_list) for k in range(2)]
    assert [work.result() for work in working] == [None] * 4
    blobs.put(DATA)
    assert blobs.get(DIGEST) == DATA


# -- damage and failures that only look like a blob


def test_a_blob_whose_name_could_not_be_synced_is_not_there_and_the_next_put_syncs_it_again(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", FailingSync(3, FULL))
        with pytest.raises(OSError, match="No space"):
            blobs.put(DATA)
    assert not blobs.has(DIGEST)
    watched = FailingSync(99, FULL)
    monkeypatch.setattr(os, "fsync", watched)
    assert blobs.put(DATA) == DIGEST
    assert watched.num_calls == 3


def test_putting_a_blob_again_repairs_damage_that_left_its_size(blobs: Blobs) -> None:
    blobs.put(DATA)
    file_of(blobs, DIGEST).write_bytes(bytes(len(DATA)))
    blobs.put(DATA)
    assert blobs.get(DIGEST) == DATA


def test_a_blob_that_is_repaired_while_its_damage_is_read_stays(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs.put(DATA)
    file_of(blobs, DIGEST).write_bytes(b"cut")
    read = Path.read_bytes

    def slowly(path: Path) -> bytes:
        data = read(path)
        monkeypatch.undo()
        blobs.put(DATA)
        return data

    monkeypatch.setattr(Path, "read_bytes", slowly)
    assert blobs.get(DIGEST) == DATA
