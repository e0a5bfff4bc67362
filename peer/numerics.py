"""What the roles are handed from above: the recipe's vector, its models, and the loss on held-out data."""

import functools

import torch

from dugnad.configs.recipe import Recipe
from dugnad.coordinator.checkpoints import Tensors
from dugnad.coordinator.messages import MAX_PARTS
from dugnad.coordinator.shell import Model
from dugnad.optim.codec import Int8Codec
from dugnad.optim.layout import Layout, LayoutError
from dugnad.optim.outer import SharedModel
from dugnad.optim.plan import assign_parts
from dugnad.peer.data import Corpus
from dugnad.peer.models import build, initial_weights, tensor_shapes
from dugnad.peer.trainer import Trainer


class Numerics:
    """Everything of one recipe that needs numpy or torch; `coordinator.service.Numerics` in full.

    threads: how many torch may use; two peers that share cores slow each other down a lot with more than one each.
    """

    def __init__(self, recipe: Recipe, *, threads: int = 1) -> None:
        self.recipe = recipe
        torch.set_num_threads(threads)
        codec = recipe.codec
        self.layout = Layout(tensor_shapes(recipe.model), codec.block_elements, codec.part_elements)
        if len(self.layout.parts) > MAX_PARTS:
            raise LayoutError(
                f"codec.part_elements is {codec.part_elements}: that cuts the model into {len(self.layout.parts)} "
                f"parts, at most {MAX_PARTS} are allowed. Make it larger."
            )
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

    def validation_loss(self, model: Model) -> float:
        """Nats per token on held-out data."""
        assert isinstance(model, SharedModel)
        return self.trainer.evaluate(model.weights)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The one network of this process, made when it is first needed."""
        return Trainer(self.recipe, build(self.recipe.model), Corpus.load(self.recipe.data))
