"""A small internet of network namespaces: hosts on one switch, each with a line of its own.

    host 1 (11.0.0.1) ---+
    host 2 (11.0.0.2) ---+=== switch
    ...               ---+

Public-looking addresses, as libp2p does not announce others; nothing leaves the namespaces. Needs root, `ip` and `tc`.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence


def why_not() -> str | None:
    """Why no such internet can be made here; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    name = f"dugnad{os.getpid()}-try"
    try:
        run("ip", "netns", "add", name)
        try:
            run("ip", "link", "add", "p0", "netns", name, "type", "veth", "peer", "name", "p1", "netns", name)
            run(*within(name), "tc", "qdisc", "add", "dev", "p0", "root", *tbf(1))
        finally:
            run("ip", "netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return None


class Internet:
    """The hosts of one internet, by number from 1 on."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    @staticmethod
    def address(number: int) -> str:
        """The IPv4 address of a host."""
        return f"11.0.0.{number}"

    def command(self, number: int, *command: str) -> list[str]:
        """What to start so that `command` runs on a host."""
        return [*within(self._name(number)), *command]

    def shape(self, number: int, up_mbit: float) -> None:
        """Let a host send at most so much from now on."""
        run(*self.command(number, "tc", "qdisc", "replace", "dev", "wan", "root", *tbf(up_mbit)))

    def split(self, *numbers: int) -> None:
        """These hosts, and only these, reach each other from now on; so do the others."""
        for number in numbers:
            self._to_bridge(number, "other")

    def heal(self, *numbers: int) -> None:
        """These hosts reach all others again."""
        for number in numbers:
            self._to_bridge(number, "bridge")

    def _to_bridge(self, number: int, bridge: str) -> None:
        run(*within(f"{self._prefix}-switch"), "ip", "link", "set", f"p{number}", "master", bridge)

    def _name(self, number: int) -> str:
        return f"{self._prefix}-{number}"

    def _plug(self, number: int, switch: str) -> None:
        name, port = self._name(number), f"p{number}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", "wan", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
        run(*within(name), "ip", "addr", "add", f"{self.address(number)}/24", "dev", "wan")
        for link in ("lo", "wan"):
            run(*within(name), "ip", "link", "set", link, "up")
        run(*within(switch), "ip", "link", "set", port, "master", "bridge", "up")


@contextlib.contextmanager
def internet(num_hosts: int) -> Iterator[Internet]:
    """An internet of so many hosts, gone afterwards; whatever was started on them has ended by then."""
    prefix = f"dugnad{os.getpid()}"
    net, switch = Internet(prefix), f"{prefix}-switch"
    try:
        run("ip", "netns", "add", switch)
        for bridge in ("bridge", "other"):
            run(*within(switch), "ip", "link", "add", bridge, "type", "bridge")
            run(*within(switch), "ip", "link", "set", bridge, "up")
        for number in range(1, num_hosts + 1):
            net._plug(number, switch)
        yield net
    finally:
        for name in [*(net._name(number) for number in range(1, num_hosts + 1)), switch]:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                run("ip", "netns", "del", name)


def within(namespace: str) -> Sequence[str]:
    """What to put before a command so that it runs in a namespace."""
    return ("ip", "netns", "exec", namespace)


def tbf(mbit: float) -> Sequence[str]:
    """What `tc` is told so that a card sends at most so much."""
    return ("tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "200ms")


def run(*command: str) -> str:
    """What a command prints. Raises CalledProcessError if it fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
