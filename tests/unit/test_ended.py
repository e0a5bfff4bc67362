"""Whoever asks in a folder where nobody lives any more hears how the last role there ended."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dugnad.dht.hello import TurnedAway
from dugnad.peer import cli, ended
from dugnad.peer import folder as folders
from dugnad.peer.folder import Folder, FolderError

BANNED = "E403 the organizer has banned your key (poison)."
ENDS: list[tuple[BaseException | str, str]] = [
    (TurnedAway("E403", BANNED.removeprefix("E403 ")), BANNED),
    (ExceptionGroup("", [TurnedAway("E401", "you are not on the allow-list.")]), "E401 you are not on the allow-list."),
    (KeyboardInterrupt(), "left at once, by Ctrl+C"),
    (AssertionError("x"), "a fault of dugnad's own (AssertionError('x')), see log.txt"),
    ("the run is finished", "the run is finished"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    where = Folder(tmp_path / "role")
    where.create()
    return where


def live(folder: Folder, end: BaseException | str) -> None:
    with ended.kept(folder, "volunteer", "quick") as words:
        if isinstance(end, BaseException):
            raise end
        words.said = end


def asked(command: str, folder: Folder) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [command, "--dir", str(folder.path)])
    return done.exit_code, done.output


@pytest.mark.parametrize(("end", "said"), ENDS, ids=[said for _, said in ENDS])
def test_why_says_how_the_last_role_ended_whatever_ended_it(
    folder: Folder, end: BaseException | str, said: str
) -> None:
    if isinstance(end, BaseException):
        with pytest.raises(type(end)):
            live(folder, end)
    else:
        live(folder, end)
    status, words = asked("why", folder)
    assert status == 0
    assert words.startswith("The volunteer of run 'quick' here ended at 20")
    assert words.endswith(f": {said}\n")
    status, words = asked("status", folder)
    assert status == 1
    assert words.startswith("dugnad: no role is running here. The volunteer")
    assert (folder.path / folders.ENDED).stat().st_mode & 0o777 == 0o600


def test_whoever_finds_the_folder_in_use_leaves_no_word_in_it(folder: Folder) -> None:
    live(folder, "the run is finished")
    with pytest.raises(FolderError):
        live(folder, FolderError("another lives here"))
    assert "the run is finished" in ended.told(folder)


def test_an_end_is_not_told_of_who_lives_there_and_one_without_a_word_is_told_as_that(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(folder, "the run is finished")
    with folder.inhabited("volunteer", b"run", "quick", "http://here"):
        assert ended.told(folder) == ""
        monkeypatch.setattr(folders.Role, "alive", False)
        assert f"of run 'quick' here (pid {os.getpid()}) ended without a word" in ended.told(folder)


def test_where_nobody_ever_lived_nothing_is_told(folder: Folder) -> None:
    assert ended.told(folder) == ""
    (folder.path / folders.ENDED).write_bytes(b"nonsense")
    assert ended.told(folder) == ""
    assert "no role is running here" in asked("why", folder)[1]


def test_without_a_folder_the_only_one_in_the_data_directory_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ended, "data_folder", lambda: tmp_path)
    assert ended.told_of_only_one() == ""
    for name in ("one", "two"):
        where = Folder(tmp_path / name)
        where.create()
        assert ended.told_of_only_one().startswith(f"{tmp_path / 'one'}: The volunteer" if name == "two" else "")
        live(where, "the run is finished")
    assert ended.told_of_only_one() == ""
