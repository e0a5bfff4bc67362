"""Chunks of the checkpoints on this disk by their hash, for whoever repairs a copy or joins."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from dugnad.coordinator.checkpoint import MODEL, read_model
from dugnad.coordinator.durable import read_at
from dugnad.coordinator.tensorfile import files_of
from dugnad.dht.manifest import Manifest


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    offset_bytes: int
    size_bytes: int

    def give(self, digest: bytes) -> memoryview | None:
        """The bytes, mapped, if they are there and what they have to be."""
        try:
            with self.path.open("rb") as file:
                # read before it is mapped: what the disk can't give is an error here, and a dead process there
                if blake3(read_at(file.fileno(), self.offset_bytes, self.size_bytes)).digest() != digest:
                    return None
                return np.memmap(file, np.uint8, "r", self.offset_bytes, (self.size_bytes,)).data
        except (OSError, ValueError):  # gone since, or cut short
            return None


class Index:
    """Where every chunk and model manifest of some checkpoints lies; made once, never changed."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._places: dict[bytes, list[_Place]] = {}
        for folder in folders:
            for digest, place in _places_in(folder):
                self._places.setdefault(digest, []).append(place)

    def lookup(self, digest: bytes) -> memoryview | None:
        """The bytes under this hash, verified and mapped, or None; what is not here costs no look at the disk."""
        found = (place.give(digest) for place in self._places.get(digest, ()))
        return next((data for data in found if data is not None), None)


def _places_in(folder: Path) -> Iterator[tuple[bytes, _Place]]:
    model = read_model(folder, None)
    if not isinstance(model, Manifest):
        return  # nobody knows what its bytes are
    raw = model.encode()
    yield blake3(raw).digest(), _Place(folder / MODEL, 0, len(raw))
    for name, file in files_of(model).items():
        for chunk in file.chunks:
            yield chunk.digest, _Place(folder / name, chunk.offset_bytes, chunk.size_bytes)
