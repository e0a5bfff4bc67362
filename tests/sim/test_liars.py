"""An open run with members who lie together: less than a third of the weight breaks nothing, more of it can."""

from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.identity import PeerId
from dugnad.peer.invariants import InvariantBroken
from dugnad.peer.stage import COORDINATOR
from dugnad.peer.virtual import Network
from dugnad.peer.world import World
from tests.sim.chaos import RECIPE
from tests.sim.liars import Conspiracy


def infested(seed: int, honest: int, liars: int, *, convicts: bool = False) -> tuple[World, Conspiracy]:
    """A run to its end, led by volunteers once all have credit: liars have their turn like everyone."""
    network = Network(jitter_s=0.2, loss_rate=0.02)
    world = World(seed, RECIPE, network=network, rule=QuorumRule(open=True), convicts=convicts)
    conspiracy = Conspiracy(world, [f"liar{k}" for k in range(liars)])
    world.start_coordinator()
    for k in range(honest):
        world.start_volunteer(f"p{k:02}")
    for name in conspiracy.names:
        conspiracy.start(name)
    everyone = honest + liars

    def all_have_credit() -> bool:
        committee = world.chain()[-1].block.committee if world.chain() else ()
        weights = {voter.peer: voter.weight for voter in committee if voter.weight > 0 and voter.peer != COORDINATOR}
        lying = sum(weights.get(PeerId(liar), 0) for liar in conspiracy.names)
        return len(weights) == everyone and (3 * lying < sum(weights.values())) == (3 * liars < everyone)

    world.when(all_have_credit, lambda: world.crash(COORDINATOR), every_s=0.1)
    world.run(600, until=lambda: finished(world))
    return world, conspiracy


def finished(world: World) -> bool:
    return bool(world.chain()) and world.chain()[-1].block.global_step == RECIPE.rounds.total_steps


def test_less_than_a_third_that_lies_breaks_no_rule_and_stops_no_round() -> None:
    blocks = 0
    for seed in range(10):
        world, conspiracy = infested(seed, honest=7, liars=2)
        assert finished(world), f"seed {seed}: {world.reason()}"
        assert world.audit().clean, f"seed {seed}"
        assert conspiracy.lies > 50
        blocks += conspiracy.blocks
    assert blocks > 10, "they led, and proposed two blocks at once"


def test_who_is_proven_to_lie_has_no_vote_and_no_seat_any_more() -> None:
    world, conspiracy = infested(1, honest=7, liars=2, convicts=True)
    assert finished(world), world.reason()
    assert world.audit().clean
    assert world.convicted == {PeerId(name) for name in conspiracy.names}
    newest = world.chain()[-1].block
    assert not world.convicted & {voter.peer for voter in newest.committee}
    assert not world.convicted & {entry.peer for entry in newest.entries}


def test_more_than_a_third_that_lies_can_have_two_blocks_committed() -> None:
    broken = []
    for seed in range(6):
        try:
            infested(seed, honest=4, liars=3)
        except InvariantBroken as found:
            broken.append(str(found))
    assert any("two blocks were committed" in how for how in broken), broken
