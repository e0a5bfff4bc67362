import ast
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, generate_latest

from dugnad.monitoring.metrics import (
    BYTES,
    DECLARED,
    MESSAGES,
    OTHER,
    REJECTED_CONTRIBUTIONS,
    REJECTED_MESSAGES,
    Declared,
    Metrics,
    PairSeen,
)

FLOORS = ("dht", "coordinator", "optim", "peer")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("volunteer", "ab12cd34", nickname="amber-otter")


def shown(metrics: Metrics, name: str, **labels: str) -> float | None:
    """What a scrape would say, or None for a series that is not there."""
    return metrics.registry.get_sample_value(name, labels)


def say_everything(metrics: Metrics) -> None:
    metrics.round_committed(3, 60, 12.5)
    metrics.attempt_failed()
    metrics.led(2, by_us=True)
    metrics.phase_took("train", 9.0)
    metrics.utilized(0.75)
    metrics.peers_seen({"training": 2})
    metrics.coordinator_silent(14.0)
    metrics.clock_corrected(-0.5)
    metrics.quarantined(1)
    metrics.pairs_seen([PairSeen("fond-mole", "punched", 0.05, 2e6, 1e6)])
    metrics.punched("cone", connected=True)
    metrics.reached("cone")
    metrics.trained(4096, 2.5, 1000.0)
    metrics.validated(2.25)
    metrics.checkpoint_written(2, 0.5)
    metrics.bytes_moved("sent", "upload", 10)
    metrics.message_passed("received", "vote")
    metrics.rejected_message("malformed")
    metrics.rejected_contribution("non-finite")


def test_everything_that_is_said_is_shown(metrics: Metrics) -> None:
    say_everything(metrics)
    assert shown(metrics, "dugnad_run_info", role="volunteer", run="ab12cd34", nickname="amber-otter") == 1
    assert shown(metrics, "dugnad_round") == 3
    assert shown(metrics, "dugnad_global_step") == 60
    assert shown(metrics, "dugnad_rounds_committed_total") == 1
    assert shown(metrics, "dugnad_round_duration_seconds_sum") == 12.5
    assert shown(metrics, "dugnad_failed_attempts_total") == 1
    assert shown(metrics, "dugnad_view") == 2
    assert shown(metrics, "dugnad_leads") == 1
    assert shown(metrics, "dugnad_phase_duration_seconds_sum", phase="train") == 9.0
    assert shown(metrics, "dugnad_utilization_ratio") == 0.75
    assert shown(metrics, "dugnad_peers", state="training") == 2
    assert shown(metrics, "dugnad_coordinator_silent_seconds") == 14.0
    assert shown(metrics, "dugnad_clock_offset_seconds") == -0.5
    assert shown(metrics, "dugnad_quarantined_peers") == 1
    assert shown(metrics, "dugnad_tokens_total") == 4096
    assert shown(metrics, "dugnad_train_loss_nats") == 2.5
    assert shown(metrics, "dugnad_tokens_per_second") == 1000.0
    assert shown(metrics, "dugnad_validation_loss_nats") == 2.25
    assert shown(metrics, "dugnad_checkpoint_round") == 2
    assert shown(metrics, "dugnad_checkpoint_duration_seconds_sum") == 0.5
    assert shown(metrics, "dugnad_bytes_total", direction="sent", kind="upload") == 10
    assert shown(metrics, "dugnad_messages_total", direction="received", kind="vote") == 1
    assert shown(metrics, "dugnad_rejected_messages_total", reason="malformed") == 1
    assert shown(metrics, "dugnad_rejected_contributions_total", reason="non-finite") == 1


def test_a_role_that_says_everything_shows_the_whole_table_and_nothing_else(metrics: Metrics) -> None:
    say_everything(metrics)
    families = {family.name: family for family in metrics.registry.collect()}
    assert set(families) == {one.name.removesuffix("_total") for one in DECLARED}
    for one in DECLARED:
        family = families[one.name.removesuffix("_total")]
        assert (family.type, family.unit, family.documentation) == (one.type, one.unit, one.help)


@pytest.mark.parametrize("one", DECLARED, ids=lambda one: one.name)
def test_a_metrics_name_says_what_it_is(one: Declared) -> None:
    assert one.name.startswith("dugnad_")
    assert one.name.removesuffix("_total").endswith(one.unit)
    assert one.name.endswith("_total") == (one.type == "counter")
    assert bool(one.buckets) == (one.type == "histogram")
    assert list(one.buckets) == sorted(set(one.buckets))
    assert one.help.endswith(".")


def test_no_name_is_declared_twice() -> None:
    assert len({one.name for one in DECLARED}) == len(DECLARED)


def test_what_is_not_known_yet_is_absent_and_what_is_counted_stands_at_zero(metrics: Metrics) -> None:
    assert shown(metrics, "dugnad_train_loss_nats") is None
    assert shown(metrics, "dugnad_round") is None
    assert shown(metrics, "dugnad_failed_attempts_total") == 0
    assert shown(metrics, "dugnad_rejected_messages_total", reason="bad signature") == 0


