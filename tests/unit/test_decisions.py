"""Decisions: the organizer's, or its delegate's while that lasts; the newest on each subject holds."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht import records
from dugnad.dht.crdt import RecordMap
from dugnad.dht.decisions import Decision, Decisions, check, decide
from dugnad.dht.delegation import delegate
from dugnad.dht.evidence import RECORDS, Proofs
from dugnad.dht.identity import Identity
from dugnad.dht.records import DecisionBody, Record, issue, parse
from dugnad.dht.wire import WireError

RUN = b"r" * 32
NOW = 1_700_000_000.0
YEAR_S = 365.25 * 86400.0
ORGANIZER, COORDINATOR, ANN, EVE = (Identity.from_seed(bytes([k]) * 32) for k in range(1, 5))
SEAT = delegate(ORGANIZER, RUN, COORDINATOR.peer_id, 1, int(NOW + 1000))


def ban(by: Identity = ORGANIZER, verdict: str = "ban", *, at_s: float = NOW, **given: object) -> Record:
    return decide(by, RUN, ANN.peer_id, verdict, "poison", now=at_s, **given)  # type: ignore[arg-type]


def refused(record: Record) -> str:
    with pytest.raises(WireError) as caught:
        check(record, ORGANIZER.peer_id)
    return caught.value.reason


def test_what_the_organizer_decides_holds_for_longer_than_any_run() -> None:
    record = parse(ban().raw, RUN, now=NOW)
    check(record, ORGANIZER.peer_id)
    taken = Decisions()
    assert taken.take(Decision.of(record))
    assert taken.banned(now=NOW + 99 * YEAR_S).keys() == {ANN.peer_id}
    said = taken.on(ANN.peer_id, now=NOW)
    assert said is not None
    assert (said.verdict, said.reason, said.at_s) == ("ban", "poison", NOW)


def test_nobody_else_decides() -> None:
    assert refused(ban(EVE)) == "not the organizer"
    assert refused(ban(ANN, "unban")) == "not the organizer"
    assert refused(ban(EVE, delegation=SEAT)) == "not delegated"
    assert refused(ban(EVE, delegation=delegate(EVE, RUN, EVE.peer_id, 1, int(NOW + 9)))) == "not delegated"


def test_a_delegate_decides_for_as_long_as_its_delegation() -> None:
    record = ban(COORDINATOR, delegation=SEAT)
    check(record, ORGANIZER.peer_id)
    taken = Decisions()
    taken.take(Decision.of(record))
    assert taken.banned(now=NOW + 900.0)
    assert not taken.banned(now=NOW + 1000.0)
    assert taken.on(ANN.peer_id, now=NOW + 1000.0) is None
    body = DecisionBody("ban", "", SEAT)
    longer = issue(COORDINATOR, RUN, "decision", ANN.peer_id, 1, body, now=NOW, lifetime_s=1001.0)
    assert refused(longer) == "lifetime"


@given(st.permutations(range(4)))
def test_in_whatever_order_they_come_the_newest_holds(order: list[int]) -> None:
    said = [
        ban(at_s=NOW + k, verdict=verdict) for k, verdict in enumerate(("ban", "unban", "ban", "allow"))
    ]  # fmt: skip
    taken = Decisions()
    for k in order:
        taken.take(Decision.of(said[k]))
    assert not taken.banned(now=NOW)
    assert [one.verdict for one in taken.all()] == ["allow"]


def test_a_decision_replaces_the_one_before_though_the_clock_was_set_back() -> None:
    first = ban(at_s=NOW + 500)
    second = ban(verdict="unban", after_s=first.issued_ms / 1000)
    kept = RecordMap()
    assert kept.merge(first)
    assert kept.merge(second)


def test_an_organizer_that_decides_twice_within_a_millisecond_is_no_liar() -> None:
    one, other = ban(), ban(verdict="unban")
    assert one.seq == other.seq
    assert Proofs().convict(RUN, RECORDS, one.raw, other.raw) is None
    for pair in itertools.permutations((one, other)):
        kept = RecordMap()
        for record in pair:
            kept.learn(record)
        assert len(kept) == 1, "the same of the two, whichever came first"
        assert kept.get("decision", ORGANIZER.peer_id, ANN.peer_id, now=NOW) == max(pair, key=lambda one: one.hash)


def test_a_map_full_of_strangers_has_room_for_decisions_and_no_more_of_them_than_it_says() -> None:
    kept = RecordMap(max_owners=0, max_decisions=2)
    subjects = [decide(ORGANIZER, RUN, f"subject{k}", "ban", "", now=NOW) for k in range(3)]
    assert [kept.merge(one) for one in subjects] == [True, True, False]
    assert kept.merge(decide(ORGANIZER, RUN, "subject0", "unban", "", now=NOW + 1)), "in the place of another"


def test_what_a_convicted_delegate_decided_is_gone_with_all_else_it_said() -> None:
    kept = RecordMap()
    member = records.MemberBody((), "coordinator", "", "")
    for record in (
        ban(COORDINATOR, delegation=SEAT),
        issue(COORDINATOR, RUN, "member", "", 1, member, now=NOW, lifetime_s=60.0),
        ban(at_s=NOW + 1),
    ):
        kept.learn(record)
    other = msgspec.structs.replace(member, nickname="other")
    kept.learn(issue(COORDINATOR, RUN, "member", "", 1, other, now=NOW, lifetime_s=60.0))
    assert kept.quarantined() == {COORDINATOR.peer_id}
    assert [one.owner for one in kept.items("decision", now=NOW)] == [ORGANIZER.peer_id]


@pytest.mark.parametrize(
    ("subject", "reason"), [("", "x"), ("a b", "x"), ("x" * 65, "x"), ("x", "y\n"), ("x", "y" * 201)]
)
def test_words_that_no_peer_would_take_are_not_signed(subject: str, reason: str) -> None:
    with pytest.raises((ValueError, msgspec.ValidationError)):
        decide(ORGANIZER, RUN, subject, "ban", reason, now=NOW)
