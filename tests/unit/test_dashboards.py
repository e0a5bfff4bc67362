import json
import re
import shutil
import subprocess
from importlib import resources
from itertools import combinations
from pathlib import Path

import pytest

from dugnad.monitoring import dashboards
from dugnad.monitoring.dashboards import FILE_NAME, Json, dashboard, queries
from dugnad.monitoring.metrics import DECLARED

METRIC = re.compile(r"dugnad_[a-z_]+")
MONITORING = Path(str(resources.files("dugnad.monitoring")))


def scraped_names() -> set[str]:
    """Every name under which Prometheus keeps one of our metrics."""
    names = {one.name for one in DECLARED if one.type != "histogram"}
    histograms = [one.name for one in DECLARED if one.type == "histogram"]
    return names | {name + suffix for name in histograms for suffix in ("_bucket", "_sum", "_count")}


def everything_asked(made: Json) -> list[str]:
    """The queries of panels and of variables."""
    return [*queries(made), *(one["definition"] for one in made["templating"]["list"] if "definition" in one)]


def as_prometheus_gets_it(query: str) -> str:
    """A query with Grafana's variables filled in."""
    filled = (
        query.replace("$__rate_interval", "1m").replace("$run", "ab12cd34").replace("$role", "coordinator|volunteer")
    )
    assert "$" not in filled, f"a variable that nobody fills in: {filled}"
    return filled


def test_the_committed_json_is_what_the_code_makes() -> None:
    committed = (MONITORING / FILE_NAME).read_text(encoding="utf-8")
    assert committed == dashboards.render(), "run: python -m dugnad.monitoring.dashboards --out monitoring"


def test_every_metric_that_is_asked_for_exists() -> None:
    asked = {name for query in everything_asked(dashboard()) for name in METRIC.findall(query)}
    assert asked
    assert asked <= scraped_names()


def test_every_metric_is_shown_somewhere() -> None:
    asked = {name for query in queries(dashboard()) for name in METRIC.findall(query)}
    unseen = [one.name for one in DECLARED if not any(name.startswith(one.name) for name in asked)]
    assert not unseen


@pytest.mark.parametrize("query", queries(dashboard()))
def test_every_query_looks_at_the_chosen_run_and_roles_only(query: str) -> None:
    of_others = METRIC.findall(query)
    assert query.count('dugnad_run_info{run=~"$run", role=~"$role"}') == of_others.count("dugnad_run_info")
    assert "dugnad_run_info" in of_others
    assert query.count("(") == query.count(")")
    as_prometheus_gets_it(query)


@pytest.mark.parametrize("query", queries(dashboard()))
def test_counters_are_never_shown_raw(query: str) -> None:
    for one in DECLARED:
        if one.type == "counter" and one.name in query:
            assert re.search(rf"(rate|increase)\({one.name}[\[{{]", query)


def test_no_panel_lies_on_another_and_none_leaves_the_page() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_x or apart_y


def test_panels_have_ids_of_their_own_titles_and_the_chosen_data_source() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["datasource"]["uid"] == "${datasource}"


def test_run_role_and_data_source_can_be_chosen() -> None:
    assert [one["name"] for one in dashboard()["templating"]["list"]] == ["datasource", "run", "role"]


def test_the_command_writes_the_json_whole_and_leaves_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "grafana" / "new"
    for _ in range(2):
        dashboards.main(["--out", str(folder)])
        assert [path.name for path in folder.iterdir()] == [FILE_NAME]
        assert json.loads((folder / FILE_NAME).read_text(encoding="utf-8")) == dashboard()
        assert (folder / FILE_NAME).stat().st_mode & 0o444 == 0o444  # Grafana is another user
    assert capsys.readouterr().out.splitlines() == [str(folder / FILE_NAME)] * 2


def test_a_failed_write_leaves_the_old_json_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left")

    (tmp_path / FILE_NAME).write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        dashboards.write(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(FILE_NAME, "old")]


def promtool(*arguments: str) -> None:
    """Run promtool and fail with what it said; skip where there is none."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not on the PATH; it comes with Prometheus")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_scrape_config() -> None:
    promtool("check", "config", str(MONITORING / "prometheus.yml"))


def test_prometheus_can_parse_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{n}", "expr": as_prometheus_gets_it(q)} for n, q in enumerate(queries(dashboard()))]
    path = tmp_path / "rules.json"  # JSON is YAML too
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(path))
