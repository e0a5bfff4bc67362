"""The outer step in plain numpy, and the model that everyone shares: weights and momentum with one digest.

Everyone applies the same committed bytes to the same model and must reach the same bits. So each product, sum and
difference is a numpy call of its own, rounded to float32, in one fixed order: a fused multiply-add, or an optimizer
of a framework, differs between vector instruction sets.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dugnad.configs.recipe import OuterSettings
from dugnad.dht.manifest import Manifest, ManifestError, TensorEntry, chunks_of, digests_of, parse_manifest
from dugnad.optim.codec import Int8Codec, NonFinite, Payload
from dugnad.optim.layout import Layout, Vector

_DTYPE = "float32"
_GROUPS = ("momentum", "weights")  # in name order, as the manifest is
_CHUNK_ELEMENTS = 32768  # 128 KiB of each vector at once, so that what lies between two operations stays in the cache

Blob = Callable[[bytes], bytes | bytearray | memoryview | None]
"""The bytes under a digest, where they are here."""


def outer_step(
    theta: Vector, momentum: Vector, delta: Vector, *, lr: float, momentum_factor: float
) -> tuple[Vector, Vector]:
    """Return (theta', momentum') after one Nesterov step along `delta`, the mean of theta - theta_i.

    All float32 (n,), the results new: m' = mu * m + d; theta' = theta - lr * (d + mu * m'). After DiLoCo
    (arXiv:2311.08105). Raises NonFinite if a result is not finite.
    """
    _check_same_shape(theta, momentum, delta)
    rate, factor = np.float32(lr), np.float32(momentum_factor)
    new_theta, new_momentum = np.empty_like(theta), np.empty_like(momentum)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, theta.size, _CHUNK_ELEMENTS):
            at = slice(start, start + _CHUNK_ELEMENTS)
            d, m, t = delta[at], new_momentum[at], new_theta[at]
            np.multiply(momentum[at], factor, out=m)
            np.add(m, d, out=m)
            np.multiply(m, factor, out=t)
            np.add(d, t, out=t)
            np.multiply(t, rate, out=t)
            np.subtract(theta[at], t, out=t)
            _check_finite(m, t)
    return new_theta, new_momentum


def plain_step(theta: Vector, delta: Vector) -> Vector:
    """Return theta - delta, float32 (n,), new: the mean of everyone's weights. Raises NonFinite."""
    _check_same_shape(theta, delta)
    with np.errstate(over="ignore", invalid="ignore"):
        new_theta = np.subtract(theta, delta)
    _check_finite(new_theta)
    return new_theta


class SharedModel:
    """Weights and outer momentum as two read-only vectors, float32 (total_elements,), padding zero.

    Never changed in place: a snapshot is a reference. Raises LayoutError if a vector does not fit the layout.
    """

    def __init__(self, layout: Layout, weights: Vector, momentum: Vector) -> None:
        layout.check_vector(weights)
        layout.check_vector(momentum)
        self.layout = layout
        self.weights = _read_only(weights)
        self.momentum = _read_only(momentum)

    @classmethod
    def initial(cls, layout: Layout, weights: Mapping[str, NDArray[np.float32]]) -> "SharedModel":
        """Return the model of the tensors `weights` with momentum zero. Raises LayoutError."""
        return cls(layout, layout.flatten(weights), np.zeros(layout.total_elements, np.float32))

    def apply(self, payloads: Sequence[Payload], outer: OuterSettings, *, global_step: int) -> "SharedModel":
        """Return the model after a round that began at `global_step`; `payloads` are the folded parts, in order.

        Raises ValueError for a wrong number of parts, CodecError for a wrong size, NonFinite for a result that is
        not finite; this model stays as it is.
        """
        layout = self.layout
        if len(payloads) != len(layout.parts):
            raise ValueError(f"{len(payloads)} parts given, the layout has {len(layout.parts)}")
        codec = Int8Codec(layout.block_elements)
        delta = np.zeros(layout.total_elements, np.float32)
        for part, payload in zip(layout.parts, payloads, strict=True):
            codec.accumulate(delta[part.start : part.stop], payload, 1.0)
        # padding is not in the digest: values that a contributor put there must not stay in some replicas
        layout.clear_padding(delta)
        if global_step < outer.plain_until_step:
            return SharedModel(layout, plain_step(self.weights, delta), self.momentum)
        stepped = outer_step(self.weights, self.momentum, delta, lr=outer.lr, momentum_factor=outer.momentum)
        return SharedModel(layout, *stepped)

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Return views of every tensor, named "momentum/<name>" and "weights/<name>"."""
        return {
            f"{group}/{name}": tensor
            for group, vector in zip(_GROUPS, (self.momentum, self.weights), strict=True)
            for name, tensor in self.layout.unflatten(vector).items()
        }

    def manifest(self) -> bytes:
        """Return the canonical description that digest() hashes: every tensor, and the hashes of its chunks."""
        return self._encoded[0]

    def digest(self) -> bytes:
        """Return the model digest: blake3 (32 bytes) of the manifest."""
        return self._encoded[1]

    def blob(self, digest: bytes) -> memoryview | None:
        """Return the bytes with that blake3, a chunk of the model (little-endian float32) or its manifest, or None."""
        manifest, own = self._encoded
        return memoryview(manifest) if digest == own else self._chunks.get(digest)

    @classmethod
    def from_manifest(cls, layout: Layout, manifest: bytes, blob: Blob) -> "SharedModel":
        """Return the model that `manifest` describes, of the chunks that `blob` gives, one by one; each is verified.

        Raises ManifestError, which names the tensor, if anything does not fit the layout, is missing or is corrupt.
        """
        described = _parse(layout, manifest)
        vectors = {group: np.zeros(layout.total_elements, np.float32) for group in _GROUPS}
        tensors = [tensor for group in _GROUPS for tensor in layout.unflatten(vectors[group]).values()]
        for entry, tensor in zip(described.entries, tensors, strict=True):
            _fill(tensor.reshape(-1), entry, blob)
        model = cls(layout, vectors["weights"], vectors["momentum"])
        model._described = described  # every chunk was hashed just now
        return model

    @functools.cached_property
    def _described(self) -> Manifest:
        return Manifest.of(
            tuple(
                TensorEntry(name, _DTYPE, tensor.shape, digests_of(_raw(tensor)))
                for name, tensor in self.tensors().items()
            )
        )

    @functools.cached_property
    def _encoded(self) -> tuple[bytes, bytes]:
        manifest = self._described.encode()
        return manifest, blake3(manifest).digest()

    @functools.cached_property
    def _chunks(self) -> dict[bytes, memoryview]:
        return {
            digest: chunk
            for entry, tensor in zip(self._described.entries, self.tensors().values(), strict=True)
            for digest, chunk in zip(entry.chunks, chunks_of(_raw(tensor)), strict=True)
        }


def wanted_blobs(layout: Layout, manifest: bytes) -> dict[bytes, int]:
    """Return blake3 -> size in bytes of each chunk of the model that `manifest` describes. Raises ManifestError."""
    return _parse(layout, manifest).sizes()


def manifest_bytes(layout: Layout) -> int:
    """Return how long the manifest of every model of this layout is: nothing in it is open but the digests."""
    return len(_blank(layout).encode())


def _blank(layout: Layout) -> Manifest:
    """The manifest of a model of this layout, all digests zero."""
    shapes = [(f"{group}/{name}", shape) for group in _GROUPS for name, shape in layout.tensors]
    return Manifest.of(tuple(TensorEntry.blank(name, _DTYPE, shape) for name, shape in shapes))


def _parse(layout: Layout, manifest: bytes) -> Manifest:
    """The manifest of a model of this layout, from anyone. Raises ManifestError."""
    blank = _blank(layout)
    expected = len(blank.encode())
    if len(manifest) != expected:  # before anything is parsed: many small tensors would take much memory
        raise ManifestError(f"manifest has {len(manifest)} bytes, one of this layout has {expected}")
    parsed = parse_manifest(manifest)
    if len(parsed.entries) != len(blank.entries):
        raise ManifestError(f"manifest lists {len(parsed.entries)} tensors, the layout has {len(blank.entries)}")
    for entry, own in zip(parsed.entries, blank.entries, strict=True):
        if (entry.name, entry.dtype, entry.shape) != (own.name, own.dtype, own.shape):
            found = f"{entry.name!r} {entry.dtype} {entry.shape}"
            raise ManifestError(f"manifest lists {found}, the layout has {own.name!r} {own.dtype} {own.shape}")
    return parsed


def _fill(values: Vector, entry: TensorEntry, blob: Blob) -> None:
    """Set `values`, all of one tensor, from its chunks. Raises ManifestError."""
    start = 0
    for digest, size in entry.sizes():
        data = blob(digest)
        if data is None:
            raise ManifestError(f"tensor {entry.name!r} is missing: no bytes under {digest.hex()}")
        if len(data) != size:
            raise ManifestError(f"tensor {entry.name!r} has a chunk of {len(data)} bytes, not {size}")
        if blake3(data).digest() != digest:
            raise ManifestError(f"tensor {entry.name!r} is corrupt: its bytes are not those of {digest.hex()}")
        stop = start + size // 4
        values[start:stop] = np.frombuffer(data, "<f4")
        start = stop


def _raw(tensor: NDArray[np.float32]) -> memoryview:
    return np.ascontiguousarray(tensor, "<f4").reshape(-1).data.cast("B")


def _read_only(vector: Vector) -> Vector:
    view = vector.view()
    view.flags.writeable = False
    return view


def _check_same_shape(*vectors: Vector) -> None:
    for vector in vectors:
        if vector.dtype != np.float32 or vector.ndim != 1 or vector.shape != vectors[0].shape:
            found = ", ".join(f"{vector.dtype} {vector.shape}" for vector in vectors)
            raise ValueError(f"the outer step needs float32 vectors of one length, got {found}")


def _check_finite(*vectors: Vector) -> None:
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise NonFinite("the outer step makes weights or momentum that are not finite")
