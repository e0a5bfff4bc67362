import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dugnad.coordinator import checkpoints
from dugnad.coordinator.checkpoints import (
    MANIFEST,
    MOMENTUM,
    WEIGHTS,
    CheckpointError,
    CheckpointMeta,
    Checkpoints,
    Tensors,
)

META = CheckpointMeta(
    run="ab" * 32, recipe="cd" * 32, recipe_json="{}", model_digest="ef" * 32, global_step=600, val_loss=None
)
FILES = (MANIFEST, MOMENTUM, WEIGHTS)


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=3)


def tensors(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed": (5, 3), "bias": (7,), "scale": (), "none": (0, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def save(kept: Checkpoints, round_: int) -> Path:
    return kept.save(round_, tensors(round_), tensors(-round_ % 1000), meta=META)


def content(folder: Path) -> dict[str, bytes]:
    """Every file under the folder, by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(kept: Checkpoints) -> list[str]:
    return sorted(os.listdir(kept.folder))


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as someone would who knows how its digest is made."""
    table = json.loads((path / MANIFEST).read_bytes())
    change(table)
    table["digest"] = ""
    compact = msgspec.json.encode(msgspec.convert(table, checkpoints._Manifest))
    table["digest"] = blake3(compact).hexdigest()
    (path / MANIFEST).write_bytes(json.dumps(table).encode())


def plant(path: Path, raw: bytes) -> None:
    """Replace the weights by a file that the manifest fits."""
    (path / WEIGHTS).write_bytes(raw)
    rewrite_manifest(
        path, lambda t: t["files"].update({WEIGHTS: {"size_bytes": len(raw), "blake3": blake3(raw).hexdigest()}})
    )


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# -- saving and loading


def test_what_was_saved_is_loaded(kept: Checkpoints) -> None:
    loaded = kept.load(save(kept, 12))
    assert (loaded.round, loaded.meta, loaded.path.name) == (12, META, "round-000012")
    assert same(loaded.weights, tensors(12))
    assert same(loaded.momentum, tensors(988))


def test_loaded_tensors_cannot_be_written_to(kept: Checkpoints) -> None:
    weights = kept.load(save(kept, 1)).weights
    with pytest.raises(ValueError, match="read-only"):
        weights["bias"][0] = 1.0


def test_any_program_that_reads_safetensors_reads_the_weights(kept: Checkpoints) -> None:
    assert same(load_file(save(kept, 1) / WEIGHTS), tensors(1))


def test_a_tensor_in_another_memory_order_is_saved_as_it_reads(kept: Checkpoints) -> None:
    turned = {"turned": tensors(1)["embed"].T}
    assert same(kept.load(kept.save(1, turned, turned, meta=META)).weights, turned)


def test_only_float32_is_saved(kept: Checkpoints) -> None:
    wrong: Any = {"bias": np.zeros(3, np.float64)}
    with pytest.raises(ValueError, match=r"float32, but \['bias'\] are not"):
        kept.save(1, wrong, tensors(1), meta=META)
    assert kept.latest() is None


def test_at_least_one_checkpoint_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


# -- which are kept


def test_without_a_folder_there_is_no_latest(kept: Checkpoints) -> None:
    assert kept.latest() is None


def test_the_latest_is_the_highest_round_not_the_last_in_the_alphabet(kept: Checkpoints) -> None:
    for round_ in (999_999, 1_000_000):
        newest = save(kept, round_)
    assert kept.latest() == newest


def test_only_the_newest_stay(kept: Checkpoints) -> None:
    for round_ in range(1, 6):
        save(kept, round_)
    assert names(kept) == ["round-000003", "round-000004", "round-000005"]


def test_a_checkpoint_just_saved_stays_even_when_its_round_is_not_the_highest(kept: Checkpoints) -> None:
    for round_ in (10, 11, 12, 4):
        newest = save(kept, round_)
    assert kept.load(newest).round == 4


def test_a_round_saved_again_replaces_what_was_there(kept: Checkpoints) -> None:
    save(kept, 1)
    kept.save(1, tensors(50), tensors(51), meta=META)
    assert names(kept) == ["round-000001"]
    assert same(kept.load(kept.folder / "round-000001").weights, tensors(50))


def test_what_does_not_belong_to_us_is_left_alone(kept: Checkpoints) -> None:
    for name in ("notes.txt", "round-7", "round-000009.bak"):
        kept.folder.mkdir(exist_ok=True)
        (kept.folder / name).mkdir()
    for round_ in range(1, 5):
        save(kept, round_)
    assert {"notes.txt", "round-7", "round-000009.bak"} < set(names(kept))
    assert kept.latest() == kept.folder / "round-000004"


def test_what_a_killed_process_left_is_no_checkpoint_and_is_swept(kept: Checkpoints) -> None:
    save(kept, 1)
    shutil.copytree(kept.folder / "round-000001", kept.folder / ".unfinished-round-000002")
    shutil.copytree(kept.folder / "round-000001", kept.folder / ".discarded-round-000000")
    assert kept.latest() == kept.folder / "round-000001"
    save(kept, 2)
    assert names(kept) == ["round-000001", "round-000002"]


# -- disks that fail


def test_at_no_moment_is_a_part_of_a_checkpoint_seen(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    save(kept, 1)
    fsync, seen = os.fsync, []

    def look(descriptor: int) -> None:
        latest = kept.latest()
        assert latest is not None
        seen.append(kept.load(latest).round)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    save(kept, 2)
    assert seen == [1, 1, 1, 1, 2], "two files, the manifest and their folder; then the folder of checkpoints"


def out_of_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def out_of_space_in_rust(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })")


@pytest.mark.parametrize("round_", [3, 2], ids=["new round", "round saved again"])
@pytest.mark.parametrize("syncs_before", range(5))
def test_a_disk_full_at_any_sync_leaves_everything_as_it_was(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch, syncs_before: int, round_: int
) -> None:
    for earlier in (1, 2):
        save(kept, earlier)
    before, left, fsync = content(kept.folder), [None] * syncs_before, os.fsync

    def fills_up(descriptor: int) -> None:
        if not left:
            out_of_space()
        left.pop()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fills_up)
    with pytest.raises(CheckpointError, match=rf"round {round_} could not be written .*No space left on device"):
        kept.save(round_, tensors(77), tensors(78), meta=META)
    assert content(kept.folder) == before
    assert names(kept) == ["round-000001", "round-000002"]


