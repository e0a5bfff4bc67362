"""What a keeper of checkpoints writes is whole or not there, and whatever happens to it later is found and named."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dugnad.coordinator.checkpoint import MANIFEST, MODEL, Head, inspect, manifest_of
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.damage import CheckpointError, Damage, Fault
from dugnad.coordinator.tensorfile import MOMENTUM, WEIGHTS
from tests.unit.keepers import ANN, BOB, WIDE, content, group, meta_of, model, same, save

FILES = (MANIFEST, MODEL, MOMENTUM, WEIGHTS)


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=3, signer=ANN)


def names(kept: Checkpoints) -> list[str]:
    return sorted(os.listdir(kept.folder))


def damage_of(path: Path) -> Damage:
    found = inspect(path)
    assert isinstance(found, Damage)
    return found


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as someone would who knows how its digest is made, and has not the writer's key."""
    table = json.loads((path / MANIFEST).read_bytes())
    change(table)
    head = msgspec.convert(table, Head)
    digest = blake3(msgspec.json.encode(msgspec.structs.replace(head, digest="", signature=""))).hexdigest()
    head = msgspec.structs.replace(head, digest=digest)
    (path / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(head)))


# -- saving and loading


def test_what_was_saved_is_loaded_with_the_name_of_who_wrote_it(kept: Checkpoints) -> None:
    loaded = kept.load(save(kept, 12))
    assert (loaded.round, loaded.meta, loaded.path.name) == (12, meta_of(model(12)), "round-000012")
    assert loaded.writer == ANN.peer_id
    assert same(loaded.weights, group(model(12), "weights"))
    assert same(loaded.momentum, group(model(12), "momentum"))


def test_loaded_tensors_cannot_be_written_to(kept: Checkpoints) -> None:
    weights = kept.load(save(kept, 1)).weights
    with pytest.raises(ValueError, match="read-only"):
        weights["bias"][0] = 1.0


@pytest.mark.parametrize("wide", [False, True])
def test_any_program_that_reads_safetensors_reads_the_weights(kept: Checkpoints, wide: bool) -> None:
    path = save(kept, 1, model(1, wide=wide))
    assert same(load_file(path / WEIGHTS), group(model(1, wide=wide), "weights"))
    assert same(load_file(path / MOMENTUM), group(model(1, wide=wide), "momentum"))


def test_two_keepers_of_a_model_hold_the_same_bytes_but_for_the_signature(tmp_path: Path) -> None:
    ann, bob = (save(Checkpoints(tmp_path / who.peer_id, 1, who), 1) for who in (ANN, BOB))
    differing = {name for name, data in content(ann).items() if content(bob)[name] != data}
    assert differing == {MANIFEST}


