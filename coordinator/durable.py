"""Files that are on the disk when we say so, and work that blocks on it."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview


class NewFile:
    """A file of a known size, written in any order and by any thread; durable once `sync` has returned.

    What is not written reads as zeros. Raises OSError, also if the file is there already.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self._size_bytes = size_bytes
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(self._descriptor, self._size_bytes)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def put(self, offset_bytes: int, data: Buffer) -> None:
        """Write `data` there."""
        left = memoryview(data).cast("B")
        with self._lock:  # a thread that comes late must not write to what the number of our file means by then
            if self._descriptor is None:
                raise ValueError(f"{self.path} is not open")
            while left:
                written = os.pwrite(self._descriptor, left, offset_bytes)
                offset_bytes, left = offset_bytes + written, left[written:]

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        assert self._descriptor is not None
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                os.close(descriptor)


def write_new(path: Path, data: Buffer) -> None:
    """Write a whole new file, durably but for its name. Raises OSError."""
    with NewFile(path, memoryview(data).nbytes) as file:
        file.put(0, data)
        file.sync()


def sync_names(folder: Path) -> None:
    """Make a folder's list of names survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, offset_bytes: int, size_bytes: int) -> bytes:
    """Up to `size_bytes` bytes from there: fewer where the file ends. Raises OSError."""
    pieces: list[bytes] = []
    while size_bytes > 0 and (piece := os.pread(descriptor, size_bytes, offset_bytes)):
        pieces.append(piece)
        offset_bytes, size_bytes = offset_bytes + len(piece), size_bytes - len(piece)
    return b"".join(pieces)


def remove(folder: Path) -> None:
    """Delete a folder with all that is in it, as far as that can be done."""
    shutil.rmtree(folder, ignore_errors=True)


async def in_thread(work: Callable[[], T]) -> T:
    """The result of `work` in a thread; who is cancelled waits for its end, so that nobody tidies up under it."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # looked at: its caller is past caring
        raise
