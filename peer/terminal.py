"""What people see while a role runs: log lines above, one live line below; plain lines where no terminal is."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

log = logging.getLogger(__name__)

console = Console(highlight=False)
_REFRESH_S = 0.25


def say(text: str) -> None:
    """Print one line as it is; a long one is not broken, so that it can be copied."""
    console.print(text, markup=False, soft_wrap=True)


def log_to(directory: Path) -> None:
    """Show what the software says on the terminal, and keep it in `directory`/log.txt."""
    root = logging.getLogger("dugnad")
    root.setLevel(logging.INFO)
    root.propagate = False
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    shown = _Shown() if console.is_terminal else logging.StreamHandler()
    shown.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    root.addHandler(shown)
    directory.mkdir(parents=True, exist_ok=True)
    kept = logging.FileHandler(directory / "log.txt", encoding="utf-8")
    kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(kept)


class _Shown(logging.Handler):
    """Prints above the live line; a warning stands out."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        console.print(Text(self.format(record), style=style), soft_wrap=True)


@contextlib.asynccontextmanager
async def live_line(line: Callable[[], str]) -> AsyncIterator[None]:
    """Show `line` at the bottom of a terminal, fresh four times a second, for as long as this lasts."""
    if not console.is_terminal:
        yield
        return
    with Live(console=console, refresh_per_second=1 / _REFRESH_S, transient=True) as live:
        refreshing = asyncio.create_task(_refresh(live, line))
        try:
            yield
        finally:
            refreshing.cancel()
            await asyncio.wait([refreshing])  # it raises only if we are cancelled ourselves
            if not refreshing.cancelled() and (error := refreshing.exception()):
                log.error("the line at the bottom stood still: %r", error)


async def _refresh(live: Live, line: Callable[[], str]) -> None:
    while True:
        live.update(Spinner("dots", Text(line(), overflow="ellipsis", no_wrap=True)))
        await asyncio.sleep(_REFRESH_S)
