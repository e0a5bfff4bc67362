"""What a role keeps of its run, in one SQLite file: the genesis, every commit, and its own promises as a voter.

Everything else folds out of the commits: head, credit, data ranges, the audit, the history of rounds. A file that was
copied is another voter, whose promises nobody knows: the file holds an incarnation, which goes with its inode.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from dugnad.coordinator.effects import Promises
from dugnad.coordinator.messages import Applied, Commit, Genesis
from dugnad.dht.identity import PeerId

_SCHEMA = """
CREATE TABLE IF NOT EXISTS genesis (one INTEGER PRIMARY KEY CHECK (one = 1), body BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS commits
    (round INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, body BLOB NOT NULL, at_s REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS promises (one INTEGER PRIMARY KEY CHECK (one = 1), body BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS incarnation
    (one INTEGER PRIMARY KEY CHECK (one = 1), inode INTEGER NOT NULL, id BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS applied (round INTEGER, peer TEXT, body BLOB NOT NULL, PRIMARY KEY (round, peer)) STRICT;
CREATE TABLE IF NOT EXISTS terms (term INTEGER PRIMARY KEY) STRICT;
CREATE TABLE IF NOT EXISTS validation (round INTEGER PRIMARY KEY, loss REAL NOT NULL) STRICT;
"""
T = TypeVar("T", bound=Struct)


class ChainError(Exception):
    """The chain file cannot be read or written; the message says where, why and what to do."""


class Chain:
    """The commits that this peer has proven, in order; each write returns once it is on disk.

    read_only: of whoever only looks; the role whose file it is may be writing to it.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        if read_only:
            self._db = self._open_to_read()
            return
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # a commit must survive the power cut after its Send
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            self._db.close()
            raise self._unusable(error) from error

    def _open_to_read(self) -> sqlite3.Connection:
        journal = self.path.with_name(f"{self.path.name}-wal")
        # SQLite wants to make a file beside one that has a journal, though not beside one that never changes
        complete = not journal.exists() or journal.stat().st_size == 0
        immutable = complete and not os.access(self.path.parent, os.W_OK)
        uri = f"{self.path.absolute().as_uri()}?mode=ro&immutable={int(immutable)}"
        try:
            with contextlib.ExitStack() as stack:
                db = stack.enter_context(contextlib.closing(sqlite3.connect(uri, uri=True)))
                if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'validation'").fetchone():
                    stack.pop_all()
                    return db
        except sqlite3.Error as error:
            raise ChainError(
                f"{self.path}: {error}. It can't be read here: copy it, with {journal.name} if there is one, "
                "to a folder that you can write to."
            ) from error
        empty = sqlite3.connect(":memory:")  # its role has only just made the file
        empty.executescript(_SCHEMA)
        return empty

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def found(self, genesis: Genesis) -> None:
        """Store what run this is; of another run than before it is a ChainError."""
        known = self.genesis()
        if known is None:
            self._write("INSERT INTO genesis VALUES (1, ?)", (msgspec.msgpack.encode(genesis),))
        elif known != genesis:
            raise ChainError(
                f"{self.path}: this folder belongs to run {known.run.hex()[:8]}, not to {genesis.run.hex()[:8]}. "
                "Give the other run a folder of its own with --dir."
            )

    def genesis(self) -> Genesis | None:
        """What run this is, or None in a new file."""
        row = next(self._read("SELECT body FROM genesis"), None)
        return None if row is None else self._decode(row[0], Genesis, "the genesis")

    def append(self, commit: Commit, *, at_s: float) -> None:
        """Store one commit durably; at_s is the wall clock, for people. Raises ChainError, and stores nothing.

        Where it begins an epoch, the rounds of earlier epochs from there on are forgotten with it, at once or not at
        all: a chain without either would stand where it has stood before, and vote there again.
        """
        block = commit.block
        row = (block.round, block.epoch, msgspec.msgpack.encode(commit), at_s)
        with self._writing():
            older = self._db.execute("SELECT 1 FROM commits WHERE round = ? AND epoch < ?", row[:2]).fetchone()
            for table in ("commits", "applied", "validation") if older else ():
                self._db.execute(f"DELETE FROM {table} WHERE round >= ?", (block.round,))
            self._db.execute("INSERT INTO commits VALUES (?, ?, ?, ?)", row)

    def remember(self, promises: Promises) -> None:
        """Store durably what this voter has promised, in the place of what it promised before."""
        self._write("INSERT OR REPLACE INTO promises VALUES (1, ?)", (msgspec.msgpack.encode(promises),))

    def promises(self) -> Promises | None:
        """What this voter promised last."""
        row = next(self._read("SELECT body FROM promises"), None)
        return None if row is None else self._decode(row[0], Promises, "what this voter has promised")

    def incarnation(self) -> bytes:
        """8 bytes that name this disk as a voter's, for ever; made anew if the file is a copy of another."""
        inode = self.path.stat().st_ino
        row = next(self._read("SELECT inode, id FROM incarnation"), None)
        if row is not None and row[0] == inode:
            return bytes(row[1])
        fresh = os.urandom(8)
        self._write("INSERT OR REPLACE INTO incarnation VALUES (1, ?, ?)", (inode, fresh))
        return fresh

    def applied(self, peer: PeerId, said: Applied) -> None:
        """Keep what `peer` says it has applied; what it said first of a model stays."""
        row = (said.round, peer, msgspec.msgpack.encode(said))
        self._write("INSERT OR IGNORE INTO applied VALUES (?, ?, ?)", row)

    def validated(self, round_: int, loss: float) -> None:
        """Keep the loss on held-out data after a round, in nats per byte."""
        self._write("INSERT OR REPLACE INTO validation VALUES (?, ?)", (round_, loss))

    def next_term(self, *, at_s: float) -> int:
        """Take the next term of leading, durably: no two starts of a coordinator may share one.

        at_s: the wall clock, which is more than any term before; so also where this file is an older copy.
        """
        newest = int(next(self._read("SELECT coalesce(max(term), 0) FROM terms"))[0])
        term = max(newest + 1, int(at_s))
        self._write("INSERT INTO terms VALUES (?)", (term,))
        return term

    def epoch_begins(self, *, after_epoch: int) -> int | None:
        """The first round of the epoch that followed that one, or None."""
        row = next(self._read("SELECT min(round) FROM commits WHERE epoch > ?", after_epoch))
        return None if row[0] is None else int(row[0])

    def commit(self, round_: int) -> Commit | None:
        """The commit of one round, if it is here."""
        return next(self.commits(after_round=round_ - 1, limit=1), None) if round_ > 0 else None

    def commits(self, *, after_round: int = 0, limit: int = -1) -> Iterator[Commit]:
        """The commits of later rounds, oldest first. Raises ChainError at a damaged one."""
        rows = self._read("SELECT round, body FROM commits WHERE round > ? ORDER BY round LIMIT ?", after_round, limit)
        for round_, body in rows:
            yield self._decode(body, Commit, f"round {round_}")

    def head_round(self) -> int:
        """The round of the newest commit; 0 without any."""
        return max((int(round_) for (round_,) in self._read("SELECT max(round) FROM commits") if round_), default=0)

    def committed_at(self) -> Mapping[int, float]:
        """round -> wall-clock time of its commit here, in seconds since 1970."""
        return dict(self._read("SELECT round, at_s FROM commits"))

    def applieds(self, *, after_round: int = 0) -> Mapping[int, Mapping[PeerId, Applied]]:
        """round -> peer -> what it said it applied."""
        out: dict[int, dict[PeerId, Applied]] = {}
        rows = self._read("SELECT round, peer, body FROM applied WHERE round > ? ORDER BY round, peer", after_round)
        for round_, peer, body in rows:
            out.setdefault(round_, {})[PeerId(peer)] = self._decode(body, Applied, f"what {peer} applied")
        return out

    def validation(self) -> Mapping[int, float]:
        """round -> loss on held-out data, in nats per byte."""
        return dict(self._read("SELECT round, loss FROM validation"))

    def _unusable(self, error: sqlite3.Error) -> ChainError:
        return ChainError(f"{self.path}: {error}. Free some space, or move the file away to start anew.")

    def _read(self, statement: str, *values: object) -> Iterator[Any]:
        try:
            yield from self._db.execute(statement, values)  # a damaged page shows only when its row is reached
        except sqlite3.Error as error:
            raise ChainError(f"{self.path}: {error}. It can't be read; restore it from a copy.") from error

    def _write(self, statement: str, row: tuple[object, ...]) -> None:
        with self._writing():
            self._db.execute(statement, row)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: durable when this ends, or nothing of it is there. Raises ChainError."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")  # else all that is written from now on would be part of it
            raise ChainError(f"{self.path}: {error}. Nothing was lost; free some space and start again.") from error

    def _decode(self, body: bytes, kind: type[T], what: str) -> T:
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ChainError(f"{self.path}: {what} is damaged ({error}). Restore the file from a copy.") from error
