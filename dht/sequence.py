"""The numbers of our own records: they only grow, over restarts and whatever the clock does.

Two records with one number prove that their owner says two things, so an honest peer must never use one twice. The file
holds a number that lies ahead of all that were used; each time it is passed, the next piece is set aside first.
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
        try:
            self._set_aside = int(path.read_text("ascii"))
        except FileNotFoundError:
            self._set_aside = 0
        except ValueError as error:
            raise ValueError(f"{path}: this is no number. Move it away if this peer's key was never used.") from error
        self._last = self._set_aside

    def next(self, at_least: int) -> int:
        """A number above all that were given, here or before a restart, and not below `at_least`."""
        number = max(self._last + 1, min(at_least, _MOST))
        if number > self._set_aside:
            write_private(self._path, str(number + STEP).encode() + b"\n")
            self._set_aside = number + STEP
        self._last = number
        return number
