from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import pytest

from dugnad.coordinator.follower import RETRY_S, Apply, CatchUp, Follower, Refused, Resync, Send, Store
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.membership import Stage
from dugnad.coordinator.messages import (
    Applied,
    Block,
    Commit,
    Contribution,
    Delegation,
    Entry,
    Freeze,
    Have,
    Message,
    Plan,
    Proposal,
    Report,
    Seat,
    Standing,
    Vote,
    delegation_payload,
)
from dugnad.dht.identity import PeerId
from dugnad.optim.reduce import Deliver, Fold, Upload, Weighed
from dugnad.peer.lifecycle import Abilities, Effect, Leave, Reduce, State, StopTraining, Train, Volunteer, Work
from tests.unit.chains import (
    FOUNDER,
    GENESIS,
    NO_COST,
    RUN,
    FakeSigner,
    a_block,
    an_entry,
    certify,
    digest,
    model_after,
)

ME, ANN, BOB, EVE = PeerId("a"), PeerId("b"), PeerId("c"), PeerId("eve")
REPORT_S, SILENCE_S, TRAIN_S = 2.0, 10.0, 60.0
WORK = Work(digest("root a"), 10, 70, 2.0)
OWNERS = (ME, ANN, ME)
M = TypeVar("M", bound=Message)


@dataclass
class FakeLeader:
    """Says what a leader would: every seat does ten samples, and every round counts all who have one."""

    term: int = 1
    ledger: Ledger = field(default_factory=lambda: Ledger(RUN, FOUNDER))

    def delegation(self, leader: PeerId = FOUNDER) -> Delegation:
        signed = FakeSigner(GENESIS.organizer).sign(delegation_payload(RUN, leader, self.term))
        return Delegation(leader, self.term, signed)

    def plan(self, *members: PeerId, owners: tuple[PeerId, ...] = OWNERS, view: int = 0) -> Plan:
        head = self.ledger.head
        seats = tuple(
            Seat(peer, 5, ((head.cursor + 10 * k, head.cursor + 10 * k + 10),), ()) for k, peer in enumerate(members)
        )
        return Plan(
            head.epoch, head.round + 1, self.term, view, head.hash, head.global_step,
            tuple(sorted(seats, key=lambda seat: seat.peer)), owners, TRAIN_S, 30.0,
        )  # fmt: skip

    def entries(self, plan: Plan) -> tuple[Entry, ...]:
        return tuple(an_entry(seat.peer, *seat.ranges) for seat in plan.seats)

    def freeze(self, plan: Plan, *entries: Entry) -> Freeze:
        return Freeze(plan.round, plan.term, plan.view, entries or self.entries(plan))

    def block(self, plan: Plan) -> Block:
        block = a_block(self.ledger.head, *self.entries(plan))
        parts = tuple(averages(plan).values())
        return msgspec.structs.replace(block, parts=parts, term=plan.term, view=plan.view)

    def commit(self, plan: Plan) -> Commit:
        commit = certify(self.block(plan), (voter.peer for voter in self.ledger.head.committee))
        self.ledger.append(commit)
        return commit

    def departures(self) -> Commit:
        """A block that lets everyone go."""
        commit = certify(a_block(self.ledger.head), (voter.peer for voter in self.ledger.head.committee))
        self.ledger.append(commit)
        return commit

    def standing(self, *, finished: bool = False) -> Standing:
        head = self.ledger.head
        return Standing(self.term, head.round, head.hash, "idle", "", finished, 0, None)


def averages(plan: Plan) -> dict[int, bytes]:
    return {part: digest(f"average {part} of round {plan.round}") for part in range(len(plan.owners))}


def mine(plan: Plan) -> dict[int, bytes]:
    return {part: average for part, average in averages(plan).items() if plan.owners[part] == ME}


def a_volunteer() -> Volunteer:
    follower = Follower(FakeSigner(ME), Ledger(RUN, FOUNDER), GENESIS.organizer)
    return Volunteer(ME, follower, Abilities(("here",), True, 5e6), num_parts=3, report_s=REPORT_S, silence_s=SILENCE_S)


