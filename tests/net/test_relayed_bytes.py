"""A relay passes on no more than it gives, in bytes on its wire."""

import time
from pathlib import Path

import pytest

from dugnad.dht.allowance import FREE_BYTES
from dugnad.dht.budget import BURST_S
from tests.net.fleet import fleet
from tests.net.lab import Kind, lab, why_not

pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(240),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

GIVE_MBIT, NUM_BYTES = 8.0, 6 * 2**20


def test_what_two_send_each_other_through_a_relay_stays_within_what_it_gives(tmp_path: Path) -> None:
    hosts: dict[str, Kind] = {"hub": "public", "ann": "cone", "sym": "symmetric"}
    with lab(hosts) as net, fleet(net, tmp_path) as peers:
        peers.begin("hub", give_mbit=GIVE_MBIT)
        ann, sym = peers.begin("ann", "sym")
        assert ann.ask(do="connect", to=[sym.peer], within_s=30)[sym.peer]["path"] == "relayed"
        since, before = time.monotonic(), net.sent_bytes("hub")
        said = ann.ask(do="give", to=sym.peer, bytes=NUM_BYTES)
        took_s, sent = time.monotonic() - since, net.sent_bytes("hub") - before
    assert said["path"] == "relayed"
    rate, control = GIVE_MBIT * 1e6 / 8, 50_000 * took_s
    assert NUM_BYTES <= sent <= 1.1 * ((took_s + BURST_S) * rate + FREE_BYTES) + control
    assert said["seconds"] <= 1.5 * NUM_BYTES / rate, "what it gives is used"
