"""The coordinator: how it gets its seat, keeps it, yields it to a newer one, and leaves it to the others."""

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

import msgspec
import pytest

from dugnad.configs.recipe import load
from dugnad.coordinator import ranges
from dugnad.coordinator.awaited import SETTLE_S
from dugnad.coordinator.effects import Effect, Refused, Send
from dugnad.coordinator.follower import FOLLOWING, Follower
from dugnad.coordinator.keeper import BANNED_S, Keeper
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.membership import Stage
from dugnad.coordinator.messages import (
    Block,
    Commit,
    Contribution,
    Freeze,
    Have,
    NewView,
    Plan,
    Proposal,
    Report,
    Standing,
    Voter,
    Welcome,
)
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.rounds import Leader, Phase
from dugnad.dht.decisions import Decision
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Abilities, Reach
from dugnad.dht.wire import Message
from dugnad.optim.plan import assign_parts
from tests.unit.chains import (
    CHARTER,
    FOUNDER,
    GENESIS,
    NO_COST,
    RUN,
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
    model_after,
    new_view,
    pledged,
)

A, B, C, OTHER = (PeerId(name) for name in ("a", "b", "c", "other"))
REPORT_S, SILENCE_S, LEAVE_S = 2.0, 8.0, 30.0
NEW_DISK = digest("the founder's new disk")[:8]
TINY = load("tiny-books")
RECIPE = dataclasses.replace(TINY, rounds=dataclasses.replace(TINY.rounds, min_peers=2, silence_s=SILENCE_S))
NUM_PARTS = 4
replace = msgspec.structs.replace
M = TypeVar("M", bound=Message)


def a_leader(me: PeerId, *commits: Commit, disk: bytes | None = None) -> Leader:
    """The voting and leading half of a peer that has just started with these commits."""
    signer = FakeSigner(me)
    follower = Follower(
        signer, Ledger(CHARTER, signer), Patience.of(RECIPE.rounds), disk_of(me) if disk is None else disk
    )
    follower.restore(commits, ())
    return Leader(follower, signer, RECIPE, NUM_PARTS, assign_parts, started=1000)


def a_keeper(
    *commits: Commit, me: PeerId = FOUNDER, term: int = 1, disk: bytes | None = None, at_head: bool = True
) -> Keeper:
    """A coordinator that has just started, with that delegation; at the head unless told."""
    leader = a_leader(me, *commits, disk=disk)
    keeper = Keeper(me, leader, delegation(me, term), report_s=REPORT_S, leave_s=LEAVE_S)
    keeper.abilities = Abilities(("here",))
    if at_head:
        round_ = leader.follower.ledger.head.round
        keeper.synced(round_, model_after(round_), (), now=0.0)
    return keeper


def one_round() -> list[Commit]:
    """A round after which the founder, who has the coordinator's seat, and a, b, c vote."""
    return [extend(a_ledger(), *(an_entry(peer, (10 * k, 10 * k + 10)) for k, peer in enumerate("abc")))]


ONE = one_round()
HEAD = ledger_of(ONE).head
NEXT = HEAD.leader(1)
"""Who leads while the founder does not."""


def said(effects: Iterable[Effect], kind: type[M]) -> list[M]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def reported(keeper: Keeper, *peers: PeerId, now: float, **changed: object) -> list[Effect]:
    """These peers say that they stand at its head and wait."""
    head, out = keeper.follower.ledger.head, list[Effect]()
    for peer in peers:
        report = Report(
            epoch=head.epoch, head_round=head.round, head=head.hash, in_view=keeper.follower.view,
            incarnation=disk_of(peer), trains=True, stage=Stage.WAITING, round=0, view=0, attempt=0, step=0, of_steps=0,
            leaving=False, reach=Reach.OPEN, uplink=1e6, addresses=(),
        )  # fmt: skip
        out += keeper.receive(peer, replace(report, **changed), now=now)
    return out


