"""Where the chunks of a model lie in its two safetensors files.

The files follow from the model's manifest, header and all: whoever keeps a model keeps the same bytes, a lost header is
written again, and a chunk is found in its file by its hash.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dugnad.coordinator.durable import read_at
from dugnad.dht.manifest import Manifest, ManifestError, TensorEntry

Tensors = dict[str, NDArray[np.float32]]

WEIGHTS = "weights.safetensors"
MOMENTUM = "momentum.safetensors"
FILES = {"momentum": MOMENTUM, "weights": WEIGHTS}
"""The file of each group of tensors, in name order."""
_RESERVED_NAME = "__metadata__"  # of safetensors: no tensor can be stored under it


@dataclass(frozen=True, slots=True)
class Chunk:
    """Up to 1 MiB of a tensor, and where in its file it begins."""

    tensor: str
    """As the file calls it, without "weights/"."""
    number: int
    """Which of the tensor's chunks this is, from 1."""
    of: int
    digest: bytes
    size_bytes: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file as it has to be: the size of its header, the header, and the tensors one after the other."""

    header: bytes
    chunks: tuple[Chunk, ...]
    shapes: dict[str, tuple[int, ...]]
    size_bytes: int

    def map(self, path: Path) -> Tensors:
        """The tensors in a file that has been checked: read-only views of it, mapped into memory. Raises OSError."""
        mapped = np.asarray(np.memmap(path, np.uint8, "r"))
        starts = {chunk.tensor: chunk.offset_bytes for chunk in self.chunks if chunk.number == 1}
        sizes = dict.fromkeys(starts, 0)
        for chunk in self.chunks:
            sizes[chunk.tensor] += chunk.size_bytes
        return {
            name: mapped[starts[name] : starts[name] + sizes[name]].view("<f4").reshape(shape)
            for name, shape in self.shapes.items()
        }


def files_of(model: Manifest) -> dict[str, TensorFile]:
    """File name -> what is in it. Raises ManifestError for a tensor that is in neither, or can't be stored."""
    groups: dict[str, list[tuple[str, TensorEntry]]] = {group: [] for group in FILES}
    for entry in model.entries:
        group, _, name = entry.name.partition("/")
        if group not in groups or name in ("", _RESERVED_NAME):
            raise ManifestError(f"tensor {entry.name[:80]!r} has no place in a checkpoint")
        groups[group].append((name, entry))
    return {FILES[group]: _file_of(entries) for group, entries in groups.items()}


def _file_of(entries: Sequence[tuple[str, TensorEntry]]) -> TensorFile:
    header = _header(entries)
    chunks: list[Chunk] = []
    at = len(header)
    for name, entry in entries:
        for number, (digest, size) in enumerate(entry.sizes(), start=1):
            chunks.append(Chunk(name, number, len(entry.chunks), digest, size, at))
            at += size
    return TensorFile(header, tuple(chunks), {name: entry.shape for name, entry in entries}, at)


def _header(entries: Iterable[tuple[str, TensorEntry]]) -> bytes:
    described: dict[str, object] = {}
    at = 0
    for name, entry in entries:
        described[name] = {"dtype": "F32", "shape": entry.shape, "data_offsets": (at, at + entry.size_bytes)}
        at += entry.size_bytes
    table = msgspec.json.encode(described)
    table += b" " * (-len(table) % 8)  # so that the values behind it are aligned
    return len(table).to_bytes(8, "little") + table


def read_chunk(descriptor: int, chunk: Chunk, *, moved_bytes: int = 0) -> bytes | None:
    """The bytes of a chunk in an open file, or None if other bytes stand there. Raises OSError.

    moved_bytes: how much later in the file than it has to be.
    """
    offset = chunk.offset_bytes + moved_bytes
    data = read_at(descriptor, offset, chunk.size_bytes) if offset >= 0 else b""
    return data if blake3(data).digest() == chunk.digest else None


def salvage(path: Path, file: TensorFile) -> Iterator[tuple[Chunk, bytes]]:
    """Every chunk of `file` that is whole in what is left of it in `path`, also where its head was cut off."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        cut_bytes = os.fstat(descriptor).st_size - file.size_bytes
        for chunk in file.chunks:
            for moved_bytes in (0, cut_bytes) if cut_bytes else (0,):
                with contextlib.suppress(OSError):  # one bad sector leaves the others
                    data = read_chunk(descriptor, chunk, moved_bytes=moved_bytes)
                    if data is not None:
                        yield chunk, data
                        break
    finally:
        os.close(descriptor)
