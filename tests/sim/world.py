"""A run in virtual time: the production machines under a simulated network, disks, clocks and faults, from one seed.

`Leader`, `Volunteer`, `Follower` and `Reducer` are the real ones. What is simulated is what their shells do: moving
messages and bytes, training, folding, hashing, storing. A model is the hash of the one before and the parts applied to
it; an average is the hash of the set it was folded from; so two peers that disagree about anything end up different.
"""

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from blake3 import blake3

from dugnad.configs.recipe import Recipe
from dugnad.coordinator import follower as following
from dugnad.coordinator import ranges
from dugnad.coordinator.audit import Audit, audit
from dugnad.coordinator.follower import Cost, Follower
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.messages import Block, Commit, Delegation, Message, Plan, Vote, delegation_payload
from dugnad.coordinator.rounds import Keep, Leader, LeftOut
from dugnad.dht.identity import PeerId
from dugnad.optim import reduce as reducing
from dugnad.optim.plan import assign_parts
from dugnad.peer.lifecycle import Abilities, Leave, Reduce, StopTraining, Train, Volunteer, Work

RUN = blake3(b"a simulated run").digest()
FIRST_MODEL = blake3(b"a simulated first model").digest()
ORGANIZER = PeerId("organizer")
COORDINATOR = PeerId("coordinator")
PART_BYTES = 65_792
RESTLESS_TICKS = 100
"""After how many ticks in a row, each of which leaves it due at once, a machine counts as caught in a loop."""
NO_COST = Cost(0.0, 0.0, {})


class InvariantBroken(AssertionError):
    """A rule of the protocol did not hold; the message names the seed, the time and the rule."""


@dataclass(frozen=True, slots=True)
class SimSigner:
    """A keyed hash for a signature: as unforgeable as a simulation needs, a hundred times cheaper."""

    peer_id: PeerId

    def sign(self, payload: bytes) -> bytes:
        return blake3(self.peer_id.encode() + b"\0" + payload).digest(length=64)

    def verify(self, peer: PeerId, payload: bytes, signature: bytes) -> bool:
        return signature == SimSigner(peer).sign(payload)


@dataclass(slots=True)
class Disk:
    """What survives a crash."""

    commits: list[Commit] = field(default_factory=list)
    blobs: set[bytes] = field(default_factory=set)
    model_round: int = 0
    model: bytes = FIRST_MODEL


@dataclass(frozen=True, slots=True)
class Network:
    """Delays in seconds, rates in bytes/s, probabilities 0..1."""

    delay_s: float = 0.02
    jitter_s: float = 0.03
    loss_rate: float = 0.0
    duplicate_rate: float = 0.0
    bytes_per_s: float = 20e6
    step_s: float = 0.1
    step_spread: float = 0.3


