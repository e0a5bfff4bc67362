"""What a role keeps, in one folder, and who lives there now.

identity.key   this peer's key          run.key       the organizer's key, where the run was launched or goes on with it
chain.sqlite   the chain, and promises  blobs/        bytes of recent rounds
checkpoints/   the model now and then   incoming/     chunks of a model that is on its way here
peers.json     where others were        network.json  where this role listened, and how invites led to it
evidence       who is proven to lie     decisions     what the organizer has decided
role.json      while a process lives here: its pid, and where to ask it
ended.json     once it is gone: what it said at its end
lock           held while a process lives here
log.txt        everything that was said
"""

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs
import psutil

from dugnad.coordinator.chain import Chain
from dugnad.coordinator.messages import Genesis
from dugnad.dht.identity import Identity, write_private
from dugnad.dht.multiaddrs import is_direct, nearness
from dugnad.peer.network import Listened

log = logging.getLogger(__name__)

RoleName = Literal["coordinator", "volunteer"]


class FolderError(Exception):
    """A folder that can't be used as asked; the message says which, why, and what to do."""


class OtherRun(FolderError):
    """A folder that belongs to another run."""

    code = "E304"

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{self.code} {path}: {what}")


ENDED = "ended.json"
MAX_REMEMBERED = 64
"""Addresses of peers that are remembered."""


class Role(msgspec.Struct, frozen=True):
    """The process that lives in a folder."""

    role: RoleName
    run: str
    """Run id in hex."""
    name: str
    """The recipe's name."""
    pid: int
    started_s: float
    """When the process started, in seconds since 1970: a pid may be used again."""
    url: str
    """Where it answers /status and /metrics."""

    @property
    def alive(self) -> bool:
        """Whether that process is still there."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started_s) < 1.0
        except psutil.Error:
            return False


ANOTHER = "Choose another folder with --dir."


class Folder:
    """The folder of one role."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the folder if it is not there, and the user's alone if it is the user's. Raises FolderError."""
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            _close_to_others(self.path)
        except OSError as error:
            raise FolderError(f"{self.path}: can't be made: {error.strerror}. {ANOTHER}") from error

    def check(self) -> None:
        """Raises FolderError where the folder can't be made or written in; nothing is left behind."""
        if fault := self.fault():
            raise FolderError(f"{self.path}: {fault}. {ANOTHER}")

    def fault(self) -> str:
        """Why the folder can't be made or written in, "" if it can."""
        there = nearest(self.path)
        try:
            Path(tempfile.mkdtemp(prefix=".dugnad-", dir=there)).rmdir()
        except OSError as error:
            return f"can't be {'written in' if there == self.path.absolute() else 'made'}: {error.strerror}"
        return ""

    @property
    def chain(self) -> Path:
        """The file of the chain."""
        return self.path / "chain.sqlite"

    def genesis(self) -> Genesis | None:
        """Of the run in which a role here took part, or None. Raises ChainError."""
        if not self.chain.exists():
            return None
        with contextlib.closing(Chain(self.chain, read_only=True)) as chain:
            return chain.genesis()

    @property
    def key(self) -> Path:
        """The file of this peer's key."""
        return self.path / "identity.key"

    def identity(self) -> Identity:
        """This peer's key, made when first asked for. Raises IdentityError."""
        return _private_key(self.key)

    def organizer(self) -> Identity:
        """The run's key, made when first asked for. Raises IdentityError."""
        return _private_key(self.path / "run.key")

    @property
    def has_run_key(self) -> bool:
        """Whether the run's key is here."""
        return (self.path / "run.key").exists()

    def listened(self) -> Listened | None:
        """Where the role listened last."""
        try:
            return msgspec.json.decode((self.path / "network.json").read_bytes(), type=Listened)
        except (OSError, msgspec.DecodeError):
            return None

    def keep_listened(self, where: Listened) -> None:
        """Listen there again next time, so that invites stay good. Raises OSError."""
        write_private(self.path / "network.json", msgspec.json.format(msgspec.json.encode(where)))

    def remembered(self) -> tuple[str, ...]:
        """Multiaddrs of peers that were there last time."""
        try:
            found = msgspec.json.decode((self.path / "peers.json").read_bytes(), type=list[str])
        except (OSError, msgspec.DecodeError):
            return ()
        return tuple(found[:MAX_REMEMBERED])

    def remember(self, multiaddrs: Iterable[str]) -> None:
        """Remember where peers are, for the next start: the invite may name none that is still there.

        Of too many, those that reach farthest. Raises OSError.
        """
        chosen = sorted(set(multiaddrs), key=lambda one: (nearness(one), not is_direct(one), one))[:MAX_REMEMBERED]
        write_private(self.path / "peers.json", msgspec.json.format(msgspec.json.encode(chosen)))

    def decisions(self) -> tuple[bytes, ...]:
        """The records of what the organizer has decided, as a role here has kept them."""
        try:
            return msgspec.msgpack.decode((self.path / "decisions").read_bytes(), type=tuple[bytes, ...])
        except (OSError, msgspec.DecodeError):
            return ()

    def role(self) -> Role | None:
        """Who lives here, or lived here and did not say goodbye."""
        try:
            return msgspec.json.decode((self.path / "role.json").read_bytes(), type=Role)
        except (OSError, msgspec.DecodeError):
            return None

    @contextlib.contextmanager
    def occupied(self) -> Iterator[None]:
        """Keep every other process out, until this ends or the process does. Raises FolderError if one is in."""
        self.create()
        with (self.path / "lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderError(
                    f"{self.path}: {self._inhabitant()}. Stop it first, or choose another folder with --dir."
                ) from None
            except OSError as error:
                raise FolderError(
                    f"{self.path}: can't be locked: {error.strerror}. Choose a folder on a local disk with --dir."
                ) from error
            yield

    def _inhabitant(self) -> str:
        role = self.role()
        if role is None or not role.alive:
            return "another dugnad is just starting here"
        return f"a {role.role} of run {role.name!r} lives here (pid {role.pid})"

    @contextlib.contextmanager
    def inhabited(self, role: RoleName, run: bytes, name: str, url: str) -> Iterator[None]:
        """Live here for a while."""
        started_s = psutil.Process().create_time()
        said = Role(role, run.hex(), name, os.getpid(), started_s, url)
        (self.path / ENDED).unlink(missing_ok=True)
        write_private(self.path / "role.json", msgspec.json.encode(said))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (self.path / "role.json").unlink()


