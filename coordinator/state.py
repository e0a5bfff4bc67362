"""The model that a role holds: taken up from its disk, offered to joiners, taken from peers, saved now and then.

Every role keeps what it needs to start again: its checkpoints, the last of them written when it ends, and the averages
of the rounds after them.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from numpy import float32
from numpy.typing import NDArray

from dugnad.configs.recipe import OuterSettings, Recipe
from dugnad.coordinator import sync
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.checkpoint import CheckpointMeta, round_of
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.damage import CheckpointError, Damage
from dugnad.coordinator.ledger import Charter
from dugnad.coordinator.messages import Block, Genesis, StateOffer
from dugnad.coordinator.planning import Assign
from dugnad.coordinator.repair import Fetch
from dugnad.coordinator.replica import REPLAY_ROUNDS
from dugnad.coordinator.rounds import Leader
from dugnad.coordinator.tensorfile import Tensors
from dugnad.coordinator.votes import Signer

log = logging.getLogger(__name__)

KEPT_MODELS = 3
"""How many of the newest models are served to joiners: the time that a download may take, in rounds."""
SHORT_REPLAY_ROUNDS = 8
"""Up to so many rounds their averages, of a byte per parameter each, are no more than the model with its momentum."""


class RestoreError(Exception):
    """What the folder holds does not make a run that can go on; the message says what is wrong and what to do."""


class Model(Protocol):
    """The shared model, immutable; the outer step comes from above (this floor knows neither torch nor optim)."""

    def apply(self, payloads: Sequence[bytes], outer: OuterSettings, *, global_step: int) -> "Model":
        """The model after a round that began at `global_step`, from its averages, part by part."""

    def digest(self) -> bytes:
        """The model digest."""

    def manifest(self) -> bytes:
        """What the digest is the hash of."""

    def blob(self, digest: bytes) -> memoryview | bytes | None:
        """The bytes of one chunk, or of the manifest, by hash."""

    def tensors(self) -> dict[str, NDArray[float32]]:
        """Every tensor, named "momentum/<name>" or "weights/<name>"."""


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

    def wanted(self, manifest: bytes) -> dict[bytes, int]:
        """digest -> bytes of each chunk that a manifest names. Raises ValueError where it does not fit the recipe."""

    def model_from(self, manifest: bytes, blob: Callable[[bytes], bytes | memoryview | None]) -> Model:
        """The model of a manifest, from the chunks that `blob` gives. Raises ValueError if one is missing or bad."""

    def validation_loss(self, model: Model) -> float:
        """Nats per byte on held-out data; takes a while."""


class State:
    """The newest models of one role, in memory and in `directory`/checkpoints."""

    def __init__(
        self, genesis: Genesis, charter: Charter, recipe: Recipe, numerics: Numerics, signer: Signer, directory: Path
    ) -> None:
        self.models: deque[tuple[int, Model]] = deque(maxlen=KEPT_MODELS)
        """The newest (round, model), newest last."""
        self.checkpoints = Checkpoints(directory / "checkpoints", recipe.checkpoints.keep, signer)
        self.checkpoint: Path | None = None
        """The newest checkpoint."""
        self.saved: bytes | None = None
        """The hash of the block that it is the model after."""
        self.damaged: list[Damage] = []
        """Checkpoints that were found damaged, and are to be replaced from other keepers."""
        self._genesis = genesis
        self._charter = charter
        self._recipe = recipe
        self._numerics = numerics
        self._signer = signer

    @property
    def newest(self) -> tuple[int, Model] | None:
        """The newest (round, model)."""
        return self.models[-1] if self.models else None

    def replace(self, round_: int, model: Model) -> None:
        """This is the model from now on; those before are of another history, or unknown."""
        self.models.clear()
        self.models.append((round_, model))

    def take_up(self, head: int, blocks: Mapping[int, bytes]) -> tuple[int, Model] | None:
        """The newest (round, model) of this disk from which the chain's head can be reached; None without any.

        head: its round; blocks: the hashes of its newest ones, {round: hash}. Blocks on the disk. Raises RestoreError
        where nobody else can have the model: before the founder's first round.
        """
        self.checkpoints.recover()
        for path in self.checkpoints.newest_first():
            if head - round_of(path) > REPLAY_ROUNDS:
                break
            found = self._load(path, blocks)
            if found is not None:
                self.checkpoint, self.saved = path, blocks[round_of(path)]
                return found
        founder = self._signer.peer_id == self._genesis.founder
        first = self.first_model() if head <= SHORT_REPLAY_ROUNDS else None
        if first is None and founder and head == 0:
            raise RestoreError(
                "the first model that this machine computes is not the one that the run began with. "
                "Was it started with another version of dugnad? Use that one."
            )
        return None if first is None or (head == 0 and not founder) else (0, first)

    def first_model(self) -> Model | None:
        """The model before round 1, or None if this machine computes another."""
        model = self._numerics.first_model()
        return model if model.digest() == self._genesis.first_model else None

    def _load(self, path: Path, blocks: Mapping[int, bytes]) -> tuple[int, Model] | None:
        try:
            saved = self.checkpoints.load(path)
        except CheckpointError as error:
            if error.damage is not None:
                self.damaged.append(error.damage)
            log.warning("%s; going on without it", error.damage or error)
            return None
        block = blocks.get(saved.round)
        if saved.meta.run != self._charter.run.hex() or block is None or saved.meta.block != block.hex():
            log.warning("%s is of another run, or of a round that this chain does not hold; it is left alone", path)
            return None
        try:
            return saved.round, self._numerics.model_of(saved.weights, saved.momentum)
        except ValueError as error:
            log.warning("%s does not fit this run's recipe (%s); going on without it", path, error)
            return None

    def offer(self, chain: Chain, leader: Leader) -> StateOffer | None:
        """The newest model that others can know for true, with the proof if they need one."""
        for round_, model in reversed(tuple(self.models)):
            if self.proven(round_, model, chain, leader):
                return StateOffer(round_, model.manifest(), leader.vouched.ballots(round_, model.digest()))
        return None

    def proven(self, round_: int, model: Model, chain: Chain, leader: Leader) -> bool:
        """Whether others can know that this is the model after `round_`."""
        if round_ == 0:
            return True
        digest = model.digest()
        ballots = {ballot.peer: ballot.signature for ballot in leader.vouched.ballots(round_, digest)}
        return sync.is_proven(round_, digest, ballots, self._charter, chain.commit, self._signer)

    def lookup(self, digest: bytes) -> bytes | memoryview | None:
        """A chunk or manifest of a model that is here, in memory or on disk; called in any thread."""
        for _, model in reversed(tuple(self.models)):
            blob = model.blob(digest)
            if blob is not None:
                return blob
        return self.checkpoints.lookup(digest)

    def save(self, block: Block, model: Model, val_loss: float | None) -> None:
        """Write the checkpoint of the model after `block`. Blocks on the disk. Raises CheckpointError."""
        meta = self._meta(block, model.digest().hex(), val_loss)
        self.checkpoint, self.saved = self.checkpoints.save(block.round, model.tensors(), meta=meta), block.hash

    async def repair(self, damage: Damage, fetch: Fetch, commit_of: sync.CommitOf) -> None:
        """Replace what is damaged in a checkpoint by what other keepers have. Raises CheckpointError."""
        round_ = round_of(damage.path)
        commit, following, newest = commit_of(round_), commit_of(round_ + 1), self.newest
        meta = None
        if commit is not None and following is not None:  # only needed where the folder no longer says what it is of
            meta = self._meta(commit.block, following.block.model_before.hex(), None)
        size = len(newest[1].manifest()) if newest is not None else None
        await self.checkpoints.repair(damage, fetch, meta=meta, model_manifest_bytes=size)

    def _meta(self, block: Block, model_digest: str, val_loss: float | None) -> CheckpointMeta:
        return CheckpointMeta(
            run=self._charter.run.hex(),
            recipe=self._recipe.name,
            recipe_json=self._genesis.recipe.decode(),
            block=block.hash.hex(),
            model_digest=model_digest,
            global_step=block.global_step,
            val_loss=val_loss,
        )
