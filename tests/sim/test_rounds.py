"""Whole runs in virtual time, with scripted and random faults; the rules are checked by the world at every step."""

import dataclasses
from collections.abc import Callable

import pytest

from dugnad.configs.recipe import load
from dugnad.coordinator import ranges
from dugnad.coordinator.follower import REPLAY_ROUNDS
from dugnad.coordinator.messages import Contribution, Message, Plan
from dugnad.coordinator.rounds import LeftOut, Phase
from dugnad.dht.identity import PeerId
from tests.sim.world import COORDINATOR, VolunteerNode, World

RECIPE = load("tiny-books")


def start(world: World, volunteers: int) -> list[str]:
    names = [f"p{k:02}" for k in range(volunteers)]
    world.start_coordinator()
    for k, name in enumerate(names):
        world.at(0.2 + 0.01 * k, lambda name=name: world.start_volunteer(name))  # type: ignore[misc]
    return names


def rounds(world: World) -> int:
    return len(world.disks[COORDINATOR].commits)


def committed(world: World, at_least: int) -> Callable[[], bool]:
    return lambda: rounds(world) >= at_least


def assert_clean(world: World) -> None:
    found = world.audit()
    assert found.clean, found
    assert found.rounds == rounds(world)


def test_a_quiet_run_finishes_and_everyone_leaves_with_the_same_model() -> None:
    world = World(1, RECIPE)
    names = start(world, 4)
    world.run(3600, until=lambda: len(world.left) == 4)
    assert set(world.left.values()) == {"the run is finished"}
    last = rounds(world)
    assert world.disks[COORDINATOR].commits[-1].block.global_step == RECIPE.rounds.total_steps
    assert {world.disks[PeerId(name)].model for name in names} == {world.models[last]}
    assert_clean(world)
    world.run(world.now + 60)  # a coordinator that is still there has nothing to do, and comes to rest


def test_fifty_volunteers_commit_rounds_with_everyone_counted() -> None:
    world = World(2, RECIPE, num_parts=50)
    start(world, 50)
    world.run(600, until=committed(world, 6))
    assert rounds(world) >= 6
    assert len(world.disks[COORDINATOR].commits[-1].block.entries) == 50
    assert_clean(world)


@pytest.mark.parametrize("moment", ["training", "gathering", "reducing", "voting"])
def test_a_volunteer_killed_in_the_middle_of_a_round_costs_only_its_own_work(moment: str) -> None:
    world = World(3, RECIPE)
    names = start(world, 4)
    world.run(600, until=committed(world, 3))
    leader = world.nodes[COORDINATOR].leader()
    phases = {"training": Phase.GATHER, "gathering": Phase.GATHER, "reducing": Phase.REDUCE, "voting": Phase.VOTE}

    def ripe() -> bool:
        if leader.phase is not phases[moment]:
            return False
        return moment != "gathering" or (leader._round is not None and len(leader._round.contributions) >= 2)

    world.when(ripe, lambda: world.crash("p01"), every_s=0.001)
    before = rounds(world)
    world.run(world.now + 200, until=committed(world, before + 4))
    assert rounds(world) >= before + 4
    assert "p01" not in {entry.peer for entry in world.disks[COORDINATOR].commits[-1].block.entries}
    assert len(world.disks[COORDINATOR].commits[-1].block.entries) == len(names) - 1
    assert_clean(world)


def test_work_of_a_peer_that_died_after_its_bytes_were_held_still_counts() -> None:
    world = World(4, RECIPE)
    start(world, 4)
    world.run(600, until=committed(world, 3))
    leader = world.nodes[COORDINATOR].leader()
    world.when(lambda: leader.phase is Phase.VOTE, lambda: world.crash("p02"), every_s=0.0005)
    before = rounds(world)
    world.run(world.now + 200, until=committed(world, before + 1))
    assert "p02" in {entry.peer for entry in world.disks[COORDINATOR].commits[before].block.entries}
    assert_clean(world)


