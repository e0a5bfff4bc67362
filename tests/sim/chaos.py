"""Random faults from one seed, to replay by hand: `python -m tests.sim.chaos VOLUNTEERS SEED`.

Messages are lost, doubled and overtake each other; peers are killed, lose their disk, freeze, go and are cut off, the
coordinator among them; clocks are wrong. In a lull nobody comes back and nothing new breaks: if a quorum is connected
then, it must commit a round. When the troubles are over the run must come to its end.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dugnad.configs.recipe import load
from dugnad.coordinator.messages import Voter
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.identity import PeerId
from dugnad.peer.invariants import InvariantBroken
from dugnad.peer.nodes import Node
from dugnad.peer.stage import COORDINATOR
from dugnad.peer.virtual import Network
from dugnad.peer.volunteer_node import VolunteerNode
from dugnad.peer.world import World

_WHOLE = load("tiny-books").cut(16)
RECIPE = dataclasses.replace(
    _WHOLE, rounds=dataclasses.replace(_WHOLE.rounds, min_peers=2, train_s=20.0, exchange_s=10.0)
)
TROUBLED_S = 240.0
"""For how long there is trouble; what was killed or cut off comes back then, and the run must come to its end."""
LIMIT_S = 3600.0
STRIKES = ("Send(Freeze)", "Send(Proposal)", "Send(Lock)", "Store", "Store")
"""What a leader may be doing when it is struck at."""
KINDS = (
    "crash",
    "crash",
    "wipe",
    "freeze",
    "partition",
    "coordinator",
    "coordinator lost",
    "leave",
    "vote",
    "vote",
    "lull",
    "lull",
)


def progress_s(gone: int) -> float:
    """How long a connected quorum may take to commit a round, when `gone` voters of its committee are away.

    silence_s until the leader is given up, and twice that for each that is away too when its turn comes. Who leads then
    may come to nothing, as far as a peer waits: train_s + 4 exchange_s (`Patience.round_s`). The next one must make it,
    in the same time: those who lag take the model, the interval, the upload, the averages and the votes.
    """
    patience = Patience.of(RECIPE.rounds)
    return patience.silence_s * (1 + 2 * gone) + 2 * patience.round_s


@dataclass(frozen=True, slots=True)
class Side:
    """A connected quorum: how many rounds it has committed, and how many voters of its committee are away."""

    rounds: int
    away: int


class Chaos:
    """One run of `volunteers` volunteers under such faults, to its end."""

    def __init__(self, seed: int, volunteers: int, *, rule: QuorumRule | None = None) -> None:
        network = Network(clock_error_s=60.0)
        self.world = World(seed, RECIPE, network=network, rule=rule)
        rng = self.world.rng
        self.world.network = dataclasses.replace(
            network,
            loss_rate=rng.choice([0.0, 0.03, 0.1]),
            duplicate_rate=rng.choice([0.0, 0.02, 0.1]),
            jitter_s=rng.choice([0.03, 0.3, 1.0]),
        )
        self.trouble_s = rng.choice([4.0, 12.0])
        """Mean time from one trouble to the next."""
        self.names = [f"p{k:02}" for k in range(volunteers)]
        self.troubles: Counter[str] = Counter()
        self.longest_lull = 0.0
        """The longest that a connected quorum took, as a fraction of what it may take."""
        self._lull = False
        self._armed: str | None = None
        """At which step the leader is struck at next."""
        self.world.step = self._step

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
        return bool(chain) and chain[-1].block.global_step == RECIPE.rounds.total_steps

    def _trouble(self) -> None:
        world, rng = self.world, self.world.rng
        if world.now > TROUBLED_S:
            self._calm()
            return
        up = [name for name in self.names if PeerId(name) in world.nodes]
        kind = rng.choice(KINDS)
        done = True
        if kind == "lull" and (side := self._connected()) is not None:
            self._begin_lull(side)
            return
        if kind == "crash" and up:
            self._down(rng.choice(up), back_s=rng.uniform(1, 40))
        elif kind == "wipe" and len(up) > 2 and self._spare():
            victim = rng.choice(up)
            self._down(victim, back_s=rng.uniform(1, 40))
            world.wipe(victim)
        elif kind == "freeze" and up:
            victim = rng.choice([*up, COORDINATOR] if COORDINATOR in world.nodes else up)
            world.freeze(victim)
            self._later(rng.uniform(1, 30), lambda: self._thaw(victim))
        elif kind == "partition":
            everyone = [*self.names, COORDINATOR]
            one = [name for name in everyone if rng.random() < 0.5]
            world.partition(one, [name for name in everyone if name not in one])
            self._later(rng.uniform(1, 30), world.heal)
        elif kind == "leave" and len(up) > 2:
            victim = rng.choice(up)
            node = world.nodes[PeerId(victim)]
            assert isinstance(node, VolunteerNode)
            node.leave()
            self._later(rng.uniform(1, 40), lambda: self._back(victim))
        elif kind == "vote":
            self._armed = rng.choice(STRIKES)
        elif kind.startswith("coordinator") and COORDINATOR in world.nodes and world.rounds() > 0:
            lost = kind == "coordinator lost" and self._spare()
            self._down(COORDINATOR, back_s=rng.uniform(1, 60))
            if lost:
                world.wipe(COORDINATOR)
        else:
            done = False
        self.troubles[kind] += done
        world.after(rng.expovariate(1 / self.trouble_s), self._trouble)

    def _step(self, node: Node, what: str, act: Callable[[], object]) -> object:
        if what == self._armed and node.follower.leads and not self._lull:
            self._armed = None
            self.world.after(0.0, lambda: self._strike(node.peer))
        return act()

    def _strike(self, leader: str) -> None:
        """Kill who leads in the midst of a vote, where locks matter, or cut it off before what it says arrives."""
        world, rng = self.world, self.world.rng
        if rng.random() < 0.3:
            self._down(leader, back_s=rng.uniform(1, 40))
            return
        one = [name for name in (*self.names, COORDINATOR) if name == leader or rng.random() < 0.2]
        world.partition(one, [name for name in (*self.names, COORDINATOR) if name not in one])
        self._later(rng.uniform(1, 30), world.heal)

    def _begin_lull(self, side: Side) -> None:
        """Nothing breaks and nobody comes back until a round is committed."""
        world, since, limit_s = self.world, self.world.now, progress_s(side.away)
        self._lull = True
        self.troubles["lull"] += 1

        def look() -> None:
            took, now = (world.now - since) / limit_s, self._connected()
            self.longest_lull = max(self.longest_lull, took)
            if now is None or now.rounds > side.rounds:  # None: who was about to leave is gone
                self._lull = False
                world.after(world.rng.expovariate(1 / self.trouble_s), self._trouble)
            elif took > 1:
                world.fail(f"a connected quorum commits nothing in {limit_s:.0f} s: {world.reason()}")
            else:
                world.after(0.5, look)

        look()

    def _connected(self) -> Side | None:
        """Those who reach each other and are a quorum, with enough volunteers, if there are such."""
        world = self.world
        up = [peer for peer, node in sorted(world.nodes.items()) if not node.frozen]
        for peer in up:
            side = {other for other in up if other == peer or world.reaches(peer, other)}
            chain = max((world.disks[other].commits for other in side), key=len)
            committee = chain[-1].block.committee if chain else world.charter.first_head().committee
            here = {v.peer for v in committee if v.peer in side and world.disks[v.peer].incarnation == v.incarnation}
            enough = len(side - {COORDINATOR}) >= RECIPE.rounds.min_peers
            if enough and world.charter.rule.decided(committee, here):
                return Side(len(chain), len(committee) - len(here))
        return None

    def _spare(self) -> bool:
        """Whether a quorum still has its disks if one more is lost, of the newest committee and of any proposed next.

        Who loses the disks of half a committee has lost the run, by the rules: the organizer must begin an epoch.
        """
        world, chain = self.world, self.world.chain()
        if len(chain) < 2:
            return False  # the founder alone decided on the first
        promises = [disk.promises for disk in world.disks.values() if disk.promises is not None]
        proposed = [p.prevoted.block for p in promises if p.prevoted is not None]
        blocks = [chain[-2].block, chain[-1].block, *(b for b in proposed if b.parent == chain[-1].block.hash)]
        return all(self._is_spare(block.committee) for block in blocks)

    def _is_spare(self, committee: tuple[Voter, ...]) -> bool:
        disks = self.world.disks
        whole = [v for v in committee if v.peer in disks and disks[v.peer].incarnation == v.incarnation]
        weight = sum(v.weight for v in whole) - max((v.weight for v in whole), default=0)
        return weight >= self.world.charter.rule.needed(committee)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do `action` then, or when the lull is over."""
        self.world.after(delay_s, lambda: self._later(1.0, action) if self._lull else action())

    def _down(self, name: str, *, back_s: float) -> None:
        self.world.crash(name)
        self._later(back_s, lambda: self._back(name))

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
        world.after(150.0, self._recover)

    def _recover(self) -> None:
        """Begin an epoch where half of a committee has lost its disks: a block may name who has just died.

        Who was about to leave when the calm began has left by now, and may hold the vote that is missing.
        """
        for name in [COORDINATOR, *self.names]:
            self._back(name)
        world, chain = self.world, self.world.chain()
        committee, disks = chain[-1].block.committee, world.disks
        whole = [v.peer for v in committee if v.peer in disks and disks[v.peer].incarnation == v.incarnation]
        if not world.charter.rule.decided(committee, whole):
            world.crash(COORDINATOR)
            world.recover(COORDINATOR)
            world.start_coordinator()
            self.troubles["recover"] += 1


def check(seed: int, volunteers: int) -> Chaos:
    """Run that seed; InvariantBroken says what is wrong, and how to see it again."""
    chaos = Chaos(seed, volunteers)
    try:
        world = chaos.run()
        found = world.audit()
        if not found.clean:
            world.fail(f"the audit finds {found}")
        objected = [said for said in world.refusals if said.reason == "not admitted"]
        if objected:
            world.fail(f"all leaders are honest, and {objected[0]}")
        if not chaos.finished():
            world.fail(f"all troubles are over, and the run does not come to its end: {world.reason()}")
    except AssertionError as broken:
        raise InvariantBroken(f"{broken}\nreplay: python -m tests.sim.chaos {volunteers} {seed}") from broken
    return chaos


if __name__ == "__main__":
    ended = check(int(sys.argv[2]), int(sys.argv[1]))
    print(f"{ended.world.rounds()} rounds in {ended.world.now:.0f} s, {dict(ended.troubles)}")
