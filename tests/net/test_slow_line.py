"""Bytes get through a line that takes many seconds for what is moved at once elsewhere."""

from pathlib import Path

import pytest

from tests.net.fleet import fleet
from tests.net.lab import lab, why_not

pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(120),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

UP_MBIT = 1.0
NUM_BYTES = 3 * 2**19
"""Twelve seconds; who moves no byte for five is given up."""


def test_a_volunteer_with_a_slow_uplink_gives_directly(tmp_path: Path) -> None:
    with lab({"hub": "public", "ann": "cone", "bob": "cone"}, up_mbit=UP_MBIT) as net, fleet(net, tmp_path) as peers:
        peers.begin("hub")
        ann, bob = peers.begin("ann", "bob")
        assert ann.ask(do="connect", to=[bob.peer], within_s=30)[bob.peer]["path"] == "punched"
        given = ann.ask(do="give", to=bob.peer, bytes=NUM_BYTES)
        assert given["path"] == "punched"
        assert given["seconds"] > NUM_BYTES * 8e-6 / UP_MBIT * 0.8, "the line is as slow as it should be"