def test_a_joiner_is_counted_by_the_second_round_after_it_came() -> None:
    world = World(5, RECIPE)
    start(world, 3)
    world.run(600, until=committed(world, 4))
    before = rounds(world)
    world.start_volunteer("late")
    world.run(world.now + 300, until=committed(world, before + 3))
    counted = [e.peer for commit in world.disks[COORDINATOR].commits[before : before + 3] for e in commit.block.entries]
    assert "late" in counted
    assert_clean(world)


def test_leaving_in_order_shrinks_the_committee_until_the_coordinator_is_alone() -> None:
    world = World(6, RECIPE)
    names = start(world, 3)
    world.run(600, until=committed(world, 3))
    for name in names:
        node = world.nodes[PeerId(name)]
        assert isinstance(node, VolunteerNode)
        node.leave()
    world.run(world.now + 120, until=lambda: len(world.left) == 3)
    assert set(world.left.values()) == {"left in order"}
    committee = world.disks[COORDINATOR].commits[-1].block.committee
    assert [voter.peer for voter in committee] == [COORDINATOR]
    assert_clean(world)


def test_a_frozen_peer_costs_its_silence_and_is_counted_again_when_it_thaws() -> None:
    world = World(7, RECIPE)
    start(world, 4)
    world.run(600, until=committed(world, 3))
    world.freeze("p03")
    before, since = rounds(world), world.now
    world.run(world.now + 100, until=committed(world, before + 2))
    assert world.now - since < RECIPE.rounds.silence_s + 20
    world.thaw("p03")
    before = rounds(world)
    world.run(world.now + 100, until=committed(world, before + 3))
    assert "p03" in {entry.peer for entry in world.disks[COORDINATOR].commits[-1].block.entries}
    assert_clean(world)


def test_a_straggler_contributes_what_it_did_by_the_deadline_and_the_rest_is_redone() -> None:
    rounds_ = dataclasses.replace(RECIPE.rounds, train_s=5.0)
    world = World(8, dataclasses.replace(RECIPE, rounds=rounds_))
    start(world, 3)
    world.at(0.5, lambda: setattr(world.nodes[PeerId("p02")], "step_s", 2.0))
    world.run(600, until=committed(world, 3))
    blocks = [commit.block for commit in world.disks[COORDINATOR].commits]
    slow = next(block for block in blocks if len(block.entries) == 3)
    assert 0 < slow.entries[2].tokens < slow.entries[0].tokens
    assert slow.redo
    world.run(600, until=committed(world, slow.round + 1))
    after = world.disks[COORDINATOR].commits[slow.round].block
    redone = {r for entry in after.entries for r in entry.ranges}
    assert set(slow.redo) <= redone
    assert_clean(world)


def test_a_peer_with_nothing_finite_to_give_does_not_hold_up_the_others() -> None:
    world = World(9, RECIPE)
    start(world, 4)
    world.run(600, until=committed(world, 2))
    node = world.nodes[PeerId("p00")]
    assert isinstance(node, VolunteerNode)
    node._finish = lambda effect, steps: node.perform(  # type: ignore[method-assign]
        node.machine.not_trained(effect.plan, "non-finite values", now=world.now)
    )
    before, since = rounds(world), world.now
    world.run(world.now + 60, until=committed(world, before + 2))
    assert world.now - since < 30
    assert "p00" not in {entry.peer for entry in world.disks[COORDINATOR].commits[-1].block.entries}
    assert_clean(world)


def test_a_coordinator_killed_and_restarted_from_its_disk_goes_on_at_the_next_round() -> None:
    world = World(10, RECIPE)
    start(world, 3)
    world.run(600, until=committed(world, 4))
    world.crash(COORDINATOR)
    world.run(world.now + 20)
    stood_at = rounds(world)
    world.start_coordinator()
    world.run(world.now + 120, until=committed(world, stood_at + 3))
    assert rounds(world) >= stood_at + 3
    assert_clean(world)