def next_block(*, seat: Delegation, disk: bytes | None = None) -> Block:
    """The block after `ONE`, in which a, b, c worked, and that coordinator gets the seat with that disk."""
    block = a_block(HEAD, *(an_entry(peer, (30 + 10 * k, 40 + 10 * k)) for k, peer in enumerate("abc")), seat=seat)
    named = [
        Voter(voter.peer, voter.weight, disk) if disk is not None and voter.peer == seat.coordinator else voter
        for voter in block.committee
    ]
    return replace(block, committee=tuple(named))


def committed(keeper: Keeper, block: Block, *, view: int = 1, now: float = 1.0) -> list[Effect]:
    """The others have committed the block; it comes with its bytes, and is applied."""
    commit = certify(block, [A, B, C], view=view)
    out = keeper.holds(block.parts, now=now)
    out += keeper.receive(NEXT, commit, now=now)
    return [*out, *keeper.applied(block.round, model_after(block.round), NO_COST, now=now)]


def passed(keeper: Keeper, seconds: int, *, since_s: float = 0.0) -> list[Effect]:
    """What it does by itself while time passes, second by second."""
    return [effect for k in range(1, seconds + 1) for effect in keeper.tick(now=since_s + k)]


# -- the seat


def test_the_founder_leads_from_the_first_round_and_reports_to_nobody() -> None:
    keeper = a_keeper()
    assert keeper.follower.leads
    effects = [*reported(keeper, A, B, now=0.0), *passed(keeper, 5)]
    assert [plan.members for plan in said(effects, Plan)][:1] == [(A, B)]
    assert keeper.plan is not None
    assert not said(effects, Report)
    assert not said(effects, Delegation)
    assert keeper.reason == keeper.leader.reason != ""


def test_its_block_names_its_delegation_so_that_no_older_one_counts_again() -> None:
    keeper = a_keeper(term=3)
    reported(keeper, A, B, now=0.0)
    plan = keeper.plan
    assert plan is not None
    for seat in plan.seats:
        tokens = ranges.count(seat.ranges) * RECIPE.model.context
        promise = Contribution(0, 1, RUN, digest(f"root {seat.peer}"), seat.ranges, tokens, 2.0)
        keeper.receive(seat.peer, promise, now=1.0)
    held = tuple((peer, digest(f"root {peer}")) for peer in plan.members)
    effects: list[Effect] = []
    for owner in sorted(set(plan.owners)):
        keeper.receive(owner, Have(*plan.order, held), now=1.0)
    for owner in sorted(set(plan.owners)):
        parts = {part: digest(f"average {part}") for part, who in enumerate(plan.owners) if who == owner}
        effects += keeper.result(owner, plan.order, parts, now=2.0)
    keeper.applied(1, model_after(1), NO_COST, now=2.0)
    head = keeper.follower.ledger.head
    assert (head.round, head.coordinator, head.term) == (1, FOUNDER, 3), "alone in the first committee, it decides"


def test_one_that_is_new_shows_its_delegation_before_it_reports_until_a_block_names_it() -> None:
    keeper = a_keeper(*ONE, me=OTHER, term=2)
    assert not keeper.follower.leads
    assert keeper.reason == "back; a block must name it before it leads"
    effects = passed(keeper, int(REPORT_S))
    sent = [e.message for e in effects if isinstance(e, Send) and e.to == (FOUNDER,)]
    assert [type(message) for message in sent] == [Delegation, Report]
    assert sent[0] == delegation(OTHER, 2)
    report = said(effects, Report)[0]
    assert (report.trains, report.stage, report.addresses) == (False, Stage.WAITING, ("here",))

    committed(keeper, next_block(seat=delegation(OTHER, 2)), view=0, now=3.0)
    assert keeper.follower.leads
    later = passed(keeper, 10, since_s=3.0)
    assert not said(later, Report)
    assert not said(later, Delegation)
    assert keeper.leader.phase is not Phase.FOLLOWING


def test_while_it_has_no_model_it_says_so_and_leads_nothing() -> None:
    keeper = a_keeper(*ONE, me=OTHER, term=2, at_head=False)
    (report,) = said(keeper.tick(now=0.0), Report)
    assert report.stage == Stage.SYNCING
    founder = a_keeper(*ONE, at_head=False)
    founder.tick(now=0.0)
    assert founder.leader.standing().phase == FOLLOWING
    founder.synced(1, model_after(1), (), now=1.0)
    assert founder.leader.standing().phase == Phase.IDLE


