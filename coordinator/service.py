"""The coordinator's process: it leads, follows without training, measures, and writes checkpoints.

It holds nothing that the peers do not hold, but for the run key. What it keeps in its folder is enough to go on:

    chain.sqlite   every commit        blobs/   the bytes of recent rounds        checkpoints/   the model now and then
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from blake3 import blake3

from dugnad.coordinator import history, sync
from dugnad.coordinator.checkpoint import Checkpoint, CheckpointMeta, manifest_of, name_of, round_of
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.damage import CheckpointError
from dugnad.coordinator.follower import REPLAY_ROUNDS, Cost, Resync
from dugnad.coordinator.messages import (
    Commit,
    Delegation,
    Genesis,
    Message,
    StateOffer,
    StateRequest,
    delegation_payload,
)
from dugnad.coordinator.rounds import SHOWN_ROUNDS, Assign, Keep, Leader, LeftOut, Phase
from dugnad.coordinator.shell import KEPT_ROUNDS, Model, ResultsHeader, Shell
from dugnad.coordinator.tensorfile import Tensors
from dugnad.coordinator.votes import has_quorum
from dugnad.dht.identity import Identity, PeerId, nickname
from dugnad.dht.transport import Transport
from dugnad.monitoring.metrics import Metrics

log = logging.getLogger(__name__)

GOODBYE_S = 10.0
"""How long members of a finished run are awaited to take note and leave."""
BEHIND_ROUNDS = 4
"""When more rounds than these wait to be measured, some are left out: checkpoints, which wait as well, matter more."""


_PHASES: dict[Phase, Literal["gather", "reduce", "vote"]] = {
    Phase.GATHER: "gather",
    Phase.REDUCE: "reduce",
    Phase.VOTE: "vote",
}


class RestoreError(Exception):
    """What the folder holds does not make a run that can go on; the message says what is wrong and what to do."""


class Numerics(Protocol):
    """What needs optim and torch, from above."""

    part_bytes: tuple[int, ...]
    """Bytes of each encoded part."""
    assign_parts: Assign

    def check_part(self, payload: bytes | bytearray | memoryview) -> None:
        """Raise ValueError for part bytes that no encoder makes, or with values that no training has."""

    def first_model(self) -> Model:
        """The model before round 1, the same everywhere."""

    def model_of(self, weights: Tensors, momentum: Tensors) -> Model:
        """The model of these tensors. Raises ValueError where they do not fit the recipe."""

    def validation_loss(self, model: Model) -> float:
        """Nats per byte on held-out data; takes a while."""


class Coordinator(Shell):
    """Leads one run from `directory` until its steps are done or `stop` is called."""

    machine: Leader

    def __init__(
        self,
        identity: Identity,
        genesis: Genesis,
        organizer: Identity,
        numerics: Numerics,
        *,
        transport: Transport,
        directory: Path,
        metrics: Metrics,
    ) -> None:
        super().__init__(
            identity,
            genesis,
            transport=transport,
            directory=directory,
            metrics=metrics,
            part_bytes=numerics.part_bytes,
            check_part=numerics.check_part,
        )
        self.checkpoints = Checkpoints(directory / "checkpoints", self.recipe.checkpoints.keep, self.signer)
        self.checkpoint: Path | None = None
        """The newest checkpoint."""
        self._numerics = numerics
        term = self.chain.next_term(at_s=time.time())
        signature = organizer.sign(delegation_payload(self.run, identity.peer_id, term))
        delegation = Delegation(identity.peer_id, term, signature)
        self.machine = Leader(
            self.follower,
            self.signer,
            self.recipe,
            delegation,
            len(numerics.part_bytes),
            numerics.assign_parts,
        )
        self._aftermath: asyncio.Queue[tuple[Commit, Model]] = asyncio.Queue()
        self._ending = False
        self._phase = (Phase.IDLE, self.now())
        self._order = (0, 0, 0)
        """Of the newest plan that was counted."""

    def stop(self) -> None:
        """Finish the round under way, write a checkpoint, and end."""
        self.perform(self.machine.stop(now=self.now()))

    # -- the role's part of the shell

    async def begin(self) -> None:
        """Take up what the folder holds."""
        head = self.follower.ledger.head.round
        measured = max(self.chain.validation().items(), default=(0, None))
        self.machine.restore(self.chain.applieds(after_round=head - SHOWN_ROUNDS), measured)
        round_, model = await asyncio.to_thread(self._newest_model, head)
        if round_ == head and not self._is_certified(round_, model):
            round_, model = await asyncio.to_thread(self._older_model, round_, model)
        self.models.append((round_, model))
        if round_ < head:
            log.info("replaying rounds %d to %d on the checkpoint of round %d", round_ + 1, head, round_)
        self.spawn(self._measure_and_save())
        since = self.chain.commits(after_round=round_)
        self._came_at_round = head
        self.perform(self.machine.synced(round_, model.digest(), since, now=self.now()))

    def _newest_model(self, head_round: int) -> tuple[int, Model]:
        self.checkpoints.recover()
        newest = self.checkpoints.latest()
        if newest is None:
            return 0, self._first_model()
        return self._model_of(self.checkpoints.load(newest), head_round)

    def _older_model(self, head_round: int, newest: Model) -> tuple[int, Model]:
        """A model from which the rounds before the head are met again in replaying, instead of the `newest`.

        We ended before a quorum had signed that one, so nobody may take it from us; if everyone ended then, nobody
        would have a model. What stands before it is certified.
        """
        older = self.checkpoints.latest(before_round=head_round)
        start = 0 if older is None else round_of(older)
        if head_round - start > REPLAY_ROUNDS:
            return head_round, newest
        return (0, self._first_model()) if older is None else self._model_of(self.checkpoints.load(older), head_round)

    def _first_model(self) -> Model:
        model = self._numerics.first_model()
        if model.digest() != self.genesis.first_model:
            raise RestoreError(
                "the first model that this machine computes is not the one that the run began with. "
                "Was it started with another version of dugnad? Use that one."
            )
        return model

    def _is_certified(self, round_: int, model: Model) -> bool:
        """Whether a quorum has signed that this is the model after `round_`, so that joiners may take it."""
        commit = next(self.chain.commits(after_round=round_ - 1, limit=1), None) if round_ > 0 else None
        if commit is None:
            return round_ == 0
        ballots = self.machine.state_ballots(round_, model.digest())
        return has_quorum(sync.committee_after(commit), {ballot.peer for ballot in ballots})

    def _model_of(self, saved: Checkpoint, head_round: int) -> tuple[int, Model]:
        self.checkpoint = saved.path
        try:
            model = self._numerics.model_of(saved.weights, saved.momentum)
        except ValueError as error:
            raise CheckpointError(f"{saved.path} does not fit this run's recipe: {error}") from error
        if saved.meta.run != self.run.hex() or _digest(model) != saved.meta.model_digest:
            raise CheckpointError(f"{saved.path} is not a checkpoint of this run. Move it away and start again.")
        if saved.round > head_round:
            raise RestoreError(
                f"{saved.path} is of round {saved.round}, but {self.chain.path} ends at round {head_round}: "
                "an older copy of the chain? Put back the newer one."
            )
        return saved.round, model

    def perform(self, effects: Sequence[object]) -> None:
        """Do the effects, and see whether the run has come to its end."""
        super().perform(effects)
        leader = self.machine
        self._watch_phase()
        over = leader.phase is Phase.FINISHED or (leader.stopping and leader.phase is Phase.IDLE)
        if over and self.follower.at_head and not self._ending and not self._over:
            self._ending = True
            self.spawn(self._end())

    def _watch_phase(self) -> None:
        phase, now, plan = self.machine.phase, self.now(), self.machine.plan
        before, since = self._phase
        if phase is not before:
            if before in _PHASES:
                self.metrics.phase_took(_PHASES[before], now - since)
            self._phase = (phase, now)
        if plan is not None and plan.order > self._order:
            if plan.view > 0:
                self.metrics.view_failed()
            self._order = plan.order

    def perform_role(self, effect: object) -> None:
        """Keep what peers sign; a model that the committee disowns ends the process."""
        match effect:
            case Keep(peer, said):
                self.chain.applied(peer, said)
            case LeftOut(peer, reason, detail):
                self.metrics.rejected_contribution(reason)
                log.info("the work of %s is left out (%s): %s", nickname(peer), reason, detail)
            case Resync(reason):
                raise RestoreError(
                    f"the newest checkpoint in {self.checkpoints.folder} can't be used: {reason}. "
                    f"The averages of {KEPT_ROUNDS} rounds are kept: put back one that is no older, and resume."
                )
            case _:
                super().perform_role(effect)

    def unreachable(self, peer: PeerId, why: str) -> None:
        """A member that takes no message is not waited for."""
        log.info("%s is unreachable: %s", nickname(peer), why)
        self.perform(self.machine.lost(peer, why, now=self.now()))

    def took_results(self, sender: PeerId, header: ResultsHeader) -> None:
        """Averages are here: the leader counts them."""
        now = self.now()
        self.perform(self.machine.result(sender, header.order, dict(header.parts), now=now))

    async def answer(self, sender: PeerId, question: Message) -> Message | None:
        """Tell who joins the newest certified model, besides what every role can tell."""
        return self._offer() if isinstance(question, StateRequest) else await super().answer(sender, question)

    def _offer(self) -> StateOffer | None:
        for round_, model in reversed(self.models):
            if self._is_certified(round_, model):
                return StateOffer(round_, model.manifest(), self.machine.state_ballots(round_, model.digest()))
        return None

    def on_applied(self, commit: Commit, model: Model, cost: Cost) -> None:
        """Measure and save beside; the next round does not wait for it."""
        self.count_round(commit, cost)
        self._aftermath.put_nowait((commit, model))

    # -- what follows a round

    async def _measure_and_save(self) -> None:
        while True:
            commit, model = await self._aftermath.get()
            block = commit.block
            behind = self._aftermath.qsize() > BEHIND_ROUNDS
            if block.parts and block.round % self.recipe.evaluation.every_rounds == 0 and not behind:
                await self._measure(block.round, model)
            if block.round % self.recipe.checkpoints.every_rounds == 0:
                await self._save(block.round, block.global_step, model)
            self._tell(block.round)
            self._aftermath.task_done()

    async def _measure(self, round_: int, model: Model) -> None:
        loss = await asyncio.to_thread(self._numerics.validation_loss, model)
        self.chain.validated(round_, loss)
        self.machine.validation = (round_, loss)
        self.metrics.validated(loss)

    async def _save(self, round_: int, global_step: int, model: Model) -> None:
        val_round, val_loss = self.machine.validation
        meta = CheckpointMeta(
            run=self.run.hex(),
            recipe=self.recipe.name,
            recipe_json=self.genesis.recipe.decode(),
            model_digest=await asyncio.to_thread(_digest, model),
            global_step=global_step,
            val_loss=val_loss if val_round == round_ else None,
        )
        since = self.now()
        self.checkpoint = await asyncio.to_thread(self.checkpoints.save, round_, model.tensors(), meta=meta)
        self.metrics.checkpoint_written(round_, self.now() - since)

    def _tell(self, round_: int) -> None:
        row = history.rows(self.chain, after_round=round_ - 1)[0]
        if not row.roster:
            log.info("round %d  the committee is %d strong", round_, len(self.follower.ledger.head.committee))
            return
        measured = f"validation {row.val_loss:.3f}" if row.val_loss is not None else ""
        log.info(
            "round %d  %d peers  %d tokens  loss %.3f  %s  %.1f s",
            round_, len(row.roster), row.tokens, row.train_loss, measured, row.duration_s,
        )  # fmt: skip

    async def _end(self) -> None:
        """Save the last model, and let members of a finished run see that it is finished."""
        await self._aftermath.join()
        round_, model = self.models[-1]
        if round_ > 0 and (self.checkpoint is None or self.checkpoint.name != name_of(round_)):
            await self._save(round_, self.follower.ledger.head.global_step, model)
        deadline = self.now() + GOODBYE_S
        while self.machine.membership.live() and not self._is_certified(round_, model) and self.now() < deadline:
            await asyncio.sleep(0.1)  # a model that nobody vouches for can't be given to anyone after a restart
        if self.machine.phase is Phase.FINISHED:
            while self._awaited() and self.now() < deadline:
                await asyncio.sleep(0.1)
        self.done.set()

    def _awaited(self) -> set[PeerId]:
        """Who does not know yet that the run is finished: it is here, or has not been heard of since we started."""
        members, me = self.machine.membership, self.identity.peer_id
        voters = {voter.peer for voter in self.follower.ledger.head.committee if voter.peer != me}
        unheard = {peer for peer in voters if members.report(peer) is None}
        return (set(members.live()) | unheard) - members.leaving()


def _digest(model: Model) -> str:
    return blake3(manifest_of(model.tensors()).encode()).hexdigest()
