"""The line at the bottom of a terminal, and how it ends."""

import asyncio
import io
import logging

import pytest
from rich.console import Console

from dugnad.peer import terminal
from dugnad.peer.terminal import live_line


@pytest.fixture(autouse=True)
def _a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "console", Console(file=io.StringIO(), force_terminal=True, width=80))


def broken() -> str:
    raise ArithmeticError("a bug")


async def test_a_line_that_fails_does_not_fail_what_it_is_shown_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        async with live_line(broken):
            await asyncio.sleep(0)
    assert "a bug" in caplog.text


async def test_a_cancellation_that_comes_while_the_line_ends_is_not_lost() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def show() -> None:
        async with live_line(lambda: "working"):
            entered.set()
            await leave.wait()

    showing = asyncio.create_task(show())
    await entered.wait()
    leave.set()
    await asyncio.sleep(0)  # now it waits for the line to end
    showing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await showing
