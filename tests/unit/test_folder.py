"""A folder is lived in by one process at a time, from its first moment to its last."""

import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dugnad.configs.recipe import load
from dugnad.dht.identity import Identity
from dugnad.dht.invite import Invite, encode_invite
from dugnad.peer import cli, roles
from dugnad.peer.folder import MAX_REMEMBERED, Folder, FolderError
from dugnad.peer.network import Network

HOLD = """
import sys
from pathlib import Path
from dugnad.peer.folder import Folder
with Folder(Path(sys.argv[1])).occupied():
    print("held", flush=True)
    sys.stdin.read()
"""
INVITE = Invite(b"r" * 32, b"o" * 32, (), "quick")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "role")


def test_an_occupied_folder_is_refused_until_it_is_free_again(folder: Folder) -> None:
    with folder.occupied():
        with pytest.raises(FolderError, match="another dugnad is just starting here"), Folder(folder.path).occupied():
            pass
        with (
            folder.inhabited("volunteer", b"run", "quick", "http://here"),
            pytest.raises(FolderError, match=r"a volunteer of run 'quick' lives here \(pid \d+\)\. Stop it first"),
            Folder(folder.path).occupied(),
        ):
            pass
    with folder.occupied():
        pass


def test_a_killed_process_leaves_its_folder_free(folder: Folder) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(FolderError), folder.occupied():
        pass
    holder.kill()
    holder.communicate()
    with folder.occupied():
        pass


def test_what_a_role_keeps_is_its_users_alone(folder: Folder) -> None:
    with folder.occupied(), folder.inhabited("volunteer", b"run", "quick", "http://here"):
        folder.identity()
        folder.organizer()
        folder.remember(["/ip4/127.0.0.1/tcp/1"])
        assert folder.path.stat().st_mode & 0o777 == 0o700
        for name in ("identity.key", "run.key", "peers.json", "role.json"):
            assert (folder.path / name).stat().st_mode & 0o777 == 0o600, name


def test_of_too_many_addresses_those_are_remembered_that_reach_farthest(folder: Folder) -> None:
    folder.create()
    public = [f"/ip4/8.8.{k}.8/tcp/4001" for k in range(MAX_REMEMBERED - 1)]
    relayed = f"/ip4/1.1.1.1/tcp/4001/p2p/{folder.identity().peer_id}/p2p-circuit"
    private = [f"/ip4/10.0.0.{k}/tcp/4001" for k in range(MAX_REMEMBERED)]
    folder.remember([*private, "/ip4/127.0.0.1/tcp/4001", relayed, *public])
    assert folder.remembered() == (*sorted(public), relayed)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_a_folder_that_was_open_to_others_is_its_users_alone_once_a_role_lives_there(folder: Folder) -> None:
    folder.path.mkdir()
    for path in (folder.path, folder.path.parent):
        path.chmod(0o755)
    with folder.occupied():
        assert mode_of(folder.path) == 0o700
        assert mode_of(folder.path.parent) == 0o755


@pytest.mark.parametrize(("mode", "owner"), [(0o1777, os.getuid()), (0o755, os.getuid() + 1)])
def test_a_folder_that_is_everyones_or_another_users_is_left_as_it_is(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int
) -> None:
    folder.path.mkdir()
    folder.path.chmod(mode)
    monkeypatch.setattr(os, "getuid", lambda: owner)
    folder.create()
    assert mode_of(folder.path) == mode


def test_a_key_that_others_could_read_is_told_once_and_closed(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    keys = {folder.identity().peer_id, folder.organizer().peer_id}
    for name in ("identity.key", "run.key"):
        (folder.path / name).chmod(0o644)
    for _ in range(2):
        assert {folder.identity().peer_id, folder.organizer().peer_id} == keys
    assert [mode_of(folder.path / name) for name in ("identity.key", "run.key")] == [0o600, 0o600]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        str(folder.path / name) for name in ("identity.key", "run.key")
    ]


BEGIN: dict[str, Callable[[Folder], Coroutine[Any, Any, object]]] = {
    "launch": lambda folder: roles.launch(load("tiny-books"), folder, Network(), told=print),
    "resume": lambda folder: roles.resume(folder, Network(), invite=None, told=print),
    "join": lambda folder: roles.join(INVITE, folder, Network(), threads=1, checked=print, told=print),
}


@pytest.mark.parametrize("command", BEGIN)
async def test_no_role_begins_in_an_occupied_folder(folder: Folder, command: str) -> None:
    with folder.occupied(), pytest.raises(FolderError, match="is just starting here"):
        await BEGIN[command](folder)


def file_in_the_way(path: Path) -> str:
    path.write_text("")
    return "can't be written in: Not a directory"


def below_a_file(path: Path) -> str:
    path.parent.rmdir()
    path.parent.write_text("")
    return "can't be made: Not a directory"


@pytest.mark.parametrize("spoil", [file_in_the_way, below_a_file])
def test_a_folder_that_can_not_be_used_is_told_before_anything_begins(
    folder: Folder, spoil: Callable[[Path], str]
) -> None:
    folder = Folder(folder.path / "sub")
    folder.path.parent.mkdir()
    why = spoil(folder.path)
    invite = Invite(
        b"r" * 32, b"o" * 32, (f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.from_seed(bytes(32)).peer_id}",), "quick"
    )
    for command in (["launch", "tiny-books"], ["join", encode_invite(invite)]):
        done = CliRunner().invoke(cli.app, [*command, "--dir", str(folder.path)])  # warnings are errors
        assert done.exit_code == 2
        assert done.output == f"dugnad: {folder.path}: {why}. Choose another folder with --dir.\n"


def test_looking_whether_a_folder_can_be_used_leaves_nothing_behind(folder: Folder) -> None:
    folder.check()
    assert not folder.path.exists()
    folder.create()
    folder.check()
    assert list(folder.path.iterdir()) == []


def test_a_folder_that_is_not_there_is_not_resumed_from_and_not_made(folder: Folder) -> None:
    done = CliRunner().invoke(cli.app, ["launch", "--resume", str(folder.path)])
    assert done.exit_code == 2
    assert "there is no such folder" in done.output
    assert not folder.path.exists()
