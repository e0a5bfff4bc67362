"""Any sequence of faults that one can think of: hypothesis drives a small world, the world checks the rules."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dugnad.configs.recipe import load
from dugnad.dht.identity import PeerId
from tests.sim.world import COORDINATOR, FIRST_MODEL, Network, VolunteerNode, World

RECIPE = load("tiny-books")
NAMES = tuple(PeerId(name) for name in ("p00", "p01", "p02"))
JOINERS = tuple(PeerId(name) for name in ("p03", "p04"))


class Faults(RuleBasedStateMachine):
    """Three volunteers and their coordinator, to whom anything may happen at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(0, RECIPE)

    @initialize(seed=st.integers(0, 2**32 - 1), loss_rate=st.sampled_from([0.0, 0.05]))
    def begin(self, seed: int, loss_rate: float) -> None:
        network = Network(loss_rate=loss_rate, duplicate_rate=loss_rate / 2)
        self.world = World(seed, RECIPE, num_parts=5, network=network)
        self.world.start_coordinator()
        for name in NAMES:
            self.world.start_volunteer(name)

    def up(self) -> list[PeerId]:
        return sorted(self.world.nodes)

    def down(self) -> list[PeerId]:
        return [name for name in (COORDINATOR, *NAMES) if name not in self.world.nodes and name not in self.world.left]

    def frozen(self) -> list[PeerId]:
        return [name for name in self.up() if self.world.nodes[name].frozen]

    def start(self, name: PeerId) -> None:
        if name == COORDINATOR:
            self.world.start_coordinator()
        else:
            self.world.start_volunteer(name)

    @precondition(lambda self: self.up())
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        self.world.crash(data.draw(st.sampled_from(self.up())))

    @precondition(lambda self: self.down())
    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        self.start(data.draw(st.sampled_from(self.down())))

    @precondition(lambda self: self.up())
    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        self.world.freeze(data.draw(st.sampled_from(self.up())))

    @precondition(lambda self: self.frozen())
    @rule(data=st.data())
    def thaw(self, data: st.DataObject) -> None:
        self.world.thaw(data.draw(st.sampled_from(self.frozen())))

    @rule(one=st.sets(st.sampled_from([COORDINATOR, *NAMES, *JOINERS]), min_size=1, max_size=4))
    def partition(self, one: set[PeerId]) -> None:
        self.world.partition(sorted(one), sorted({COORDINATOR, *NAMES, *JOINERS} - one))

    @rule()
    def heal(self) -> None:
        self.world.heal()

    @precondition(lambda self: any(name not in self.world.nodes for name in JOINERS))
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name in JOINERS if name not in self.world.nodes]))
        self.world.start_volunteer(name, fresh_disk=True)

    @rule(name=st.sampled_from([*NAMES, *JOINERS]))
    def leave(self, name: PeerId) -> None:
        node = self.world.nodes.get(name)
        if isinstance(node, VolunteerNode):
            node.leave()

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0, 5.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.run(self.world.now + seconds)

    @invariant()
    def every_chain_is_a_beginning_of_the_coordinators(self) -> None:
        blocks = [commit.block.hash for commit in self.world.disks[COORDINATOR].commits]
        for disk in list(self.world.disks.values()):
            assert [commit.block.hash for commit in disk.commits] == blocks[: len(disk.commits)]

    @invariant()
    def every_model_is_the_one_after_a_committed_round(self) -> None:
        for disk in list(self.world.disks.values()):
            assert disk.model == (self.world.models[disk.model_round] if disk.model_round else FIRST_MODEL)
            assert disk.model_round <= len(self.world.disks[COORDINATOR].commits)

    def teardown(self) -> None:
        """The chain holds every sample once; with all faults over and everyone back, the run goes on."""
        world = self.world
        assert world.audit().clean, world.audit()
        world.heal()
        for name in self.frozen():
            world.thaw(name)
        # who left without a goodbye comes back too: the votes of those who vanish for ever are lost for ever
        for name in (COORDINATOR, *NAMES, *JOINERS):
            if name not in world.nodes:
                self.start(name)
        rounds = len(world.disks[COORDINATOR].commits)
        world.run(world.now + 300, until=lambda: len(world.disks[COORDINATOR].commits) >= rounds + 2)
        commits = world.disks[COORDINATOR].commits
        ended = bool(commits) and commits[-1].block.global_step == RECIPE.rounds.total_steps
        assert len(commits) >= rounds + 2 or ended, f"stuck after round {rounds}: {world.reason()}"
        assert world.audit().clean, world.audit()


Faults.TestCase.settings = settings(max_examples=15, stateful_step_count=30)
TestFaults = Faults.TestCase