@pytest.mark.parametrize("seed", range(20))
def test_work_is_credited_to_the_samples_it_was_trained_on_also_when_a_new_leader_allots_others(seed: int) -> None:
    world = World(seed, RECIPE)
    start(world, 3)
    world.run(600, until=committed(world, 3))
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
    before = rounds(world)
    world.at(world.now + world.rng.uniform(0.1, 3), world.start_coordinator)
    world.run(world.now + 120, until=committed(world, before + 3))
    assert rounds(world) >= before + 3
    assert_clean(world)


def test_work_on_other_samples_than_those_of_its_seat_is_left_out() -> None:
    world = World(16, RECIPE)
    start(world, 3)
    leader = world.nodes[COORDINATOR].leader()
    world.run(600, until=lambda: leader.phase is Phase.GATHER)
    plan = leader.plan
    assert plan is not None
    one, other = plan.seats[:2]
    tokens = ranges.count(other.ranges) * RECIPE.model.context
    said = Contribution(plan.epoch, plan.round, plan.head, bytes(32), other.ranges, tokens, 3.0)
    (refused,) = leader.receive(one.peer, said, now=world.now)
    assert isinstance(refused, LeftOut)
    assert (refused.peer, refused.reason) == (one.peer, "other samples")
    assert leader.receive(other.peer, said, now=world.now) == []


@pytest.mark.parametrize("seed", range(6))
def test_an_owner_that_restarts_with_the_coordinator_is_sent_again_what_it_has_lost(seed: int) -> None:
    world = World(seed, RECIPE)
    start(world, 4)
    world.run(600, until=committed(world, 3))
    leader = world.nodes[COORDINATOR].leader()

    def held_by_one_who_will_restart() -> bool:
        work = leader._round
        if leader.phase is not Phase.GATHER or work is None or len(work.contributions) < 3:
            return False
        return all((PeerId("p01"), peer) in work.held for peer in work.contributions)

    world.run(world.now + 60, until=held_by_one_who_will_restart)
    world.crash(COORDINATOR)
    world.crash("p01")
    before, since = rounds(world), world.now
    world.start_coordinator()
    world.start_volunteer("p01")
    world.run(world.now + 300, until=committed(world, before + 1))
    assert len(world.disks[COORDINATOR].commits[-1].block.entries) == 4
    assert world.now - since < 20
    assert_clean(world)


@pytest.mark.parametrize("back_after_s", [6.5, 8, 9, 10, 12])
def test_a_round_begun_on_an_older_copy_of_the_chain_is_given_up_when_the_newer_is_found(back_after_s: float) -> None:
    world = World(1, RECIPE)
    names = start(world, 3)
    world.run(300, until=committed(world, 3))
    world.run(world.now + 1.0)
    world.lose_newest_commit()
    world.start_coordinator()
    for name in ("new0", "new1"):
        world.start_volunteer(name)
    for name in names:
        world.at(world.now + back_after_s, lambda name=name: world.start_volunteer(name))  # type: ignore[misc]
    world.run(world.now + 60, until=committed(world, 8))
    assert rounds(world) >= 8
    assert_clean(world)


@pytest.mark.parametrize("apply_s", [0.01, 6.0, 15.0])
def test_who_takes_long_to_apply_a_round_is_counted_in_the_next(apply_s: float) -> None:
    world = World(17, RECIPE)
    start(world, 4)
    world.run(600, until=committed(world, 2))
    node = world.nodes[PeerId("p02")]
    node.apply_s = apply_s
    world.run(world.now + 120, until=committed(world, 5))
    assert [len(commit.block.entries) for commit in world.disks[COORDINATOR].commits[3:]] == [4, 4]
    assert_clean(world)


