import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.coordinator.membership import Membership, Stage, stretch
from dugnad.coordinator.messages import MAX_PEERS, Report
from dugnad.dht.identity import PeerId
from tests.unit.chains import RUN, a_ledger, digest, disk_of

HEAD = a_ledger().head
SILENCE_S = 8.0
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def a_report(stage: Stage = Stage.WAITING, *, head: bytes = RUN, leaving: bool = False, trains: bool = True) -> Report:
    return Report(
        epoch=0, head_round=0, head=head, in_view=0, incarnation=disk_of(A), trains=trains, stage=stage,
        round=0, view=0, attempt=0, step=0, of_steps=0, leaving=leaving, accepts=True, uplink=0.0, addresses=(),
    )  # fmt: skip


def members(**reports: Report) -> Membership:
    them = Membership(SILENCE_S)
    for peer, report in reports.items():
        them.heard(PeerId(peer), report, now=0.0)
    return them


def test_nobody_is_here_before_saying_so() -> None:
    them = members()
    assert (them.live(), them.report(A), them.is_live(A)) == ((), None, False)
    assert them.wake_at() == float("inf")
    assert them.why_lost(A) == "never heard of"


def test_a_peer_is_what_its_newest_report_says() -> None:
    them = members(a=a_report())
    them.heard(A, a_report(Stage.TRAINING), now=1.0)
    assert them.report(A) == a_report(Stage.TRAINING)


def test_who_is_silent_too_long_is_lost_and_back_with_its_next_word() -> None:
    them = members(a=a_report(), b=a_report())
    them.heard(B, a_report(), now=1.0)
    them.tick(now=SILENCE_S)
    assert (them.live(), them.why_lost(A), them.why_lost(B)) == ((B,), "silent for 8 s", "")
    them.heard(A, a_report(), now=SILENCE_S + 1)
    assert them.live() == (A, B)


def test_a_word_just_before_the_end_of_the_silence_counts() -> None:
    them = members(a=a_report())
    them.tick(now=SILENCE_S - 0.001)
    assert them.is_live(A)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=5), st.floats(0.01, 1e5))
def test_ticking_when_asked_to_loses_everyone_in_as_many_ticks_as_peers(
    heard_at: list[float], silence_s: float
) -> None:
    them = Membership(silence_s)
    for i, at_s in enumerate(heard_at):
        them.heard(PeerId(f"p{i}"), a_report(), now=at_s)
    for _ in heard_at:
        them.tick(now=min(them.wake_at(), 1e300))
    assert them.live() == ()


def test_a_peer_that_does_not_answer_is_lost_with_the_first_reason_given() -> None:
    them = members(a=a_report())
    them.lose(A, "refused the connection")
    them.lose(A, "no route")
    them.tick(now=SILENCE_S)
    assert (them.is_live(A), them.why_lost(A)) == (False, "refused the connection")


def test_losing_a_stranger_does_not_make_it_known() -> None:
    them = members()
    them.lose(A, "no route")
    assert them.why_lost(A) == "never heard of"


def test_who_is_long_gone_is_forgotten() -> None:
    them = members(a=a_report())
    them.tick(now=10 * SILENCE_S + 60)
    assert them.report(A) is not None
    them.tick(now=10 * SILENCE_S + 61)
    assert them.report(A) is None


@pytest.mark.parametrize(
    "report",
    [
        a_report(Stage.SYNCING),
        a_report(head=digest("another head")),
        a_report(leaving=True),
    ],
    ids=["syncing", "another head", "leaving"],
)
def test_only_who_stands_at_the_head_and_stays_is_ready(report: Report) -> None:
    them = members(a=report, b=a_report())
    assert them.ready(HEAD) == (B,)
    assert (them.stands(A, HEAD), them.stands(B, HEAD), them.stands(C, HEAD)) == (False, True, False)


def test_a_coordinator_stands_at_the_head_without_being_there_to_train() -> None:
    them = members(a=a_report(trains=False), b=a_report())
    assert them.ready(HEAD) == (B,)
    assert them.stands(A, HEAD)
    assert them.decide(HEAD, min_peers=2, awaited=()).reason == "waiting for 1 more peer (0 syncing)"


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.SYNCING])
def test_whatever_it_does_at_the_head_a_peer_is_ready(stage: Stage) -> None:
    assert members(a=a_report(stage)).ready(HEAD) == (A,)


def test_a_lost_peer_is_not_ready() -> None:
    them = members(a=a_report())
    them.lose(A, "no route")
    assert them.ready(HEAD) == ()


def test_who_wants_to_leave_is_remembered_until_it_says_otherwise() -> None:
    them = members(a=a_report(leaving=True), b=a_report())
    them.tick(now=SILENCE_S)
    assert them.leaving() == {A}
    them.heard(A, a_report(), now=9.0)
    assert them.leaving() == frozenset()


def test_a_round_takes_everyone_who_is_ready() -> None:
    decision = members(b=a_report(), a=a_report(), c=a_report(Stage.SYNCING)).decide(HEAD, min_peers=2, awaited=())
    assert (decision.members, decision.reason) == ((A, B), "2 peers are ready")