class World:
    """Virtual time, the network, and every node; everything that happens follows from `seed`."""

    def __init__(
        self, seed: int, recipe: Recipe, *, num_parts: int = 12, network: Network | None = None, max_rounds: int = 10**9
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.recipe = recipe
        self.num_parts = num_parts
        self.network = network or Network()
        self.max_rounds = max_rounds
        self.now = 0.0
        self.nodes: dict[PeerId, Node] = {}
        self.disks: dict[PeerId, Disk] = defaultdict(Disk)
        self.cut: set[frozenset[PeerId]] = set()
        """Pairs that cannot reach each other."""
        self.committed: dict[int, Commit] = {}
        self.models: dict[int, bytes] = {0: FIRST_MODEL}
        self.trained: dict[bytes, ranges.Ranges] = {}
        """Root of a contribution -> the samples that it was trained on."""
        self.starts = 0
        self.left: dict[PeerId, str] = {}
        self.refusals: list[following.Refused] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    # -- what a test scripts

    def start_coordinator(self) -> "CoordinatorNode":
        """Start the coordinator, first or again, from its disk."""
        assert COORDINATOR not in self.nodes, "two coordinators from one disk"
        self.starts += 1
        node = CoordinatorNode(self, self.disks[COORDINATOR], term=self.starts)
        self.nodes[COORDINATOR] = node
        node.begin()
        return node

    def start_volunteer(self, name: str, *, fresh_disk: bool = False) -> "VolunteerNode":
        """Start a volunteer that joins, or joins again with the disk it had."""
        peer = PeerId(name)
        if fresh_disk:
            self.disks.pop(peer, None)
        node = VolunteerNode(self, peer, self.disks[peer])
        self.nodes[peer] = node
        node.begin()
        return node

    def crash(self, name: str) -> None:
        """SIGKILL: nothing more is said or done; the disk stays."""
        node = self.nodes.pop(PeerId(name), None)
        if node is not None:
            node.alive = False

    def lose_newest_commit(self) -> None:
        """Everyone is killed, and what the coordinator's disk took last is gone with the power."""
        for name in list(self.nodes):
            self.crash(name)
        disk = self.disks[COORDINATOR]
        disk.commits.pop()
        disk.model_round = len(disk.commits)
        disk.model = self.models[disk.model_round]

    def freeze(self, name: str) -> None:
        """SIGSTOP: connections stay open, nothing is processed."""
        self.nodes[PeerId(name)].frozen = True

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        node = self.nodes[PeerId(name)]
        node.frozen = False
        backlog, node.backlog = node.backlog, []
        for event in backlog:
            event()

    def partition(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Nobody of `one` reaches anybody of `other`."""
        self.cut |= {frozenset((PeerId(a), PeerId(b))) for a in one for b in other}

    def heal(self) -> None:
        """Every pair reaches each other again."""
        self.cut.clear()

    def at(self, at_s: float, action: Callable[[], object]) -> None:
        """Do `action` at that virtual time."""
        self._push(at_s, lambda: (action(), None)[1])

    def when(self, condition: Callable[[], bool], action: Callable[[], object], *, every_s: float = 0.01) -> None:
        """Do `action` once, as soon as `condition` holds."""

        def look() -> None:
            if condition():
                action()
            else:
                self.after(every_s, look)

        self.after(every_s, look)

    def run(self, until_s: float, *, until: Callable[[], bool] | None = None) -> None:
        """Let virtual time pass; stops early when `until` holds."""
        while self._events and self._events[0][0] <= until_s:
            self.now, _, event = heapq.heappop(self._events)
            event()
            if until is not None and until():
                return
        self.now = until_s

    def audit(self) -> Audit:
        """What the chain of the coordinator's disk proves."""
        applied = {r: {COORDINATOR: digest} for r, digest in self.models.items()}
        return audit(RUN, COORDINATOR, self.disks[COORDINATOR].commits, applied, SimSigner(COORDINATOR))

    def reason(self) -> str:
        """What the coordinator says it waits for."""
        node = self.nodes.get(COORDINATOR)
        return "no coordinator" if node is None else node.leader().reason

    def fail(self, rule: str) -> None:
        """An invariant does not hold."""
        raise InvariantBroken(f"seed {self.seed}, {self.now:.3f} s: {rule}")

    # -- what nodes use

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        """Do `event` after `delay_s` of virtual time."""
        self._push(self.now + delay_s, event)

    def _push(self, at_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), event))

    def reaches(self, a: PeerId, b: PeerId) -> bool:
        """Whether `b` is up and no partition lies between."""
        return b in self.nodes and frozenset((a, b)) not in self.cut

    def delay(self) -> float:
        """One message's way, in seconds."""
        return self.network.delay_s + self.rng.random() * self.network.jitter_s

    def send(self, sender: PeerId, to: PeerId, message: Message) -> None:
        """Put one message on its way; it may be lost, doubled or overtaken."""
        if self.rng.random() < self.network.loss_rate:
            return
        for _ in range(2 if self.rng.random() < self.network.duplicate_rate else 1):
            self.after(self.delay(), lambda: self._deliver(sender, to, message))

    def _deliver(self, sender: PeerId, to: PeerId, message: Message) -> None:
        if self.reaches(sender, to):
            self.nodes[to].do(lambda node: node.take(sender, message))
        elif sender in self.nodes:
            self.nodes[sender].do(lambda node: node.unreachable(to))

    def transfer(
        self,
        sender: "Node",
        to: PeerId,
        nbytes: int,
        arrived: Callable[["Node"], str | None],
        done: Callable[[str | None], None],
    ) -> None:
        """Move bulk bytes: `arrived` takes or refuses them at the other end, `done` hears here of an error or None."""
        duration_s = self.delay() + nbytes / self.network.bytes_per_s

        def finish() -> None:
            other = self.nodes.get(to)
            if other is None or not self.reaches(sender.peer, to):
                sender.do(lambda _: done("unreachable"))
            elif other.frozen:
                self.after(5.0, lambda: sender.do(lambda _: done("no byte for 5 s")))
            else:
                other.do(lambda node: sender.do(lambda _: done(arrived(node))))

        self.after(duration_s, finish)

    def saw_commit(self, commit: Commit) -> None:
        """Some node took `commit` for proven: there must never be another for the round."""
        block = commit.block
        known = self.committed.setdefault(block.round, commit)
        if known.block.hash != block.hash:
            self.fail(f"two blocks were committed for round {block.round}")
        for entry in block.entries:
            if self.trained[entry.root] != entry.ranges:
                self.fail(f"round {block.round} says that {entry.peer} did samples that it was not trained on")

    def saw_model(self, round_: int, model: bytes) -> None:
        """Some node has this model after `round_`: every other must have the same."""
        if self.models.setdefault(round_, model) != model:
            self.fail(f"two models after round {round_}")


