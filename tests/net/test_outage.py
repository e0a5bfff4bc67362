"""A line that fails for longer than connections last: afterwards all is as before."""

import time
from collections.abc import Iterator

import pytest

from dugnad.dht.connection import PING_S, SILENCE_S
from tests.net.fleet import Fleet, fleet
from tests.net.lab import Lab, lab, why_not

pytestmark = [
    pytest.mark.net,
    pytest.mark.soak,
    pytest.mark.timeout(240),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

BACK_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def net() -> Iterator[Lab]:
    with lab({"hub": "public", "ann": "cone"}) as made:
        yield made


@pytest.fixture(scope="module")
def peers(net: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(net, tmp_path_factory.mktemp("peers")) as made:
        made.begin("hub")
        made.begin("ann")
        yield made


def how_ann_is_seen(peers: Fleet, *, within_s: float) -> tuple[str, str]:
    deadline = time.monotonic() + within_s
    while True:
        state = peers.members["ann"].ask(do="state")
        if state["outside"] or time.monotonic() > deadline:
            return state["outside"], state["reach"]
        time.sleep(0.2)


def test_a_peer_behind_a_router_can_be_punched_again_after_an_outage(net: Lab, peers: Fleet) -> None:
    before = how_ann_is_seen(peers, within_s=20)
    assert before[1] == "cone"
    net.cut("ann")
    time.sleep(SILENCE_S + 2 * PING_S)
    assert how_ann_is_seen(peers, within_s=0)[0] == ""
    net.mend("ann")
    assert how_ann_is_seen(peers, within_s=BACK_WITHIN_S) == before
