"""The leader: who gets work, whose work counts, what is proposed, and who decides in the next round."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dugnad.configs.recipe import load
from dugnad.coordinator import admission, ranges
from dugnad.coordinator.admission import Admission
from dugnad.coordinator.awaited import SETTLE_S
from dugnad.coordinator.effects import Apply, CatchUp, Effect, Keep, LeftOut, Promises, Refused, Remember, Send, Store
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.ledger import Charter, Ledger
from dugnad.coordinator.membership import Stage
from dugnad.coordinator.messages import (
    PRECOMMIT,
    PREVOTE,
    Applied,
    Block,
    Commit,
    Contribution,
    Freeze,
    Have,
    Lock,
    Plan,
    Proposal,
    Report,
    Seat,
    Standing,
    Vote,
    applied_payload,
    vote_payload,
)
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.planning import MAX_OWNERS, MAX_VECTORS
from dugnad.coordinator.rounds import Leader, Phase
from dugnad.coordinator.vouched import SHOWN_ROUNDS
from dugnad.dht.decisions import Decision
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Reach
from dugnad.dht.ticket import Terms, claim, issue
from dugnad.dht.wire import Message
from dugnad.optim.plan import assign_parts
from tests.unit.chains import (
    CHARTER,
    FOUNDER,
    GENESIS,
    ORGANIZER,
    RUN,
    FakeSigner,
    a_block,
    a_ledger,
    an_entry,
    certify,
    committee,
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

RECIPE = load("tiny-books")
ROUNDS = RECIPE.rounds
STEPS = ROUNDS.steps_at(0)
SAMPLES = STEPS * RECIPE.inner.batch_sequences
"""In the seat of a full interval."""
NUM_PARTS = 6
STARTED = 1000
A, B, C, D, EVE = (PeerId(name) for name in ("a", "b", "c", "d", "eve"))
PATIENCE = Patience.of(ROUNDS)
replace = msgspec.structs.replace
M = TypeVar("M", bound=Message)


def said(effects: Iterable[Effect], kind: type[M]) -> list[M]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def refusals(effects: Iterable[Effect]) -> list[str]:
    return [effect.reason for effect in effects if isinstance(effect, Refused | LeftOut)]


def average(part: int) -> bytes:
    return digest(f"average {part}")


class Run:
    """One leader, and whatever the others say to it; time stands still unless told."""

    def __init__(
        self,
        *commits: Commit,
        me: PeerId = FOUNDER,
        disk: bytes | None = None,
        promises: Promises | None = None,
        min_peers: int = 2,
        known: Plan | None = None,
        barred: frozenset[PeerId] = frozenset(),
        charter: Charter = CHARTER,
    ) -> None:
        self.me = me
        self.now = 0.0
        signer = FakeSigner(me)
        recipe = dataclasses.replace(RECIPE, rounds=dataclasses.replace(ROUNDS, min_peers=min_peers))
        self.barred = barred
        ledger = Ledger(charter, signer)
        rules = Admission(
            ledger.gate, lambda: ledger.head.roll, quarantined=lambda: self.barred, clock=lambda: self.now
        )
        self.follower = Follower(signer, ledger, PATIENCE, disk_of(me) if disk is None else disk, rules)
        self.follower.restore(commits, (), promises)
        self.known = known
        self.leader = Leader(
            self.follower,
            signer,
            recipe,
            NUM_PARTS,
            assign_parts,
            started=STARTED,
            known_plan=lambda: self.known,
        )
        head = self.follower.ledger.head
        self.begun = self.leader.synced(head.round, model_after(head.round), (), now=0.0)

    @property
    def plan(self) -> Plan:
        plan = self.leader.plan
        assert plan is not None
        return plan

    def hear(self, sender: PeerId, message: Message) -> list[Effect]:
        return self.leader.receive(sender, message, now=self.now)

    def tick(self, seconds: float = 0.0) -> list[Effect]:
        """Let seconds pass, one by one: a pause longer than that would be ours."""
        out: list[Effect] = []
        whole = int(seconds)
        for step in [*[1.0] * whole, seconds - whole]:
            self.now += step
            out += self.leader.tick(now=self.now)
        return out

    def report(self, *, stage: Stage = Stage.WAITING, plan: Plan | None = None, **changed: object) -> Report:
        """What a peer at the head says; of the plan that it knows, if it does."""
        head = self.follower.ledger.head
        order = plan.order if plan is not None else (0, 0, 0)
        report = Report(
            epoch=head.epoch, head_round=head.round, head=head.hash, in_view=self.follower.view,
            incarnation=bytes(8), trains=True, stage=stage, round=order[0], view=order[1], attempt=order[2],
            step=0, of_steps=0, leaving=False, reach=Reach.OPEN, uplink=1e6, addresses=(),
        )  # fmt: skip
        return replace(report, **changed)

    def reports(
        self, *peers: PeerId, stage: Stage = Stage.WAITING, plan: Plan | None = None, **changed: object
    ) -> list[Effect]:
        out: list[Effect] = []
        for peer in peers:
            out += self.hear(peer, self.report(stage=stage, plan=plan, **{"incarnation": disk_of(peer), **changed}))
        return out

    def stay(self, seconds: float, *peers: PeerId, stage: Stage = Stage.TRAINING) -> list[Effect]:
        """Time passes, in which these peers go on saying that they are here, with the plan in hand."""
        out: list[Effect] = []
        for _ in range(int(seconds)):
            out += self.reports(*peers, stage=stage, plan=self.leader.plan) + self.tick(1.0)
        return out

    def contribution(self, peer: PeerId, *, samples: int | None = None, root: str | None = None) -> Contribution:
        """What `peer` promises of its seat: all of it, or its first samples."""
        seat = next(seat for seat in self.plan.seats if seat.peer == peer)
        done, _ = ranges.take(seat.ranges, ranges.count(seat.ranges) if samples is None else samples)
        head, tokens = self.follower.ledger.head, ranges.count(done) * RECIPE.model.context
        return Contribution(0, head.round + 1, head.hash, digest(root or f"root {peer}"), done, tokens, 2.0)

    def have(self, *peers: PeerId, root: str | None = None) -> Have:
        return Have(*self.plan.order, tuple((peer, digest(root or f"root {peer}")) for peer in peers))

    def gather(self, *peers: PeerId) -> list[Effect]:
        """These peers promise, and every owner holds all that they promised."""
        out: list[Effect] = []
        for peer in peers:
            out += self.hear(peer, self.contribution(peer))
        for owner in sorted(set(self.plan.owners)):
            out += self.hear(owner, self.have(*peers))
        return out

    def deliver(self, *owners: PeerId) -> list[Effect]:
        """The averages of these owners come."""
        out: list[Effect] = []
        for owner in owners:
            parts = {part: average(part) for part, who in enumerate(self.plan.owners) if who == owner}
            out += self.leader.result(owner, self.plan.order, parts, now=self.now)
        return out

    def vote(self, peer: PeerId, block: Block, phase: int, *, disk: bytes | None = None) -> Vote:
        view = self.follower.view
        payload = vote_payload(RUN, 0, block.round, view, phase, block.hash, disk_of(peer) if disk is None else disk)
        return Vote(0, block.round, view, phase, block.hash, FakeSigner(peer).sign(payload))

    def votes(self, block: Block, phase: int, *peers: PeerId) -> list[Effect]:
        return [effect for peer in peers for effect in self.hear(peer, self.vote(peer, block, phase))]

    def applied(self, peer: PeerId, *, model: bytes | None = None) -> Applied:
        head = self.follower.ledger.head
        digest_ = model_after(head.round) if model is None else model
        payload = applied_payload(RUN, head.round, head.hash, digest_)
        return Applied(head.round, head.hash, digest_, FakeSigner(peer).sign(payload), 1.0, 2.0, ())


def two_rounds(*peers: str) -> list[Commit]:
    """Two rounds after which the founder, who leads, and these peers vote: a, b and c unless told."""
    ledger = a_ledger()
    who = peers or ("a", "b", "c")
    return [
        extend(ledger, *(an_entry(peer, (start + 10 * k, start + 10 * k + 10)) for k, peer in enumerate(who)))
        for start in (0, 10 * len(who))
    ]


TWO = two_rounds()
HEAD = ledger_of(TWO).head
ORDER = [HEAD.leader(view) for view in range(4)]


def a_run(*peers: PeerId) -> Run:
    """The third round is planned for these peers, who all know it: a, b and c unless told."""
    run = Run(*TWO)
    run.reports(*(peers or (A, B, C)))
    if run.leader.plan is None:
        run.tick(SETTLE_S)
    run.reports(*run.plan.members, stage=Stage.TRAINING, plan=run.plan)
    return run


def voting() -> tuple[Run, Block]:
    """The third round is worked, folded and proposed; the leader has prevoted."""
    run = a_run()
    run.gather(A, B, C)
    (proposal, *_) = said(run.deliver(*sorted(set(run.plan.owners))), Proposal)
    return run, proposal.block


# -- who gets work


def test_a_run_begins_once_enough_peers_stand_at_its_head() -> None:
    run = Run(min_peers=2)
    assert run.leader.phase is Phase.IDLE
    assert said(run.reports(A), Plan) == []
    assert run.leader.reason == "waiting for 1 more peer (0 syncing)"
    (sent,) = [e for e in run.reports(B) if isinstance(e, Send)]
    assert sent.to == (A, B)
    plan = sent.message
    assert isinstance(plan, Plan)
    assert plan.order == (1, 0, STARTED)
    assert plan.seats == (Seat(A, STEPS, ((0, SAMPLES),), ()), Seat(B, STEPS, ((SAMPLES, 2 * SAMPLES),), ()))
    assert sorted(set(plan.owners)) == [A, B]
    assert all(owner != backup for owner, backup in zip(plan.owners, plan.backups, strict=True))
    assert (run.leader.phase, run.leader.plan) == (Phase.GATHER, plan)


def test_samples_that_were_left_undone_are_given_out_first() -> None:
    ledger = a_ledger()
    run = Run(extend(ledger, an_entry("a", (0, 10)), an_entry("b", (20, 30)), redo=((10, 20), (30, 35))))
    run.reports(A, B)
    first, second = run.plan.seats
    assert first.ranges == ((10, 20), (30, 35), (35, 35 + SAMPLES - 15))
    assert second.ranges == ((20 + SAMPLES, 20 + 2 * SAMPLES),)


def test_after_a_start_those_of_the_last_round_are_awaited_for_a_while() -> None:
    run = Run(*TWO)
    assert said(run.reports(A, B), Plan) == []
    assert "1 of the last round" in run.leader.reason
    assert said(run.tick(SETTLE_S - 0.5), Plan) == []
    run.reports(A, B)
    assert [plan.members for plan in said(run.tick(0.5), Plan)] == [(A, B)]


def test_who_says_that_it_is_getting_there_is_awaited_for_longer() -> None:
    run = Run(*TWO)
    run.reports(A, B)
    for second in range(int(ROUNDS.exchange_s)):
        assert said(run.reports(C, stage=Stage.SYNCING), Plan) == [], second
        run.reports(A, B)
        if second < ROUNDS.exchange_s - 1:
            assert said(run.tick(1.0), Plan) == [], second
    assert [plan.members for plan in said(run.tick(1.0), Plan)] == [(A, B)]


def test_peers_that_cannot_be_reached_own_no_part_and_those_with_a_faster_uplink_own_more() -> None:
    run = Run(min_peers=3)
    run.reports(A, uplink=2e6)
    run.reports(B, uplink=1e6)
    run.reports(C, reach=Reach.SYMMETRIC)
    owned = {peer: run.plan.owners.count(peer) for peer in (A, B, C)}
    assert owned == {A: 4, B: 2, C: 0}


def test_who_can_be_punched_owns_parts_unless_someone_cannot_punch_and_others_are_open() -> None:
    for reaches, owners in (
        ((Reach.OPEN, Reach.CONE, Reach.CONE), [A, B, C]),
        ((Reach.CONE, Reach.CONE, Reach.CONE), [A, B, C]),
        ((Reach.OPEN, Reach.CONE, Reach.SYMMETRIC), [A]),
        ((Reach.CONE, Reach.CONE, Reach.SYMMETRIC), [A, B]),
        ((Reach.OPEN, Reach.CONE, Reach.UNKNOWN), [A]),
        ((Reach.UNKNOWN, Reach.UNKNOWN, Reach.UNKNOWN), [A, B, C]),
        ((Reach.SYMMETRIC, Reach.SYMMETRIC, Reach.UNKNOWN), [A, B, C]),
    ):
        run = Run(min_peers=3)
        for peer, reach in zip((A, B, C), reaches, strict=True):
            run.reports(peer, reach=reach)
        assert sorted(set(run.plan.owners)) == owners, reaches


def test_where_nobody_can_be_reached_everyone_owns_parts() -> None:
    run = Run()
    run.reports(A, B, reach=Reach.SYMMETRIC, uplink=0.0)
    assert sorted(set(run.plan.owners)) == [A, B]


def test_in_a_large_swarm_the_fastest_reduce() -> None:
    crowd = [PeerId(f"p{k:03}") for k in range(MAX_OWNERS + 20)]
    run = Run(min_peers=len(crowd))
    for k, peer in enumerate(crowd):
        run.reports(peer, uplink=1e6 + k)
    assert set(run.plan.owners) <= set(crowd[-MAX_OWNERS:])


def test_who_is_barred_gets_no_seat() -> None:
    run = Run(barred=frozenset({B}))
    run.reports(A, B, C)
    assert run.plan.members == (A, C)


def test_a_finished_run_gives_out_no_work_and_says_so() -> None:
    block = replace(a_block(a_ledger().head, an_entry("a", (0, 10))), steps=ROUNDS.total_steps)
    run = Run(certify(replace(block, global_step=ROUNDS.total_steps), [FOUNDER]))
    run.reports(A)
    run.tick(SETTLE_S)
    assert (run.leader.phase, run.leader.plan, run.leader.standing().finished) == (Phase.FINISHED, None, True)


# -- whose work counts


def moved(said: Contribution, start: int, end: int) -> ranges.Ranges:
    return ((said.ranges[0][0] + start, said.ranges[0][1] + end),)


BAD: dict[str, tuple[Callable[[Contribution], Contribution], str]] = {
    "of another round": (lambda c: replace(c, round=c.round + 1), "stale contribution"),
    "of another epoch": (lambda c: replace(c, epoch=1), "stale contribution"),
    "on another head": (lambda c: replace(c, head=digest("elsewhere")), "stale contribution"),
    "of no samples": (lambda c: replace(c, ranges=()), "other samples"),
    "of other samples": (lambda c: replace(c, ranges=((7, 9),)), "other samples"),
    "of the last samples of its seat": (
        lambda c: replace(c, ranges=moved(c, 1, 0)),
        "other samples",
    ),
    "of more than its seat": (lambda c: replace(c, ranges=moved(c, 0, 1)), "other samples"),
    "that weighs too much": (lambda c: replace(c, tokens=c.tokens + 1), "bad contribution"),
    "without a loss": (lambda c: replace(c, loss=float("nan")), "non-finite"),
    "of an endless loss": (lambda c: replace(c, loss=float("-inf")), "non-finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_contribution_that_is_not_of_its_seat_is_left_out_for_a_reason(name: str) -> None:
    run = a_run()
    forge, why = BAD[name]
    assert refusals(run.hear(A, forge(run.contribution(A)))) == [why]
    run.gather(B, C)
    assert run.leader.phase is Phase.GATHER, "its owner may still say something better"


def test_who_has_no_seat_contributes_nothing() -> None:
    run = a_run()
    assert refusals(run.hear(EVE, run.contribution(A))) == ["no seat"]


def test_the_set_is_frozen_once_every_owner_holds_all_that_everyone_promised() -> None:
    run = a_run()
    for peer in (A, B, C):
        assert said(run.hear(peer, run.contribution(peer)), Freeze) == []
    *first, last = sorted(set(run.plan.owners))
    for owner in first:
        assert said(run.hear(owner, run.have(A, B, C)), Freeze) == []
    (freeze,) = said(run.hear(last, run.have(A, B, C)), Freeze)
    assert freeze.order == run.plan.order
    assert [(e.peer, e.root, e.ranges) for e in freeze.entries] == [
        (peer, digest(f"root {peer}"), run.contribution(peer).ranges) for peer in (A, B, C)
    ]
    assert run.leader.phase is Phase.REDUCE


def test_an_owner_counts_once_however_often_it_says_that_it_holds_something() -> None:
    run = a_run()
    for peer in (A, B, C):
        run.hear(peer, run.contribution(peer))
    for _ in range(5):
        assert said(run.hear(A, run.have(A, B, C)), Freeze) == []
    run.hear(B, run.have(A, B))
    assert said(run.hear(C, run.have(A, B, C)), Freeze) == []
    assert said(run.hear(B, run.have(C)), Freeze) != []


def test_holding_other_work_than_what_was_promised_does_not_count() -> None:
    run = a_run()
    for peer in (A, B, C):
        run.hear(peer, run.contribution(peer))
    for owner in (A, B, C):
        run.hear(owner, run.have(A, B))
        assert said(run.hear(owner, run.have(C, root="other work")), Freeze) == []
    for owner in (A, B, C):
        run.hear(owner, run.have(C))
    assert run.leader.phase is Phase.REDUCE


def test_what_an_owner_had_to_make_room_for_is_not_held_any_more() -> None:
    run = a_run()
    for peer in (A, B, C):
        run.hear(peer, run.contribution(peer))
    run.hear(A, run.have(A, B, C))
    run.hear(A, run.have(C, root="one more"))
    run.hear(A, run.have(C, root="and one more"))
    for owner in (B, C):
        assert said(run.hear(owner, run.have(A, B, C)), Freeze) == [], "two of one peer are held: the newest"
    assert said(run.hear(A, run.have(C)), Freeze) != []


def test_a_have_of_another_attempt_or_by_one_who_owns_nothing_does_not_count() -> None:
    run = Run(*TWO)
    run.reports(A, B)
    run.reports(C, reach=Reach.SYMMETRIC)
    for peer in (A, B, C):
        run.hear(peer, run.contribution(peer))
    have = run.have(A, B, C)
    for old in (replace(have, attempt=have.attempt - 1), replace(have, view=1), replace(have, round=2)):
        assert run.hear(B, old) == []
    run.hear(A, have)
    assert refusals(run.hear(C, have)) == ["no seat"]
    assert run.leader.phase is Phase.GATHER
    assert said(run.hear(B, have), Freeze) != []


def test_a_have_of_someone_without_a_seat_fills_no_memory() -> None:
    run = a_run()
    run.hear(A, run.have(EVE))
    work = run.leader._round
    assert work is not None
    assert work.held == {}


def test_a_later_promise_takes_the_place_of_an_earlier_one_until_the_freeze() -> None:
    run = a_run()
    run.hear(A, run.contribution(A, samples=3, root="a short try"))
    run.gather(A, B, C)
    (freeze,) = [run.leader._unheard(A, run.report(stage=Stage.CONTRIBUTED, plan=run.plan))]
    assert isinstance(freeze, Freeze)
    assert freeze.entries[0].root == digest("root a")
    assert freeze.entries[0].tokens == SAMPLES * RECIPE.model.context


def test_at_the_deadline_what_is_held_whole_counts_and_the_rest_is_left_out() -> None:
    run = a_run()
    run.gather(A, B)
    run.hear(C, run.contribution(C))
    effects = run.stay(ROUNDS.train_s + ROUNDS.exchange_s, A, B, C)
    freeze = said(effects, Freeze)[0]
    assert [entry.peer for entry in freeze.entries] == [A, B]
    assert refusals(effects) == ["late"]


def test_who_is_gone_or_has_nothing_to_contribute_is_not_awaited() -> None:
    for gone in (True, False):
        run = Run(*TWO)
        run.reports(A, B, uplink=1e6)
        run.reports(C, reach=Reach.SYMMETRIC)
        plan = run.plan
        run.gather(A, B)
        assert run.leader.phase is Phase.GATHER
        effects = run.leader.lost(C, "no route", now=0.0) if gone else run.reports(C, plan=plan)
        assert [entry.peer for entry in said(effects, Freeze)[0].entries] == [A, B]


def test_when_nobody_has_anything_the_round_is_planned_anew_from_the_same_samples() -> None:
    run = a_run()
    before = run.plan
    run.reports(A, B, C, plan=before)
    assert (run.leader.phase, run.leader.plan) == (Phase.IDLE, None)
    assert [plan.seats for plan in said(run.tick(ROUNDS.report_s), Plan)] == [before.seats]
    assert run.plan.order > before.order


# -- whom it admits

TICKET = FakeSigner(PeerId("ticket"))


def by_ticket(peer: PeerId, **terms: int) -> bytes:
    ticket = issue(FakeSigner(ORGANIZER), RUN, TICKET.peer_id, Terms(**terms))  # type: ignore[arg-type]
    return claim(ticket, TICKET, peer)


def an_invited_run(*newcomers: PeerId, **terms: int) -> Run:
    """The second round is planned for a and b, who are members, and for those who show a ticket of these terms."""
    charter = dataclasses.replace(CHARTER, admission="invited")
    block = a_block(charter.first_head(), an_entry("a", (0, 10)), an_entry("b", (10, 20)))
    first = certify(replace(block, admissions=(by_ticket(A), by_ticket(B))), [FOUNDER])
    run = Run(first, charter=charter)
    for peer in newcomers:
        run.reports(peer, claim=by_ticket(peer, **terms))
    run.reports(A, B)
    run.reports(A, B, stage=Stage.TRAINING, plan=run.plan)
    return run


def test_what_was_frozen_too_long_ago_is_frozen_anew_before_it_is_proposed() -> None:
    run = an_invited_run(C, expires=100)
    assert run.plan.members == (A, B, C)
    run.gather(A, B, C)
    assert run.leader.phase is Phase.REDUCE
    run.deliver(A, B)
    run.now += 100 + 3600 + 1
    effects = run.deliver(C)
    assert (said(effects, Proposal), run.leader.phase) == ([], Phase.GATHER)
    effects = run.gather(A, B, C)
    assert [entry.peer for entry in said(effects, Freeze)[0].entries] == [A, B]
    assert refusals(effects) == ["not admitted"]
    assert said(run.deliver(*sorted(set(run.plan.owners))), Proposal) != []


def test_whom_a_full_block_has_no_room_for_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    run = an_invited_run(C, D)
    monkeypatch.setattr(admission, "ADMISSIONS_BYTES", len(by_ticket(C)))
    effects = run.gather(A, B, C, D)
    (freeze, *_) = said(effects, Freeze)
    assert [entry.peer for entry in freeze.entries] == [A, B, C]
    assert [(left.peer, left.reason) for left in effects if isinstance(left, LeftOut)] == [(D, "no room")]


# -- attempts


def test_a_lost_owner_costs_an_attempt_in_which_its_backup_takes_its_parts_over() -> None:
    run = a_run()
    before = run.plan
    run.gather(A, B)
    effects = run.leader.lost(C, "no route", now=0.0)
    (plan,) = said(effects, Plan)
    assert plan.order == (3, 0, before.attempt + 1)
    assert plan.members == (A, B)
    assert plan.seats == tuple(seat for seat in before.seats if seat.peer != C)
    moved = [
        (new, backup) for old, new, backup in zip(before.owners, plan.owners, before.backups, strict=True) if old == C
    ]
    kept = [(old, new) for old, new in zip(before.owners, plan.owners, strict=True) if old != C]
    assert all(new == backup for new, backup in moved)
    assert all(old == new for old, new in kept)
    assert run.leader.phase is Phase.GATHER


def test_promises_outlive_an_attempt_and_what_owners_hold_is_asked_again() -> None:
    run = a_run()
    run.gather(A, B)
    run.leader.lost(C, "no route", now=0.0)
    assert said(run.hear(A, run.have(A, B)), Freeze) == []
    assert [e.peer for e in said(run.hear(B, run.have(A, B)), Freeze)[0].entries] == [A, B]


def test_who_started_anew_in_a_round_owns_nothing_of_it_any_more() -> None:
    run = a_run()
    (plan,) = said(run.reports(C, stage=Stage.SYNCING), Plan)
    assert plan.members == (A, B)
    assert C not in plan.owners


def test_an_owner_that_does_not_deliver_is_given_no_parts_in_the_next_attempt() -> None:
    run = a_run()
    run.gather(A, B, C)
    run.deliver(A, B)
    effects = run.stay(ROUNDS.exchange_s, A, B, C, stage=Stage.REDUCING)
    plan = said(effects, Plan)[0]
    assert plan.members == (A, B, C), "its work may count all the same"
    assert set(plan.owners) == {A, B}


def test_when_no_owner_delivers_nobody_is_to_blame_alone() -> None:
    run = a_run()
    run.gather(A, B, C)
    plan = said(run.stay(ROUNDS.exchange_s, A, B, C, stage=Stage.REDUCING), Plan)[0]
    assert set(plan.owners) == {A, B, C}


def test_an_owner_that_takes_nothing_costs_an_attempt_and_its_parts() -> None:
    run = a_run()
    for peer in (A, B, C):
        run.hear(peer, run.contribution(peer))
    run.hear(A, run.have(A, B, C))
    run.hear(B, run.have(A, B, C))
    plan = said(run.stay(ROUNDS.train_s + ROUNDS.exchange_s, A, B, C), Plan)[-1]
    assert set(plan.owners) == {A, B}


def test_averages_of_another_attempt_or_of_parts_that_are_not_its_owners_do_not_count() -> None:
    run = a_run()
    run.gather(A, B, C)
    order = run.plan.order
    everything = {part: average(part) for part in range(NUM_PARTS)}
    for wrong in ((order[0], order[1], order[2] - 1), (order[0], 1, order[2])):
        assert said(run.leader.result(A, wrong, everything, now=0.0), Proposal) == []
    assert said(run.leader.result(A, order, everything, now=0.0), Proposal) == []
    assert said(run.deliver(B), Proposal) == []
    assert said(run.deliver(C), Proposal) != []


def test_when_everyone_with_work_is_gone_the_round_begins_anew() -> None:
    run = Run()
    run.reports(A, B)
    for peer in (A, B):
        run.leader.lost(peer, "no route", now=0.0)
    assert (run.leader.phase, run.leader.plan) == (Phase.IDLE, None)
    run.reports(C, D)
    assert run.plan.order[2] > STARTED


# -- a process before us


def test_a_report_of_a_later_attempt_makes_it_plan_beyond_that() -> None:
    run = a_run()
    theirs = replace(run.plan, attempt=STARTED + 500)
    (plan,) = said(run.reports(A, stage=Stage.TRAINING, plan=theirs), Plan)
    assert plan.attempt == STARTED + 501
    assert plan.members == (A, B, C)
    assert said(run.reports(B, stage=Stage.TRAINING, plan=theirs), Plan) == [], "once is enough"


def test_before_anything_is_planned_a_later_attempt_is_only_remembered() -> None:
    run = Run(*TWO)
    theirs = Plan(0, 3, 0, STARTED + 500, HEAD.hash, 0, (), (), (), 1.0, 1.0)
    assert said(run.reports(A, B, stage=Stage.TRAINING, plan=theirs), Plan) == []
    run.reports(C)
    assert run.plan.attempt == STARTED + 501


@pytest.mark.parametrize(("round_", "view"), [(2, 0), (3, 1), (4, 0)])
def test_attempts_of_other_rounds_and_views_outbid_nobody(round_: int, view: int) -> None:
    run = a_run()
    attempt = run.plan.attempt
    run.reports(A, stage=Stage.TRAINING, plan=replace(run.plan, round=round_, view=view, attempt=STARTED + 500))
    assert run.plan.attempt == attempt


def seats_given(*seats: Seat, head: bytes | None = None) -> Plan:
    """The plan of a leader before us, in the third round."""
    return Plan(0, 3, 0, 7, HEAD.hash if head is None else head, 0, seats, (), (), 1.0, 1.0)


def test_seats_that_a_leader_before_us_gave_are_kept_and_new_peers_get_samples_beyond() -> None:
    given = (Seat(A, STEPS, ((60, 60 + SAMPLES),), ()), Seat(D, STEPS, ((60 + SAMPLES, 60 + 2 * SAMPLES),), ()))
    run = Run(*TWO, known=seats_given(*given))
    run.reports(D, A, B, C)
    a, b, c, d = run.plan.seats
    assert (a, d) == given
    assert ranges.count((*b.ranges, *c.ranges)) == 2 * SAMPLES
    assert ranges.disjoint((*a.ranges, *b.ranges, *c.ranges, *d.ranges))
    assert min(start for start, _ in (*b.ranges, *c.ranges)) == 60 + 2 * SAMPLES


def test_samples_of_an_inherited_seat_that_nobody_works_on_are_to_be_redone() -> None:
    run = Run(*TWO, known=seats_given(Seat(D, STEPS, ((60, 60 + SAMPLES),), ())))
    run.reports(A, B, C)
    assert run.plan.members == (A, B, C), "it is not here"
    run.reports(A, B, C, stage=Stage.TRAINING, plan=run.plan)
    run.gather(A, B, C)
    (proposal, *_) = said(run.deliver(*sorted(set(run.plan.owners))), Proposal)
    assert proposal.block.redo == ((60, 60 + SAMPLES),)


@pytest.mark.parametrize(
    "known",
    [
        seats_given(Seat(A, STEPS, ((60, 70),), ()), head=digest("elsewhere")),
        seats_given(Seat(A, STEPS, ((60, 70),), ()), Seat(B, STEPS, ((65, 75),), ())),
        seats_given(Seat(A, STEPS, ((50, 65),), ())),
    ],
    ids=["of another head", "overlapping", "of samples long done"],
)
def test_seats_that_no_block_may_have_are_not_inherited(known: Plan) -> None:
    run = Run(*TWO, known=known)
    run.reports(A, B, C)
    assert run.plan.seats[0].ranges == ((60, 60 + SAMPLES),)


# -- the block, and the votes on it


def test_a_round_from_the_votes_to_the_commit_which_is_durable_before_it_is_said() -> None:
    run, block = voting()
    assert run.leader.phase is Phase.VOTE
    effects = run.votes(block, PREVOTE, A)
    assert said(effects, Lock) == []
    (lock,) = said(run.votes(block, PREVOTE, B), Lock)
    assert lock == locked(block, [FOUNDER, A, B])
    assert run.votes(block, PRECOMMIT, A) == []
    effects = run.votes(block, PRECOMMIT, B)
    commit = certify(block, [FOUNDER, A, B])
    assert effects[0] == Store(commit)
    sent = effects[1]
    assert sent == Send((A, B, C), commit)
    assert Apply(commit) in effects
    assert (run.leader.phase, run.leader.plan) == (Phase.IDLE, None)


def test_the_leaders_own_promises_are_remembered_before_its_votes_count() -> None:
    run = a_run()
    run.gather(A, B, C)
    effects = run.deliver(*sorted(set(run.plan.owners)))
    proposal = said(effects, Proposal)[0]
    assert Remember(Promises(0, 3, 0, proposal)) in effects
    run.votes(proposal.block, PREVOTE, A)
    effects = run.votes(proposal.block, PREVOTE, B)
    assert Remember(Promises(0, 3, 0, proposal, locked(proposal.block, [FOUNDER, A, B]))) in effects


def test_the_block_tells_what_was_done_and_what_is_left() -> None:
    run = a_run()
    run.gather(A, B)
    run.hear(C, run.contribution(C))
    run.stay(ROUNDS.train_s + ROUNDS.exchange_s, A, B, C)
    effects = run.deliver(*sorted(set(run.plan.owners)))
    block = said(effects, Proposal)[0].block
    assert (block.epoch, block.round, block.parent) == (0, 3, HEAD.hash)
    assert block.model_before == model_after(2)
    assert (block.steps, block.global_step) == (STEPS, HEAD.global_step + STEPS)
    assert [entry.peer for entry in block.entries] == [A, B]
    assert block.parts == tuple(average(part) for part in range(NUM_PARTS))
    assert (block.redo, block.cursor) == (run.plan.seats[2].ranges, 60 + 3 * SAMPLES)
    assert block.committee == committee("a", "b")
    assert block.coordinator == delegation(FOUNDER, 1)


def test_votes_for_other_blocks_views_or_by_strangers_do_not_count() -> None:
    run, block = voting()
    good = run.vote(A, block, PREVOTE)
    other = replace(block, redo=((0, 1),))
    assert run.hear(A, run.vote(A, other, PREVOTE)) == []
    assert run.hear(A, replace(good, view=1)) == []
    assert refusals(run.hear(EVE, run.vote(EVE, block, PREVOTE))) == ["not a member"]
    assert refusals(run.hear(B, good)) == ["bad signature"]
    assert refusals(run.hear(B, run.vote(B, block, PREVOTE, disk=b"new disk"))) == ["bad signature"]
    assert refusals(run.hear(B, replace(run.vote(B, block, PRECOMMIT), phase=PREVOTE))) == ["bad signature"]
    for _ in range(3):
        assert said(run.hear(A, good), Lock) == []
    assert said(run.votes(block, PREVOTE, C), Lock) != []


def test_precommits_count_only_towards_the_commit_and_prevotes_only_towards_the_lock() -> None:
    run, block = voting()
    run.votes(block, PRECOMMIT, A, B, C)
    assert run.follower.ledger.head.round == 2
    effects = run.votes(block, PREVOTE, A, B)
    assert said(effects, Lock) != []
    assert said(effects, Commit) != [], "they were cast before the lock came back here, and count now"


def test_a_lock_waits_for_nobody_and_no_attempt_is_made_any_more() -> None:
    run, _ = voting()
    plan = run.leader.plan
    assert said(run.tick(ROUNDS.silence_s + 1), Plan) == []
    assert run.leader.plan == plan
    assert "1 of 3 votes; 3 voters are gone" in run.leader.reason


def test_what_a_member_has_not_heard_is_said_again_when_its_report_shows_it() -> None:
    run = a_run()
    plan = run.plan
    run.tick(ROUNDS.report_s)
    assert said(run.reports(A, stage=Stage.WAITING), Plan) == [plan]
    assert said(run.reports(A, stage=Stage.WAITING), Plan) == [], "not twice at once"
    run.reports(A, B, C, stage=Stage.TRAINING, plan=plan)
    run.gather(A, B, C)
    run.tick(ROUNDS.report_s)
    assert len(said(run.reports(A, stage=Stage.CONTRIBUTED, plan=plan), Freeze)) == 1
    assert said(run.reports(B, stage=Stage.REDUCING, plan=plan), Message) == []
    (proposal, *_) = said(run.deliver(*sorted(set(run.plan.owners))), Proposal)
    run.tick(ROUNDS.report_s)
    assert said(run.reports(A, stage=Stage.REDUCING, plan=plan), Proposal) == [proposal]
    run.votes(proposal.block, PREVOTE, A)
    run.tick(ROUNDS.report_s)
    assert said(run.reports(A, stage=Stage.REDUCING, plan=plan), Proposal) == []
    run.votes(proposal.block, PREVOTE, B)
    run.tick(ROUNDS.report_s)
    assert len(said(run.reports(A, C, stage=Stage.REDUCING, plan=plan), Lock)) == 2


# -- taking the lead, and laying it down


def lead_view(run: Run, view: int, *, lock: Lock | None = None) -> list[Effect]:
    """The others pledge that view, one of them locked, and it begins."""
    others = [peer for peer in (FOUNDER, A, B, C) if peer != run.me]
    pledges = [pledged(others[0], HEAD, view, lock), *(pledged(peer, HEAD, view) for peer in others[1:])]
    return run.hear(others[0], new_view(pledges))


def test_who_does_not_lead_follows_and_answers_those_who_take_it_for_the_leader() -> None:
    run = Run(*TWO, me=ORDER[1])
    assert run.leader.phase is Phase.FOLLOWING
    assert run.reports(A, B, C) == []
    assert run.leader.standing().phase == "following"
    behind = run.report(head_round=1, head=TWO[0].block.hash)
    assert said(run.hear(EVE, behind), Commit) == [TWO[1]]


def test_the_next_leader_takes_over_waits_for_the_others_and_plans_in_its_view() -> None:
    run = Run(*TWO, me=ORDER[1])
    lead_view(run, 1)
    assert run.leader.phase is Phase.IDLE
    others = [peer for peer in ORDER if peer not in (run.me, FOUNDER)]
    effects = run.tick(0.0)
    (standing,) = [e for e in effects if isinstance(e, Send) and isinstance(e.message, Standing)]
    assert set(standing.to) == set(ORDER) - {run.me}, "the voters may not know yet whom to report to"
    run.reports(run.me, *others)
    run.tick(SETTLE_S - 1)
    run.reports(run.me, *others)
    run.tick(1.0)
    assert run.plan.order == (3, 1, STARTED)
    assert run.plan.members == (A, B, C)


def test_a_leader_whose_view_is_over_lays_everything_down_and_forgets_who_was_there() -> None:
    run = a_run()
    lead_view(run, 1)
    assert (run.leader.phase, run.leader.plan, run.leader.membership.live()) == (Phase.FOLLOWING, None, ())
    assert run.leader.standing().in_view == 1


def test_a_leader_drops_its_round_when_the_chain_goes_on_without_it() -> None:
    run = a_run()
    block = a_block(HEAD, an_entry("a", (60, 70)), an_entry("b", (70, 80)))
    run.hear(EVE, certify(block, [A, B, C], view=1))
    assert run.leader.plan is None
    assert run.follower.ledger.head.round == 3


def test_a_leader_proposes_again_what_the_highest_lock_names() -> None:
    run = Run(*TWO, me=ORDER[1])
    block = a_block(HEAD, an_entry("a", (60, 70)), an_entry("b", (70, 80)))
    effects = lead_view(run, 1, lock=locked(block, [FOUNDER, A, B]))
    assert said(effects, Proposal) == [Proposal(1, block)]
    assert run.leader.phase is Phase.VOTE
    run.leader.holds(block.parts, now=run.now)
    others = [peer for peer in (FOUNDER, A, B, C) if peer != run.me]
    (lock,) = said(run.votes(block, PREVOTE, *others[:2]), Lock)
    assert (lock.view, lock.block) == (1, block)
    run.votes(block, PRECOMMIT, *others[:2])
    assert run.follower.ledger.head.hash == block.hash


def test_a_leader_proposes_again_what_it_has_proposed_before_a_restart() -> None:
    block = a_block(HEAD, an_entry("a", (60, 70)), an_entry("b", (70, 80)))
    run = Run(*TWO, promises=Promises(0, 3, 0, Proposal(0, block)))
    assert said(run.begun, Proposal) == [Proposal(0, block)]


def test_a_leader_with_another_disk_does_not_lead() -> None:
    run = Run(*TWO, disk=b"new disk")
    run.reports(A, B, C)
    assert run.leader.phase is Phase.FOLLOWING


def test_a_report_from_further_ahead_makes_a_leader_with_an_old_disk_catch_up() -> None:
    run = Run(*TWO)
    assert CatchUp(A, (0, 2)) in run.hear(A, run.report(head_round=5, head=digest("their head")))
    assert run.leader.membership.is_live(A)
    assert said(run.reports(B, C), Plan) == []


# -- who decides in the next round


def ban(run: Run, peer: PeerId) -> None:
    assert run.follower.admission.decisions.take(Decision(peer, "ban", "", run.now, float("inf"), b""))


def departures(run: Run, *peers: PeerId) -> Block | None:
    """The block, if any, that the leader proposes between rounds once nobody is awaited any more."""
    run.reports(*peers)
    proposals = said(run.tick(SETTLE_S), Proposal)
    return proposals[0].block if proposals else None


def disks_of(block: Block | None) -> dict[PeerId, bytes]:
    assert block is not None
    return {voter.peer: voter.incarnation for voter in block.committee}


def test_between_rounds_who_leaves_is_let_out_by_a_block_of_its_own() -> None:
    run = Run(*TWO, min_peers=4)
    run.reports(A, B, C)
    run.reports(C, leaving=True)
    block = departures(run, A, B)
    assert block is not None
    assert (block.entries, block.parts, block.steps) == ((), (), 0)
    assert block.committee == committee("a", "b")
    assert (block.redo, block.cursor, block.global_step) == ((), 60, HEAD.global_step)


def test_a_committee_that_needs_no_change_gets_no_block() -> None:
    run = Run(*TWO, min_peers=4)
    assert departures(run, A, B, C) is None


def test_who_is_lost_or_was_never_heard_of_is_in_no_later_committee() -> None:
    run = Run(*two_rounds("a", "b", "c", "d"), min_peers=5)
    run.reports(C)
    run.leader.lost(C, "no route", now=0.0)
    block = departures(run, A, B)
    assert block is not None
    assert [voter.peer for voter in block.committee] == [A, B, FOUNDER]


def test_a_committee_of_which_no_quorum_is_here_is_left_as_the_others_know_it() -> None:
    run = Run(*TWO, min_peers=4)
    run.reports(C)
    run.leader.lost(C, "no route", now=0.0)
    assert departures(run, A) is None


def test_who_contributed_and_leaves_is_counted_and_votes_no_more() -> None:
    run = a_run()
    run.gather(A, B, C)
    run.reports(C, stage=Stage.REDUCING, plan=run.plan, leaving=True)
    block = said(run.deliver(*sorted(set(run.plan.owners))), Proposal)[0].block
    assert [entry.peer for entry in block.entries] == [A, B, C]
    assert block.committee == committee("a", "b")


def test_who_did_not_contribute_leaves_the_committee_with_the_round() -> None:
    run = a_run()
    run.gather(A, B)
    run.reports(C, plan=run.plan)
    block = said(run.deliver(*sorted(set(run.plan.owners))), Proposal)[0].block
    assert block.committee == committee("a", "b")


def test_a_newcomer_votes_from_the_round_after_its_first_contribution_as_the_disk_that_it_names() -> None:
    run = Run(*TWO)
    run.reports(D, A, B)
    run.reports(C, incarnation=b"new disk")
    run.gather(A, B, C, D)
    block = said(run.deliver(*sorted(set(run.plan.owners))), Proposal)[0].block
    assert disks_of(block) == {FOUNDER: disk_of(FOUNDER), A: disk_of(A), B: disk_of(B), C: b"new disk", D: disk_of(D)}


def test_a_voter_on_a_new_disk_is_named_anew_between_rounds_too_for_the_old_one_votes_no_more() -> None:
    run = Run(*TWO, min_peers=4)
    run.reports(C, incarnation=b"new disk")
    block = departures(run, A, B)
    assert block is not None
    assert block.entries == ()
    assert disks_of(block) == {FOUNDER: disk_of(FOUNDER), A: disk_of(A), B: disk_of(B), C: b"new disk"}


def test_a_coordinator_on_a_new_disk_is_named_anew_though_too_few_are_here_for_a_round() -> None:
    run = Run(*TWO, me=ORDER[1], min_peers=4)
    seat = delegation(FOUNDER, 2)
    run.hear(FOUNDER, seat)
    lead_view(run, 1)
    run.reports(FOUNDER, trains=False, incarnation=b"new disk")
    block = departures(run, *({A, B, C} - {run.me}))
    assert block is not None
    assert block.coordinator == seat
    assert disks_of(block)[FOUNDER] == b"new disk"


def test_when_everyone_who_worked_leaves_the_leader_stays_to_decide() -> None:
    run = a_run()
    run.gather(A, B, C)
    run.reports(A, B, C, stage=Stage.REDUCING, plan=run.plan, leaving=True)
    run.leader.leave(now=run.now)
    block = said(run.deliver(*sorted(set(run.plan.owners))), Proposal)[0].block
    assert block.committee == committee()


def test_who_is_barred_loses_its_vote() -> None:
    run = Run(*TWO, min_peers=4, barred=frozenset({C}))
    block = departures(run, A, B, C)
    assert block is not None
    assert [voter.peer for voter in block.committee] == [A, B, FOUNDER]


def test_a_leader_that_wants_to_go_gives_out_no_work_and_lets_itself_out_while_others_are_here() -> None:
    run = Run(*TWO)
    run.reports(A, B)
    effects = [*run.leader.leave(now=run.now), *run.reports(C)]
    assert said(effects, Plan) == []
    (proposal,) = said(effects, Proposal)
    assert [voter.peer for voter in proposal.block.committee] == [A, B, C]
    assert proposal.block.coordinator is None


def test_when_all_voters_want_to_go_the_leader_lets_out_the_others_and_stays_to_decide() -> None:
    run = Run(*TWO)
    run.reports(A, B, C, leaving=True)
    effects = run.leader.leave(now=run.now)
    (proposal,) = said(effects, Proposal)
    assert [voter.peer for voter in proposal.block.committee] == [FOUNDER]


def test_a_leader_that_is_banned_does_not_stay_as_the_last() -> None:
    for before in (True, False):
        run = a_run()
        if before:
            ban(run, FOUNDER)
        run.gather(A, B, C)
        run.reports(A, B, C, stage=Stage.REDUCING, plan=run.plan, leaving=True)
        if not before:
            ban(run, FOUNDER)
        assert said(run.deliver(*sorted(set(run.plan.owners))), Proposal) == []
        assert run.leader.reason == "round 3: nobody is left who may vote on the next"
        (proposal, *_) = said(run.reports(C, stage=Stage.REDUCING, plan=run.plan), Proposal)
        assert [voter.peer for voter in proposal.block.committee] == [C]
    run = Run(*TWO)
    run.reports(A, B, C, leaving=True)
    ban(run, FOUNDER)
    assert said(run.leader.leave(now=run.now), Proposal) == []


def test_who_has_just_taken_the_lead_is_deserted_only_once_the_others_could_have_spoken() -> None:
    run = Run(*TWO)
    assert not run.leader.deserted(now=run.now)
    run.tick(SETTLE_S)
    assert run.leader.deserted(now=run.now)
    run.reports(A)
    assert not run.leader.deserted(now=run.now)


def test_who_waits_alone_for_votes_is_deserted_as_well_and_looks_for_another_chain() -> None:
    run, _ = voting()
    run.stay(SETTLE_S, A, B, C, stage=Stage.REDUCING)
    assert run.leader.phase is Phase.VOTE
    assert not run.leader.deserted(now=run.now)
    for peer in (A, B, C):
        run.leader.lost(peer, "no route", now=run.now)
    assert run.leader.phase is Phase.VOTE
    assert run.leader.deserted(now=run.now)


def test_in_an_open_run_the_next_committee_weighs_what_was_earned_before() -> None:
    charter = Charter.of(GENESIS, "open")
    ledger = Ledger(charter, FakeSigner(FOUNDER))
    work = [an_entry(peer, (10 * k, 10 * k + 10)) for k, peer in enumerate("abcd")]
    first = certify(a_block(ledger.head, *work), [FOUNDER])
    run = Run(first, charter=charter, min_peers=9)
    run.reports(A, B, C, D)
    run.reports(D, leaving=True)
    run.tick(SETTLE_S)
    assert run.leader.plan is None
    poll = run.leader._poll
    assert poll is not None
    weights = {voter.peer: voter.weight for voter in poll.proposal.block.committee}
    assert weights == {A: 1, B: 1, C: 1, FOUNDER: 1}, "three have earned something: too few to bear a liar"


# -- the coordinator's seat


def without_seat() -> list[Commit]:
    """Three rounds, the last of which left the coordinator's seat empty: a, b and c vote."""
    ledger = ledger_of(TWO)
    work = [an_entry(peer, (60 + 10 * k, 70 + 10 * k)) for k, peer in enumerate("abc")]
    return [*TWO, extend(ledger, *work, seat=None)]


