"""The chain on disk: every commit, and the model digests that peers signed, in one SQLite file."""

import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from dugnad.coordinator.messages import Applied, Commit
from dugnad.dht.identity import PeerId

_SCHEMA = """
CREATE TABLE IF NOT EXISTS commits (round INTEGER PRIMARY KEY, hash BLOB NOT NULL, body BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS applied (round INTEGER, peer TEXT, model BLOB NOT NULL, PRIMARY KEY (round, peer)) STRICT;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
"""
_COMMIT = msgspec.msgpack.Decoder(Commit)


class ChainError(Exception):
    """The chain file cannot be read or written; the message says where, why and what to do."""


class Chain:
    """The commits that this peer has proven, in order; `append` returns once they are on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # a commit must survive the power cut after its Send
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise ChainError(f"{path}: {error}. Move the file away to start from the peers' copy.") from error

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def append(self, commit: Commit) -> None:
        """Store one commit durably. Raises ChainError, and stores nothing, on a full or broken disk."""
        block = commit.block
        row = (block.round, block.hash, msgspec.msgpack.encode(commit))
        self._write("INSERT INTO commits VALUES (?, ?, ?)", row)

    def applied(self, peer: PeerId, said: Applied) -> None:
        """Keep what `peer` says its model is after a round."""
        self._write("INSERT OR REPLACE INTO applied VALUES (?, ?, ?)", (said.round, peer, said.model))

    def keep(self, name: str, value: bytes) -> None:
        """Store one named fact durably."""
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def fact(self, name: str) -> bytes | None:
        """The fact kept under `name`."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def commits(self, *, after_round: int = 0, limit: int = -1) -> Iterator[Commit]:
        """The commits of later rounds, oldest first. Raises ChainError at a damaged one."""
        rows = self._db.execute(
            "SELECT round, body FROM commits WHERE round > ? ORDER BY round LIMIT ?", (after_round, limit)
        )
        for round_, body in rows:
            try:
                yield _COMMIT.decode(body)
            except msgspec.DecodeError as error:
                raise ChainError(f"{self.path}: round {round_} is damaged ({error}).") from error

    def digests(self) -> Mapping[int, Mapping[PeerId, bytes]]:
        """round -> peer -> the model digest that the peer signed."""
        out: dict[int, dict[PeerId, bytes]] = {}
        for round_, peer, model in self._db.execute("SELECT round, peer, model FROM applied"):
            out.setdefault(round_, {})[PeerId(peer)] = bytes(model)
        return out

    def _write(self, statement: str, row: tuple[object, ...]) -> None:
        try:
            self._db.execute(statement, row)
        except sqlite3.Error as error:
            raise ChainError(f"{self.path}: {error}. Nothing was lost; free some space and start again.") from error
