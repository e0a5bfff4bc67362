"""A small internet in network namespaces: hosts of five kinds, as volunteers have them, on one switch.

    public      one === wan 11.0.1.1                                                             ---+
    cone        two 192.168.2.2 --- router, wan 11.0.2.1: one outside port for all destinations  ---+
    symmetric   three 192.168.3.2 --- router, wan 11.0.3.1: another outside port for each one    ---+=== switch
    carrier     four 192.168.4.2 --- router 100.64.4.2 --- the carrier's router, wan 11.0.4.1    ---+
    firewall    five === wan 11.0.5.1, TCP outwards only, and what answers it                    ---+
    restricted  like cone, and who was sent something may connect to any port of the host

Routers and the firewall drop what comes from outside unasked. Public-looking addresses, as libp2p takes private,
carrier-grade and documentation ranges for what they are; nothing leaves the namespaces. Needs root, iproute2, iptables.

    with lab({"hub": "public", "ann": "cone", "bob": "symmetric"}, up_mbit=20) as net:
        subprocess.Popen(net.command("ann", sys.executable, "-m", ...))
        net.address("ann")      # 11.0.2.1, what others see
        net.inside("ann")       # 192.168.2.2, what it has itself
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tests.net import internet
from tests.net.forwarder import Link
from tests.net.internet import run, tbf, within

Kind = Literal["public", "cone", "symmetric", "carrier", "firewall", "restricted"]
KINDS: tuple[Kind, ...] = ("public", "cone", "symmetric", "carrier", "firewall")
"""Those that every pair of is tried."""
ROOT = Path(__file__).parent.parent.parent
_labs = itertools.count(1)
_MAX_HOSTS = 200


def why_not() -> str | None:
    """Why no such lab can be made here; None if it can."""
    if (reason := internet.why_not()) is not None:
        return reason
    if shutil.which("iptables") is None:
        return "iptables not found: install it"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun here"
    return None


@dataclass(frozen=True, slots=True)
class Line:
    """The line between a host's edge, itself or its outermost router, and the switch."""

    up_mbit: float | None = None
    """What the host can send; None: as much as the machine can."""
    delay_s: float = 0.0
    """One way: a round trip between two such hosts takes four times that."""
    loss_rate: float = 0.0
    """0..1, one way."""

    @property
    def is_long(self) -> bool:
        """Whether somebody has to carry its frames."""
        return self.delay_s > 0 or self.loss_rate > 0