def led_by(commits: Sequence[Commit]) -> PeerId:
    return ledger_of(commits).head.leader(0)


def test_a_coordinator_that_is_back_is_given_its_seat_once_it_stands_at_the_head() -> None:
    commits = without_seat()
    me = led_by(commits)
    run = Run(*commits, me=me, min_peers=4)
    seat = delegation(FOUNDER, 2)
    run.hear(FOUNDER, seat)
    run.reports(FOUNDER, trains=False, stage=Stage.SYNCING)
    assert departures(run, A, B, C) is None
    effects = run.reports(FOUNDER, trains=False)
    (proposal,) = said([*effects, *run.tick(1.0)], Proposal)
    assert proposal.block.coordinator == seat
    assert proposal.block.committee == committee("a", "b", "c", seat=seat)


def test_of_two_coordinators_the_newer_gets_the_seat_and_the_older_keeps_no_vote_from_it() -> None:
    run = Run(*TWO, min_peers=4)
    newer = delegation(D, 9)
    run.hear(D, newer)
    run.reports(D, trains=False)
    block = departures(run, A, B, C)
    assert block is not None
    assert block.coordinator == newer
    assert block.committee == committee("a", "b", "c", FOUNDER, seat=newer)


def test_a_coordinator_that_is_not_here_loses_its_seat_with_the_next_round() -> None:
    run = Run(*TWO, me=ORDER[1])
    lead_view(run, 1)
    others = [peer for peer in ORDER if peer != FOUNDER]
    run.reports(*others)
    run.tick(SETTLE_S - 1)
    run.reports(*others)
    run.tick(1.0)
    run.reports(*others, stage=Stage.TRAINING, plan=run.plan)
    run.gather(A, B, C)
    block = said(run.deliver(*sorted(set(run.plan.owners))), Proposal)[0].block
    assert block.coordinator is None
    assert block.committee == committee("a", "b", "c", seat=None)


