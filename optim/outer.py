"""The outer step in plain numpy, and the model that everyone shares: weights and momentum with one digest.

Everyone applies the same committed bytes to the same model and must reach the same bits. So each product, sum and
difference is a numpy call of its own, rounded to float32, in one fixed order: a fused multiply-add, or an optimizer
of a framework, differs between vector instruction sets.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dugnad.configs.recipe import OuterSettings
from dugnad.optim.codec import Int8Codec, NonFinite, Payload
from dugnad.optim.layout import Layout, Vector

DIGEST_BYTES = 32
_DOMAIN = "dugnad/model/1"
_DTYPE = "float32"
_GROUPS = ("momentum", "weights")  # in name order, as the manifest is
_CHUNK_ELEMENTS = 32768  # 128 KiB of each vector at once, so that what lies between two operations stays in the cache


class ManifestError(ValueError):
    """A description of a model, or bytes under it, that do not fit the layout; whoever sent them is at fault."""


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
        """Return the canonical description that digest() hashes: (name, dtype, shape, blake3) of every tensor."""
        return _encode_manifest(self.layout, self._digests)

    def digest(self) -> bytes:
        """Return the model digest: blake3 (32 bytes) of the manifest."""
        return blake3(self.manifest()).digest()

    def blob(self, digest: bytes) -> memoryview | None:
        """Return the bytes of the tensor with that blake3 digest, little-endian float32, or None."""
        tensor = self._by_digest.get(digest)
        return None if tensor is None else _raw(tensor)

    @classmethod
    def from_manifest(
        cls, layout: Layout, manifest: bytes, blobs: Mapping[bytes, bytes | bytearray | memoryview]
    ) -> "SharedModel":
        """Return the model that `manifest` describes, of the bytes in `blobs` by blake3; each is verified.

        Raises ManifestError, which names the tensor, if anything does not fit the layout, is missing or is corrupt.
        """
        digests = _parse_manifest(layout, manifest)
        vectors = {group: np.zeros(layout.total_elements, np.float32) for group in _GROUPS}
        targets = [tensor for group in _GROUPS for tensor in layout.unflatten(vectors[group]).values()]
        for (name, shape), digest, target in zip(_described(layout), digests, targets, strict=True):
            blob, expected = blobs.get(digest), 4 * math.prod(shape)
            if blob is None:
                raise ManifestError(f"tensor {name!r} is missing: no bytes under {digest.hex()}")
            if len(blob) != expected:
                raise ManifestError(f"tensor {name!r} has {len(blob)} bytes, float32 {shape} takes {expected}")
            if blake3(blob).digest() != digest:
                raise ManifestError(f"tensor {name!r} is corrupt: its bytes are not those of {digest.hex()}")
            target[...] = np.frombuffer(blob, "<f4").reshape(shape)
        return cls(layout, vectors["weights"], vectors["momentum"])

    @functools.cached_property
    def _digests(self) -> tuple[bytes, ...]:
        return tuple(blake3(_raw(tensor)).digest() for tensor in self.tensors().values())

    @functools.cached_property
    def _by_digest(self) -> dict[bytes, NDArray[np.float32]]:
        return dict(zip(self._digests, self.tensors().values(), strict=True))


def wanted_blobs(layout: Layout, manifest: bytes) -> dict[bytes, int]:
    """Return blake3 -> size in bytes of each tensor that `manifest` lists. Raises ManifestError."""
    digests = _parse_manifest(layout, manifest)
    return {digest: 4 * math.prod(shape) for (_, shape), digest in zip(_described(layout), digests, strict=True)}


class _Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes


class _Manifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    domain: str
    entries: tuple[_Entry, ...]


def _described(layout: Layout) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{group}/{name}", shape) for group in _GROUPS for name, shape in layout.tensors]


def _encode_manifest(layout: Layout, digests: Sequence[bytes]) -> bytes:
    rows = zip(_described(layout), digests, strict=True)
    entries = tuple(_Entry(name, _DTYPE, shape, digest) for (name, shape), digest in rows)
    return msgspec.msgpack.encode(_Manifest(_DOMAIN, entries))


def _parse_manifest(layout: Layout, manifest: bytes) -> list[bytes]:
    described = _described(layout)
    # the layout leaves nothing open but the digests, so the size is known before a stranger's bytes are parsed
    expected = len(_encode_manifest(layout, [bytes(DIGEST_BYTES)] * len(described)))
    if len(manifest) != expected:
        raise ManifestError(f"manifest has {len(manifest)} bytes, one of this layout has {expected}")
    try:
        parsed = msgspec.msgpack.decode(manifest, type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"manifest cannot be read: {error}") from None
    if parsed.domain != _DOMAIN or len(parsed.entries) != len(described):
        raise ManifestError(f"manifest is {parsed.domain!r} of {len(parsed.entries)} tensors, not {len(described)}")
    for entry, (name, shape) in zip(parsed.entries, described, strict=True):
        if (entry.name, entry.dtype, entry.shape) != (name, _DTYPE, shape) or len(entry.digest) != DIGEST_BYTES:
            found = f"{entry.name!r} {entry.dtype} {entry.shape}"
            raise ManifestError(f"manifest lists {found}, the layout has {name!r} {_DTYPE} {shape}")
    digests = [entry.digest for entry in parsed.entries]
    if _encode_manifest(layout, digests) != manifest:
        raise ManifestError("manifest is not in canonical form")  # other bytes of one meaning would be another digest
    return digests


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
