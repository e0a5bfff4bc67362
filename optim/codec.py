"""Int8 codes in blocks, scaled by each block's largest magnitude; and the weighted mean of vectors coded so.

A payload of n values in blocks of b is n / b scales (bfloat16, little-endian), then n codes (int8). For a block:

    scale = largest magnitude / 127, in float32, rounded to the nearest bfloat16 (half to even)
    code  = x / scale, in float32, rounded to the nearest integer (half to even), clamped to +-127
    x'    = code * scale

A block whose largest magnitude is below 2^-100 is all zero. Three properties that the rest stands on:

- x' is exact in float32 (7 bits times 8), so decoding cannot differ between machines.
- |x - x'| <= scale / 2, exactly: the quotient is a true division. Multiplying by 1 / scale breaks this at ties.
- Encoding what was decoded gives the same payload, so a mean of one contributor is that contributor's bytes. (But a
  block within one part in 128 of the 2^-100 limit may turn to zero.)

Each kernel exists twice, as a plain loop that numba compiles and in numpy; both give the same bits on every machine:
no fast-math, no fused multiply-add, and a sum is folded in the order given.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dugnad.optim.layout import BLOCK_MULTIPLE, Vector

Payload = bytes | bytearray | memoryview
Backend = Literal["auto", "numba", "numpy"]

SCALE_BYTES = 2
MAX_CODE = 127

# Elements worked on at once: the accumulator (128 KiB) and its codes stay in a core's own cache.
_CHUNK_ELEMENTS = 32768

# The bit patterns of float32 magnitudes order like the magnitudes, and integer maxima vectorize without fast-math.
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_ZERO_BELOW = np.uint32((127 - 100) << 23)  # 2^-100
_SMALLEST_SCALE = 0x0A01  # what 2^-100 / 127 rounds to
_LARGEST_SCALE = 0x7C01  # what the largest float32 / 127 rounds to; 127 times this is still finite
_CODE_LIMIT = np.float32(MAX_CODE)
_ROUNDER = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, half to even

MAX_CHANGE = 2.0**20
"""How far a weight may move in a round: sums of such values, and the momentum of them, are far from overflowing."""

_log = logging.getLogger(__name__)


class CodecError(ValueError):
    """A payload that no encoder makes: its size, a scale or a code is wrong; whoever sent it is at fault."""


class NonFinite(ValueError):
    """Values with NaN or infinity where only finite ones can go on."""


class _Kernels(Protocol):
    """Two loops over whole blocks; scales as bfloat16 bit patterns, uint16 (n / block,); codes int8 (n,)."""

    def encode(
        self, x: Vector, scales: NDArray[np.uint16], codes: NDArray[np.int8], block: int
    ) -> int: ...  # -1, or the block that holds a value that is not finite

    def accumulate(
        self, acc: Vector, scales: NDArray[np.uint16], codes: NDArray[np.int8], weight: np.float32, block: int
    ) -> None: ...


@dataclass(frozen=True)
class Int8Codec:
    """Codes float32 vectors in blocks of `block_elements` (a multiple of 64); a vector must be whole blocks.

    backend: "auto" compiles with numba where it can be imported, and falls back to numpy. Safe to use from several
    threads; compiled kernels release the interpreter lock.
    """

    block_elements: int
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.block_elements < BLOCK_MULTIPLE or self.block_elements % BLOCK_MULTIPLE:
            raise ValueError(f"block_elements is {self.block_elements}, it must be a multiple of {BLOCK_MULTIPLE}")

    def part_bytes(self, n_elements: int) -> int:
        """Return the bytes of a payload of `n_elements` values."""
        return n_elements + self._num_blocks(n_elements) * SCALE_BYTES

    def encode(self, x: Vector, out: bytearray | memoryview | None = None) -> memoryview:
        """Return the payload of `x`, float32 (n,), written into `out` (part_bytes(n) long) where given.

        Raises NonFinite if x holds NaN or infinity; what `out` holds is then undefined.
        """
        payload = memoryview(bytearray(self.part_bytes(x.size)) if out is None else out)
        self._encode_into(x, *self._split(payload, x.size))
        return payload

    def decode(self, payload: Payload, n_elements: int) -> Vector:
        """Return the values of `payload`, float32 (n_elements,). Raises CodecError if its size is wrong."""
        acc = np.zeros(n_elements, np.float32)
        self.accumulate(acc, payload, 1.0)
        return acc

    def accumulate(self, acc: Vector, payload: Payload, weight: float) -> None:
        """Add `weight`, rounded to float32, times the values of `payload` to `acc`, float32 (n,), in place.

        Product and sum are rounded separately. Raises CodecError if the payload's size is wrong.
        """
        _check_array(acc)
        scales, codes = self._split(payload, acc.size)
        self._kernels.accumulate(acc, scales, codes, np.float32(weight), self.block_elements)

    def fold(self, payloads: Sequence[Payload], weights: Sequence[int], n_elements: int) -> memoryview:
        """Return the payload of the mean of `payloads`, each of `n_elements` values, weighted by `weights` (tokens).

        The mean is the float32 sum, from zero and in the order given (peer-id order, for the same bits everywhere),
        of share_i * x_i. share_i = weight_i / sum(weights) is computed from integers, rounded once to float64 and
        once to float32: one contributor has share 1 and gets its own payload back. Raises CodecError for a payload of
        a wrong size, NonFinite if the sum leaves float32's range, ValueError for weights that are not positive.
        """
        if not payloads or len(payloads) != len(weights) or min(weights) <= 0:
            raise ValueError(f"{len(payloads)} payloads cannot be folded with weights {list(weights)}")
        total = sum(weights)
        shares = [np.float32(weight / total) for weight in weights]
        sources = [self._split(payload, n_elements) for payload in payloads]
        folded = memoryview(bytearray(self.part_bytes(n_elements)))
        scales, codes = self._split(folded, n_elements)
        # Chunk by chunk, so that the sum never leaves the cache between the first contributor and the encoder.
        step = max(_CHUNK_ELEMENTS // self.block_elements, 1)
        acc = np.empty(step * self.block_elements, np.float32)
        for first in range(0, scales.size, step):
            blocks = slice(first, first + step)
            values = slice(first * self.block_elements, (first + step) * self.block_elements)
            chunk = acc[: codes[values].size]
            chunk[:] = 0
            for share, (scales_i, codes_i) in zip(shares, sources, strict=True):
                self._kernels.accumulate(chunk, scales_i[blocks], codes_i[values], share, self.block_elements)
            self._encode_into(chunk, scales[blocks], codes[values])
        return folded

    def check_scales(self, payload: Payload) -> None:
        """Raise CodecError unless `payload` is one that encode could make: on receipt, before it counts.

        Every scale must be zero or between the smallest and the largest that encode makes, and no code -128: then
        every decoded value is finite.
        """
        num_blocks, rest = divmod(len(payload), self.block_elements + SCALE_BYTES)
        if rest:
            raise CodecError(f"{len(payload)} bytes are not whole blocks of {self.block_elements} values")
        scales, codes = self._split(payload, num_blocks * self.block_elements)
        wrong = (scales != 0) & ((scales < _SMALLEST_SCALE) | (scales > _LARGEST_SCALE))
        if wrong.any():
            block = int(np.argmax(wrong))
            raise CodecError(f"block {block} has scale 0x{scales[block]:04x}, which no encoder makes")
        if codes.size and codes.min() < -MAX_CODE:
            raise CodecError(f"value {int(np.argmin(codes))} has code -128, which no encoder makes")

    def check(self, payload: Payload) -> None:
        """Raise CodecError unless encode could make `payload`, and no value in it can exceed MAX_CHANGE."""
        self.check_scales(payload)
        num_blocks = len(payload) // (self.block_elements + SCALE_BYTES)
        scales = _float32_scales(self._split(payload, num_blocks * self.block_elements)[0])
        largest = float(scales.max(initial=0.0)) * MAX_CODE
        if largest > MAX_CHANGE:
            raise CodecError(
                f"it changes weights by up to {largest:.3g}, and no training does by over {MAX_CHANGE:.3g}"
            )

    @functools.cached_property
    def _kernels(self) -> _Kernels:
        return _load_kernels(self.backend)

    def _num_blocks(self, n_elements: int) -> int:
        num_blocks, rest = divmod(n_elements, self.block_elements)
        if rest:
            raise ValueError(f"{n_elements} values are not whole blocks of {self.block_elements}")
        return num_blocks

    def _split(self, payload: Payload, n_elements: int) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
        num_blocks = self._num_blocks(n_elements)
        expected = self.part_bytes(n_elements)
        if len(payload) != expected:
            raise CodecError(f"payload has {len(payload)} bytes, {n_elements} values take {expected}")
        scales = np.frombuffer(payload, "<u2", count=num_blocks)
        return scales, np.frombuffer(payload, np.int8, offset=num_blocks * SCALE_BYTES)

    def _encode_into(self, x: Vector, scales: NDArray[np.uint16], codes: NDArray[np.int8]) -> None:
        _check_array(x)
        bad = self._kernels.encode(x, scales, codes, self.block_elements)
        if bad >= 0:
            raise NonFinite(f"block {bad} (values from {bad * self.block_elements}) holds NaN or infinity")


def _check_array(x: Vector) -> None:
    if x.dtype != np.float32 or x.ndim != 1 or not x.flags.c_contiguous:
        raise ValueError(f"expected a contiguous float32 vector, got {x.dtype} {x.shape}")


@functools.cache
def _load_kernels(backend: Backend) -> _Kernels:
    if backend == "numpy":
        return _NumpyKernels()
    try:
        return _NumbaKernels()
    except ImportError as error:
        if backend == "numba":
            raise
        _log.warning("numba cannot be imported (%s): the codec runs in numpy, several times slower", error)
        return _NumpyKernels()


class _NumpyKernels:
    """The kernels in numpy: the fallback, and the oracle of the compiled ones."""

    def encode(self, x: Vector, scales: NDArray[np.uint16], codes: NDArray[np.int8], block: int) -> int:
        x_NB = x.reshape(-1, block)  # N blocks of B values
        codes_NB = codes.reshape(-1, block)
        step = max(_CHUNK_ELEMENTS // block, 1)
        for first in range(0, len(x_NB), step):
            rows = slice(first, first + step)
            top = (x_NB[rows].view(np.uint32) & _MAGNITUDE).max(axis=1)
            if (top >= _INFINITY).any():
                return first + int(np.argmax(top >= _INFINITY))
            bits = (top.view(np.float32) / _CODE_LIMIT).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            zero = top < _ZERO_BELOW
            scales[rows] = np.where(zero, np.uint32(0), rounded)
            divisor = np.where(zero, np.float32(1), _float32_scales(scales[rows]))
            quotient = x_NB[rows] / divisor[:, None]
            quotient[zero] = 0
            codes_NB[rows] = np.clip(np.rint(quotient), -_CODE_LIMIT, _CODE_LIMIT).astype(np.int8)
        return -1

    def accumulate(
        self, acc: Vector, scales: NDArray[np.uint16], codes: NDArray[np.int8], weight: np.float32, block: int
    ) -> None:
        acc_NB = acc.reshape(-1, block)
        codes_NB = codes.reshape(-1, block)
        scales_N = _float32_scales(scales)
        step = max(_CHUNK_ELEMENTS // block, 1)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found by the encoder, by its bits
            for first in range(0, len(acc_NB), step):
                rows = slice(first, first + step)
                acc_NB[rows] += weight * (codes_NB[rows].astype(np.float32) * scales_N[rows, None])


class _NumbaKernels:
    """The kernels compiled; the first use compiles for a second or two, later processes read numba's cache."""

    def __init__(self) -> None:
        self._encode = _compile(_encode_loop)
        self._accumulate = _compile(_accumulate_loop)

    def encode(self, x: Vector, scales: NDArray[np.uint16], codes: NDArray[np.int8], block: int) -> int:
        return int(self._encode(_fixed(x), _fixed(x).view(np.uint32), scales, codes, block))

    def accumulate(
        self, acc: Vector, scales: NDArray[np.uint16], codes: NDArray[np.int8], weight: np.float32, block: int
    ) -> None:
        self._accumulate(acc, _fixed(_float32_scales(scales)), _fixed(codes), weight, block)