# -- what was applied


def test_what_voters_and_peers_signed_to_have_applied_is_kept_once_and_shown_to_joiners() -> None:
    run = Run(*TWO)
    said_by_a = run.applied(A)
    assert run.hear(A, said_by_a) == [Keep(A, said_by_a)]
    assert run.hear(A, said_by_a) == []
    other = run.applied(A, model=digest("another model"))
    assert run.hear(A, other) == [Keep(A, other)]
    run.hear(B, run.applied(B))
    run.hear(C, run.applied(C))
    shown = run.leader.vouched.ballots(2, model_after(2))
    assert {ballot.peer for ballot in shown} == {FOUNDER, B, C}


def test_who_is_not_here_and_has_no_vote_fills_no_books() -> None:
    run = Run(*TWO)
    assert run.hear(EVE, run.applied(EVE)) == []
    run.reports(EVE)
    assert len(run.hear(EVE, run.applied(EVE))) == 1
    assert {ballot.peer for ballot in run.leader.vouched.ballots(2, model_after(2))} == {FOUNDER}


def test_models_of_other_blocks_or_without_a_signature_are_refused() -> None:
    run = Run(*TWO)
    good = run.applied(A)
    assert refusals(run.hear(A, replace(good, block=digest("elsewhere")))) == ["foreign chain"]
    assert refusals(run.hear(A, replace(good, model=digest("another model")))) == ["bad signature"]
    assert refusals(run.hear(B, good)) == ["bad signature"]


