"""Who only looks at a chain changes nothing, needs no place to write, and sees what its role has not yet tidied up."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dugnad.coordinator.chain import Chain, ChainError
from dugnad.peer import ask, cli, report
from dugnad.peer.folder import Folder
from tests.unit.chains import GENESIS, honest_chain

COMMITS = honest_chain()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """The chain of a role that runs: its commits stand in the journal."""
    path = tmp_path / "role" / "chain.sqlite"
    path.parent.mkdir()
    with closing(Chain(path)) as chain:
        chain.found(GENESIS)
        for commit in COMMITS:
            chain.append(commit, at_s=0.0)
        assert path.with_name("chain.sqlite-wal").stat().st_size > 0
        yield path


def read(path: Path) -> list[object]:
    with closing(Chain(path, read_only=True)) as chain:
        return list(chain.commits())


def unwritable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the right to write beside `path`, and from root, who needs none, the look of having it."""
    for file in path.parent.iterdir():
        file.chmod(0o444)
    path.parent.chmod(0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: False)


def test_a_reader_sees_what_a_live_role_has_just_written(live: Path) -> None:
    assert read(live) == COMMITS
    with closing(Chain(live, read_only=True)) as reader, pytest.raises(ChainError, match="readonly"):
        reader.append(COMMITS[0], at_s=0.0)


def test_a_reader_of_a_copy_sees_its_journal(live: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(live.parent, copy)
    assert read(copy / "chain.sqlite") == COMMITS


def test_a_closed_chain_is_read_where_nothing_can_be_written(
    live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Chain(live)):
        pass
    copy = tmp_path / "copy" / "chain.sqlite"
    copy.parent.mkdir()
    with closing(Chain(live)) as chain:
        chain._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(live, copy)
    unwritable(copy, monkeypatch)
    before = sorted(os.listdir(copy.parent))
    assert read(copy) == COMMITS
    assert sorted(os.listdir(copy.parent)) == before == ["chain.sqlite"]


def test_a_file_that_its_role_has_only_just_made_is_an_empty_chain(tmp_path: Path) -> None:
    path = tmp_path / "chain.sqlite"
    path.touch()
    assert read(path) == []
    assert path.stat().st_size == 0
    with pytest.raises(ask.AskError, match="has not begun"):
        ask.audit(tmp_path)


def test_what_is_no_chain_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "chain.sqlite"
    path.write_bytes(b"no database" * 1000)
    for wrong in (path, tmp_path / "nothing.sqlite"):
        with pytest.raises(ChainError, match="can't be read here"):
            read(wrong)


class Server(threading.Thread):
    """Answers one who asks with some bytes, and hangs up."""

    def __init__(self, answer: bytes) -> None:
        super().__init__()
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        with self._socket, self._socket.accept()[0] as asking:
            asking.recv(65536)
            asking.sendall(self._answer)


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"


@pytest.mark.parametrize(
    "answered", [b"", HALF, b"HTTP/1.1 500 Oh\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nhello", b"\xff\n"]
)
@pytest.mark.parametrize("command", [["status"], ["why"], ["peers"], ["invite"], ["ban", "grey-finch"]])
def test_a_role_that_ends_while_it_is_asked_is_told_in_a_sentence(
    tmp_path: Path, command: list[str], answered: bytes
) -> None:
    folder, server = Folder(tmp_path / "role"), Server(answered)
    folder.create()
    folder.organizer()
    with folder.inhabited("coordinator", b"run", "quick", server.url):
        said = CliRunner().invoke(cli.app, [*command, "--dir", str(folder.path)])
    server.join()
    assert (said.exit_code, said.stderr.count("\n")) == (1, 1), said.output
    assert f"dugnad: {folder.path}: the coordinator there (pid {os.getpid()}) gives no answer: " in said.stderr


def test_the_status_says_the_validation_loss_in_the_unit_of_the_demo() -> None:
    said = {
        "role": "volunteer", "peer": "12D3",
        "run": "ab" * 32, "name": "quick", "nickname": "calm-otter", "pid": 1, "round": 3,
        "global_step": 30, "total_steps": 60, "state": "idle", "reason": "waiting", "val_loss": 2.5, "val_round": 3,
        "model_digest": None, "model_round": 3, "coordinator": {"alive": True, "gone_s": 0.0}, "leader": "b",
        "leads": False, "view": 0, "bytes_sent": {}, "bytes_received": {}, "peers": [],
    }  # fmt: skip
    assert "2.5000 nats per byte after round 3" in report.text(said)
    assert "validation   not yet" in report.text(said | {"val_loss": None})
