import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dugnad.coordinator.membership import Membership, Stage, stretch
from dugnad.coordinator.messages import MAX_PEERS, Report
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Reach
from tests.unit.chains import RUN, a_ledger, digest, disk_of

HEAD = a_ledger().head
SILENCE_S = 8.0
A, B, C = PEERS = PeerId("a"), PeerId("b"), PeerId("c")


def a_report(stage: Stage = Stage.WAITING, *, head: bytes = RUN, leaving: bool = False, trains: bool = True) -> Report:
    return Report(
        epoch=0, head_round=0, head=head, in_view=0, incarnation=disk_of(A), trains=trains, stage=stage,
        round=0, view=0, attempt=0, step=0, of_steps=0, leaving=leaving, reach=Reach.OPEN, uplink=0.0, addresses=(),
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


def test_nobody_waits_for_who_is_barred_however_it_says_that_it_is_here() -> None:
    for theirs in (a_report(), a_report(Stage.SYNCING), None):
        them = members(a=a_report(), b=a_report(), **({} if theirs is None else {"c": theirs}))
        decision = them.decide(HEAD, min_peers=2, awaited=(A, B, C), barred=frozenset({C}))
        assert decision.members == (A, B)


# -- every order of everything


class Hearing(RuleBasedStateMachine):
    """A leader that hears peers now and then, against the plainest book of what they said and when."""

    def __init__(self) -> None:
        super().__init__()
        self.them = Membership(SILENCE_S)
        self.now = 0.0
        self.silence_s = SILENCE_S
        self.said: dict[PeerId, tuple[Report, float]] = {}
        self.lost: set[PeerId] = set()
        self.seen: tuple[int, object] = (self.them.changes, self.view())

    def view(self) -> object:
        """All that follows from who is here and what they say."""
        return {peer: (self.them.is_live(peer), self.them.report(peer)) for peer in PEERS}

    @rule(
        peer=st.sampled_from(PEERS),
        stage=st.sampled_from(list(Stage)),
        head=st.sampled_from([RUN, RUN, digest("another head")]),
        leaving=st.booleans(),
        trains=st.booleans(),
    )
    def a_peer_reports(self, peer: PeerId, stage: Stage, head: bytes, leaving: bool, trains: bool) -> None:
        report = a_report(stage, head=head, leaving=leaving, trains=trains)
        assert self.them.heard(peer, report, now=self.now)
        self.said[peer] = (report, self.now)
        self.lost.discard(peer)

    @rule(peer=st.sampled_from(PEERS))
    def the_network_says_that_it_does_not_answer(self, peer: PeerId) -> None:
        self.them.lose(peer, "no route")
        self.lost |= {peer} & self.said.keys()

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, SILENCE_S - 0.5, SILENCE_S, 20 * SILENCE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.them.tick(now=self.now)
        silent = {peer for peer, (_, at) in self.said.items() if self.now >= at + self.silence_s}
        self.lost |= silent
        for peer in [peer for peer in silent if self.now - self.said[peer][1] > 10 * self.silence_s + 60]:
            del self.said[peer]
            self.lost.discard(peer)

    @rule(contributors=st.sampled_from([3, 400, 1000]))
    def the_swarm_grows_or_shrinks(self, contributors: int) -> None:
        self.them.resize(contributors)
        self.silence_s = SILENCE_S * stretch(contributors)

    @rule()
    def the_lead_goes_to_another_and_comes_back(self) -> None:
        self.them.forget()
        self.said.clear()
        self.lost.clear()

    @rule(min_peers=st.integers(1, 3), awaited=st.sets(st.sampled_from(PEERS)), barred=st.sets(st.sampled_from(PEERS)))
    def who_would_get_work(self, min_peers: int, awaited: set[PeerId], barred: set[PeerId]) -> None:
        decision = self.them.decide(HEAD, min_peers=min_peers, awaited=awaited, barred=frozenset(barred))
        ready = {peer for peer in self.here() if self.stands(peer) and self.said[peer][0].trains}
        assert decision.members in ((), tuple(sorted(ready - barred))), "all who are ready and not barred, or nobody"
        enough = len(ready - barred) >= min_peers
        worth_a_wait = {peer for peer in awaited - barred if self.worth_a_wait(peer)}
        assert bool(decision.members) == (enough and not worth_a_wait), decision.reason

    def here(self) -> set[PeerId]:
        return self.said.keys() - self.lost

    def stands(self, peer: PeerId) -> bool:
        report = self.said[peer][0]
        return report.head == RUN and report.stage != Stage.SYNCING and not report.leaving

    def worth_a_wait(self, peer: PeerId) -> bool:
        """Who was never heard of may still come; who is here and works may still get there; nobody else."""
        if peer not in self.said:
            return True
        report = self.said[peer][0]
        works = peer in self.here() and report.trains and not report.leaving
        return works and not self.stands(peer)

    @invariant()
    def it_knows_who_is_here_and_what_they_said_last(self) -> None:
        assert self.them.live() == tuple(sorted(self.here()))
        for peer in PEERS:
            assert self.them.report(peer) == (self.said[peer][0] if peer in self.said else None)
            assert bool(self.them.why_lost(peer)) == (peer not in self.here())
        assert self.them.leaving() == {peer for peer, (report, _) in self.said.items() if report.leaving}

    @invariant()
    def it_wakes_when_the_first_of_those_here_would_be_lost(self) -> None:
        heard_at = [self.said[peer][1] for peer in self.here()]
        assert self.them.wake_at() == min(heard_at, default=float("inf")) + self.silence_s

    @invariant()
    def while_nothing_is_counted_as_a_change_nothing_has_changed(self) -> None:
        now = (self.them.changes, self.view())
        assert self.seen[0] != now[0] or self.seen[1] == now[1]
        self.seen = now


Hearing.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestHearing = Hearing.TestCase
