"""Signed records: what is written is read back, and nothing else is."""

import random
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dugnad.dht import records
from dugnad.dht.identity import Identity
from dugnad.dht.records import MAX_RECORD_BYTES, Body, MemberBody, ProgressBody, Record, issue, owner_of, parse
from dugnad.dht.wire import WireError

RUN, OTHER_RUN = b"r" * 32, b"s" * 32
NOW = 1_700_000_000.0
ME = Identity.from_seed(b"1" * 32)
MEMBER = MemberBody(("/ip4/192.0.2.1/tcp/4001",), "volunteer", "amber-otter", "0.1")
PROGRESS = ProgressBody(7, "LOCAL", "training", 120, 1234.5, 2.25, b"d" * 32)

words = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=40)
members = st.builds(
    MemberBody,
    st.lists(words.map(lambda word: f"/a{word}"), max_size=16).map(tuple),
    st.sampled_from(["volunteer", "coordinator"]),
    words,
    words,
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
progresses = st.builds(
    ProgressBody,
    st.integers(0, 2**63 - 1),
    words.map(lambda word: word[:16]),
    words,
    st.integers(0, 2**63 - 1),
    numbers,
    st.none() | numbers,
    st.sampled_from([b"", b"d" * 32]),
)


def member(seq: int = 1, *, now: float = NOW, lifetime_s: float = 60.0, by: Identity = ME) -> Record:
    return issue(by, RUN, "member", "", seq, MEMBER, now=now, lifetime_s=lifetime_s)


def forged(change: Callable[[list[object]], None], by: Identity = ME) -> bytes:
    """A record whose fields were changed by hand, and signed correctly."""
    fields = msgspec.msgpack.decode(member().raw[:-64])
    change(fields)
    head = msgspec.msgpack.encode(fields)
    return head + by.sign(b"dugnad/record/1" + head)


def reason(raw: bytes, *, now: float = NOW) -> str:
    with pytest.raises(WireError) as caught:
        parse(raw, RUN, now=now)
    return caught.value.reason


@given(members | progresses, st.integers(1, 2**63 - 1))
@settings(max_examples=60)
def test_what_was_issued_is_what_is_parsed(body: Body, seq: int) -> None:
    kind = "member" if isinstance(body, MemberBody) else "progress"
    record = issue(ME, RUN, kind, "", seq, body, now=NOW, lifetime_s=60.0)
    again = parse(record.raw, RUN, now=NOW)
    assert again == record
    assert (again.owner, again.seq, again.body) == (ME.peer_id, seq, body)
    assert (again.issued_ms, again.expires_ms) == (NOW * 1000, NOW * 1000 + 60_000)


def test_whole_numbers_where_a_float_belongs_are_issued_as_floats() -> None:
    body = ProgressBody(1, "LOCAL", "", 1, 3, 0, b"")
    assert issue(ME, RUN, "progress", "", 1, body, now=NOW, lifetime_s=60.0).body == body


@given(st.binary(max_size=400))
@example(b"\x99" + b"\xdd\xff\xff\xff\xff" * 30 + b"0" * 64)  # arrays that promise four billion elements each
@example(b"\x91" * 2000)
@example(b"")
def test_garbage_is_a_wire_error(raw: bytes) -> None:
    with pytest.raises(WireError):
        parse(raw, RUN, now=NOW)
    assert owner_of(raw) is None


@pytest.mark.parametrize("record", [member(), issue(ME, RUN, "progress", "", 1, PROGRESS, now=NOW, lifetime_s=60)])
def test_no_truncated_extended_or_changed_record_is_accepted(record: Record) -> None:
    rng = random.Random(1)
    for end in range(len(record.raw)):
        assert reason(record.raw[:end])
        flipped = bytearray(record.raw)
        flipped[end] ^= 1 << rng.randrange(8)
        assert reason(bytes(flipped))
    assert reason(record.raw + b"\0")


def test_bytes_over_the_cap_are_refused_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_payloads", None)
    assert reason(b"\x99" * (MAX_RECORD_BYTES + 1)) == "too large"


def set_field(index: int, value: object) -> Callable[[list[object]], None]:
    return lambda fields: fields.__setitem__(index, value)


ISSUED = int(NOW * 1000)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (set_field(0, 2), "version"),
        (set_field(1, OTHER_RUN), "foreign run"),
        (set_field(1, RUN[:-1]), "malformed"),
        (set_field(2, "chunks"), "unknown kind"),
        (set_field(2, "progress"), "malformed"),
        (lambda fields: fields.__setitem__(slice(2, 9), ["progress", *fields[3:8], "x" * 1536]), "too large"),
        (set_field(3, Identity.from_seed(b"2" * 32).public_key), "bad signature"),
        (set_field(4, "second"), "unknown key"),
        (set_field(5, 0), "malformed"),
        (set_field(5, 2**63), "malformed"),
        (set_field(5, -1), "malformed"),
        (set_field(7, ISSUED), "lifetime"),
        (set_field(7, ISSUED - 1), "lifetime"),
        (set_field(7, ISSUED + 1_800_001), "lifetime"),
        (set_field(7, 2**62), "malformed"),
        (set_field(8, None), "malformed"),
        (lambda fields: fields.append(0), "malformed"),
        (lambda fields: fields[8].append(0), "malformed"),
        (set_field(8, [["/a"] * 17, "volunteer", "", ""]), "malformed"),
        (set_field(8, [["/" + "a" * 256], "volunteer", "", ""]), "malformed"),
        (set_field(8, [["/a\n"], "volunteer", "", ""]), "malformed"),
        (set_field(8, [[], "king", "", ""]), "malformed"),
        (set_field(8, [[], "volunteer\n", "", ""]), "malformed"),
        (set_field(8, [[], "volunteer", "n" * 41, ""]), "malformed"),
        (set_field(8, [[], "volunteer", "\x1b[2J", ""]), "malformed"),
    ],
)
def test_a_signed_record_that_breaks_a_rule_is_refused(change: Callable[[list[object]], None], why: str) -> None:
    assert reason(forged(change)) == why


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        ProgressBody(1, "LOCAL", "", 1, 1.0, value, b"")
    fields = [1, "LOCAL", "", 1, value, None, b""]
    raw = forged(lambda head: head.__setitem__(slice(2, 9), ["progress", *head[3:8], fields]))
    assert reason(raw) == "malformed"


