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
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "HOST:PORT", of IPv6 "[HOST]:PORT". Raises ValueError for anything else."""
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        number = int(port) if port.isdecimal() and len(port) <= 5 else 0
        if not 0 < number < 65536:
            raise ValueError(f"{text!r} has no port")
        ipaddress.ip_address(host)
        return cls(host, number)