def test_a_tensor_in_another_memory_order_is_saved_as_it_reads(kept: Checkpoints) -> None:
    turned = {"weights/turned": model(1)["weights/embed"].T}
    assert same(kept.load(save(kept, 1, turned)).weights, group(turned, "weights"))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("weights/bias", np.zeros(3, np.float64), r"float32 and has values, but \['weights/bias'\] are not"),
        ("weights/none", np.zeros((0, 4), np.float32), "have none"),
        ("bias", np.zeros(3, np.float32), "'bias' has no place in a checkpoint"),
        ("weights/__metadata__", np.zeros(3, np.float32), "has no place in a checkpoint"),
    ],
)
def test_what_no_checkpoint_can_hold_is_named(name: str, tensor: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        manifest_of({name: tensor})


def test_tensors_that_are_not_the_model_they_are_said_to_be_are_not_saved(kept: Checkpoints) -> None:
    with pytest.raises(ValueError, match="the tensors are model"):
        kept.save(1, model(1), meta=meta_of(model(2)))
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
    save(kept, 1, model(50))
    assert names(kept) == ["round-000001"]
    assert same(kept.load(kept.folder / "round-000001").weights, group(model(50), "weights"))


def test_what_does_not_belong_to_us_is_left_alone(kept: Checkpoints) -> None:
    for name in ("notes.txt", "round-7", "round-000009.bak"):
        kept.folder.mkdir(exist_ok=True)
        (kept.folder / name).mkdir()
    for round_ in range(1, 5):
        save(kept, round_)
    assert {"notes.txt", "round-7", "round-000009.bak"} < set(names(kept))
    assert kept.latest() == kept.folder / "round-000004"


@pytest.mark.parametrize("prefix", [".unfinished-", ".repairing-", ".discarded-", ".replaced-"])
def test_what_a_killed_process_left_is_no_checkpoint_and_is_swept_by_the_next(kept: Checkpoints, prefix: str) -> None:
    save(kept, 1)
    shutil.copytree(kept.folder / "round-000001", kept.folder / f"{prefix}round-000001")
    again = Checkpoints(kept.folder, keep=3, signer=ANN)
    assert again.newest_first() == [kept.folder / "round-000001"]
    again.recover()
    assert names(kept) == ["round-000001"]


def test_a_checkpoint_that_made_room_for_one_that_never_came_is_put_back(kept: Checkpoints) -> None:
    path = save(kept, 1)
    path.rename(kept.folder / f".replaced-{path.name}")
    again = Checkpoints(kept.folder, keep=3, signer=ANN)
    again.recover()
    assert again.load(path).round == 1


def test_who_only_reads_tidies_nothing_up(kept: Checkpoints) -> None:
    save(kept, 1)
    (kept.folder / ".unfinished-round-000002").mkdir()
    reader = Checkpoints(kept.folder, keep=1)
    assert reader.load(kept.folder / "round-000001").writer == ANN.peer_id
    assert ".unfinished-round-000002" in names(kept)


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
    assert seen == [1, 1, 1, 1, 1, 2], "four files and their folder; then the folder of checkpoints"


def out_of_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("round_", [3, 2], ids=["new round", "round saved again"])
@pytest.mark.parametrize("syncs_before", range(6))
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
        save(kept, round_, model(77))
    assert content(kept.folder) == before
    assert names(kept) == ["round-000001", "round-000002"]


def test_a_disk_full_while_tensors_are_written_leaves_everything_as_it_was(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(kept, 1)
    before = content(kept.folder)
    monkeypatch.setattr(os, "pwrite", out_of_space)
    with pytest.raises(CheckpointError, match="free space there or check its permissions, then resume"):
        save(kept, 2)
    assert content(kept.folder) == before
    monkeypatch.undo()
    assert kept.load(save(kept, 2)).round == 2


def test_a_write_that_the_disk_takes_in_pieces_is_whole(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda number, data, offset: pwrite(number, data[:7], offset))
    assert kept.load(save(kept, 2)).round == 2


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(Checkpoints(tmp_path / "file" / "checkpoints", keep=1, signer=ANN), 1)
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
def test_a_flipped_bit_anywhere_is_found_and_only_its_file_is_named(kept: Checkpoints, name: str) -> None:
    path = save(kept, 1)
    whole = (path / name).read_bytes()
    for at in range(len(whole)):
        raw = bytearray(whole)
        raw[at] ^= 1 << at % 8
        (path / name).write_bytes(raw)
        assert [one.file for one in damage_of(path).broken] == [name]
    with pytest.raises(CheckpointError, match=rf"round-000001/{name} (is|has)") as caught:
        kept.load(path)
    assert caught.value.damage == damage_of(path)
    (path / name).write_bytes(whole)
    assert kept.load(path).round == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rest", [0, 1, 100, -1], ids=["emptied", "one byte left", "cut", "one byte lost"])
def test_a_cut_file_is_found_and_named(kept: Checkpoints, name: str, rest: int) -> None:
    path = save(kept, 1)
    os.truncate(path / name, rest % (path / name).stat().st_size)
    assert [(one.file, one.fault) for one in damage_of(path).broken] == [(name, Fault.TRUNCATED)]
    with pytest.raises(CheckpointError, match=rf"round-000001/{name} is truncated"):
        kept.load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_has_grown_is_found_and_named(kept: Checkpoints, name: str) -> None:
    path = save(kept, 1)
    with (path / name).open("ab") as file:
        file.write(b" ")
    assert [(one.file, one.fault) for one in damage_of(path).broken] == [(name, Fault.ALTERED)]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(kept: Checkpoints, name: str) -> None:
    path = save(kept, 1)
    (path / name).unlink()
    assert [(one.file, one.fault) for one in damage_of(path).broken] == [(name, Fault.MISSING)]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        kept.load(path)


def test_all_that_is_wrong_is_told_at_once(kept: Checkpoints) -> None:
    path = save(kept, 1, model(1, wide=True))
    (path / MANIFEST).unlink()
    (path / MOMENTUM).unlink()
    raw = bytearray((path / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    raw[-4 * WIDE - 1] ^= 1
    (path / WEIGHTS).write_bytes(raw)
    found = damage_of(path)
    assert [one.file for one in found.broken] == [MANIFEST, MOMENTUM, WEIGHTS]
    assert found.broken[2].tensors == ("scale", "wide")
    assert str(found).endswith(f"{path / WEIGHTS} is altered: scale, wide (1 of 2 chunks)")


def test_a_lost_header_is_told_apart_from_the_tensors_behind_it(kept: Checkpoints) -> None:
    path = save(kept, 1)
    raw = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(bytes(16) + raw[16:])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is altered: its header. Move"):
        kept.load(path)
    assert damage_of(path).broken[0].chunks == ()


def test_a_folder_that_is_not_there_is_a_checkpoint_of_which_everything_is_missing(tmp_path: Path) -> None:
    found = damage_of(tmp_path / "round-000007")
    assert {one.file: one.fault for one in found.broken} == dict.fromkeys(FILES, Fault.MISSING)


def test_what_the_disk_does_not_give_is_told_from_what_was_altered(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(kept, 1, model(1, wide=True))
    pread = os.pread

    def bad_sector(descriptor: int, size: int, offset: int) -> bytes:
        if offset > 2**20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", bad_sector)
    found = damage_of(path)
    assert {one.fault for one in found.broken} == {Fault.UNREADABLE}
    assert f"{WEIGHTS} can't be read: Input/output error: wide (1 of 2 chunks)" in str(found)


def test_a_name_that_steers_terminals_is_not_said_as_it_is(kept: Checkpoints) -> None:
    path = save(kept, 1, {"weights/\x1b[2J": np.zeros(3, np.float32)})
    os.truncate(path / WEIGHTS, 0)
    assert str(damage_of(path)).isprintable()


def test_files_of_two_checkpoints_do_not_mix(kept: Checkpoints) -> None:
    one, other = save(kept, 1), save(kept, 2)
    shutil.copy(one / MOMENTUM, other / MOMENTUM)
    with pytest.raises(CheckpointError, match=f"{MOMENTUM} is altered: bias, embed, scale"):
        kept.load(other)


def test_a_checkpoint_under_the_name_of_another_round_is_refused(kept: Checkpoints) -> None:
    save(kept, 1).rename(kept.folder / "round-000002")
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is altered: it is of round 1"):
        kept.load(kept.folder / "round-000002")


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_is_refused_by_its_number(kept: Checkpoints, version: int) -> None:
    path = save(kept, 1)
    (path / MANIFEST).write_bytes(json.dumps({"version": version, "anything": []}).encode())
    with pytest.raises(CheckpointError, match=f"has format {version}, this version of dugnad reads 2"):
        kept.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.update(writer=BOB.peer_id),
        lambda table: table.update(round=1, signature=ANN.sign(b"something else").hex()),
        lambda table: table.update(signature=table["signature"].upper()),
        lambda table: table.update(signature="", writer="nobody"),
        lambda table: table["meta"].update(global_step=601),
        lambda table: table["meta"].update(model_digest="ef" * 32),
    ],
    ids=["another writer", "another's words", "spelled otherwise", "unsigned", "another step", "another model"],
)
def test_what_the_named_writer_did_not_sign_is_not_believed(
    kept: Checkpoints, change: Callable[[dict[str, Any]], object]
) -> None:
    path = save(kept, 1)
    forge(path, change)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is altered: it is not signed by"):
        kept.load(path)


def test_the_same_said_in_other_bytes_is_not_the_same(kept: Checkpoints) -> None:
    path = save(kept, 1)
    table = json.loads((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_bytes(json.dumps(table).encode())
    with pytest.raises(CheckpointError, match="does not match its own digest"):
        kept.load(path)


@given(st.sampled_from(FILES), st.binary(max_size=300))
def test_any_bytes_in_place_of_a_file_are_damage_and_nothing_worse(
    tmp_path_factory: pytest.TempPathFactory, name: str, raw: bytes
) -> None:
    path = save(Checkpoints(tmp_path_factory.mktemp("kept"), keep=1, signer=ANN), 1)
    (path / name).write_bytes(raw)
    assert [one.file for one in damage_of(path).broken] == [name]


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
