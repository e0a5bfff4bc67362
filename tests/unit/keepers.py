"""Keepers of checkpoints for tests: what they save, and how one asks another for what it lacks."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from blake3 import blake3

from dugnad.coordinator.checkpoint import CheckpointMeta, manifest_of
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.shell import KeySigner
from dugnad.coordinator.tensorfile import Tensors
from dugnad.dht.bulk import OnBlob, Unavailable
from dugnad.dht.identity import Identity

ANN, BOB = (KeySigner(Identity.from_seed(bytes([number]) * 32)) for number in (1, 2))
WIDE = 2**18 + 5
"""Elements of a tensor of more than one chunk."""


def model(seed: int, *, wide: bool = False) -> Tensors:
    """A small model; with a `wide` tensor it is of several chunks, two of them equal."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed": (5, 3), "bias": (7,), "scale": ()}
    tensors = {
        f"{group}/{name}": rng.standard_normal(shape).astype(np.float32)
        for group in ("weights", "momentum")
        for name, shape in shapes.items()
    }
    if wide:
        tensors["weights/wide"] = rng.standard_normal(WIDE).astype(np.float32)
        tensors["momentum/wide"] = np.zeros(2 * 2**18, np.float32)
    return tensors


def group(tensors: Tensors, name: str) -> Tensors:
    """The weights or the momentum among the tensors, by their own names."""
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def meta_of(tensors: Tensors) -> CheckpointMeta:
    """What a checkpoint of these tensors says that it is of."""
    return CheckpointMeta(
        run="ab" * 32,
        recipe="tiny",
        recipe_json="{}",
        block="cd" * 32,
        model_digest=blake3(manifest_of(tensors).encode()).hexdigest(),
        global_step=600,
        val_loss=None,
    )


def save(kept: Checkpoints, round_: int, tensors: Tensors | None = None) -> Path:
    """Save a round's checkpoint, of a model of its own if none is given."""
    chosen = model(round_) if tensors is None else tensors
    return kept.save(round_, chosen, meta=meta_of(chosen))


def same(one: Tensors, other: Tensors) -> bool:
    """Whether both have the same tensors."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def content(folder: Path) -> dict[str, bytes]:
    """Every file under the folder, by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Asking:
    """A `Fetch` from another keeper, which notes what it was asked for."""

    def __init__(self, holder: Checkpoints) -> None:
        self.holder = holder
        self.asked: dict[bytes, int] = {}

    async def __call__(self, wanted: Mapping[bytes, int], on_blob: OnBlob) -> None:
        """Get what is wanted, one after the other."""
        for digest, size in wanted.items():
            self.asked[digest] = size
            data = self.holder.lookup(digest)
            if data is None or len(data) != size:
                raise Unavailable("1 of 1 blobs can't be had: no donor is left")
            await asyncio.to_thread(on_blob, digest, memoryview(data))


async def nobody(wanted: Mapping[bytes, int], on_blob: OnBlob) -> None:
    """A `Fetch` of one who knows no other keeper."""
    raise Unavailable(f"{len(wanted)} of {len(wanted)} blobs can't be had: there is nobody to ask")
