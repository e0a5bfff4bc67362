"""The nodes of a simulated run: the production machines, and what their shells do, in virtual time.

Moving messages and bytes, folding, hashing, storing; what only volunteers do is in `volunteer_node`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from blake3 import blake3

from dugnad.coordinator import effects
from dugnad.coordinator.admission import Admission
from dugnad.coordinator.effects import Cost, Keep, LeftOut
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.keeper import Keeper
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.messages import Commit, Lock, Plan, ViewChange, Vote
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.rounds import Leader
from dugnad.coordinator.state import SHORT_REPLAY_ROUNDS
from dugnad.dht.decisions import Decisions
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message
from dugnad.optim.plan import assign_parts
from dugnad.peer.lifecycle import Volunteer
from dugnad.peer.stage import FIRST_MODEL, RUN, WALL_S, Disk, SimSigner, Stage
from dugnad.peer.traffic import Line, sealed_bytes

STATE_RATIO = 8
"""How many times as large as an average the model is: weights and momentum, in fp32."""
STATE_DONORS = 4
"""From how many peers at once the model is taken."""
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


class Node:
    """A process: a machine, its shell's work in virtual time, and its disk."""

    machine: Keeper | Volunteer

    def __init__(self, world: "Stage[Node]", peer: PeerId, disk: Disk) -> None:
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

    def __init__(self, world: "Stage[Node]", peer: PeerId, disk: Disk, delegation: Delegation) -> None:
        super().__init__(world, peer, disk)
        rounds = world.recipe.rounds
        self.machine = Keeper(
            peer,
            self.lead(),
            delegation,
            report_s=rounds.report_s,
            leave_s=rounds.train_s,
        )
