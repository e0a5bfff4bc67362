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


def shown_peers(
    monkeypatch: pytest.MonkeyPatch, *, lost: bool = False, refused: bool = False, **said: object
) -> list[dict[str, Any]]:
    """Whom a coordinator shows to whom this stranger reports."""
    monkeypatch.setattr(report, "_of_any", lambda role, name: {})
    usual = {"stage": "training", "step": 0, "of_steps": 0, "head_round": 7}
    whole = SimpleNamespace(**{**usual, "trains": True, "leaving": False, "claim": b"shown", **said})
    plan = SimpleNamespace(seats=[SimpleNamespace(peer=STRANGER)])
    membership = SimpleNamespace(
        live=lambda: [] if lost else [STRANGER],
        report=lambda peer: whole,
        is_live=lambda peer: not lost,
        why_lost=lambda peer: "",
    )
    role: Any = SimpleNamespace(
        leader=SimpleNamespace(validation=(0, None), plan=plan, membership=membership, phase="idle"),
        machine=SimpleNamespace(reason=""),
        sources=SimpleNamespace(downloading=None),
        identity=SimpleNamespace(peer_id=STRANGER),
        follower=SimpleNamespace(refuses=lambda peer, claim: "E401" if refused and claim == b"shown" else None),
    )
    peers: list[dict[str, Any]] = report.of_coordinator(role)["peers"]
    return peers


@pytest.mark.parametrize(("stage", "shown"), SAID)
def test_only_a_stage_is_shown_as_one(monkeypatch: pytest.MonkeyPatch, stage: str, shown: str) -> None:
    assert [peer["state"] for peer in shown_peers(monkeypatch, stage=stage)] == [shown]


def test_who_reports_and_does_not_train_is_not_shown_among_those_who_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_peers(monkeypatch, trains=False) == []


def test_who_is_refused_or_left_in_order_is_not_shown_and_who_is_lost_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_peers(monkeypatch, refused=True) == []
    assert shown_peers(monkeypatch, leaving=True, lost=True) == []
    assert [peer["state"] for peer in shown_peers(monkeypatch, leaving=True)] == ["training"]
    assert [peer["state"] for peer in shown_peers(monkeypatch, lost=True)] == ["lost"]


@pytest.mark.parametrize("stage", ["training", "anything"])
def test_what_others_say_in_gossip_is_shown_with_the_same_care(stage: str) -> None:
    said = report._of_other(STRANGER, ProgressBody(1, stage, "so it is", 2, 3.0, None, b""))
    assert said["state"] == (stage if stage == "training" else "unknown")
