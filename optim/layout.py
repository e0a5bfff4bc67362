"""How a model's tensors lie in one vector: name order, each padded to whole blocks, the vector cut into parts.

Every peer derives the same layout from the recipe, so that a position in the vector means the same parameter
everywhere. No block straddles two tensors, and no part straddles a block.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

Vector = NDArray[np.float32]

BLOCK_MULTIPLE = 64
MAX_DIMENSIONS = 16
_RESERVED_NAME = "__metadata__"  # safetensors keeps this key for itself: a tensor of that name could never be stored
_DOMAIN = "dugnad/layout/1"


class LayoutError(ValueError):
    """Tensors that do not fit the layout, or sizes that make none; the message names the tensor."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies: `start` to `stop` are its values, `stop` to `end` its zero padding."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The order, the padding and the parts of a model's vector.

    tensors: (name, shape) in any order, kept sorted by name. block_elements: a multiple of 64. part_elements: a
    multiple of block_elements. Raises LayoutError for empty, repeated or impossible tensors and sizes.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    block_elements: int
    part_elements: int
    slots: tuple[Slot, ...] = field(init=False, repr=False, compare=False)
    num_elements: int = field(init=False, repr=False, compare=False)
    """Values of the model, without padding."""
    total_elements: int = field(init=False, repr=False, compare=False)
    """Length of the vector, padding included."""
    parts: tuple[range, ...] = field(init=False, repr=False, compare=False)
    """The vector's elements of each part; the last part may be shorter."""

    def __init__(self, tensors: Sequence[tuple[str, Sequence[int]]], block_elements: int, part_elements: int) -> None:
        _check_sizes(block_elements, part_elements)
        # sorted: every peer must lay out the same vector, whatever order its framework lists parameters in
        ordered = tuple(sorted((name, tuple(shape)) for name, shape in tensors))
        slots: list[Slot] = []
        end = 0
        for name, shape in ordered:
            _check_tensor(name, shape, previous=slots[-1].name if slots else None)
            start, size = end, math.prod(shape)
            end = start + -(-size // block_elements) * block_elements
            slots.append(Slot(name, shape, start, start + size, end))
        if not slots:
            raise LayoutError("a layout needs at least one tensor")
        assign = object.__setattr__  # frozen: these are set once, here
        assign(self, "tensors", ordered)
        assign(self, "block_elements", block_elements)
        assign(self, "part_elements", part_elements)
        assign(self, "slots", tuple(slots))
        assign(self, "num_elements", sum(slot.stop - slot.start for slot in slots))
        assign(self, "total_elements", end)
        parts = (range(start, min(start + part_elements, end)) for start in range(0, end, part_elements))
        assign(self, "parts", tuple(parts))

    def digest(self) -> bytes:
        """Return the blake3 digest (32 bytes) of the layout's canonical description."""
        described = [_DOMAIN, self.block_elements, self.part_elements, self.tensors]
        return blake3(msgspec.msgpack.encode(described)).digest()

    def flatten(self, tensors: Mapping[str, NDArray[np.float32]]) -> Vector:
        """Return a new vector, float32 (total_elements,), of `tensors`, padding zero.

        Raises LayoutError unless names, shapes and dtypes are exactly the layout's.
        """
        missing = [slot.name for slot in self.slots if slot.name not in tensors]
        if missing or len(tensors) != len(self.slots):
            foreign = sorted(tensors.keys() - {slot.name for slot in self.slots})
            raise LayoutError(f"tensors do not fit the layout: missing {missing[:5]}, not in it {foreign[:5]}")
        vector = np.empty(self.total_elements, np.float32)
        for slot in self.slots:
            tensor = tensors[slot.name]
            if tensor.dtype != np.float32 or tensor.shape != slot.shape:
                found = f"{tensor.dtype} {tensor.shape}"
                raise LayoutError(f"tensor {slot.name!r} is {found}, the layout has float32 {slot.shape}")
            vector[slot.start : slot.stop].reshape(slot.shape)[...] = tensor
            vector[slot.stop : slot.end] = 0
        return vector

    def unflatten(self, vector: Vector) -> dict[str, NDArray[np.float32]]:
        """Return each tensor as a view into `vector`, float32 (total_elements,), contiguous. Raises LayoutError."""
        self.check_vector(vector)
        return {slot.name: vector[slot.start : slot.stop].reshape(slot.shape) for slot in self.slots}

    def clear_padding(self, vector: Vector) -> None:
        """Set the padding of `vector`, float32 (total_elements,), to zero, in place."""
        self.check_vector(vector)
        for slot in self.slots:
            vector[slot.stop : slot.end] = 0

    def check_vector(self, vector: Vector) -> None:
        """Raise LayoutError unless `vector` is contiguous float32 (total_elements,)."""
        if vector.dtype != np.float32 or vector.shape != (self.total_elements,) or not vector.flags.c_contiguous:
            raise LayoutError(
                f"vector is {vector.dtype} {vector.shape}, the layout needs contiguous float32 ({self.total_elements},)"
            )


def _check_sizes(block_elements: int, part_elements: int) -> None:
    if block_elements < BLOCK_MULTIPLE or block_elements % BLOCK_MULTIPLE:
        raise LayoutError(f"block_elements is {block_elements}, it must be a multiple of {BLOCK_MULTIPLE}")
    if part_elements < block_elements or part_elements % block_elements:
        raise LayoutError(f"part_elements is {part_elements}, it must be a multiple of {block_elements}")


def _check_tensor(name: str, shape: tuple[int, ...], *, previous: str | None) -> None:
    if not name or name == _RESERVED_NAME:
        raise LayoutError(f"{name!r} cannot be the name of a tensor")
    if name == previous:
        raise LayoutError(f"tensor {name!r} is listed twice")
    if len(shape) > MAX_DIMENSIONS or any(size < 1 for size in shape):
        raise LayoutError(f"tensor {name!r} has shape {shape}: at most {MAX_DIMENSIONS} axes, each 1 or more")