@pytest.mark.parametrize("fails", [out_of_space, out_of_space_in_rust])
def test_a_disk_full_while_tensors_are_written_leaves_everything_as_it_was(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]
) -> None:
    def half(tensors: Tensors, path: Path) -> None:
        path.write_bytes(b"half of it")
        fails()

    save(kept, 1)
    before = content(kept.folder)
    monkeypatch.setattr(checkpoints, "save_file", half)
    with pytest.raises(CheckpointError, match="free space there or check its permissions, then resume"):
        save(kept, 2)
    assert content(kept.folder) == before
    monkeypatch.setattr(checkpoints, "save_file", save_file)
    assert kept.load(save(kept, 2)).round == 2


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(Checkpoints(tmp_path / "file" / "checkpoints", keep=1), 1)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        Checkpoints(tmp_path / "file", keep=1).latest()


def test_a_checkpoint_is_saved_even_if_old_ones_cannot_be_removed(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for round_ in (1, 2, 3):
        save(kept, round_)
    rename = Path.rename

    def sticky(path: Path, target: Path) -> Path:
        if path.name == "round-000001":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", sticky)
    with pytest.raises(CheckpointError, match=r"round-000004 is saved, but older checkpoints cannot be removed"):
        save(kept, 4)
    assert kept.load(kept.folder / "round-000004").round == 4


# -- damage


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found_and_the_file_named(kept: Checkpoints, name: str) -> None:
    path = save(kept, 1)
    whole = (path / name).read_bytes()
    for at in range(0, len(whole), 11):
        raw = bytearray(whole)
        raw[at] ^= 0x01
        (path / name).write_bytes(raw)
        with pytest.raises(CheckpointError, match=rf"round-000001/({name}|{WEIGHTS}|{MOMENTUM})"):
            kept.load(path)
    (path / name).write_bytes(whole)
    assert kept.load(path).round == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rest", [0, 1, 100], ids=["emptied", "one byte left", "cut"])
def test_a_cut_file_is_found_and_named(kept: Checkpoints, name: str, rest: int) -> None:
    path = save(kept, 1)
    os.truncate(path / name, rest)
    with pytest.raises(CheckpointError, match=rf"round-000001/{name} is (corrupt|truncated)"):
        kept.load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(kept: Checkpoints, name: str) -> None:
    path = save(kept, 1)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: No such file"):
        kept.load(path)


def test_files_of_two_checkpoints_do_not_mix(kept: Checkpoints) -> None:
    one, other = save(kept, 1), save(kept, 2)
    shutil.copy(one / MOMENTUM, other / MOMENTUM)
    with pytest.raises(CheckpointError, match=f"{MOMENTUM} is corrupt: its bytes do not match"):
        kept.load(other)


def test_a_newer_format_is_refused_by_its_number(kept: Checkpoints) -> None:
    path = save(kept, 1)
    rewrite_manifest(path, lambda table: table.update(version=2))
    with pytest.raises(CheckpointError, match="has format 2, this version of dugnad reads 1"):
        kept.load(path)


def test_a_file_that_the_manifest_does_not_list_is_refused(kept: Checkpoints) -> None:
    path = save(kept, 1)
    rewrite_manifest(path, lambda table: table["files"].pop(MOMENTUM))
    with pytest.raises(CheckpointError, match=f"{MOMENTUM} is not listed"):
        kept.load(path)


def a_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def of_one(**entry: object) -> bytes:
    return json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x04",
        b"PK\x03\x04" + bytes(100),
        struct.pack("<Q", 2**63) + b"{}",
        a_file(b"[]"),
        a_file(b'{"\xff": 1}'),
        a_file(of_one(dtype="F16"), bytes(8)),
        a_file(of_one(data_offsets=[0, 16]), bytes(8)),
        a_file(of_one(data_offsets=[-16, -8]), bytes(24)),
        a_file(of_one(data_offsets=[8, 0]), bytes(8)),
        a_file(of_one(shape=[3]), bytes(8)),
        a_file(of_one(shape=[-1, -2]), bytes(8)),
        a_file(of_one(shape=[0, 2**70], data_offsets=[0, 0])),
        a_file(of_one(shape=[1] * 70, data_offsets=[0, 4]), bytes(8)),
        a_file(b'{"t":' + b"[" * 100_000),
    ],
    ids=[
        "empty", "short", "zip", "long header", "list", "no utf-8", "float16", "beyond the end", "before the start",
        "backwards", "another shape", "negative shape", "huge shape", "too many axes", "deep",
    ],
)  # fmt: skip
def test_weights_that_fit_the_manifest_and_are_not_ours_are_refused_by_name(kept: Checkpoints, raw: bytes) -> None:
    path = save(kept, 1)
    plant(path, raw)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not a safetensors file of ours"):
        kept.load(path)