def test_when_another_peer_leads_the_round_it_says_so_and_reports_to_that_one() -> None:
    keeper = a_keeper(*ONE)
    assert keeper.follower.leads
    effects = keeper.receive(NEXT, new_view(pledged(peer, HEAD, 1) for peer in (A, B, C)), now=1.0)
    assert keeper.reason == "another peer leads this round"
    assert [e.to for e in effects if isinstance(e, Send) and isinstance(e.message, Report)] == [(NEXT,)]
    assert said(effects, Delegation) == [], "the chain knows its delegation"
    effects = keeper.receive(NEXT, Standing(0, 1, HEAD.hash, 1, "gather", "", False, 0, None), now=1.5)
    assert said(effects, Report) == [], "nothing is new"
    assert len(said(keeper.tick(now=1.0 + REPORT_S), Report)) == 1


def test_it_wakes_for_its_next_report_and_for_what_it_leads() -> None:
    keeper = a_keeper(*ONE, me=OTHER, term=2)
    keeper.tick(now=0.0)
    assert 0.0 < keeper.wake_at() <= REPORT_S


@pytest.mark.parametrize("message", [Plan(1, 1, 0, 0, RUN, 0, (), (), (), 1.0, 1.0), Freeze(1, 0, 1, ())])
def test_what_is_said_to_those_who_train_is_none_of_its_business(message: Message) -> None:
    assert a_keeper(*ONE).receive(A, message, now=1.0) == []


def test_what_is_not_of_a_round_is_refused() -> None:
    (refused,) = a_keeper(*ONE).receive(A, Welcome(GENESIS), now=1.0)
    assert isinstance(refused, Refused)


# -- an empty disk


def test_on_an_empty_disk_it_decides_nothing_alone_though_the_run_began_with_it() -> None:
    keeper = a_keeper(term=2, disk=NEW_DISK)
    effects = [*reported(keeper, A, B, now=0.0), *passed(keeper, 60)]
    assert not keeper.follower.leads
    assert said(effects, Plan) == []
    assert keeper.follower.ledger.head.round == 0


def test_on_an_empty_disk_it_leads_again_only_once_a_block_names_its_new_incarnation() -> None:
    keeper = a_keeper(*ONE, term=2, disk=NEW_DISK)
    assert keeper.follower.leader == FOUNDER, "the seat is still that of its old disk"
    assert not keeper.follower.leads
    committed(keeper, next_block(seat=delegation(FOUNDER, 1)), view=1)
    assert not keeper.follower.leads, "the block names the disk that was lost"
    third = a_block(keeper.follower.ledger.head, an_entry("a", (60, 70)), an_entry("b", (70, 80)))
    named = tuple(
        Voter(voter.peer, voter.weight, NEW_DISK) if voter.peer == FOUNDER else voter for voter in third.committee
    )
    again = replace(third, committee=named, coordinator=delegation(FOUNDER, 2))
    committed(keeper, again, view=1, now=2.0)
    assert keeper.follower.leads


def test_the_peer_that_leads_meanwhile_names_the_disk_that_it_reports() -> None:
    keeper, stand_in = a_keeper(*ONE, term=2, disk=NEW_DISK), a_leader(NEXT, *ONE)
    stand_in.synced(1, model_after(1), (), now=0.0)
    proof = new_view(pledged(peer, HEAD, 1) for peer in (A, B, C))
    stand_in.receive(A, proof, now=0.0)
    keeper.receive(A, proof, now=0.0)
    others = [peer for peer in (A, B, C) if peer != NEXT]
    effects: list[Effect] = []
    for second in range(int(SETTLE_S) + 2):
        now = float(second)
        for effect in keeper.tick(now=now):
            if isinstance(effect, Send) and NEXT in effect.to:
                stand_in.receive(FOUNDER, effect.message, now=now)
        for peer in others:
            report = said(reported_to(stand_in, peer), Report)[0]
            effects += stand_in.receive(peer, report, now=now)
        effects += stand_in.tick(now=now)
    plan = stand_in.plan
    assert plan is not None
    assert set(plan.members) == set(others)
    block = folded_block(stand_in, plan)
    assert block.coordinator == delegation(FOUNDER, 2)
    assert next(v.incarnation for v in block.committee if v.peer == FOUNDER) == NEW_DISK
    committed(keeper, block, view=1, now=20.0)
    assert keeper.follower.leads


