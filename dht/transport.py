"""What the protocol asks of a network: requests and byte streams between peers that are named by their keys.

Everything above talks to `Transport` and `Stream` only, so a simulation may stand in for the network. Whatever goes
wrong out there reaches the caller as a `TransportError`, never as another exception.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

from dugnad.dht.identity import PeerId
from dugnad.dht.multiaddrs import in_short

Direction = Literal["sent", "received"]
Meter = Callable[[Direction, str, int], None]
"""Called with (direction, kind, number of payload bytes) for everything that passes."""

RequestHandler = Callable[[PeerId, bytes], Awaitable[bytes]]
"""Answers (sender, payload) with the reply's payload."""

REQUEST_BYTES = 2 * 2**20 - 64 * 2**10
"""The largest payload of a request or of its reply; more belongs on a stream."""
_WORDS = 200
"""How many characters of another's words are passed on."""


ASK_FOR_AN_INVITE = "Ask for a new invite: any peer of the run prints one with dugnad invite."


def printable(text: str) -> str:
    """A stranger's words, cut, in which nothing can steer a terminal, or be what no record may hold."""
    return "".join(character if character.isprintable() else " " for character in text[:_WORDS])


class TransportError(Exception):
    """The network, or a peer at its other end, failed us."""


class Unreachable(TransportError):
    """A peer can't be reached, broke off, or did not answer in time."""

    def __init__(self, peer: PeerId, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason


class RequestRefused(TransportError):
    """A peer answered that it will not, or can't, serve this request: it is there, and asking again won't help."""

    def __init__(self, peer: PeerId, reason: str) -> None:
        self.peer = peer
        self.reason = printable(reason)
        super().__init__(f"{peer} refused the request: {self.reason}")


class PortInUse(TransportError):
    """Another program listens on an address that we were told to listen on."""

    code = "E202"

    def __init__(self, address: str) -> None:
        super().__init__(
            f"{self.code} {in_short(address)}: another program already listens on this port. "
            "Stop it (is a dugnad still running?), or choose another port; port 0 takes any free one."
        )
        self.address = address


class ListenError(TransportError):
    """An address can't be listened on, for another reason than its port being taken."""

    code = "E202"

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"{self.code} {in_short(address)}: {why}")


class NetworkDown(TransportError):
    """Our own way into the network is gone or can't be had; says why."""


class BootstrapError(TransportError):
    """No address led to a peer; `failures` holds (address, reason) of each."""

    code = "E201"

    def __init__(self, failures: Sequence[tuple[str, str]]) -> None:
        self.failures = tuple(failures)
        width = max((len(address) for address, _ in self.failures), default=0)
        tried = len(self.failures)
        known = "the only known address" if tried == 1 else f"each of the {tried} known addresses"
        lines = [f"{self.code} {known} of the run leads to nobody."]
        lines += [f"     {address:<{width}}  {reason}" for address, reason in self.failures]
        lines.append(ASK_FOR_AN_INVITE)
        super().__init__("\n".join(lines))


class Stream(Protocol):
    """Bytes both ways between two peers, in order, with back pressure."""

    kind: str
    """What the bytes are counted as; whoever accepts a stream sets it on reading the header."""

    @property
    def moved_bytes(self) -> int:
        """What has passed so far on the way that the stream takes: while it grows, a long read or write gets on."""
        ...

    async def read_exactly(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes. Raises Unreachable if the stream ends first."""
        ...

    async def read_into(self, buffer: memoryview) -> None:
        """Fill a writable `buffer` of bytes. Raises Unreachable if the stream ends first."""
        ...

    async def write(self, data: bytes | memoryview) -> None:
        """Send `data`; returns once the way is clear for more. Raises Unreachable on a broken stream."""
        ...

    async def wait_taken(self, *, timeout_s: float) -> None:
        """Wait until the other side, which opened this stream, has all that was written, or is gone; never raises."""
        ...

    async def close(self) -> None:
        """End the stream, after what was written; never raises. The side that opened it closes first."""
        ...


StreamHandler = Callable[[PeerId, Stream], Awaitable[None]]
"""Serves one accepted stream, which is closed when the handler returns."""


class Transport(Protocol):
    """Requests and streams to peers. A channel is the name of a service, "dugnad/round/1"."""

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        ...

    async def request(self, peer: PeerId, channel: str, payload: bytes, *, timeout_s: float) -> bytes:
        """The reply of `peer` to `payload`, each of at most REQUEST_BYTES.

        Raises Unreachable (no way there, broken off, no answer within `timeout_s`) or RequestRefused.
        """
        ...

    async def open(self, peer: PeerId, channel: str, *, kind: str) -> Stream:
        """A new stream to `peer`, its bytes counted as `kind`. Raises Unreachable."""
        ...

    async def serve(self, channel: str, handler: RequestHandler) -> None:
        """Answer requests on `channel`; a handler's exception refuses the request."""
        ...

    async def serve_stream(self, channel: str, handler: StreamHandler) -> None:
        """Accept streams on `channel`."""
        ...

    async def learn(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Remember multiaddrs under which `peer` can be dialled; those that make no sense are ignored."""
        ...
