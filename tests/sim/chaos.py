"""Random faults from one seed: loss, duplicates, crashes with and without disk, freezes, partitions, no coordinator."""

import dataclasses

from dugnad.configs.recipe import load
from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.identity import PeerId
from dugnad.peer.world import COORDINATOR, Network, World

RECIPE = load("tiny-books")
SHORT = RECIPE.cut(14)
TROUBLE_S = 12.0
"""Mean time from one trouble to the next."""
TROUBLED_S = 240.0
"""For how long there is trouble; what was killed or cut off comes back then, and the run must come to its end."""
LIMIT_S = 3600.0
HEALED_S = 30.0
"""How long after a partition heals everyone must agree."""


class Chaos:
    """One run of `volunteers` volunteers under such faults, to its end."""

    def __init__(self, seed: int, volunteers: int, *, rule: QuorumRule | None = None) -> None:
        network = Network(loss_rate=0.03, duplicate_rate=0.02, jitter_s=0.2)
        rounds = dataclasses.replace(SHORT.rounds, min_peers=2)
        self.world = World(seed, dataclasses.replace(SHORT, rounds=rounds), network=network, rule=rule)
        self.names = [f"p{k:02}" for k in range(volunteers)]
        self.troubles: dict[str, int] = {}

    def run(self) -> World:
        """Let the run come to its end, or to `LIMIT_S` of virtual time."""
        world = self.world
        world.start_coordinator()
        for k, name in enumerate(self.names):
            world.at(0.2 + 0.01 * k, lambda name=name: world.start_volunteer(name))  # type: ignore[misc]
        world.after(3, self._trouble)
        world.run(LIMIT_S, until=self.finished)
        return world

    def finished(self) -> bool:
        """Whether all steps of the run are committed."""
        chain = self.world.chain()
        return bool(chain) and chain[-1].block.global_step == SHORT.rounds.total_steps

    def _trouble(self) -> None:
        world, rng = self.world, self.world.rng
        if world.now > TROUBLED_S:
            self._calm()
            return
        up = [name for name in self.names if PeerId(name) in world.nodes]
        kind = rng.choice(["crash", "crash", "wipe", "freeze", "partition", "coordinator", "coordinator lost"])
        self.troubles[kind] = self.troubles.get(kind, 0) + 1
        if kind == "crash" and up:
            self._down(rng.choice(up), back_s=rng.uniform(1, 40))
        elif kind == "wipe" and len(up) > 2 and self._spare():
            victim = rng.choice(up)
            self._down(victim, back_s=rng.uniform(1, 40))
            world.wipe(victim)
        elif kind == "freeze" and up:
            victim = rng.choice([*up, COORDINATOR] if COORDINATOR in world.nodes else up)
            world.freeze(victim)
            world.after(rng.uniform(1, 30), lambda: self._thaw(victim))
        elif kind == "partition":
            everyone = [*self.names, COORDINATOR]
            one = [name for name in everyone if rng.random() < 0.5]
            world.partition(one, [name for name in everyone if name not in one])
            world.after(rng.uniform(1, 30), world.heal)
        elif kind.startswith("coordinator") and COORDINATOR in world.nodes and world.rounds() > 0:
            lost = kind == "coordinator lost" and self._spare()
            self._down(COORDINATOR, back_s=rng.uniform(1, 60))
            if lost:
                world.wipe(COORDINATOR)
        world.after(rng.expovariate(1 / TROUBLE_S), self._trouble)

    def _spare(self) -> bool:
        """Whether a quorum of the newest committee still has its disks if one more is lost.

        Who loses the disks of half a committee has lost the run, by the rules: the organizer must begin an epoch.
        """
        world = self.world
        committee = world.chain()[-1].block.committee if world.chain() else ()
        whole = [v for v in committee if v.peer in world.disks and world.disks[v.peer].incarnation == v.incarnation]
        weight = sum(v.weight for v in whole) - max((v.weight for v in whole), default=0)
        return weight >= world.charter.rule.needed(committee) if committee else False

    def _down(self, name: str, *, back_s: float) -> None:
        self.world.crash(name)
        self.world.after(back_s, lambda: self._back(name))

    def _back(self, name: str) -> None:
        if PeerId(name) in self.world.nodes:
            return
        if name == COORDINATOR:
            self.world.start_coordinator()
        else:
            self.world.start_volunteer(name)

    def _thaw(self, name: str) -> None:
        if PeerId(name) in self.world.nodes:
            self.world.thaw(name)

    def _calm(self) -> None:
        """All faults are over: everyone is back, except who left in order."""
        world = self.world
        world.heal()
        for name in [COORDINATOR, *self.names]:
            self._thaw(name)
            self._back(name)
