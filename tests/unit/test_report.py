"""What a role says of the others, who may say anything of themselves."""

from types import SimpleNamespace
from typing import Any

import pytest

from dugnad.coordinator.membership import Stage
from dugnad.dht.identity import Identity
from dugnad.dht.records import ProgressBody
from dugnad.peer import report

STRANGER = Identity.from_seed(bytes(32)).peer_id
SAID = [(stage.value, stage.value) for stage in Stage] + [("\x1b[2J", "unknown"), ("lost", "unknown"), ("", "unknown")]


def shown_peers(monkeypatch: pytest.MonkeyPatch, **said: object) -> list[dict[str, Any]]:
    """Whom a coordinator shows to whom this stranger reports."""
    monkeypatch.setattr(report, "_of_any", lambda role, name: {})
    whole = SimpleNamespace(**{"stage": "training", "step": 0, "of_steps": 0, "head_round": 7, "trains": True, **said})
    membership = SimpleNamespace(
        live=lambda: [STRANGER], report=lambda peer: whole, is_live=lambda peer: True, why_lost=lambda peer: ""
    )
    role: Any = SimpleNamespace(
        leader=SimpleNamespace(validation=(0, None), plan=None, membership=membership, phase="idle"),
        machine=SimpleNamespace(reason=""),
        sources=SimpleNamespace(downloading=None),
        identity=SimpleNamespace(peer_id=STRANGER),
    )
    peers: list[dict[str, Any]] = report.of_coordinator(role)["peers"]
    return peers


@pytest.mark.parametrize(("stage", "shown"), SAID)
def test_only_a_stage_is_shown_as_one(monkeypatch: pytest.MonkeyPatch, stage: str, shown: str) -> None:
    assert [peer["state"] for peer in shown_peers(monkeypatch, stage=stage)] == [shown]


def test_who_reports_and_does_not_train_is_not_shown_among_those_who_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_peers(monkeypatch, trains=False) == []


@pytest.mark.parametrize("stage", ["training", "anything"])
def test_what_others_say_in_gossip_is_shown_with_the_same_care(stage: str) -> None:
    said = report._of_other(STRANGER, ProgressBody(1, stage, "so it is", 2, 3.0, None, b""))
    assert said["state"] == (stage if stage == "training" else "unknown")