def test_a_voter_that_has_not_heard_its_coordinator_since_it_started_can_leave() -> None:
    world = World(18, RECIPE)
    start(world, 3)
    world.run(600, until=committed(world, 4))
    said = world.nodes[COORDINATOR].leader()._delegation
    world.crash("p01")
    world.crash(COORDINATOR)
    world.run(world.now + 1)  # what was on its way is gone
    node = VolunteerNode(world, PeerId("p01"), world.disks[PeerId("p01")])
    world.nodes[PeerId("p01")] = node
    node.do(lambda _: node.perform(node.machine.receive(COORDINATOR, said, now=world.now)))
    world.run(world.now + 5)
    node.leave()
    world.run(world.now + 60, until=lambda: PeerId("p01") in world.left)
    assert "does not answer" in world.left[PeerId("p01")]


def test_a_coordinator_that_comes_back_waits_for_the_work_that_is_still_good() -> None:
    world = World(13, RECIPE)
    names = start(world, 3)
    world.run(600, until=committed(world, 3))
    world.crash(COORDINATOR)
    before = rounds(world)
    world.start_coordinator()
    world.run(world.now + 60, until=committed(world, before + 1))
    assert [entry.peer for entry in world.disks[COORDINATOR].commits[-1].block.entries] == names
    assert_clean(world)


def test_a_plan_of_a_new_leader_that_was_lost_on_the_way_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(14, RECIPE)
    start(world, 3)
    world.run(600, until=committed(world, 3))
    leader, before = world.nodes[COORDINATOR].leader(), rounds(world)
    world.run(world.now + 60, until=lambda: leader.phase is Phase.GATHER)
    world.crash(COORDINATOR)
    lost: list[PeerId] = []
    send = world.send

    def loses_the_first_plan(sender: PeerId, to: PeerId, message: Message) -> None:
        if isinstance(message, Plan) and not lost:
            lost.append(to)
        else:
            send(sender, to, message)

    monkeypatch.setattr(world, "send", loses_the_first_plan)
    world.start_coordinator()
    since = world.now
    world.run(world.now + 120, until=committed(world, before + 2))
    assert lost
    assert world.now - since < 30
    assert_clean(world)


@pytest.mark.parametrize("behind", [1, REPLAY_ROUNDS, REPLAY_ROUNDS + 1, REPLAY_ROUNDS + 2])
def test_who_was_away_for_any_number_of_rounds_catches_up(behind: int) -> None:
    world = World(15, RECIPE)
    start(world, 4)
    world.run(600, until=committed(world, 2))
    world.freeze("p03")
    stood_at = world.nodes[PeerId("p03")].follower.ledger.head.round
    world.run(world.now + 3600, until=committed(world, stood_at + behind))
    world.thaw("p03")
    before = rounds(world)
    world.run(world.now + 60, until=committed(world, before + 3))
    assert "p03" in {entry.peer for entry in world.disks[COORDINATOR].commits[-1].block.entries}
    assert_clean(world)


def test_all_killed_at_once_go_on_from_their_disks_at_the_newest_committed_round() -> None:
    world = World(11, RECIPE)
    names = start(world, 3)
    world.run(600, until=committed(world, 5))
    for name in (COORDINATOR, *names):
        world.crash(name)
    stood_at = rounds(world)
    world.start_coordinator()
    for name in names:
        world.start_volunteer(name)
    world.run(world.now + 120, until=committed(world, stood_at + 3))
    assert rounds(world) >= stood_at + 3
    assert_clean(world)


def test_without_a_quorum_nothing_is_committed_and_the_reason_says_who_is_missing() -> None:
    world = World(12, RECIPE)
    start(world, 5)
    world.run(600, until=committed(world, 3))
    world.partition([COORDINATOR, "p00", "p01"], ["p02", "p03", "p04"])
    before = rounds(world)
    world.run(world.now + 120)
    assert rounds(world) <= before + 1
    assert "votes" in world.reason()
    world.heal()
    world.run(world.now + 120, until=committed(world, before + 3))
    assert rounds(world) >= before + 3
    assert_clean(world)