def _private_key(path: Path) -> Identity:
    """The key in a file that its owner alone may read from now on, made if there is none. Raises IdentityError."""
    with contextlib.suppress(OSError):  # whoever reads it says what is wrong
        if _close_to_others(path):
            log.warning("%s: others on this machine could read this key; from now on its owner alone can", path)
    return Identity.load_or_create(path)


def _close_to_others(path: Path) -> bool:
    """Take from others what they may do with a file or folder of the user's; whether that was anything."""
    found = path.stat()
    # a sticky folder is everyone's, as /tmp is, which belongs to a user too: root
    if found.st_uid != os.getuid() or not found.st_mode & 0o077 or found.st_mode & stat.S_ISVTX:
        return False
    path.chmod(stat.S_IMODE(found.st_mode) & 0o700)
    return True


def nearest(path: Path) -> Path:
    """What is there already of a path: itself, or the nearest folder above it."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if os.path.exists(one))


def check_role(path: Path) -> None:
    """Raises FolderError where no role ever lived."""
    if not path.is_dir():
        raise FolderError(f"{path}: there is no such folder.")
    if not Folder(path).chain.exists():
        raise FolderError(f"{path}: there is no chain.sqlite here. Name the folder of a coordinator or volunteer.")


def data_folder() -> Path:
    """Where roles live that were given no folder: the user's data directory."""
    return platformdirs.user_data_path("dugnad", appauthor=False)


def volunteer_folder(name: str, run: bytes) -> Folder:
    """Where a volunteer of that run lives that was given no folder."""
    return Folder(data_folder() / f"{name}-{run.hex()[:8]}")


def inhabited_folders() -> list[Folder]:
    """The folders in the user's data directory in which a process lives."""
    if not data_folder().is_dir():
        return []
    found = (Folder(path) for path in sorted(data_folder().iterdir()))
    return [folder for folder in found if (role := folder.role()) is not None and role.alive]