def reported_to(leader: Leader, peer: PeerId) -> list[Effect]:
    """What `peer` sends to one who leads: that it is ready for work."""
    head = leader.follower.ledger.head
    report = Report(
        epoch=head.epoch, head_round=head.round, head=head.hash, in_view=leader.follower.view,
        incarnation=disk_of(peer), trains=True, stage=Stage.WAITING, round=0, view=0, attempt=0, step=0, of_steps=0,
        leaving=False, reach=Reach.OPEN, uplink=1e6, addresses=(),
    )  # fmt: skip
    return [Send((leader.follower.leader,), report)]


def folded_block(leader: Leader, plan: Plan) -> Block:
    """The block that the leader proposes once everyone in its plan has worked."""
    for seat in plan.seats:
        tokens = ranges.count(seat.ranges) * RECIPE.model.context
        promise = Contribution(0, plan.round, plan.head, digest(f"root {seat.peer}"), seat.ranges, tokens, 2.0)
        leader.receive(seat.peer, promise, now=8.0)
    held = tuple((peer, digest(f"root {peer}")) for peer in plan.members)
    effects: list[Effect] = []
    owners = sorted(set(plan.owners))
    for owner in owners:
        leader.receive(owner, Have(*plan.order, held), now=8.0)
    for owner in owners:
        parts = {part: digest(f"average {part}") for part, who in enumerate(plan.owners) if who == owner}
        effects += leader.result(owner, plan.order, parts, now=8.0)
    return said(effects, Proposal)[0].block


# -- two of them


def test_it_yields_to_one_that_was_started_later_and_says_so() -> None:
    keeper = a_keeper(*ONE)
    assert not keeper.yields
    keeper.receive(OTHER, delegation(OTHER, 2), now=1.0)
    assert keeper.yields
    assert keeper.reason == "yields: another coordinator was started later with the run key"
    assert keeper.dismissed is None, "nobody has banned it"


