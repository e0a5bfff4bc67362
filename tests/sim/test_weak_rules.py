"""The simulator's checks can fail: with one rule of the protocol taken out, each scenario is caught."""

import dataclasses
from collections.abc import Callable

import pytest

from dugnad.configs.recipe import load
from dugnad.coordinator import follower as following
from dugnad.coordinator import ranges
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.messages import Block, Commit, Proposal
from dugnad.coordinator.rounds import Phase
from dugnad.dht.identity import PeerId
from tests.sim.world import COORDINATOR, InvariantBroken, VolunteerNode, World

RECIPE = load("tiny-books")
NAMES = [PeerId(f"p{k:02}") for k in range(3)]


def started(*, train_s: float = RECIPE.rounds.train_s) -> World:
    rounds = dataclasses.replace(RECIPE.rounds, train_s=train_s)
    world = World(1, dataclasses.replace(RECIPE, rounds=rounds))
    world.start_coordinator()
    for name in NAMES:
        world.start_volunteer(name)
    return world


def rounds(world: World) -> int:
    return len(world.disks[COORDINATOR].commits)


# -- scenarios, each of which an unbroken protocol survives


def quiet() -> World:
    """Six rounds in which nothing happens."""
    world = started()
    world.run(300, until=lambda: rounds(world) >= 6)
    return world


def straggler() -> World:
    """Six rounds in which one volunteer never does all of its samples in time."""
    world = started(train_s=5.0)
    slow = world.nodes[NAMES[2]]
    assert isinstance(slow, VolunteerNode)
    slow.step_s = 2.0
    world.run(600, until=lambda: rounds(world) >= 6)
    return world


def lossy_disk() -> World:
    """The coordinator's disk loses the newest commit in a power cut; those who have it go, and others come."""
    world = started()
    world.run(300, until=lambda: rounds(world) >= 3)
    world.run(world.now + 1.0)
    world.lose_newest_commit()
    world.start_coordinator()
    for newcomer in ("new0", "new1", "new2"):
        world.start_volunteer(newcomer)
    world.run(world.now + 120)
    return world


def frozen_receiver() -> World:
    """A volunteer is frozen while the averages of a round are delivered."""
    world = started()
    world.run(300, until=lambda: rounds(world) >= 3)
    world.when(lambda: world.nodes[COORDINATOR].leader().phase is Phase.REDUCE, lambda: world.freeze(NAMES[0]))
    world.run(world.now + 8)
    world.thaw(NAMES[0])
    world.run(world.now + 60)
    return world


def cut_off_voters() -> World:
    """Two of three volunteers are cut off; their coordinator is killed, and comes back."""
    world = started()
    world.run(300, until=lambda: rounds(world) >= 3)
    world.when(
        lambda: world.nodes[COORDINATOR].leader().phase is Phase.VOTE,
        lambda: world.partition([COORDINATOR], NAMES[:2]),
        every_s=0.001,
    )
    world.run(world.now + 60)
    world.crash(COORDINATOR)
    world.start_coordinator()
    world.run(world.now + 60)
    world.heal()
    world.run(world.now + 60)
    return world


# -- rules taken out, one at a time


def vote_without_bytes(patch: pytest.MonkeyPatch) -> None:
    honest = Follower._missing

    def blind(self: Follower, block: Block) -> tuple[tuple[int, bytes], ...]:
        return () if block is self._proposal else honest(self, block)

    patch.setattr(Follower, "_missing", blind)


def apply_without_bytes(patch: pytest.MonkeyPatch) -> None:
    honest = Follower._missing

    def blind(self: Follower, block: Block) -> tuple[tuple[int, bytes], ...]:
        return honest(self, block) if block is self._proposal else ()

    patch.setattr(Follower, "_missing", blind)


def apply_before_commit(patch: pytest.MonkeyPatch) -> None:
    honest = Follower._on_proposal

    def hasty(self: Follower, sender: PeerId, said: Proposal, now: float) -> list[following.Effect]:
        out = honest(self, sender, said, now)
        if self.at_head and not self._unapplied and said.block.round == self.ledger.head.round + 1:
            self._unapplied.append(Commit(said.block, ()))
            out += self._advance(now)
        return out

    patch.setattr(Follower, "_on_proposal", hasty)


def one_vote_is_a_quorum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("dugnad.coordinator.votes.quorum_weight", lambda committee: 1)


def commits_without_a_quorum(patch: pytest.MonkeyPatch) -> None:
    for module in ("ledger", "rounds"):
        patch.setattr(f"dugnad.coordinator.{module}.has_quorum", lambda committee, peers: bool(peers))


def redo_as(patch: pytest.MonkeyPatch, redo: Callable[..., ranges.Ranges]) -> None:
    """Let leaders fill in `redo` otherwise, and nobody check it."""
    patch.setattr("dugnad.coordinator.rounds.ranges.minus", redo)
    patch.setattr(Ledger, "_check_ranges", lambda self, block: None)


def samples_left_undone_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    redo_as(patch, lambda allotted, done: ())


def samples_done_are_to_do_again(patch: pytest.MonkeyPatch) -> None:
    redo_as(patch, lambda allotted, done: ranges.normal(allotted))


Rule = Callable[[pytest.MonkeyPatch], None]
Scenario = Callable[[], World]


def found_by(scenario: Scenario) -> str:
    """What the world's checks, or the audit of its chain, find wrong; nothing, if nothing is."""
    try:
        found = scenario().audit()
    except InvariantBroken as broken:
        return str(broken)
    lost = [f"samples {found.ranges_lost} are lost"] if found.ranges_lost else []
    doubled = [f"samples {found.ranges_doubled} are doubled"] if found.ranges_doubled else []
    assert found.clean == (not (found.faults or lost or doubled))
    return "; ".join([*found.faults, *lost, *doubled])


@pytest.mark.parametrize("scenario", [quiet, straggler, lossy_disk, frozen_receiver, cut_off_voters])
def test_with_all_rules_in_place_nothing_is_found(scenario: Scenario) -> None:
    assert found_by(scenario) == ""


@pytest.mark.parametrize(
    ("taken_out", "scenario", "caught"),
    [
        (vote_without_bytes, frozen_receiver, "votes for bytes that it does not hold"),
        (apply_without_bytes, frozen_receiver, "applies bytes that it does not hold"),
        (apply_before_commit, quiet, "applies a block that was not committed"),
        (one_vote_is_a_quorum, lossy_disk, "two blocks were committed"),
        (commits_without_a_quorum, cut_off_voters, "has no quorum of its committee"),
        (samples_left_undone_are_forgotten, straggler, "are lost"),
        (samples_done_are_to_do_again, straggler, "are doubled"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rule_taken_out_is_found(
    taken_out: Rule, scenario: Scenario, caught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_out(monkeypatch)
    assert caught in found_by(scenario)
