"""The numbers of our own records: they only grow, over restarts and whatever the clock does.

Two records with one number prove that their owner says two things, so an honest peer must never use one twice. The file
holds a number that lies ahead of all that were used; each time it is passed, the next piece is set aside first. The
inode of the folder stands beside it: by that a copy of the folder knows that it is one.
"""

from pathlib import Path

from dugnad.dht.identity import write_private

STEP = 3_600_000
"""How many numbers are set aside at a time: as a number is about a time in ms, an hour's."""
_MOST = 2**62


class Sequence:
    """Numbers kept in `path`. Raises OSError where the file can't be written, ValueError if it holds something else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = path.parent.stat().st_ino
        try:
            self._set_aside, inode = map(int, path.read_text("ascii").split())
        except FileNotFoundError:
            self._set_aside, inode = 0, self._inode
        except ValueError as error:
            raise ValueError(f"{path}: this is no number. Move it away if this peer's key was never used.") from error
        self.last = self._set_aside
        """The highest number that was given, or may have been before a restart."""
        self.copied = inode != self._inode
        """Whether the numbers are those of another folder, of which this one is a copy."""

    def next(self, at_least: int) -> int:
        """A number above all that were given, here or before a restart, and not below `at_least`."""
        number = max(self.last + 1, min(at_least, _MOST))
        if number > self._set_aside:
            write_private(self._path, f"{number + STEP} {self._inode}\n".encode())
            self._set_aside = number + STEP
        self.last = number
        return number
