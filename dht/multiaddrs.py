"""What can be read off a multiaddr: whether we can use it, whether it is direct, and from how far it can be dialled."""

import contextlib
import ipaddress
import re
from collections.abc import Iterable

from dugnad.dht.identity import PeerId

MAX_CHARACTERS = 256
CIRCUIT = "/p2p-circuit"

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_PORT = re.compile(r"[0-9]{1,5}")

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def usable(address: str) -> bool:
    """Whether it means plain TCP to a host and port that can be, directly or through a relay.

    Not over QUIC, where the ends of replies get lost. What is not usable may not even be looked up: that can raise.
    """
    if len(address) > MAX_CHARACTERS or port_of(address) is None:
        return False
    _, family, host, _, _, *rest = address.split("/")
    return _can_be(family, host) and rest[:1] in ([], ["p2p"])


def _can_be(family: str, host: str) -> bool:
    """Whether there may be such an IP address or name."""
    if family in ("dns", "dns4", "dns6"):
        return _NAME.fullmatch(host) is not None
    ip = ip_of(f"/{family}/{host}")
    return ip is not None and family == f"ip{ip.version}" and "%" not in host


def is_direct(address: str) -> bool:
    """Whether it leads to the peer itself, not through a relay."""
    return CIRCUIT not in address


def ip_of(address: str) -> IpAddress | None:
    """The IP address that is dialled first; None for a name, or for what is none."""
    parts = address.split("/", 3)
    if len(parts) < 3 or parts[0] or parts[1] not in ("ip4", "ip6"):
        return None
    try:
        return ipaddress.ip_address(parts[2])
    except ValueError:
        return None


def host_of(address: str) -> str | None:
    """The IP address or name that is dialled first."""
    parts = address.split("/", 3)
    return parts[2] if len(parts) > 2 and not parts[0] else None


def port_of(address: str) -> int | None:
    """The TCP port that is dialled first; None if there is none that could be dialled."""
    parts = address.split("/")
    return _port(parts[4]) if len(parts) >= 5 and not parts[0] and parts[3] == "tcp" else None


def _port(text: str) -> int | None:
    return int(text) if _PORT.fullmatch(text) and 0 < int(text) <= 65535 else None


def nearness(address: str) -> int:
    """From how near it can be dialled: 0 from anywhere, 1 in a private network, 2 on this link or machine."""
    ip = ip_of(address)
    if ip is None:  # a name
        return 2 if address.split("/")[2:3] == ["localhost"] else 0
    return 2 if ip.is_loopback or ip.is_link_local else int(not ip.is_global)


def is_public(address: str) -> bool:
    """Whether it leads to the peer itself from anywhere."""
    return is_direct(address) and nearness(address) == 0


def is_local(address: str) -> bool:
    """Whether it leads no farther than this machine, or, to listen on, lets nobody else in."""
    return nearness(address) == 2


def reaching_out(addresses: Iterable[str]) -> tuple[str, ...]:
    """Those that lead farther than this machine; all, if none does."""
    known = tuple(dict.fromkeys(addresses))
    return tuple(address for address in known if not is_local(address)) or known


def on_tcp(ip: str, port: int) -> str:
    """The multiaddr of a TCP port."""
    return f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}"


def in_short(address: str) -> str:
    """HOST:PORT of a TCP port on this machine, HOST alone for port 0; anything else as it is."""
    match address.split("/"):
        case ["", "ip4" | "ip6" as kind, host, "tcp", port]:
            bracketed = f"[{host}]" if kind == "ip6" else host
            return f"{bracketed}:{port}" if port != "0" else host
    return address


def peer_of(address: str) -> PeerId:
    """Who is at the end of it: what follows the last /p2p/."""
    return PeerId(address.rpartition("/p2p/")[2])


def place_of(text: str) -> str:
    """The multiaddr of HOST:PORT, as people write it: an IP address, one of IPv6 in brackets, or a name.

    Raises ValueError, with a sentence, for anything else.
    """
    host, _, digits = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (port := _port(digits)) is not None:
        with contextlib.suppress(ValueError):
            return on_tcp(str(ipaddress.ip_address(bare)), port)
        if _NAME.fullmatch(host):
            return f"/dns/{host}/tcp/{port}"
    raise ValueError(f"{text}: not HOST:PORT, like 203.0.113.7:4001, [2001:db8::7]:4001 or example.org:4001")


def relay_of(address: str) -> tuple[PeerId, str] | None:
    """The relay that a circuit goes through, and its own multiaddr without its name."""
    place, circuit, _ = address.partition(CIRCUIT)
    at, _, relay = place.rpartition("/p2p/")
    return (PeerId(relay), at) if circuit and at else None


def in_order(outside: Iterable[str], circuits: Iterable[str], own: Iterable[str]) -> tuple[str, ...]:
    """What a peer tells of where it is, those that reach farthest first, without doubles.

    outside: multiaddrs that others were seen to reach; circuits: those through relays; own: those of its network cards.
    Of these, public ones come last: a firewall keeps others out, and at most neighbours can use them.
    """
    cards = sorted((address for address in own if is_direct(address)), key=lambda each: nearness(each) or 3)
    return tuple(dict.fromkeys(address for address in (*outside, *circuits, *cards) if usable(address)))
