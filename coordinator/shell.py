"""What every role does around its machine: messages in and out, bytes in and out, disk, and the model that follows.

A role (`coordinator.service`, `peer.session`) brings the machine; the shell brings the world. Machine calls and their
effects run on the event loop, one at a time and in order; a Store is durable before the next effect is looked at, so
nothing that depends on it can leave earlier. What takes long (applying, fetching, catching up) runs beside, and comes
back as an event. Averages, answers to others, and where chain and model come from are ideas of their own, beside.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dugnad.configs.recipe import decode
from dugnad.coordinator import effects, sync
from dugnad.coordinator.admission import Admission
from dugnad.coordinator.answers import Answers
from dugnad.coordinator.averages import HEADER_BYTES, RESULTS_CHANNEL, Averages
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.effects import Cost, Keep, LeftOut
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.ledger import Charter, Ledger
from dugnad.coordinator.machine import Machine
from dugnad.coordinator.mail import Mail
from dugnad.coordinator.messages import ROUND_KINDS, Commit, Plan
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.phases import PhaseWatch
from dugnad.coordinator.rounds import Leader
from dugnad.coordinator.sources import Sources
from dugnad.coordinator.state import Model, Numerics, State
from dugnad.coordinator.surroundings import Surroundings
from dugnad.coordinator.vouched import SHOWN_ROUNDS
from dugnad.dht import bulk
from dugnad.dht.blobs import Blobs
from dugnad.dht.identity import Identity, PeerId, nickname, verify
from dugnad.dht.wire import Codec, Message, WireError, open_sealed, seal

log = logging.getLogger(__name__)

ROUND_CHANNEL = "dugnad/round/1"
CODEC = Codec(ROUND_KINDS)


class KeySigner:
    """`votes.Signer` with a real key."""

    def __init__(self, identity: Identity) -> None:
        self.peer_id = identity.peer_id
        self.sign = identity.sign
        self.verify = verify


class Shell:
    """The world around one machine in one run; a role derives from it and says what only the role knows."""

    machine: Machine

    def __init__(self, around: Surroundings, numerics: Numerics) -> None:
        self.identity, self.genesis, self.run = around.identity, around.genesis, around.genesis.run
        self.recipe = decode(self.genesis.recipe)
        self.transport, self.metrics = around.transport, around.metrics
        self.chain = Chain(around.directory / "chain.sqlite")
        self.chain.found(self.genesis)
        self.blobs = Blobs(around.directory / "blobs")
        self.signer = KeySigner(self.identity)
        self.charter = Charter.of(self.genesis, self.recipe.admission.kind)
        ledger, patience = Ledger(self.charter, self.signer), Patience.of(self.recipe.rounds)
        self.admission = Admission(
            ledger.gate,
            lambda: ledger.head.roll,
            decisions=around.decisions,
            quarantined=around.quarantined,
            clock=around.clock,
            round_s=patience.round_s,
        )
        self.follower = Follower(self.signer, ledger, patience, self.chain.incarnation(), self.admission)
        self.leader = Leader(
            self.follower,
            self.signer,
            self.recipe,
            len(numerics.part_bytes),
            numerics.assign_parts,
            started=int(time.time()),
            known_plan=self.known_plan,
        )
        self.state = State(self.genesis, self.charter, self.recipe, numerics, self.signer, around.directory)
        self.averages = Averages(self.blobs, self.chain, self.leader, numerics)
        self.answers = Answers(self.genesis, self.chain, self.state, self.leader)
        self.sources = Sources(
            around,
            numerics,
            chain=self.chain,
            state=self.state,
            follower=self.follower,
            signer=self.signer,
            take=lambda donor, commit: self.perform(self.machine.receive(donor, commit, now=self.now())),
        )
        self.budget = around.budget
        self.done = asyncio.Event()
        """Set when the role has nothing more to do."""
        self._phases = PhaseWatch(self.leader, self.metrics)
        self._numerics = numerics
        self._accuse = around.accuse
        self._abilities = around.abilities
        self._aftermath: asyncio.Queue[tuple[Commit, Model]] = asyncio.Queue()
        """Rounds that are applied, and not yet measured and saved."""
        self._changed = asyncio.Event()
        self._came_at_round = 0
        """The head of the chain when we got a model: what is applied up to there is only replayed."""
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
                        self.transport, RESULTS_CHANNEL, self._accept_averages, self._take_averages,
                        header_cap=HEADER_BYTES, total_cap=sum(self._numerics.part_bytes),
                    )  # fmt: skip
                    await self.begin()
                    await self._take_up_model()
                    self.spawn(self._drive())
                    self.spawn(self.sources.keep_looking())
                    self.spawn(self._measure_and_save())
                    self.spawn(self.sources.keep_repairing())
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
            self.machine.abilities = self._abilities()
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
        self._phases.look(now=self.now())
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
                self.spawn(self.sources.catch_up(donor, after))
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
        self.averages.forget(commit)
        cost = self._cost()
        self.on_applied(commit, model, cost)
        if not self._finishing:  # else rounds that go on without us would keep us here: the last model is saved anyway
            self._aftermath.put_nowait((commit, model))
        self.perform(self.machine.applied(block.round, digest, cost, now=self.now()))

    def _cost(self) -> Cost:
        """What the time since the last applied round cost us."""
        sent, now = Counter(self.metrics.sent_bytes()), self.now()
        cost = Cost(self.train_s(), now - self._applied_at, dict(sent - self._sent_before))
        self._sent_before, self._applied_at = sent, now
        return cost

    def _take_up(self) -> None:
        """Take up what this folder keeps of the run: the chain, and the bytes of recent rounds."""
        head, here = self.chain.head_round(), self.blobs.digests()
        self.follower.restore(self.chain.commits(), here, self.chain.promises())
        measured = max(self.chain.validation().items(), default=(0, None))
        self.machine.restore(self.chain.applieds(after_round=head - SHOWN_ROUNDS), measured)
        self.averages.take_up(here)

    async def _fetch(self, wanted: Sequence[tuple[int, bytes]], donors: Sequence[PeerId]) -> None:
        async def fetch(sizes: Mapping[bytes, int], on_blob: bulk.OnBlob) -> None:
            await self.sources.fetch(donors, sizes, kind="fetch", on_blob=on_blob)

        here = await self.averages.fetch(wanted, fetch)
        self.perform(self.machine.holds(here, now=self.now()))

    # -- the model

    async def _take_up_model(self) -> None:
        """Go on with the model of this disk, or take it from peers."""
        found = await self.sources.own_model()
        if found is None:
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

    def _resync(self, reason: str) -> None:
        if not self._syncing:
            self._syncing = True
            log.info("taking the model from peers: %s", reason)
            self.spawn(self._sync())

    async def _sync(self) -> None:
        """Take the chain and the model from whoever has them."""
        try:
            found = await self.sources.model(now=self.now())
        except sync.SyncError as error:
            log.info("no model yet: %s", error)
            self._syncing = False
            self.perform(self.machine.sync_failed(str(error), now=self.now()))
        else:
            await self._go_on_from(*found)

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
        newest = self.state.newest
        if newest is None or self.follower.model is None:
            return  # before it began, or a model that counts no more
        round_, model = newest
        commit = self.chain.commit(round_)
        if commit is not None and self.state.saved != commit.block.hash:
            val_round, val_loss = self.leader.validation
            await self.save(commit, model, val_loss if val_round == round_ else None)

    # -- what others send and ask

    async def _on_message(self, peer: PeerId, raw: bytes) -> bytes:
        message = self._opened(peer, raw, CODEC)
        if message is not None:
            with self.or_end():
                self.perform(self.machine.receive(peer, message, now=self.now()))
        return b""

    async def _on_question(self, peer: PeerId, raw: bytes) -> bytes:
        question = self._opened(peer, raw, sync.CODEC)
        reply = None if question is None or self._over else self.answers.to(question)
        if reply is None:
            return b""
        self.metrics.message_passed("sent", sync.CODEC.tag_of(reply))
        return seal(self.identity, self.run, sync.CODEC, reply)

    def _opened(self, peer: PeerId, raw: bytes, codec: Codec) -> Message | None:
        """What `peer` says, if these are words of its own."""
        try:
            sender, message = open_sealed(raw, self.run, codec)
            if sender != peer:
                raise WireError("not the sender", f"{peer} brought a message of {sender}")
        except WireError as error:
            self.metrics.rejected_message(error.reason)
            log.debug("dropped what %s sent: %s", nickname(peer), error)
            return None
        assert isinstance(message, Message)
        self.metrics.message_passed("received", codec.tag_of(message))
        return message

    def lookup(self, digest: bytes) -> bytes | memoryview | None:
        """A blob that we can give: of a model that is here, or of a recent round; called in a thread."""
        chunk = self.state.lookup(digest)
        return self.blobs.get(digest) if chunk is None else chunk

    def _accept_averages(self, sender: PeerId, raw: bytes, sizes: tuple[int, ...]) -> str | None:
        return "this peer is leaving" if self._over else self.averages.refuses(sender, raw, sizes)

    async def _take_averages(self, sender: PeerId, raw: bytes, buffers: list[memoryview]) -> bytes:
        try:
            header = await self.averages.take(sender, raw, buffers)
        except OSError as error:  # our disk, not their stream: it must not pass for a broken transfer
            self.fail(error)
            raise bulk.PushRefused(sender, "the disk here takes no more") from error
        with self.or_end():
            self.perform(self.machine.result(sender, header.order, dict(header.parts), now=self.now()))
        return b""


class _Done(Exception):
    """The role is done: its tasks are to end."""


async def _raise(error: Exception) -> None:
    raise error
