"""The map of records: the same contents everywhere, whatever the order; nobody but the owner changes an entry."""

import itertools
from collections.abc import Iterable

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht.crdt import MAX_BUCKETS, MIN_BUCKETS, Entry, RecordMap
from dugnad.dht.evidence import Evidence, Proofs, of_records, tag_of
from dugnad.dht.identity import Identity
from dugnad.dht.records import KINDS, MemberBody, ProgressBody, Record, issue

RUN = b"r" * 32
NOW = 1_700_000_000.0
OWNERS = [Identity.from_seed(bytes([number]) * 32) for number in range(4)]


def record(owner: int, seq: int, *, says: str = "", kind: str = "member", lifetime_s: float = 60.0) -> Record:
    body = MemberBody((), "volunteer", says, "") if kind == "member" else ProgressBody(1, "", says, 1, 1.0, None, b"")
    return issue(OWNERS[owner], RUN, kind, "", seq, body, now=NOW, lifetime_s=lifetime_s)


POOL = [
    record(owner, seq, says=says, kind=kind, lifetime_s=lifetime_s)
    for owner, seq, says, kind, lifetime_s in itertools.product(
        range(4), (1, 2, 3), ("a", "b"), ("member", "progress"), (5.0, 60.0)
    )
]
EVIDENCE = [
    of_records(record(owner, seq, says="a"), record(owner, seq, says="b"))
    for owner, seq in itertools.product((0, 1), (1, 2))
]
some = st.lists(st.sampled_from(POOL), max_size=40)
some_entries = st.lists(st.sampled_from([*POOL, *EVIDENCE]), max_size=40)


def merged(entries: Iterable[Entry]) -> RecordMap:
    made = RecordMap()
    for one in entries:
        made.merge(one)
    return made


def learned(records: Iterable[Record]) -> RecordMap:
    made = RecordMap()
    for one in records:
        made.learn(one)
    return made


def all_of(records: RecordMap, *, now: float = NOW) -> list[Entry]:
    buckets = records.in_buckets(frozenset(range(MIN_BUCKETS)), MIN_BUCKETS, now=now)
    return [one for bucket in buckets.values() for one in bucket]


def contents(records: RecordMap, *, now: float = NOW) -> list[bytes]:
    return [one.tag for one in all_of(records, now=now)]


@given(some_entries, st.randoms(use_true_random=False))
def test_merging_is_commutative(records: list[Entry], rng: object) -> None:
    shuffled = list(records)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert contents(merged(records)) == contents(merged(shuffled))


@given(some_entries, some_entries, some_entries)
def test_merging_is_associative(a: list[Entry], b: list[Entry], c: list[Entry]) -> None:
    left = merged(all_of(merged([*a, *b])) + c)
    right = merged(a + all_of(merged([*b, *c])))
    assert contents(left) == contents(right)
    assert left.quarantined() == right.quarantined()


@given(some_entries)
def test_merging_is_idempotent(records: list[Entry]) -> None:
    once = merged(records)
    changes, before = once.changes, contents(once)
    assert [once.merge(one) for one in records] == [False] * len(records)
    assert (once.changes, contents(once)) == (changes, before)


@given(some)
def test_each_slot_holds_the_highest_seq_and_hash(records: list[Record]) -> None:
    expected: dict[bytes, Record] = {}
    for one in records:
        best = expected.get(one.slot)
        if best is None or (one.seq, one.hash) > (best.seq, best.hash):
            expected[one.slot] = one
    assert contents(merged(records)) == [one.tag for _, one in sorted(expected.items())]


@given(some_entries)
def test_evidence_stands_above_all_that_its_owner_says(entries: list[Entry]) -> None:
    records = merged(entries)
    accused = {one.owner for one in entries if isinstance(one, Evidence)}
    assert records.quarantined() == accused
    for kind in ("member", "progress"):
        assert accused.isdisjoint(one.owner for one in records.items(kind, now=NOW))
    assert contents(records) == contents(
        merged([*(one for one in entries if one.owner not in accused), *all_of(records)])
    )


@given(some_entries, some_entries)
def test_what_one_owner_signed_never_changes_what_another_says(mine: list[Entry], others: list[Entry]) -> None:
    me = OWNERS[0].peer_id
    mine = [one for one in mine if one.owner == me]
    others = [one for one in others if one.owner != me]
    alone, together = merged(mine), merged([*mine, *others])
    for kind in ("member", "progress"):
        assert together.get(kind, me, now=NOW) == alone.get(kind, me, now=NOW)
        assert together.seq_of(kind, me) == alone.seq_of(kind, me)
    assert together.evidence_against(me) == alone.evidence_against(me)


