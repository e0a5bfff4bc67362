"""An open run with members who lie together: less than a third of the weight breaks nothing, more of it can."""

import pytest

from dugnad.coordinator.votes import QuorumRule
from dugnad.peer.invariants import InvariantBroken
from dugnad.peer.world import COORDINATOR, Network, World
from tests.sim.chaos import RECIPE
from tests.sim.liars import Conspiracy


def infested(seed: int, honest: int, liars: int) -> tuple[World, Conspiracy]:
    """A run to its end, led by volunteers once all have credit: liars have their turn like everyone."""
    world = World(seed, RECIPE, network=Network(jitter_s=0.2, loss_rate=0.02), rule=QuorumRule(open=True))
    conspiracy = Conspiracy(world, [f"liar{k}" for k in range(liars)])
    world.start_coordinator()
    for k in range(honest):
        world.start_volunteer(f"p{k:02}")
    for name in conspiracy.names:
        conspiracy.start(name)
    everyone = honest + liars

    def all_have_credit() -> bool:
        committee = world.chain()[-1].block.committee if world.chain() else ()
        return sum(voter.weight > 0 for voter in committee if voter.peer != COORDINATOR) == everyone

    world.when(all_have_credit, lambda: world.crash(COORDINATOR), every_s=0.1)
    world.run(600, until=lambda: finished(world))
    return world, conspiracy


def finished(world: World) -> bool:
    return bool(world.chain()) and world.chain()[-1].block.global_step == RECIPE.rounds.total_steps


@pytest.mark.parametrize("seed", range(10))
def test_less_than_a_third_that_lies_breaks_no_rule_and_stops_no_round(seed: int) -> None:
    world, conspiracy = infested(seed, honest=7, liars=2)
    assert finished(world), world.reason()
    assert world.audit().clean
    assert conspiracy.blocks > 0
    assert conspiracy.lies > 50
    for commit in world.chain():
        weights = {voter.peer: voter.weight for voter in commit.block.committee}
        if COORDINATOR not in weights:  # else not all have credit yet, and members are trusted
            assert 3 * sum(weights.get(liar, 0) for liar in conspiracy.names) < sum(weights.values())


def test_more_than_a_third_that_lies_can_have_two_blocks_committed() -> None:
    broken = []
    for seed in range(6):
        try:
            infested(seed, honest=4, liars=3)
        except InvariantBroken as found:
            broken.append(str(found))
    assert any("two blocks were committed" in how for how in broken), broken
