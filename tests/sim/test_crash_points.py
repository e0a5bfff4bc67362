"""One peer killed at every point where it matters: around each durable write and each message, one run per point.

The run is short and loses nothing by chance. The peer is killed just before, or just after, its n-th write or Send, and
started again from its disk 5 s later: every rule holds, and the run comes to its end with everyone at its head. A write
is whole or was not made (SQLite, and a rename for the model); averages are written one by one, so that some of a set
may be there and some not.
"""

from collections import Counter
from collections.abc import Callable

import pytest

from dugnad.configs.recipe import load
from dugnad.coordinator.effects import Remember
from dugnad.dht.identity import PeerId
from dugnad.peer.invariants import InvariantBroken
from dugnad.peer.nodes import Killed, Node
from dugnad.peer.stage import COORDINATOR
from dugnad.peer.world import World

RECIPE = load("tiny-books").cut(4)
NAMES = tuple(PeerId(name) for name in ("p00", "p01", "p02"))
BACK_S = 5.0
LIMIT_S = 400.0


def ordinary(world: World) -> None:
    """Three volunteers and their coordinator train to the end."""


def coordinator_dies(world: World) -> None:
    """The same, but the coordinator is killed after round 2 and stays away: volunteers lead."""
    _when_known(world, 2, lambda: world.crash(COORDINATOR))


def new_epoch(world: World) -> None:
    """The others go on without the coordinator; all but p01 are killed, and an epoch begins on round 2."""

    def cut_off() -> None:
        world.partition([COORDINATOR], NAMES)
        _when_known(world, 3, begin)

    def begin() -> None:
        for name in (COORDINATOR, "p00", "p02"):
            world.crash(name)
        world.recover(COORDINATOR)
        world.start_coordinator()
        world.heal()
        world.at(world.now + 40.0, lambda: world.start_volunteer("p00"))

    _when_known(world, 2, cut_off)


def _when_known(world: World, round_: int, action: Callable[[], None]) -> None:
    """Do `action` once p00, which nobody kills, has the commit of that round."""
    world.when(lambda: len(world.disks[NAMES[0]].commits) >= round_ if NAMES[0] in world.disks else False, action)


SCRIPTS = {script.__name__: script for script in (ordinary, coordinator_dies, new_epoch)}


class Killer:
    """Kills `victim` at its `point`-th step, once; with point 0 it only counts."""

    def __init__(self, world: World, victim: str, point: int, *, after: bool) -> None:
        self.world, self.victim, self.point, self.after = world, victim, point, after
        self.steps: list[str] = []
        world.step = self.step

    def step(self, node: Node, what: str, act: Callable[[], object]) -> object:
        if node.peer != self.victim:
            return act()
        self.steps.append(what)
        if len(self.steps) != self.point:
            return act()
        if self.after:
            act()
        self.world.crash(self.victim)
        self.world.after(BACK_S, self._back)
        raise Killed(node)

    def _back(self) -> None:
        if self.victim == COORDINATOR:
            self.world.start_coordinator()
        else:
            self.world.start_volunteer(self.victim)


def crash_at(script: str, victim: str, point: int, *, after: bool, seed: int = 1) -> list[str]:
    """Run that script and kill `victim` there; the steps that it came to."""
    world = World(seed, RECIPE, num_parts=4)
    killer = Killer(world, victim, point, after=after)
    world.start_coordinator()
    for name in NAMES:
        world.start_volunteer(name)
    SCRIPTS[script](world)

    def ended() -> bool:
        chain, nodes = world.chain(), world.nodes
        finished = bool(chain) and chain[-1].block.global_step == RECIPE.rounds.total_steps
        begun = script != "new_epoch" or (finished and chain[-1].block.epoch == 1)
        back = killer.victim in nodes or killer.victim in world.left
        # who is back after all others have finished and gone may not know how it ended
        everyone = len(nodes) == 1 or all(world.disks[peer].model_round == len(chain) for peer in nodes)
        return finished and begun and back and everyone

    try:
        world.run(LIMIT_S, until=ended)
        found = world.audit()
        assert found.clean, found
        assert ended(), f"after {world.now:.0f} s: {world.reason()}"
    except AssertionError as broken:
        where = f"{'after' if after else 'before'} step {point} of {victim}, {killer.steps[point - 1] if point else ''}"
        call = f"crash_at({script!r}, {victim!r}, {point}, after={after}, seed={seed})"
        replay = f'python -c "from tests.sim.test_crash_points import *; {call}"'
        raise InvariantBroken(f"killed {where}: {broken}\nreplay: {replay}") from broken
    return killer.steps


def crash_everywhere(script: str, victim: str, *, seed: int = 1) -> Counter[str]:
    """Kill `victim` around each step of a run in which it is not killed; what kinds of steps those were."""
    steps = crash_at(script, victim, 0, after=False, seed=seed)
    for point in range(1, len(steps) + 1):
        for after in (False, True):
            crash_at(script, victim, point, after=after, seed=seed)
    return Counter(steps)


@pytest.mark.parametrize(
    ("script", "victim"),
    [("ordinary", COORDINATOR), ("ordinary", "p01"), ("coordinator_dies", "p01"), ("new_epoch", "p01")],
)
def test_wherever_a_peer_is_killed_the_run_comes_to_its_end(script: str, victim: str) -> None:
    steps = crash_everywhere(script, victim)
    assert min(steps[what] for what in ("Store", "Remember", "blob", "model")) >= 4
    assert steps["Rewind"] == (script == "new_epoch")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 12))
def test_wherever_a_peer_is_killed_the_run_comes_to_its_end_with_other_seeds(seed: int) -> None:
    for victim in (COORDINATOR, "p01", "p02"):
        crash_everywhere("ordinary", victim, seed=seed)
    for victim in ("p01", "p02"):
        crash_everywhere("coordinator_dies", victim, seed=seed)


def test_a_peer_whose_disk_forgets_what_it_promised_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Node.perform_one

    def forgetful(self: Node, effect: object) -> None:
        if self.peer != "p01" or not isinstance(effect, Remember):
            honest(self, effect)

    monkeypatch.setattr(Node, "perform_one", forgetful)
    with pytest.raises(InvariantBroken, match="forgets its vote"):
        crash_at("ordinary", "p01", 0, after=False)
