"""Commands that tests start, and that end with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import Running, Start


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start commands; whatever still runs is ended with the test."""
    running: list[Running] = []

    def begin(name: str, *arguments: str | Path) -> Running:
        running.append(Running(tmp_path / name, *arguments))
        return running[-1]

    yield begin
    for one in running:
        one.close()
