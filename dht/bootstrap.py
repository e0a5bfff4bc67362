"""The first contact: from addresses in an invite to connections, or to a precise reason for each that led nowhere."""

import asyncio
import re
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Self

from dugnad.dht.daemon import DaemonRefused
from dugnad.dht.identity import PeerId, public_key_of
from dugnad.dht.multiaddrs import usable
from dugnad.dht.transport import BootstrapError

PROBE_S = 5.0

Connect = Callable[[PeerId, Sequence[str]], Awaitable[None]]
"""Connects to a peer under the given multiaddrs; raises DaemonRefused."""

_PORT = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d{1,5})(?=/p2p|$)")
_OTHER_ID = re.compile(r"remote key matches (\w+)")


@dataclass(frozen=True, slots=True)
class Address:
    """A multiaddr of a peer on TCP: where to knock, and who should answer."""

    text: str
    host: str
    port: int
    relay: str
    """What follows the port: "" or "/p2p/RELAY/p2p-circuit"."""
    peer: PeerId

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError, with a sentence, for anything else."""
        place, _, peer = text.rpartition("/p2p/")
        found = _PORT.match(place)
        try:
            public_key_of(PeerId(peer))
        except ValueError:
            found = None
        if found is None or not usable(text):
            raise ValueError("not the address of a peer: those look like /ip4/HOST/tcp/PORT/p2p/12D3KooW...")
        return cls(text, found[1], int(found[2]), place[found.end() :], PeerId(peer))

    @property
    def shown(self) -> str:
        """host:port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Contacts:
    """Who answered, without doubles and without ourselves, and (address, reason) of what led nowhere."""

    peers: tuple[PeerId, ...]
    failures: tuple[tuple[str, str], ...]


async def join(addresses: Sequence[str], me: PeerId, connect: Connect) -> Contacts:
    """Connect to all `addresses` at once.

    Raises BootstrapError if nobody did, unless there is nobody to ask but ourselves.
    """
    # one dial of a peer at a time: libp2p joins dials of the same peer, and their reasons would get mixed up
    turns: defaultdict[PeerId, asyncio.Lock] = defaultdict(asyncio.Lock)
    results = await asyncio.gather(*(_try(address, me, connect, turns) for address in addresses))
    reached = [result for result in results if isinstance(result, Address)]
    failures = tuple(result for result in results if not isinstance(result, Address))
    if failures and not reached:
        raise BootstrapError(failures)
    return Contacts(tuple(dict.fromkeys(address.peer for address in reached if address.peer != me)), failures)


class _NoContact(Exception):
    """The reason why an address leads nowhere."""


async def _try(
    text: str, me: PeerId, connect: Connect, turns: defaultdict[PeerId, asyncio.Lock]
) -> Address | tuple[str, str]:
    try:
        address = Address.parse(text)
    except ValueError as error:
        return text, str(error)
    if address.peer == me:
        return address
    try:
        place = await _knock(address) + address.relay
        async with turns[address.peer]:
            await _greet(address, place, connect)
    except _NoContact as error:
        return address.shown, str(error)
    return address


async def _knock(address: Address) -> str:
    """The multiaddr, with its name resolved, that takes a TCP connection. From libp2p all failures sound the same."""
    try:
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except TimeoutError:
        raise _NoContact(f"no answer in {PROBE_S:.0f} s (firewall, or host down)") from None
    except ConnectionRefusedError:
        raise _NoContact("refused (host up, nothing listening)") from None
    except socket.gaierror as error:
        raise _NoContact(f"cannot resolve {address.host} ({error.strerror or error})") from None
    except (OSError, OverflowError, ValueError) as error:  # of a host or port that can't be, the last two
        raise _NoContact(f"no way there ({getattr(error, 'strerror', None) or error})") from None
    host, port = writer.get_extra_info("peername")[:2]
    writer.close()
    return f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}"


async def _greet(address: Address, place: str, connect: Connect) -> None:
    try:
        await connect(address.peer, [place])
    except DaemonRefused as error:
        # one line for each address that the daemon knows of this peer, earlier ones too
        lines = [line for line in str(error).splitlines() if f"[{place}]" in line]
        other = _OTHER_ID.search("".join(lines) or str(error))
        if other:
            reason = f"answered as {other[1]}, the invite says {address.peer} (re-installed? the invite is stale)"
            raise _NoContact(reason) from None
        if address.relay:
            raise _NoContact("a relay is there, but not the peer that was behind it (gone, or at another)") from None
        raise _NoContact("answered, but not as a dugnad peer (another program on that port?)") from None
