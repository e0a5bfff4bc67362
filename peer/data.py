"""The text that a run is trained on: sample k is the same bytes on every machine, whoever asks for it.

Nothing is sent or shuffled: a volunteer that is given a range of sample numbers finds the samples itself.
"""

import hashlib
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from dugnad.configs.recipe import DataSettings

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 by the golden ratio: splitmix64's stride


class CorpusError(Exception):
    """A corpus that is damaged, or too short for what the recipe wants of it; the message says what to do."""


class TooShort(CorpusError):
    """A corpus that is too short for what the recipe wants of it."""


@dataclass(frozen=True, slots=True)
class _Source:
    file: str
    num_bytes: int
    sha256: str


_SOURCES = {
    "shakespeare": _Source(
        "shakespeare.txt.xz", 5_057_279, "c8d9c271cd36887b2d5c2beba505fdd7642df0c163c9afd4a371604fc79ee3c8"
    )
}


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text in two: what is trained on, and the end of it, on which progress is measured; both uint8 (n,)."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    seed: int
    """Seed of the order of samples."""

    @classmethod
    def load(cls, settings: DataSettings) -> "Corpus":
        """Return the corpus of `settings`, out of those that are installed with the software. Raises CorpusError."""
        text = np.frombuffer(_read(_SOURCES[settings.corpus]), np.uint8)
        held_back = settings.validation_bytes
        if held_back >= text.size:
            raise TooShort(
                f"data.validation_bytes is {held_back}, but corpus {settings.corpus!r} has {text.size} bytes in all; "
                "hold less back"
            )
        return cls(text[:-held_back], text[-held_back:], settings.seed)

    def sample(self, k: int, *, context: int) -> NDArray[np.uint8]:
        """Return sample `k`, any integer from 0: uint8 (context + 1,) from a place in the training text.

        Raises ValueError for a negative k, TooShort if the training text is shorter than a sample.
        """
        sample_S: NDArray[np.uint8] = self.batch([k], context=context)[0]
        return sample_S

    def batch(self, samples: Sequence[int], *, context: int) -> NDArray[np.uint8]:
        """Return the samples with these numbers: uint8 (len(samples), context + 1), new. Raises as `sample` does."""
        if samples and min(samples) < 0:
            raise ValueError(f"there is no sample {min(samples)}: they are counted from 0")
        places = self.train.size - context
        if places < 1:
            raise TooShort(
                f"model.context is {context}, but only {self.train.size} bytes are there to train on; make it smaller"
            )
        starts_B = _mixed(self.seed, samples) % np.uint64(places)
        return np.take(self.train, starts_B.astype(np.int64)[:, None] + np.arange(context + 1))

    def validation_batch(self, sequences: int, *, context: int) -> NDArray[np.uint8]:
        """Return evenly spaced sequences of the validation text that do not overlap: uint8 (sequences, context + 1).

        Raises TooShort if it is too short for so many.
        """
        stride = self.validation.size // sequences
        if stride <= context:
            raise TooShort(
                f"evaluation.sequences is {sequences}, each of {context + 1} bytes, but only {self.validation.size} "
                "bytes are held back; raise data.validation_bytes or lower evaluation.sequences"
            )
        starts_B = np.arange(sequences) * stride
        return np.take(self.validation, starts_B[:, None] + np.arange(context + 1))


def _mixed(seed: int, samples: Sequence[int]) -> NDArray[np.uint64]:
    """Outputs number `samples` of splitmix64 (Steele, Lea, Flood 2014), started from the mixed `seed`."""
    start = _splitmix(np.array([seed & _MASK], np.uint64))
    strides = np.array([k * _GOLDEN & _MASK for k in samples], np.uint64)
    return _splitmix(start + strides)


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The step from counter to output of splitmix64; uint64 arrays wrap around without a warning."""
    z = state + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _read(source: _Source) -> bytes:
    """The bytes of an installed corpus. Raises CorpusError unless they are the very ones."""
    advice = "Install dugnad again."
    try:
        text = lzma.decompress((resources.files("dugnad.peer") / "corpora" / source.file).read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise CorpusError(f"corpus {source.file} cannot be read: {error}. {advice}") from error
    found = hashlib.sha256(text).hexdigest()
    if found != source.sha256:
        raise CorpusError(
            f"corpus {source.file} is damaged: {len(text)} bytes with sha256 {found}, "
            f"not {source.num_bytes} with {source.sha256}. {advice}"
        )
    return text