@given(some)
def test_whoever_is_found_out_has_said_two_things(records: list[Record]) -> None:
    owners_of = dict[tuple[bytes, int], set[bytes]]()
    for one in records:
        owners_of.setdefault((one.slot, one.seq), set()).add(one.said)
    liars = {one.owner for one in records if len(owners_of[one.slot, one.seq]) > 1}
    found = learned(records)
    assert found.quarantined() <= liars
    for peer in found.quarantined():
        evidence = found.evidence_against(peer)
        assert evidence is not None
        assert Proofs().parse(evidence.raw, RUN) == evidence


@given(some)
def test_no_clock_changes_what_a_merge_keeps(records: list[Record]) -> None:
    reading = RecordMap()
    for late, one in enumerate(records):
        reading.merge(one)
        reading.items("member", now=NOW + 10 * late)
        all_of(reading, now=NOW + 1e6)
    assert contents(reading) == contents(merged(records))


def test_an_expired_record_is_not_read_and_keeps_its_place() -> None:
    old, new = record(0, 1, lifetime_s=60.0), record(0, 2, lifetime_s=5.0)
    records = merged([new])
    assert not records.merge(old)
    me = OWNERS[0].peer_id
    assert records.get("member", me, now=NOW + 4.9) == new
    assert records.get("member", me, now=NOW + 5.0) is None
    assert records.items("member", now=NOW + 5.0) == []
    assert contents(records, now=NOW + 5.0) == []
    assert records.changed_since(0, now=NOW + 5.0) == []
    assert records.seq_of("member", me) == 2


def test_reading_tells_kinds_and_owners_apart() -> None:
    all_members = [record(owner, 1) for owner in range(4)]
    progress = record(0, 5, kind="progress")
    records = merged([*all_members, progress])
    assert records.items("member", now=NOW) == sorted(all_members, key=lambda one: one.owner)
    assert records.items("progress", now=NOW) == [progress]
    assert records.get("progress", OWNERS[1].peer_id, now=NOW) is None
    assert records.seq_of("progress", OWNERS[0].peer_id) == 5
    assert records.seq_of("progress", OWNERS[1].peer_id) == 0


def test_two_records_with_one_seq_become_evidence_whichever_came_first() -> None:
    a, b = record(0, 3, says="a"), record(0, 3, says="b")
    for order in ([a, b], [b, a], [record(0, 1), a, a, b, record(0, 9)]):
        records = learned(order)
        assert records.quarantined() == {OWNERS[0].peer_id}
        assert records.evidence_against(OWNERS[0].peer_id) == of_records(b, a)
        assert len(records) == 1


def test_learning_says_what_it_changed() -> None:
    records = RecordMap()
    a, b = record(0, 3, says="a"), record(0, 3, says="b")
    assert records.learn(a) == [a]
    assert records.learn(a) == []
    assert records.learn(b) == [of_records(a, b)]
    assert records.learn(a) == records.learn(b) == records.learn(record(0, 4)) == []


def test_honest_owners_leave_no_evidence() -> None:
    honest = [record(owner, seq) for owner in range(4) for seq in (1, 2, 3)]
    assert learned([*honest, *honest]).quarantined() == frozenset()


def test_two_signatures_under_the_same_words_are_no_evidence() -> None:
    one = record(0, 3)
    other = Record(
        one.run, one.kind, one.owner, one.key, one.seq, one.issued_ms, one.expires_ms, one.body, one.said + b"x" * 64
    )
    assert learned([one, other]).quarantined() == frozenset()


def test_changes_are_listed_newest_first_each_record_once() -> None:
    records = merged([record(0, 1), record(1, 1)])
    since = records.changes
    news = [record(2, 1), record(0, 2), record(2, 2)]
    for one in news:
        records.merge(one)
    assert records.changed_since(since, now=NOW) == [news[2], news[1]]
    assert records.changed_since(records.changes, now=NOW) == []
    assert len(records.changed_since(0, now=NOW)) == len(records) == 3


