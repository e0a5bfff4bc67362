"""A volunteer: from its first model to its goodbye, as one that follows and as the one that leads."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dugnad.configs.recipe import load
from dugnad.coordinator import ranges
from dugnad.coordinator.awaited import SETTLE_S
from dugnad.coordinator.effects import Apply, CatchUp, Fetch, Promises, Refused, Remember, Resync, Rewind, Send, Store
from dugnad.coordinator.follower import RETRY_S, Follower
from dugnad.coordinator.ledger import Head, Ledger
from dugnad.coordinator.membership import Stage
from dugnad.coordinator.messages import (
    PRECOMMIT,
    PREVOTE,
    Applied,
    Block,
    Commit,
    Contribution,
    Entry,
    Freeze,
    Have,
    Lock,
    Plan,
    Proposal,
    Report,
    Seat,
    Standing,
    ViewChange,
    Vote,
)
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.rounds import Leader, Phase
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Abilities, Reach
from dugnad.dht.wire import Message
from dugnad.optim.plan import assign_parts
from dugnad.optim.reduce import Deliver, Drop, Fold, Upload, Weighed
from dugnad.peer.lifecycle import (
    GOODBYE_S,
    Effect,
    Leave,
    Reduce,
    State,
    StopTraining,
    Train,
    Volunteer,
    Work,
)
from tests.unit.chains import (
    CHARTER,
    FOUNDER,
    NO_COST,
    RUN,
    SEAT,
    FakeSigner,
    a_block,
    a_ledger,
    an_entry,
    certify,
    delegation,
    digest,
    disk_of,
    extend,
    ledger_of,
    locked,
    model_after,
    new_view,
    pledged,
)

ME, ANN, BOB, EVE = PeerId("a"), PeerId("b"), PeerId("c"), PeerId("eve")
REPORT_S, SILENCE_S, TRAIN_S = 2.0, 10.0, 60.0
PATIENCE = Patience(silence_s=SILENCE_S, round_s=300.0, vote_s=100.0)
WORK = Work(digest("root a"), 10, 70, 2.0)
OWNERS = (ME, ANN, ME)
TINY = load("tiny-books")
RECIPE = dataclasses.replace(
    TINY,
    rounds=dataclasses.replace(TINY.rounds, min_peers=2, silence_s=SILENCE_S, report_s=REPORT_S),
    model=dataclasses.replace(TINY.model, context=7),
)
replace = msgspec.structs.replace
M = TypeVar("M", bound=Message)


@dataclass
class FakeLeader:
    """Says what a leader would: every seat does ten samples, and every round counts all who have one."""

    ledger: Ledger = field(default_factory=a_ledger)
    seat: Delegation | None = SEAT

    def plan(self, *members: PeerId, owners: tuple[PeerId, ...] = OWNERS, view: int = 0, attempt: int = 1) -> Plan:
        head = self.ledger.head
        seats = tuple(
            Seat(peer, 5, ((head.cursor + 10 * k, head.cursor + 10 * k + 10),), ()) for k, peer in enumerate(members)
        )
        return Plan(
            head.epoch, head.round + 1, view, attempt, head.hash, head.global_step,
            tuple(sorted(seats, key=lambda seat: seat.peer)), owners, owners[1:] + owners[:1], TRAIN_S, 30.0,
        )  # fmt: skip

    def entries(self, plan: Plan) -> tuple[Entry, ...]:
        return tuple(an_entry(seat.peer, *seat.ranges) for seat in plan.seats)

    def freeze(self, plan: Plan, *entries: Entry) -> Freeze:
        return Freeze(*plan.order, entries or self.entries(plan))

    def block(self, plan: Plan) -> Block:
        block = a_block(self.ledger.head, *self.entries(plan), seat=self.seat)
        return replace(block, parts=tuple(averages(plan).values()))

    def commit(self, plan: Plan) -> Commit:
        commit = certify(self.block(plan), self.ledger.head.voters)
        self.ledger.append(commit)
        return commit

    def departures(self) -> Commit:
        """A block that lets everyone go."""
        return extend(self.ledger)

    def standing(self, phase: str = "idle", *, finished: bool = False, view: int = 0) -> Standing:
        head = self.ledger.head
        return Standing(head.epoch, head.round, head.hash, view, phase, "", finished, 0, None)


def averages(plan: Plan) -> dict[int, bytes]:
    return {part: digest(f"average {part} of {plan.order}") for part in range(len(plan.owners))}


def mine(plan: Plan) -> dict[int, bytes]:
    return {part: average for part, average in averages(plan).items() if plan.owners[part] == ME}


def a_volunteer(
    *commits: Commit, total_steps: int = 600, promises: Promises | None = None, held: Iterable[bytes] = ()
) -> Volunteer:
    """One that has just started, with these commits, promises and blobs on its disk."""
    signer = FakeSigner(ME)
    follower = Follower(signer, Ledger(CHARTER, signer), PATIENCE, disk_of(ME))
    follower.restore(commits, held, promises)
    rounds = dataclasses.replace(RECIPE.rounds, total_steps=total_steps)
    leader = Leader(
        follower, signer, dataclasses.replace(RECIPE, rounds=rounds), 3, assign_parts,
        started=1000, known_plan=lambda: made.plan,
    )  # fmt: skip
    made = Volunteer(ME, leader, num_parts=3, report_s=REPORT_S)
    made.abilities = Abilities(("here",), Reach.OPEN, 5e6)
    return made


def said(effects: Iterable[Effect], kind: type[M], *, to: PeerId = FOUNDER) -> list[M]:
    """The messages of one kind that are sent to that peer alone: the leader, unless told."""
    return [e.message for e in effects if isinstance(e, Send) and e.to == (to,) and isinstance(e.message, kind)]


def sent(effects: Iterable[Effect], kind: type[M]) -> list[M]:
    """The messages of one kind, whoever gets them."""
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def without_reports(effects: Iterable[Effect]) -> list[Effect]:
    return [e for e in effects if not (isinstance(e, Send) and isinstance(e.message, Report))]


def stage_of(volunteer: Volunteer) -> Stage:
    return volunteer.stage


def reduced(effects: Iterable[Effect]) -> list[object]:
    return [effect.effect for effect in effects if isinstance(effect, Reduce)]


@pytest.fixture
def leader() -> FakeLeader:
    return FakeLeader()


@pytest.fixture
def volunteer() -> Volunteer:
    """One in sync with round 0, waiting for a plan."""
    return in_sync(a_volunteer())


def in_sync(volunteer: Volunteer) -> Volunteer:
    """It has asked for the model of the head, and got it."""
    volunteer.tick(now=0.0)
    round_ = volunteer.follower.ledger.head.round
    volunteer.synced(round_, model_after(round_), (), now=0.0)
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


def test_it_asks_for_the_model_at_once_and_waits_once_it_has_it() -> None:
    volunteer = a_volunteer()
    assert volunteer.wake_at() <= 0.0
    effects = volunteer.tick(now=0.0)
    assert [effect for effect in effects if isinstance(effect, Resync)] != []
    (report,) = said(effects, Report)
    assert report.stage == Stage.SYNCING
    assert [effect for effect in volunteer.tick(now=4.0) if isinstance(effect, Resync)] == [], "one is under way"
    (report,) = said(volunteer.synced(0, model_after(0), (), now=5.0), Report)
    assert (report.stage, report.in_view, report.head) == (Stage.WAITING, 0, RUN)
    assert (report.addresses, report.reach, report.uplink) == (("here",), Reach.OPEN, 5e6)
    assert (report.trains, report.incarnation) == (True, disk_of(ME))
    assert volunteer.state is State.WAIT


def test_a_model_that_could_not_be_had_is_asked_for_again_after_a_while() -> None:
    volunteer = a_volunteer()
    volunteer.tick(now=0.0)
    volunteer.sync_failed("nobody answers", now=5.0)
    assert not any(isinstance(effect, Resync) for effect in volunteer.tick(now=5.0 + RETRY_S - 0.1))
    assert Resync("nobody answers") in volunteer.tick(now=5.0 + RETRY_S)


def test_before_it_has_the_model_it_takes_no_work(leader: FakeLeader) -> None:
    volunteer = a_volunteer()
    assert without_reports(volunteer.receive(FOUNDER, leader.plan(ME, ANN), now=0.0)) == []
    assert volunteer.state is State.SYNC


def test_it_reports_at_every_change_and_each_report_s_otherwise(volunteer: Volunteer, leader: FakeLeader) -> None:
    assert said(volunteer.tick(now=REPORT_S - 0.1), Report) == []
    assert len(said(volunteer.tick(now=REPORT_S), Report)) == 1
    (report,) = said(volunteer.receive(FOUNDER, leader.plan(ME, ANN, attempt=3), now=REPORT_S + 0.1), Report)
    assert (report.stage, report.of_steps) == (Stage.TRAINING, 5)
    assert (report.round, report.view, report.attempt) == (1, 0, 3)


# -- a whole round


def test_a_round_from_the_plan_to_the_applied_commit(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    assert without_reports(volunteer.receive(FOUNDER, plan, now=1.0)) == [Train(plan, plan.seats[0])]
    assert stage_of(volunteer) is Stage.TRAINING

    effects = volunteer.trained(plan, WORK, now=2.0)
    promise = Contribution(0, 1, RUN, WORK.root, plan.seats[0].ranges, 70, 2.0)
    assert said(effects, Contribution)[0] == promise
    assert reduced(effects) == [Upload(ANN, WORK.root, (1,))]
    assert said(effects, Have) == [Have(1, 0, 1, ((ME, WORK.root),))]
    assert stage_of(volunteer) is Stage.CONTRIBUTED

    effects = volunteer.received(ANN, digest("root b"), (0, 2), now=3.0)
    assert said(effects, Have) == [Have(1, 0, 1, ((ANN, digest("root b")),))]

    effects = volunteer.receive(FOUNDER, leader.freeze(plan), now=4.0)
    assert reduced(effects) == [Fold((0, 2), (Weighed(ME, WORK.root, 70), Weighed(ANN, digest("root b"), 70)))]
    assert stage_of(volunteer) is Stage.REDUCING

    effects = volunteer.folded(plan, mine(plan), now=5.0)
    assert reduced(effects) == [Deliver(ANN, mine(plan)), Deliver(FOUNDER, mine(plan))]

    commit = leader.commit(plan)
    volunteer.receive(FOUNDER, Proposal(0, commit.block), now=6.0)
    assert without_reports(volunteer.holds((averages(plan)[1],), now=6.0)) == [], "round 1 is its founder's to vote on"
    assert without_reports(volunteer.receive(FOUNDER, commit, now=7.0)) == [Store(commit), Apply(commit)]
    effects = volunteer.applied(1, model_after(1), NO_COST, now=8.0)
    assert [message.model for message in said(effects, Applied)] == [model_after(1)]
    assert stage_of(volunteer) is Stage.WAITING


def test_its_vote_in_both_phases_is_remembered_before_it_is_said(volunteer: Volunteer, leader: FakeLeader) -> None:
    first = leader.plan(ME, ANN)
    contributed(volunteer, first)
    round_done(volunteer, leader, first)
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    block = leader.block(plan)
    assert sent(volunteer.receive(FOUNDER, Proposal(0, block), now=4.0), Vote) == [], "its bytes are not all here"
    kept, vote, *_ = volunteer.holds(block.parts, now=4.0)
    assert kept == Remember(Promises(0, 2, 0, Proposal(0, block)))
    assert [(v.phase, v.block) for v in said([vote], Vote)] == [(PREVOTE, block.hash)]
    lock = locked(block, [ME, ANN])
    kept, vote, *_ = volunteer.receive(FOUNDER, lock, now=5.0)
    assert kept == Remember(Promises(0, 2, 0, Proposal(0, block), lock))
    assert [(v.phase, v.block) for v in said([vote], Vote)] == [(PRECOMMIT, block.hash)]


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
    assert len(said(volunteer.tick(now=6.0), Contribution)) == 1
    volunteer.receive(FOUNDER, leader.freeze(plan), now=6.0)
    assert said(volunteer.tick(now=9.0), Contribution) == []


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
    volunteer.delivered(plan, ANN, error=None, now=6.0)
    volunteer.delivered(plan, FOUNDER, error="broken", now=6.0)
    assert reduced(volunteer.tick(now=9.0)) == [Deliver(FOUNDER, mine(plan))]


def test_damage_found_in_applying_brings_the_part_from_others_and_the_round_is_applied(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    commit = leader.commit(plan)
    volunteer.holds(commit.block.parts, now=3.0)
    assert Apply(commit) in volunteer.receive(FOUNDER, commit, now=3.0)
    (fetch,) = [effect for effect in volunteer.damaged(commit.block.parts[:1], now=4.0) if isinstance(effect, Fetch)]
    assert fetch.wanted == ((0, commit.block.parts[0]),)
    assert Apply(commit) in volunteer.holds(commit.block.parts[:1], now=5.0)
    volunteer.applied(1, model_after(1), NO_COST, now=6.0)
    assert volunteer.follower.at_head


# -- training that ends otherwise


def test_a_straggler_stops_at_train_s_and_keeps_what_it_did(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, plan, now=1.0)
    assert not any(isinstance(effect, StopTraining) for effect in volunteer.tick(now=1.0 + TRAIN_S - 0.1))
    assert volunteer.wake_at() <= 1.0 + TRAIN_S
    assert StopTraining(keep=True) in volunteer.tick(now=1.0 + TRAIN_S)
    assert not any(isinstance(effect, StopTraining) for effect in volunteer.tick(now=3 * TRAIN_S))
    part = Work(digest("root of six"), 6, 42, 2.5)
    (promise, *_) = said(volunteer.trained(plan, part, now=3 * TRAIN_S), Contribution)
    assert (promise.ranges, promise.tokens, promise.root) == (((0, 6),), 42, digest("root of six"))


def test_who_finished_in_time_is_not_told_to_stop(volunteer: Volunteer, leader: FakeLeader) -> None:
    contributed(volunteer, leader.plan(ME, ANN))
    assert not any(isinstance(effect, StopTraining) for effect in volunteer.tick(now=10 * TRAIN_S))


def test_nothing_to_contribute_is_reported_as_waiting_under_that_plan(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN, attempt=2)
    volunteer.receive(FOUNDER, plan, now=1.0)
    (report,) = said(volunteer.not_trained(plan, "non-finite values", now=2.0), Report)
    assert (report.stage, report.round, report.attempt) == (Stage.WAITING, 1, 2)
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


# -- plans


def test_a_plan_or_a_freeze_from_one_who_does_not_lead_is_refused(volunteer: Volunteer, leader: FakeLeader) -> None:
    for said_ in (leader.plan(ME, ANN), leader.freeze(leader.plan(ME, ANN))):
        (refused,) = volunteer.receive(EVE, said_, now=1.0)
        assert isinstance(refused, Refused)
        assert (refused.sender, refused.reason) == (EVE, "not leader")
    assert volunteer.state is State.WAIT


def test_who_does_not_lead_is_not_believed_that_the_run_is_finished(volunteer: Volunteer, leader: FakeLeader) -> None:
    volunteer.receive(EVE, leader.standing(finished=True), now=1.0)
    assert volunteer.standing is None
    volunteer.receive(FOUNDER, leader.standing(), now=1.0)
    assert volunteer.standing == leader.standing()


def test_the_loss_that_was_measured_last_is_known_while_a_leader_measures_none(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    measured = msgspec.structs.replace(leader.standing(), val_round=3, val_loss=2.5)
    for said in (measured, leader.standing("gather")):
        volunteer.receive(FOUNDER, said, now=1.0)
    assert volunteer.standing == msgspec.structs.replace(leader.standing("gather"), val_round=3, val_loss=2.5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"owners": (ME, ANN)}, "it has owners for 2 of 3 parts"),
        ({"owners": (ME, ANN, EVE)}, "someone owns a part without a seat"),
        ({"seats": "backwards"}, "its seats are not in peer-id order"),
        ({"seats": "doubled"}, "its seats are not in peer-id order"),
    ],
)
def test_a_plan_that_nobody_could_follow_is_refused_and_says_why(
    volunteer: Volunteer, leader: FakeLeader, change: dict[str, object], why: str
) -> None:
    plan = leader.plan(ME, ANN)
    orders = {"backwards": plan.seats[::-1], "doubled": (plan.seats[0], *plan.seats)}
    changed = {key: orders.get(value, value) if isinstance(value, str) else value for key, value in change.items()}
    (refused,) = volunteer.receive(FOUNDER, replace(plan, **changed), now=1.0)
    assert isinstance(refused, Refused)
    assert (refused.reason, refused.detail) == ("invalid plan", why)
    assert volunteer.plan is None


def test_plans_of_another_view_or_chain_or_that_are_older_change_nothing(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    plan = leader.plan(ME, ANN, attempt=3)
    foreign = volunteer.receive(FOUNDER, replace(plan, head=digest("another chain")), now=1.0)
    assert [effect.reason for effect in foreign if isinstance(effect, Refused)] == ["foreign chain"]
    assert without_reports(volunteer.receive(FOUNDER, replace(plan, view=1), now=1.0)) == []
    volunteer.receive(FOUNDER, plan, now=1.0)
    for other in (plan, replace(plan, attempt=2, owners=(ANN,) * 3)):
        assert without_reports(volunteer.receive(FOUNDER, other, now=1.0)) == []
    assert volunteer.plan == plan


def test_a_plan_from_ahead_makes_it_catch_up(volunteer: Volunteer, leader: FakeLeader) -> None:
    assert CatchUp(FOUNDER, (0, 0)) in volunteer.receive(FOUNDER, replace(leader.plan(ME, ANN), round=5), now=1.0)
    assert volunteer.state is State.WAIT


def test_another_attempt_with_the_same_seat_keeps_the_training(volunteer: Volunteer, leader: FakeLeader) -> None:
    volunteer.receive(FOUNDER, leader.plan(ME, ANN), now=1.0)
    again = leader.plan(ME, ANN, owners=(ANN, ANN, ANN), attempt=2)
    assert without_reports(volunteer.receive(FOUNDER, again, now=2.0)) == []
    assert stage_of(volunteer) is Stage.TRAINING
    effects = volunteer.trained(leader.plan(ME, ANN), WORK, now=3.0)
    assert reduced(effects) == [Upload(ANN, WORK.root, (0, 1, 2))]


def test_another_attempt_with_the_same_seat_keeps_the_work_and_sends_what_new_owners_lack(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    contributed(volunteer, leader.plan(ME, ANN, BOB))
    again = leader.plan(ME, ANN, BOB, owners=(BOB, ANN, ANN), attempt=2)
    effects = volunteer.receive(FOUNDER, again, now=3.0)
    assert not any(isinstance(effect, Train) for effect in effects)
    assert reduced(effects) == [Upload(ANN, WORK.root, (2,)), Upload(BOB, WORK.root, (0,))]
    assert said(effects, Contribution)[0].root == WORK.root
    assert stage_of(volunteer) is Stage.CONTRIBUTED


def test_who_missed_an_attempt_offers_all_of_its_work_again(volunteer: Volunteer, leader: FakeLeader) -> None:
    contributed(volunteer, leader.plan(ME, ANN))
    assert reduced(volunteer.receive(FOUNDER, leader.plan(ME, ANN, attempt=2), now=3.0)) == []
    effects = volunteer.receive(FOUNDER, leader.plan(ME, ANN, attempt=4), now=4.0)
    assert reduced(effects) == [Upload(ANN, WORK.root, (1,))], "its owner may have come and gone in the third"


def test_a_freeze_or_a_fold_of_an_older_attempt_changes_nothing(volunteer: Volunteer, leader: FakeLeader) -> None:
    old = leader.plan(ME, ANN)
    contributed(volunteer, old)
    volunteer.received(ANN, digest("root b"), (0, 2), now=3.0)
    volunteer.receive(FOUNDER, leader.freeze(old), now=3.0)
    new = leader.plan(ME, ANN, attempt=2)
    volunteer.receive(FOUNDER, new, now=4.0)
    assert volunteer.folded(old, mine(old), now=4.0) == []
    assert reduced(volunteer.receive(FOUNDER, leader.freeze(old), now=4.0)) == []
    assert stage_of(volunteer) is Stage.CONTRIBUTED
    assert len(reduced(volunteer.receive(FOUNDER, leader.freeze(new), now=5.0))) == 1


def test_averages_of_an_older_attempt_are_not_delivered_as_those_of_the_new_one(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    old, new = leader.plan(ME, ANN), leader.plan(ME, ANN, attempt=2)
    contributed(volunteer, old)
    volunteer.received(ANN, digest("root b"), (0, 2), now=3.0)
    for plan in (old, new):
        volunteer.receive(FOUNDER, plan, now=3.0)
        assert any(isinstance(e, Fold) for e in reduced(volunteer.receive(FOUNDER, leader.freeze(plan), now=3.0)))
    assert volunteer.folded(old, mine(old), now=4.0) == [], "another set may have been frozen since"
    assert reduced(volunteer.folded(new, mine(new), now=5.0))[0] == Deliver(ANN, mine(new))


def test_a_delivery_of_an_older_attempt_that_ends_late_says_nothing_of_the_one_under_way(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    old, new = leader.plan(ME, ANN), leader.plan(ME, ANN, attempt=2)
    contributed(volunteer, old)
    volunteer.uploaded(ANN, WORK.root, (1,), now=3.0)
    volunteer.received(ANN, digest("root b"), (0, 2), now=3.0)
    for plan in (old, new):
        volunteer.receive(FOUNDER, plan, now=3.0)
        volunteer.receive(FOUNDER, leader.freeze(plan), now=3.0)
        assert Deliver(FOUNDER, mine(plan)) in reduced(volunteer.folded(plan, mine(plan), now=3.0))
    volunteer.delivered(old, ANN, error=None, now=4.0)
    volunteer.delivered(old, FOUNDER, error="refused", now=4.0)
    assert reduced(volunteer.tick(now=9.0)) == [], "both are still under way"
    volunteer.delivered(new, ANN, error="broken", now=10.0)
    assert reduced(volunteer.tick(now=15.0)) == [Deliver(ANN, mine(new))]


def test_work_on_other_samples_than_those_of_the_new_seat_is_forgotten_everywhere(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    contributed(volunteer, leader.plan(ME, ANN))
    volunteer.received(ANN, digest("root b"), (0, 2), now=2.0)
    again = leader.plan(ANN, ME, attempt=2)
    effects = volunteer.receive(FOUNDER, again, now=3.0)
    assert reduced(effects) == [Drop(ME, WORK.root)]
    assert said(effects, Have) == [Have(*again.order, ((ANN, digest("root b")),))], "what others sent stays"
    assert said(effects, Contribution) == []


def test_a_frozen_set_out_of_order_is_refused_since_sums_would_differ(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    effects = volunteer.receive(FOUNDER, leader.freeze(plan, *leader.entries(plan)[::-1]), now=3.0)
    assert [effect.reason for effect in effects if isinstance(effect, Refused)] == ["invalid freeze"]
    assert stage_of(volunteer) is Stage.CONTRIBUTED


def test_a_plan_without_a_seat_for_it_ends_its_training(volunteer: Volunteer, leader: FakeLeader) -> None:
    volunteer.receive(FOUNDER, leader.plan(ME, ANN), now=1.0)
    without = leader.plan(ANN, owners=(ANN,) * 3, attempt=2)
    assert StopTraining(keep=False) in volunteer.receive(FOUNDER, without, now=2.0)
    assert stage_of(volunteer) is Stage.WAITING


def test_a_model_that_is_of_no_use_stops_everything_until_another_is_here(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    block = replace(leader.block(plan), model_before=digest("the model of all others"))
    volunteer.holds(block.parts, now=3.0)
    effects = volunteer.receive(FOUNDER, Proposal(0, block), now=3.0)
    assert any(isinstance(effect, Resync) for effect in effects)
    assert said(effects, Report)[-1].stage == Stage.SYNCING
    assert not any(isinstance(effect, Resync) for effect in volunteer.tick(now=60.0)), "one is under way"


def test_with_the_model_goes_the_training_that_began_from_it(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, plan, now=1.0)
    block = replace(leader.block(plan), model_before=digest("the model of all others"))
    volunteer.holds(block.parts, now=3.0)
    assert StopTraining(keep=False) in volunteer.receive(FOUNDER, Proposal(0, block), now=3.0)
    assert volunteer.trained(plan, WORK, now=4.0) == []


def test_what_was_promised_of_a_model_of_no_use_is_said_no_more(volunteer: Volunteer, leader: FakeLeader) -> None:
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    block = replace(leader.block(plan), model_before=digest("the model of all others"))
    volunteer.holds(block.parts, now=3.0)
    assert said(volunteer.receive(FOUNDER, Proposal(0, block), now=3.0), Contribution) == []
    assert said(volunteer.tick(now=6.0), Contribution) == []


# -- what is wanted of others


def test_part_bytes_are_taken_only_of_those_with_a_seat_in_the_round_under_way(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    root = digest("root b")
    assert not volunteer.takes(ANN, 1, root), "no round is under way"
    volunteer.receive(FOUNDER, leader.plan(ME, ANN), now=1.0)
    assert volunteer.takes(ANN, 1, root)
    assert not volunteer.takes(ANN, 2, root)
    assert not volunteer.takes(EVE, 1, root)
    volunteer.received(ANN, root, (0,), now=1.0)
    volunteer.received(ANN, digest("another"), (0,), now=1.0)
    assert not volunteer.takes(ANN, 1, digest("a third")), "a stranger can't fill our disk"


# -- another leader


def voters() -> tuple[list[Commit], list[PeerId]]:
    """A round after which the founder, who leads, and a, b, c vote; and who leads the next, view by view."""
    commit = extend(a_ledger(), *(an_entry(peer, (10 * k, 10 * k + 10)) for k, peer in enumerate("abc")))
    head = ledger_of([commit]).head
    return [commit], [head.leader(view) for view in range(4)]


FIRST, ORDER = voters()
HEAD = ledger_of(FIRST).head
MY_VIEW = ORDER.index(ME)


def a_new_view(view: int, lock: Lock | None = None) -> Message:
    """The proof, by all but the coordinator, that a view has begun."""
    others = [peer for peer in ORDER if peer != FOUNDER]
    return new_view(pledged(peer, HEAD, view, lock) for peer in others)


def waiting(view: int = 0) -> Volunteer:
    """A voter in sync with round 1, in that view."""
    volunteer = in_sync(a_volunteer(*FIRST))
    if view:
        volunteer.receive(ORDER[view], a_new_view(view), now=0.0)
    return volunteer


def test_a_silent_leader_is_given_up_and_work_under_way_goes_on() -> None:
    volunteer, leader = waiting(), FakeLeader(ledger_of(FIRST))
    plan = leader.plan(ME, ANN)
    volunteer.receive(FOUNDER, plan, now=0.0)
    effects = [effect for second in range(1, 11) for effect in volunteer.tick(now=float(second))]
    assert [change.view for change in sent(effects, ViewChange)] == [1]
    assert not any(isinstance(effect, StopTraining) for effect in effects)
    assert "coasting" in volunteer.why(now=11.0)
    assert sent(volunteer.trained(plan, WORK, now=11.0), Contribution) != []
    assert "work is kept" in volunteer.why(now=11.0)
    assert volunteer.follower.model == model_after(1), "the shared model stays where it is"


def test_work_is_kept_for_the_next_leader_who_gives_the_same_seat_and_is_promised_to_it() -> None:
    view = 1 if ORDER[1] != ME else 2
    volunteer, leader = waiting(), FakeLeader(ledger_of(FIRST))
    contributed(volunteer, leader.plan(ME, ANN))
    volunteer.receive(ORDER[view], a_new_view(view), now=3.0)
    effects = volunteer.receive(ORDER[view], leader.plan(ME, ANN, view=view, attempt=9), now=4.0)
    assert not any(isinstance(effect, Train) for effect in effects)
    assert said(effects, Contribution, to=ORDER[view])[0].root == WORK.root
    assert reduced(effects)[0] == Upload(ANN, WORK.root, (1,)), "who takes over knows of no bytes that came before"


def test_work_on_samples_that_a_new_leader_gave_to_another_is_not_contributed() -> None:
    view = 1 if ORDER[1] != ME else 2
    volunteer, leader = waiting(), FakeLeader(ledger_of(FIRST))
    old, new = leader.plan(ME, ANN), leader.plan(ANN, ME, view=view)
    volunteer.receive(FOUNDER, old, now=1.0)
    volunteer.receive(ORDER[view], a_new_view(view), now=2.0)
    seat = new.seat_of(ME)
    assert seat is not None
    assert seat != old.seat_of(ME)
    assert Train(new, seat) in volunteer.receive(ORDER[view], new, now=2.0)
    assert volunteer.trained(old, WORK, now=3.0) == []
    volunteer.not_trained(old, "stopped", now=3.0)
    assert stage_of(volunteer) is Stage.TRAINING
    assert sent(volunteer.trained(new, WORK, now=4.0), Contribution) != []


def others_ready(volunteer: Volunteer, *peers: PeerId, now: float, **changed: object) -> list[Effect]:
    """These peers report to it that they stand at its head and wait."""
    follower = volunteer.follower
    head, out = follower.ledger.head, list[Effect]()
    for peer in peers:
        report = Report(
            epoch=head.epoch, head_round=head.round, head=head.hash, in_view=follower.view, incarnation=disk_of(peer),
            trains=True, stage=Stage.WAITING, round=0, view=0, attempt=0, step=0, of_steps=0, leaving=False,
            reach=Reach.OPEN, uplink=5e6, addresses=(),
        )  # fmt: skip
        out += volunteer.receive(peer, replace(report, **changed), now=now)
    return out


def leading() -> tuple[Volunteer, Plan, list[Effect]]:
    """It leads in its view, and has planned the round for itself and b."""
    volunteer = waiting(MY_VIEW)
    effects = others_ready(volunteer, ANN, now=0.0)
    for second in range(1, int(SETTLE_S) + 2):
        effects += volunteer.tick(now=float(second))
        effects += others_ready(volunteer, ANN, now=float(second))
    plan = volunteer.leader.plan
    assert plan is not None
    return volunteer, plan, effects


def test_when_it_is_its_turn_it_leads_and_works_and_what_it_says_to_itself_stays_here() -> None:
    volunteer, plan, effects = leading()
    now = SETTLE_S + 2
    assert plan.members == (ME, ANN)
    assert volunteer.plan == plan
    assert Train(plan, plan.seats[0]) in effects
    samples = ranges.count(plan.seats[0].ranges)
    effects += volunteer.trained(plan, Work(digest("root a"), samples, 7 * samples, 2.0), now=now)
    theirs, seat = digest("root b"), plan.seats[1]
    promise = Contribution(0, 2, HEAD.hash, theirs, seat.ranges, 7 * ranges.count(seat.ranges), 2.0)
    effects += volunteer.receive(ANN, promise, now=now)
    effects += volunteer.received(ANN, theirs, tuple(k for k, who in enumerate(plan.owners) if who == ME), now=now)
    effects += volunteer.receive(ANN, Have(*plan.order, ((ME, digest("root a")), (ANN, theirs))), now=now)
    assert volunteer.leader.phase is Phase.REDUCE
    assert any(isinstance(effect, Fold) for effect in reduced(effects)), "it folds its own parts of its own freeze"
    effects += volunteer.folded(plan, mine(plan), now=now)
    rest = {part: average for part, average in averages(plan).items() if plan.owners[part] == ANN}
    effects += volunteer.result(ANN, plan.order, rest, now=now)
    (proposal, *_) = sent(effects, Proposal)
    assert proposal.block.parts == tuple(averages(plan).values())
    assert any(isinstance(e, Remember) and e.promises.prevoted == proposal for e in effects), "its own prevote"
    assert all(ME not in effect.to for effect in effects if isinstance(effect, Send))


def test_a_lost_lead_is_laid_down_and_it_follows() -> None:
    volunteer, _, _ = leading()
    later = next(view for view in range(MY_VIEW + 1, 8) if ORDER[view % 4] not in (ME, FOUNDER))
    volunteer.receive(ORDER[later % 4], a_new_view(later), now=9.0)
    assert volunteer.leader.phase is Phase.FOLLOWING
    assert volunteer.stage is Stage.TRAINING, "its interval goes on: the next leader may keep the seat"


def test_while_the_coordinator_is_away_it_says_for_how_long() -> None:
    volunteer = waiting()
    volunteer.receive(FOUNDER, FakeLeader(ledger_of(FIRST)).standing(), now=1.0)
    assert volunteer.coordinator_gone_s(now=5.0) is None
    assert volunteer.coordinator_gone_s(now=1.0 + SILENCE_S) == SILENCE_S
    without = replace(a_block(HEAD, an_entry("a", (30, 40)), seat=None), model_before=model_after(1))
    commit = certify(without, HEAD.voters)
    volunteer.holds(commit.block.parts, now=20.0)
    volunteer.receive(ANN, commit, now=20.0)
    assert volunteer.coordinator_gone_s(now=30.0) == 29.0
    volunteer.receive(FOUNDER, delegation(FOUNDER, 2), now=40.0)
    assert volunteer.coordinator_gone_s(now=40.0) == 0.0, "it is back, and not named yet"


# -- leaving


def left(effects: Iterable[Effect]) -> list[str]:
    return [effect.reason for effect in effects if isinstance(effect, Leave)]


def test_who_has_no_vote_and_no_work_leaves_at_once(volunteer: Volunteer) -> None:
    effects = volunteer.leave(now=1.0)
    assert effects[-1] == Leave("left in order")
    assert said(effects, Report)[-1].leaving
    assert volunteer.state is State.LEFT
    assert volunteer.tick(now=2.0) == [], "who has left says nothing more"
    assert volunteer.wake_at() == float("inf")


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


def test_who_has_no_vote_does_not_wait_for_a_leader_that_is_silent(volunteer: Volunteer, leader: FakeLeader) -> None:
    volunteer.receive(FOUNDER, leader.plan(ME, ANN), now=1.0)
    volunteer.leave(now=2.0)
    for second in range(2, 11):
        assert left(volunteer.tick(now=float(second))) == []
    effects = volunteer.tick(now=11.0)
    assert effects[-2:] == [StopTraining(keep=False), Leave("left in order")]


def test_a_voter_goes_without_a_goodbye_only_when_nobody_has_led_for_long() -> None:
    volunteer = waiting()
    volunteer.leave(now=0.0)
    gone = [second for second in range(1, 60) if left(volunteer.tick(now=float(second)))]
    assert gone == [3 * GOODBYE_S]


def test_a_voter_that_asks_to_go_in_the_midst_of_a_silence_waits_for_a_leader_a_while() -> None:
    volunteer = waiting()
    for second in range(1, 100):
        volunteer.tick(now=float(second))
    volunteer.leave(now=100.0)
    assert [second for second in range(101, 130) if left(volunteer.tick(now=float(second)))] == [100 + GOODBYE_S]


def test_a_voter_without_a_model_has_nothing_to_stay_for_once_nobody_leads() -> None:
    volunteer = a_volunteer(*FIRST)
    volunteer.leave(now=0.0)
    gone = [second for second in range(1, 60) if left(volunteer.tick(now=float(second)))]
    assert gone == [SILENCE_S]


def test_silence_alone_makes_nobody_leave(volunteer: Volunteer) -> None:
    assert not any(left(volunteer.tick(now=float(second))) for second in range(1, 3600, 4))
    assert volunteer.state is State.WAIT


def test_who_leads_does_not_go_in_the_midst_of_a_round() -> None:
    volunteer, plan, _ = leading()
    assert left(volunteer.leave(now=7.0)) == []
    assert volunteer.leader.plan == plan


def test_who_leads_and_has_seen_all_others_go_leaves_as_the_last() -> None:
    volunteer = waiting(MY_VIEW)
    others_ready(volunteer, *(peer for peer in ORDER if peer != ME), now=0.0, stage=Stage.SYNCING)
    for second in range(1, 11):
        assert left(volunteer.tick(now=float(second))) == []
    assert left(volunteer.leave(now=10.0)) == ["left as the last: the run goes on from this folder"]


def test_who_leads_and_leaves_between_two_rounds_is_let_out_by_the_others() -> None:
    volunteer = waiting(MY_VIEW)
    others = [peer for peer in ORDER if peer != ME]
    others_ready(volunteer, *others, now=0.0, stage=Stage.SYNCING)
    (proposal,) = sent(volunteer.leave(now=1.0), Proposal)
    assert ME not in {voter.peer for voter in proposal.block.committee}
    assert volunteer.state is State.WAIT, "until that is committed its vote counts"
    commit = certify(proposal.block, others, view=MY_VIEW)
    volunteer.receive(ANN, commit, now=2.0)
    assert left(volunteer.applied(2, model_after(1), NO_COST, now=2.0)) == ["left in order"]


def test_a_finished_run_is_left_once_its_last_round_is_applied(leader: FakeLeader) -> None:
    volunteer = in_sync(a_volunteer(total_steps=10))
    plan = leader.plan(ME, ANN)
    contributed(volunteer, plan)
    commit = leader.commit(plan)
    volunteer.holds(commit.block.parts, now=3.0)
    volunteer.receive(FOUNDER, commit, now=3.0)
    assert left(volunteer.receive(FOUNDER, leader.standing("finished", finished=True), now=3.0)) == []
    effects = volunteer.applied(1, model_after(1), NO_COST, now=4.0)
    assert effects[-1] == Leave("the run is finished")
    assert said(effects, Applied) != []
    assert said(effects, Report)[-1].leaving, "whoever leads need not wait for it"


def test_who_leads_a_finished_run_stays_until_the_others_have_seen_it_or_a_while() -> None:
    def finished() -> Volunteer:
        volunteer = in_sync(a_volunteer(*FIRST, total_steps=10))
        volunteer.receive(ORDER[MY_VIEW], a_new_view(MY_VIEW), now=0.0)
        assert volunteer.leader.phase is Phase.FINISHED
        return volunteer

    seen = finished()
    others = [peer for peer in ORDER if peer != ME]
    effects = others_ready(seen, *others[:2], now=1.0, leaving=True)
    assert left(effects) == []
    assert left(others_ready(seen, others[2], now=1.0, leaving=True)) == ["the run is finished"]
    alone = finished()
    assert [s for s in range(1, 20) if left(alone.tick(now=float(s)))] == [GOODBYE_S]


# -- every order of everything


def two_work() -> Commit:
    """After it three vote, with one vote each: the founder, who leads, a and b."""
    return extend(a_ledger(), an_entry("a", (0, 10)), an_entry("b", (10, 20)))


BEGUN = two_work()
OTHERS = (ANN, FOUNDER)
"""A quorum without us."""


def test_it_looks_whether_it_may_still_take_part_though_so_much_happens_that_no_report_is_ever_due(
    volunteer: Volunteer, leader: FakeLeader
) -> None:
    volunteer.tick(now=1.0)
    volunteer.receive(FOUNDER, leader.plan(), now=1.0 + REPORT_S / 2)
    assert volunteer._report_at > 1.0 + REPORT_S, "it has just reported what changed"
    assert volunteer.wake_at() <= 1.0 + REPORT_S


class Living(RuleBasedStateMachine):
    """One volunteer, to whom leaders say what they may, in any order, late, twice or never; it restarts and leaves.

    The shell that does its effects is played here, and holds it to its word: what is said is durable, what it does is
    what its plan says, nothing is done twice. Left in peace it comes to the head of the chain, and away if it wants to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.swarm = FakeLeader(ledger_of([BEGUN]))
        self.chain = [BEGUN]
        """All that was ever committed."""
        self.models: dict[int, bytes] = {}
        """round -> digest of everyone's model after it, where that is not what ours would be."""
        self.posted: list[tuple[PeerId, Message]] = []
        """(from, what): all that was ever said to it."""
        # of the round under way, as the others see it
        self.view, self.attempt = 0, 0
        self.proof: Message | None = None
        self.given: Plan | None = None
        self.frozen: dict[tuple[int, int, int], Freeze] = {}
        self.proposed: Block | None = None
        self.lock: Lock | None = None
        # its disk
        self.stored: list[Commit] = [BEGUN]
        self.held: set[bytes] = set()
        self.promises: Promises | None = None
        self.restarts = self.leaves = False
        self.start()

    @initialize(restarts=st.booleans(), leaves=st.booleans())
    def begin(self, restarts: bool, leaves: bool) -> None:
        """Whether it does these at all: who does them all the time gets nowhere."""
        self.restarts, self.leaves = restarts, leaves

    def start(self) -> None:
        """Its process begins, with what its disk kept."""
        self.volunteer = a_volunteer(*self.stored, promises=self.promises, held=self.held)
        self.left = self.syncing = self.catching_up = False
        self.training: Train | None = None
        self.applying: Commit | None = None
        self.fetching: tuple[tuple[int, bytes], ...] = ()
        self.uploads: list[Upload] = []
        self.bytes: dict[tuple[PeerId, bytes], set[int]] = {}
        self.work: dict[bytes, tuple[int, ranges.Ranges]] = {}
        """root -> (round, samples) of what was trained."""
        self.promised: Contribution | None = None
        self.folding: list[Plan] = []
        self.folded: dict[tuple[int, int, int], dict[int, bytes]] = {}
        self.take(self.volunteer.tick(now=self.now))

    @property
    def head(self) -> Head:
        return self.swarm.ledger.head

    @property
    def who_leads(self) -> PeerId:
        return self.head.leader(self.view)

    # -- the shell

    def take(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            assert not self.left, "who has left does nothing more"
            match effect:
                case Send(to, message):
                    assert ME not in to, "what it says to itself stays inside"
                    self.check_said(message)
                case Store(commit):
                    assert commit.block.parent == self.stored[-1].block.hash, "commits are stored one by one, in order"
                    self.stored.append(commit)
                case Remember(promises):
                    self.check_promises(promises)
                    self.promises = promises
                case Fetch(wanted, _):
                    assert not {digest_ for _, digest_ in wanted} & self.held, "what is here is not fetched"
                    self.fetching = wanted
                case Apply(commit):
                    assert self.applying is None, "one at a time"
                    assert commit in self.stored, "what is applied is on disk"
                    assert commit.block.round == self.volunteer.follower.model_round + 1, "no round is left out"
                    assert self.held.issuperset(commit.block.parts), "and none without all of its bytes"
                    self.applying = commit
                case CatchUp():
                    self.catching_up = True
                case Resync():
                    assert not self.syncing, "one at a time"
                    self.syncing = True
                case Train(plan, seat):
                    assert seat == plan.seat_of(ME)
                    assert plan.head == self.stored[-1].block.hash, "it trains from the head, which is on disk"
                    assert self.volunteer.follower.at_head, "and from the model of it"
                    self.training = effect
                case StopTraining(keep):
                    self.training = self.training if keep else None
                case Reduce(plan, what):
                    self.reduce(plan, what)
                case Leave():
                    self.left = True
                case Rewind():
                    raise AssertionError("nobody began another epoch")
                case _:
                    pass

    def reduce(self, plan: Plan, effect: Upload | Fold | Deliver | Drop) -> None:
        match effect:
            case Upload(owner, root, parts):
                assert owner != ME
                assert self.work[root][0] == plan.round, "only work of this round is sent"
                assert all(plan.owners[part] == owner for part in parts), "and only to its owners"
                self.uploads.append(effect)
            case Fold(parts, entries):
                assert set(parts) == {part for part, owner in enumerate(plan.owners) if owner == ME}
                frozen = self.frozen.get(plan.order)
                if frozen is not None:
                    assert [(e.peer, e.root, e.tokens) for e in entries] == [
                        (e.peer, e.root, e.tokens) for e in frozen.entries
                    ], "exactly the frozen set is folded"
                assert all(self.bytes[entry.peer, entry.root].issuperset(parts) for entry in entries), "of bytes here"
                self.folding.append(plan)
            case Deliver(to, results):
                assert to != ME
                assert results == self.folded[plan.order], "everyone gets the same bytes, those on disk"
            case Drop(contributor, root):
                del self.bytes[contributor, root]

    def check_said(self, message: Message) -> None:
        plan, chain = self.volunteer.plan, [RUN, *(commit.block.hash for commit in self.stored)]
        match message:
            case Report(head=head):
                assert head == chain[-1], "it stands where its disk stands"
            case Contribution(round=round_, root=root, ranges=samples):
                assert plan is not None
                assert (round_, samples) == self.work[root] == (plan.round, samples), "it promises what it has trained"
                seat = plan.seat_of(ME)
                assert seat is not None
                assert samples == ranges.take(seat.ranges, ranges.count(samples))[0], "of the samples of its seat"
                self.promised = message
            case Have(vectors=vectors):
                assert plan is not None
                assert message.order == plan.order
                mine_ = {part for part, owner in enumerate(plan.owners) if owner == ME}
                assert all(self.bytes[vector].issuperset(mine_) for vector in vectors), "it holds what it says it holds"
            case Vote(phase=phase, view=view, block=block):
                assert self.promises is not None
                assert view >= self.promises.pledged, "it votes in no view that it has given up"
                kept = self.promises.prevoted if phase == PREVOTE else self.promises.lock
                assert kept is not None
                assert (kept.view, kept.block.hash) == (view, block), "a vote is on disk before it is said"
                assert phase == PRECOMMIT or self.held.issuperset(kept.block.parts), "and its bytes are"
            case ViewChange(view=view):
                assert self.promises is not None
                assert self.promises.pledged == view, "so is a pledge"
            case Applied(round=round_):
                assert round_ <= self.stored[-1].block.round
            case _:
                pass

    def check_promises(self, new: Promises) -> None:
        old = self.promises
        assert new.round == self.stored[-1].block.round + 1
        if old is None or old.round != new.round:
            return
        assert new.pledged >= old.pledged, "a pledge is never taken back"
        if old.prevoted is not None:
            assert new.prevoted is not None
            assert new.prevoted.view > old.prevoted.view or new.prevoted == old.prevoted, "one block in each view"
        if old.lock is not None:
            assert new.lock is not None
            assert new.lock.view > old.lock.view or new.lock == old.lock, "a lock moves only to that of a higher view"

    def say(self, message: Message, *, arrives: bool = True, sender: PeerId | None = None) -> None:
        posted = (self.who_leads if sender is None else sender, message)
        self.posted.append(posted)
        if arrives and not self.left:
            self.take(self.volunteer.receive(*posted, now=self.now))

    # -- what the others say

    @precondition(lambda self: self.who_leads != ME and not self.left)
    @rule(
        members=st.sampled_from([(ME, ANN), (ME, ANN), (ANN, ME), (ANN,)]),
        owners=st.tuples(*[st.sampled_from([ME, ANN])] * 3),
        arrives=st.booleans(),
    )
    def a_leader_plans(self, members: tuple[PeerId, ...], owners: tuple[PeerId, ...], arrives: bool) -> None:
        """Seats may change, owners do; who has no seat owns nothing."""
        self.attempt += 1
        allowed = tuple(owner if owner in members else ANN for owner in owners)
        self.given = self.swarm.plan(*members, owners=allowed, view=self.view, attempt=self.attempt)
        self.say(self.given, arrives=arrives)

    @precondition(lambda self: self.given is not None and not self.left)
    @rule(counted=st.booleans(), arrives=st.booleans())
    def a_leader_freezes(self, counted: bool, arrives: bool) -> None:
        assert self.given is not None
        entries = [an_entry(ANN, (20, 30))]
        if counted and self.promised is not None and self.promised.round == self.given.round:
            mine_ = self.promised
            entries.insert(0, Entry(ME, mine_.root, mine_.tokens, mine_.loss, mine_.ranges))
        frozen = self.frozen.setdefault(self.given.order, self.swarm.freeze(self.given, *entries))
        self.say(frozen, arrives=arrives)

    @precondition(lambda self: (self.given or self.lock) and not self.left)
    @rule(drifted=st.sampled_from([False, False, False, True]), arrives=st.booleans())
    def a_leader_proposes(self, drifted: bool, arrives: bool) -> None:
        """What the highest lock names, if there is one; `drifted`: the models of all others are not ours."""
        if self.proposed is None and self.lock is not None:
            self.proposed = self.lock.block
        elif self.proposed is None:
            assert self.given is not None
            self.proposed = self.swarm.block(self.given)
            if drifted:
                self.models[self.head.round] = digest(f"their model after round {self.head.round}")
            theirs = self.models.get(self.head.round, model_after(self.head.round))
            self.proposed = replace(self.proposed, model_before=theirs)
        self.say(Proposal(self.view, self.proposed), arrives=arrives)

    @precondition(lambda self: self.proposed is not None and not self.left)
    @rule(arrives=st.booleans())
    def the_others_lock(self, arrives: bool) -> None:
        assert self.proposed is not None
        self.lock = locked(self.proposed, OTHERS, view=self.view)
        self.say(self.lock, arrives=arrives)

    @precondition(lambda self: self.lock and self.lock.view == self.view and not self.left)
    @rule(arrives=st.booleans())
    def the_others_commit(self, arrives: bool) -> None:
        assert self.lock is not None
        sender = self.who_leads
        commit = certify(self.lock.block, self.head.voters & set(OTHERS), view=self.view)
        self.swarm.ledger.check_commit(commit)
        self.commit(commit)
        self.say(commit, arrives=arrives, sender=sender)

    def commit(self, commit: Commit) -> None:
        self.swarm.ledger.append(commit)
        self.chain.append(commit)
        self.view, self.attempt, self.proof = 0, 0, None
        self.given = self.proposed = self.lock = None

    @precondition(lambda self: not self.left)
    @rule(arrives=st.booleans())
    def a_view_begins(self, arrives: bool) -> None:
        self.view, self.given, self.proposed = self.view + 1, None, None
        self.proof = new_view(pledged(peer, self.head, self.view, self.lock) for peer in OTHERS)
        self.say(self.proof, arrives=arrives, sender=ANN)

    @precondition(lambda self: not self.left)
    @rule(phase=st.sampled_from(["idle", "gather", "vote"]))
    def a_leader_stands(self, phase: str) -> None:
        self.say(self.swarm.standing(phase, view=self.view))

    @precondition(lambda self: not self.left)
    @rule(stage=st.sampled_from([Stage.WAITING, Stage.SYNCING]))
    def the_others_report(self, stage: Stage) -> None:
        """To us, as to one who leads; if we do, that is enough to be given work."""
        for peer, trains in ((ANN, True), (FOUNDER, False)):
            if not self.left:
                self.take(others_ready(self.volunteer, peer, now=self.now, stage=stage, trains=trains))

    @precondition(lambda self: self.posted and not self.left)
    @rule(data=st.data())
    def something_old_comes_again(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, min(30, len(self.posted) - 1)))
        self.take(self.volunteer.receive(*self.posted[-1 - at], now=self.now))

    # -- what comes of what it does

    @precondition(lambda self: self.training is not None and not self.left)
    @rule(samples=st.integers(0, 10))
    def training_ends(self, samples: int) -> None:
        assert self.training is not None
        plan, seat, self.training = self.training.plan, self.training.seat, None
        if samples == 0:
            self.take(self.volunteer.not_trained(plan, "nothing finite", now=self.now))
            return
        done, _ = ranges.take(seat.ranges, min(samples, ranges.count(seat.ranges)))
        root = digest(f"{plan.round} {done} {self.now} {len(self.work)}")
        self.work[root] = (plan.round, done)
        self.bytes[ME, root] = {0, 1, 2}
        work = Work(root, ranges.count(done), 7 * ranges.count(done), 2.0)
        self.take(self.volunteer.trained(plan, work, now=self.now))

    @precondition(lambda self: self.uploads and not self.left)
    @rule(arrives=st.booleans())
    def an_upload_ends(self, arrives: bool) -> None:
        upload = self.uploads.pop(0)
        ended = self.volunteer.uploaded if arrives else self.volunteer.upload_failed
        self.take(ended(upload.owner, upload.root, upload.parts, now=self.now))

    @precondition(lambda self: not self.left)
    @rule(name=st.sampled_from(["root b", "root b", "other work"]), parts=st.sets(st.integers(0, 2), min_size=1))
    def bytes_come(self, name: str, parts: set[int]) -> None:
        root = digest(name)
        if self.volunteer.takes(ANN, self.head.round + 1, root):
            self.bytes.setdefault((ANN, root), set()).update(parts)
            self.take(self.volunteer.received(ANN, root, tuple(sorted(parts)), now=self.now))

    @precondition(lambda self: self.folding and not self.left)
    @rule(newest=st.booleans())
    def a_fold_ends(self, newest: bool) -> None:
        plan = self.folding.pop(-1 if newest else 0)
        results = mine(plan)
        if self.volunteer.plan is not None and self.volunteer.plan.order == plan.order:
            self.held.update(results.values())
        self.folded[plan.order] = results
        self.take(self.volunteer.folded(plan, results, now=self.now))

    @precondition(lambda self: self.proposed is not None and not self.left)
    @rule(parts=st.sets(st.integers(0, 2), min_size=1))
    def averages_come(self, parts: set[int]) -> None:
        assert self.proposed is not None
        digests = tuple(self.proposed.parts[part] for part in sorted(parts))
        self.held.update(digests)
        self.take(self.volunteer.holds(digests, now=self.now))

    @precondition(lambda self: self.applying is not None and not self.left)
    @rule(damaged=st.sampled_from([False, False, True]))
    def applying_ends(self, damaged: bool) -> None:
        assert self.applying is not None
        commit, self.applying = self.applying, None
        if damaged and commit.block.parts:
            self.held.discard(commit.block.parts[0])
            self.take(self.volunteer.damaged(commit.block.parts[:1], now=self.now))
        else:
            self.take(
                self.volunteer.applied(commit.block.round, model_after(commit.block.round), NO_COST, now=self.now)
            )

    @precondition(lambda self: self.fetching and not self.left)
    @rule()
    def a_fetch_ends(self) -> None:
        digests, self.fetching = tuple(digest_ for _, digest_ in self.fetching), ()
        self.held.update(digests)
        self.take(self.volunteer.holds(digests, now=self.now))

    @precondition(lambda self: self.syncing and not self.left)
    @rule(found=st.booleans())
    def a_sync_ends(self, found: bool) -> None:
        self.syncing = False
        if found:
            round_ = self.stored[-1].block.round
            model = self.models.get(round_, model_after(round_))
            self.take(self.volunteer.synced(round_, model, (), now=self.now))
        else:
            self.take(self.volunteer.sync_failed("nobody answers", now=self.now))

    @precondition(lambda self: self.catching_up and not self.left)
    @rule()
    def it_catches_up(self) -> None:
        self.catching_up = False
        for commit in self.chain[len(self.stored) :]:
            if not self.left:
                self.take(self.volunteer.receive(FOUNDER, commit, now=self.now))

    @precondition(lambda self: not self.left)
    @rule(steps=st.integers(1, 8))
    def it_goes_well(self, steps: int) -> None:
        """As on most days: else chance alone would rarely come to the end of a round."""
        for _ in range(steps):
            if not self.left:
                self.go_on()

    def go_on(self) -> None:
        """The next thing happens that brings the round on."""
        if self.syncing:
            self.a_sync_ends(found=True)
        elif len(self.stored) < len(self.chain):
            self.it_catches_up()
        elif self.fetching:
            self.a_fetch_ends()
        elif self.applying is not None:
            self.applying_ends(damaged=False)
        elif self.who_leads == ME:
            self.a_view_begins(arrives=True)
        elif self.given is None and self.lock is None:
            self.a_leader_plans((ME, ANN), (ME, ANN, ME), arrives=True)
        elif self.training is not None:
            self.training_ends(samples=10)
        elif self.folding:
            self.a_fold_ends(newest=False)
        elif self.given is not None and self.given.order not in self.frozen:
            self.bytes_come("root b", {0, 1, 2})
            self.a_leader_freezes(counted=True, arrives=True)
        elif self.proposed is None:
            self.a_leader_proposes(drifted=False, arrives=True)
        elif not self.held.issuperset(self.proposed.parts):
            self.averages_come({0, 1, 2})
        elif self.lock is None or self.lock.view != self.view:
            self.the_others_lock(arrives=True)
        else:
            self.the_others_commit(arrives=True)

    # -- what happens to it

    @precondition(lambda self: not self.left)
    @rule(seconds=st.integers(1, 12))
    def time_passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            if not self.left:
                self.take(self.volunteer.tick(now=self.now))
                assert self.left or self.volunteer.wake_at() > self.now, "what is due was done"

    @precondition(lambda self: self.left or self.restarts)
    @rule()
    def it_restarts(self) -> None:
        self.start()

    @precondition(lambda self: self.leaves and not self.left)
    @rule()
    def it_wants_to_leave(self) -> None:
        self.take(self.volunteer.leave(now=self.now))

    # -- what always holds

    @invariant()
    def it_trains_exactly_while_it_says_so(self) -> None:
        if not self.left and self.volunteer.follower.at_head:
            assert (self.volunteer.stage is Stage.TRAINING) == (self.training is not None)

    @invariant()
    def its_disk_is_a_beginning_of_the_chain_and_its_model_one_of_its_rounds(self) -> None:
        assert self.stored == self.chain[: len(self.stored)]
        assert self.volunteer.follower.model_round <= self.stored[-1].block.round

    def teardown(self) -> None:
        """A round later, in which all that is said arrives, it is at the head; and away, if it wants to be."""
        rounds = len(self.chain)
        for _ in range(60):
            if self.left:
                return
            if len(self.chain) > rounds and self.volunteer.follower.at_head:
                break
            self.go_on()
            self.time_passes(1)
        assert self.volunteer.follower.ledger.head == self.head
        assert self.volunteer.follower.at_head
        if self.volunteer.leaving:
            self.commit(certify(a_block(self.head), self.head.voters))
            self.say(self.chain[-1], sender=FOUNDER)
            self.go_on()
            assert self.left, "nobody counts on it any more"


Living.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestLiving = Living.TestCase
