"""Why a peer is idle, slow, relayed or refused: from a status to sentences."""

from typing import Any

import pytest

from dugnad.peer.members import rows, text
from dugnad.peer.why import words


def status(**changed: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "role": "volunteer",
        "state": "waiting",
        "reason": "waiting for 2 more peers",
        "leads": False,
        "coordinator": {"alive": True, "gone_s": 0.0},
        "peers": [],
    }
    return whole | changed


def peer(name: str, state: str, step: int = 0) -> dict[str, Any]:
    return {"peer": f"12D3{name}", "nickname": name, "state": state, "reason": "", "round": 7, "step": step}


def path(name: str, way: str, sent: float = 9.0, received: float = 9.0) -> dict[str, Any]:
    rates = {"sent_mbit": sent, "received_mbit": received}
    return {"peer": f"12D3{name}", "nickname": name, "path": way, "rtt_s": 0.0421, **rates}


FORWARD = (
    "Forward TCP ports 4001 and 4002 to this machine and start it with --port 4001 --announce {}:4001, or switch on "
    "UPnP in the router, and others can reach you directly."
)
TRAINING = "Training: step 3 of 10."
training = status(state="training", step=3, of_steps=10)
CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("starting", {}, ["It is just starting: it looks for the run, and takes what it needs."]),
    ("idle", status(state_s=75.0), ["Idle, for 1 min 15 s: waiting for 2 more peers."]),
    ("training", training | {"tokens_per_s": 410.4}, ["Training: step 3 of 10, 410 tokens/s."]),
    (
        "training before the first step is known",
        status(state="training", reason="round 7: training 10 steps with 3 peers"),
        ["Training: round 7: training 10 steps with 3 peers."],
    ),
    (
        "downloading",
        status(state="syncing", reason="taking the model: 312 MB from 4 peers, 26 s left"),
        ["Not training yet: taking the model: 312 MB from 4 peers, 26 s left."],
    ),
    (
        "waiting for the slow",
        status(
            state="contributed",
            reason="waiting for the frozen set",
            peers=[peer("ann", "training", 4), peer("bob", "reducing"), peer("eve", "lost")],
        ),
        ["Exchanging: waiting for the frozen set.", "Still training: ann (step 4).", "Lost, and not waited for: eve."],
    ),
    (
        "idle while others train",
        status(peers=[peer(name, "training") for name in ("ann", "bob", "cid", "dan", "eve")]),
        ["Idle: waiting for 2 more peers.", "Still training: ann, bob, cid and 2 more."],
    ),
    (
        "a coordinator",
        status(role="coordinator", state="gather", reason="0 of 2 contributions held", leads=True),
        ["Leading, gather: 0 of 2 contributions held."],
    ),
    (
        "no coordinator",
        training | {"coordinator": {"alive": False, "gone_s": 14.0}},
        [
            TRAINING,
            "The coordinator has been gone for 14 s. Another volunteer leads the rounds meanwhile; nothing is lost.",
        ],
    ),
    (
        "no coordinator, and we lead",
        training | {"coordinator": {"alive": False, "gone_s": 14.0}, "leads": True},
        [TRAINING, "The coordinator has been gone for 14 s. This peer leads the rounds meanwhile; nothing is lost."],
    ),
    (
        "a wrong clock",
        training | {"clock_warning": "this machine's clock is 8 s fast; corrected against 5 peers"},
        [
            TRAINING,
            "This machine's clock is 8 s fast; corrected against 5 peers. Set it; the run goes on all the same.",
        ],
    ),
    (
        "refused by all",
        training | {"out": True},
        [
            "Refused: this peer's key is proven to have said two things, so nobody in the run counts it any more. Was "
            "its folder copied? Stop both, and join as someone new:  dugnad identity new --force --dir DIR",
            TRAINING,
        ],
    ),
    (
        "a key in use",
        training | {"key_in_use": True},
        [
            "E402 another running peer signs with this peer's key. If both vote, both are out: stop one of them, and "
            "give it a key of its own:  dugnad identity new --force --dir DIR",
            TRAINING,
        ],
    ),
    (
        "not admitted",
        status(refused="E401 you are not on the allow-list."),
        ["E401 you are not on the allow-list.", "Idle: waiting for 2 more peers."],
    ),
    (
        "all direct",
        training | {"reach": "open", "paths": [path("ann", "direct"), path("bob", "direct")]},
        [TRAINING, "Paths to 2 peers: 2 direct."],
    ),
    (
        "punched",
        training | {"reach": "cone", "paths": [path("ann", "punched")]},
        [
            TRAINING,
            "Paths to 1 peer: 1 punched.",
            "Behind a router, through which direct paths were opened: nothing to do.",
        ],
    ),
    (
        "relayed by a symmetric router",
        training
        | {"reach": "symmetric", "outside": "11.0.0.7:50001", "paths": [path("ann", "direct"), path("bob", "relayed")]},
        [
            TRAINING,
            "Paths to 2 peers: 1 direct, 1 relayed (bob).",
            "Relayed: your router gives each connection another port (symmetric NAT). " + FORWARD.format("11.0.0.7"),
        ],
    ),
    (
        "relayed by the others' routers",
        training | {"reach": "cone", "paths": [path("bob", "relayed")]},
        [
            TRAINING,
            "Paths to 1 peer: 1 relayed (bob).",
            "Behind a router: direct paths can be opened to most, but not to peers whose own router gives each "
            "connection another port. " + FORWARD.format("HOST"),
        ],
    ),
    (
        "relayed, and it is known why",
        training | {"reach": "open", "paths": [path("bob", "relayed") | {"why": "no answer in 5 s"}]},
        [
            TRAINING,
            "Paths to 1 peer: 1 relayed (bob).",
            "No direct way to bob: no answer in 5 s.",
            "Others can connect to this machine, so a relayed path becomes direct once they do.",
        ],
    ),
    (
        "relayed, and nobody knows why",
        training | {"reach": "unknown", "paths": [path("bob", "relayed")]},
        [
            TRAINING,
            "Paths to 1 peer: 1 relayed (bob).",
            "E203 inbound blocked: going on through a relay. Slower, still useful. " + FORWARD.format("HOST"),
        ],
    ),
    (
        "relayed though open",
        training | {"reach": "open", "paths": [path("bob", "relayed")]},
        [
            TRAINING,
            "Paths to 1 peer: 1 relayed (bob).",
            "Others can connect to this machine, so a relayed path becomes direct once they do.",
        ],
    ),
    (
        "some who were reached are gone",
        training
        | {
            "peers": [peer("ann", "training"), peer("bob", "lost")],
            "coordinator": {"peer": "12D3amber", "alive": False, "gone_s": 12.0},
            "paths": [path(name, "direct") for name in ("amber", "ann", "bob", "eve")],
        },
        [
            TRAINING,
            "The coordinator has been gone for 12 s. Another volunteer leads the rounds meanwhile; nothing is lost.",
            "Paths to 1 peer: 1 direct.",
        ],
    ),
    (
        "slow",
        training | {"paths": [path("ann", "direct", 0.2, 0.44), path("bob", "direct", 0.0, 0.0)]},
        [
            TRAINING,
            "Paths to 2 peers: 2 direct.",
            "Slow paths: ann (0.4 Mbit/s). Relayed or not, these hold up an exchange the most.",
        ],
    ),
]


