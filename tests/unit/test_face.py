"""What the outside sees of a role, whatever a stranger made it say."""

from typing import Any

import pytest

from dugnad.monitoring.metrics import Metrics
from dugnad.peer import report
from dugnad.peer.face import Face


@pytest.mark.parametrize("reason", ["no\nway", "\x1b[2J", "\udce4", "\x00" * 500, "no " * 500])
def test_a_strangers_words_neither_end_a_volunteer_nor_steer_a_terminal(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    said = {"model_digest": None, "state": "idle", "reason": f"refused: {reason}", "round": 0}
    monkeypatch.setattr(report, "of_volunteer", lambda role, swarm: said)
    face = Face(Metrics("volunteer", "ab" * 4, nickname="calm-otter"))
    anything: Any = object()
    face.role = face.swarm = anything
    assert face.status()["reason"].isprintable()
    progress = face.progress()
    assert progress is not None
    assert progress.reason.startswith("refused: ")
