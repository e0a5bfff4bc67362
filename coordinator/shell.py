"""What every role does around its machine: messages in and out, bytes in and out, disk, and the model that follows.

A role (`coordinator.service`, `peer.session`) brings the machine; the shell brings the world. Machine calls and their
effects run on the event loop, one at a time and in order; a Store is durable before the next effect is looked at, so
nothing that depends on it can leave earlier. What takes long (applying, fetching, catching up) runs beside, and comes
back as an event.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from dugnad.configs.recipe import decode
from dugnad.coordinator import effects, sync
from dugnad.coordinator import follower as following
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.checkpoint import name_of
from dugnad.coordinator.damage import CheckpointError, Damage
from dugnad.coordinator.effects import Cost, Keep, LeftOut
from dugnad.coordinator.follower import Follower, Patience
from dugnad.coordinator.ledger import Charter, Ledger
from dugnad.coordinator.mail import Mail
from dugnad.coordinator.messages import (
    MAX_PARTS,
    ROUND_KINDS,
    Applied,
    Commit,
    Commits,
    CommitsRequest,
    Digest,
    Genesis,
    Message,
    Plan,
    StateRequest,
    Welcome,
    WelcomeRequest,
)
from dugnad.coordinator.rounds import Leader
from dugnad.coordinator.state import SHORT_REPLAY_ROUNDS, Model, Numerics, State
from dugnad.coordinator.vouched import SHOWN_ROUNDS
from dugnad.dht import bulk
from dugnad.dht.blobs import Blobs
from dugnad.dht.budget import GIVE_MBIT, Budget
from dugnad.dht.download import Incoming, Progress, download
from dugnad.dht.identity import Identity, PeerId, nickname, verify
from dugnad.dht.transport import Transport, TransportError
from dugnad.dht.wire import Codec, WireError, open_sealed, seal
from dugnad.monitoring.metrics import Metrics

log = logging.getLogger(__name__)

ROUND_CHANNEL = "dugnad/round/1"
RESULTS_CHANNEL = "dugnad/results/1"
CODEC = Codec(ROUND_KINDS)
KEPT_ROUNDS = following.REPLAY_ROUNDS
"""For how many rounds their committed bytes are kept for those who come late."""
COMMITS_BYTES = 512 * 1024
"""How many bytes of commits one answer holds, about."""
SILENCE_S = 5.0
"""How long a transfer may stand still."""


LOOK_S = 5.0
"""How often one who hears of no leader asks somebody how far the chain has come."""
REPAIR_S = 4.0
"""How long after a start, or a failure, other keepers are asked for what is damaged here."""
DONORS_ASKED = 8
"""Of how many, one after the other, the newest model is asked, before it is tried again later."""


class ResultsHeader(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What stands before the bytes of encoded averages: of which view, which parts, with which digests."""

    round: int
    view: int
    attempt: int
    parts: Annotated[tuple[tuple[int, Digest], ...], Meta(min_length=1, max_length=MAX_PARTS)]

    @property
    def order(self) -> tuple[int, int, int]:
        """As `Plan.order`."""
        return (self.round, self.view, self.attempt)


_results_header = msgspec.msgpack.Decoder(ResultsHeader)


class KeySigner:
    """`votes.Signer` with a real key."""

    def __init__(self, identity: Identity) -> None:
        self.peer_id = identity.peer_id
        self.sign = identity.sign
        self.verify = verify


