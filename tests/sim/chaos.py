"""Random faults from one seed: loss, duplicates, crashes, freezes, partitions, a coordinator that restarts."""

from dugnad.configs.recipe import load
from dugnad.coordinator.rounds import Phase
from dugnad.dht.identity import PeerId
from tests.sim.world import COORDINATOR, Network, World

RECIPE = load("tiny-books")
TROUBLE_S = 20.0
"""Mean time from one trouble to the next."""
LIMIT_S = 2 * 3600.0


class Chaos:
    """One run of `volunteers` volunteers under such faults, to its end."""

    def __init__(self, seed: int, volunteers: int) -> None:
        network = Network(loss_rate=0.03, duplicate_rate=0.02, jitter_s=0.2)
        self.world = World(seed, RECIPE, network=network)
        self.names = [f"p{k:02}" for k in range(volunteers)]
        self.troubles = 0

    def run(self) -> World:
        """Let the run come to its end, or to `LIMIT_S` of virtual time."""
        world = self.world
        world.start_coordinator()
        for k, name in enumerate(self.names):
            world.at(0.2 + 0.01 * k, lambda name=name: world.start_volunteer(name))  # type: ignore[misc]
        world.after(5, self._trouble)
        world.run(LIMIT_S, until=self.finished)
        return world

    def finished(self) -> bool:
        """Whether the coordinator says that the run is finished."""
        node = self.world.nodes.get(COORDINATOR)
        return node is not None and node.leader().phase is Phase.FINISHED

    def _trouble(self) -> None:
        world, rng = self.world, self.world.rng
        self.troubles += 1
        up = [name for name in self.names if PeerId(name) in world.nodes]
        kind = rng.choice(["crash", "freeze", "partition", "coordinator"])
        if kind == "crash" and up:
            victim = rng.choice(up)
            world.crash(victim)
            world.after(rng.uniform(1, 30), lambda: self._back(victim))
        elif kind == "freeze" and up:
            victim = rng.choice(up)
            world.freeze(victim)
            world.after(rng.uniform(1, 30), lambda: self._thaw(victim))
        elif kind == "partition":
            everyone = [*self.names, COORDINATOR]
            one = [name for name in everyone if rng.random() < 0.5]
            world.partition(one, [name for name in everyone if name not in one])
            world.after(rng.uniform(1, 20), world.heal)
        elif kind == "coordinator" and COORDINATOR in world.nodes:
            world.crash(COORDINATOR)
            world.after(rng.uniform(1, 10), self._lead)
        world.after(rng.expovariate(1 / TROUBLE_S), self._trouble)

    def _back(self, name: str) -> None:
        if PeerId(name) not in self.world.nodes:
            self.world.start_volunteer(name)

    def _thaw(self, name: str) -> None:
        if PeerId(name) in self.world.nodes:
            self.world.thaw(name)

    def _lead(self) -> None:
        self.world.start_coordinator()