def test_only_the_newest_rounds_are_shown() -> None:
    ledger = a_ledger()
    commits = [extend(ledger, an_entry("a", (10 * k, 10 * k + 10))) for k in range(SHOWN_ROUNDS + 3)]
    run = Run(*commits)
    old = {round_: {A: run.applied(A)} for round_ in range(1, SHOWN_ROUNDS + 3)}
    run.leader.restore(old, (0, None))
    run.hear(A, run.applied(A))
    assert sorted(run.leader.vouched.said) == list(range(4, SHOWN_ROUNDS + 4))


# -- whose messages these are, and when it wakes


def test_what_is_said_to_members_is_refused() -> None:
    run = a_run()
    freeze = Freeze(*run.plan.order, (an_entry("a", (0, 1)),))
    assert refusals(run.hear(A, run.plan)) == refusals(run.hear(A, freeze)) == ["misdirected"]
    assert not run.leader.handles(run.plan)


def test_a_leader_tells_everyone_here_and_every_voter_where_the_run_stands() -> None:
    run = a_run()
    run.reports(D)
    effects = run.tick(ROUNDS.report_s)
    (sent,) = [e for e in effects if isinstance(e, Send) and isinstance(e.message, Standing)]
    assert sent.to == (A, B, C, D)
    assert isinstance(sent.message, Standing)
    assert (sent.message.phase, sent.message.head_round) == ("gather", 2)
    assert run.leader.wake_at() <= run.now + ROUNDS.report_s


