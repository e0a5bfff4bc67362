"""Text from a checkpoint."""

from pathlib import Path

import torch

from dugnad.configs.recipe import decode
from dugnad.coordinator.checkpoint import MANIFEST
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.damage import CheckpointError
from dugnad.optim.diloco import load_weights
from dugnad.peer.folder import FolderError
from dugnad.peer.models import build, generate
from dugnad.peer.numerics import Numerics


def write(source: Path, prompt: str, length: int, *, temperature: float, top_k: int, seed: int) -> str:
    """`prompt`, and `length` bytes that the model in `source` writes after it.

    source: a checkpoint's folder, or one that holds `checkpoints/`. Raises FolderError if there is none, and
    CheckpointError if it is damaged.
    """
    if not source.is_dir():
        raise FolderError(f"{source}: there is no such folder.")
    checkpoints = Checkpoints(source / "checkpoints", keep=1)
    path = source if (source / MANIFEST).exists() else checkpoints.latest()
    if path is None:
        raise FolderError(f"{source}: there is no checkpoint here. Name a folder like DIR/checkpoints/round-000005.")
    saved = checkpoints.load(path)
    recipe = decode(saved.meta.recipe_json.encode())
    numerics = Numerics(recipe)
    try:
        model = numerics.model_of(saved.weights, saved.momentum)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit its own recipe: {error}") from error
    network = build(recipe.model)
    load_weights(network, numerics.layout, model.weights)
    with torch.inference_mode():
        written = generate(network, prompt.encode(), length, temperature=temperature, top_k=top_k, seed=seed)
    return prompt + written.decode("utf-8", errors="replace")
