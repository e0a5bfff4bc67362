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


@pytest.mark.parametrize(("stage", "shown"), SAID)
def test_only_a_stage_is_shown_as_one(monkeypatch: pytest.MonkeyPatch, stage: str, shown: str) -> None:
    monkeypatch.setattr(report, "_of_any", lambda role, name: {})
    membership = SimpleNamespace(
        live=lambda: [STRANGER],
        report=lambda peer: SimpleNamespace(stage=stage, step=0, of_steps=0),
        is_live=lambda peer: True,
        why_lost=lambda peer: "",
    )
    leader = SimpleNamespace(validation=(0, None), plan=None, membership=membership, phase="idle", reason="")
    role: Any = SimpleNamespace(machine=leader, checkpoint=None, identity=SimpleNamespace(peer_id=STRANGER))
    assert [peer["state"] for peer in report.of_coordinator(role)["peers"]] == [shown]


@pytest.mark.parametrize("stage", ["training", "anything"])
def test_what_others_say_in_gossip_is_shown_with_the_same_care(stage: str) -> None:
    said = report._of_other(STRANGER, ProgressBody(1, stage, "so it is", 2, 3.0, None, b""))
    assert said["state"] == (stage if stage == "training" else "unknown")
