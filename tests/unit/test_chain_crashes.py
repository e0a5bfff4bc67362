"""The file of the chain is crashed at before, inside and after every write, and torn there: nothing said is forgotten.

A killed process leaves what it has written; a power cut also tears what was not synced yet, which is the end of the
journal: cut, overwritten in part, filled with noise, or with a byte of it flipped. When the next process opens the
file, either all of the write is there or nothing of it, and all that was written before.
"""

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from dugnad.coordinator.chain import Chain
from dugnad.coordinator.effects import Promises
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.messages import Proposal
from dugnad.coordinator.patience import Patience
from dugnad.dht.identity import PeerId
from tests.unit.chains import (
    GENESIS,
    SIGNER,
    a_ledger,
    an_epoch,
    applied,
    honest_chain,
    ledger_of,
    locked,
)

COMMITS = honest_chain()
BLOCK = COMMITS[3].block
LOCK = locked(BLOCK, ledger_of(COMMITS[:3]).head.voters, view=2)
EPOCH = an_epoch(ledger_of(COMMITS[:1]).head, "a")
ANN = PeerId("a")

STEPS: dict[str, Callable[[Chain], object]] = {
    "the run": lambda chain: chain.found(GENESIS),
    "the incarnation": lambda chain: chain.incarnation(),
    "a term": lambda chain: chain.next_term(at_s=0.0),
    "another term": lambda chain: chain.next_term(at_s=0.0),
    "a pledge": lambda chain: chain.remember(Promises(0, 1, 1)),
    "round 1": lambda chain: chain.append(COMMITS[0], at_s=101.0),
    "round 2": lambda chain: chain.append(COMMITS[1], at_s=102.0),
    "what a peer applied": lambda chain: chain.applied(ANN, applied("a", 2)),
    "round 3": lambda chain: chain.append(COMMITS[2], at_s=103.0),
    "a loss": lambda chain: chain.validated(3, 1.5),
    "a pledge in round 4": lambda chain: chain.remember(Promises(0, 4, 1)),
    "a prevote": lambda chain: chain.remember(Promises(0, 4, 2, Proposal(2, BLOCK))),
    "a lock": lambda chain: chain.remember(Promises(0, 4, 2, Proposal(2, BLOCK), LOCK)),
    "round 4": lambda chain: chain.append(COMMITS[3], at_s=104.0),
    "an epoch, which undoes rounds 2 to 4": lambda chain: chain.append(EPOCH, at_s=105.0),
    "a pledge in the epoch": lambda chain: chain.remember(Promises(1, 3, 1)),
}
"""All that a role writes, in an order in which it may."""
TABLES = ("genesis", "commits", "promises", "incarnation", "applied", "terms", "validation")

HEADER_BYTES, FRAME_BYTES = 32, 24 + 4096
"""Of SQLite's journal, and of each page in it."""

Rows = dict[str, list[tuple[object, ...]]]


class Image(NamedTuple):
    """What is on the disk at a moment."""

    file: bytes
    journal: bytes
    rollback: bytes = b""
    """The journal of the very first write, before the file has the other kind."""


def taken(path: Path) -> Image:
    return Image(*(part.read_bytes() if part.exists() else b"" for part in parts_of(path)))