def test_planted_weights_that_are_well_made_are_read(kept: Checkpoints) -> None:
    path = save(kept, 1)
    plant(path, a_file(of_one(), np.array([1, 2], "<f4").tobytes()))
    assert kept.load(path).weights["t"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("damaged", "loaded", "intact"), [((2, 3), 3, 1), ((3,), 3, 2), ((2,), 2, 1)], ids=["two", "newest", "older"]
)
def test_the_newest_intact_checkpoint_before_a_damaged_one_is_named(
    kept: Checkpoints, damaged: tuple[int, ...], loaded: int, intact: int
) -> None:
    paths = {round_: save(kept, round_) for round_ in (1, 2, 3)}
    for round_ in damaged:
        (paths[round_] / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"goes on from round-00000{intact}, which is intact"):
        kept.load(paths[loaded])


def test_without_an_intact_checkpoint_the_run_is_said_to_start_from_the_first_model(kept: Checkpoints) -> None:
    path = save(kept, 1)
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"goes on from the first model, .* if its chain ends at round 32 or"):
        kept.load(path)


@pytest.mark.parametrize(
    ("older", "damaged", "words"),
    [
        (7, 39, "Move .* goes on from round-000007, which is intact, .* ends at round 39 or before"),
        (7, 40, "Put back a copy of .*round-000040: before it there is only round-000007, .* no more than 32 rounds"),
        (None, 32, "Move .* goes on from the first model"),
        (None, 33, "Put back a copy of .* there is only the first model"),
    ],
)
def test_no_checkpoint_is_promised_to_do_that_lies_too_many_rounds_back(
    kept: Checkpoints, older: int | None, damaged: int, words: str
) -> None:
    if older is not None:
        save(kept, older)
    path = save(kept, damaged)
    (path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=words):
        kept.load(path)
