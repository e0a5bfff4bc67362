"""Checkpoints on disk: one folder per round, whole or not there at all.

    round-000123/weights.safetensors     the model, readable by anything that reads safetensors
    round-000123/momentum.safetensors    the outer momentum, tensors of the same names
    round-000123/manifest.json           size and blake3 of both, what they are of, and a digest of the manifest itself

A folder is written under another name, made durable, then renamed. Loading verifies every byte.
"""

import contextlib
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dugnad.coordinator.follower import REPLAY_ROUNDS

Tensors = dict[str, NDArray[np.float32]]

WEIGHTS = "weights.safetensors"
MOMENTUM = "momentum.safetensors"
MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 1 << 20
_VERSION = 1
_UNFINISHED = ".unfinished-"
_DISCARDED = ".discarded-"
_NAME = re.compile(r"round-(\d{6,})")


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read: which file, what happened, and what to do."""


class CheckpointMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a checkpoint is of; digests and the run's id in hex."""

    run: str
    recipe: str
    recipe_json: str
    """The whole recipe as `configs.recipe.encode` writes it, so that the weights can be used without the run."""
    model_digest: str
    global_step: int
    val_loss: float | None
    """Nats per byte on held-out data, or None if not measured."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint; its tensors are read-only float32 views of the files, mapped into memory."""

    path: Path
    round: int
    meta: CheckpointMeta
    weights: Tensors
    momentum: Tensors


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size_bytes: int
    blake3: str


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    round: int
    meta: CheckpointMeta
    files: dict[str, _File]
    digest: str
    """blake3 of this manifest's JSON with this field empty."""


