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
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "link", "add", "p0", "netns", name, "type", "veth", "peer", "name", "p1", "netns", name)
            _run(*_within(name), "tc", "qdisc", "add", "dev", "p0", "root", *_tbf(1))
        finally:
            _run("ip", "netns", "del", name)
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
        return [*_within(self._name(number)), *command]

    def shape(self, number: int, up_mbit: float) -> None:
        """Let a host send at most so much from now on."""
        _run(*self.command(number, "tc", "qdisc", "replace", "dev", "wan", "root", *_tbf(up_mbit)))

    def split(self, *numbers: int) -> None:
        """These hosts, and only these, reach each other from now on; so do the others."""
        for number in numbers:
            self._to_bridge(number, "other")

    def heal(self, *numbers: int) -> None:
        """These hosts reach all others again."""
        for number in numbers:
            self._to_bridge(number, "bridge")

    def _to_bridge(self, number: int, bridge: str) -> None:
        _run(*_within(f"{self._prefix}-switch"), "ip", "link", "set", f"p{number}", "master", bridge)

    def _name(self, number: int) -> str:
        return f"{self._prefix}-{number}"

    def _plug(self, number: int, switch: str) -> None:
        name, port = self._name(number), f"p{number}"
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", "wan", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
        _run(*_within(name), "ip", "addr", "add", f"{self.address(number)}/24", "dev", "wan")
        for link in ("lo", "wan"):
            _run(*_within(name), "ip", "link", "set", link, "up")
        _run(*_within(switch), "ip", "link", "set", port, "master", "bridge", "up")


@contextlib.contextmanager
def internet(num_hosts: int) -> Iterator[Internet]:
    """An internet of so many hosts, gone afterwards; whatever was started on them has ended by then."""
    prefix = f"dugnad{os.getpid()}"
    net, switch = Internet(prefix), f"{prefix}-switch"
    try:
        _run("ip", "netns", "add", switch)
        for bridge in ("bridge", "other"):
            _run(*_within(switch), "ip", "link", "add", bridge, "type", "bridge")
            _run(*_within(switch), "ip", "link", "set", bridge, "up")
        for number in range(1, num_hosts + 1):
            net._plug(number, switch)
        yield net
    finally:
        for name in [*(net._name(number) for number in range(1, num_hosts + 1)), switch]:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                _run("ip", "netns", "del", name)


def _within(namespace: str) -> Sequence[str]:
    return ("ip", "netns", "exec", namespace)


def _tbf(mbit: float) -> Sequence[str]:
    return ("tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "200ms")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