class Machine(Protocol):
    """What the shell drives: a `Keeper` or a `Volunteer`."""

    @property
    def plan(self) -> Plan | None:
        """The plan of the round under way."""

    def restore(self, digests: Mapping[int, Mapping[PeerId, Applied]], validation: tuple[int, float | None]) -> None:
        """What the disk kept of what others signed."""

    def receive(self, sender: PeerId, message: Message, *, now: float) -> Sequence[object]:
        """Take a message."""

    def result(
        self, owner: PeerId, order: tuple[int, int, int], parts: dict[int, bytes], *, now: float
    ) -> Sequence[object]:
        """Averages are here."""

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> Sequence[object]:
        """Blobs are here."""

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> Sequence[object]:
        """A model is here."""

    def sync_failed(self, why: str, *, now: float) -> Sequence[object]:
        """No model could be had."""

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> Sequence[object]:
        """A round is applied."""

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> Sequence[object]:
        """Blobs of the round being applied are damaged."""

    def lost(self, peer: PeerId, why: str, *, now: float) -> Sequence[object]:
        """A peer does not answer."""

    def tick(self, *, now: float) -> Sequence[object]:
        """Time has passed."""

    def wake_at(self) -> float:
        """When to tick next."""


class Shell:
    """The world around one machine in one run; a role derives from it and says what only the role knows.

    contacts: peers of the run that are known from elsewhere, for one who hears of no leader. barred: who gets no seat
    and no vote. accuse: hears the two halves of each proof that a voter lies.
    """

    machine: Machine

    def __init__(
        self,
        identity: Identity,
        genesis: Genesis,
        numerics: Numerics,
        *,
        transport: Transport,
        directory: Path,
        metrics: Metrics,
        contacts: Callable[[], Iterable[PeerId]] = tuple,
        barred: Callable[[], frozenset[PeerId]] = frozenset,
        accuse: Callable[[bytes, bytes], object] = lambda first, second: None,
    ) -> None:
        self.identity, self.genesis, self.run = identity, genesis, genesis.run
        self.recipe = decode(genesis.recipe)
        self.transport, self.metrics = transport, metrics
        self.chain = Chain(directory / "chain.sqlite")
        self.chain.found(genesis)
        self.blobs = Blobs(directory / "blobs")
        self.signer = KeySigner(identity)
        self.charter = Charter.of(genesis, open_to_all=self.recipe.admission.kind == "open")
        self.follower = Follower(
            self.signer,
            Ledger(self.charter, self.signer),
            Patience.of(self.recipe.rounds),
            self.chain.incarnation(),
        )
        self.leader = Leader(
            self.follower,
            self.signer,
            self.recipe,
            len(numerics.part_bytes),
            numerics.assign_parts,
            started=int(time.time()),
            known_plan=self.known_plan,
            barred=barred,
        )
        self.state = State(genesis, self.charter, self.recipe, numerics, self.signer, directory)
        self.asker = sync.Asker(transport, identity, self.run)
        self.budget = Budget.of_mbit(GIVE_MBIT)
        """What we give to those who fetch; whoever made the role may set another before it serves."""
        self.done = asyncio.Event()
        """Set when the role has nothing more to do."""
        self.downloading: Progress | None = None
        """How far the model is that we take from peers."""
        self._incoming = directory / "incoming"
        self._numerics = numerics
        self._part_bytes = tuple(numerics.part_bytes)
        self._contacts = contacts
        self._accuse = accuse
        self._rng = random.Random()
        self._aftermath: asyncio.Queue[tuple[Commit, Model]] = asyncio.Queue()
        """Rounds that are applied, and not yet measured and saved."""
        self._changed = asyncio.Event()
        self._attempted: dict[bytes, int] = {}
        """Blobs of attempts at rounds that are not committed yet -> the round."""
        self._averages: tuple[tuple[int, int, int], dict[int, bytes]] = ((0, 0, 0), {})
        """(round, term, view), and the digest of each part that has come in it."""
        self._fetching: set[bytes] = set()
        self._came_at_round = 0
        """The head of the chain when we got a model: what is applied up to there is only replayed."""
        self._forgotten_round = 0
        """Up to which round the parts of old commits are deleted."""
        self._syncing = False
        """Whether the model is being taken from peers: what comes of that the machine hears."""
        self._finishing = False
        self._over = False
        """Whether the role is ending: from then on nothing is done or answered any more."""
        self._sent_before: Counter[str] = Counter()
        self._applied_at = time.monotonic()
        self._tasks: asyncio.TaskGroup
        self._mail: Mail

    # -- what a role adds

    async def begin(self) -> None:
        """What the role does first, once messages can come and go."""

    def known_plan(self) -> Plan | None:
        """The newest plan of the round under way that another leader gave us."""
        return None

    async def measure(self, commit: Commit, model: Model) -> float | None:
        """The loss on held-out data of the model after `commit`, where the role measures it."""
        return None

    def perform_role(self, effect: object) -> None:
        """Do an effect that only this role knows."""
        raise AssertionError(f"no shell for {effect}")

    def unreachable(self, peer: PeerId, why: str) -> None:
        """A member that takes no message is not waited for, if we lead."""
        log.debug("%s is unreachable: %s", nickname(peer), why)
        self.perform(self.machine.lost(peer, why, now=self.now()))

    async def answer(self, sender: PeerId, question: Message) -> Message | None:
        """The answer to one who joins or catches up; None where there is none."""
        match question:
            case WelcomeRequest():
                return Welcome(self.genesis)
            case CommitsRequest(epoch, after_round):
                return self._commits_after(epoch, after_round)
            case StateRequest():
                return self.state.offer(self.chain, self.leader)
            case _:
                return None

    def on_applied(self, commit: Commit, model: Model, cost: Cost) -> None:
        """A round is in place; the machine has not heard of it yet."""

    async def farewell(self) -> None:
        """What the role still waits for at its end, once its last model is saved."""

    def count_round(self, commit: Commit, cost: Cost) -> None:
        """Show in the metrics that a round is in place: as committed only if that happened while we were here."""
        block = commit.block
        if block.round > self._came_at_round:
            self.metrics.round_committed(block.round, block.global_step, cost.wall_s)
        else:
            self.metrics.round_replayed(block.round, block.global_step)

    def train_s(self) -> float:
        """Seconds spent in training since the last call."""
        return 0.0

    # -- running

    async def serve(self) -> None:
        """Serve and drive the machine until `done` is set; what goes wrong inside ends it."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._mail = Mail(self.transport, ROUND_CHANNEL, self._tasks, unreachable=self.unreachable)
                try:
                    self._take_up()
                    await self.transport.serve(ROUND_CHANNEL, self._on_message)
                    await self.transport.serve(sync.CHANNEL, self._on_question)
                    await bulk.serve_blobs(self.transport, self.lookup, budget=self.budget)
                    await bulk.serve_push(
                        self.transport, RESULTS_CHANNEL, self._accept_results, self._take_results,
                        header_cap=512 * 1024, total_cap=sum(self._part_bytes),
                    )  # fmt: skip
                    await self.begin()
                    await self._take_up_model()
                    self.spawn(self._drive())
                    self.spawn(self._keep_looking())
                    self.spawn(self._measure_and_save())
                    self.spawn(self._keep_repairing())
                    await self.done.wait()
                    await self._mail.flush(within_s=2.0)
                    raise _Done
                finally:
                    self._over = True
        except* _Done:
            pass
        finally:
            self.chain.close()

    def finish(self) -> None:
        """Save the last model, take leave, and be done; said twice, it is done once."""
        if not self._finishing and not self._over:
            self._finishing = True
            self.spawn(self._finish())

    async def _finish(self) -> None:
        await self._aftermath.join()
        await self._save_last()
        await self.farewell()
        self.done.set()

    @staticmethod
    def now() -> float:
        """The machines' clock: monotonic seconds."""
        return time.monotonic()

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run `work` beside; if it fails, the role ends with its error."""
        task = self._tasks.create_task(self._guarded(work))
        task.add_done_callback(lambda _: work.close())  # it may have been cancelled before it began
        return task

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            self._over = True  # now: before the task group hears of it, a handler may run that would start more
            raise

    async def _drive(self) -> None:
        while True:
            self._changed.clear()
            wait_s = self.machine.wake_at() - self.now()
            if wait_s <= 0:
                self.perform(self.machine.tick(now=self.now()))
                await asyncio.sleep(0.001)  # a machine that is always due must not keep the loop from all else
                continue
            try:
                async with asyncio.timeout(None if wait_s == float("inf") else wait_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    # -- effects

    def perform(self, effects: Sequence[object]) -> None:
        """Do the effects of one machine call, in order; if one fails, the role ends, and does nothing more."""
        if self._over:
            return
        with self.or_end():
            for effect in effects:
                self._perform_one(effect)
        self._changed.set()

    @contextmanager
    def or_end(self) -> Iterator[None]:
        """What fails inside ends the role: the handlers of the network, which survive anything, run in this."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the role with `error`, unless it is ending already."""
        if not self._over:
            self._over = True
            self.spawn(_raise(error))

    def _perform_one(self, effect: object) -> None:
        match effect:
            case effects.Send(to, message):
                raw = seal(self.identity, self.run, CODEC, message)
                for peer in to:
                    self.metrics.message_passed("sent", CODEC.tag_of(message))
                    self._mail.post(peer, raw)
            case effects.Store(commit):
                self.chain.append(commit, at_s=time.time())
            case effects.Remember(promises):
                self.chain.remember(promises)
            case effects.Rewind(round_):
                # the chain forgets it with the Store that follows: a crash between the two would take the head back
                log.warning("the organizer began an epoch after round %d: what followed it counts no more", round_)
            case effects.Apply(commit):
                self.spawn(self._apply(commit))
            case effects.Fetch(wanted, donors):
                self.spawn(self._fetch(wanted, donors))
            case effects.CatchUp(donor, after):
                self.spawn(self._catch_up(donor, after))
            case effects.Resync(reason):
                self._resync(reason)
            case Keep(peer, said):
                self.chain.applied(peer, said)
            case LeftOut(peer, reason, detail):
                self.metrics.rejected_contribution(reason)
                log.info("the work of %s is left out (%s): %s", nickname(peer), reason, detail)
            case effects.Refused(sender, reason, detail):
                self.metrics.rejected_message(reason)
                log.debug("refused a message of %s (%s): %s", nickname(sender), reason, detail)
            case effects.Accuse(first, second):
                self._accuse(first, second)
            case _:
                self.perform_role(effect)

    async def _apply(self, commit: Commit) -> None:
        newest = self.state.newest
        assert newest is not None, "commits are applied to a model"
        block, model, since = commit.block, newest[1], self.now()
        payloads = await asyncio.to_thread(lambda: [self.blobs.get(digest) for digest in block.parts])
        whole = [payload for payload in payloads if payload is not None]
        if len(whole) < len(payloads):
            lost = tuple(digest for digest, data in zip(block.parts, payloads, strict=True) if data is None)
            log.warning("%d parts of round %d were damaged on this disk; fetching them again", len(lost), block.round)
            self.perform(self.machine.damaged(lost, now=self.now()))
            return
        if whole:
            before = block.global_step - block.steps
            model = await asyncio.to_thread(model.apply, whole, self.recipe.outer, global_step=before)
        digest = await asyncio.to_thread(model.digest)
        if self.follower.applying is not commit:
            return  # another epoch began meanwhile
        self.state.models.append((block.round, model))
        self.metrics.phase_took("apply", self.now() - since)
        self._forget_blobs(commit)
        cost = self._cost()
        self.on_applied(commit, model, cost)
        self._aftermath.put_nowait((commit, model))
        self.perform(self.machine.applied(block.round, digest, cost, now=self.now()))

    def _cost(self) -> Cost:
        """What the time since the last applied round cost us."""
        sent, now = Counter(self.metrics.sent_bytes()), self.now()
        cost = Cost(self.train_s(), now - self._applied_at, dict(sent - self._sent_before))
        self._sent_before, self._applied_at = sent, now
        return cost

    def _forget_blobs(self, applied: Commit) -> None:
        """Delete what failed attempts at this round left, and the parts of the round that is too old now."""
        number = applied.block.round
        stale = {digest for digest, round_ in self._attempted.items() if round_ <= number} - set(applied.block.parts)
        self._attempted = {digest: round_ for digest, round_ in self._attempted.items() if round_ > number}
        self.follower.forget(stale)
        if number - KEPT_ROUNDS > self._forgotten_round:
            old = number - KEPT_ROUNDS
            for commit in self.chain.commits(after_round=self._forgotten_round, limit=old - self._forgotten_round):
                stale.update(commit.block.parts)
            self._forgotten_round = old
        if stale:  # two rounds may have had the same averages
            stale -= self._kept_parts(number)
        for digest in stale:
            self.blobs.delete(digest)

    def _kept_parts(self, head_round: int) -> set[bytes]:
        commits = self.chain.commits(after_round=max(0, head_round - KEPT_ROUNDS))
        return {digest for commit in commits for digest in commit.block.parts}

    def _take_up(self) -> None:
        """Take up what this folder keeps of the run: the chain, and the bytes of recent rounds."""
        head, here = self.chain.head_round(), self.blobs.digests()
        self.follower.restore(self.chain.commits(), here, self.chain.promises())
        measured = max(self.chain.validation().items(), default=(0, None))
        self.machine.restore(self.chain.applieds(after_round=head - SHOWN_ROUNDS), measured)
        # what belongs to no round yet may have been voted for: it goes when the next round is in place without it
        self._attempted = dict.fromkeys(here - self._kept_parts(head), head + 1)
        self._forgotten_round = max(0, head - KEPT_ROUNDS)

    async def _fetch(self, wanted: Sequence[tuple[int, bytes]], donors: Sequence[PeerId]) -> None:
        # what is on its way already is not asked for again: on a slow line the two would only slow each other down
        sizes = {digest: self._part_bytes[part] for part, digest in wanted if digest not in self._fetching}
        missing = {digest: size for digest, size in sizes.items() if not self.blobs.has(digest)}
        self._fetching |= missing.keys()
        self._attempted.update(dict.fromkeys(missing, self.follower.ledger.head.round + 1))
        try:
            if missing:
                await self.fetch(donors, missing, kind="fetch", on_blob=lambda _, data: void(self.blobs.put(data)))
        except TransportError as error:
            log.info("%d parts could not be fetched yet: %s", len(missing), error)
        finally:
            self._fetching -= missing.keys()
        here = tuple(digest for digest in sizes if self.blobs.has(digest))
        self.perform(self.machine.holds(here, now=self.now()))

    async def fetch(
        self, donors: Sequence[PeerId], sizes: Mapping[bytes, int], *, kind: str, on_blob: bulk.OnBlob
    ) -> None:
        """Get blobs, {digest: bytes}, from any of `donors`. Raises TransportError if one can't be had."""
        others = [peer for peer in donors if peer != self.identity.peer_id]
        await bulk.fetch_all(self.transport, others, sizes, kind=kind, timeout_s=SILENCE_S, on_blob=on_blob)

    async def _catch_up(self, donor: PeerId, after: tuple[int, int]) -> None:
        try:
            await self._take_commits(donor, after)
        except (TransportError, WireError, sync.SyncError) as error:
            log.debug("could not catch up after round %d: %s", after[1], error)

    async def _take_commits(self, donor: PeerId, after: tuple[int, int]) -> None:
        def take(commit: Commit) -> tuple[int, int]:
            self.perform(self.machine.receive(donor, commit, now=self.now()))
            return self.follower.ledger.head.place

        await self.asker.commits(donor, after, take)

    async def _keep_looking(self) -> None:
        """Ask somebody now and then how far the chain has come, seldom while we hear of a leader."""
        while True:
            await asyncio.sleep(LOOK_S * (0.5 + self._rng.random()))
            others = sorted(self._known_peers())
            now = self.now()
            lost = self.follower.silent_s(now=now) is not None or self.leader.deserted(now=now)
            if others and (lost or self._rng.random() < following.LOOK_ANYWAY):
                await self._catch_up(self._rng.choice(others), self.follower.ledger.head.place)

    def _known_peers(self) -> set[PeerId]:
        return {*self.follower.ledger.head.voters, *self._contacts()} - {self.identity.peer_id}

    # -- the model

    async def _take_up_model(self) -> None:
        """Go on with the model of this disk, or take it from peers."""
        head = self.follower.ledger.head.round
        newest = self.chain.commits(after_round=head - following.REPLAY_ROUNDS - 1)
        blocks = {commit.block.round: commit.block.hash for commit in newest}
        found = await asyncio.to_thread(self.state.take_up, head, blocks)
        if found is None or self._block_at(found[0]) != blocks.get(found[0]):  # an epoch may have undone it meanwhile
            self._resync("there is none on this disk from which the chain's head can be reached")
        else:
            await self._go_on_from(*found)

    async def _go_on_from(self, round_: int, model: Model) -> None:
        head = self.follower.ledger.head.round
        if 0 < round_ < head:
            log.info("replaying rounds %d to %d on the model of round %d", round_ + 1, head, round_)
        digest = await asyncio.to_thread(model.digest)
        self.state.replace(round_, model)
        self._came_at_round = self.follower.ledger.head.round
        self._syncing = False
        since = self.chain.commits(after_round=round_)
        self.perform(self.machine.synced(round_, digest, since, now=self.now()))

    def _block_at(self, round_: int) -> bytes | None:
        """The hash of a round's block in our chain."""
        commit = self.chain.commit(round_)
        return None if commit is None else commit.block.hash

    def _resync(self, reason: str) -> None:
        if not self._syncing:
            self._syncing = True
            log.info("taking the model from peers: %s", reason)
            self.spawn(self._sync())

    async def _sync(self) -> None:
        """Take the chain and the model from whoever has them."""
        first = [peer for peer in self.follower.contacts(now=self.now()) if peer != self.identity.peer_id]
        rest = sorted(self._known_peers())
        self._rng.shuffle(rest)
        why = "nobody is known who could have the model"
        for donor in list(dict.fromkeys([*first, *rest]))[:DONORS_ASKED]:
            try:
                found = await self._sync_with(donor)
            except (TransportError, WireError, sync.SyncError, ValueError) as error:
                why = str(error)
                log.debug("no model from %s: %s", nickname(donor), error)
            else:
                await self._go_on_from(*found)
                return
        log.info("no model yet: %s", why)
        self._syncing = False
        self.perform(self.machine.sync_failed(why, now=self.now()))

    async def _sync_with(self, donor: PeerId) -> tuple[int, Model]:
        """A proven (round, model) from which the head can be reached."""
        await self._take_commits(donor, self.follower.ledger.head.place)
        if self.follower.ledger.head.round <= SHORT_REPLAY_ROUNDS and self.state.newest is None:
            first = await asyncio.to_thread(self.state.first_model)
            if first is not None:
                return 0, first
        offer = await self.asker.state(donor, self.charter, self.genesis.first_model, self.chain.commit, self.signer)
        if self.follower.ledger.head.round - offer.round > following.REPLAY_ROUNDS:
            raise sync.SyncError(f"{donor} offers the model after round {offer.round}, which is too old to replay from")
        known = self._block_at(offer.round)
        model = await self._download(offer.manifest, donor)
        if self._block_at(offer.round) != known:
            raise sync.SyncError(f"an epoch began before round {offer.round} while its model came")
        log.info("the model after round %d is here, verified", offer.round)
        return offer.round, model

    async def _download(self, manifest: bytes, donor: PeerId) -> Model:
        """The model of `manifest`, which is proven, from everyone who has it. Raises ValueError if it can't be one."""

        def told(progress: Progress) -> None:
            self.downloading = progress

        wanted = self._numerics.wanted(manifest)
        donors = [*sorted(self._known_peers() - {donor}), donor]  # the last serves all who ask what the newest is
        incoming = Incoming(self._incoming, self.state.lookup)
        try:
            await download(self.transport, donors, wanted, incoming, timeout_s=SILENCE_S, told=told)
            model = await asyncio.to_thread(self._numerics.model_from, manifest, incoming.chunk)
            await asyncio.to_thread(incoming.clear)
        finally:
            self.downloading = None
        return model

    async def _keep_repairing(self) -> None:
        """Replace damaged checkpoints from other keepers, as soon as one of them can be reached."""

        async def fetch(wanted: Mapping[bytes, int], on_blob: bulk.OnBlob) -> None:
            await self.fetch(sorted(self._known_peers()), wanted, kind="state", on_blob=on_blob)

        async def repaired(damage: Damage) -> bool:
            try:
                await self.state.repair(damage, fetch, self.chain.commit)
            except CheckpointError as error:
                log.debug("%s", error)
                return False
            log.info("%s is whole again: what was damaged came from other keepers", damage.path.name)
            return True

        left = self.state.damaged
        while left:
            await asyncio.sleep(REPAIR_S * (0.5 + self._rng.random()))
            # one that is gone became too old to be kept
            left = [damage for damage in left if damage.path.exists() and not await repaired(damage)]

    async def _measure_and_save(self) -> None:
        every = self.recipe.checkpoints.every_rounds
        while True:
            commit, model = await self._aftermath.get()
            val_loss = await self.measure(commit, model)
            if commit.block.round % every == 0:
                await self.save(commit, model, val_loss)
            self._aftermath.task_done()

    async def save(self, commit: Commit, model: Model, val_loss: float | None) -> None:
        """Write a checkpoint of the model after `commit`."""
        since = self.now()
        await asyncio.to_thread(self.state.save, commit.block, model, val_loss)
        self.metrics.checkpoint_written(commit.block.round, self.now() - since)

    async def _save_last(self) -> None:
        """Save the newest model, if it is of the chain and no checkpoint of it was written yet."""
        newest, follower, saved = self.state.newest, self.follower, self.state.checkpoint
        if newest is None or follower.model is None:
            return  # before it began, or a model that counts no more
        round_, model = newest
        commit = self.chain.commit(round_)
        if commit is not None and (saved is None or saved.name != name_of(round_)):
            val_round, val_loss = self.leader.validation
            await self.save(commit, model, val_loss if val_round == round_ else None)

    # -- what others send and ask

    async def _on_message(self, peer: PeerId, raw: bytes) -> bytes:
        try:
            sender, message = open_sealed(raw, self.run, CODEC)
            if sender != peer:
                raise WireError("not the sender", f"{peer} brought a message of {sender}")
        except WireError as error:
            self._rejected(peer, error)
        else:
            assert isinstance(message, Message)
            self.metrics.message_passed("received", CODEC.tag_of(message))
            with self.or_end():
                self.perform(self.machine.receive(sender, message, now=self.now()))
        return b""

    async def _on_question(self, peer: PeerId, raw: bytes) -> bytes:
        try:
            sender, question = open_sealed(raw, self.run, sync.CODEC)
            if sender != peer:
                raise WireError("not the sender", f"{peer} brought a question of {sender}")
        except WireError as error:
            self._rejected(peer, error)
            return b""
        assert isinstance(question, Message)
        self.metrics.message_passed("received", sync.CODEC.tag_of(question))
        reply = None if self._over else await self.answer(sender, question)
        if reply is None:
            return b""
        self.metrics.message_passed("sent", sync.CODEC.tag_of(reply))
        return seal(self.identity, self.run, sync.CODEC, reply)

    def _rejected(self, peer: PeerId, error: WireError) -> None:
        self.metrics.rejected_message(error.reason)
        log.debug("dropped what %s sent: %s", nickname(peer), error)

    def _commits_after(self, epoch: int, round_: int) -> Commits:
        begins = self.chain.epoch_begins(after_epoch=epoch)
        round_ = round_ if begins is None else min(round_, begins - 1)
        chosen: list[Commit] = []
        size = 0
        for commit in self.chain.commits(after_round=round_, limit=1024):
            size += len(msgspec.msgpack.encode(commit))
            if chosen and size > COMMITS_BYTES:
                break
            chosen.append(commit)
        return Commits(*self.follower.ledger.head.place, tuple(chosen))

    def lookup(self, digest: bytes) -> bytes | memoryview | None:
        """A blob that we can give: of a model that is here, or of a recent round; called in a thread."""
        chunk = self.state.lookup(digest)
        return self.blobs.get(digest) if chunk is None else chunk

    def _accept_results(self, sender: PeerId, raw: bytes, sizes: tuple[int, ...]) -> str | None:
        if self._over:
            return "this peer is leaving"
        try:
            header = _results_header.decode(raw)
        except msgspec.DecodeError as error:
            return f"malformed header: {error}"
        if not all(0 <= part < len(self._part_bytes) for part, _ in header.parts):
            return f"the vector has {len(self._part_bytes)} parts"
        if sizes != tuple(self._part_bytes[part] for part, _ in header.parts):
            return "a part has another size than the layout gives it"
        if not self.leader.expects(sender, header.order, [part for part, _ in header.parts]):
            return f"round {header.round} is not under way here"
        order, came = self._averages
        if order == header.order and any(came.get(part, digest) != digest for part, digest in header.parts):
            return "other averages came for this part"  # else one owner could fill the disk
        return None

    async def _take_results(self, sender: PeerId, raw: bytes, buffers: list[bytearray]) -> bytes:
        header = _results_header.decode(raw)
        why = await asyncio.to_thread(self._fault, header, buffers)
        if why is not None:
            log.warning("averages of %s refused: %s", nickname(sender), why)
            raise bulk.PushRefused(sender, why)
        try:
            await self.store_attempt(header.round, buffers)
        except OSError as error:  # our disk, not their stream: it must not pass for a broken transfer
            self.fail(error)
            raise bulk.PushRefused(sender, "the disk here takes no more") from error
        if self._averages[0] != header.order:
            self._averages = (header.order, {})
        self._averages[1].update(header.parts)
        with self.or_end():
            self.perform(self.machine.result(sender, header.order, dict(header.parts), now=self.now()))
        return b""

    def _fault(self, header: ResultsHeader, buffers: Sequence[bytearray]) -> str | None:
        for (part, digest), buffer in zip(header.parts, buffers, strict=True):
            if blake3(buffer).digest() != digest:
                return f"part {part} is not what its digest promised"
            try:
                self._numerics.check_part(buffer)
            except ValueError as error:
                return f"part {part}: {error}"
        return None

    async def store_attempt(self, round_: int, buffers: Sequence[bytes | bytearray | memoryview]) -> tuple[bytes, ...]:
        """Store averages of an attempt at `round_` durably, and return their digests."""
        digests = await asyncio.to_thread(lambda: tuple(self.blobs.put(buffer) for buffer in buffers))
        self._attempted.update(dict.fromkeys(digests, round_))
        return digests


class _Done(Exception):
    """The role is done: its tasks are to end."""


async def _raise(error: Exception) -> None:
    raise error


def void(_: object) -> None:
    """Drop a value where a function that returns nothing is asked for."""
