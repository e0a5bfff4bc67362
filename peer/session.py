"""A volunteer's process in one run: it does what `lifecycle.Volunteer` decides.

Training runs in a thread, one interval at a time, and is asked to stop between two steps. Part bytes travel through
`optim.exchange`; everything that all roles share is the shell's.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from dugnad.coordinator.averages import RESULTS_CHANNEL, ResultsHeader
from dugnad.coordinator.effects import Cost
from dugnad.coordinator.messages import Commit, Plan
from dugnad.coordinator.shell import Shell
from dugnad.coordinator.sources import SILENCE_S
from dugnad.coordinator.state import Model
from dugnad.coordinator.surroundings import Surroundings
from dugnad.dht import bulk
from dugnad.dht.identity import PeerId, nickname
from dugnad.dht.transport import TransportError
from dugnad.optim import reduce as reducing
from dugnad.optim.codec import NonFinite
from dugnad.optim.exchange import Exchange
from dugnad.optim.outer import SharedModel
from dugnad.peer import trainer as training
from dugnad.peer.lifecycle import Leave, Reduce, StopTraining, Train, Volunteer, Work
from dugnad.peer.numerics import Numerics

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Order:
    """How one training is told to end: after the step under way, for nothing if `discard`."""

    stop: threading.Event = field(default_factory=threading.Event)
    discard: bool = False

    def end(self, *, discard: bool) -> None:
        self.discard = self.discard or discard
        self.stop.set()


class Session(Shell):
    """One volunteer in one run, from joining to leaving."""

    machine: Volunteer

    def __init__(self, around: Surroundings, numerics: Numerics) -> None:
        super().__init__(around, numerics)
        self.machine = Volunteer(
            self.identity.peer_id,
            self.leader,
            num_parts=len(numerics.part_bytes),
            report_s=self.recipe.rounds.report_s,
        )
        self.loss: float | None = None
        """Of the newest step of our own training, in nats per token."""
        self.tokens_per_s = 0.0
        self.left_because = ""
        self._numerics: Numerics = numerics
        self._exchange = Exchange(self.transport, numerics.layout, expects=self.machine.takes, received=self._received)
        self._training: asyncio.Task[None] | None = None
        self._order = _Order()
        self._complaints: deque[object] = deque(maxlen=64)
        self._trained_s = 0.0
        self._contributed_at: float | None = None

    def leave(self) -> None:
        """Finish what others count on, then leave."""
        self.perform(self.machine.leave(now=self.now()))

    def may_pass_on(self, claim: bytes) -> bool:
        """Whether others may come by the ticket that we came by: it is bound to nobody, and has places left."""
        return self.admission.has_places(claim)

    # -- the role's part of the shell

    async def serve(self) -> None:
        """Take part until it is time to leave; the training thread, if any, ends after its step."""
        try:
            await super().serve()
        finally:
            self._order.end(discard=True)

    async def begin(self) -> None:
        """Take uploads."""
        await self._exchange.serve()

    def known_plan(self) -> Plan | None:
        """The newest plan of the round under way that another leader gave us."""
        return self.machine.plan

    def perform_role(self, effect: object) -> None:
        """Train, exchange, leave."""
        match effect:
            case Train():
                self._exchange.begin(effect.plan.round)  # at once: who is faster may send its parts any moment
                self._order.end(discard=True)
                self._order = _Order()
                self._training = self.spawn(self._train(effect, self._order, after=self._training))
            case StopTraining(keep):
                self._order.end(discard=not keep)
            case Reduce(_, reducing.Upload(owner, root, parts)):
                self.spawn(self._upload(owner, root, parts))
            case Reduce(_, reducing.Drop(contributor, root)):
                self._exchange.drop(contributor, root)
            case Reduce(plan, reducing.Fold() as fold):
                self.spawn(self._fold(plan, fold))
            case Reduce(plan, reducing.Deliver(to, parts)):
                self.spawn(self._deliver(plan, to, parts))
            case Leave(reason):
                self.left_because = reason
                self.finish()
            case _:
                super().perform_role(effect)

    def on_applied(self, commit: Commit, model: Model, cost: Cost) -> None:
        """Tell what the round was."""
        block = commit.block
        if not block.entries:
            return
        self.count_round(commit, cost)
        if self._contributed_at is not None:
            self.metrics.phase_took("exchange", self.now() - self._contributed_at)
            self._contributed_at = None
        if cost.wall_s > 0:
            self.metrics.utilized(min(1.0, cost.train_s / cost.wall_s))  # a late interval may reach over its round
        tokens = sum(entry.tokens for entry in block.entries)
        mine = next((entry for entry in block.entries if entry.peer == self.identity.peer_id), None)
        counted = f"you {mine.tokens} tokens, counted" if mine else "you were not part of it"
        loss = sum(entry.loss * entry.tokens for entry in block.entries) / tokens
        sent = sum(cost.sent_bytes.values()) / 1e6
        log.info("round %d  %d peers  loss %.3f  %s  up %.1f MB", block.round, len(block.entries), loss, counted, sent)

    def train_s(self) -> float:
        """Seconds spent in training since the last call."""
        spent, self._trained_s = self._trained_s, 0.0
        return spent

    # -- training

    async def _train(self, effect: Train, order: "_Order", after: "asyncio.Task[None] | None") -> None:
        """One interval; `after` is the training that it replaces, which has been told to stop."""
        if after is not None:
            await asyncio.wait([after])
        if order.discard:
            return
        plan = effect.plan
        self.machine.step = 0
        for other in plan.seats:
            await self.transport.learn(other.peer, other.addresses)
        try:
            interval = await self._interval(effect, order.stop)
            if order.discard:
                return
            if interval.steps == 0:
                self.perform(self.machine.not_trained(plan, "no step was done in time", now=self.now()))
                return
            root = await self._exchange.contribute(interval.pseudo_gradient)
        except (NonFinite, training.NonFinite) as error:
            log.warning("round %d: nothing to contribute: %s", plan.round, error)
            self.metrics.rejected_contribution("non-finite")
            self.perform(self.machine.not_trained(plan, str(error), now=self.now()))
            return
        if order.discard:
            self._exchange.drop(self.identity.peer_id, root)
            return
        self._contributed_at = self.now()
        work = Work(root, interval.samples, interval.tokens, interval.loss)
        self.perform(self.machine.trained(plan, work, now=self.now()))

    async def _interval(self, effect: Train, stop: threading.Event) -> training.Interval:
        newest = self.state.newest
        assert newest is not None, "who trains has a model"
        model = newest[1]
        assert isinstance(model, SharedModel)
        interval = await asyncio.to_thread(
            lambda: self._numerics.trainer.train(  # the trainer is made at its first use, which takes a while
                model.weights,
                ranges=effect.seat.ranges,
                steps=effect.seat.steps,
                global_step=effect.plan.global_step,
                stop=stop.is_set,
                on_step=self._stepped,
            )
        )
        self._trained_s += interval.compute_s
        self.metrics.phase_took("train", interval.compute_s)
        return interval

    def _stepped(self, step: training.StepResult) -> None:
        """Called in the training thread, after each step."""
        self.machine.step += 1
        self.loss, self.tokens_per_s = step.loss, step.tokens_per_s
        self.metrics.trained(step.tokens, step.loss, step.tokens_per_s)

    # -- the exchange

    def _complain(self, about: object, text: str, *words: object) -> None:
        """Log it once: what fails is tried again each second."""
        if about not in self._complaints:
            self._complaints.append(about)
            log.info(text, *words)

    def _received(self, contributor: PeerId, root: bytes, parts: tuple[int, ...]) -> None:
        with self.or_end():
            self.perform(self.machine.received(contributor, root, parts, now=self.now()))

    async def _upload(self, owner: PeerId, root: bytes, parts: tuple[int, ...]) -> None:
        try:
            await self._exchange.upload(owner, root, parts)
        except TransportError as error:
            self._complain((owner, root), "upload to %s: %s", nickname(owner), _without(owner, error))
            self.perform(self.machine.upload_failed(owner, root, parts, now=self.now()))
        else:
            self.perform(self.machine.uploaded(owner, root, parts, now=self.now()))

    async def _fold(self, plan: Plan, fold: reducing.Fold) -> None:
        averages = await self._exchange.fold(fold.parts, fold.entries)
        digests = await self.averages.store(plan.round, list(averages.values()))
        results = dict(zip(averages, digests, strict=True))
        self.perform(self.machine.folded(plan, results, now=self.now()))

    async def _deliver(self, plan: Plan, to: PeerId, parts: Mapping[int, bytes]) -> None:
        header = msgspec.msgpack.encode(ResultsHeader(*plan.order, tuple(parts.items())))
        payloads = await asyncio.to_thread(lambda: [self.blobs.get(digest) or b"" for digest in parts.values()])
        kind = "result" if plan.seat_of(to) is not None else "follow"
        error: str | None = None
        try:
            await bulk.push(self.transport, to, RESULTS_CHANNEL, header, payloads, kind=kind, timeout_s=SILENCE_S)
        except TransportError as failed:
            error = str(failed)
            self._complain((to, plan.order), "averages for %s: %s", nickname(to), _without(to, failed))
        self.perform(self.machine.delivered(plan, to, error=error, now=self.now()))


def _without(peer: PeerId, error: TransportError) -> str:
    """What went wrong with `peer`, for a line that names it already."""
    return str(error).removeprefix(peer).removeprefix(":").strip()
