"""What holds for every test: markers by folder, and no property judged by the speed of the machine."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent

settings.register_profile("dugnad", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dugnad")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests under tests/net and tests/e2e by their folder, so that none can forget it, before `-m` chooses."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in ("net", "e2e"):
            item.add_marker(folder)
