"""Where this machine can be listened on: its addresses, and which TCP ports nobody would have to share."""

import errno
import ipaddress
import socket

import psutil

from dugnad.dht.multiaddrs import IpAddress
from dugnad.dht.transport import ListenError, PortInUse


def everywhere(address: str) -> tuple[str, ...]:
    """A multiaddr to listen on; if it means all IPv4 addresses, those of IPv6 too, on the same port, where there are.

    Port 0, which means any that is free, becomes a certain one then.
    """
    if not address.startswith("/ip4/0.0.0.0/tcp/") or not socket.has_ipv6:
        return (address,)
    try:
        with socket.socket(socket.AF_INET6) as first, socket.socket() as second:
            first.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            for probe, host in ((first, "::"), (second, "0.0.0.0")):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, int(address.rpartition("/")[2]) or first.getsockname()[1]))
            port = first.getsockname()[1]
    except (OSError, OverflowError):  # no IPv6 here, or the port is taken, which the daemon finds out
        return (address,)
    return f"/ip4/0.0.0.0/tcp/{port}", f"/ip6/::/tcp/{port}"


def card_addresses() -> list[IpAddress]:
    """The IP addresses of this machine's network cards."""
    found = [one for many in psutil.net_if_addrs().values() for one in many]
    return [
        ipaddress.ip_address(one.address.partition("%")[0])
        for one in found
        if one.family in (socket.AF_INET, socket.AF_INET6)
    ]


def check_free(address: str) -> None:
    """Raises PortInUse or ListenError for a multiaddr that can't be listened on.

    Tried with a socket that does not share: p2pd and the carrier do (SO_REUSEPORT), and would get a busy port silently.
    """
    match address.split("/")[1:]:
        case ["ip4", host, "tcp", port] if port.isdecimal():
            family = socket.AF_INET
        case ["ip6", host, "tcp", port] if port.isdecimal():
            family = socket.AF_INET6
        case _:
            raise ListenError(address, "not an address to listen on; like /ip4/0.0.0.0/tcp/4001 (TCP only)")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if family is socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else the last run's closing connections count
        try:
            probe.bind((host, int(port)))
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise PortInUse(address) from error
            raise ListenError(address, why_not(error)) from error


def why_not(error: OSError | OverflowError) -> str:
    """Why a port can't be listened on, other than that it is taken, and what to do."""
    if isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL:
        return "not an address of this machine. Choose another --host; 0.0.0.0 is all of its addresses."
    said = error.strerror if isinstance(error, OSError) else error
    return f"can't be listened on: {said}. Choose another port, above 1023, or another --host."
