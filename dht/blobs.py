"""Bytes on disk under the name of their hash, each file whole or not there.

A blob is written beside, synced and renamed into place, so a crash leaves the blob or nothing under its name. What
the disk has damaged since is noticed in reading, removed, and has to be fetched again.
"""

import contextlib
import os
import re
import threading
from pathlib import Path

from blake3 import blake3

_NAME = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """The blobs in `directory`, which one process owns; it is made with the first blob. Threads may share this.

    durable: whether a blob that was put survives a power cut; without, it survives the end of the process only.
    """

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self.directory = directory
        self._durable = durable
        self._incoming = directory / "incoming.tmp"
        self._writing = threading.Lock()

    def put(self, data: bytes | bytearray | memoryview) -> bytes:
        """Keep `data`, and return its digest. Raises OSError (a full disk), and then keeps nothing."""
        view = memoryview(data)
        digest = blake3(view).digest()
        with self._writing:
            if self._read(digest) is None:
                self._write(self._path(digest), view)
        return digest

    def get(self, digest: bytes) -> bytes | None:
        """The blob, or None if it is not here or no longer what it was; then its file is removed."""
        data = self._read(digest)
        if data is None:
            with self._writing:  # it may have been written anew meanwhile
                data = self._read(digest)
                if data is None:
                    self.delete(digest)
        return data

    def has(self, digest: bytes) -> bool:
        """Whether the blob is here, unread."""
        return self._path(digest).is_file()

    def delete(self, digest: bytes) -> None:
        """Forget the blob, if it is here."""
        self._path(digest).unlink(missing_ok=True)

    def digests(self) -> set[bytes]:
        """The digests of all blobs that are here, unread."""
        names = (path.name for path in self.directory.glob("??/*"))
        return {bytes.fromhex(name) for name in names if _NAME.fullmatch(name)}

    def _path(self, digest: bytes) -> Path:
        assert len(digest) == 32, f"a digest of {len(digest)} bytes"
        name = digest.hex()
        return self.directory / name[:2] / name

    def _read(self, digest: bytes) -> bytes | None:
        """The blob, or None if it is not here or damaged."""
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            return None
        return data if blake3(data).digest() == digest else None

    def _write(self, path: Path, data: memoryview) -> None:
        """Raises OSError, and then nothing bears the name: what is there was synced whole."""
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._sync_directory(self.directory)
            # one name for all: a crash leaves at most this one file, and the next blob overwrites it
            with self._incoming.open("wb") as file:
                file.write(data)
                file.flush()
                if self._durable:
                    os.fsync(file.fileno())
            self._incoming.replace(path)
            self._sync_directory(path.parent)
        except BaseException:
            self._incoming.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # if it is new: it too must be synced before anything in it counts
            raise

    def _sync_directory(self, directory: Path) -> None:
        """Make the names in `directory` durable: a rename alone may be lost with the power."""
        if not self._durable:
            return
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