def _compile(loop: Callable[..., Any]) -> Callable[..., Any]:
    import numba  # here: it takes half a second to import, and numpy does without it

    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(loop)
    except RuntimeError:  # no folder that numba may write its cache into: compile at each start
        return numba.njit(nogil=True, error_model="numpy")(loop)


def _fixed(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view: numba compiles once more for each kind of array it is given."""
    view = array.view()
    view.flags.writeable = False
    return view


def _float32_scales(scales: NDArray[np.uint16]) -> Vector:
    return (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _encode_loop(
    x: Vector, bits: NDArray[np.uint32], scales: NDArray[np.uint16], codes: NDArray[np.int8], block: int
) -> int:
    for index in range(scales.size):
        start = index * block
        block_bits = bits[start : start + block]
        block_codes = codes[start : start + block]
        top = np.uint32(0)
        for i in range(block):
            top = max(top, np.uint32(block_bits[i] & _MAGNITUDE))
        if top >= _INFINITY:
            return index
        if top < _ZERO_BELOW:
            scales[index] = 0
            block_codes[:] = 0
            continue
        # each name assigned once, and cast back: numba widens integer results, and views only single assignments
        largest = np.uint32(top)
        ratio = np.float32(largest.view(np.float32) / _CODE_LIMIT)
        ratio_bits = np.uint32(ratio.view(np.uint32))
        scale_bits = (ratio_bits + np.uint32(0x7FFF) + ((ratio_bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        scales[index] = scale_bits
        shifted = np.uint32(scale_bits << np.uint32(16))
        scale = shifted.view(np.float32)
        block_x = x[start : start + block]
        for i in range(block):
            rounded = (block_x[i] / scale + _ROUNDER) - _ROUNDER
            block_codes[i] = np.int8(min(max(rounded, -_CODE_LIMIT), _CODE_LIMIT))
    return -1


def _accumulate_loop(acc: Vector, scales: Vector, codes: NDArray[np.int8], weight: np.float32, block: int) -> None:
    for index in range(scales.size):
        start = index * block
        block_acc = acc[start : start + block]
        block_codes = codes[start : start + block]
        scale = scales[index]
        for i in range(block):
            block_acc[i] += weight * (np.float32(block_codes[i]) * scale)
