import itertools
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest

from dugnad.coordinator.chain import Chain, ChainError
from dugnad.coordinator.effects import Promises
from dugnad.coordinator.messages import Proposal
from tests.unit.chains import GENESIS, an_epoch, applied, digest, honest_chain, ledger_of, locked, model_after

COMMITS = honest_chain()
BLOCK = COMMITS[3].block
PROMISES = Promises(0, 4, 2, Proposal(1, BLOCK), locked(BLOCK, ledger_of(COMMITS[:3]).head.voters, view=1))
EPOCH = an_epoch(ledger_of(COMMITS[:1]).head, "a")
"""Begins on the first round: the second and the third count no more."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chain.sqlite"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[[], Chain]]:
    """Opens the chain file, each time anew; all are closed at the end."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(Chain(path)))


@pytest.fixture
def chain(opened: Callable[[], Chain]) -> Chain:
    """An open chain of a founded run with three rounds."""
    chain = opened()
    chain.found(GENESIS)
    for commit in COMMITS[:3]:
        chain.append(commit, at_s=100.0 + commit.block.round)
    return chain


def alter(path: Path, statement: str, *values: object) -> None:
    """Change the file behind the chain's back."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(statement, values)


WRITES: dict[str, Callable[[Chain], object]] = {
    "append": lambda chain: chain.append(COMMITS[3], at_s=104.0),
    "applied": lambda chain: chain.applied(COMMITS[0].block.entries[0].peer, applied("a", 3)),
    "validated": lambda chain: chain.validated(3, 1.5),
    "next_term": lambda chain: chain.next_term(at_s=0.0),
    "remember": lambda chain: chain.remember(PROMISES),
    "incarnation": lambda chain: chain.incarnation(),
}
CHANGES = WRITES | {"epoch": lambda chain: chain.append(EPOCH, at_s=200.0)}


def everything(chain: Chain) -> list[object]:
    commits = list(chain.commits())
    return [chain.genesis(), commits, chain.committed_at(), chain.applieds(), chain.validation(), chain.promises()]


def test_a_new_file_knows_nothing(opened: Callable[[], Chain]) -> None:
    assert everything(opened()) == [None, [], {}, {}, {}, None]


def test_everything_written_is_there_after_opening_the_file_again(chain: Chain, opened: Callable[[], Chain]) -> None:
    for write in WRITES.values():
        write(chain)
    again = opened()  # the first is still open, as after a SIGKILL: nothing waited for its close
    assert everything(again) == everything(chain)
    assert list(again.commits()) == COMMITS
    assert (again.validation(), again.committed_at()[4]) == ({3: 1.5}, 104.0)
    assert list(again.applieds()) == [3]


def test_a_write_reaches_the_disk_before_it_returns(chain: Chain) -> None:
    assert chain._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert chain._db.execute("PRAGMA synchronous").fetchone() == (2,), "FULL: each transaction is synced"


def test_commits_are_listed_from_where_one_asks_and_no_more_than_that(chain: Chain) -> None:
    assert list(chain.commits(after_round=1)) == COMMITS[1:3]
    assert list(chain.commits(after_round=1, limit=1)) == COMMITS[1:2]
    assert list(chain.commits(after_round=3)) == []


def test_a_commit_is_found_by_its_round(chain: Chain) -> None:
    assert [chain.commit(round_) for round_ in range(5)] == [None, *COMMITS[:3], None]


def test_a_round_is_stored_once_and_stays_as_it_was(chain: Chain) -> None:
    other = msgspec.structs.replace(COMMITS[2], ballots=())
    with pytest.raises(ChainError):
        chain.append(other, at_s=0.0)
    assert list(chain.commits()) == COMMITS[:3]


def test_what_a_peer_said_first_of_its_model_stays(chain: Chain) -> None:
    peer = COMMITS[0].block.entries[0].peer
    chain.applied(peer, applied("a", 1))
    chain.applied(peer, applied("a", 1, model=digest("another model")))
    assert chain.applieds()[1][peer].model == model_after(1)
    assert chain.applieds(after_round=1) == {}


def test_a_later_measurement_replaces_the_one_before(chain: Chain) -> None:
    chain.validated(2, 1.5)
    chain.validated(2, 1.25)
    assert chain.validation() == {2: 1.25}


def test_founding_the_same_run_again_changes_nothing(chain: Chain) -> None:
    chain.found(GENESIS)
    assert chain.genesis() == GENESIS


def test_a_folder_of_another_run_is_refused_and_both_are_named(chain: Chain) -> None:
    foreign = msgspec.structs.replace(GENESIS, first_model=digest("another first model"))
    with pytest.raises(ChainError, match=f"belongs to run {GENESIS.run.hex()[:8]}, not to {foreign.run.hex()[:8]}"):
        chain.found(foreign)
    assert chain.genesis() == GENESIS


def test_terms_grow_and_are_never_reused_whoever_opens_the_file(opened: Callable[[], Chain]) -> None:
    taken = []
    for _ in range(3):
        chain = opened()
        taken += [chain.next_term(at_s=0.0), chain.next_term(at_s=0.0)]
        chain.close()
    one, other = opened(), opened()
    taken += [one.next_term(at_s=0.0), other.next_term(at_s=0.0), one.next_term(at_s=0.0)]
    assert taken == list(range(1, 10))


def test_the_wall_clock_puts_a_term_above_those_that_an_older_copy_does_not_know_of(chain: Chain) -> None:
    newest = [chain.next_term(at_s=at_s) for at_s in (1e9, 1e9, 5.0)]
    assert newest == [1_000_000_000, 1_000_000_001, 1_000_000_002]


# -- what a voter promised


def test_only_what_a_voter_promised_last_is_kept(chain: Chain, opened: Callable[[], Chain]) -> None:
    chain.remember(Promises(0, 4))
    chain.remember(PROMISES)
    assert opened().promises() == chain.promises() == PROMISES


def test_a_commit_leaves_promises_as_they_are(chain: Chain) -> None:
    chain.remember(PROMISES)
    chain.append(COMMITS[3], at_s=104.0)
    assert chain.promises() == PROMISES


def test_the_promises_of_two_large_locks_fit(chain: Chain) -> None:
    lock = PROMISES.lock
    assert lock is not None
    large = msgspec.structs.replace(BLOCK, parts=tuple(digest(str(k)) for k in range(8192)))
    kept = Promises(0, 4, 1, Proposal(1, large), msgspec.structs.replace(lock, block=large))
    chain.remember(kept)
    assert chain.promises() == kept


# -- which disk it is


def test_a_file_keeps_its_incarnation_whoever_opens_it(opened: Callable[[], Chain]) -> None:
    first = opened().incarnation()
    assert len(first) == 8
    assert opened().incarnation() == first


def test_a_copied_file_is_another_incarnation_and_stays_that(opened: Callable[[], Chain], path: Path) -> None:
    chain = opened()
    first = chain.incarnation()
    chain.close()
    shutil.copy(path, path.with_name("copy"))
    copied: dict[str, set[bytes]] = {}
    for name in ("copy", "copy", path.name):
        with closing(Chain(path.with_name(name))) as other:
            copied.setdefault(name, set()).add(other.incarnation())
    assert copied[path.name] == {first}
    assert len(copied["copy"]) == 1
    assert copied["copy"] != {first}


def test_a_file_restored_from_a_copy_in_its_own_place_is_another_incarnation(
    opened: Callable[[], Chain], path: Path
) -> None:
    chain = opened()
    first = chain.incarnation()
    chain.close()
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)
    assert opened().incarnation() != first


def test_a_moved_folder_keeps_the_incarnation(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with closing(Chain(tmp_path / "here" / "chain.sqlite")) as chain:
        first = chain.incarnation()
    (tmp_path / "here").rename(tmp_path / "there")
    with closing(Chain(tmp_path / "there" / "chain.sqlite")) as chain:
        assert chain.incarnation() == first


def test_no_two_files_have_one_incarnation(tmp_path: Path) -> None:
    seen = set()
    for k in range(20):
        with closing(Chain(tmp_path / f"{k}.sqlite")) as chain:
            seen.add(chain.incarnation())
    assert len(seen) == 20


# -- epochs


def test_an_epoch_takes_the_place_of_what_came_after_and_of_what_was_said_of_it(
    chain: Chain, opened: Callable[[], Chain]
) -> None:
    peer = COMMITS[0].block.entries[0].peer
    for round_ in (1, 2, 3):
        chain.applied(peer, applied("a", round_))
        chain.validated(round_, 2.0 / round_)
    chain.append(EPOCH, at_s=200.0)
    assert everything(opened()) == everything(chain)
    assert list(chain.commits()) == [COMMITS[0], EPOCH]
    assert (chain.head_round(), list(chain.applieds()), list(chain.validation())) == (2, [1], [1])
    assert chain.epoch_begins(after_epoch=0) == 2
    assert chain.epoch_begins(after_epoch=1) is None


def test_an_epoch_that_begins_on_the_head_takes_the_place_of_nothing(chain: Chain) -> None:
    peer = COMMITS[0].block.entries[0].peer
    chain.applied(peer, applied("a", 3))
    chain.applied(peer, applied("a", 4))  # of a round that its commit follows to this disk
    chain.append(an_epoch(ledger_of(COMMITS[:3]).head, "a"), at_s=200.0)
    assert list(chain.commits())[:3] == COMMITS[:3]
    assert list(chain.applieds()) == [3, 4]


def test_an_epoch_that_fails_half_way_changes_nothing_and_what_is_written_then_is_durable(
    chain: Chain, opened: Callable[[], Chain]
) -> None:
    chain.validated(3, 1.5)
    chain._db.execute("CREATE TRIGGER full BEFORE DELETE ON validation BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    before = everything(chain)
    with pytest.raises(ChainError, match=r"chain\.sqlite: disk full"):
        chain.append(EPOCH, at_s=200.0)
    assert everything(chain) == everything(opened()) == before
    chain.append(COMMITS[3], at_s=104.0)
    assert list(opened().commits()) == COMMITS
    chain._db.execute("DROP TRIGGER full")
    chain.append(EPOCH, at_s=200.0)
    assert list(opened().commits()) == [COMMITS[0], EPOCH]


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", msgspec.msgpack.encode(COMMITS[1])[:-1], msgspec.msgpack.encode(GENESIS), b"\x92\xa1\xff\x90"],
    ids=["empty", "no msgpack", "cut", "another message", "no UTF-8"],
)
def test_a_damaged_round_is_named_and_those_before_it_are_still_read(chain: Chain, path: Path, body: bytes) -> None:
    alter(path, "UPDATE commits SET body = ? WHERE round = 2", body)
    commits = chain.commits()
    assert next(commits) == COMMITS[0]
    with pytest.raises(ChainError, match=r"chain\.sqlite: round 2 is damaged"):
        next(commits)


def test_no_damaged_byte_raises_anything_but_a_chain_error(chain: Chain) -> None:
    whole = msgspec.msgpack.encode(COMMITS[1])
    refused = 0
    for at, flip in itertools.product(range(0, len(whole), 5), (0x01, 0x80)):
        body = bytearray(whole)
        body[at] ^= flip
        chain._db.execute("UPDATE commits SET body = ? WHERE round = 2", (bytes(body),))
        try:
            assert list(chain.commits()) != COMMITS[:3]
        except ChainError:
            refused += 1
    assert refused > 0


def test_damage_elsewhere_is_named_too(chain: Chain, path: Path) -> None:
    chain.applied(COMMITS[0].block.entries[0].peer, applied("a", 1))
    alter(path, "UPDATE applied SET body = x'00'")
    alter(path, "UPDATE genesis SET body = x'00'")
    with pytest.raises(ChainError, match="what a applied is damaged"):
        chain.applieds()
    with pytest.raises(ChainError, match="the genesis is damaged"):
        chain.genesis()
    chain.remember(PROMISES)
    alter(path, "UPDATE promises SET body = substr(body, 2)")
    with pytest.raises(ChainError, match="what this voter has promised is damaged"):
        chain.promises()


def test_a_page_overwritten_in_the_file_is_a_chain_error_when_its_rounds_are_reached(
    chain: Chain, opened: Callable[[], Chain]
) -> None:
    for round_ in range(4, 60):
        block = msgspec.structs.replace(COMMITS[2].block, round=round_)
        chain.append(msgspec.structs.replace(COMMITS[2], block=block), at_s=0.0)
    chain.close()
    raw = chain.path.read_bytes()
    chain.path.write_bytes(raw[:-4096] + b"\xff" * 4096)
    commits = opened().commits()
    assert [next(commits) for _ in COMMITS[:3]] == COMMITS[:3]
    with pytest.raises(ChainError, match=r"chain\.sqlite: .*restore it from a copy"):
        list(commits)


def test_a_file_that_is_no_chain_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"my holiday pictures\n" * 100)
    with pytest.raises(ChainError, match=r"chain\.sqlite: file is not a database"):
        Chain(path)
    assert path.read_bytes() == b"my holiday pictures\n" * 100


def test_a_folder_that_is_not_there_is_a_chain_error(tmp_path: Path) -> None:
    with pytest.raises(ChainError, match="unable to open database file"):
        Chain(tmp_path / "nowhere" / "chain.sqlite")


@pytest.mark.parametrize("write", CHANGES.values(), ids=CHANGES)
def test_a_read_only_disk_is_a_chain_error_and_what_is_there_can_be_read(
    chain: Chain, opened: Callable[[], Chain], monkeypatch: pytest.MonkeyPatch, write: Callable[[Chain], object]
) -> None:
    before = everything(chain)
    connect: Callable[..., sqlite3.Connection] = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **kw: connect(f"file:{path}?mode=ro", uri=True, **kw))
    read_only = opened()
    with pytest.raises(ChainError, match="readonly database"):
        write(read_only)
    assert everything(read_only) == before


def test_a_full_disk_is_a_chain_error_and_leaves_what_was_there(chain: Chain, opened: Callable[[], Chain]) -> None:
    pages = chain._db.execute("PRAGMA page_count").fetchone()[0]
    chain._db.execute(f"PRAGMA max_page_count = {pages}")
    block = msgspec.structs.replace(COMMITS[3].block, parts=tuple(digest(str(k)) for k in range(1000)))
    big = msgspec.structs.replace(COMMITS[3], block=block)
    with pytest.raises(ChainError, match=r"chain\.sqlite: database or disk is full"):
        chain.append(big, at_s=104.0)
    assert list(opened().commits()) == COMMITS[:3]
    chain._db.execute("PRAGMA max_page_count = 1000000")
    chain.append(big, at_s=104.0)
    assert list(opened().commits()) == [*COMMITS[:3], big]