def said(effects: Iterable[Effect], kind: type[M], *, to: PeerId = FOUNDER) -> list[M]:
    """The messages of one kind that are sent to the leader."""
    return [e.message for e in effects if isinstance(e, Send) and e.to == (to,) and isinstance(e.message, kind)]


def stage_of(volunteer: Volunteer) -> Stage:
    return volunteer.stage


def without_reports(effects: Iterable[Effect]) -> list[Effect]:
    return [e for e in effects if not (isinstance(e, Send) and isinstance(e.message, Report))]


def reduced(effects: Iterable[Effect]) -> list[object]:
    return [effect.effect for effect in effects if isinstance(effect, Reduce)]


@pytest.fixture
def leader() -> FakeLeader:
    return FakeLeader()


@pytest.fixture
def volunteer(leader: FakeLeader) -> Volunteer:
    """One in sync with round 0, waiting for a plan."""
    volunteer = a_volunteer()
    volunteer.receive(FOUNDER, leader.delegation(), now=0.0)
    volunteer.tick(now=0.0)
    volunteer.synced(0, model_after(0), (), now=0.0)
    return volunteer


def contributed(volunteer: Volunteer, plan: Plan) -> None:
    """Take it from waiting to a promise that its owners acknowledged."""
    volunteer.receive(FOUNDER, plan, now=1.0)
    for effect in reduced(volunteer.trained(plan, WORK, now=2.0)):
        if isinstance(effect, Upload):
            volunteer.uploaded(effect.owner, effect.root, effect.parts, now=2.0)


def round_done(volunteer: Volunteer, leader: FakeLeader, plan: Plan) -> Commit:
    """Take it from a promise to the applied round."""
    commit = leader.commit(plan)
    volunteer.holds(commit.block.parts, now=3.0)
    volunteer.receive(FOUNDER, commit, now=3.0)
    volunteer.applied(commit.block.round, model_after(commit.block.round), NO_COST, now=3.0)
    return commit


# -- joining


def test_it_asks_for_the_model_once_it_knows_who_leads_and_waits_once_it_has_it(leader: FakeLeader) -> None:
    volunteer = a_volunteer()
    assert volunteer.tick(now=0.0) == []
    (report,) = said(volunteer.receive(FOUNDER, leader.delegation(), now=0.0), Report)
    assert report.stage == Stage.SYNCING
    assert volunteer.wake_at() <= 0.0
    assert [effect for effect in volunteer.tick(now=0.0) if isinstance(effect, Resync)] != []
    assert [effect for effect in volunteer.tick(now=60.0) if isinstance(effect, Resync)] == []
    (report,) = said(volunteer.synced(0, model_after(0), (), now=61.0), Report)
    assert (report.stage, report.term, report.head) == (Stage.WAITING, 1, RUN)
    assert (report.addresses, report.accepts, report.uplink) == (("here",), True, 5e6)
    assert volunteer.state is State.WAIT


def test_a_model_that_could_not_be_had_is_asked_for_again_after_a_while(leader: FakeLeader) -> None:
    volunteer = a_volunteer()
    volunteer.receive(FOUNDER, leader.delegation(), now=0.0)
    volunteer.tick(now=0.0)
    volunteer.sync_failed("nobody answers", now=5.0)
    assert not any(isinstance(effect, Resync) for effect in volunteer.tick(now=5.0 + RETRY_S - 0.1))
    assert Resync("nobody answers") in volunteer.tick(now=5.0 + RETRY_S)


def test_before_it_has_the_model_it_takes_no_work(leader: FakeLeader) -> None:
    volunteer = a_volunteer()
    volunteer.receive(FOUNDER, leader.delegation(), now=0.0)
    assert without_reports(volunteer.receive(FOUNDER, leader.plan(ME, ANN), now=0.0)) == []
    assert volunteer.state is State.SYNC