def test_a_word_of_a_stranger_makes_no_new_series(metrics: Metrics) -> None:
    def num_series() -> int:
        return len(generate_latest(metrics.registry).splitlines())

    metrics.peers_seen({})
    before = num_series()
    for n in range(100):
        metrics.rejected_message(f"reason {n}")
        metrics.rejected_contribution(f"reason {n}")
        metrics.bytes_moved("received", f"kind {n}", 5)
        metrics.message_passed("received", f"kind {n}")
        metrics.peers_seen({f"state {n}": 1, "odd": 2})
    assert num_series() == before
    assert shown(metrics, "dugnad_rejected_messages_total", reason=OTHER) == 100
    assert metrics.received_bytes() == {OTHER: 500}
    assert shown(metrics, "dugnad_peers", state=OTHER) == 3


def test_bytes_are_told_by_direction_and_kind_and_only_those_that_moved(metrics: Metrics) -> None:
    assert metrics.sent_bytes() == metrics.received_bytes() == {}
    metrics.bytes_moved("sent", "upload", 700)
    metrics.bytes_moved("sent", "upload", 300)
    metrics.bytes_moved("sent", "message", 20)
    metrics.bytes_moved("received", "result", 400)
    assert metrics.sent_bytes() == {"upload": 1000, "message": 20}
    assert metrics.received_bytes() == {"result": 400}


def test_the_kinds_of_bytes_fit_into_a_members_report() -> None:
    kinds = BYTES.labels[1].values
    assert kinds is not None
    assert len(kinds) <= 16
    assert max(map(len, kinds)) <= 16


def test_peers_that_are_gone_from_a_state_are_no_longer_counted_there(metrics: Metrics) -> None:
    metrics.peers_seen({"training": 3})
    metrics.peers_seen({"voted": 3})
    assert shown(metrics, "dugnad_peers", state="training") == 0
    assert shown(metrics, "dugnad_peers", state="voted") == 3


def test_only_pairs_in_use_are_shown(metrics: Metrics) -> None:
    metrics.pairs_seen([PairSeen("fond-mole", "punched", 0.05, 2e6, 1e6), PairSeen("shy-hare", "relayed", None, 0, 0)])
    assert shown(metrics, "dugnad_pairs", path="punched") == shown(metrics, "dugnad_pairs", path="relayed") == 1
    assert shown(metrics, "dugnad_pair_rtt_seconds", peer="fond-mole") == 0.05
    assert shown(metrics, "dugnad_pair_rtt_seconds", peer="shy-hare") is None
    metrics.pairs_seen([PairSeen("shy-hare", "direct", 0.01, 5e6, 0)])
    assert shown(metrics, "dugnad_pair_rtt_seconds", peer="fond-mole") is None
    assert shown(metrics, "dugnad_pair_bytes_per_second", peer="shy-hare", direction="sent") == 5e6
    assert shown(metrics, "dugnad_pairs", path="punched") == 0


def test_a_loss_that_is_not_a_number_is_shown_as_such(metrics: Metrics) -> None:
    metrics.trained(1, math.nan, 1.0)
    loss = shown(metrics, "dugnad_train_loss_nats")
    assert loss is not None
    assert math.isnan(loss)


def test_two_roles_in_one_process_share_nothing(metrics: Metrics) -> None:
    other = Metrics("coordinator", "ab12cd34")
    metrics.attempt_failed()
    assert shown(other, "dugnad_failed_attempts_total") == 0
    assert not [family for family in REGISTRY.collect() if family.name.startswith("dugnad")]


def test_threads_that_count_at_once_lose_nothing(metrics: Metrics) -> None:
    start = threading.Barrier(8)

    def count() -> None:
        start.wait()
        for _ in range(200):
            metrics.trained(1, 1.0, 1.0)
            metrics.phase_took("train", 1.0)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shown(metrics, "dugnad_tokens_total") == 1600
    assert shown(metrics, "dugnad_phase_duration_seconds_count", phase="train") == 1600


# -- that the table knows the words of the code above it


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(where, the function's last name, call) for every call in the floors above."""
    for path in sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                yield f"{path.name}:{node.lineno}", name, node


def words(function: str, position: int) -> dict[str, str]:
    """Where which text is given literally as that argument of that function."""
    found = {}
    for where, name, call in calls():
        if name == function and len(call.args) > position:
            argument = call.args[position]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                found[where] = argument.value
    return found


@pytest.mark.parametrize(
    ("metric", "label", "function", "position"),
    [
        (REJECTED_MESSAGES, 0, "WireError", 0),
        (REJECTED_MESSAGES, 0, "Refused", 1),
        (REJECTED_CONTRIBUTIONS, 0, "rejected_contribution", 0),
        (REJECTED_CONTRIBUTIONS, 0, "LeftOut", 1),
        (MESSAGES, 1, "Kind", 0),
    ],
)
def test_every_word_that_the_code_uses_is_in_the_table(
    metric: Declared, label: int, function: str, position: int
) -> None:
    said = words(function, position)
    assert said, f"nobody calls {function}: this test looks at the wrong place"
    missing = {where: word for where, word in said.items() if word not in (metric.labels[label].values or ())}
    assert not missing, f'these would count as "other"; declare them in monitoring/metrics.py: {missing}'


def test_every_kind_of_bytes_that_the_code_uses_is_in_the_table() -> None:
    said = {
        where: keyword.value.value
        for where, name, call in calls()
        if name in ("open", "push", "fetch")
        for keyword in call.keywords
        if keyword.arg == "kind" and isinstance(keyword.value, ast.Constant)
    }
    assert said
    missing = {where: word for where, word in said.items() if word not in (BYTES.labels[1].values or ())}
    assert not missing, f'these would count as "other"; declare them in monitoring/metrics.py: {missing}'
