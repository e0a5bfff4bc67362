"""A role's key: made, shown, carried elsewhere, and never lost."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dugnad.dht import identity
from dugnad.dht.identity import IdentityError, write_private
from dugnad.peer import cli, keys
from dugnad.peer.folder import Folder, FolderError


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "role")


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def kept(folder: Folder) -> list[Path]:
    return sorted(folder.path.glob("identity.key.*"))


def test_a_new_key_is_made_where_there_was_none_and_shown_as_what_an_organizer_needs(folder: Folder) -> None:
    said = keys.renew(folder, force=False)
    peer = folder.identity().peer_id
    assert said.splitlines()[0] == keys.shown(folder).splitlines()[0] == peer
    assert mode_of(folder.key) == 0o600
    assert kept(folder) == []


def test_a_key_is_replaced_only_by_force_and_stays_beside_the_new_one(folder: Folder, tmp_path: Path) -> None:
    keys.renew(folder, force=False)
    old = folder.key.read_bytes()
    with pytest.raises(FolderError, match="--force"):
        keys.renew(folder, force=False)
    assert folder.key.read_bytes() == old
    said = keys.renew(folder, force=True)
    (beside,) = kept(folder)
    assert str(beside) in said
    assert beside.read_bytes() == old != folder.key.read_bytes()
    assert mode_of(beside) == mode_of(folder.key) == 0o600


def test_a_key_goes_to_another_machine_and_is_the_same_peer_there(folder: Folder, tmp_path: Path) -> None:
    keys.renew(folder, force=False)
    file, other = tmp_path / "backup", Folder(tmp_path / "other")
    assert "one machine at a time" in keys.export(folder, file)
    assert mode_of(file) == 0o600
    keys.bring(other, file, force=False)
    assert other.identity().peer_id == folder.identity().peer_id
    assert mode_of(other.key) == 0o600
    with pytest.raises(FolderError, match="there already"):
        keys.export(folder, file)


def test_what_is_no_key_replaces_none(folder: Folder, tmp_path: Path) -> None:
    keys.renew(folder, force=False)
    old = folder.key.read_bytes()
    (tmp_path / "nonsense").write_text("nonsense")
    for name in ("nonsense", "missing"):
        with pytest.raises(IdentityError):
            keys.bring(folder, tmp_path / name, force=True)
    assert folder.key.read_bytes() == old
    assert kept(folder) == []
    assert not (tmp_path / "missing").exists()


def test_a_key_brought_to_where_it_is_stays(folder: Folder) -> None:
    keys.renew(folder, force=False)
    old = folder.key.read_bytes()
    assert keys.bring(folder, folder.key, force=True).startswith(folder.identity().peer_id)
    assert [path.read_bytes() for path in (folder.key, *kept(folder))] == [old, old]


def test_however_soon_a_key_follows_another_none_is_lost(folder: Folder) -> None:
    seen = []
    for _ in range(4):
        keys.renew(folder, force=True)
        seen.append(folder.key.read_bytes())
    assert sorted(path.read_bytes() for path in kept(folder)) == sorted(seen[:3])


@pytest.mark.parametrize("num_writes", [0, 1])
def test_on_a_full_disk_the_key_stays_what_it_was(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, num_writes: int
) -> None:
    keys.renew(folder, force=False)
    old, left = folder.key.read_bytes(), num_writes

    def write(path: Path, data: bytes) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        left -= 1
        write_private(path, data)

    monkeypatch.setattr(keys, "write_private", write)
    monkeypatch.setattr(identity, "write_private", write)
    with pytest.raises(OSError, match="No space left"):
        keys.renew(folder, force=True)
    assert folder.key.read_bytes() == old


def test_a_key_goes_to_no_folder_that_is_not_there(folder: Folder, tmp_path: Path) -> None:
    keys.renew(folder, force=False)
    with pytest.raises(FolderError, match=r"can't be written: No such file or directory\. Name a file"):
        keys.export(folder, tmp_path / "nowhere" / "key")


def test_what_no_export_wrote_is_not_told_to_be_moved_away(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "nonsense").write_text("nonsense")
    run = CliRunner().invoke
    done = run(cli.app, ["identity", "import", str(tmp_path / "nonsense"), "--dir", str(folder.path)])
    assert done.exit_code == 1
    assert done.output == (
        f"dugnad: {tmp_path / 'nonsense'}: this is not an identity (expected 64 hex digits). Name a file that dugnad "
        "identity export wrote.\n"
    )
    done = run(cli.app, ["identity", "import", str(tmp_path / "missing"), "--dir", str(folder.path)])
    assert "there is no such file" in done.output


def renewed(folder: Folder, file: Path) -> str:
    return keys.renew(folder, force=True)


def brought(folder: Folder, file: Path) -> str:
    return keys.bring(folder, file, force=True)


@pytest.mark.parametrize("change", [renewed, brought])
def test_nothing_changes_while_a_role_lives_there(
    folder: Folder, tmp_path: Path, change: Callable[[Folder, Path], str]
) -> None:
    keys.renew(folder, force=False)
    keys.export(folder, tmp_path / "backup")
    old = folder.key.read_bytes()
    with folder.occupied(), pytest.raises(FolderError):
        change(folder, tmp_path / "backup")
    assert folder.key.read_bytes() == old


def test_without_a_folder_the_only_one_in_the_data_directory_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "data_folder", lambda: tmp_path)
    with pytest.raises(FolderError, match="no role has a key here"):
        keys.folder_of(None)
    keys.renew(Folder(tmp_path / "one"), force=False)
    assert keys.folder_of(None).path == tmp_path / "one"
    assert keys.folder_of(tmp_path / "elsewhere").path == tmp_path / "elsewhere"
    keys.renew(Folder(tmp_path / "two"), force=False)
    with pytest.raises(FolderError, match="2 roles have a key here"):
        keys.folder_of(None)


def test_where_there_is_no_key_none_is_made_by_looking(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"no identity\.key here"):
        keys.shown(folder)
    with pytest.raises(FolderError, match=r"no identity\.key here"):
        keys.export(folder, tmp_path / "out")
    assert not folder.key.exists()
