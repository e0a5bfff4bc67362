"""A run in virtual time: the production machines under a simulated network, disks, clocks and faults, from one seed.

`Keeper`, `Volunteer`, `Leader`, `Follower` and `Reducer` are the real ones. What is simulated is what their shells do:
moving messages and bytes, training, folding, hashing, storing. A model is the hash of the one before and the parts
applied to it; an average is the hash of the set it was folded from; so two peers that disagree about anything end up
different. What must hold whatever fails is checked as it happens, by `invariants`.
"""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from blake3 import blake3

from dugnad.configs.recipe import Recipe
from dugnad.coordinator import effects, equivocation, ranges
from dugnad.coordinator.admission import Admission
from dugnad.coordinator.audit import Audit, audit
from dugnad.coordinator.effects import Cost, Keep, LeftOut, Promises
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.keeper import Keeper
from dugnad.coordinator.ledger import Charter, Ledger
from dugnad.coordinator.messages import Ballot, Block, Commit, Lock, Plan, ViewChange, Vote, epoch_payload
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.rounds import Leader, Phase
from dugnad.coordinator.state import SHORT_REPLAY_ROUNDS
from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.decisions import Decision, Decisions
from dugnad.dht.delegation import Delegation, delegate
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Abilities, Reach
from dugnad.dht.ticket import Terms, Ticket, claim, issue
from dugnad.dht.wire import Message
from dugnad.optim import reduce as reducing
from dugnad.optim.plan import assign_parts
from dugnad.peer.invariants import InvariantBroken, Invariants, average
from dugnad.peer.lifecycle import Leave, Reduce, StopTraining, Train, Volunteer, Work
from dugnad.peer.traffic import CODEC, Line, Traffic, sealed_bytes

RUN = blake3(b"a simulated run").digest()
FIRST_MODEL = blake3(b"a simulated first model").digest()
FIRST_INCARNATION = bytes(8)
ORGANIZER = PeerId("organizer")
COORDINATOR = PeerId("coordinator")
TICKET = PeerId("ticket")
"""The key of all tickets."""
PART_BYTES = 65_792
STATE_RATIO = 8
"""How many times as large as an average the model is: weights and momentum, in fp32."""
STATE_DONORS = 4
"""From how many peers at once the model is taken."""
WALL_S = 1.7e9
"""Unix seconds when a simulated run begins."""
LOOK_S = 5.0
"""How often one asks somebody how far the chain has come, on average."""
RESTLESS_TICKS = 100
"""After how many ticks in a row, each of which leaves it due at once, a machine counts as caught in a loop."""
NO_COST = Cost(0.0, 0.0, {})


class Killed(Exception):
    """`node` was killed in the midst of what it was doing: the rest of it never happens."""

    def __init__(self, node: "Node") -> None:
        super().__init__(node.peer)
        self.node = node


@dataclass(frozen=True, slots=True)
class SimSigner:
    """A keyed hash for a signature: as unforgeable as a simulation needs, a hundred times cheaper."""

    peer_id: PeerId

    def sign(self, payload: bytes) -> bytes:
        return blake3(self.peer_id.encode() + b"\0" + payload).digest(length=64)

    def verify(self, peer: PeerId, payload: bytes, signature: bytes) -> bool:
        return signature == SimSigner(peer).sign(payload)


check_evidence = equivocation.checker(SimSigner(ORGANIZER).verify)


@dataclass(slots=True)
class Disk:
    """What survives a crash."""

    commits: list[Commit] = field(default_factory=list)
    blobs: set[bytes] = field(default_factory=set)
    promises: Promises | None = None
    incarnation: bytes = FIRST_INCARNATION
    model_round: int = 0
    model_block: bytes = RUN
    """The block that the model is after."""
    model: bytes | None = None
    """None on a new disk; the organizer's first coordinator makes the first model itself."""

    def block(self, round_: int) -> bytes | None:
        """The block of that round in the chain that is here; before the first it is the run itself."""
        if round_ == 0:
            return RUN
        return self.commits[round_ - 1].block.hash if round_ <= len(self.commits) else None


