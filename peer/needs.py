"""What a run asks of a volunteer's machine, reckoned from its recipe before anything is made."""

import math
from dataclasses import dataclass

from dugnad.configs.recipe import Recipe
from dugnad.coordinator.averages import KEPT_ROUNDS
from dugnad.coordinator.state import KEPT_MODELS

PROCESS_BYTES = 700 * 2**20
"""Python with torch, numba and the network daemon, with a model of no size; measured: 600 MiB."""
FOLDER_BYTES = 64 * 2**20
"""Chain, log, and what else does not grow with the model."""
_STATE = 8
"""Bytes per parameter of a shared model: weights and outer momentum, fp32."""
_TRAINER = {"adamw": 16, "adamw8bit": 10}
"""Bytes per parameter of the network, its gradient and the optimizer's moments."""
_EXCHANGE = 17
"""Bytes per parameter in an exchange: the change, its codes, the averages, and a model while it is applied."""
_BLOCK_FLOATS = 20
"""What one transformer block keeps of one token for the backward pass, in widths."""
_LOGITS_FLOATS = 3 * 256


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of memory and of disk; `recipe`: the name of what they were reckoned from, "" for what every run needs."""

    memory_bytes: int = PROCESS_BYTES
    disk_bytes: int = FOLDER_BYTES
    recipe: str = ""
    gpu: bool = False
    """Whether its optimizer runs on an NVIDIA GPU only."""

    @classmethod
    def of(cls, recipe: Recipe, num_parameters: int) -> "Needs":
        """What a volunteer in a run of `recipe` needs, from above: a model of 19 million took 1.7 GB, this says 2.1."""
        per_parameter = KEPT_MODELS * _STATE + _TRAINER[recipe.inner.optimizer] + _EXCHANGE
        memory = PROCESS_BYTES + num_parameters * per_parameter + _activation_bytes(recipe)
        per_parameter_on_disk = (recipe.checkpoints.keep + 2) * _STATE + KEPT_ROUNDS  # one in the making, one coming in
        disk = FOLDER_BYTES + num_parameters * per_parameter_on_disk
        return cls(memory, disk, recipe.name, recipe.inner.optimizer == "adamw8bit")


def _activation_bytes(recipe: Recipe) -> int:
    model = recipe.model
    tokens = recipe.inner.batch_sequences * model.context
    return 4 * tokens * (model.layers * model.width * _BLOCK_FLOATS + _LOGITS_FLOATS)


def needs_of(recipe: Recipe) -> Needs:
    """`Needs.of`, with the parameters counted; imports torch."""
    from dugnad.peer.models import tensor_shapes

    return Needs.of(recipe, sum(math.prod(shape) for _, shape in tensor_shapes(recipe.model)))