class Node:
    """A process: a machine, its shell's work in virtual time, and its disk."""

    machine: Leader | Volunteer

    def __init__(self, world: World, peer: PeerId, disk: Disk) -> None:
        self.world, self.peer, self.disk = world, peer, disk
        self.alive, self.frozen = True, False
        self.backlog: list[Callable[[], None]] = []
        self.signer = SimSigner(peer)
        self.follower = Follower(self.signer, Ledger(RUN, COORDINATOR), ORGANIZER)
        self.apply_s = 0.05
        self._wake = 0
        self._overdue = 0
        self.follower.restore(disk.commits, disk.blobs)

    def do(self, event: Callable[["Node"], object]) -> None:
        """Let something happen here, unless the process is dead; a frozen one does it when it thaws."""
        if not self.alive:
            return
        if self.frozen:
            self.backlog.append(lambda: self.do(event))
            return
        event(self)
        self._schedule()

    def take(self, sender: PeerId, message: Message) -> None:
        self.perform(self.machine.receive(sender, message, now=self.world.now))

    def tick(self) -> None:
        self.perform(self.machine.tick(now=self.world.now))

    def leader(self) -> Leader:
        """The machine of a coordinator."""
        assert isinstance(self.machine, Leader)
        return self.machine

    def unreachable(self, peer: PeerId) -> None:
        """The network says that nobody answers there; a volunteer concludes nothing from it."""

    def _schedule(self) -> None:
        self._wake += 1
        mine, at_s = self._wake, self.machine.wake_at()
        if at_s < float("inf"):
            self.world.after(max(at_s - self.world.now, 0.001), lambda: self._woken(mine))

    def _woken(self, mine: int) -> None:
        if mine == self._wake:
            self.do(lambda node: node.tick())
            self._overdue = self._overdue + 1 if self.machine.wake_at() <= self.world.now else 0
            if self._overdue > RESTLESS_TICKS:
                self.world.fail(f"{self.peer} has nothing to do and does not come to rest")

    # -- effects that every node knows

    def perform(self, effects: Sequence[object]) -> None:
        """Do the machine's effects in their order."""
        for effect in effects:
            self.perform_one(effect)

    def perform_one(self, effect: object) -> None:
        world = self.world
        match effect:
            case following.Send(to, message):
                if isinstance(message, Vote):
                    self._check_vote(message)
                for peer in to:
                    world.send(self.peer, peer, message)
            case following.Store(commit):
                self._check_commit(commit)
                self.disk.commits.append(commit)
            case following.Apply(commit):
                world.after(self.apply_s, lambda: self.do(lambda node: node.apply(commit)))
            case following.Fetch(wanted, donors):
                digests = tuple(digest for _, digest in wanted)
                world.after(world.delay() * 2, lambda: self.do(lambda node: node.fetch(digests, donors)))
            case following.CatchUp(donor, after_round):
                world.after(world.delay() * 2, lambda: self.do(lambda node: node.catch_up(donor, after_round)))
            case Keep() | LeftOut():
                pass  # the world sees every model as it is applied, and every block
            case following.Refused():
                world.refusals.append(effect)
            case _:
                raise AssertionError(f"no shell for {effect}")

    def apply(self, commit: Commit) -> None:
        if not set(commit.block.parts) <= self.disk.blobs:
            self.world.fail(f"{self.peer} applies bytes that it does not hold")
        known = self.world.committed.get(commit.block.round)
        if known is None or known.block.hash != commit.block.hash:
            self.world.fail(f"{self.peer} applies a block that was not committed")
        model = blake3(self.disk.model + b"".join(commit.block.parts)).digest()
        self.disk.model_round, self.disk.model = commit.block.round, model
        self.world.saw_model(commit.block.round, model)
        self.perform(self.machine.applied(commit.block.round, model, NO_COST, now=self.world.now))

    def hold(self, digests: tuple[bytes, ...]) -> None:
        self.perform(self.machine.holds(digests, now=self.world.now))

    def fetch(self, digests: tuple[bytes, ...], donors: tuple[PeerId, ...]) -> None:
        here = set(digests) & self.disk.blobs
        for donor in donors:
            if self.world.reaches(self.peer, donor) and not self.world.nodes[donor].frozen:
                here |= set(digests) & self.world.disks[donor].blobs
        if here:
            self.disk.blobs |= here
            self.hold(tuple(sorted(here)))

    def catch_up(self, donor: PeerId, after_round: int) -> None:
        if self.world.reaches(self.peer, donor) and not self.world.nodes[donor].frozen:
            for commit in list(self.world.disks[donor].commits):
                if commit.block.round > after_round:
                    self.take(donor, commit)

    def _check_vote(self, vote: Vote) -> None:
        block = self.voting_on()
        if block is None or vote.block != block.hash or not set(block.parts) <= self.disk.blobs:
            self.world.fail(f"{self.peer} votes for bytes that it does not hold")

    def voting_on(self) -> Block | None:
        """The block that the follower is about to vote on."""
        return self.follower._proposal

    def _check_commit(self, commit: Commit) -> None:
        newest = self.disk.commits[-1].block.round if self.disk.commits else 0
        if commit.block.round != newest + 1:
            self.world.fail(f"the chain of {self.peer} jumps from round {newest} to {commit.block.round}")
        self.world.saw_commit(commit)