class Lab:
    """The hosts of one internet, by name."""

    def __init__(self, prefix: str, hosts: Mapping[str, Kind], lines: Mapping[str, Line]) -> None:
        assert len(hosts) <= _MAX_HOSTS, f"{len(hosts)} hosts, at most {_MAX_HOSTS}"
        self.kinds = dict(hosts)
        self._prefix = prefix
        self._lines = lines
        self._numbers = {name: number for number, name in enumerate(hosts, 1)}
        self._switch = f"{prefix}-switch"
        self._made: list[str] = []
        self._forwarder: subprocess.Popen[str] | None = None

    def address(self, name: str) -> str:
        """The IPv4 address under which the others see a host."""
        return f"11.0.{self._numbers[name]}.1"

    def inside(self, name: str) -> str:
        """The IPv4 address that a host has itself."""
        hidden = self.kinds[name] in ("cone", "symmetric", "carrier", "restricted")
        return f"192.168.{self._numbers[name]}.2" if hidden else self.address(name)

    def command(self, name: str, *command: str) -> list[str]:
        """What to start so that `command` runs on a host."""
        return [*within(self._host(name)), *command]

    def namespace(self, name: str) -> str:
        """The network namespace that is a host."""
        return self._host(name)

    def router(self, name: str, *command: str) -> list[str]:
        """What to start so that `command` runs on the router next to a host."""
        return [*within(f"{self._host(name)}-home"), *command]

    def shape(self, name: str, up_mbit: float) -> None:
        """Let a host send at most so much from now on."""
        run(*within(self._edge(name)), "tc", "qdisc", "replace", "dev", "wan", "root", *tbf(up_mbit))

    def cut(self, name: str) -> None:
        """Take a host from the net: from one moment to the next, nothing comes or goes."""
        run(*within(self._switch), "ip", "link", "set", self._port(name), "nomaster")

    def mend(self, name: str) -> None:
        """Let it back in."""
        run(*within(self._switch), "ip", "link", "set", self._port(name), "master", "bridge")

    def sent_bytes(self, name: str) -> int:
        """What has left a host, its router included, towards the others, since the lab began."""
        return self._count(name, "tx")

    def received_bytes(self, name: str) -> int:
        """What has reached a host, or its router, from the others."""
        return self._count(name, "rx")

    def _count(self, name: str, direction: str) -> int:
        counter = f"/sys/class/net/wan/statistics/{direction}_bytes"  # ip gives what it starts a /sys of the namespace
        return int(run(*within(self._edge(name)), "cat", counter))

    # -- building

    def build(self) -> None:
        """Make everything."""
        self._namespace(self._switch)
        run(*within(self._switch), "ip", "link", "add", "bridge", "type", "bridge")
        self._up(self._switch, "bridge")
        for name in self.kinds:
            self._make_inside(name)
        self._start_forwarder()
        for name in self.kinds:
            self._plug(name)
            self._guard(name)

    def clear(self) -> None:
        """Take away what was made."""
        if self._forwarder is not None:
            self._forwarder.kill()
            self._forwarder.communicate()
        for namespace in self._made:
            with contextlib.suppress(subprocess.CalledProcessError):
                run("ip", "netns", "del", namespace)

    def _make_inside(self, name: str) -> None:
        """A host and its routers, as far as the edge, which has no line yet."""
        host, number, kind = self._host(name), self._numbers[name], self.kinds[name]
        self._namespace(host)
        if self.inside(name) == self.address(name):
            return
        home = self._namespace(f"{host}-home")
        self._join(host, "eth0", f"192.168.{number}.2/24", home, "lan", f"192.168.{number}.1/24")
        run(*within(host), "ip", "route", "add", "default", "via", f"192.168.{number}.1")
        if kind == "carrier":
            carrier = self._namespace(f"{host}-carrier")
            self._join(home, "wan", f"100.64.{number}.2/24", carrier, "lan", f"100.64.{number}.1/24")
            run(*within(home), "ip", "route", "add", "default", "via", f"100.64.{number}.1")

    def _plug(self, name: str) -> None:
        """Give the edge its card `wan` on the switch, by a forwarder's cards where the line is long."""
        edge, port = self._edge(name), self._port(name)
        if not self._lines[name].is_long:
            run("ip", "link", "add", "wan", "netns", edge, "type", "veth", "peer", "name", port, "netns", self._switch)
        run(*within(edge), "ip", "addr", "add", f"{self.address(name)}/16", "dev", "wan")
        self._up(edge, "wan")
        run(*within(self._switch), "ip", "link", "set", port, "master", "bridge", "up")
        if (up_mbit := self._lines[name].up_mbit) is not None:
            self.shape(name, up_mbit)

    def _guard(self, name: str) -> None:
        """Have routers translate addresses, and nothing come in unasked."""
        host, kind = self._host(name), self.kinds[name]
        if kind == "firewall":
            _filter(host, "INPUT", "wan")
            run(*within(host), "iptables", "-A", "OUTPUT", "-o", "wan", "-p", "udp", "-j", "DROP")
        elif kind != "public":
            _translate(f"{host}-home", *(("--random-fully",) if kind == "symmetric" else ()))
        if kind == "carrier":
            _translate(f"{host}-carrier")
        if kind == "restricted":
            _let_known_in(f"{host}-home", self.inside(name))

    def _start_forwarder(self) -> None:
        links = [
            Link((self._edge(name), self._switch), ("wan", self._port(name)), line.delay_s, line.loss_rate)
            for name, line in self._lines.items()
            if line.is_long
        ]
        if not links:
            return
        command = [sys.executable, "-m", "tests.net.forwarder", json.dumps([asdict(link) for link in links])]
        self._forwarder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._forwarder.stdout is not None
        assert self._forwarder.stdout.readline() == "ready\n", "the forwarder does not start"

    def _namespace(self, name: str) -> str:
        run("ip", "netns", "add", name)
        self._made.append(name)
        self._up(name, "lo")
        return name

    def _join(self, one: str, card: str, address: str, other: str, other_card: str, other_address: str) -> None:
        """A cable between two namespaces."""
        run("ip", "link", "add", card, "netns", one, "type", "veth", "peer", "name", other_card, "netns", other)
        for namespace, here, at in ((one, card, address), (other, other_card, other_address)):
            run(*within(namespace), "ip", "addr", "add", at, "dev", here)
            self._up(namespace, here)

    def _up(self, namespace: str, card: str) -> None:
        run(*within(namespace), "ip", "link", "set", card, "up")

    def _host(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _edge(self, name: str) -> str:
        """The namespace of a host that is on the net itself: its own, or its outermost router's."""
        kind = self.kinds[name]
        outermost = "-carrier" if kind == "carrier" else "-home"
        return self._host(name) + ("" if kind in ("public", "firewall") else outermost)

    def _port(self, name: str) -> str:
        return f"p{self._numbers[name]}"


@contextlib.contextmanager
def lab(
    hosts: Mapping[str, Kind],
    *,
    up_mbit: float | None = None,
    delay_s: float = 0.0,
    loss_rate: float = 0.0,
    lines: Mapping[str, Line] | None = None,
) -> Iterator[Lab]:
    """An internet of these hosts, gone afterwards; whatever was started on them has ended by then.

    All have a line of `up_mbit`, `delay_s` and `loss_rate` (see `Line`), but those named in `lines`.
    """
    usual = Line(up_mbit, delay_s, loss_rate)
    made = Lab(f"lab{os.getpid()}x{next(_labs)}", hosts, {name: (lines or {}).get(name, usual) for name in hosts})
    try:
        made.build()
        yield made
    finally:
        made.clear()


def _translate(router: str, *how: str) -> None:
    """Let a router's LAN out under the router's address, and in only what answers."""
    run(*within(router), "sysctl", "-qw", "net.ipv4.ip_forward=1")
    run(*within(router), "iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "wan", "-j", "MASQUERADE", *how)
    run(*within(router), "iptables", "-P", "FORWARD", "DROP")
    run(*within(router), "iptables", "-A", "FORWARD", "-i", "lan", "-o", "wan", "-j", "ACCEPT")
    passed_on = ("-m", "conntrack", "--ctstate", "DNAT")  # by a UPnP daemon, if one is started there
    run(*within(router), "iptables", "-A", "FORWARD", "-i", "wan", *passed_on, "-j", "ACCEPT")
    _filter(router, "FORWARD", "wan", last=())
    _filter(router, "INPUT", "wan")


def _let_known_in(router: str, host: str) -> None:
    """Have a router pass on what comes from any address to which something was sent (RFC 4787: address-dependent)."""
    known = ("-m", "recent", "--name", "known")
    run(*within(router), "iptables", "-I", "FORWARD", "-i", "lan", *known, "--set", "--rdest")
    run(
        *within(router), "iptables", "-t", "nat", "-A", "PREROUTING", "-i", "wan", "-p", "tcp",
        *known, "--rcheck", "--rsource", "-j", "DNAT", "--to", host,
    )  # fmt: skip


def _filter(namespace: str, chain: str, card: str, last: tuple[str, ...] = ("-j", "DROP")) -> None:
    rule = ("iptables", "-A", chain, "-i", card)
    run(*within(namespace), *rule, "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
    if last:
        run(*within(namespace), *rule, *last)
