"""This peer's key in a role's folder: made, shown, carried elsewhere; what was there before is kept beside it."""

import itertools
import time
from pathlib import Path

from dugnad.dht.identity import Identity, IdentityError, nickname, write_private
from dugnad.peer.folder import Folder, FolderError, data_folder


def folder_of(directory: Path | None) -> Folder:
    """The role's folder that is meant; without one, the only one in the data directory. Raises FolderError."""
    if directory is not None:
        return Folder(directory)
    there = sorted(path.parent for path in data_folder().glob("*/identity.key"))
    if len(there) == 1:
        return Folder(there[0])
    if not there:
        raise FolderError(f"{data_folder()}: no role has a key here. Name the folder of one with --dir.")
    names = "\n".join(f"     --dir {path}" for path in there)
    raise FolderError(f"{data_folder()}: {len(there)} roles have a key here; name one:\n{names}")


def shown(folder: Folder) -> str:
    """What people call this peer, and what an organizer needs to let it in. Raises IdentityError, FolderError."""
    key = _kept(folder)
    return f"{key.peer_id}\nYou are {nickname(key.peer_id)!r}. For an allow-list, send the first line to the organizer."


def export(folder: Folder, to: Path) -> str:
    """Copy the key to a file, mode 0600; says what was done. Raises FolderError, IdentityError."""
    key = _kept(folder)
    if to.exists():
        raise FolderError(f"{to}: this file is there already; name another.")
    try:
        key.keep(to)
    except OSError as error:
        raise FolderError(
            f"{to}: can't be written: {error.strerror}. Name a file in a folder that is there."
        ) from error
    return (
        f"{to} holds the key of {nickname(key.peer_id)!r}: who has it is this peer. Use it on one machine at a time: "
        "two peers with one key contradict each other, and both get out of the run."
    )


def renew(folder: Folder, *, force: bool) -> str:
    """Give the folder a new key; says what was done. Raises FolderError, IdentityError, OSError."""
    return _replace(folder, Identity.generate(), force)


def bring(folder: Folder, source: Path, *, force: bool) -> str:
    """Give the folder the key in `source`; says what was done. Raises FolderError, IdentityError, OSError."""
    try:
        key = Identity.load(source, otherwise="Name a file that dugnad identity export wrote.")
    except FileNotFoundError:
        raise IdentityError(f"{source}: there is no such file.") from None
    return _replace(folder, key, force)


def _kept(folder: Folder) -> Identity:
    if not folder.key.exists():
        raise FolderError(f"{folder.path}: there is no identity.key here. Make one: dugnad identity new --dir DIR")
    return folder.identity()


def _replace(folder: Folder, key: Identity, force: bool) -> str:
    """Put `key` in the place of the folder's, if it has one; at no moment is there less than before."""
    with folder.occupied():
        beside = _copy_beside(folder, force)
        key.keep(folder.key)
    kept = f"\nThe key from before is kept as {beside}." if beside else ""
    return f"{key.peer_id}\nYou are {nickname(key.peer_id)!r} now.{kept}"


def _copy_beside(folder: Folder, force: bool) -> Path | None:
    """Keep the key beside the one to come: credit and membership hang on it."""
    if not folder.key.exists():
        return None
    if not force:
        raise FolderError(
            f"{folder.key}: there is a key already, with which this peer earned what it has. To be someone else from "
            "now on, say --force; the old key stays beside the new one."
        )
    stem = f"{folder.key.name}.{time.strftime('%Y-%m-%d-%H%M%S')}"
    names = (stem if number == 1 else f"{stem}.{number}" for number in itertools.count(1))
    beside = next(path for name in names if not (path := folder.key.with_name(name)).exists())
    write_private(beside, folder.key.read_bytes())
    return beside
