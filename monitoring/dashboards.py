"""The Grafana dashboard of a run, as code; the JSON beside this file is what it makes.

    python -m dugnad.monitoring.dashboards --out DIR

Every query is joined with `dugnad_run_info`, which carries role, run and nickname, so that the other metrics need not.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

FILE_NAME = "dugnad-overview.json"

_SCHEMA_VERSION = 39
_COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_INFO = 'dugnad_run_info{run=~"$run", role=~"$role"}'
_WHO = "{{nickname}} {{instance}}"


def dashboard() -> Json:
    """The dashboard, as Grafana imports it."""
    return {
        "uid": "dugnad-overview",
        "title": "dugnad",
        "description": "One training run and everyone in it.",
        "tags": ["dugnad"],
        "schemaVersion": _SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": _variables()},
        "panels": _laid_out(_rows()),
    }


def queries(made: Json) -> list[str]:
    """Every PromQL expression of a dashboard's panels."""
    return [target["expr"] for panel in made["panels"] for target in panel.get("targets", ())]


def render() -> str:
    """The dashboard as JSON text."""
    return json.dumps(dashboard(), indent=2) + "\n"


def write(directory: Path) -> Path:
    """Write the JSON into `directory`, which is made if need be, and return its path. The file is replaced whole."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / FILE_NAME
    with tempfile.NamedTemporaryFile("w", dir=directory, prefix=".", suffix=".new", delete=False) as file:
        try:
            file.write(render())
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # a temporary file is its owner's alone; Grafana is another user
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
    return target


# -- what is shown


def _rows() -> list[tuple[str, list[Json]]]:
    return [
        ("Run", _run()),
        ("Learning", _learning()),
        ("Time", _time()),
        ("Network", _network()),
        ("Trouble", _trouble()),
    ]


def _run() -> list[Json]:
    return [
        _stat("Round", f"max({_of_run('dugnad_round')})", help_="The last committed round."),
        _stat("Global step", f"max({_of_run('dugnad_global_step')})", help_="Inner steps of the run so far."),
        _stat("Validation loss", f"min({_of_run('dugnad_validation_loss_nats')})", decimals=3, help_="Nats per byte."),
        _stat("Roles scraped", f"count({_INFO})", help_="Coordinator and volunteers that this Prometheus sees."),
        _stat(
            "Coordinator silent", f"max({_of_run('dugnad_coordinator_silent_seconds')})", unit="s", red_from=15,
            help_="Training goes on without it. As the volunteer that misses it most sees it.",
        ),
        _stat("Last checkpoint", f"max({_of_run('dugnad_checkpoint_round')})", help_="The round that is safe on disk."),
    ]  # fmt: skip


def _learning() -> list[Json]:
    return [
        _graph("Training loss", [(_of_run("dugnad_train_loss_nats"), _WHO)], help_="Nats per token, last inner step."),
        _graph("Validation loss", [(_of_run("dugnad_validation_loss_nats"), _WHO)], help_="Nats per byte."),
        _graph("Rounds committed", [(_of_run("dugnad_round"), _WHO)], help_="Who lags behind stands lower."),
        _graph(
            "Peers by state", [(f"max by (state) ({_of_run('dugnad_peers')})", "{{state}}")], stacked=True,
            help_="As the one who sees most of them sees it.",
        ),
    ]  # fmt: skip


def _time() -> list[Json]:
    phases = f"sum by (phase) ({_of_run(_rate('dugnad_phase_duration_seconds_sum'))})"
    counts = f"sum by (phase) ({_of_run(_rate('dugnad_phase_duration_seconds_count'))})"
    return [
        _graph("Tokens per second", [(_of_run("dugnad_tokens_per_second"), _WHO)], help_="Of the last inner step."),
        _graph(
            "Tokens per second, all together", [(f"sum({_of_run(_rate('dugnad_tokens_total'))})", "all")],
            help_="Exchange and waiting included.",
        ),
        _graph(
            "Time spent computing", [(_of_run("dugnad_utilization_ratio"), _WHO)], unit="percentunit",
            help_="Share of the last round.",
        ),
        _graph(
            "Round duration", [(_quantile(0.5, "dugnad_round_duration_seconds"), "median"),
                               (_quantile(0.95, "dugnad_round_duration_seconds"), "95th percentile")],
            unit="s", help_="From one committed round to the next.",
        ),
        _graph("Mean duration of a phase", [(f"{phases} / {counts}", "{{phase}}")], unit="s", help_="Over all roles."),
        _graph(
            "Checkpoint duration", [(_quantile(0.95, "dugnad_checkpoint_duration_seconds"), "95th percentile")],
            unit="s", help_="Written beside the rounds, which do not wait.",
        ),
    ]  # fmt: skip


def _network() -> list[Json]:
    return [
        _graph("Sent", [(_bytes_by_kind("sent"), "{{kind}}")], unit="Bps", stacked=True, help_="All roles."),
        _graph("Received", [(_bytes_by_kind("received"), "{{kind}}")], unit="Bps", stacked=True, help_="All roles."),
        _graph(
            "Messages", [(f"sum by (direction, kind) ({_of_run(_rate('dugnad_messages_total'))})",
                          "{{direction}} {{kind}}")],
            unit="ops", help_="Signed messages, by what they say.",
        ),
        _graph(
            "Ways to other peers", [(f"sum by (path) ({_of_run('dugnad_pairs')})", "{{path}}")], stacked=True,
            help_="Pairs between which tensors move: directly, punched through routers, or through a relay.",
        ),
        _graph(
            "Round trip", [(_quantile_of("dugnad_pair_rtt_seconds", 0.5), "median"),
                           (_quantile_of("dugnad_pair_rtt_seconds", 0.95), "95th percentile")],
            unit="s", help_="Of the pairs in use.",
        ),
        _graph(
            "Rate of a pair", [(f"avg by (direction) ({_of_run('dugnad_pair_bytes_per_second')})", "{{direction}}")],
            unit="Bps", help_="Mean over the pairs in use, of their newest large transfers.",
        ),
        _graph(
            "Punched connections", [(f"sum by (reach, outcome) ({_of_run(_increase('dugnad_punches_total'))})",
                                     "{{reach}} {{outcome}}")],
            help_="In each interval shown, by the kind of router in front of who punches.",
        ),
        _graph(
            "How roles are reached", [(f"sum by (reach) ({_of_run('dugnad_reach')})", "{{reach}}")], stacked=True,
            help_="Open: anyone connects to it. Cone: it is punched. Symmetric: it needs a relay, or open peers.",
        ),
    ]  # fmt: skip


def _trouble() -> list[Json]:
    return [
        _graph(
            "Rejected messages", [(_by_reason("dugnad_rejected_messages_total"), "{{reason}}")],
            help_="In each interval shown, all roles.",
        ),
        _graph(
            "Rejected contributions", [(_by_reason("dugnad_rejected_contributions_total"), "{{reason}}")],
            help_="Training that was not counted.",
        ),
        _graph(
            "Attempts at a round", [
                (f"sum({_of_run(_increase('dugnad_failed_attempts_total'))})", "failed"),
                (f"max({_of_run(_increase('dugnad_rounds_committed_total'))})", "committed"),
            ],
            help_="Failed ones of all roles; committed ones of the role that saw most.",
        ),
        _graph(
            "Who leads", [(f"{_of_run('dugnad_leads')} > 0", _WHO)],
            help_="The coordinator while it answers, else a volunteer. Two at once: one of them is cut off.",
        ),
        _graph(
            "View of the round", [(_of_run("dugnad_view"), _WHO)],
            help_="How many leaders of the round under way were given up; who stands lower has not heard of it.",
        ),
        _graph(
            "Coordinator silent", [(_of_run("dugnad_coordinator_silent_seconds"), _WHO)], unit="s",
            help_="Since it was last heard, as each role sees it.",
        ),
        _graph(
            "Clock offset", [(_of_run("dugnad_clock_offset_seconds"), _WHO)], unit="s",
            help_="How far the run's time is ahead of each machine's clock; it is corrected, never required.",
        ),
        _graph(
            "Quarantined peers", [(_of_run("dugnad_quarantined_peers"), _WHO)],
            help_="They are proven to have signed two contradicting things, and count no more.",
        ),
    ]  # fmt: skip


# -- queries


def _of_run(expr: str) -> str:
    """`expr` for the chosen run and roles only, with role, run and nickname as labels."""
    return f"{expr} * on (job, instance) group_left (role, run, nickname) {_INFO}"


def _rate(selector: str) -> str:
    return f"rate({selector}[$__rate_interval])"


def _increase(selector: str) -> str:
    return f"increase({selector}[$__rate_interval])"


def _quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, sum by (le) ({_of_run(_rate(histogram + '_bucket'))}))"


def _quantile_of(gauge: str, q: float) -> str:
    return f"quantile({q}, {_of_run(gauge)})"


def _bytes_by_kind(direction: str) -> str:
    chosen = f'dugnad_bytes_total{{direction="{direction}"}}'
    return f"sum by (kind) ({_of_run(_rate(chosen))})"


def _by_reason(counter: str) -> str:
    return f"sum by (reason) ({_of_run(_increase(counter))}) > 0"


# -- Grafana's words


def _variables() -> list[Json]:
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}},
        _variable("run", "label_values(dugnad_run_info, run)", several=False),
        _variable("role", 'label_values(dugnad_run_info{run=~"$run"}, role)', several=True),
    ]


def _variable(name: str, query: str, *, several: bool) -> Json:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,  # whenever the time range changes: runs come and go
        "sort": 1,
        "multi": several,
        "includeAll": several,
        "current": {"text": ["All"], "value": ["$__all"]} if several else {},
    }


def _stat(
    title: str, expr: str, *, help_: str, unit: str = "none", decimals: int | None = None, red_from: float | None = None
) -> Json:
    steps: list[Json] = [{"color": "text", "value": None}]
    if red_from is not None:
        steps.append({"color": "red", "value": red_from})
    return {
        "type": "stat",
        "title": title,
        "description": help_,
        "datasource": _DATASOURCE,
        "gridPos": {"w": 4, "h": 4},
        "targets": [_target("A", expr, "")],
        "fieldConfig": {
            "defaults": {"unit": unit, "decimals": decimals, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"},
    }


def _graph(
    title: str, lines: Sequence[tuple[str, str]], *, help_: str, unit: str = "short", stacked: bool = False
) -> Json:
    custom: Json = {"lineWidth": 1, "fillOpacity": 20 if stacked else 0, "showPoints": "never"}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "type": "timeseries",
        "title": title,
        "description": help_,
        "datasource": _DATASOURCE,
        "gridPos": {"w": 8, "h": 8},
        "targets": [_target(chr(ord("A") + n), expr, legend) for n, (expr, legend) in enumerate(lines)],
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def _target(ref: str, expr: str, legend: str) -> Json:
    return {"refId": ref, "datasource": _DATASOURCE, "expr": expr, "legendFormat": legend, "range": True}


def _laid_out(rows: list[tuple[str, list[Json]]]) -> list[Json]:
    """Every panel with its id and place, each row's under its title, left to right and then down."""
    panels: list[Json] = []
    y = 0
    for title, row in rows:
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": []})
        panels[-1]["gridPos"] = {"x": 0, "y": y, "w": _COLUMNS, "h": 1}
        y, x, height = y + 1, 0, 0
        for panel in row:
            place = panel["gridPos"]
            if x + place["w"] > _COLUMNS:
                y, x, height = y + height, 0, 0
            panels.append({**panel, "gridPos": {"x": x, "y": y, **place}})
            x, height = x + place["w"], max(height, place["h"])
        y += height
    return [{"id": n, **panel} for n, panel in enumerate(panels, start=1)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the dashboard where the command line says, and tell where."""
    parser = argparse.ArgumentParser(description="Write the Grafana dashboard of a run as JSON, to be imported there.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for it; made if need be")
    print(write(parser.parse_args(arguments).out))


if __name__ == "__main__":
    main()
