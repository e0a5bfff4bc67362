"""Volunteers behind routers join with nothing but the invite, train, and lose a relay."""

from pathlib import Path

import pytest

from tests.net.lab import why_not
from tests.net.routed_run import measure

pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]


def test_volunteers_behind_routers_train_and_a_relay_that_is_killed_costs_at_most_one_round(tmp_path: Path) -> None:
    found = measure(tmp_path)
    assert max(found["first_counted"].values()) <= 2
    assert found["reach"] == {"ann": "cone", "bob": "cone", "sym": "symmetric"}
    assert found["paths"] == {"ann - bob": "punched", "sym - other": "direct", "sym - ann": "relayed"}
    assert max(found["missed"].values()) <= 1
    assert found["audit"]["ranges_lost"] == found["audit"]["ranges_doubled"] == []
    assert found["audit"]["digests_agree"]
