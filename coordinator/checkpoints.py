"""The checkpoints that one peer keeps: written, verified, served to other keepers, and repaired from them.

A checkpoint is a folder (`checkpoint`), whole or not there at all: it is written under another name, made durable,
then renamed. What a process that was killed leaves behind begins with one of these, and is dealt with by `recover`:

    .unfinished-  .repairing-    never got its name: dropped
    .replaced-                   was to make room for another of the same round: put back if that never came
    .discarded-                  dropped
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dugnad.coordinator import checkpoint as one
from dugnad.coordinator.checkpoint import Checkpoint, CheckpointMeta, name_of, round_of
from dugnad.coordinator.damage import CheckpointError, Damage
from dugnad.coordinator.durable import in_thread, remove, sync_names
from dugnad.coordinator.repair import Fetch, cause_of, known_of, rebuild
from dugnad.coordinator.replica import REPLAY_ROUNDS
from dugnad.coordinator.serving import Index
from dugnad.coordinator.votes import Signer
from dugnad.dht.manifest import ManifestError
from dugnad.dht.transport import TransportError

_UNFINISHED = ".unfinished-"
_REPAIRING = ".repairing-"
_REPLACED = ".replaced-"
_DISCARDED = ".discarded-"


class Checkpoints:
    """The newest `keep` checkpoints (by round) of one run in `folder`; one process at a time may write there.

    signer: who writes; only to read, none is needed. Everything but `lookup` and `repair` blocks on the disk.
    """

    def __init__(self, folder: Path, keep: int, signer: Signer | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, at least one checkpoint must stay")
        self.folder = folder
        self.keep = keep
        self._signer = signer
        self._writing = threading.RLock()
        self._indexing = threading.Lock()
        self._recovered = False
        self._repairing: set[Path] = set()
        self._changes = 0
        """How often a checkpoint came or went."""
        self._index: tuple[int, Index] = (-1, Index(()))
        """After how many changes it was made."""

    # -- writing

    def recover(self) -> None:
        """Tidy up what a process that was killed left behind: the next one calls this before it reads.

        Raises CheckpointError.
        """
        with self._writing:
            if not self._recovered:
                try:
                    self._tidy_up()
                except OSError as error:
                    raise CheckpointError(
                        f"{self.folder} cannot be tidied up: {error}. Check its permissions."
                    ) from error
                self._recovered = True

    def save(self, round_number: int, tensors: Mapping[str, NDArray[np.float32]], *, meta: CheckpointMeta) -> Path:
        """Write the checkpoint of a round, drop the oldest beyond `keep`, and return its folder.

        tensors: float32, named "momentum/<name>" and "weights/<name>". Raises ValueError where they are not the model
        of meta's digest, and CheckpointError if it cannot be written; then what was there before is still there and
        nothing of it is left.
        """
        model = one.manifest_of(tensors)
        raw = model.encode()
        if blake3(raw).hexdigest() != meta.model_digest:
            raise ValueError(f"the tensors are model {blake3(raw).hexdigest()}, not {meta.model_digest}")
        final = self.folder / name_of(round_number)
        unfinished = self.folder / f"{_UNFINISHED}{final.name}"
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
                sync_names(self.folder.parent)
            with self._writing:
                self.recover()
                remove(unfinished)
                unfinished.mkdir()
                one.write_tensors(unfinished, model, tensors)
                one.write_manifests(unfinished, round_number, meta, raw, self._writer)
                self._put(unfinished, final)
        except OSError as error:
            remove(unfinished)
            raise CheckpointError(
                f"checkpoint of round {round_number} could not be written to {self.folder}: {error}. "
                "Earlier checkpoints and the chain are intact: free space there or check its permissions, then resume."
            ) from error
        self._rotate(newest=final)
        return final

    async def repair(
        self,
        damage: Damage,
        fetch: Fetch,
        *,
        meta: CheckpointMeta | None = None,
        model_manifest_bytes: int | None = None,
    ) -> Checkpoint:
        """Write a damaged checkpoint anew, of what is whole on this disk and what `fetch` brings, and load it.

        Only if its manifest.json is lost, `meta` has to say what it is of, and if model.msgpack is lost as well,
        `model_manifest_bytes` how large that is, which is the same for all models of a run. So a checkpoint that is not
        here at all can be had too. The new one is signed by us, and takes the place of the old when every byte of it
        was verified. Raises CheckpointError; then the old one is as it was.
        """
        path = damage.path
        assert path.parent == self.folder, f"{path} is not in {self.folder}"
        if path in self._repairing:
            raise CheckpointError(f"{path} is being repaired already", damage)
        self._repairing.add(path)
        unfinished = self.folder / f"{_REPAIRING}{path.name}"
        try:
            await in_thread(self.recover)
            known = await in_thread(lambda: known_of(damage, meta, model_manifest_bytes))
            written = await rebuild(damage, unfinished, known, fetch, nearby=self.lookup, signer=self._writer)
            await in_thread(lambda: self._put(unfinished, path))
        except (OSError, TransportError, ManifestError, ExceptionGroup) as error:
            raise CheckpointError(
                f"{path} could not be repaired: {cause_of(error)}. It is as it was: try again when there is space on "
                "the disk and another keeper of this checkpoint can be reached.",
                damage,
            ) from error
        finally:
            try:
                await in_thread(lambda: remove(unfinished))
            finally:
                self._repairing.remove(path)
        return dataclasses.replace(written, path=path)

    @property
    def _writer(self) -> Signer:
        assert self._signer is not None, "these checkpoints are only read"
        return self._signer

    # -- reading

    def latest(self, *, before_round: int | None = None) -> Path | None:
        """Return the folder of the newest checkpoint, unread, or None if there is none. Raises CheckpointError."""
        return next((p for p in self.newest_first() if before_round is None or round_of(p) < before_round), None)

    def newest_first(self) -> list[Path]:
        """The folders of all checkpoints, unread. Raises CheckpointError."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be listed: {error}. Check its permissions.") from error
        rounds = {round_of(Path(name)): self.folder / name for name in names if one.is_name(name)}
        return [rounds[number] for number in sorted(rounds, reverse=True)]

    def load(self, path: Path) -> Checkpoint:
        """Return the checkpoint in `path` after verifying every byte of it.

        Raises CheckpointError with the damage, and with the newest older checkpoint that is intact, if any.
        """
        found = one.inspect(path)
        if isinstance(found, Damage):
            raise CheckpointError(f"{found}. {self._way_out(path)}", found)
        return found

    def lookup(self, digest: bytes) -> memoryview | None:
        """A chunk, or the manifest of a model, of a checkpoint that is here: verified and mapped, or None.

        Any thread may ask. What is not here costs no look at the disk.
        """
        with self._indexing:
            changes = self._changes  # before the look: what changes meanwhile is looked at again
            if self._index[0] != changes:
                try:
                    self._index = (changes, Index(self.newest_first()))
                except CheckpointError:  # whoever asks is not to blame, and our own writing will tell
                    return None
            index = self._index[1]
        return index.lookup(digest)

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

    def _intact_before(self, path: Path) -> Path | None:
        candidates = self.newest_first()
        if path in candidates:
            candidates = candidates[candidates.index(path) + 1 :]
        return next((older for older in candidates if isinstance(one.inspect(older), Checkpoint)), None)

    # -- names

    def _put(self, unfinished: Path, final: Path) -> None:
        """Give a whole checkpoint its name, durably. Raises OSError, and then `final` is what it was."""
        with self._writing:
            self._rename(unfinished, final)

    def _rename(self, unfinished: Path, final: Path) -> None:
        replaced = self.folder / f"{_REPLACED}{final.name}"
        with contextlib.suppress(FileNotFoundError):
            final.rename(replaced)  # a round saved twice, or one that was repaired
        try:
            unfinished.rename(final)
            sync_names(self.folder)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                final.rename(unfinished)
            with contextlib.suppress(FileNotFoundError):
                replaced.rename(final)
            raise
        finally:
            self._changes += 1
        with contextlib.suppress(OSError):
            self._drop(replaced, final.name)

    def _rotate(self, *, newest: Path) -> None:
        try:
            with self._writing:
                for old in self.newest_first()[self.keep :]:
                    if old != newest:  # after a return to an earlier round the newest has not the highest number
                        self._drop(old, old.name)
        except OSError as error:
            raise CheckpointError(
                f"{newest} is saved, but older checkpoints cannot be removed from {self.folder}: {error}. "
                f"Check its permissions before the disk fills."
            ) from error

    def _drop(self, path: Path, name: str) -> None:
        """Remove the checkpoint in `path`, if it is there; renamed first, so that none is ever seen in part."""
        discarded = self.folder / f"{_DISCARDED}{name}"
        remove(discarded)
        with contextlib.suppress(FileNotFoundError):
            path.rename(discarded)
            self._changes += 1
            remove(discarded)

    def _tidy_up(self) -> None:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return
        for name in names:
            if name.startswith(_REPLACED):
                final = self.folder / name.removeprefix(_REPLACED)
                if final.exists():
                    self._drop(self.folder / name, final.name)
                else:
                    (self.folder / name).rename(final)
                    sync_names(self.folder)
                    self._changes += 1
        for name in names:
            if name.startswith((_UNFINISHED, _REPAIRING, _DISCARDED)):
                remove(self.folder / name)
