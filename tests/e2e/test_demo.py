"""The demo, in a shorter form: everything that it promises is in the JSON that it writes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.e2e.processes import dugnad


def test_the_demo_trains_with_one_late_and_one_killed_and_says_so_in_json(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    done = dugnad(
        "demo", "tiny-books", "--rounds", "14", "--peers", "3", "--dir", tmp_path / "demo", "--json", out, timeout_s=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["broken"] == []
    rounds = found["rounds"]
    assert [row["round"] for row in rounds] == list(range(1, 15))
    for row in rounds:
        assert row["committed"]
        assert len(set(row["model_digest"].values())) == 1
        assert set(row["roster"]) <= set(row["model_digest"])
        assert row["wire_bytes"] > 0
        assert row["duration_s"] > 0
    assert found["val_loss_last"] < 3.0 < 4.5 < found["val_loss_first"]
    assert found["killed"] not in rounds[-1]["roster"]
    assert found["joined_late"] in rounds[-1]["roster"]
    assert found["joined_late"] not in rounds[0]["roster"]
    assert 0 < found["exchange_bytes_over_ideal"] <= 1.05
    assert found["bytes_vs_data_parallel"] > 1
    assert all(0 < share <= 1 for share in found["utilization"].values())
    assert (Path(found["checkpoint"]) / "weights.safetensors").exists()
    assert "KING" in done.stdout


def test_a_demo_that_is_killed_outright_leaves_no_process_behind(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "dugnad.peer", "demo", "--rounds", "14", "--dir", str(tmp_path / "demo")],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith("volunteer-2"):
            break
    below = psutil.Process(demo.pid).children(recursive=True)
    assert len(below) >= 8, "a coordinator and three volunteers, each with its daemon"
    os.kill(demo.pid, signal.SIGKILL)
    demo.wait()
    demo.stdout.close()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive, alive