def test_it_reports_at_every_change_and_each_report_s_otherwise(volunteer: Volunteer, leader: FakeLeader) -> None:
    assert said(volunteer.tick(now=REPORT_S - 0.1), Report) == []
    assert len(said(volunteer.tick(now=REPORT_S), Report)) == 1
    (report,) = said(volunteer.receive(FOUNDER, leader.plan(ME, ANN, view=3), now=REPORT_S + 0.1), Report)
    assert (report.stage, report.round, report.view, report.of_steps) == (Stage.TRAINING, 1, 3, 5)


# -- a whole round


def test_a_round_from_the_plan_to_the_applied_commit(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    assert without_reports(volunteer.receive(FOUNDER, plan, now=1.0)) == [Train(plan, plan.seats[0])]
    assert stage_of(volunteer) is Stage.TRAINING

    effects = volunteer.trained(plan, WORK, now=2.0)
    promise = Contribution(0, 1, RUN, WORK.root, plan.seats[0].ranges, 70, 2.0)
    assert said(effects, Contribution)[0] == promise
    assert reduced(effects) == [Upload(ANN, WORK.root, (1,))]
    assert said(effects, Have) == [Have(1, 1, 0, ME, WORK.root)]
    assert stage_of(volunteer) is Stage.CONTRIBUTED

    effects = volunteer.received(ANN, digest("root b"), (0, 2), now=3.0)
    assert said(effects, Have) == [Have(1, 1, 0, ANN, digest("root b"))]

    effects = volunteer.receive(FOUNDER, leader.freeze(plan), now=4.0)
    assert reduced(effects) == [Fold((0, 2), (Weighed(ME, WORK.root, 70), Weighed(ANN, digest("root b"), 70)))]
    assert stage_of(volunteer) is Stage.REDUCING

    effects = volunteer.folded(plan, mine(plan), now=5.0)
    assert reduced(effects) == [Deliver(ANN, mine(plan)), Deliver(FOUNDER, mine(plan))]

    commit = leader.commit(plan)
    volunteer.receive(FOUNDER, Proposal(commit.block), now=6.0)
    assert without_reports(volunteer.holds((averages(plan)[1],), now=6.0)) == [], "round 1 is its founder's to vote on"
    assert without_reports(volunteer.receive(FOUNDER, commit, now=7.0)) == [Store(commit), Apply(commit)]
    effects = volunteer.applied(1, model_after(1), NO_COST, now=8.0)
    assert [message.model for message in said(effects, Applied)] == [model_after(1)]
    assert stage_of(volunteer) is Stage.WAITING

    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    volunteer.receive(FOUNDER, Proposal(leader.block(plan)), now=9.0)
    (vote,) = said(volunteer.holds(tuple(averages(plan).values()), now=9.0), Vote)
    assert vote.block == leader.block(plan).hash


def test_effects_of_a_commit_begin_with_its_storing_even_when_training_is_cut_short(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    plan = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, plan, now=1.0)
    commit = leader.commit(plan)
    volunteer.holds(commit.block.parts, now=2.0)
    effects = volunteer.receive(FOUNDER, commit, now=2.0)
    assert effects[0] == Store(commit)
    assert StopTraining(keep=False) in effects
    assert volunteer.state is State.WAIT
    assert volunteer.trained(plan, WORK, now=3.0) == [], "work for a committed round is of no use"


def test_the_promise_is_said_again_with_each_report_until_the_freeze(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    assert len(said(volunteer.tick(now=10.0), Contribution)) == 1
    volunteer.receive(FOUNDER, leader.freeze(plan), now=10.0)
    assert said(volunteer.tick(now=20.0), Contribution) == []


def test_who_comes_too_late_still_folds_for_the_others(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    volunteer.received(ANN, digest("root b"), (0, 2), now=3.0)
    effects = volunteer.receive(FOUNDER, leader.freeze(plan, leader.entries(plan)[1]), now=4.0)
    assert reduced(effects) == [Fold((0, 2), (Weighed(ANN, digest("root b"), 70),))]
    assert "too late" in volunteer.reason


def test_broken_uploads_and_deliveries_are_tried_again(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, plan, now=1.0)
    volunteer.trained(plan, WORK, now=2.0)
    volunteer.upload_failed(ANN, WORK.root, (1,), now=2.5)
    assert reduced(volunteer.tick(now=5.0)) == [Upload(ANN, WORK.root, (1,))]
    volunteer.uploaded(ANN, WORK.root, (1,), now=5.0)
    volunteer.received(ANN, digest("root b"), (0, 2), now=5.0)
    volunteer.receive(FOUNDER, leader.freeze(plan), now=5.0)
    volunteer.folded(plan, mine(plan), now=5.0)
    volunteer.delivered(ANN, error=None, now=6.0)
    volunteer.delivered(FOUNDER, error="broken", now=6.0)
    assert reduced(volunteer.tick(now=9.0)) == [Deliver(FOUNDER, mine(plan))]


# -- training that ends otherwise


def test_a_straggler_stops_at_train_s_and_keeps_what_it_did(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, plan, now=1.0)
    assert not any(isinstance(effect, StopTraining) for effect in volunteer.tick(now=1.0 + TRAIN_S - 0.1))
    assert volunteer.wake_at() <= 1.0 + TRAIN_S
    assert StopTraining(keep=True) in volunteer.tick(now=1.0 + TRAIN_S)
    assert not any(isinstance(effect, StopTraining) for effect in volunteer.tick(now=3 * TRAIN_S))
    part = Work(digest("root of six"), 6, 42, 2.5)
    (promise, *_) = said(volunteer.trained(plan, part, now=70.0), Contribution)
    assert (promise.ranges, promise.tokens, promise.root) == (((0, 6),), 42, digest("root of six"))


def test_who_finished_in_time_is_not_told_to_stop(volunteer: Volunteer, leader: FakeLeader) -> None:
    contributed(volunteer, leader.plan(ME, ANN))
    assert not any(isinstance(effect, StopTraining) for effect in volunteer.tick(now=10 * TRAIN_S))


def test_nothing_to_contribute_is_reported_as_waiting_under_that_plan(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN, view=2)
    volunteer.receive(FOUNDER, plan, now=1.0)
    (report,) = said(volunteer.not_trained(plan, "non-finite values", now=2.0), Report)
    assert (report.stage, report.round, report.view) == (Stage.WAITING, 1, 2)
    assert volunteer.reason == "non-finite values"
    assert volunteer.trained(plan, WORK, now=3.0) == []
    assert StopTraining(keep=True) not in volunteer.tick(now=2 * TRAIN_S)


def test_who_has_nothing_to_contribute_still_folds_and_takes_the_result(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    plan = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, plan, now=1.0)
    volunteer.not_trained(plan, "non-finite values", now=2.0)
    volunteer.received(ANN, digest("root b"), (0, 2), now=3.0)
    effects = volunteer.receive(FOUNDER, leader.freeze(plan, leader.entries(plan)[1]), now=4.0)
    assert reduced(effects) == [Fold((0, 2), (Weighed(ANN, digest("root b"), 70),))]
    round_done(volunteer, leader, plan)
    assert volunteer.follower.at_head


def test_work_on_samples_that_a_new_leader_gave_to_another_is_not_contributed(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    old = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, old, now=1.0)
    leader.term = 2
    new = leader.plan(ANN, ME)
    volunteer.receive(FOUNDER, leader.delegation(), now=2.0)
    seat = new.seat_of(ME)
    assert seat is not None
    assert seat != old.seat_of(ME)
    assert Train(new, seat) in volunteer.receive(FOUNDER, new, now=2.0)
    assert volunteer.trained(old, WORK, now=3.0) == []
    volunteer.not_trained(old, "stopped", now=3.0)
    assert stage_of(volunteer) is Stage.TRAINING
    assert said(volunteer.trained(new, WORK, now=4.0), Contribution) != []


# -- plans


def test_a_plan_from_one_who_does_not_lead_is_refused(volunteer: Volunteer, leader: FakeLeader) -> None:
    for said_ in (leader.plan(ME, ANN), leader.freeze(leader.plan(ME, ANN)), leader.standing(finished=True)):
        (refused,) = volunteer.receive(EVE, said_, now=1.0)
        assert isinstance(refused, Refused)
        assert (refused.sender, refused.reason) == (EVE, "not leader")
    assert volunteer.state is State.WAIT


@pytest.mark.parametrize(
    "message", [Have(1, 1, 0, ANN, bytes(32)), Contribution(0, 1, RUN, bytes(32), ((0, 1),), 1, 1.0)]
)
def test_what_is_said_to_leaders_is_refused(volunteer: Volunteer, message: Message) -> None:
    (refused,) = volunteer.receive(FOUNDER, message, now=1.0)
    assert isinstance(refused, Refused)


def test_plans_of_another_term_or_chain_or_that_are_older_change_nothing(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    replace = msgspec.structs.replace
    plan = leader.plan(ME, ANN, view=1)
    foreign = volunteer.receive(FOUNDER, replace(plan, head=digest("another chain")), now=1.0)
    assert [effect.reason for effect in foreign if isinstance(effect, Refused)] == ["foreign chain"]
    for other in (replace(plan, term=0), replace(plan, term=2)):
        assert without_reports(volunteer.receive(FOUNDER, other, now=1.0)) == []
    volunteer.receive(FOUNDER, plan, now=1.0)
    for other in (plan, replace(plan, view=0, owners=(ANN,) * 3)):
        assert without_reports(volunteer.receive(FOUNDER, other, now=1.0)) == []
    assert volunteer.plan == plan


def test_a_plan_from_ahead_makes_it_catch_up(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = msgspec.structs.replace(leader.plan(ME, ANN), round=5)
    assert CatchUp(FOUNDER, 0) in volunteer.receive(FOUNDER, plan, now=1.0)
    assert volunteer.state is State.WAIT


def test_a_new_view_with_the_same_seat_keeps_the_training(volunteer: Volunteer, leader: FakeLeader) -> None:
    volunteer.receive(FOUNDER, leader.plan(ME, ANN), now=1.0)
    again = leader.plan(ME, ANN, owners=(ANN, ANN, ANN), view=1)
    assert without_reports(volunteer.receive(FOUNDER, again, now=2.0)) == []
    assert stage_of(volunteer) is Stage.TRAINING
    effects = volunteer.trained(leader.plan(ME, ANN), WORK, now=3.0)
    assert reduced(effects) == [Upload(ANN, WORK.root, (0, 1, 2))]


def test_a_new_view_with_the_same_seat_keeps_the_work_and_sends_what_new_owners_lack(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    contributed(volunteer, leader.plan(ME, ANN, BOB))
    again = leader.plan(ME, ANN, BOB, owners=(BOB, ANN, ANN), view=1)
    effects = volunteer.receive(FOUNDER, again, now=3.0)
    assert not any(isinstance(effect, Train) for effect in effects)
    assert reduced(effects) == [Upload(ANN, WORK.root, (2,)), Upload(BOB, WORK.root, (0,))]
    assert said(effects, Contribution)[0].root == WORK.root
    assert stage_of(volunteer) is Stage.CONTRIBUTED


def test_a_freeze_or_a_fold_of_an_older_view_changes_nothing(volunteer: Volunteer, leader: FakeLeader) -> None:
    old = leader.plan(ME, ANN)
    contributed(volunteer, old)
    volunteer.received(ANN, digest("root b"), (0, 2), now=3.0)
    volunteer.receive(FOUNDER, leader.freeze(old), now=3.0)
    new = leader.plan(ME, ANN, view=1)
    volunteer.receive(FOUNDER, new, now=4.0)
    assert volunteer.folded(old, mine(old), now=4.0) == []
    assert reduced(volunteer.receive(FOUNDER, leader.freeze(old), now=4.0)) == []
    assert stage_of(volunteer) is Stage.CONTRIBUTED
    assert len(reduced(volunteer.receive(FOUNDER, leader.freeze(new), now=5.0))) == 1


def test_a_plan_without_a_seat_for_it_ends_its_training(volunteer: Volunteer, leader: FakeLeader) -> None:
    volunteer.receive(FOUNDER, leader.plan(ME, ANN), now=1.0)
    without = leader.plan(ANN, owners=(ANN,) * 3, view=1)
    assert StopTraining(keep=False) in volunteer.receive(FOUNDER, without, now=2.0)
    assert stage_of(volunteer) is Stage.WAITING


def test_a_model_that_is_of_no_use_stops_everything_until_another_is_here(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    block = msgspec.structs.replace(leader.block(plan), model_before=digest("the model of all others"))
    volunteer.holds(block.parts, now=3.0)
    effects = volunteer.receive(FOUNDER, Proposal(block), now=3.0)
    assert any(isinstance(effect, Resync) for effect in effects)
    assert said(effects, Report)[-1].stage == Stage.SYNCING
    assert not any(isinstance(effect, Resync) for effect in volunteer.tick(now=60.0)), "one is under way"


# -- leaving


def test_who_has_no_vote_and_no_work_leaves_at_once(volunteer: Volunteer) -> None:
    effects = volunteer.leave(now=1.0)
    assert effects[-1] == Leave("left in order")
    assert said(effects, Report)[-1].leaving
    assert volunteer.state is State.LEFT
    assert volunteer.tick(now=2.0) == [], "who has left says nothing more"


def test_leaving_while_training_finishes_the_round_and_waits_until_nobody_counts_on_its_vote(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    plan = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, plan, now=1.0)
    effects = volunteer.leave(now=1.5)
    assert said(effects, Report)[-1].leaving
    assert not any(isinstance(effect, Leave | StopTraining) for effect in effects)
    assert len(said(volunteer.trained(plan, WORK, now=2.0), Contribution)) > 0
    round_done(volunteer, leader, plan)
    assert volunteer.state is State.WAIT, "it has a vote in the next round"
    commit = leader.departures()
    assert Store(commit) in volunteer.receive(FOUNDER, commit, now=4.0)
    effects = volunteer.applied(2, model_after(1), NO_COST, now=4.0)
    assert effects[-1] == Leave("left in order")
    assert said(effects, Applied) != [], "what it applied is said before it goes"


def test_when_the_coordinator_is_silent_one_leaves_without_a_goodbye(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, plan, now=1.0)
    volunteer.leave(now=2.0)
    assert volunteer.coordinator_silent_s(now=10.0) is None
    assert not any(isinstance(effect, Leave) for effect in volunteer.tick(now=10.0))
    assert volunteer.coordinator_silent_s(now=11.5) == 10.5
    effects = volunteer.tick(now=11.5)
    assert StopTraining(keep=False) in effects
    assert isinstance(effects[-1], Leave)


def test_a_silent_coordinator_alone_makes_nobody_leave(volunteer: Volunteer) -> None:
    assert not any(isinstance(effect, Leave) for effect in volunteer.tick(now=3600.0))
    assert volunteer.state is State.WAIT


def test_a_finished_run_is_left_once_its_last_round_is_applied(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    commit = leader.commit(plan)
    volunteer.holds(commit.block.parts, now=3.0)
    volunteer.receive(FOUNDER, commit, now=3.0)
    effects = volunteer.receive(FOUNDER, leader.standing(finished=True), now=3.0)
    assert not any(isinstance(effect, Leave) for effect in effects)
    effects = volunteer.applied(1, model_after(1), NO_COST, now=4.0)
    assert effects[-1] == Leave("the run is finished")
    assert said(effects, Applied) != []