@dataclass(frozen=True, slots=True)
class Network:
    """Delays in seconds, rates in bytes/s, probabilities 0..1."""

    delay_s: float = 0.02
    jitter_s: float = 0.03
    loss_rate: float = 0.0
    duplicate_rate: float = 0.0
    bytes_per_s: float = 20e6
    """Of each peer's uplink."""
    downlink: float = 1.0
    """How many times as fast its downlink is."""
    clock_error_s: float = 0.0
    """How far a peer's clock is off at most."""
    step_s: float = 0.1
    step_spread: float = 0.3


class World:
    """Virtual time, the network, and every node; everything that happens follows from `seed`.

    convicts: whether a peer that is proven to lie loses its seat; without that, agreement has to bear it to the end.
    """

    def __init__(
        self,
        seed: int,
        recipe: Recipe,
        *,
        num_parts: int = 12,
        part_bytes: Sequence[int] = (),
        network: Network | None = None,
        rule: QuorumRule | None = None,
        convicts: bool = True,
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.recipe = recipe
        self.part_bytes = tuple(part_bytes) or (PART_BYTES,) * num_parts
        self.num_parts = len(self.part_bytes)
        self.traffic = Traffic()
        self.network = network or Network()
        kind = recipe.admission.kind
        self.charter = Charter(RUN, ORGANIZER, COORDINATOR, FIRST_INCARNATION, rule or QuorumRule(), kind)
        self.gate = self.charter.gate(SimSigner(ORGANIZER).verify)
        """Shared: what one of a thousand peers found out about a claim need not be found out a thousand times."""
        self.ticket = self.issue(Terms())
        """What volunteers come with from now on."""
        self.decisions: list[Decision] = []
        """What the organizer has decided, oldest first: who starts later hears of it at once."""
        self.now = 0.0
        self.nodes: dict[PeerId, Node] = {}
        self.disks: dict[PeerId, Disk] = {}
        self.cut: set[frozenset[PeerId]] = set()
        """Pairs that cannot reach each other."""
        self.models: dict[bytes, bytes] = {RUN: FIRST_MODEL}
        """Hash of a block -> the model after it."""
        self.trained: dict[bytes, ranges.Ranges] = {}
        """Root of a contribution -> the samples that it was trained on."""
        self.incarnations: dict[bytes, Disk] = {}
        """Every disk that there ever was."""
        self.rules = Invariants(
            self.charter,
            SimSigner(COORDINATOR).verify,
            fail=self.fail,
            disks=self.incarnations,
            trained=self.trained,
            models=self.models,
        )
        self.step: Callable[[Node, str, Callable[[], object]], object] = lambda node, what, act: act()
        """Does one durable write or one Send of a node, (node, its name, it): a test may kill the node around it."""
        self.starts = 0
        self.left: dict[PeerId, str] = {}
        self.refusals: list[effects.Refused] = []
        self.convicts = convicts
        self.convicted: set[PeerId] = set()
        """Whom evidence names: in `rules` stands who lies indeed."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    # -- what a test scripts

    def start_coordinator(self, name: str = COORDINATOR, *, until_s: float = 0.0) -> "CoordinatorNode":
        """Start a coordinator, first or again, from its disk: each start is a new term.

        until_s: virtual time at which its delegation ends; 0: never.
        """
        peer = PeerId(name)
        assert peer not in self.nodes, "two coordinators from one disk"
        self.starts += 1
        node = CoordinatorNode(self, peer, self._disk(peer), self.delegation(peer, until_s))
        self.nodes[peer] = node
        node.begin()
        return node

    def delegation(self, peer: PeerId, until_s: float = 0.0) -> Delegation:
        """The organizer's newest word that `peer` may have the coordinator's seat."""
        return delegate(SimSigner(ORGANIZER), RUN, peer, self.starts, int(WALL_S + until_s) if until_s else 0)

    def start_volunteer(self, name: str, *, fresh_disk: bool = False) -> "VolunteerNode":
        """Start a volunteer that joins, or joins again with the disk it had."""
        peer = PeerId(name)
        if fresh_disk:
            self.disks.pop(peer, None)
        self.left.pop(peer, None)
        node = VolunteerNode(self, peer, self._disk(peer))
        self.nodes[peer] = node
        node.begin()
        return node

    def _disk(self, peer: PeerId) -> Disk:
        if peer not in self.disks:
            first = peer == COORDINATOR and FIRST_INCARNATION not in self.incarnations
            incarnation = FIRST_INCARNATION if first else self.rng.randbytes(8)
            disk = Disk(incarnation=incarnation, model=FIRST_MODEL if first else None)
            self.disks[peer] = self.incarnations[incarnation] = disk
        return self.disks[peer]

    def wipe(self, name: str) -> None:
        """The disk of a node that is down is gone."""
        del self.disks[PeerId(name)]

    def recover(self, name: str) -> None:
        """The organizer begins an epoch on the chain of that coordinator's disk, while it is down: it decides alone."""
        peer = PeerId(name)
        disk = self.disks[peer]
        ledger = Ledger(self.charter, SimSigner(peer), self.gate)
        for commit in disk.commits:
            ledger.append(commit)
        head = ledger.head
        term = self.starts + 1
        seat = delegate(SimSigner(ORGANIZER), RUN, peer, term)
        block = Block(
            epoch=head.epoch + 1,
            round=head.round + 1,
            parent=head.hash,
            model_before=self.models[head.hash],
            global_step=head.global_step,
            steps=0,
            entries=(),
            parts=(),
            redo=head.redo,
            cursor=head.cursor,
            committee=ledger.rule.weigh({peer: disk.incarnation}, peer, ledger.credit),
            coordinator=seat,
        )
        signature = SimSigner(ORGANIZER).sign(epoch_payload(RUN, block.hash))
        disk.commits.append(Commit(block, 0, (Ballot(ORGANIZER, signature),)))
        self.rules.commits(disk.commits[-1])

    def crash(self, name: str) -> None:
        """SIGKILL: nothing more is said or done; the disk stays."""
        node = self.nodes.pop(PeerId(name), None)
        if node is not None:
            node.alive = False
            self.traffic.up_s[node.peer] += self.now - node.up_since
            self.traffic.training_s[node.peer] += node.training_s()

    def lose_newest_commit(self) -> None:
        """Everyone is killed, and what the coordinator's disk took last is gone with the power."""
        for name in list(self.nodes):
            self.crash(name)
        disk = self.disks[COORDINATOR]
        lost = disk.commits.pop()
        disk.model_round, disk.model_block = len(disk.commits), lost.block.parent
        disk.model = self.models[lost.block.parent]
        self.rules.lost(disk.incarnation, (lost.block.epoch, lost.block.round - 1))

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

    def wall_s(self) -> float:
        """The run's time, unix seconds."""
        return WALL_S + self.now

    def issue(self, terms: Terms) -> Ticket:
        """A ticket of the organizer's."""
        return issue(SimSigner(ORGANIZER), RUN, TICKET, terms)

    def decide(self, verdict: str, name: str, reason: str = "", *, unheard_by: Iterable[str] = ()) -> None:
        """The organizer decides about a peer; everyone hears of it at once but for those that a test names."""
        raw = f"{verdict} {name} {self.now}".encode()
        said = Decision(PeerId(name), verdict, reason, self.wall_s(), float("inf"), raw)
        self.decisions.append(said)
        for peer, node in self.nodes.items():
            if peer not in unheard_by:
                node.decisions.take(said)

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

    def chain(self) -> list[Commit]:
        """The longest chain on any disk."""
        chains = [disk.commits for disk in self.disks.values() if disk.commits]
        return max(chains, key=lambda commits: (commits[-1].block.epoch, commits[-1].block.round), default=[])

    def audit(self) -> Audit:
        """What the longest chain proves."""
        commits = self.chain()
        known = {c.block.round: self.models[c.block.hash] for c in commits if c.block.hash in self.models}
        applied = {r: {COORDINATOR: digest} for r, digest in known.items()}
        return audit(self.charter, commits, applied, SimSigner(COORDINATOR))

    def rounds(self) -> int:
        """How many rounds are committed."""
        return len(self.chain())

    def leader(self) -> "Node | None":
        """Who leads now."""
        leading = [node for node in self.nodes.values() if node.leader().phase is not Phase.FOLLOWING]
        return max(leading, key=lambda node: (node.follower.ledger.head.place, node.follower.view), default=None)

    def reason(self) -> str:
        """What whoever leads says it waits for, and where everyone stands."""
        leader = self.leader()
        stand = ", ".join(
            f"{peer}: {node.follower.ledger.head.place} view {node.follower.view}/{node.follower.promises.pledged}"
            f"{' frozen' if node.frozen else ''} model {node.follower.model_round}"
            for peer, node in sorted(self.nodes.items())
        )
        committee = [voter.peer for voter in self.chain()[-1].block.committee] if self.chain() else []
        return f"{leader.peer + ': ' + leader.leader().reason if leader else 'nobody leads'} [{stand}] of {committee}"

    def accuse(self, first: bytes, second: bytes) -> None:
        """Everyone hears of a proof at once: how it spreads is the gossip's, and tried there."""
        accused = check_evidence(RUN, *sorted((first, second)))
        if accused is not None and accused not in self.rules.liars:
            self.fail(f"{accused} is honest, and is convicted")
        self.convicted |= set() if accused is None else {accused}

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

    def send(self, sender: PeerId, to: PeerId, message: Message, nbytes: int) -> None:
        """Put one message on its way; it may be lost, doubled or overtaken."""
        way_s = self.nodes[sender].up.say(nbytes, now=self.now) if sender in self.nodes else 0.0
        if self.rng.random() < self.network.loss_rate:
            return
        for _ in range(2 if self.rng.random() < self.network.duplicate_rate else 1):
            self.after(way_s + self.delay(), lambda: self._deliver(sender, to, message, nbytes))

    def _deliver(self, sender: PeerId, to: PeerId, message: Message, nbytes: int) -> None:
        if self.reaches(sender, to):
            self.traffic.moved(sender, to, CODEC.tag_of(message), nbytes)
            other = self.nodes[to]
            way_s = other.down.say(nbytes, now=self.now)
            if way_s < 0.001:
                other.do(lambda node: node.take(sender, message))
            else:
                self.after(way_s, lambda: other.do(lambda node: node.take(sender, message)))
        elif sender in self.nodes:
            self.nodes[sender].do(lambda node: node.unreachable(to))

    def transfer(
        self,
        sender: "Node",
        to: PeerId,
        nbytes: int,
        kind: str,
        arrived: Callable[["Node"], str | None],
        done: Callable[[str | None], None],
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        """Move bulk bytes: `arrived` takes or refuses them at the other end, `done` hears here of an error or None.

        broken: told at the other end if we are gone before all is there.
        """
        begun = self.nodes.get(to)
        if begun is None or not self.reaches(sender.peer, to):
            self.after(self.delay(), lambda: sender.do(lambda _: done("unreachable")))
            return
        lines = [sender.up, begun.down]

        def through() -> None:
            lines.pop()
            if not lines:
                self.after(self.delay(), finish)

        def finish() -> None:
            other = self.nodes.get(to)
            self.traffic.moved(sender.peer, to, kind, nbytes)
            if not sender.alive:
                begun.do(lambda _: broken())
            elif other is not begun or not self.reaches(sender.peer, to):
                sender.do(lambda _: done("unreachable"))
            elif other.frozen:
                self.after(5.0, lambda: sender.do(lambda _: done("no byte for 5 s")))
            else:
                begun.do(take)

        def take(node: Node) -> None:
            said: str | None = "the connection broke"
            try:
                said = arrived(node)
            finally:
                sender.do(lambda _: done(said))

        for line in tuple(lines):
            line.carry(nbytes, through, now=self.now)


class Node:
    """A process: a machine, its shell's work in virtual time, and its disk."""

    machine: Keeper | Volunteer

    def __init__(self, world: World, peer: PeerId, disk: Disk) -> None:
        self.world, self.peer, self.disk = world, peer, disk
        self.alive, self.frozen = True, False
        network = world.network
        self.up = Line(network.bytes_per_s, world.after)
        self.down = Line(network.bytes_per_s * network.downlink, world.after)
        self.up_since = world.now
        self.clock_error_s = (2 * world.rng.random() - 1) * network.clock_error_s if network.clock_error_s else 0.0
        self._fetching: dict[bytes, Node] = {}
        """Blobs that are on their way here, and from whom."""
        self.backlog: list[Callable[[], None]] = []
        self.signer = SimSigner(peer)
        patience = Patience.of(world.recipe.rounds)
        self.decisions = Decisions()
        for said in world.decisions:
            self.decisions.take(said)
        ledger = Ledger(world.charter, self.signer, world.gate)
        admission = Admission(
            world.gate,
            lambda: ledger.head.roll,
            decisions=self.decisions,
            quarantined=lambda: frozenset(world.convicted if world.convicts else ()),
            clock=world.wall_s,
            round_s=patience.round_s,
        )
        self.follower = Follower(self.signer, ledger, patience, disk.incarnation, admission)
        self.apply_s = 0.05
        self._wake = 0
        self._overdue = 0
        self.follower.restore(disk.commits, disk.blobs, disk.promises)

    def lead(self) -> Leader:
        """The machine that leads when it is this node's turn."""
        world = self.world
        return Leader(
            self.follower,
            self.signer,
            world.recipe,
            world.num_parts,
            assign_parts,
            started=int(WALL_S + world.now + self.clock_error_s),
            known_plan=lambda: self.machine.plan if isinstance(self.machine, Volunteer) else None,
        )

    def begin(self) -> None:
        """Take up what the disk holds, and look around."""
        disk, now = self.disk, self.world.now
        model = disk.model
        if model is not None and disk.model_block == disk.block(disk.model_round):
            since = [commit for commit in disk.commits if commit.block.round > disk.model_round]
            self.do(lambda _: self.perform(self.machine.synced(disk.model_round, model, since, now=now)))
        elif isinstance(self.machine, Keeper):
            self.world.after(0.5, lambda: self.do(lambda node: node.sync()))
        self._schedule()
        self._look()

    def _look(self) -> None:
        """Ask somebody now and then how far the chain has come: we may hear no leader, or one whose epoch is over."""
        if not self.alive:
            return
        others = [peer for peer in self.world.nodes if peer != self.peer]
        if not self.frozen and others:
            donor = self.world.rng.choice(others)
            self.do(lambda node: node.catch_up(donor))
        self.world.after(LOOK_S * (0.5 + self.world.rng.random()), self._look)

    def do(self, event: Callable[["Node"], object]) -> None:
        """Let something happen here, unless the process is dead; a frozen one does it when it thaws."""
        if not self.alive:
            return
        if self.frozen:
            self.backlog.append(lambda: self.do(event))
            return
        try:
            event(self)
        except Killed as killed:
            if killed.node is not self:
                raise
            return
        self._schedule()

    def training_s(self) -> float:
        """For how long it has trained since it was started."""
        return 0.0

    def take(self, sender: PeerId, message: Message) -> None:
        self.perform(self.machine.receive(sender, message, now=self.world.now))

    def tick(self) -> None:
        self.perform(self.machine.tick(now=self.world.now))

    def leader(self) -> Leader:
        """The machine that leads when it is this node's turn."""
        return self.machine.leader

    def unreachable(self, peer: PeerId) -> None:
        """The network says that nobody answers there."""
        self.perform(self.machine.lost(peer, "nobody answers", now=self.world.now))

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
        world, disk = self.world, self.disk
        match effect:
            case effects.Send(to, message):
                if isinstance(message, Plan) and message.seats:
                    world.traffic.plans.add((message.epoch, message.order))
                self.say(to, message)
            case effects.Store(commit):
                rewinds = commit.block.round <= len(disk.commits)
                self._write("Rewind" if rewinds else "Store", lambda: self._store(commit))
            case effects.Rewind():
                pass  # the Store that follows does both in one
            case effects.Remember(promises):
                self._write("Remember", lambda: setattr(disk, "promises", promises))
            case effects.Apply(commit):
                world.after(self.apply_s, lambda: self.do(lambda node: node.apply(commit)))
            case effects.Fetch(wanted, donors):
                world.after(world.delay() * 2, lambda: self.do(lambda node: node.fetch(wanted, donors)))
            case effects.CatchUp(donor, _):
                world.after(world.delay() * 2, lambda: self.do(lambda node: node.catch_up(donor)))
            case effects.Resync():
                world.after(0.5, lambda: self.do(lambda node: node.sync()))
            case Keep() | LeftOut():
                pass  # the world sees every model as it is applied, and every block
            case effects.Refused():
                world.refusals.append(effect)
            case effects.Accuse(first, second):
                world.accuse(first, second)
            case _:
                raise AssertionError(f"no shell for {effect}")

    def _write(self, what: str, change: Callable[[], object]) -> None:
        """Change something on the disk: wholly or, if we are killed before, not at all."""
        self.world.step(self, what, change)

    def _store(self, commit: Commit) -> None:
        disk = self.disk
        del disk.commits[commit.block.round - 1 :]  # of an epoch that is over
        tip = disk.commits[-1].block if disk.commits else None
        disk.commits.append(commit)
        self.world.rules.stores(self.peer, disk.incarnation, commit, tip)

    def keep(self, digests: Iterable[bytes]) -> None:
        """Averages are here and checked: have them on the disk, one by one."""
        for digest in digests:
            self._write("blob", lambda digest=digest: self.disk.blobs.add(digest))  # type: ignore[misc]

    def keep_model(self, round_: int, block: bytes, model: bytes) -> None:
        """Have the model after `block`, of that round, on the disk, in the place of the one before."""

        def change() -> None:
            self.disk.model_round, self.disk.model_block, self.disk.model = round_, block, model

        self._write("model", change)

    def say(self, to: Sequence[PeerId], message: Message) -> None:
        """Send `message` to each of `to`, one after the other."""
        nbytes, what = sealed_bytes(message), f"Send({type(message).__name__})"
        for peer in to:
            self.world.step(self, what, lambda peer=peer: self._send(peer, message, nbytes))  # type: ignore[misc]

    def _send(self, to: PeerId, message: Message, nbytes: int) -> None:
        self._check(message)
        self.world.send(self.peer, to, message, nbytes)

    def apply(self, commit: Commit) -> None:
        if self.follower.applying is not commit:
            return  # another epoch began meanwhile
        block = commit.block
        assert self.disk.model is not None
        model = blake3(self.disk.model + b"".join(block.parts)).digest() if block.parts else self.disk.model
        self.world.rules.applies(self.peer, self.disk.incarnation, commit, model)
        self.keep_model(block.round, block.hash, model)
        self.perform(self.machine.applied(block.round, model, NO_COST, now=self.world.now))

    def hold(self, digests: tuple[bytes, ...]) -> None:
        self.perform(self.machine.holds(digests, now=self.world.now))

    def fetch(self, wanted: tuple[tuple[int, bytes], ...], donors: tuple[PeerId, ...]) -> None:
        """Get parts from whoever has them, from each about as many."""
        world = self.world
        here = tuple(digest for _, digest in wanted if digest in self.disk.blobs)
        if here:
            self.hold(here)
        able = [peer for peer in donors if world.reaches(self.peer, peer) and not world.nodes[peer].frozen]
        asked: Counter[PeerId] = Counter()
        for part, digest in wanted:
            on_its_way = digest in self._fetching and self._fetching[digest].alive
            having = [peer for peer in able if digest in world.disks[peer].blobs]
            if digest not in self.disk.blobs and not on_its_way and having:
                donor = min(having, key=lambda peer: asked[peer])
                asked[donor] += 1
                self._fetch_from(world.nodes[donor], digest, world.part_bytes[part])

    def _fetch_from(self, donor: "Node", digest: bytes, nbytes: int) -> None:
        self._fetching[digest] = donor

        def arrived(_: Node) -> None:
            self._fetching.pop(digest, None)
            self.keep((digest,))
            self.hold((digest,))

        def ended(error: str | None) -> None:
            if error is not None:
                self._fetching.pop(digest, None)

        self.world.transfer(donor, self.peer, nbytes, "fetch", arrived, ended)

    def catch_up(self, donor: PeerId) -> None:
        """Take the commits of `donor` that we lack."""
        if not self.world.reaches(self.peer, donor) or self.world.nodes[donor].frozen:
            return
        commits = list(self.world.disks[donor].commits)
        mine = {commit.block.hash for commit in self.disk.commits}
        for commit in commits:
            if commit.block.hash not in mine:
                self.world.traffic.moved(donor, self.peer, "commits", sealed_bytes(commit))
                self.take(donor, commit)

    def sync(self) -> None:
        """Take the model from any peer that has one."""
        world = self.world
        donors = [
            peer
            for peer in sorted(world.nodes)
            if peer != self.peer
            and world.reaches(self.peer, peer)
            and not world.nodes[peer].frozen
            and world.disks[peer].model is not None
        ]
        if not donors:
            world.after(1.0, lambda: self.do(lambda node: node.sync_failed()))
            return
        donor = max(donors, key=lambda peer: world.nodes[peer].follower.ledger.head.place)
        self.catch_up(donor)
        if self.follower.ledger.head.round <= SHORT_REPLAY_ROUNDS and self.disk.model is None:
            self.synced(0, RUN, FIRST_MODEL)  # computed here, as the recipe says
            return
        theirs = world.disks[donor]
        place = theirs.model_block
        if theirs.model is None or self.disk.block(theirs.model_round) != place:
            world.after(1.0, lambda: self.do(lambda node: node.sync_failed()))
            return
        round_, model = theirs.model_round, theirs.model
        same = [peer for peer in donors if world.disks[peer].model == model]
        pieces = world.rng.sample(same, min(STATE_DONORS, len(same)))
        nbytes = STATE_RATIO * sum(world.part_bytes) // len(pieces)
        failed: list[PeerId] = []

        def ended(peer: PeerId, error: str | None) -> None:
            if error is not None:
                failed.append(peer)
            pieces.remove(peer)
            if not pieces:
                self.do(lambda node: node.sync_failed() if failed else node.synced(round_, place, model))

        for peer in tuple(pieces):
            world.transfer(
                world.nodes[peer], self.peer, nbytes, "state",
                lambda _, peer=peer: ended(peer, None),  # type: ignore[misc]
                lambda error, peer=peer: None if error is None else ended(peer, error),  # type: ignore[misc]
                lambda peer=peer: ended(peer, "gone"),  # type: ignore[misc]
            )  # fmt: skip

    def synced(self, round_: int, block: bytes, model: bytes) -> None:
        """The model after `block`, of that round, is here."""
        if block != self.disk.block(round_):
            self.sync_failed()  # another epoch began meanwhile
            return
        self.keep_model(round_, block, model)
        since = [commit for commit in self.disk.commits if commit.block.round > round_]
        self.perform(self.machine.synced(round_, model, since, now=self.world.now))

    def sync_failed(self) -> None:
        """Nobody could give the model; the machine asks again."""
        self.perform(self.machine.sync_failed("nobody has the model", now=self.world.now))

    def _check(self, message: Message) -> None:
        rules = self.world.rules
        if isinstance(message, Vote):
            rules.votes(self.peer, self.disk.incarnation, message)
        elif isinstance(message, ViewChange):
            rules.pledges(self.peer, self.disk.incarnation, message)
        elif isinstance(message, Lock) and message.block.parent == self.follower.ledger.head.hash:
            rules.shows(message, self.follower.ledger.head.committee)


class CoordinatorNode(Node):
    """A coordinator: leads and follows, trains nothing."""

    machine: Keeper

    def __init__(self, world: World, peer: PeerId, disk: Disk, delegation: Delegation) -> None:
        super().__init__(world, peer, disk)
        rounds = world.recipe.rounds
        self.machine = Keeper(
            peer,
            self.lead(),
            delegation,
            report_s=rounds.report_s,
            leave_s=rounds.train_s,
        )


class VolunteerNode(Node):
    """A volunteer: trains for as long as its speed says, and moves its parts."""

    machine: Volunteer

    def __init__(self, world: World, peer: PeerId, disk: Disk) -> None:
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