def test_it_never_rests_before_something_that_is_due() -> None:
    run = a_run()
    run.gather(A, B)
    for _ in range(300):
        run.now = max(run.now, run.leader.wake_at())
        run.leader.tick(now=run.now)
        assert run.leader.wake_at() > run.now


# -- every order of everything


class Leading(RuleBasedStateMachine):
    """The founder leads a, b and c, whose words come in any order, twice or never, with other roots, late or early.

    Whatever they say: one set is frozen in each attempt, of work that every owner holds whole; one block is proposed in
    the view; it counts each sample once and loses none; and it is committed only when a quorum has voted twice. When
    all is well again, the round comes to its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.run = Run(*TWO)
        self.promised: dict[PeerId, set[bytes]] = {}
        """Roots that each has promised in this round."""
        self.held: dict[tuple[PeerId, PeerId], list[bytes]] = {}
        """(owner, contributor) -> what the owner said that it holds, in this attempt: the newest two."""
        self.frozen: dict[tuple[int, int, int], Freeze] = {}
        self.came: dict[int, bytes] = {}
        """part -> the average that came in this attempt."""
        self.order: tuple[int, int, int] = (0, 0, 0)
        self.proposals: set[bytes] = set()
        self.locks: set[bytes] = set()
        self.ballots: dict[int, set[PeerId]] = {PREVOTE: {FOUNDER}, PRECOMMIT: {FOUNDER}}
        self.commits: list[Commit] = []
        self.take(self.run.begun)

    def take(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(_, Plan() as plan):
                    self.check_plan(plan)
                case Send(_, Freeze() as freeze):
                    self.check_freeze(freeze)
                case Send(_, Proposal() as proposal):
                    self.check_proposal(proposal)
                case Send(_, Lock() as lock):
                    assert self.decided(PREVOTE), "nothing is locked before a quorum has voted"
                    assert lock.block.hash in self.proposals
                    self.locks.add(lock.block.hash)
                case Send(_, Commit() as commit):
                    assert commit == TWO[-1] or commit in self.commits, "a commit is durable before it is said"
                case Store(commit):
                    assert self.decided(PRECOMMIT), "nothing is committed before a quorum is locked"
                    assert commit.block.hash in self.locks
                    self.commits.append(commit)
                case _:
                    pass

    def decided(self, phase: int) -> bool:
        return CHARTER.rule.decided(HEAD.committee, self.ballots[phase])

    def check_plan(self, plan: Plan) -> None:
        if plan.order > self.order:
            self.order, self.held, self.came = plan.order, {}, {}
        assert plan.order == self.order, "no older plan is said again"
        assert set(plan.owners) <= set(plan.members), "who owns a part has work"
        assert ranges.disjoint([r for seat in plan.seats for r in seat.ranges]), "no sample is given to two"

    def check_freeze(self, freeze: Freeze) -> None:
        if freeze.order in self.frozen:  # said again, when owners may hold newer vectors instead
            assert self.frozen[freeze.order] == freeze, "one set in each attempt"
            return
        self.frozen[freeze.order] = freeze
        plan = self.run.plan
        assert freeze.order == plan.order
        for entry in freeze.entries:
            assert entry.root in self.promised[entry.peer], "nobody's work counts that was not promised"
            for owner in set(plan.owners):
                assert entry.root in self.held[owner, entry.peer], "or that an owner lacks"

    def check_proposal(self, proposal: Proposal) -> None:
        self.proposals.add(proposal.block.hash)
        assert len(self.proposals) == 1, "one block in a view"
        self.run.follower.ledger.check(proposal.block)
        assert self.run.follower.admission.objects(proposal.block, FOUNDER) is None, "no honest voter objects to it"
        done = [r for entry in proposal.block.entries for r in entry.ranges]
        everything = ranges.normal((*HEAD.redo, (HEAD.cursor, proposal.block.cursor)))
        assert ranges.disjoint([*done, *proposal.block.redo]), "no sample counts twice"
        assert ranges.normal((*done, *proposal.block.redo)) == everything, "and none is lost"
        if not proposal.block.entries:
            assert proposal.block.parts == (), "a block of nobody's work changes the committee alone"
            return
        assert proposal.block.entries == self.frozen[self.order].entries
        assert proposal.block.parts == tuple(self.came[part] for part in range(NUM_PARTS)), "of the averages that came"

    def planned(self) -> bool:
        return self.run.leader.plan is not None and not self.commits

    # -- what the members say

    @rule(
        peers=st.sets(st.sampled_from([A, B, C]), min_size=1), stage=st.sampled_from(list(Stage)), knows=st.booleans()
    )
    def they_report(self, peers: set[PeerId], stage: Stage, knows: bool) -> None:
        plan = self.run.leader.plan if knows else None
        self.take(self.run.reports(*sorted(peers), stage=stage, plan=plan))

    @precondition(planned)
    @rule(peer=st.sampled_from([A, B, C]), part=st.floats(0.01, 1), again=st.booleans())
    def one_promises(self, peer: PeerId, part: float, again: bool) -> None:
        """All of its seat or the first of it; the same as before or not."""
        if self.run.plan.seat_of(peer) is None:
            return
        samples = max(1, int(part * SAMPLES))
        root = f"root {peer}" if again else f"root {peer} {samples}"
        self.take(self.run.hear(peer, self.run.contribution(peer, samples=samples, root=root)))
        self.promised.setdefault(peer, set()).add(digest(root))

    @precondition(planned)
    @rule(owner=st.sampled_from([A, B, C]), stale=st.booleans(), data=st.data())
    def one_holds(self, owner: PeerId, stale: bool, data: st.DataObject) -> None:
        """Some of what was promised, or something else; or did so in another attempt, and may have lost it since."""
        peer = data.draw(st.sampled_from([A, B, C]))
        root = data.draw(st.sampled_from(sorted(self.promised.get(peer, {digest("what nobody promised")}))))
        if self.run.plan.seat_of(peer) is not None:
            round_, view, attempt = self.run.plan.order
            if owner in self.run.plan.owners and not stale:
                self.hold(owner, peer, root)
            self.take(self.run.hear(owner, Have(round_, view, attempt - stale, ((peer, root),))))

    @precondition(lambda self: self.planned() and self.run.leader.phase is Phase.GATHER)
    @rule(owner=st.sampled_from([A, B, C]), peer=st.sampled_from([A, B, C]), had_it=st.booleans())
    def all_is_well_but_for_one(self, owner: PeerId, peer: PeerId, had_it: bool) -> None:
        """An owner lacks the work of one; it had it in another attempt, or had to make room for other work of it."""
        plan = self.run.plan
        if owner not in plan.owners or peer not in plan.members:
            return
        if had_it:
            round_, view, attempt = plan.order
            self.take(self.run.hear(owner, Have(round_, view, attempt - 1, ((peer, digest(f"root {peer}")),))))
        else:
            for root in (f"root {peer}", "other work", "and other work"):
                self.hold(owner, peer, digest(root))
                self.take(self.run.hear(owner, Have(*plan.order, ((peer, digest(root)),))))
        if self.run.leader.phase is Phase.GATHER and self.run.leader.plan == plan:
            self.all_work(but=(owner, peer))

    def hold(self, owner: PeerId, peer: PeerId, root: bytes) -> None:
        known = self.held.setdefault((owner, peer), [])
        if root not in known:
            known.append(root)
            del known[:-MAX_VECTORS]

    @precondition(lambda self: self.planned() and self.run.leader.phase is Phase.REDUCE)
    @rule(owner=st.sampled_from([A, B, C]), stale=st.booleans())
    def averages_come(self, owner: PeerId, stale: bool) -> None:
        """Of this attempt; or of the one before, which count no more."""
        order, plan = self.run.plan.order, self.run.plan
        text = "stale" if stale else "average"
        parts = {part: digest(f"{text} {part}") for part, who in enumerate(plan.owners) if who == owner}
        if stale:
            order = (order[0], order[1], order[2] - 1)
        else:
            self.came.update(parts)
        self.take(self.run.leader.result(owner, order, parts, now=self.run.now))

    @precondition(lambda self: self.proposals and not self.commits)
    @rule(peer=st.sampled_from([A, B, C, EVE]), phase=st.sampled_from([PREVOTE, PRECOMMIT]), lost_disk=st.booleans())
    def one_votes(self, peer: PeerId, phase: int, lost_disk: bool) -> None:
        """As the disk that the committee knows, or as another, whose vote is none."""
        (block,) = self.proposals
        disk = b"new disk" if lost_disk else disk_of(peer)
        payload = vote_payload(RUN, 0, HEAD.round + 1, 0, phase, block, disk)
        if peer != EVE and not lost_disk:
            self.ballots[phase].add(peer)
        vote = Vote(0, HEAD.round + 1, 0, phase, block, FakeSigner(peer).sign(payload))
        self.take(self.run.hear(peer, vote))

    @rule(peer=st.sampled_from([A, B, C]))
    def one_is_lost(self, peer: PeerId) -> None:
        self.take(self.run.leader.lost(peer, "no route", now=self.run.now))

    @rule(seconds=st.sampled_from([1, 3, 10, 25]))
    def time_passes(self, seconds: int) -> None:
        self.take(self.run.tick(seconds))
        assert self.run.leader.wake_at() > self.run.now, "what is due was done"

    @invariant()
    def it_is_at_work_on_one_thing_at_a_time(self) -> None:
        phase = self.run.leader.phase
        assert phase is not Phase.REDUCE or self.run.plan.order in self.frozen
        assert phase is not Phase.VOTE or bool(self.proposals)

    def teardown(self) -> None:
        """With everyone here and at work, the round is committed."""
        for _ in range(200):
            if self.commits or self.run.leader.phase is Phase.FOLLOWING:
                return  # who gets nowhere for too long gives itself up, and another leads
            if not self.planned():
                self.they_report({A, B, C}, Stage.WAITING, knows=False)
            else:
                self.they_report({A, B, C}, Stage.CONTRIBUTED, knows=True)
                if self.planned() and self.run.leader.phase is Phase.GATHER:
                    self.all_work()
                if self.planned() and self.run.leader.phase is Phase.REDUCE:
                    for owner in sorted(set(self.run.plan.owners)):
                        if self.planned() and self.run.leader.phase is Phase.REDUCE:
                            self.averages_come(owner, stale=False)
            for phase in (PREVOTE, PRECOMMIT):
                for peer in (A, B, C):
                    if self.proposals and not self.commits:
                        self.one_votes(peer, phase, lost_disk=False)
            self.time_passes(1)
        raise AssertionError(f"no end of the round: {self.run.leader.reason}")

    def all_work(self, *, but: tuple[PeerId, PeerId] | None = None) -> None:
        """All promise, and every owner holds it whole; `but`: an owner, and whose work it lacks."""
        plan = self.run.plan
        for peer in plan.members:
            self.one_promises(peer, 1.0, again=True)
        for owner in sorted(set(plan.owners)):
            there = [peer for peer in plan.members if (owner, peer) != but]
            for peer in there:
                self.hold(owner, peer, digest(f"root {peer}"))
            if there and self.run.leader.phase is Phase.GATHER and self.run.leader.plan == plan:
                self.take(self.run.hear(owner, self.run.have(*there)))


Leading.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestLeading = Leading.TestCase
