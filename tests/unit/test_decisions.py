"""Decisions: the organizer's, or its delegate's while that lasts; the newest in each register holds."""

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht import records
from dugnad.dht.crdt import RecordMap
from dugnad.dht.decisions import Decision, Decisions, check, decide
from dugnad.dht.delegation import Delegation, delegate
from dugnad.dht.evidence import RECORDS, Proofs
from dugnad.dht.identity import Identity, PeerId
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
    said = taken.on("ban", ANN.peer_id, now=NOW)
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
    assert taken.on("ban", ANN.peer_id, now=NOW + 1000.0) is None
    body = DecisionBody("ban", "", SEAT)
    longer = issue(COORDINATOR, RUN, "ban", ANN.peer_id, 1, body, now=NOW, lifetime_s=1001.0)
    assert refused(longer) == "lifetime"


@given(st.permutations(range(4)))
def test_in_whatever_order_they_come_the_newest_of_each_register_holds(order: list[int]) -> None:
    said = [ban(at_s=NOW + k, verdict=verdict) for k, verdict in enumerate(("ban", "allow", "unban", "ban"))]
    taken = Decisions()
    for k in order:
        taken.take(Decision.of(said[k]))
    assert [one.raw for one in taken.holding(now=NOW)] == [said[1].raw, said[3].raw]
    assert taken.banned(now=NOW).keys() == {ANN.peer_id}


def test_who_is_on_the_list_stays_there_whatever_is_said_of_a_ban_and_an_allow_lifts_none() -> None:
    kept, taken = RecordMap(), Decisions()
    for k, verdict in enumerate(("allow", "ban", "allow")):
        assert kept.merge(ban(at_s=NOW + k, verdict=verdict))
    taken.replace(map(Decision.of, kept.decisions()))
    assert taken.banned(now=NOW)
    kept.merge(ban(at_s=NOW + 3, verdict="unban"))
    taken.replace(map(Decision.of, kept.decisions()))
    assert not taken.banned(now=NOW)
    assert taken.on("allow", ANN.peer_id, now=NOW) is not None


@pytest.mark.parametrize(
    ("verdict", "subject"),
    [
        ("ban", "ab" * 32),
        ("unban", "ab" * 32),
        ("allow", "ab" * 32),
        ("allow", "ann"),
        ("revoke", ANN.peer_id),
        ("revoke", "AB" * 32),
    ],
)
def test_what_is_said_of_the_wrong_sort_of_subject_is_neither_signed_nor_taken_in(verdict: Any, subject: str) -> None:
    with pytest.raises(ValueError, match=f"{verdict} is not said of"):
        decide(ORGANIZER, RUN, subject, verdict, "", now=NOW)
    register = "ban" if verdict == "unban" else verdict
    body = DecisionBody(verdict, "", None)
    assert refused(issue(ORGANIZER, RUN, register, subject, 1, body, now=NOW, lifetime_s=9.0)) == "malformed"


def test_a_verdict_in_the_wrong_register_and_what_is_no_decision_are_refused() -> None:
    for register, verdict in (("allow", "ban"), ("ban", "allow"), ("allow", "unban"), ("ban", "revoke")):
        body = DecisionBody(verdict, "", None)  # type: ignore[arg-type]
        said = issue(ORGANIZER, RUN, register, ANN.peer_id, 1, body, now=NOW, lifetime_s=9.0)
        assert refused(said) == "malformed"
    member = records.MemberBody((), "coordinator", "", "")
    assert refused(issue(ORGANIZER, RUN, "member", "", 1, member, now=NOW, lifetime_s=9.0)) == "malformed"


@given(st.permutations(range(3)))
def test_a_stolen_delegation_takes_back_nothing_that_the_organizer_said(order: list[int]) -> None:
    said = [ban(), *(ban(COORDINATOR, verdict, at_s=NOW + 5, delegation=SEAT) for verdict in ("unban", "ban"))]
    taken = Decisions()
    for k in order:
        taken.take(Decision.of(said[k]))
    for at_s in (NOW, NOW + 999, NOW + 1001):
        assert taken.banned(now=at_s)[ANN.peer_id].by is None
    lifted = Decision.of(ban(verdict="unban", at_s=NOW + 1))
    taken.take(lifted)
    taken.take(Decision.of(ban(COORDINATOR, at_s=NOW + 6, delegation=SEAT)))
    assert taken.on("ban", ANN.peer_id, now=NOW + 8) == lifted, "and it bans nobody again"