@pytest.mark.parametrize(("said", "sentences"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_a_role_says_of_itself_becomes_sentences(said: dict[str, Any], sentences: list[str]) -> None:
    assert words(said) == sentences


def test_the_members_are_listed_with_what_is_known_of_each_and_nothing_is_made_up() -> None:
    said = status(
        peers=[
            peer("bob", "training"),
            peer("ann", "waiting"),
            {"peer": "12D3cid", "nickname": "cid", "state": "unknown"},
        ],
        paths=[path("bob", "punched", 18.24, 0.0), path("amber", "direct"), path("eve", "direct")],
        coordinator={"peer": "12D3amber", "alive": True, "gone_s": 0.0},
    )  # amber, the coordinator, is on no list of volunteers; eve was there some minutes ago
    assert text(rows(said)) == (
        "nickname  state     round  path     rtt ms  up Mbit/s  down Mbit/s  key\n"
        "amber     -         -      direct   42      9.0        9.0          12D3amber\n"
        "ann       waiting   7      -        -       -          -            12D3ann\n"
        "bob       training  7      punched  42      18.2       -            12D3bob\n"
        "cid       unknown   -      -        -       -          -            12D3cid"
    )
    assert rows(said)[2] == {
        "peer": "12D3bob", "nickname": "bob", "state": "training", "round": 7, "path": "punched", "rtt_s": 0.0421,
        "up_mbit": 18.24, "down_mbit": None,
    }  # fmt: skip


def test_where_nobody_is_known_that_is_said() -> None:
    assert text(rows({})) == "nobody else is known here yet"
