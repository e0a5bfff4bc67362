"""Asking the router next to us, by UPnP, to pass ports on to this machine. Many home routers do; most others ignore it.

Whether it helps, only those outside can tell: a router that translates addresses may itself be behind another one.
"""

import asyncio
import contextlib
import ipaddress
import logging
import random
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)

DISCOVER_S = 1.0
"""How long routers may take to say that they are there."""
LEASE_S = 3600
ASK_S = 3.0
_OTHER_PORTS = 3
"""Outside ports that are tried at random when ours is taken."""


class Router:
    """The router, if one was found and lets itself be asked."""

    def __init__(self) -> None:
        self.outside_ports: dict[int, int] = {}
        """Our ports that it passes on, and the ports outside that lead to them."""
        self.outside_ip: str | None = None
        """Its address outside, by its own word."""
        self._gateway: Any = None

    async def discover(self) -> None:
        """Look whether there is one; takes a second."""
        await _in_a_thread(self._discover, DISCOVER_S + ASK_S)

    async def pass_on(self, ports: Sequence[int]) -> None:
        """Have it pass on these TCP ports, or go on doing so, for an hour."""
        if self._gateway is not None:
            await _in_a_thread(lambda: self._pass_on(ports), ASK_S * len(ports))

    async def forget(self) -> None:
        """Take it back; never fails."""
        if self.outside_ports:
            await _in_a_thread(self._forget, ASK_S)

    def _discover(self) -> None:
        try:
            import miniupnpc
        except ImportError:  # there is none for this Python or platform
            return
        gateway = miniupnpc.UPnP()
        gateway.discoverdelay = int(DISCOVER_S * 1000)
        if gateway.discover() > 0:
            gateway.selectigd()
            self.outside_ip = _checked(gateway.externalipaddress())
            self._gateway = gateway

    def _pass_on(self, ports: Sequence[int]) -> None:
        for port in ports:
            candidates = [self.outside_ports.get(port, port), *random.sample(range(20_000, 60_000), _OTHER_PORTS)]
            for outside in candidates:
                with contextlib.suppress(Exception):  # it raises nothing narrower, as when the port is another's
                    if self._gateway.addportmapping(outside, "TCP", self._gateway.lanaddr, port, "dugnad", "", LEASE_S):
                        self.outside_ports[port] = outside
                        break

    def _forget(self) -> None:
        while self.outside_ports:
            _, outside = self.outside_ports.popitem()
            self._gateway.deleteportmapping(outside, "TCP")


def _checked(text: str) -> str | None:
    """What a router says that its address is, if it is one."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


async def _in_a_thread(work: Any, timeout_s: float) -> None:
    """Do what blocks, as long as we are willing to wait; what a router does wrong is no news."""
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.to_thread(work)
    except TimeoutError:
        logger.debug("the router takes too long")
    except Exception as error:  # miniupnpc raises nothing narrower
        logger.debug("the router can't be asked: %s", error)
