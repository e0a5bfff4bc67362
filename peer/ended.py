"""How the last role in a folder ended, for whoever asks when nobody lives there any more."""

import contextlib
import time
from collections.abc import Iterator

import msgspec

from dugnad.dht.identity import write_private
from dugnad.peer.errors import sentence_of
from dugnad.peer.folder import ENDED, Folder, FolderError, RoleName, data_folder


class Ended(msgspec.Struct, frozen=True):
    """The end of a role."""

    role: RoleName
    name: str
    """The recipe's name, "" if it did not come so far."""
    at_s: float
    """When, in seconds since 1970."""
    said: str
    """The last sentence that its user was told."""

    def __str__(self) -> str:
        """A sentence about it, and its own."""
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.at_s))
        return f"The {self.role}{_of(self.name)} here ended at {at}: {self.said}"


class Words:
    """What a role says at its end, where that is no error."""

    said = ""


@contextlib.contextmanager
def kept(folder: Folder, role: RoleName, name: str) -> Iterator[Words]:
    """Keep in `folder` how what happens inside ends."""
    words = Words()
    try:
        yield words
    except FolderError:
        raise  # another may live there
    except KeyboardInterrupt:
        _keep(folder, role, name, "left at once, by Ctrl+C")
        raise
    except BaseException as error:
        known = sentence_of(error)
        _keep(folder, role, name, known[0] if known else f"a fault of dugnad's own ({error!r}), see log.txt")
        raise
    _keep(folder, role, name, words.said)


def _keep(folder: Folder, role: RoleName, name: str, said: str) -> None:
    with contextlib.suppress(OSError):  # as on a full disk, which may be what ended it
        write_private(folder.path / ENDED, msgspec.json.encode(Ended(role, name, time.time(), said)))


def told(folder: Folder) -> str:
    """How the last role in `folder` ended, in words; "" while one lives there, or where that is not known."""
    lives = folder.role()
    if lives is not None and lives.alive:
        return ""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return str(msgspec.json.decode((folder.path / ENDED).read_bytes(), type=Ended))
    if lives is None:
        return ""
    return (
        f"The {lives.role}{_of(lives.name)} here (pid {lives.pid}) ended without a word: it was killed, or the "
        "machine went down."
    )


def told_of_only_one() -> str:
    """The same of the only role that ended in the data directory; "" if more did, or none."""
    found = [Folder(path) for path in sorted(data_folder().glob("*/")) if path.is_dir()]
    said = [f"{folder.path}: {words}" for folder in found if (words := told(folder))]
    return said[0] if len(said) == 1 else ""


def _of(name: str) -> str:
    return f" of run {name!r}" if name else ""