class CoordinatorNode(Node):
    """The coordinator: leads and follows, trains nothing."""

    machine: Leader

    def __init__(self, world: World, disk: Disk, *, term: int) -> None:
        super().__init__(world, COORDINATOR, disk)
        said = SimSigner(ORGANIZER).sign(delegation_payload(RUN, COORDINATOR, term))
        delegation = Delegation(COORDINATOR, term, said)
        self.machine = Leader(self.follower, self.signer, world.recipe, delegation, world.num_parts, assign_parts)

    def begin(self) -> None:
        disk, now = self.disk, self.world.now
        since = [commit for commit in disk.commits if commit.block.round > disk.model_round]
        self.do(lambda _: self.perform(self.machine.synced(disk.model_round, disk.model, since, now=now)))

    def unreachable(self, peer: PeerId) -> None:
        self.perform(self.machine.lost(peer, "nobody answers", now=self.world.now))

    def result(self, owner: PeerId, plan: Plan, parts: dict[int, bytes]) -> None:
        """Averages arrived from their owner."""
        self.disk.blobs.update(parts.values())
        self.perform(self.machine.result(owner, plan.order, parts, now=self.world.now))


class VolunteerNode(Node):
    """A volunteer: trains for as long as its speed says, and moves its parts."""

    machine: Volunteer

    def __init__(self, world: World, peer: PeerId, disk: Disk) -> None:
        super().__init__(world, peer, disk)
        rounds = world.recipe.rounds
        abilities = Abilities(addresses=(), accepts=True, uplink=world.network.bytes_per_s)
        self.machine = Volunteer(
            peer,
            self.follower,
            abilities,
            num_parts=world.num_parts,
            report_s=rounds.report_s,
            silence_s=rounds.silence_s,
        )
        self.step_s = world.network.step_s * (1 + world.network.step_spread * world.rng.random())
        self.born_at = world.now
        """Training is not repeatable: after a restart the same samples give other work."""
        self._training: tuple[Train, float] | None = None
        self._parts: dict[tuple[PeerId, bytes], set[int]] = defaultdict(set)

    def begin(self) -> None:
        leader = self.world.nodes.get(COORDINATOR)
        if leader is None or not self.world.reaches(self.peer, COORDINATOR):
            self.world.after(1.0, lambda: self.do(lambda _: self.begin()))
            return
        assert isinstance(leader, CoordinatorNode)
        self.world.send(COORDINATOR, self.peer, leader.machine._delegation)
        self.world.after(2.0, lambda: self.do(lambda _: self.begin() if self.follower.leader is None else None))
        self._schedule()

    def perform_one(self, effect: object) -> None:
        match effect:
            case Train():
                self._training = (effect, self.world.now)
                duration_s = effect.seat.steps * self.step_s
                self.world.after(duration_s, lambda: self.do(lambda _: self._trained(effect, effect.seat.steps)))
            case StopTraining(keep):
                self._stop_training(keep)
            case following.Resync():
                self.world.after(0.5, lambda: self.do(lambda _: self._sync()))
            case Leave(reason):
                self.world.left[self.peer] = reason
                self.world.crash(self.peer)
            case Reduce(plan, reducing.Upload(owner, root, parts)):
                self._upload(plan, owner, root, parts)
            case Reduce(_, reducing.Drop(contributor, root)):
                self._parts.pop((contributor, root), None)
            case Reduce(plan, reducing.Fold(parts, entries)):
                if any(not self._parts.get((entry.peer, entry.root), set()) >= set(parts) for entry in entries):
                    self.world.fail(f"{self.peer} folds bytes that it does not hold")
                said = b"".join(entry.peer.encode() + entry.root + str(entry.tokens).encode() for entry in entries)
                results = {part: blake3(str((plan.round, part)).encode() + said).digest() for part in parts}
                self.world.after(0.02, lambda: self.do(lambda _: self._folded(plan, results)))
            case Reduce(plan, reducing.Deliver(to, parts)):
                self._deliver(plan, to, dict(parts))
            case _:
                super().perform_one(effect)

    def leave(self) -> None:
        """Ctrl+C."""
        self.do(lambda _: self.perform(self.machine.leave(now=self.world.now)))

    def _sync(self) -> None:
        leader = self.world.nodes.get(COORDINATOR)
        if leader is None or leader.frozen or not self.world.reaches(self.peer, COORDINATOR):
            self.perform(self.machine.sync_failed("the coordinator does not answer", now=self.world.now))
            return
        self.catch_up(COORDINATOR, self.follower.ledger.head.round)
        self.disk.model_round, self.disk.model = leader.disk.model_round, leader.disk.model
        since = [commit for commit in self.disk.commits if commit.block.round > leader.disk.model_round]
        self.perform(self.machine.synced(leader.disk.model_round, leader.disk.model, since, now=self.world.now))

    def _stop_training(self, keep: bool) -> None:
        training, self._training = self._training, None
        if training is not None:
            effect, since = training
            done = int((self.world.now - since) / self.step_s) if keep else 0
            self._finish(effect, done)

    def _trained(self, effect: Train, steps: int) -> None:
        if self._training is not None and self._training[0] is effect:
            self._training = None
            self._finish(effect, steps)

    def _finish(self, effect: Train, steps: int) -> None:
        if steps == 0:
            self.perform(self.machine.not_trained(effect.plan, "no step was done", now=self.world.now))
            return
        samples = steps * self.world.recipe.inner.batch_sequences
        done = ranges.take(effect.seat.ranges, samples)[0]
        root = blake3(f"{self.peer} {self.born_at} {effect.plan.round} {done}".encode()).digest()
        self.world.trained[root] = done
        self._parts[self.peer, root].update(range(self.world.num_parts))
        work = Work(root, samples, samples * self.world.recipe.model.context, 3.0)
        self.perform(self.machine.trained(effect.plan, work, now=self.world.now))

    def _upload(self, plan: Plan, owner: PeerId, root: bytes, parts: tuple[int, ...]) -> None:
        def arrived(node: Node) -> str | None:
            assert isinstance(node, VolunteerNode)
            if not node.machine.takes(self.peer, plan.round, root):
                return "that is not wanted here"
            node._parts[self.peer, root].update(parts)
            node.perform(node.machine.received(self.peer, root, parts, now=self.world.now))
            return None

        def done(error: str | None) -> None:
            ended = self.machine.uploaded if error is None else self.machine.upload_failed
            self.perform(ended(owner, root, parts, now=self.world.now))

        self.world.transfer(self, owner, PART_BYTES * len(parts), arrived, done)

    def _folded(self, plan: Plan, results: dict[int, bytes]) -> None:
        self.disk.blobs.update(results.values())
        self.perform(self.machine.folded(plan, results, now=self.world.now))

    def _deliver(self, plan: Plan, to: PeerId, parts: dict[int, bytes]) -> None:
        def arrived(node: Node) -> str | None:
            if node.follower.ledger.head.round >= plan.round:
                return None
            node.disk.blobs.update(parts.values())
            if isinstance(node, CoordinatorNode):
                node.result(self.peer, plan, parts)
            else:
                node.hold(tuple(parts.values()))
            return None

        def done(error: str | None) -> None:
            self.perform(self.machine.delivered(to, error=error, now=self.world.now))

        self.world.transfer(self, to, PART_BYTES * len(parts), arrived, done)
