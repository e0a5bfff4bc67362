"""Every operation on the disk is failed at, and crashed at: in saving, rotating, repairing and tidying up."""

import asyncio
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from dugnad.coordinator.checkpoint import Checkpoint, inspect, round_of
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.damage import CheckpointError, Damage
from dugnad.coordinator.tensorfile import WEIGHTS
from tests.unit.keepers import ANN, BOB, Asking, model, save

OPERATIONS = ("open", "ftruncate", "pwrite", "fsync", "mkdir", "rename", "unlink", "rmdir")
"""All through which something changes on the disk; `open` for what it creates."""

Work = Callable[[Checkpoints], object]


class Crash(BaseException):
    """The process is dead: whatever it still tries is not done."""


class Disk:
    """Counts the operations of `os` and lets one go wrong: as an error, or as the end of the process.

    In a crash what was written and not synced is lost, but for half of it.
    """

    def __init__(self, fails_at: int | None, *, dead: bool) -> None:
        self.done: list[str] = []
        self._fails_at, self._dead = fails_at, dead
        self._unsynced: dict[int, int] = {}
        """inode -> a descriptor of our own."""
        self._real = {name: getattr(os, name) for name in OPERATIONS}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Stand between the process and its disk for a while."""
        with pytest.MonkeyPatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, self._instead_of(name))
            yield
        for descriptor in self._unsynced.values():
            if self._crashed:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.close(descriptor)

    @property
    def went_wrong(self) -> bool:
        """Whether the operation was come to."""
        return self._fails_at is not None and len(self.done) > self._fails_at

    @property
    def _crashed(self) -> bool:
        return self._dead and self.went_wrong

    def _instead_of(self, name: str) -> Callable[..., Any]:
        def operate(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not (len(arguments) > 1 and arguments[1] & os.O_CREAT):
                return self._real[name](*arguments, **options)
            if self._crashed:
                raise Crash
            self.done.append(name)
            if len(self.done) - 1 == self._fails_at:
                if self._dead:
                    raise Crash
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._note(name, arguments[0])
            return self._real[name](*arguments, **options)

        return operate

    def _note(self, name: str, target: Any) -> None:
        if name in ("pwrite", "ftruncate"):
            inode = os.fstat(target).st_ino
            if inode not in self._unsynced:
                self._unsynced[inode] = os.dup(target)
        elif name == "fsync" and (known := self._unsynced.pop(os.fstat(target).st_ino, None)) is not None:
            os.close(known)


@pytest.fixture(scope="module")
def ann(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Who holds rounds 1 to 3 whole."""
    kept = Checkpoints(tmp_path_factory.mktemp("ann"), keep=3, signer=ANN)
    for round_ in (1, 2, 3):
        save(kept, round_)
    return kept


def harmed(folder: Path) -> None:
    raw = bytearray((folder / "round-000003" / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / "round-000003" / WEIGHTS).write_bytes(raw)
    (folder / "round-000003" / "momentum.safetensors").unlink()


def left_behind(folder: Path) -> None:
    """What processes that were killed left, at once."""
    harmed(folder)
    for name in (".unfinished-round-000004", ".repairing-round-000003", ".discarded-round-000000"):
        shutil.copytree(folder / "round-000003", folder / name)
    shutil.copytree(folder / "round-000001", folder / ".replaced-round-000001")
    (folder / "round-000002").rename(folder / ".replaced-round-000002")


def nothing(folder: Path) -> None:
    pass


def repair_from(ann: Checkpoints) -> Work:
    def work(kept: Checkpoints) -> None:
        damage = inspect(kept.folder / "round-000003")
        if isinstance(damage, Damage):
            asyncio.run(kept.repair(damage, Asking(ann)))

    return work


def new_round(kept: Checkpoints) -> None:
    save(kept, 4)


def round_again(kept: Checkpoints) -> None:
    save(kept, 3, model(30))


def recover(kept: Checkpoints) -> None:
    kept.recover()


CASES: dict[str, tuple[Callable[[Path], None], Callable[[Checkpoints], Work]]] = {
    "save and rotate": (nothing, lambda ann: new_round),
    "save again": (nothing, lambda ann: round_again),
    "repair": (harmed, repair_from),
    "recover": (left_behind, lambda ann: recover),
}
"""How the folder is made ready, and what is done."""


def models_of(folder: Path) -> dict[int, object]:
    """Round -> the model of its checkpoint, or what is wrong with that."""
    found = {round_of(path): inspect(path) for path in folder.glob("round-*")}
    return {
        round_: one.meta.model_digest if isinstance(one, Checkpoint) else one.broken for round_, one in found.items()
    }


@pytest.mark.parametrize("dead", [False, True], ids=["the disk fails", "the process dies"])
@pytest.mark.parametrize("case", CASES)
def test_whole_checkpoints_are_left_wherever_it_ends(ann: Checkpoints, tmp_path: Path, case: str, dead: bool) -> None:
    make_ready, doing = CASES[case]
    work = doing(ann)

    def ready(name: str) -> Path:
        shutil.copytree(ann.folder, tmp_path / name)
        make_ready(tmp_path / name)
        return tmp_path / name

    undisturbed = ready("undisturbed")
    before = models_of(undisturbed)
    disk = Disk(None, dead=False)
    with disk.in_place():
        work(Checkpoints(undisturbed, keep=3, signer=BOB))
    after = models_of(undisturbed)
    assert case == "recover" or all(isinstance(one, str) for one in after.values())
    for fails_at in range(len(disk.done)):
        folder = ready(str(fails_at))
        hurt = Disk(fails_at, dead=dead)
        with hurt.in_place(), suppress(CheckpointError, Crash):
            work(Checkpoints(folder, keep=3, signer=BOB))
        assert hurt.went_wrong
        again = Checkpoints(folder, keep=3, signer=BOB)
        again.recover()
        at = f"{disk.done[fails_at]}, operation {fails_at}"
        left = models_of(folder)
        for round_, one in left.items():
            assert one in {before.get(round_), after.get(round_)}, f"round {round_} after {at}"
        assert before.keys() & after.keys() <= left.keys(), f"a checkpoint is lost after {at}"
        work(again)
        assert models_of(folder) == after
        assert all(path.name.startswith("round-") for path in folder.iterdir()), f"something is left after {at}"
        shutil.rmtree(folder)