def test_an_encoding_that_is_not_the_shortest_is_refused() -> None:
    head = member().raw[:-64]
    assert head[1] == 1
    long_version = head[:1] + b"\xcc\x01" + head[2:]
    assert reason(long_version + ME.sign(b"dugnad/record/1" + long_version)) == "malformed"


def test_a_record_may_be_a_minute_ahead_of_our_clock_and_not_more() -> None:
    record = member()
    assert parse(record.raw, RUN, now=NOW - 60.0) == record
    assert reason(record.raw, now=NOW - 60.01) == "from the future"


def test_an_expired_record_still_parses() -> None:
    record = parse(member(lifetime_s=60.0).raw, RUN, now=NOW + 1e6)
    assert [record.expired(NOW + at_s) for at_s in (59.999, 60.0, 1e6)] == [False, True, True]


def test_the_signature_covers_the_domain_of_records() -> None:
    head = member().raw[:-64]
    assert reason(head + ME.sign(b"dugnad/message/1" + head)) == "bad signature"
    assert reason(head + ME.sign(head)) == "bad signature"


def test_the_owner_of_a_member_record_is_told_for_any_run_and_time() -> None:
    assert owner_of(member().raw) == ME.peer_id
    assert owner_of(forged(set_field(1, OTHER_RUN))) == ME.peer_id
    assert owner_of(member(now=NOW * 2).raw) == ME.peer_id


def test_only_a_member_record_with_a_good_signature_has_an_owner() -> None:
    assert owner_of(issue(ME, RUN, "progress", "", 1, PROGRESS, now=NOW, lifetime_s=60.0).raw) is None
    assert owner_of(member().raw[:-1] + bytes([member().raw[-1] ^ 1])) is None
    assert owner_of(forged(set_field(3, Identity.from_seed(b"2" * 32).public_key))) is None


@pytest.mark.parametrize(
    ("body", "lifetime_s"),
    [
        (MEMBER, 1801.0),
        (MEMBER, 0.0),
        (msgspec.structs.replace(MEMBER, addresses=("no multiaddr",)), 60.0),
        (msgspec.structs.replace(MEMBER, nickname="n" * 41), 60.0),
    ],
)
def test_issuing_what_others_would_refuse_is_a_value_error(body: MemberBody, lifetime_s: float) -> None:
    with pytest.raises(ValueError, match="no peer would accept"):
        issue(ME, RUN, "member", "", 1, body, now=NOW, lifetime_s=lifetime_s)


def test_a_slot_belongs_to_one_kind_owner_and_key() -> None:
    record, other = member(), Identity.from_seed(b"2" * 32).peer_id
    changed = [replace(record, kind="progress"), replace(record, owner=other), replace(record, key="k")]
    assert len({one.slot for one in [record, *changed]}) == 4
    assert member(seq=2).slot == record.slot