def test_the_seat_that_it_yields_goes_to_the_newer_one_with_the_next_block() -> None:
    keeper, newer = a_keeper(*ONE), a_keeper(*ONE, me=OTHER, term=2)
    effects: list[Effect] = []
    for second in range(1, int(RECIPE.rounds.exchange_s) + 2):
        for effect in newer.tick(now=float(second)):
            if isinstance(effect, Send) and FOUNDER in effect.to:
                effects += keeper.receive(OTHER, effect.message, now=float(second))
        effects += reported(keeper, A, B, C, now=float(second), stage=Stage.SYNCING)
        effects += keeper.tick(now=float(second))
    (block,) = {proposal.block.hash: proposal.block for proposal in said(effects, Proposal)}.values()
    assert block.coordinator == delegation(OTHER, 2)
    assert OTHER in {voter.peer for voter in block.committee}
    committed(newer, block, view=0, now=40.0)
    assert newer.follower.leads
    assert not newer.yields


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        (delegation(OTHER, 1), "not later"),
        (delegation(OTHER, 2, by=OTHER), "not by the organizer"),
        (replace(delegation(OTHER, 1), term=2), "the term of another signature"),
        (delegation(FOUNDER, 2), "its own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_yields_to_no_other_word(shown: Delegation, why: str) -> None:
    keeper = a_keeper(*ONE)
    keeper.receive(OTHER, shown, now=1.0)
    assert not keeper.yields, why


def test_the_older_learns_from_the_chain_as_well_that_it_is_to_yield() -> None:
    keeper = a_keeper(*ONE)
    committed(keeper, next_block(seat=delegation(OTHER, 2)))
    assert keeper.yields
    assert not keeper.follower.leads
    assert said(passed(keeper, 3, since_s=1.0), Delegation) == [], "its own is of no use any more"


# -- leaving


def test_it_leaves_once_a_block_without_it_is_committed() -> None:
    keeper = a_keeper(*ONE)
    reported(keeper, A, B, C, now=0.0, stage=Stage.SYNCING)
    assert not keeper.may_go(now=0.0), "nobody has asked it to"
    (proposal, *_) = said(keeper.stop(now=1.0), Proposal)
    assert {voter.peer for voter in proposal.block.committee} == {A, B, C}
    assert not keeper.may_go(now=1.0)
    committed(keeper, proposal.block, view=0, now=2.0)
    assert keeper.may_go(now=2.0)


def test_it_finishes_the_round_that_it_leads_before_it_goes() -> None:
    keeper = a_keeper(*ONE)
    reported(keeper, A, B, C, now=0.0)
    plan = keeper.plan
    assert plan is not None
    keeper.stop(now=1.0)
    assert keeper.leader.phase is Phase.GATHER
    assert keeper.plan == plan
    assert not keeper.may_go(now=1.0)


def test_nor_does_it_go_in_the_midst_of_the_first_round_in_which_it_decides_alone() -> None:
    keeper = a_keeper()
    reported(keeper, A, B, now=0.0)
    keeper.stop(now=1.0)
    assert keeper.leader.phase is Phase.GATHER
    assert not keeper.may_go(now=1.0)


def test_one_that_follows_asks_to_be_let_out_in_its_reports() -> None:
    keeper = a_keeper(*ONE)
    keeper.receive(NEXT, new_view(pledged(peer, HEAD, 1) for peer in (A, B, C)), now=1.0)
    (report,) = said(keeper.stop(now=2.0), Report)
    assert report.leaving
    assert not keeper.may_go(now=2.0)


def test_alone_or_deserted_it_goes_at_once() -> None:
    alone = a_keeper()
    alone.stop(now=1.0)
    assert alone.may_go(now=1.0)
    without_a_model = a_keeper(at_head=False)
    without_a_model.stop(now=1.0)
    assert without_a_model.may_go(now=1.0)
    deserted = a_keeper(*ONE)
    reported(deserted, A, B, C, now=0.0, stage=Stage.SYNCING)
    passed(deserted, int(SILENCE_S) + 1)
    deserted.stop(now=10.0)
    assert deserted.may_go(now=10.0)


def test_what_keeps_it_from_going_does_so_for_leave_s_at_most() -> None:
    keeper = a_keeper(*ONE)
    reported(keeper, A, B, C, now=0.0)
    keeper.stop(now=1.0)
    assert not keeper.may_go(now=LEAVE_S + 0.9)
    assert keeper.may_go(now=LEAVE_S + 1.0)
    follows = a_keeper(*ONE)
    proof: NewView = new_view(pledged(peer, HEAD, 1) for peer in (A, B, C))
    follows.receive(NEXT, proof, now=0.0)
    follows.stop(now=1.0)
    assert not follows.may_go(now=LEAVE_S + 0.9)
    assert follows.may_go(now=LEAVE_S + 1.0)


def test_a_banned_coordinator_votes_itself_out_and_goes_then_or_after_a_while() -> None:
    keeper = a_keeper(*ONE)
    reported(keeper, A, B, C, now=0.0, stage=Stage.SYNCING)
    keeper.follower.admission.decisions.take(Decision(FOUNDER, "ban", "poison", 0.0, float("inf"), b""))
    (proposal, *_) = said(keeper.tick(now=1.0), Proposal)
    assert {voter.peer for voter in proposal.block.committee} == {A, B, C}
    assert keeper.dismissed == keeper.reason
    assert keeper.reason.startswith("E403 the organizer has banned your key (poison)")
    assert not keeper.may_go(now=1.0 + BANNED_S - 0.1)
    assert keeper.may_go(now=1.0 + BANNED_S)
    committed(keeper, proposal.block, view=0, now=2.0)
    assert keeper.may_go(now=2.0)
