"""What is wrong with a checkpoint, file by file and chunk by chunk, for people and for who repairs it."""

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dugnad.coordinator.tensorfile import Chunk
from dugnad.dht.transport import printable

_NAMED_TENSORS = 3
"""How many damaged tensors a sentence names."""


class Fault(Enum):
    """What has happened to a file."""

    MISSING = "missing"
    TRUNCATED = "truncated"
    ALTERED = "altered"
    UNREADABLE = "unreadable"
    """The disk does not give it."""
    OTHER_FORMAT = "of another format"


@dataclass(frozen=True, slots=True)
class Broken:
    """One file that is not what it was when it was written."""

    file: str
    fault: Fault
    words: str
    """What is said of the file: "is missing"."""
    chunks: tuple[Chunk, ...] = ()
    """The chunks that are not whole in it, where that can be told."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that are not whole, in the order of the file."""
        return tuple(dict.fromkeys(chunk.tensor for chunk in self.chunks))


@dataclass(frozen=True, slots=True)
class Damage:
    """A checkpoint that is not whole; there is at least one broken file."""

    path: Path
    broken: tuple[Broken, ...]

    def __str__(self) -> str:
        return "; ".join(f"{self.path / one.file} {one.words}" for one in self.broken)


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or repaired: which file, what happened, and what to do."""

    def __init__(self, words: str, damage: Damage | None = None) -> None:
        super().__init__(words)
        self.damage = damage
        """What is wrong with the checkpoint, where that is known; `Checkpoints.repair` takes it."""


def named(chunks: tuple[Chunk, ...]) -> str:
    """Which tensors some chunks belong to, in words: "embed (2 of 3 chunks), bias"."""
    counted = Counter(chunk.tensor for chunk in chunks)
    of = {chunk.tensor: chunk.of for chunk in chunks}
    said = [
        printable(name) + (f" ({count} of {of[name]} chunks)" if of[name] > 1 else "")
        for name, count in counted.items()
    ]
    more = len(said) - _NAMED_TENSORS
    return ", ".join(said[:_NAMED_TENSORS]) + (f" and {more} more" if more > 0 else "")