def parts_of(path: Path) -> tuple[Path, ...]:
    return (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-journal"))


def put(path: Path, image: Image) -> None:
    """Make the disk look so; the file stays the same inode, as in a crash."""
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
    for part, data in zip(parts_of(path), image, strict=True):
        if data or part == path:
            part.write_bytes(data)
        else:
            part.unlink(missing_ok=True)


def rows(chain: Chain) -> Rows:
    return {table: chain._db.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES}


def found_after(path: Path, image: Image) -> Rows:
    """What the next process finds."""
    put(path, image)
    with closing(Chain(path)) as chain:
        return rows(chain)


def stands_at(chain: Chain) -> tuple[tuple[int, int], int, int, int]:
    """Where a voter stands who starts from this file, and what it is bound by there; it may only ever grow."""
    follower = Follower(SIGNER, a_ledger(), Patience(1.0, 1.0, 1.0), bytes(8))
    follower.restore(chain.commits(), (), chain.promises())
    said = follower.promises
    views = (-1 if part is None else part.view for part in (said.prevoted, said.lock))
    return follower.ledger.head.place, said.pledged, *views  # type: ignore[return-value]


def torn(before: Image, after: Image) -> Iterator[Image]:
    """The images that a power cut may leave of what was added to the journal, or written over it."""
    noise = random.Random(len(after.journal))
    old, new = before.journal, after.journal
    changed = [at for at in range(len(new)) if old[at : at + 1] != new[at : at + 1]]
    edges = {0, HEADER_BYTES, *range(HEADER_BYTES, len(new), FRAME_BYTES)}
    near = {edge + by for edge in edges for by in (-FRAME_BYTES // 2, -1, 0, 1, 24)}
    for at in sorted(at for at in near if changed[0] <= at <= changed[-1]):
        rest = len(new) - at
        yield after._replace(journal=new[:at])
        yield after._replace(journal=new[:at] + old[at:])
        yield after._replace(journal=new[:at] + bytes(rest))
        yield after._replace(journal=new[:at] + noise.randbytes(rest))
        yield after._replace(journal=new[:at] + bytes([new[at] ^ 1 << noise.randrange(8)]) + new[at + 1 :])


JOURNALS: dict[str, Callable[[Chain], Chain]] = {
    "grows": lambda chain: chain,
    "is written over": lambda chain: copied_into_the_file(chain),
    "begins": lambda chain: started_again(chain),
}
"""What became of the journal before each write."""


def copied_into_the_file(chain: Chain) -> Chain:
    assert chain._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
    return chain


def started_again(chain: Chain) -> Chain:
    chain.close()
    return Chain(chain.path)


@pytest.mark.parametrize("journal", JOURNALS)
def test_of_every_write_all_is_there_after_a_crash_or_nothing_and_all_before_it(tmp_path: Path, journal: str) -> None:
    path = tmp_path / "chain.sqlite"
    chain = Chain(path)
    cases: list[tuple[str, Rows, Rows, list[Image], list[Image]]] = []
    stood = stands_at(chain)
    for name, step in STEPS.items():
        chain = JOURNALS[journal](chain)
        before, disk, killed = rows(chain), taken(path), list[Image]()
        chain._db.set_trace_callback(lambda _, killed=killed: killed.append(taken(path)))  # type: ignore[misc]
        step(chain)
        chain._db.set_trace_callback(None)
        after = rows(chain)
        assert before != after, name
        stands = stands_at(chain)
        assert stood <= stands, f"{name} took the voter back"
        stood = stands
        cases.append((name, before, after, [disk, *killed, taken(path)], list(torn(disk, taken(path)))))
    chain.close()
    for name, before, after, whole, broken in cases:
        assert len(broken) >= 10, name
        assert found_after(path, whole[-1]) == after, f"{name}: it had returned"
        for image in whole[:-1]:
            assert found_after(path, image) == before, f"{name}: a part of it is there"
        for image in broken:
            assert found_after(path, image) in (before, after), f"{name}: torn"


def test_a_crash_while_the_journal_is_copied_into_the_file_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "chain.sqlite"
    with closing(Chain(path)) as chain:
        for step in STEPS.values():
            step(chain)
        kept, before = rows(chain), taken(path)
        assert chain._db.execute("PRAGMA wal_checkpoint(FULL)").fetchone()[0] == 0
        after = taken(path)
    assert before.journal == after.journal
    assert before.file != after.file
    old, new = before.file.ljust(len(after.file), b"\0"), after.file
    for at in range(0, len(new), 1024):
        for file in (new[:at] + before.file[at:], new[:at] + old[at:], old[:at] + new[at:]):
            assert found_after(path, after._replace(file=file)) == kept
    assert found_after(path, Image(after.file, b"")) == kept, "and then the journal may go"


def test_a_file_whose_making_was_interrupted_is_made_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, moments = tmp_path / "chain.sqlite", [Image(b"", b"")]
    connect = sqlite3.connect

    def watched(*arguments: object, **options: object) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*arguments, **options)  # type: ignore[call-overload]
        db.set_trace_callback(lambda _: moments.append(taken(path)))
        return db

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", watched)
        Chain(path).close()
    assert len(moments) > len(TABLES)
    for image in moments:
        put(path, image)
        with closing(Chain(path, read_only=True)) as looking:
            assert looking.genesis() is None
        put(path, image)
        with closing(Chain(path)) as chain:
            assert not any(rows(chain).values())
            chain.found(GENESIS)
            assert chain.genesis() == GENESIS
            assert chain.incarnation() == chain.incarnation()
