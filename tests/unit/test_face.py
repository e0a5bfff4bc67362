"""What the outside sees of a role, whatever a stranger made it say."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from dugnad.coordinator.admission import Refusal
from dugnad.dht.hello import Verdict
from dugnad.dht.identity import PeerId
from dugnad.monitoring.metrics import Metrics
from dugnad.peer import report
from dugnad.peer.face import Face


def a_face(monkeypatch: pytest.MonkeyPatch, **said: object) -> Face:
    """The face of a volunteer that says so."""
    whole = {"peer": "ann", "model_digest": None, "state": "idle", "reason": "", "round": 0, **said}
    monkeypatch.setattr(report, "of_volunteer", lambda role, swarm: whole)
    face = Face(Metrics("volunteer", "ab" * 4, nickname="calm-otter"))
    correction = SimpleNamespace(offset_s=-1.5, warning="slow")
    swarm: Any = SimpleNamespace(
        clock=SimpleNamespace(correction=correction),
        quarantined=lambda: frozenset({PeerId("eve")}),
        key_in_use=False,
    )
    role: Any = object()
    face.role, face.swarm = role, swarm
    return face


@pytest.mark.parametrize("reason", ["no\nway", "\x1b[2J", "\udce4", "\x00" * 500, "no " * 500])
def test_a_strangers_words_neither_end_a_volunteer_nor_steer_a_terminal(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    face = a_face(monkeypatch, reason=f"refused: {reason}")
    assert face.status()["reason"].isprintable()
    progress = face.progress()
    assert progress is not None
    assert progress.reason.startswith("refused: ")


def test_before_there_is_a_role_nothing_is_said_or_counted() -> None:
    face = Face(Metrics("volunteer", "ab" * 4))
    face.look()
    assert (face.status(), face.progress(), face.line()) == ({}, None, "looking for the run")
    assert face.metrics.registry.get_sample_value("dugnad_view") is None


def test_a_look_shows_who_leads_who_is_silent_and_what_is_wrong_with_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peers = [{"state": "training"}, {"state": "training"}, {"state": "lost"}]
    face = a_face(monkeypatch, peers=peers, view=2, leads=True, coordinator={"gone_s": 14.0})
    face.look()
    shown = face.metrics.registry.get_sample_value
    assert shown("dugnad_peers", {"state": "training"}) == 2
    assert (shown("dugnad_view"), shown("dugnad_leads")) == (2, 1)
    assert shown("dugnad_coordinator_silent_seconds") == 14.0
    assert shown("dugnad_clock_offset_seconds") == -1.5
    assert shown("dugnad_quarantined_peers") == 1


def test_the_terminal_says_by_which_ways_others_are_reached_and_again_only_when_another_kind_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rates = {"rtt_s": 0.04, "sent_mbit": 9.0, "received_mbit": 9.0}
    paths = [{"peer": "bob", "nickname": "bob", "path": "relayed", **rates}]
    whole: dict[str, Any] = {"peers": [], "view": 0, "leads": False, "coordinator": {"gone_s": 0.0}, "paths": paths}
    face = a_face(monkeypatch, **whole, reach="symmetric", outside="11.0.0.7:50001")
    for _ in range(2):
        face.look()
    paths.append({"peer": "cid", "nickname": "cid", "path": "relayed", **rates})
    face.look()
    (said,) = [one.getMessage() for one in caplog.records]
    assert said == (
        "Paths to 1 peer: 1 relayed (bob). Relayed: your router gives each connection another port (symmetric NAT). "
        "Forward TCP ports 4001 and 4002 to this machine and start it with --port 4001 --announce 11.0.0.7:4001, "
        "or switch on UPnP in the router, and others can reach you directly."
    )
    paths.append({"peer": "dan", "nickname": "dan", "path": "direct", **rates})
    face.look()
    assert caplog.records[-1].getMessage().startswith("Paths to 3 peers: 1 direct, 2 relayed (bob, cid). ")


@pytest.mark.parametrize(
    ("admission", "code", "has_model", "told"),
    [
        ("allow-list", "E401", True, "E401"),
        ("allow-list", "E401", False, ""),
        ("allow-list", "E403", False, "E403"),
        ("invited", "E401", True, ""),
        ("invited", "E102", True, ""),
        ("invited", "E403", True, "E403"),
        ("open", "E403", True, "E403"),
        ("open", None, True, ""),
    ],
)
def test_a_hello_is_judged_by_what_a_name_alone_tells(
    admission: str, code: str | None, has_model: bool, told: str
) -> None:
    refusal = None if code is None else Refusal(code, "in short", "a sentence", "why")
    follower = SimpleNamespace(refuses=lambda peer: refusal, model=b"m" * 32 if has_model else None)
    face = Face(Metrics("volunteer", "ab" * 4))
    assert face.judge(PeerId("eve")) == Verdict(), "before there is a role"
    role: Any = SimpleNamespace(follower=follower, charter=SimpleNamespace(admission=admission))
    face.role = role
    assert face.judge(PeerId("eve")) == Verdict(told, "why" if told else "")
    assert face.bars(PeerId("eve")) == (told == "E403")
