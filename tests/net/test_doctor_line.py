"""The doctor behind a router: what it says of the router and of the line, in time."""

import json
import time
from pathlib import Path

import pytest

from tests.e2e.processes import Running, dugnad, endless
from tests.net.lab import Line, lab, why_not

pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(120),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]


def test_the_doctor_tells_the_kind_of_router_and_the_rates_of_the_line_within_its_time(tmp_path: Path) -> None:
    with lab({"hub": "public", "ann": "cone"}, lines={"ann": Line(up_mbit=20)}) as net:
        arguments = ("launch", endless(tmp_path), "--host", "0.0.0.0", "--port", "4001")
        hub = Running(tmp_path / "hub", *arguments, within=net.command("hub"))
        try:
            invite, since = hub.invite(), time.monotonic()
            done = dugnad("doctor", invite, "--json", "--dir", tmp_path / "ann", within=net.command("ann"))
            took_s = time.monotonic() - since
            listed = dugnad("peers", "--dir", hub.directory, "--json", within=hub.within)
        finally:
            hub.close()
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)["network"]
    assert found["reach"] == "cone"
    assert found["inbound"] is False
    assert found["path"] == "direct"
    assert 5 < found["up_mbit"] < 25, found
    assert found["down_mbit"] > 5, found
    assert took_s < 20
    assert not (tmp_path / "ann").exists()
    assert json.loads(listed.stdout) == [], "who only looks in is no pair"
