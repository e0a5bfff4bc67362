"""An IP address and a TCP port, as direct connections name them."""

import ipaddress
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a socket is or leads; host: a numeric address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.is_ipv6 else f"{self.host}:{self.port}"

    @property
    def is_ipv6(self) -> bool:
        """Whether it is an address of IPv6, not of IPv4."""
        return ":" in self.host

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "HOST:PORT", of IPv6 "[HOST]:PORT", without a zone. Raises ValueError for anything else."""
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        number = int(port) if port.isdecimal() and len(port) <= 5 else 0
        if not 0 < number < 65536:
            raise ValueError(f"{text!r} has no port")
        if "%" in host:  # the name of a card of ours, or a word that would be looked up
            raise ValueError(f"{text!r} has a zone")
        return cls(str(ipaddress.ip_address(host)), number)  # in one spelling, to be compared
