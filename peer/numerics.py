"""What the roles are handed from above: the recipe's vector, its models, and the loss on held-out data."""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn

from dugnad.configs.recipe import Recipe, RecipeError
from dugnad.coordinator.messages import MAX_PARTS
from dugnad.coordinator.state import Model
from dugnad.coordinator.tensorfile import Tensors
from dugnad.optim.codec import Int8Codec
from dugnad.optim.layout import Layout
from dugnad.optim.outer import SharedModel, wanted_blobs
from dugnad.optim.plan import assign_parts
from dugnad.peer.data import Corpus
from dugnad.peer.models import build, initial_weights, tensor_shapes
from dugnad.peer.trainer import Trainer, make_optimizer


class Numerics:
    """Everything of one recipe that needs numpy or torch; `coordinator.state.Numerics` in full.

    threads: how many torch may use; two peers that share cores slow each other down a lot with more than one each.
    Raises RecipeError where the codec's settings do not go with the model's.
    """

    def __init__(self, recipe: Recipe, *, threads: int = 1) -> None:
        self.recipe = recipe
        torch.set_num_threads(threads)
        _check_parts(recipe)
        codec = recipe.codec
        self.layout = Layout(tensor_shapes(recipe.model), codec.block_elements, codec.part_elements)
        self._codec = Int8Codec(codec.block_elements)
        self.part_bytes = tuple(self._codec.part_bytes(len(part)) for part in self.layout.parts)
        self.assign_parts = assign_parts

    def check_part(self, payload: bytes | bytearray | memoryview) -> None:
        """Raise CodecError for part bytes that no encoder makes, or with values that no training has."""
        self._codec.check(payload)

    def first_model(self) -> SharedModel:
        """The model before round 1."""
        return SharedModel.initial(self.layout, initial_weights(self.recipe.model))

    def model_of(self, weights: Tensors, momentum: Tensors) -> SharedModel:
        """The model of these tensors. Raises LayoutError where they do not fit the recipe."""
        return SharedModel(self.layout, self.layout.flatten(weights), self.layout.flatten(momentum))

    def wanted(self, manifest: bytes) -> dict[bytes, int]:
        """digest -> bytes of each chunk that a manifest names. Raises ManifestError."""
        return wanted_blobs(self.layout, manifest)

    def model_from(self, manifest: bytes, blob: Callable[[bytes], bytes | memoryview | None]) -> SharedModel:
        """The model of a manifest, from the chunks that `blob` gives by digest. Raises ManifestError."""
        return SharedModel.from_manifest(self.layout, manifest, blob)

    def validation_loss(self, model: Model) -> float:
        """Nats per byte on held-out data."""
        assert isinstance(model, SharedModel)
        return self.trainer.evaluate(model.weights)

    def prepare(self, *, to_train: bool) -> None:
        """See that the corpus is long enough and the optimizer runs here: better at the start than in a round.

        Raises CorpusError, OptimizerError.
        """
        if to_train:
            make_optimizer(self.recipe.inner, nn.Linear(1, 1, device=self._device), torch.device(self._device))
        self._corpus.sample(0, context=self.recipe.model.context)
        assert self.trainer

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The one network of this process, made when it is first needed. Raises CorpusError."""
        return Trainer(self.recipe, build(self.recipe.model), self._corpus, device=self._device)

    @functools.cached_property
    def _corpus(self) -> Corpus:
        return Corpus.load(self.recipe.data)

    @property
    def _device(self) -> str:
        needs_gpu = self.recipe.inner.optimizer == "adamw8bit"
        return "cuda" if needs_gpu and torch.cuda.is_available() else "cpu"


def _check_parts(recipe: Recipe) -> None:
    # before there is a layout, which lists all parts: a stranger's recipe may ask for billions
    block, part = recipe.codec.block_elements, recipe.codec.part_elements
    blocks = sum(-(-math.prod(shape) // block) for _, shape in tensor_shapes(recipe.model))
    parts = -(-blocks * block // part)
    if parts > MAX_PARTS:
        raise RecipeError(
            f"{recipe.name}: codec.part_elements is {part} (with codec.block_elements = {block}), which cuts the model "
            f"into {parts} parts; at most {MAX_PARTS} are allowed: make it at least {-(-blocks // MAX_PARTS) * block}"
        )
