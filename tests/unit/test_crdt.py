"""The map of records: the same contents everywhere, whatever the order; nobody but the owner changes an entry."""

import itertools
from collections.abc import Iterable

from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht.crdt import RecordMap, bucket_hashes
from dugnad.dht.identity import Identity
from dugnad.dht.records import MemberBody, ProgressBody, Record, issue

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
some = st.lists(st.sampled_from(POOL), max_size=40)


def merged(records: Iterable[Record]) -> RecordMap:
    made = RecordMap()
    for one in records:
        made.merge(one)
    return made


def contents(records: RecordMap, *, now: float = NOW) -> list[bytes]:
    return [one.raw for bucket in records.buckets(now=now) for one in bucket]


@given(some, st.randoms(use_true_random=False))
def test_merging_is_commutative(records: list[Record], rng: object) -> None:
    shuffled = list(records)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert contents(merged(records)) == contents(merged(shuffled))


@given(some, some, some)
def test_merging_is_associative(a: list[Record], b: list[Record], c: list[Record]) -> None:
    def all_of(one: RecordMap) -> list[Record]:
        return [*one.items("member", now=NOW), *one.items("progress", now=NOW)]

    left = merged(all_of(merged([*a, *b])) + c)
    right = merged(a + all_of(merged([*b, *c])))
    assert contents(left) == contents(right)


@given(some)
def test_merging_is_idempotent(records: list[Record]) -> None:
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
    assert contents(merged(records)) == [one.raw for _, one in sorted(expected.items())]


@given(some, some)
def test_records_of_one_owner_never_change_what_another_says(mine: list[Record], others: list[Record]) -> None:
    me = OWNERS[0].peer_id
    mine = [one for one in mine if one.owner == me]
    others = [one for one in others if one.owner != me]
    alone, together = merged(mine), merged([*mine, *others])
    for kind in ("member", "progress"):
        assert together.get(kind, me, now=NOW) == alone.get(kind, me, now=NOW)
        assert together.seq_of(kind, me) == alone.seq_of(kind, me)
    assert together.evidence.get(me) == alone.evidence.get(me)


@given(some)
def test_no_clock_changes_what_a_merge_keeps(records: list[Record]) -> None:
    reading = RecordMap()
    for late, one in enumerate(records):
        reading.merge(one)
        reading.items("member", now=NOW + 10 * late)
        reading.buckets(now=NOW + 1e6)
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


def test_two_records_with_one_seq_are_kept_as_evidence_whichever_came_first() -> None:
    a, b = record(0, 3, says="a"), record(0, 3, says="b")
    for order in ([a, b], [b, a], [record(0, 1), a, a, b, record(0, 9)]):
        found = merged(order).evidence
        assert list(found) == [OWNERS[0].peer_id]
        pair = found[OWNERS[0].peer_id]
        assert {pair.first, pair.second} == {a, b}
        assert pair.first.hash < pair.second.hash


def test_honest_owners_leave_no_evidence() -> None:
    honest = [record(owner, seq) for owner in range(4) for seq in (1, 2, 3)]
    assert merged([*honest, *honest]).evidence == {}


def test_changes_are_listed_newest_first_each_record_once() -> None:
    records = merged([record(0, 1), record(1, 1)])
    since = records.changes
    news = [record(2, 1), record(0, 2), record(2, 2)]
    for one in news:
        records.merge(one)
    assert records.changed_since(since, now=NOW) == [news[2], news[1]]
    assert records.changed_since(records.changes, now=NOW) == []
    assert len(records.changed_since(0, now=NOW)) == len(records) == 3


def test_bucket_hashes_tell_where_two_maps_differ() -> None:
    a, b = merged(record(owner, 1) for owner in range(4)), merged(record(owner, 1) for owner in range(4))
    assert bucket_hashes(a.buckets(now=NOW)) == bucket_hashes(b.buckets(now=NOW))
    news = record(2, 2)
    b.merge(news)
    one, other = bucket_hashes(a.buckets(now=NOW)), bucket_hashes(b.buckets(now=NOW))
    differing = {index // 8 for index in range(len(one)) if one[index] != other[index]}
    assert len(one) == 256 * 8
    assert differing == {news.slot[0]}


def test_a_full_map_takes_news_of_known_owners_only_until_pruned() -> None:
    records = RecordMap(max_owners=2)
    assert records.merge(record(0, 1, lifetime_s=5.0))
    assert records.merge(record(1, 1))
    assert not records.merge(record(2, 1))
    assert records.merge(record(1, 2))
    assert records.merge(record(1, 1, kind="progress"))
    longest_s = 600.0
    records.prune(now=NOW + 5.0 + longest_s + 61.0)
    assert records.seq_of("member", OWNERS[0].peer_id) == 0
    assert records.merge(record(2, 1))


def test_pruning_waits_until_no_older_record_can_still_hold() -> None:
    longest_s = 600.0
    longest, replaced_by = record(0, 1, lifetime_s=longest_s), record(0, 2, lifetime_s=5.0)
    records = merged([longest, replaced_by])
    for passed_s in (0.0, 6.0, longest_s, longest_s + 66.0):
        records.prune(now=NOW + passed_s)
        records.merge(longest)
        assert records.get("member", OWNERS[0].peer_id, now=NOW + passed_s) in (None, replaced_by)
    assert len(records) == 1


def test_the_bytes_of_a_record_are_held_until_it_is_replaced_or_pruned() -> None:
    old, new = record(0, 1), record(0, 2)
    records = merged([old])
    assert records.holds(old.raw)
    records.merge(new)
    assert (records.holds(old.raw), records.holds(new.raw)) == (False, True)
    records.prune(now=NOW + 1e6)
    assert not records.holds(new.raw)


def test_evidence_is_bounded() -> None:
    records = RecordMap(max_owners=2)
    for owner in range(4):
        for says in "ab":
            records.merge(record(owner, 1, says=says))
        records.prune(now=NOW + 1e6)
    assert list(records.evidence) == [OWNERS[2].peer_id, OWNERS[3].peer_id]


def test_a_hash_is_of_all_the_bytes() -> None:
    one = record(0, 1)
    assert one.hash == blake3(one.raw).digest()
