"""What a model is, by its content: every tensor as chunks of up to 1 MiB, each named by its hash.

Replicas are identical, so everyone who has the model holds the same chunks; the digest of a model is the hash of its
manifest, which names them all. Tensors stand in name order, and there is one encoding of one manifest.
"""

import math
from collections.abc import Iterator
from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

CHUNK_BYTES = 2**20
MAX_MANIFEST_BYTES = 4 * 2**20
_DOMAIN = "dugnad/model/2"
_ITEM_BYTES = {"float32": 4}

_Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Size = Annotated[int, Meta(ge=1, lt=2**40)]


class ManifestError(ValueError):
    """A description of a model, or bytes under it, that do not fit; whoever sent them is at fault."""


class TensorEntry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor: little-endian values in C order, cut into `chunks`, all of CHUNK_BYTES but the last."""

    name: Annotated[str, Meta(min_length=1, max_length=512)]
    dtype: str
    shape: Annotated[tuple[_Size, ...], Meta(max_length=16)]
    chunks: tuple[_Digest, ...]

    @classmethod
    def blank(cls, name: str, dtype: str, shape: tuple[int, ...]) -> "TensorEntry":
        """The entry of a tensor of which nothing is known but its kind: all digests zero."""
        empty = cls(name, dtype, shape, ())
        return cls(name, dtype, shape, (bytes(32),) * -(-empty.size_bytes // CHUNK_BYTES))

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)

    def sizes(self) -> Iterator[tuple[bytes, int]]:
        """(digest, bytes) of each chunk, in order."""
        left = self.size_bytes
        for digest in self.chunks:
            yield digest, min(CHUNK_BYTES, left)
            left -= CHUNK_BYTES


class Manifest(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All tensors of a model, in name order."""

    domain: str
    entries: tuple[TensorEntry, ...]

    @classmethod
    def of(cls, entries: tuple[TensorEntry, ...]) -> "Manifest":
        """The manifest of these tensors, which stand in name order."""
        return cls(_DOMAIN, entries)

    def encode(self) -> bytes:
        """The one encoding; its blake3 is the model digest."""
        return msgspec.msgpack.encode(self)

    def sizes(self) -> dict[bytes, int]:
        """digest -> bytes of every chunk; chunks of equal content are one."""
        return {digest: size for entry in self.entries for digest, size in entry.sizes()}


def chunks_of(data: memoryview) -> Iterator[memoryview]:
    """The bytes of one tensor, cut."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def digests_of(data: memoryview) -> tuple[bytes, ...]:
    """The hashes of the chunks of one tensor's bytes."""
    return tuple(blake3(chunk).digest() for chunk in chunks_of(data))


def parse_manifest(raw: bytes) -> Manifest:
    """The manifest in some bytes from anyone. Raises ManifestError."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"a manifest of {len(raw)} bytes, at most {MAX_MANIFEST_BYTES}")
    try:
        parsed = msgspec.msgpack.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"manifest cannot be read: {error}") from None
    if parsed.domain != _DOMAIN:
        raise ManifestError(f"manifest is of kind {parsed.domain[:40]!r}, not {_DOMAIN!r}")
    names = [entry.name for entry in parsed.entries]
    if names != sorted(set(names)):
        raise ManifestError("the tensors of the manifest are not in name order, or one stands twice")
    for entry in parsed.entries:
        if entry.dtype not in _ITEM_BYTES:
            raise ManifestError(f"tensor {entry.name!r} is {entry.dtype[:20]!r}; only float32 is shared")
        if len(entry.chunks) != -(-entry.size_bytes // CHUNK_BYTES):
            raise ManifestError(f"tensor {entry.name!r} of {entry.size_bytes} bytes has {len(entry.chunks)} chunks")
    if parsed.encode() != raw:
        raise ManifestError("manifest is not in canonical form")  # other bytes of one meaning would be another digest
    return parsed