def test_what_a_delegate_decided_is_as_if_never_said_once_it_has_expired() -> None:
    other = delegate(ORGANIZER, RUN, EVE.peer_id, 1, int(NOW + 5000))
    taken = Decisions()
    taken.take(Decision.of(ban(EVE, delegation=other)))
    taken.take(Decision.of(ban(COORDINATOR, "unban", at_s=NOW + 5, delegation=SEAT)))
    at_times = [bool(taken.banned(now=NOW + at_s)) for at_s in (6, 1001, 6, 4999, 5001, 1001)]
    assert at_times == [False, True, False, True, False, True]


def test_the_organizer_itself_needs_no_delegation_and_decides_by_none() -> None:
    assert refused(ban(delegation=delegate(ORGANIZER, RUN, ORGANIZER.peer_id, 1, int(NOW + 9)))) == "not delegated"


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
        assert kept.get("ban", ORGANIZER.peer_id, ANN.peer_id, now=NOW) == max(pair, key=lambda one: one.hash)


PEERS = [Identity.from_seed(bytes([k]) * 32).peer_id for k in range(10, 20)]


def about(peer: PeerId, *, at_s: float, by: Identity = ORGANIZER, seat: Delegation | None = None) -> Record:
    return decide(by, RUN, peer, "ban", "", now=at_s, delegation=seat)


def flood(number: int) -> list[Record]:
    """What a thief of the coordinator's key decides, each time newer."""
    return [about(PEERS[k], at_s=NOW + 50 + k, by=COORDINATOR, seat=SEAT) for k in range(number)]


def standing(kept: RecordMap) -> set[bytes]:
    return {one.raw for one in kept.decisions()}


def test_a_map_full_of_strangers_has_room_for_decisions_and_keeps_the_newest_of_them() -> None:
    kept = RecordMap(max_owners=0, max_decisions=2)
    first, second, third = (about(PEERS[k], at_s=NOW + k) for k in range(3))
    assert [kept.merge(one) for one in (second, third, first)] == [True, True, False]
    again = about(PEERS[1], at_s=NOW + 9)
    assert kept.merge(again), "in the place of another"
    assert kept.merge(about(PEERS[3], at_s=NOW + 10)), "in the room of the oldest"
    assert again.raw in standing(kept)
    assert third.raw not in standing(kept)


def test_a_thief_of_a_delegation_leaves_the_organizer_its_room() -> None:
    kept = RecordMap(max_decisions=2, max_delegated=3)
    said = about(PEERS[0], at_s=NOW)
    for one in (said, *flood(9)):
        kept.merge(one)
    assert len(kept.decisions()) == 1 + 3
    assert kept.merge(about(PEERS[1], at_s=NOW + 1)), "older than all that the thief says"
    assert said.raw in standing(kept)


@given(st.permutations(range(9)), st.permutations(range(9)), st.integers(0, 9))
def test_full_maps_that_hold_different_decisions_come_to_hold_the_same(
    one: list[int], other: list[int], cut: int
) -> None:
    said = [*flood(5), *(about(PEERS[k], at_s=NOW + 10 * k, by=COORDINATOR, seat=SEAT) for k in range(2))]
    said += [about(PEERS[k], at_s=NOW + k) for k in range(2)]
    whole, first, second = (RecordMap(max_decisions=1, max_delegated=3) for _ in range(3))
    for k in range(9):
        whole.merge(said[k])
    for k in one[:cut]:
        first.merge(said[k])
    for k in [*other, *one[cut:]]:
        second.merge(said[k])
    for entry in second.decisions():
        first.merge(entry)
    assert standing(first) == standing(second) == standing(whole)


def test_what_a_delegate_decided_leaves_the_map_soon_after_it_expired() -> None:
    kept = RecordMap(max_delegated=3)
    for one in (*flood(3), about(PEERS[0], at_s=NOW)):
        kept.merge(one)
    kept.prune(now=NOW + 999 + records.MAX_AHEAD_S)
    assert len(kept.decisions()) == 4, "clocks may err"
    kept.prune(now=NOW + 1001 + records.MAX_AHEAD_S)
    assert [one.owner for one in kept.decisions()] == [ORGANIZER.peer_id]


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
    assert [one.owner for one in kept.items("ban", now=NOW)] == [ORGANIZER.peer_id]


@pytest.mark.parametrize(
    ("subject", "reason"), [("", "x"), ("a b", "x"), ("x" * 65, "x"), (ANN.peer_id, "y\n"), (ANN.peer_id, "y" * 201)]
)
def test_words_that_no_peer_would_take_are_not_signed(subject: str, reason: str) -> None:
    with pytest.raises((ValueError, msgspec.ValidationError)):
        decide(ORGANIZER, RUN, subject, "ban", reason, now=NOW)