@pytest.mark.parametrize(("min_peers", "missing"), [(2, "1 more peer"), (3, "2 more peers")])
def test_too_few_peers_wait_and_say_for_how_many(min_peers: int, missing: str) -> None:
    them = members(a=a_report(), b=a_report(Stage.SYNCING), c=a_report(leaving=True))
    decision = them.decide(HEAD, min_peers=min_peers, awaited=())
    assert (decision.members, decision.reason) == ((), f"waiting for {missing} (1 syncing)")


def test_a_round_waits_for_who_still_applies_the_last_one() -> None:
    them = members(a=a_report(), b=a_report(), c=a_report(head=digest("the round before")))
    assert them.decide(HEAD, min_peers=2, awaited=[A, B, C]).reason == "waiting for 1 to apply round 0"
    assert them.decide(HEAD, min_peers=2, awaited=[]).members == (A, B)


@pytest.mark.parametrize("gone", ["lost", "leaving"])
def test_a_round_does_not_wait_for_who_will_not_come(gone: str) -> None:
    late = a_report(head=digest("the round before"))
    them = members(a=a_report(), b=a_report())
    them.heard(C, msgspec.structs.replace(late, leaving=gone == "leaving"), now=0.0)
    if gone == "lost":
        them.lose(C, "no route")
    assert them.decide(HEAD, min_peers=2, awaited=[A, B, C]).members == (A, B)


def test_a_leader_that_has_just_started_waits_for_those_of_the_last_round_to_speak() -> None:
    them = members(a=a_report(), b=a_report())
    decision = them.decide(HEAD, min_peers=2, awaited=[A, B, C])
    assert decision.members == ()
    assert "1 of the last round" in decision.reason
    assert them.decide(HEAD, min_peers=2, awaited=[]).members == (A, B)


def test_nobody_waits_for_a_coordinator_to_apply_the_last_round() -> None:
    them = members(a=a_report(), b=a_report(), c=a_report(Stage.SYNCING, trains=False))
    assert them.decide(HEAD, min_peers=2, awaited=[A, B, C]).members == (A, B)


def test_who_is_barred_gets_no_seat_and_is_not_counted() -> None:
    them = members(a=a_report(), b=a_report())
    assert them.decide(HEAD, min_peers=1, awaited=(), barred=frozenset({B})).members == (A,)
    assert them.decide(HEAD, min_peers=2, awaited=(), barred=frozenset({B})).members == ()


def test_who_has_the_chain_and_fetches_the_model_is_arriving() -> None:
    reports = {"a": a_report(Stage.SYNCING), "b": a_report(), "c": a_report(Stage.SYNCING, head=digest("another head"))}
    them = members(**reports)
    assert [them.is_arriving(peer, HEAD) for peer in (A, B, C, PeerId("d"))] == [True, False, False, False]
    them.lose(A, "no route")
    assert not them.is_arriving(A, HEAD)


def test_who_leads_another_round_knows_nobody_until_they_speak() -> None:
    them = members(a=a_report(), b=a_report(leaving=True))
    them.forget()
    assert (them.live(), them.report(A), them.leaving(), them.wake_at()) == ((), None, frozenset(), float("inf"))


@pytest.mark.parametrize(("contributors", "times"), [(0, 1.0), (200, 1.0), (400, 2.0), (1000, 5.0)])
def test_in_a_large_swarm_silences_are_longer(contributors: int, times: float) -> None:
    assert stretch(contributors) == times
    them = members(a=a_report())
    them.resize(contributors)
    assert them.wake_at() == times * SILENCE_S
    them.tick(now=times * SILENCE_S - 0.1)
    assert them.is_live(A)
    them.tick(now=times * SILENCE_S)
    assert not them.is_live(A)
    them.resize(0)
    assert them.heard(A, a_report(), now=100.0)
    assert them.wake_at() == 100.0 + SILENCE_S, "and shorter again when it shrinks"


def test_there_is_room_for_so_many_and_those_who_are_here_keep_theirs() -> None:
    them = members(**{f"p{i}": a_report() for i in range(MAX_PEERS)})
    assert not them.heard(PeerId("one more"), a_report(), now=1.0)
    assert them.report(PeerId("one more")) is None
    assert them.heard(PeerId("p7"), a_report(Stage.TRAINING), now=1.0)
    assert them.report(PeerId("p7")) == a_report(Stage.TRAINING)


def test_where_there_is_no_room_a_newcomer_takes_the_place_of_who_has_been_lost_longest() -> None:
    them = members(**{f"p{i}": a_report() for i in range(MAX_PEERS)})
    for lost in ("p7", "p3"):
        them.lose(PeerId(lost), "gone")
    them.heard(PeerId("p3"), a_report(), now=1.0)
    them.lose(PeerId("p3"), "gone again")
    assert them.heard(A, a_report(), now=2.0)
    assert (them.report(PeerId("p7")), them.is_live(A)) == (None, True)
    assert them.report(PeerId("p3")) is not None, "it was heard of later"
    assert them.heard(B, a_report(), now=2.0)
    assert not them.heard(C, a_report(), now=2.0), "all who are left are here"
