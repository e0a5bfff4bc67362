"""A volunteer in a simulated run: trains for as long as its speed says, and moves its parts."""

from collections import defaultdict

from blake3 import blake3

from dugnad.coordinator import ranges
from dugnad.coordinator.messages import Plan
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Abilities, Reach
from dugnad.dht.ticket import claim
from dugnad.optim import reduce as reducing
from dugnad.peer.invariants import average
from dugnad.peer.lifecycle import Leave, Reduce, StopTraining, Train, Volunteer, Work
from dugnad.peer.nodes import Node
from dugnad.peer.stage import TICKET, Disk, SimSigner, Stage


class VolunteerNode(Node):
    """A volunteer: trains for as long as its speed says, and moves its parts."""

    machine: Volunteer

    def __init__(self, world: Stage[Node], peer: PeerId, disk: Disk) -> None:
        super().__init__(world, peer, disk)
        rounds = world.recipe.rounds
        address = f"/ip4/203.0.113.{world.rng.randrange(256)}/tcp/40001/p2p/{peer}"
        shown = claim(world.ticket, SimSigner(TICKET), peer)
        self.machine = Volunteer(peer, self.lead(), num_parts=world.num_parts, report_s=rounds.report_s)
        self.machine.abilities = Abilities((address,), Reach.OPEN, world.network.bytes_per_s, shown)
        self.step_s = world.network.step_s * (1 + world.network.step_spread * world.rng.random())
        self.born_at = world.now
        """Training is not repeatable: after a restart the same samples give other work."""
        self.uploads = 0
        """How many are under way."""
        self._training: tuple[Train, float] | None = None
        self._trained_s = 0.0
        self._parts: dict[tuple[PeerId, bytes], set[int]] = defaultdict(set)

    def training_s(self) -> float:
        return self._trained_s + (0.0 if self._training is None else self.world.now - self._training[1])

    def perform_one(self, effect: object) -> None:
        match effect:
            case Train():
                self._trained_s = self.training_s()
                self._training = (effect, self.world.now)
                duration_s = effect.seat.steps * self.step_s
                self.world.after(duration_s, lambda: self.do(lambda _: self._trained(effect, effect.seat.steps)))
            case StopTraining(keep):
                self._stop_training(keep)
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
                results = {part: average(plan.round, part, entries) for part in parts}
                self.world.after(0.02, lambda: self.do(lambda _: self._folded(plan, results)))
            case Reduce(plan, reducing.Deliver(to, parts)):
                self._deliver(plan, to, dict(parts))
            case _:
                super().perform_one(effect)

    def leave(self) -> None:
        """Ctrl+C."""
        self.do(lambda _: self.perform(self.machine.leave(now=self.world.now)))

    def _stop_training(self, keep: bool) -> None:
        self._trained_s = self.training_s()
        training, self._training = self._training, None
        if training is not None:
            effect, since = training
            done = int((self.world.now - since) / self.step_s) if keep else 0
            self._finish(effect, done)

    def _trained(self, effect: Train, steps: int) -> None:
        if self._training is not None and self._training[0] is effect:
            self._trained_s = self.training_s()
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
            self.uploads -= 1
            ended = self.machine.uploaded if error is None else self.machine.upload_failed
            self.perform(ended(owner, root, parts, now=self.world.now))

        self.uploads += 1
        nbytes = sum(self.world.part_bytes[part] for part in parts)
        self.world.transfer(self, owner, nbytes, "upload", arrived, done)

    def _folded(self, plan: Plan, results: dict[int, bytes]) -> None:
        self.keep(results.values())
        self.perform(self.machine.folded(plan, results, now=self.world.now))

    def _deliver(self, plan: Plan, to: PeerId, parts: dict[int, bytes]) -> None:
        def arrived(node: Node) -> str | None:
            if node.follower.ledger.head.round >= plan.round:
                return None
            if not node.machine.leader.expects(self.peer, plan.order, parts):
                return "that is not under way here"
            node.keep(parts.values())
            node.perform(node.machine.result(self.peer, plan.order, parts, now=self.world.now))
            return None

        def done(error: str | None) -> None:
            self.perform(self.machine.delivered(plan, to, error=error, now=self.world.now))

        nbytes = sum(self.world.part_bytes[part] for part in parts)
        kind = "result" if plan.seat_of(to) is not None else "follow"
        self.world.transfer(self, to, nbytes, kind, arrived, done)
