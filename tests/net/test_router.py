"""A home router that passes ports on when asked by UPnP (miniupnpd): who is behind it is open."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dugnad.dht.multiaddrs import port_of
from dugnad.dht.paths import Reach
from tests.net.lab import Lab, lab, why_not
from tests.net.reach_peer import Peers

REASON = why_not() or (None if shutil.which("miniupnpd") and shutil.which("nft") else "miniupnpd or nft not found")
pytestmark = [pytest.mark.net, pytest.mark.skipif(REASON is not None, reason=REASON or "")]
pytest.importorskip("miniupnpc", reason="it has no wheel for this Python or platform")

RULES = """
table inet filter {
    chain miniupnpd { }
    chain prerouting_miniupnpd { }
    chain postrouting_miniupnpd { }
    chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
    chain postrouting { type nat hook postrouting priority 90; jump postrouting_miniupnpd; }
}
"""
SETTINGS = """
ext_ifname=wan
listening_ip=lan
enable_upnp=yes
enable_natpmp=no
secure_mode=yes
uuid=17dd0e17-0ca9-42f9-ad29-48184b0ed161
allow 1024-65535 0.0.0.0/0 1024-65535
"""


@contextlib.contextmanager
def passing_ports_on(net: Lab, name: str, folder: Path) -> Iterator[None]:
    """The router next to a host does, for as long as this lasts."""
    settings = folder / "miniupnpd.conf"
    settings.write_text(SETTINGS)
    subprocess.run(net.router(name, "nft", "-f", "-"), input=RULES, text=True, check=True)
    command = net.router(name, "miniupnpd", "-d", "-f", str(settings), "-P", str(folder / "pid"))
    with (folder / "router.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as daemon:
        try:
            deadline = time.monotonic() + 10
            while b"listening on port" not in (folder / "router.log").read_bytes():
                assert time.monotonic() < deadline, (folder / "router.log").read_text()
                time.sleep(0.05)
            yield
        finally:
            daemon.terminate()


def test_who_is_behind_a_router_that_passes_ports_on_is_open_and_relays_for_others(tmp_path: Path) -> None:
    with lab({"hub": "public", "home": "cone", "far": "symmetric"}) as net, contextlib.ExitStack() as stack:
        peers = stack.enter_context(contextlib.closing(Peers(net, tmp_path)))
        hub = peers.begin("hub").host
        stack.enter_context(passing_ports_on(net, "home", tmp_path))
        home = peers.begin("home", bootstrap=hub.addresses()[:1]).host
        assert home.reach is Reach.OPEN
        ((inside, outside),) = home.open_ports.items()
        assert home.addresses()[0].startswith(f"/ip4/{net.address('home')}/tcp/{outside}/p2p/")
        assert inside == port_of(home.addresses()[-1])
        far = peers.begin("far", bootstrap=home.addresses()[:1]).host
        assert home.peer_id in far.addresses()[0], "its relay"
        assert peers.asks("hub", "far", 1_000_000)
