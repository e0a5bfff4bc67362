"""Evidence: it convicts whoever signed two contradicting things, and nobody can make it for anyone else."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht.evidence import EVIDENCE_BYTES, MAX_SIDE_BYTES, RECORDS, Proofs, contradict, is_evidence, of_records
from dugnad.dht.identity import Identity, PeerId, public_key_of
from dugnad.dht.records import MemberBody, Record, issue
from dugnad.dht.wire import WireError

RUN, OTHER_RUN = b"r" * 32, b"s" * 32
NOW = 1_700_000_000.0
HONEST, LIAR = Identity.from_seed(bytes(32)), Identity.from_seed(bytes([1] * 32))
DOMAIN = b"dugnad/evidence/1"


def record(identity: Identity, seq: int, says: str = "", *, run: bytes = RUN, now: float = NOW) -> Record:
    return issue(identity, run, "member", "", seq, MemberBody((), "volunteer", says, ""), now=now, lifetime_s=60.0)


def raw(accused: Identity, first: bytes, second: bytes, *, run: bytes = RUN, sort: str = RECORDS) -> bytes:
    return DOMAIN + msgspec.msgpack.encode((run, accused.public_key, sort, first, second))


def test_two_records_with_one_number_convict_their_owner_in_either_order() -> None:
    one, other = record(LIAR, 7, "a"), record(LIAR, 7, "b")
    evidence = Proofs().convict(RUN, RECORDS, one.raw, other.raw)
    assert evidence is not None
    assert evidence == Proofs().convict(RUN, RECORDS, other.raw, one.raw) == of_records(one, other)
    assert evidence.owner == LIAR.peer_id
    assert Proofs().parse(evidence.raw, RUN) == evidence
    assert is_evidence(evidence.raw)
    assert not is_evidence(one.raw)


def test_it_convicts_long_after_both_have_expired_and_before_they_are_issued_by_our_clock() -> None:
    for now in (1.0, NOW + 1e9):
        pair = record(LIAR, 7, "a", now=now), record(LIAR, 7, "b", now=NOW)
        assert Proofs().parse(of_records(*pair).raw, RUN).owner == LIAR.peer_id


said = st.builds(
    record,
    st.sampled_from([HONEST, LIAR]),
    st.integers(1, 3),
    st.sampled_from(["", "a", "b"]),
    run=st.sampled_from([RUN, OTHER_RUN]),
)


@given(said, said)
def test_only_two_contradicting_records_of_one_owner_and_run_are_evidence(one: Record, other: Record) -> None:
    evidence = Proofs().convict(RUN, RECORDS, one.raw, other.raw)
    contradicting = (one.owner, one.kind, one.key, one.seq) == (
        other.owner,
        other.kind,
        other.key,
        other.seq,
    ) and one.body != other.body
    assert (evidence is not None) == (contradicting and one.run == other.run == RUN)
    assert evidence is None or evidence.owner == one.owner


# an honest owner's records: to one number one text
honest = st.integers(1, 3).map(lambda seq: record(HONEST, seq, f"at {seq}"))
foreign = st.integers(1, 3).map(lambda seq: record(HONEST, seq, "elsewhere", run=OTHER_RUN))
anything = (honest | foreign | said.filter(lambda one: one.owner != HONEST.peer_id)).map(
    lambda one: one.raw
) | st.binary(min_size=1, max_size=300)


@st.composite
def altered(draw: st.DrawFn) -> bytes:
    """Something signed, a byte of which is another."""
    whole = bytearray(draw(anything))
    whole[draw(st.integers(0, len(whole) - 1))] ^= draw(st.integers(0, 255))
    return bytes(whole)


@given(st.sampled_from([HONEST, LIAR]), anything | altered(), anything | altered(), st.sampled_from([RUN, OTHER_RUN]))
def test_nobody_can_make_evidence_against_an_honest_owner(
    accused: Identity, first: bytes, second: bytes, run: bytes
) -> None:
    forged = raw(accused, *sorted((first, second)), run=run)
    try:
        evidence = Proofs().parse(forged, RUN)
    except WireError:
        return
    assert evidence.owner == LIAR.peer_id


@given(st.binary(max_size=300))
def test_garbage_is_a_wire_error(garbage: bytes) -> None:
    for some in (garbage, DOMAIN + garbage):
        with pytest.raises(WireError):
            Proofs().parse(some, RUN)


one, other = (record(LIAR, 7, says) for says in "ab")
first, second = sorted((one.raw, other.raw))


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        (raw(HONEST, first, second), "no evidence"),  # another is accused than is convicted
        (raw(LIAR, second, first), "no evidence"),  # a pair has one encoding
        (raw(LIAR, first, first), "no evidence"),
        (raw(LIAR, first, record(LIAR, 8, "b").raw), "no evidence"),
        (raw(LIAR, first, second, run=OTHER_RUN), "foreign run"),
        (raw(LIAR, first, second, sort="votes"), "unknown kind"),
        (raw(LIAR, first, second) + b"\0", "malformed"),
        (raw(LIAR, first, b""), "malformed"),
        (raw(LIAR, first, b"x" * (MAX_SIDE_BYTES + 1)), "malformed"),
        (DOMAIN + b"x" * EVIDENCE_BYTES, "too large"),
        (first, "malformed"),
    ],
)
def test_what_is_no_evidence_is_refused_with_a_reason(forged: bytes, reason: str) -> None:
    with pytest.raises(WireError) as refused:
        Proofs().parse(forged, RUN)
    assert refused.value.reason == reason


def test_the_largest_evidence_fits_under_its_cap() -> None:
    proofs = Proofs({"x" * 16: lambda run, first, second: LIAR.peer_id})
    evidence = proofs.convict(RUN, "x" * 16, b"a" * MAX_SIDE_BYTES, b"b" * MAX_SIDE_BYTES)
    assert evidence is not None
    assert len(evidence.raw) <= EVIDENCE_BYTES
    assert proofs.parse(evidence.raw, RUN) == evidence
    assert proofs.convict(RUN, "x" * 16, b"a", b"b" * (MAX_SIDE_BYTES + 1)) is None


def test_upper_floors_say_what_else_is_proof() -> None:
    def two_words(run: bytes, first: bytes, second: bytes) -> PeerId | None:
        if first[:1] == b"!":
            raise WireError("malformed")
        return LIAR.peer_id if first[:1] == second[:1] else None

    proofs = Proofs({"words": two_words})
    evidence = proofs.convict(RUN, "words", b"on", b"off")
    assert evidence is not None
    assert public_key_of(evidence.owner) == LIAR.public_key
    assert proofs.parse(evidence.raw, RUN) == evidence
    assert proofs.convict(RUN, "words", b"on", b"at") is None
    assert proofs.convict(RUN, "words", b"!a", b"!b") is None
    assert proofs.convict(RUN, RECORDS, one.raw, other.raw) is not None


def test_contradicting_needs_other_words() -> None:
    assert contradict(one, other)
    assert not contradict(one, one)
    assert not contradict(one, record(LIAR, 8, "b"))
    assert not contradict(one, record(HONEST, 7, "b"))
