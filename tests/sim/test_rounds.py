"""Whole runs in virtual time with one scripted fault each; what must hold in any run is checked by the world."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from dugnad.configs.recipe import Recipe, Stage, load
from dugnad.coordinator import ranges
from dugnad.coordinator.effects import LeftOut
from dugnad.coordinator.messages import Block, Contribution, Plan
from dugnad.coordinator.replica import REPLAY_ROUNDS
from dugnad.coordinator.rounds import Leader, Phase
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message
from dugnad.optim import reduce as reducing
from dugnad.peer.lifecycle import Reduce, Train
from dugnad.peer.nodes import CoordinatorNode, Node
from dugnad.peer.stage import COORDINATOR
from dugnad.peer.volunteer_node import VolunteerNode
from dugnad.peer.world import World

WHOLE = load("tiny-books")
_LONG = Stage(until_step=10**6, steps=10)
RECIPE = dataclasses.replace(
    WHOLE, rounds=dataclasses.replace(WHOLE.rounds, total_steps=_LONG.until_step, schedule=(_LONG,))
)
"""It has no end, and all its rounds are as long."""
HEALED_S = 30.0
"""How long after a partition heals all must agree: a look around, a catch-up and a few rounds of reports."""


def with_rounds(**settings: float) -> Recipe:
    return dataclasses.replace(RECIPE, rounds=dataclasses.replace(RECIPE.rounds, **settings))  # type: ignore[arg-type]


def started(seed: int, volunteers: int, *, rounds: int = 3, recipe: Recipe = RECIPE) -> tuple[World, list[PeerId]]:
    """A run of so many volunteers in which everyone has the commit of round `rounds`."""
    world = World(seed, recipe)
    names = [PeerId(f"p{k:02}") for k in range(volunteers)]
    world.start_coordinator()
    for name in names:
        world.start_volunteer(name)
    world.run(600, until=everyone_at(world, rounds))
    assert world.rounds() >= rounds
    return world, names


def everyone_at(world: World, round_: int) -> Callable[[], bool]:
    return lambda: all(len(world.disks[peer].commits) >= round_ for peer in world.nodes)


def committed(world: World, at_least: int) -> Callable[[], bool]:
    return lambda: world.rounds() >= at_least


def goes_on(world: World, rounds: int, *, within_s: float) -> list[Block]:
    """The next so many blocks, which must be committed in that time."""
    before, since = world.rounds(), world.now
    world.run(since + within_s, until=committed(world, before + rounds))
    assert world.rounds() >= before + rounds, f"{world.rounds() - before} rounds in {within_s} s: {world.reason()}"
    assert world.audit().clean
    return [commit.block for commit in world.chain()[before:]]


def contributors(block: Block) -> list[PeerId]:
    return [entry.peer for entry in block.entries]


def voters(world: World) -> list[PeerId]:
    return [voter.peer for voter in world.chain()[-1].block.committee]


def leading(world: World) -> Leader:
    node = world.leader()
    assert node is not None
    return node.leader()


def in_phase(world: World, phase: Phase) -> Callable[[], bool]:
    return lambda: any(node.leader().phase is phase for node in world.nodes.values())


def volunteer(world: World, name: str) -> VolunteerNode:
    node = world.nodes[PeerId(name)]
    assert isinstance(node, VolunteerNode)
    return node


def effects_of(world: World, patch: pytest.MonkeyPatch, kind: type) -> list[tuple[PeerId, object]]:
    """Every effect of that kind from now on, filled as the run goes on; of a `Reduce`, what is in it."""
    seen: list[tuple[PeerId, object]] = []
    honest = VolunteerNode.perform_one

    def noted(self: VolunteerNode, effect: object) -> None:
        inner = effect.effect if isinstance(effect, Reduce) else effect
        if isinstance(inner, kind):
            seen.append((self.peer, inner))
        honest(self, effect)

    patch.setattr(VolunteerNode, "perform_one", noted)
    return seen


# -- nothing fails


def test_a_quiet_run_finishes_and_everyone_leaves_with_the_same_model() -> None:
    world, names = started(1, 4, rounds=1, recipe=WHOLE)
    world.run(3600, until=lambda: len(world.left) == 4)
    assert set(world.left.values()) == {"the run is finished"}
    assert world.chain()[-1].block.global_step == WHOLE.rounds.total_steps
    assert {world.disks[name].model for name in names} == {world.models[world.chain()[-1].block.hash]}
    assert world.audit().clean
    world.run(world.now + 60)  # a coordinator that is still there has nothing to do, and comes to rest


def test_fifty_volunteers_commit_rounds_with_everyone_counted() -> None:
    world, _ = started(2, 50)
    assert len(goes_on(world, 2, within_s=60)[-1].entries) == 50


def test_a_joiner_is_counted_by_the_second_round_after_it_came() -> None:
    world, _ = started(5, 3)
    world.start_volunteer("late")
    assert "late" in [peer for block in goes_on(world, 3, within_s=60) for peer in contributors(block)]


def test_leaving_in_order_shrinks_the_committee_until_the_coordinator_is_alone() -> None:
    world, names = started(6, 3)
    for name in names:
        volunteer(world, name).leave()
    world.run(world.now + 120, until=lambda: len(world.left) == 3)
    assert set(world.left.values()) == {"left in order"}
    assert voters(world) == [COORDINATOR]
    assert world.audit().clean


# -- the coordinator


def test_a_coordinator_killed_at_round_3_is_not_needed_to_finish_the_run() -> None:
    world, _ = started(1, 3, recipe=WHOLE.cut(10))
    world.crash(COORDINATOR)
    world.run(600, until=lambda: len(world.left) == 3)
    assert set(world.left.values()) == {"the run is finished"}
    assert COORDINATOR not in voters(world)
    assert world.audit().clean


def test_a_coordinator_on_an_empty_disk_votes_and_leads_only_once_a_block_names_its_incarnation() -> None:
    world, _ = started(2, 3)
    world.crash(COORDINATOR)
    world.wipe(COORDINATOR)
    before = world.rounds()
    world.start_coordinator()
    fresh = world.disks[COORDINATOR].incarnation

    def named() -> bool:
        return fresh in [voter.incarnation for voter in world.chain()[-1].block.committee]

    world.run(world.now + 200, until=named)
    assert named(), world.reason()
    since = world.chain()[before:]
    assert COORDINATOR not in [ballot.peer for commit in since for ballot in commit.ballots]
    goes_on(world, 2, within_s=60)
    assert leading(world) is world.nodes[COORDINATOR].leader()
    assert COORDINATOR in [ballot.peer for commit in world.chain()[-2:] for ballot in commit.ballots]


def test_of_two_coordinators_the_one_delegated_later_leads_and_the_older_says_that_it_yields() -> None:
    world, _ = started(3, 3)
    newer = world.start_coordinator("coordinator-2")
    older = world.nodes[COORDINATOR]
    assert isinstance(older, CoordinatorNode)
    goes_on(world, 4, within_s=90)
    assert newer.leader().phase is not Phase.FOLLOWING
    assert older.machine.yields
    assert "yields" in older.machine.reason
    assert not newer.machine.yields


def test_a_coordinator_killed_and_restarted_goes_on_with_the_work_that_is_still_good() -> None:
    world, names = started(13, 3)
    world.run(world.now + 60, until=in_phase(world, Phase.GATHER))
    world.crash(COORDINATOR)
    world.start_coordinator()
    assert contributors(goes_on(world, 1, within_s=60)[0]) == names


def test_a_plan_of_a_new_leader_that_was_lost_on_the_way_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world, names = started(14, 3)
    world.run(world.now + 60, until=in_phase(world, Phase.GATHER))
    world.crash(COORDINATOR)
    lost: list[PeerId] = []
    send = world.send

    def loses_the_first_plan(sender: PeerId, to: PeerId, message: Message, nbytes: int) -> None:
        if isinstance(message, Plan) and not lost:
            lost.append(to)
        else:
            send(sender, to, message, nbytes)

    monkeypatch.setattr(world, "send", loses_the_first_plan)
    world.start_coordinator()
    assert contributors(goes_on(world, 2, within_s=30)[-1]) == names
    assert lost


# -- volunteers die


@pytest.mark.parametrize("phase", [Phase.GATHER, Phase.REDUCE, Phase.VOTE])
def test_a_volunteer_killed_in_the_middle_of_a_round_costs_only_its_own_work(phase: Phase) -> None:
    world, names = started(3, 4)
    world.run(world.now + 60, until=in_phase(world, phase))
    world.crash("p01")
    assert contributors(goes_on(world, 3, within_s=60)[-1]) == [name for name in names if name != "p01"]


def test_work_of_a_peer_that_died_after_its_bytes_were_held_still_counts() -> None:
    world, names = started(4, 4)
    world.run(world.now + 60, until=in_phase(world, Phase.VOTE))
    world.crash("p02")
    assert contributors(goes_on(world, 1, within_s=60)[0]) == names


def killed_while_reducing(world: World, choose: Callable[[Plan], Sequence[PeerId]]) -> tuple[Plan, list[PeerId]]:
    """Kill whom `choose` names as soon as the set of a round is frozen; the plan, and who they were."""
    world.run(world.now + 60, until=in_phase(world, Phase.REDUCE))
    plan = leading(world).plan
    assert plan is not None
    victims = list(dict.fromkeys(choose(plan)))
    for victim in victims:
        world.crash(victim)
    return plan, victims


def next_owners(world: World, plan: Plan) -> tuple[PeerId, ...]:
    """Who owns the parts in the last attempt at the round of `plan`."""
    seen = plan.owners

    def over() -> bool:
        nonlocal seen
        newer = leading(world).plan if world.leader() is not None else None
        seen = newer.owners if newer is not None and newer.round == plan.round else seen
        return world.rounds() >= plan.round

    world.run(world.now + 90, until=over)
    assert over(), world.reason()
    assert world.audit().clean
    return seen


def test_the_backup_of_a_volunteer_killed_while_reducing_takes_its_parts_over_and_nothing_else_is_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, _ = started(5, 4)
    plan, (victim,) = killed_while_reducing(world, lambda plan: [plan.owners[0]])
    trained, sent = effects_of(world, monkeypatch, Train), effects_of(world, monkeypatch, reducing.Upload)
    owners = next_owners(world, plan)
    pairs = zip(plan.owners, plan.backups, owners, strict=True)
    assert all(now == (backup if owner == victim else owner) for owner, backup, now in pairs)
    assert trained == []
    lost = {part for part, owner in enumerate(plan.owners) if owner == victim}
    assert {part for _, upload in sent if isinstance(upload, reducing.Upload) for part in upload.parts} <= lost
    assert sent


def test_when_owner_and_backup_die_a_survivor_is_given_the_part_and_asks_the_contributors_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, names = started(6, 6)
    plan, victims = killed_while_reducing(world, lambda plan: [plan.owners[0], plan.backups[0]])
    trained, sent = effects_of(world, monkeypatch, Train), effects_of(world, monkeypatch, reducing.Upload)
    owners = next_owners(world, plan)
    assert len(victims) == 2
    assert owners[0] not in victims
    assert trained == []
    again = {peer for peer, upload in sent if isinstance(upload, reducing.Upload) and 0 in upload.parts}
    assert again >= set(names) - {*victims, owners[0]}
    block = world.chain()[plan.round - 1].block
    assert set(contributors(block)) == set(names) - set(victims)


def test_a_volunteer_killed_between_prevote_and_precommit_loses_no_round_and_keeps_its_word() -> None:
    world, names = started(7, 3)

    def killed_after_its_prevote(node: Node, what: str, act: Callable[[], object]) -> object:
        done = act()
        promises = node.disk.promises
        if (node.peer, what) == ("p01", "Send(Vote)") and promises is not None and promises.lock is None:
            world.after(0.0, lambda: world.crash("p01"))
            world.step = lambda node, what, act: act()
        return done

    world.step = killed_after_its_prevote
    world.run(world.now + 60, until=lambda: PeerId("p01") not in world.nodes)
    promises, before = world.disks[PeerId("p01")].promises, world.rounds()
    assert promises is not None
    assert promises.prevoted is not None
    said = promises.prevoted.block
    goes_on(world, 1, within_s=30)
    assert world.chain()[before].block == said
    world.start_volunteer("p01")
    assert contributors(goes_on(world, 3, within_s=60)[-1]) == names


def test_all_killed_at_once_go_on_from_their_disks_at_the_newest_committed_round() -> None:
    world, names = started(11, 3, rounds=5)
    for name in (COORDINATOR, *names):
        world.crash(name)
    head = world.chain()[-1].block.hash
    world.start_coordinator()
    for name in names:
        world.start_volunteer(name)
    assert goes_on(world, 3, within_s=120)[0].parent == head


# -- slow, frozen and half-way


def test_a_contribution_that_stops_half_way_is_left_out_whole_and_its_samples_are_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, names = started(8, 4, recipe=with_rounds(train_s=10.0, exchange_s=5.0))
    world.run(world.now + 60, until=in_phase(world, Phase.GATHER))
    plan = leading(world).plan
    assert plan is not None
    seat = plan.seat_of(PeerId("p02"))
    assert seat is not None
    honest = VolunteerNode._upload

    def stops(self: VolunteerNode, plan: Plan, owner: PeerId, root: bytes, parts: tuple[int, ...]) -> None:
        if (self.peer, owner) != ("p02", "p00"):  # all its other owners, and the leader, have it
            honest(self, plan, owner, root, parts)

    monkeypatch.setattr(VolunteerNode, "_upload", stops)
    (block,) = goes_on(world, 1, within_s=60)
    assert contributors(block) == [name for name in names if name != "p02"]
    assert not ranges.minus(seat.ranges, block.redo)
    monkeypatch.undo()
    (after, *_) = goes_on(world, 2, within_s=60)
    assert not ranges.minus(block.redo, [r for entry in after.entries for r in entry.ranges])


def test_a_frozen_peer_costs_its_silence_once_and_is_counted_again_when_it_thaws() -> None:
    world, names = started(7, 4)
    since = world.now
    goes_on(world, 1, within_s=30)
    usual_s = world.now - since
    world.run(world.now + 30, until=in_phase(world, Phase.GATHER))
    world.freeze("p03")
    since = world.now
    goes_on(world, 1, within_s=60)
    assert world.now - since < RECIPE.rounds.silence_s + 2 * usual_s
    since = world.now
    goes_on(world, 1, within_s=60)
    assert world.now - since < 2 * usual_s
    world.thaw("p03")
    assert contributors(goes_on(world, 3, within_s=60)[-1]) == names


def test_a_straggler_contributes_what_it_did_by_the_deadline_and_the_rest_is_redone() -> None:
    world, _ = started(8, 3, rounds=1, recipe=with_rounds(train_s=5.0))
    volunteer(world, "p02").step_s = 2.0
    goes_on(world, 3, within_s=200)
    blocks = [commit.block for commit in world.chain()]
    slow = next(b for b in blocks if len(b.entries) == 3 and b.entries[2].tokens < b.entries[0].tokens)
    assert slow.entries[2].tokens > 0
    assert slow.redo
    (after,) = goes_on(world, 1, within_s=60) if slow is blocks[-1] else [blocks[slow.round]]
    assert set(slow.redo) <= {r for entry in after.entries for r in entry.ranges}


def test_a_peer_with_nothing_finite_to_give_does_not_hold_up_the_others() -> None:
    world, _ = started(9, 4)
    node = volunteer(world, "p00")
    node._finish = lambda effect, steps: node.perform(  # type: ignore[method-assign]
        node.machine.not_trained(effect.plan, "non-finite values", now=world.now)
    )
    assert "p00" not in contributors(goes_on(world, 3, within_s=40)[-1])


def test_work_on_other_samples_than_those_of_its_seat_is_left_out() -> None:
    world, _ = started(16, 3)
    world.run(600, until=in_phase(world, Phase.GATHER))
    leader = leading(world)
    plan = leader.plan
    assert plan is not None
    one, other = plan.seats[:2]
    tokens = ranges.count(other.ranges) * RECIPE.model.context
    said = Contribution(plan.epoch, plan.round, plan.head, bytes(32), other.ranges, tokens, 3.0)
    (refused,) = leader.receive(one.peer, said, now=world.now)
    assert isinstance(refused, LeftOut)
    assert (refused.peer, refused.reason) == (one.peer, "other samples")
    assert leader.receive(other.peer, said, now=world.now) == []


@pytest.mark.parametrize("apply_s", [0.01, 6.0, 15.0])
def test_who_takes_long_to_apply_a_round_is_counted_in_the_next(apply_s: float) -> None:
    world, names = started(17, 4)
    goes_on(world, 1, within_s=60)
    world.nodes[PeerId("p02")].apply_s = apply_s
    assert [contributors(block) for block in goes_on(world, 3, within_s=120)] == [names] * 3


def test_a_late_peer_fetches_the_committed_bytes_by_their_digests_from_anyone_who_has_them() -> None:
    world, _ = started(10, 4)
    world.run(world.now + 60, until=in_phase(world, Phase.REDUCE))
    plan = leading(world).plan
    assert plan is not None
    world.freeze("p03")
    goes_on(world, 1, within_s=60)
    lost = plan.owners[0] if plan.owners[0] != "p03" else plan.owners[-1]
    world.crash(lost)  # who made them is gone
    world.thaw("p03")
    late = world.nodes[PeerId("p03")]
    world.run(world.now + 30, until=lambda: late.follower.model_round >= plan.round)
    assert late.follower.model_round >= plan.round
    assert world.traffic.taken[PeerId("p03")]["fetch"] > 0
    assert world.traffic.taken[PeerId("p03")]["state"] == world.traffic.taken[PeerId("p02")]["state"]
    goes_on(world, 2, within_s=60)


@pytest.mark.parametrize("behind", [1, REPLAY_ROUNDS, REPLAY_ROUNDS + 1, REPLAY_ROUNDS + 2])
def test_who_was_away_for_any_number_of_rounds_catches_up(behind: int) -> None:
    world, names = started(15, 4)
    world.freeze("p03")
    stood_at = world.nodes[PeerId("p03")].follower.ledger.head.round
    world.run(world.now + 3600, until=committed(world, stood_at + behind))
    world.thaw("p03")
    assert contributors(goes_on(world, 6, within_s=60)[-1]) == names


# -- partitions, quorums, epochs


@pytest.mark.parametrize("seed", range(10))
def test_of_two_halves_one_at_most_commits_and_all_agree_within_30_s_of_healing(seed: int) -> None:
    world, names = started(seed, 6)
    world.run(world.now + world.rng.uniform(0, 5))
    halves = [COORDINATOR, *names[:3]], names[3:]
    stood_at = world.rounds()
    world.partition(*halves)
    world.run(world.now + 120)
    reached = [max(len(world.disks[PeerId(name)].commits) for name in half) for half in halves]
    assert min(reached) <= stood_at + 1  # what was on its way
    assert max(reached) > stood_at + 3
    world.heal()
    world.run(world.now + HEALED_S)
    agreed = world.chain()[: max(reached)]
    assert all(disk.commits[: max(reached)] == agreed for disk in world.disks.values())
    goes_on(world, 2, within_s=60)


def test_without_a_quorum_volunteers_coast_then_pause_and_go_on_when_the_others_are_back() -> None:
    world, names = started(12, 4)
    world.run(world.now + 60, until=in_phase(world, Phase.GATHER))
    left = volunteer(world, "p00")
    left.step_s = 10.0
    for name in (COORDINATOR, *names[1:]):
        world.crash(name)
    before, model = world.rounds(), left.disk.model
    world.run(world.now + 15)
    assert "coasting" in left.machine.why(now=world.now)
    world.run(world.now + 120)
    assert "paused, work is kept" in left.machine.why(now=world.now)
    assert (world.rounds(), left.disk.model) == (before, model)
    left.step_s = 0.1
    for name in names[1:]:
        world.start_volunteer(name)
    blocks = goes_on(world, 3, within_s=120)
    assert contributors(blocks[-1]) == names


def test_a_committee_shrinks_one_by_one_to_a_single_volunteer_and_grows_again() -> None:
    world, _ = started(13, 4, recipe=with_rounds(min_peers=1))
    for name in (COORDINATOR, PeerId("p03"), PeerId("p02")):
        world.crash(name)
        goes_on(world, 2, within_s=90)
        assert name not in voters(world)
    assert voters(world) == ["p00", "p01"]
    volunteer(world, "p01").leave()  # of two, one must say that it goes
    world.run(world.now + 60, until=lambda: PeerId("p01") in world.left)
    goes_on(world, 2, within_s=60)
    assert voters(world) == ["p00"]
    for name in (PeerId("p01"), PeerId("p02"), PeerId("new")):
        world.start_volunteer(name)
        world.run(world.now + 90, until=lambda name=name: name in voters(world))  # type: ignore[misc]
        assert name in voters(world)
    world.start_coordinator()
    world.run(world.now + 90, until=lambda: COORDINATOR in voters(world))
    goes_on(world, 1, within_s=30)
    assert voters(world) == [COORDINATOR, "new", "p00", "p01", "p02"]


def test_an_epoch_that_the_organizer_begins_takes_back_what_others_committed_after_its_base() -> None:
    world, names = started(14, 3)
    world.partition([COORDINATOR], names)
    goes_on(world, 2, within_s=60)
    for one in (COORDINATOR, *names[1:]):
        world.crash(one)
    base = len(world.disks[COORDINATOR].commits)
    lost = {commit.block.hash for commit in world.chain()[base:]}
    world.heal()
    world.recover(COORDINATOR)
    world.start_coordinator()
    for name in ("new0", "new1"):
        world.start_volunteer(name)
    world.run(world.now + 60, until=lambda: world.disks[PeerId("p00")].commits[-1].block.epoch == 1)
    goes_on(world, 3, within_s=90)
    blocks = [commit.block for commit in world.chain()]
    assert [block.epoch for block in blocks[base - 1 : base + 1]] == [0, 1]
    assert lost
    assert not lost & {block.hash for block in blocks}
    assert "p00" in contributors(blocks[-1])


def test_who_leads_alone_what_is_left_of_an_old_epoch_finds_the_new_one() -> None:
    world, names = started(15, 2)
    world.crash(COORDINATOR)
    goes_on(world, 2, within_s=60)
    world.run(world.now + 60, until=in_phase(world, Phase.GATHER))  # it has voted for nothing yet
    alone = world.nodes[names[0]].follower.ledger.head.leader(0)
    for name in names:
        world.crash(name)
    world.recover(COORDINATOR)
    world.start_coordinator()
    world.start_volunteer(alone)
    world.run(world.now + 60, until=lambda: world.disks[alone].commits[-1].block.epoch == 1)
    assert world.disks[alone].commits[-1].block.epoch == 1


@pytest.mark.parametrize("seed", range(10))
def test_a_leader_of_a_late_view_proposes_no_committee_in_which_those_who_are_here_decide_nothing(seed: int) -> None:
    world, (lost, other) = started(seed, 2)
    world.crash(lost)
    world.wipe(lost)
    world.start_volunteer(lost)  # the committee knows another disk of it
    world.partition([COORDINATOR], [lost, other])
    world.partition([lost], [other])
    world.run(world.now + 60 + 5 * seed)  # the two who can vote give up one view after the other
    world.heal()
    goes_on(world, 3, within_s=120)


# -- leaving without a coordinator


@pytest.mark.parametrize("seed", range(5))
def test_all_who_want_to_leave_at_once_can_without_a_coordinator(seed: int) -> None:
    world, names = started(seed, 3)
    world.crash(COORDINATOR)
    goes_on(world, 1, within_s=60)
    for name in names:
        volunteer(world, name).leave()
    world.run(world.now + 120, until=lambda: len(world.left) == 3)
    assert sorted(world.left.values()) == [
        "left as the last: the run goes on from this folder", "left in order", "left in order",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_who_has_only_just_taken_the_lead_does_not_leave_as_if_it_were_the_last(seed: int) -> None:
    world, names = started(seed, 3)
    world.crash(COORDINATOR)
    head = world.nodes[names[0]].follower.ledger.head
    world.run(world.now + 0.01)
    next_leader = head.leader(1)
    volunteer(world, next_leader).leave()
    world.run(world.now + 90, until=lambda: next_leader in world.left)
    assert world.left[next_leader] == "left in order"
    goes_on(world, 2, within_s=60)


@pytest.mark.parametrize("seed", range(5))
def test_when_all_voters_leave_the_last_hands_the_run_to_those_who_have_no_vote_yet(seed: int) -> None:
    world, names = started(seed, 2)
    world.crash(COORDINATOR)
    goes_on(world, 1, within_s=60)
    newcomers = [world.start_volunteer(name) for name in ("new0", "new1")]
    world.run(world.now + 60, until=lambda: all(node.follower.model is not None for node in newcomers))
    for name in names:
        volunteer(world, name).leave()
    world.run(world.now + 120, until=lambda: len(world.left) == 2)
    assert set(world.left.values()) == {"left in order"}
    goes_on(world, 2, within_s=60)


# -- restarts in the midst of a round


@pytest.mark.parametrize("seed", range(20))
def test_work_is_credited_to_the_samples_it_was_trained_on_also_when_a_new_leader_allots_others(seed: int) -> None:
    world, _ = started(seed, 3)
    leader = world.nodes[COORDINATOR].leader()
    victim = world.rng.choice(["p00", "p01"])
    world.when(lambda: leader.phase is Phase.GATHER, lambda: world.crash(victim))
    promised = world.rng.choice([1, 2])
    world.when(
        lambda: (
            victim not in world.nodes and leader._round is not None and len(leader._round.contributions) >= promised
        ),
        lambda: world.crash(COORDINATOR),
        every_s=0.001,
    )
    world.run(world.now + 60, until=lambda: COORDINATOR not in world.nodes)
    world.at(world.now + world.rng.uniform(0.1, 3), world.start_coordinator)
    goes_on(world, 3, within_s=120)


@pytest.mark.parametrize("seed", range(6))
def test_an_owner_that_restarts_with_the_coordinator_is_sent_again_what_it_has_lost(seed: int) -> None:
    world, names = started(seed, 4)
    leader = world.nodes[COORDINATOR].leader()

    def held_by_one_who_will_restart() -> bool:
        work = leader._round
        if leader.phase is not Phase.GATHER or work is None or len(work.contributions) < 3:
            return False
        return all((PeerId("p01"), peer) in work.held for peer in work.contributions)

    world.run(world.now + 60, until=held_by_one_who_will_restart)
    world.crash(COORDINATOR)
    world.crash("p01")
    world.start_coordinator()
    world.start_volunteer("p01")
    assert contributors(goes_on(world, 1, within_s=20)[0]) == names