@pytest.mark.parametrize("num_buckets", [256, 512, 4096])
def test_bucket_hashes_tell_where_two_maps_differ(num_buckets: int) -> None:
    a, b = merged(record(owner, 1) for owner in range(4)), merged(record(owner, 1) for owner in range(4))
    assert a.bucket_hashes(num_buckets) == b.bucket_hashes(num_buckets)
    news = record(2, 2)
    b.merge(news)
    one, other = a.bucket_hashes(num_buckets), b.bucket_hashes(num_buckets)
    (differing,) = {index // 8 for index in range(len(one)) if one[index] != other[index]}
    assert len(one) == num_buckets * 8
    assert b.in_buckets(frozenset([differing]), num_buckets, now=NOW) == {differing: [news]}
    a.merge(news)
    assert a.bucket_hashes(num_buckets) == other


@given(some_entries, st.integers(0, 70))
def test_bucket_hashes_are_of_what_is_there_at_the_pruning_whatever_happened_before(
    entries: list[Entry], passed_s: int
) -> None:
    records = RecordMap()
    for late, one in enumerate(entries):
        records.merge(one)
        records.prune(now=NOW + 3 * (late % 20))  # also by a clock that was set back
    records.prune(now=NOW + passed_s)
    fresh = merged(all_of(records, now=NOW + passed_s))
    assert records.bucket_hashes(MAX_BUCKETS) == fresh.bucket_hashes(MAX_BUCKETS)


@pytest.mark.parametrize(("num_records", "num_buckets"), [(0, 256), (1023, 256), (1024, 512), (20_000, 4096)])
def test_a_large_map_is_divided_into_more_buckets(
    monkeypatch: pytest.MonkeyPatch, num_records: int, num_buckets: int
) -> None:
    monkeypatch.setattr(RecordMap, "__len__", lambda self: num_records)
    assert RecordMap().num_buckets() == num_buckets


def test_a_full_map_takes_news_of_known_owners_only_until_pruned() -> None:
    records = RecordMap(max_owners=2)
    assert records.merge(record(0, 1, lifetime_s=5.0))
    assert records.merge(record(1, 1))
    assert not records.merge(record(2, 1))
    assert records.merge(record(1, 2))
    assert records.merge(record(1, 1, kind="progress"))
    longest_s = KINDS["member"].max_lifetime_s
    records.prune(now=NOW + 5.0 + longest_s + 61.0)
    assert records.seq_of("member", OWNERS[0].peer_id) == 0
    assert records.merge(record(2, 1))


def test_pruning_waits_until_no_older_record_can_still_hold() -> None:
    longest_s = KINDS["member"].max_lifetime_s
    longest, replaced_by = record(0, 1, lifetime_s=longest_s), record(0, 2, lifetime_s=5.0)
    records = merged([longest, replaced_by])
    for passed_s in (0.0, 6.0, longest_s, longest_s + 66.0):
        records.prune(now=NOW + passed_s)
        records.merge(longest)
        assert records.get("member", OWNERS[0].peer_id, now=NOW + passed_s) in (None, replaced_by)
    assert len(records) == 1


def test_what_was_replaced_or_refused_is_known_until_the_pruning_after_the_next() -> None:
    old, new, older = record(0, 2), record(0, 3), record(0, 1)
    records = merged([old, new])
    assert [records.known(one.tag) for one in (older, old, new)] == [False, True, True]
    assert not records.merge(older)
    for known in (True, True, False):
        assert [records.known(one.tag) for one in (older, old, new)] == [known, known, True]
        records.prune(now=NOW)
    for known in (True, True, False):
        records.prune(now=NOW + 1e6)
        assert records.known(new.tag) == known
    assert records.tagged(new.tag, now=NOW) is None


def test_what_has_a_tag_is_found_while_it_stands_and_holds() -> None:
    old, new = record(0, 1), record(0, 2, lifetime_s=5.0)
    records = merged([old, new, EVIDENCE[3]])
    assert records.tagged(old.tag, now=NOW) is None
    assert records.tagged(new.tag, now=NOW + 4.0) == new
    assert records.tagged(new.tag, now=NOW + 6.0) is None
    assert records.tagged(EVIDENCE[3].tag, now=NOW + 1e9) == EVIDENCE[3]


def test_evidence_is_bounded_and_does_not_wait_for_a_place_of_an_owner() -> None:
    records = RecordMap(max_owners=1, max_evidence=2)
    records.merge(record(3, 1))
    pairs = [(record(owner, 1, says="a"), record(owner, 1, says="b")) for owner in range(3)]
    assert [records.merge(of_records(*pair)) for pair in pairs] == [True, True, False]
    assert records.quarantined() == {OWNERS[0].peer_id, OWNERS[1].peer_id}
    records.prune(now=NOW + 1e6)
    assert records.quarantined() == {OWNERS[0].peer_id, OWNERS[1].peer_id}


def test_one_piece_of_evidence_is_as_good_as_another() -> None:
    first, second = EVIDENCE[0], EVIDENCE[1]
    assert first.owner == second.owner
    assert first.raw != second.raw
    assert first.tag == second.tag == tag_of(first.raw) == tag_of(second.raw)
    records = merged([first])
    assert not records.merge(second)
    assert records.evidence_against(first.owner) == first


def test_a_hash_is_of_all_the_bytes() -> None:
    one = record(0, 1)
    assert one.hash == blake3(one.raw).digest()
