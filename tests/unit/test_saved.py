"""What `dugnad checkpoints` says of a folder, to people and to programs."""

import json
import os
from pathlib import Path

import pytest

from dugnad.coordinator.checkpoint import MANIFEST
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.tensorfile import WEIGHTS
from dugnad.dht.identity import nickname
from dugnad.peer import saved
from dugnad.peer.folder import FolderError
from tests.unit.keepers import ANN, model, save


@pytest.fixture
def role(tmp_path: Path) -> Path:
    """A role's folder with rounds 2 and 10."""
    kept = Checkpoints(tmp_path / "checkpoints", keep=3, signer=ANN)
    for round_ in (2, 10):
        save(kept, round_, model(round_, wide=True))
    return tmp_path


def test_all_checkpoints_of_a_role_are_listed_newest_first_with_who_wrote_them(role: Path) -> None:
    found = saved.rows(role)
    assert [row["round"] for row in found] == [10, 2]
    assert json.loads(json.dumps(found)) == found
    assert all(row["intact"] and row["written_by"] == ANN.peer_id for row in found)
    head, newest, oldest = saved.text(found).splitlines()
    assert head.split() == ["round", "size", "step", "validation", "written", "by"]
    assert newest.split() == ["10", "3.1", "MB", "600", nickname(ANN.peer_id), "intact"]
    assert oldest.endswith("intact")


def test_a_folder_of_checkpoints_and_a_single_one_can_be_named_too(role: Path) -> None:
    assert saved.rows(role / "checkpoints") == saved.rows(role)
    assert saved.rows(role / "checkpoints" / "round-000002") == saved.rows(role)[1:]
    (role / "checkpoints" / "round-000002").rename(role / "copy")
    (row,) = saved.rows(role / "copy")
    assert row["round"] == 2


def test_damage_is_told_below_its_checkpoint(role: Path) -> None:
    path = role / "checkpoints" / "round-000010"
    raw = bytearray((path / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (path / WEIGHTS).write_bytes(raw)
    row = saved.rows(role)[0]
    assert not row["intact"]
    assert row["damage"] == [
        {"file": WEIGHTS, "fault": "altered", "tensors": ["wide"], "words": "is altered: wide (1 of 2 chunks)"}
    ]
    lines = saved.text(saved.rows(role)).splitlines()
    assert lines[1].endswith("DAMAGED")
    assert lines[2].strip() == f"{WEIGHTS} is altered: wide (1 of 2 chunks)"
    assert lines[-1].startswith("1 of 2 damaged")


@pytest.mark.parametrize("rest", [None, 20], ids=["lost", "cut"])
def test_of_a_checkpoint_without_a_manifest_is_told_what_is_known(role: Path, rest: int | None) -> None:
    manifest = role / "checkpoints" / "round-000010" / MANIFEST
    if rest is None:
        manifest.unlink()
    else:
        os.truncate(manifest, rest)
    for source in (role, manifest.parent):
        row = saved.rows(source)[0]
        assert (row["round"], row["written_by"], row["global_step"], row["intact"]) == (10, None, None, False)
        assert "unknown" in saved.text([row])


def test_where_there_is_none_a_sentence_says_so(tmp_path: Path) -> None:
    for source, words in ((tmp_path, "checkpoint here. Name a role's folder"), (tmp_path / "nowhere", "such folder")):
        with pytest.raises(FolderError, match=f"there is no {words}"):
            saved.rows(source)


def test_a_checkpoint_that_its_role_drops_while_we_look_is_left_out(
    role: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Checkpoints.newest_first
    gone = role / "checkpoints" / "round-000001"
    monkeypatch.setattr(Checkpoints, "newest_first", lambda kept: [*listed(kept), gone])
    assert [row["round"] for row in saved.rows(role)] == [10, 2]
