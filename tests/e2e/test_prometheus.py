"""A real Prometheus scrapes a live run with our configuration, and every panel of the dashboard shows something."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dugnad.monitoring import dashboards
from tests.e2e.processes import QUICK, Running

PATIENCE_S = 60.0
CONFIG = Path(dashboards.__file__).parent / "prometheus.yml"
QUIET = ("dugnad_rejected_messages_total", "dugnad_rejected_contributions_total")
"""What an honest run has none of: these queries are asked, and may find nothing."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[list[int]]:
    """A run under way; the metrics ports of its roles."""
    ports = [free_port() for _ in range(3)]
    roles = [Running(tmp_path / "coordinator", "launch", QUICK, "--metrics-port", str(ports[0]))]
    invite = roles[0].invite()
    roles += [Running(tmp_path / f"v{port}", "join", invite, "--metrics-port", str(port)) for port in ports[1:]]
    yield ports
    for role in roles:
        role.close()


@pytest.fixture
def prometheus(tmp_path: Path, run: list[int]) -> Iterator[str]:
    """The URL of a Prometheus that runs our configuration, faster, with these roles as targets."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.read_text().replace("scrape_interval: 5s", "scrape_interval: 1s"))
    (tmp_path / "targets").mkdir()
    targets = [{"targets": [f"localhost:{port}" for port in run]}]
    (tmp_path / "targets" / "run.json").write_text(json.dumps(targets))
    port = free_port()
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


def ask(url: str, query: str) -> list[Any]:
    filled = query.replace("$__rate_interval", "20s").replace("$run", ".*").replace("$role", ".*")
    with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': filled})}", timeout=5) as said:
        answer = json.load(said)
    assert answer["status"] == "success", answer
    found: list[Any] = answer["data"]["result"]
    return found


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:  # Prometheus is not up yet
            pass
        time.sleep(0.5)
    raise AssertionError(f"no {what} within {PATIENCE_S:.0f} s")


def test_every_panel_of_the_dashboard_shows_something_of_a_live_run(prometheus: str) -> None:
    asked = dashboards.queries(dashboards.dashboard())
    assert len(asked) > 15
    for query in asked:
        if any(name in query for name in QUIET):
            wait_for(lambda query=query: ask(prometheus, query) is not None, f"answer to {query}")  # type: ignore[misc]
        else:
            wait_for(lambda query=query: bool(ask(prometheus, query)), f"value of {query}")  # type: ignore[misc]