class Checkpoints:
    """The newest `keep` checkpoints (by round) of one run in `folder`; one process at a time may write there."""

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, at least one checkpoint must stay")
        self.folder = folder
        self.keep = keep

    def save(
        self,
        round_number: int,
        weights: Mapping[str, NDArray[np.float32]],
        momentum: Mapping[str, NDArray[np.float32]],
        *,
        meta: CheckpointMeta,
    ) -> Path:
        """Write the checkpoint of a round, drop the oldest beyond `keep`, and return its folder.

        The tensors are float32, by name. Blocks on the disk: call it in a thread. Raises CheckpointError if it cannot
        be written; then what was there before is still there and nothing of it is left.
        """
        final = self.folder / self.name_of(round_number)
        unfinished = self.folder / f"{_UNFINISHED}{final.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()  # what a process killed while writing left behind
            unfinished.mkdir()
            files = {WEIGHTS: _write_tensors(unfinished / WEIGHTS, weights)}
            files[MOMENTUM] = _write_tensors(unfinished / MOMENTUM, momentum)
            _write_manifest(unfinished / MANIFEST, round_number, meta, files)
            _sync(unfinished)
            self._put(unfinished, final)
        except (OSError, SafetensorError) as error:
            self._sweep()
            raise CheckpointError(
                f"checkpoint of round {round_number} could not be written to {self.folder}: {error}. "
                "Earlier checkpoints and the chain are intact: free space there or check its permissions, then resume."
            ) from error
        self._rotate(newest=final)
        return final

    @staticmethod
    def name_of(round_number: int) -> str:
        """The name of that round's folder."""
        return f"round-{round_number:06d}"

    def latest(self, *, before_round: int | None = None) -> Path | None:
        """Return the folder of the newest checkpoint, unread, or None if there is none. Raises CheckpointError."""
        return next((p for p in self._newest_first() if before_round is None or round_of(p) < before_round), None)

    def load(self, path: Path) -> Checkpoint:
        """Return the checkpoint in `path` after verifying every byte of it.

        Raises CheckpointError that names the bad file, and the newest older checkpoint that is intact, if any.
        """
        try:
            return _load(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {self._way_out(path)}") from error

    def _way_out(self, damaged: Path) -> str:
        """What to do about a damaged checkpoint: the bytes of only so many rounds are kept to be replayed."""
        intact = self._intact_before(damaged)
        older = f"{intact.name}, which is intact" if intact else "the first model"
        start = round_of(intact) if intact else 0
        if round_of(damaged) > start + REPLAY_ROUNDS:
            return (
                f"Put back a copy of {damaged}: before it there is only {older}, and no more than {REPLAY_ROUNDS} "
                "rounds can be replayed."
            )
        return (
            f"Move {damaged} away: the run then goes on from {older}, and replays what follows, if its chain ends at "
            f"round {start + REPLAY_ROUNDS} or before. If not, put back a copy."
        )

    def _newest_first(self) -> list[Path]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be listed: {error}. Check its permissions.") from error
        rounds = {int(match[1]): self.folder / name for name in names if (match := _NAME.fullmatch(name))}
        return [rounds[number] for number in sorted(rounds, reverse=True)]

    def _rotate(self, *, newest: Path) -> None:
        try:
            for old in self._newest_first()[self.keep :]:
                if old != newest:  # after a return to an earlier round the newest has not the highest number
                    self._discard(old)
        except OSError as error:
            raise CheckpointError(
                f"{newest} is saved, but older checkpoints cannot be removed from {self.folder}: {error}. "
                f"Check its permissions before the disk fills."
            ) from error

    def _intact_before(self, path: Path) -> Path | None:
        candidates = self._newest_first()
        if path in candidates:
            candidates = candidates[candidates.index(path) + 1 :]
        for older in candidates:
            with contextlib.suppress(CheckpointError):
                return _load(older).path
        return None

    def _put(self, unfinished: Path, final: Path) -> None:
        """Give a whole checkpoint its name, durably. Raises OSError, and then `final` is what it was."""
        replaced = self.folder / f"{_DISCARDED}{final.name}"
        with contextlib.suppress(FileNotFoundError):
            final.rename(replaced)  # a round saved twice, say after a return to an older checkpoint
        try:
            unfinished.rename(final)
            _sync(self.folder)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                final.rename(unfinished)
            with contextlib.suppress(FileNotFoundError):
                replaced.rename(final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    def _discard(self, path: Path) -> None:
        """Remove a checkpoint, if it is there; renamed first, so that none is ever seen in part."""
        discarded = self.folder / f"{_DISCARDED}{path.name}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(discarded)
            shutil.rmtree(discarded, ignore_errors=True)

    def _sweep(self) -> None:
        with contextlib.suppress(OSError):
            for name in os.listdir(self.folder):
                if name.startswith((_UNFINISHED, _DISCARDED)):
                    shutil.rmtree(self.folder / name, ignore_errors=True)


def round_of(path: Path) -> int:
    """The round of a checkpoint's folder; 0 if it has another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _write_tensors(path: Path, tensors: Mapping[str, NDArray[np.float32]]) -> _File:
    wrong = [name for name, tensor in tensors.items() if tensor.dtype != np.float32]
    if wrong:
        raise ValueError(f"shared state is float32, but {wrong[:5]} are not")
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path)
    _sync(path)
    return _File(path.stat().st_size, blake3().update_mmap(path).hexdigest())


def _write_manifest(path: Path, round_number: int, meta: CheckpointMeta, files: dict[str, _File]) -> None:
    manifest = _Manifest(_VERSION, round_number, meta, files, digest="")
    manifest = msgspec.structs.replace(manifest, digest=_manifest_digest(manifest))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    _sync(path)


def _manifest_digest(manifest: _Manifest) -> str:
    return blake3(msgspec.json.encode(msgspec.structs.replace(manifest, digest=""))).hexdigest()


def _sync(path: Path) -> None:
    """Make a file, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(path: Path) -> Checkpoint:
    manifest = _read_manifest(path / MANIFEST)
    weights, momentum = (_read_tensors(path / name, manifest.files.get(name)) for name in (WEIGHTS, MOMENTUM))
    return Checkpoint(path, manifest.round, manifest.meta, weights, momentum)


def _read_manifest(path: Path) -> _Manifest:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_MANIFEST_BYTES)
        manifest = msgspec.json.decode(raw, type=_Manifest)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error
    if manifest.version != _VERSION:
        raise CheckpointError(f"{path} has format {manifest.version}, this version of dugnad reads {_VERSION}")
    if manifest.digest != _manifest_digest(manifest):
        raise CheckpointError(f"{path} is corrupt: it does not match its own digest")
    return manifest


def _read_tensors(path: Path, expected: _File | None) -> Tensors:
    if expected is None:
        raise CheckpointError(f"{path} is not listed in its manifest")
    try:
        size_bytes = path.stat().st_size
        if size_bytes != expected.size_bytes:
            raise CheckpointError(f"{path} is truncated or grown: {size_bytes} bytes of {expected.size_bytes}")
        mapped = np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{path} is not a safetensors file of ours: {error}") from error
    if blake3(mapped.data).hexdigest() != expected.blake3:
        raise CheckpointError(f"{path} is corrupt: its bytes do not match the manifest")
    try:
        return _map_tensors(mapped)
    except ValueError as error:  # the manifest may come with the file from a stranger, and match it
        raise CheckpointError(f"{path} is not a safetensors file of ours: {error}") from error


class _Header(msgspec.Struct, frozen=True):
    dtype: Literal["F32"]
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _map_tensors(mapped: NDArray[np.uint8]) -> Tensors:
    """Return views of the tensors in the bytes of a safetensors file, uint8 (size,), without copying them.

    The library's own reader copies, or needs torch. Raises ValueError if the header does not fit the bytes.
    """
    header_bytes = int.from_bytes(mapped[:8].tobytes(), "little")
    if header_bytes > mapped.size - 8:
        raise ValueError("its header is longer than the file")
    header = msgspec.json.decode(mapped[8 : 8 + header_bytes].tobytes(), type=dict[str, _Header])
    data = mapped[8 + header_bytes :]
    tensors: Tensors = {}
    for name, entry in header.items():
        start, stop = entry.data_offsets
        if min(entry.shape, default=1) < 0 or not 0 <= start <= stop <= data.size:
            raise ValueError(f"tensor {name!r} lies outside the file")
        if stop - start != 4 * math.prod(entry.shape):
            raise ValueError(f"tensor {name!r} of shape {entry.shape} takes other than {stop - start} bytes")
        tensors[name] = data[start:stop].view("<f4").reshape(entry.shape)
    return tensors
