"""Tests under tests/net and tests/e2e carry the marker of their folder, so that none can forget it."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder before `-m` chooses."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in ("net", "e2e"):
            item.add_marker(folder)
