"""Whether others can reach us, found out by asking some to try: the request channel dugnad/dialback/1.

The asker names TCP ports. The asked looks up from which IP address the asker is connected, directly, tries to connect
to each of the ports there, and tells which it reached, and the address. It dials nothing else, nothing within its own
networks (from where more can be reached than from outside), for one asker at a time once, and for a few altogether, so
that nobody can be made to dial others.
"""

import asyncio
import contextlib
import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from dugnad.dht.identity import PeerId
from dugnad.dht.multiaddrs import IpAddress
from dugnad.dht.transport import TransportError
from dugnad.dht.wire import WireError

CHANNEL = "dugnad/dialback/1"
MAX_PORTS = 4
CONNECT_S = 2.0
ANSWER_S = 6.0
MAX_ASKED = 3
"""How many are asked; what most of them say counts."""
MAX_AT_ONCE = 8
"""Askers that are served at the same time."""
MAX_WAITING = 32
"""Askers that are served, or wait for that."""

_Port = Annotated[int, Meta(ge=1, le=65535)]


class Ask(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Try to connect to me at these ports."""

    ports: Annotated[tuple[_Port, ...], Meta(min_length=1, max_length=MAX_PORTS)]


class Tried(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which ports accepted, at which IP address."""

    open_ports: Annotated[tuple[_Port, ...], Meta(max_length=MAX_PORTS)]
    seen_ip: Annotated[str, Meta(max_length=45)]

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.seen_ip)  # a ValueError makes it malformed


@dataclass(frozen=True, slots=True)
class Reachability:
    """What others found out about us."""

    open_ports: frozenset[int] = frozenset()
    """Those of our ports that they reached."""
    seen_ip: str | None = None
    """Our IP address outside; None if there was nobody to ask."""
    num_answers: int = 0


Request = Callable[[PeerId, bytes], Awaitable[bytes]]
"""Asks a peer on CHANNEL; raises TransportError."""
SeenAt = Callable[[PeerId], Awaitable[IpAddress | None]]
"""The IP address from which a peer is connected to us, directly; None if it is not."""
Dial = Callable[[str, int], Awaitable[bool]]
"""Whether a TCP port of a host accepts within CONNECT_S."""

S = TypeVar("S", bound=Struct)
_encoder = msgspec.msgpack.Encoder()
_asks = msgspec.msgpack.Decoder(Ask)
_trieds = msgspec.msgpack.Decoder(Tried)


async def ask(peers: Sequence[PeerId], ports: Sequence[int], request: Request) -> Reachability:
    """Have `peers`, at most three, try our `ports`, at most four; takes 6 s at most. Who is silent is left out."""
    raw = _encoder.encode(Ask(tuple(dict.fromkeys(ports))))
    answers = await asyncio.gather(*(_ask_one(peer, raw, request) for peer in peers))
    return judge([answer for answer in answers if answer is not None], ports)


def judge(answers: Sequence[Tried], ports: Collection[int]) -> Reachability:
    """What more than half of the answers agree on, for each port, and the address that most have seen.

    Only those who saw us by IPv4 count, if there are any: not everyone can use the other.
    """
    by_ipv4 = [answer for answer in answers if ":" not in answer.seen_ip]
    answers = by_ipv4 or answers
    reached = Counter(port for answer in answers for port in set(answer.open_ports))
    open_ports = frozenset(port for port in ports if 2 * reached[port] > len(answers))
    seen = Counter(answer.seen_ip for answer in answers).most_common(1)
    return Reachability(open_ports, seen[0][0] if seen else None, len(answers))


async def _ask_one(peer: PeerId, raw: bytes, request: Request) -> Tried | None:
    with contextlib.suppress(TransportError, WireError, TimeoutError):
        async with asyncio.timeout(ANSWER_S):
            return _decode(_trieds, await request(peer, raw))
    return None


class DialBack:
    """Answers those who ask."""

    def __init__(self, seen_at: SeenAt, dial: Dial | None = None) -> None:
        self._seen_at = seen_at
        self._dial = dial or accepts
        self._serving: set[PeerId] = set()
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def answer(self, peer: PeerId, raw: bytes) -> bytes:
        """The reply to `peer`. Raises WireError for nonsense, and for what we do not do."""
        ports = dict.fromkeys(_decode(_asks, raw).ports)
        if peer in self._serving or len(self._serving) >= MAX_WAITING:
            raise WireError("busy")
        self._serving.add(peer)
        try:
            ip = await self._seen_at(peer)
            if ip is None or not ip.is_global:
                raise WireError("not outside", "we see it nowhere, or within our own networks")
            async with self._turns:
                reached = await asyncio.gather(*(self._dial(str(ip), port) for port in ports))
        finally:
            self._serving.discard(peer)
        open_ports = tuple(port for port, is_open in zip(ports, reached, strict=True) if is_open)
        return _encoder.encode(Tried(open_ports, str(ip)))


async def accepts(host: str, port: int) -> bool:
    """Whether a TCP port accepts a connection within 2 s; what can't be dialled does not."""
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError, OverflowError, ValueError):  # of a host or port that can't be, the last two
        return False
    writer.transport.abort()
    return True


def _decode(decoder: msgspec.msgpack.Decoder[S], raw: bytes) -> S:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("malformed", f"dial-back: {error}") from error
