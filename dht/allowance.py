"""What goes through a relay comes out of that relay's budget: whoever sends through it is given the bytes to send.

A relay's daemon passes on whatever comes, so it is the senders who keep to what the relay can give: they ask it as they
go along. A relay that does not answer, or refuses, is not asked for a while, and the bytes go all the same. Only
streams count: words are few.
"""

import asyncio
import logging
from collections.abc import Callable

from dugnad.dht.budget import PIECE_BYTES, Budget
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Transport, TransportError
from dugnad.dht.wire import WireError

logger = logging.getLogger(__name__)

CHANNEL = "dugnad/allowance/1"
MOST_BYTES = 4 * 2**20
"""Of one answer."""
GRANT_S = 0.25
"""For how long a relay collects what it gives in one answer: longer than asking takes, so that most of the time passes
in sending, and so short that a slow relay answers often and with little."""
ANSWER_S = 3.0
"""Less than the silence after which a stream is given up."""
FREE_BYTES = 2**18
"""What anyone may send before it asks, so that what is small does not wait for an answer."""
UNASKED_S = 60.0
"""For how long a relay that failed us is not asked again."""
_NUMBER_BYTES = 4


async def serve(transport: Transport, budget: Budget, *, bars: Callable[[PeerId], bool]) -> None:
    """Let others have bytes of `budget` to send through us, each one answer at a time; nobody whom `bars` names."""
    asking: set[PeerId] = set()

    async def answer(peer: PeerId, payload: bytes) -> bytes:
        if not 0 < (wanted := _number(payload)) <= MOST_BYTES:
            raise WireError("malformed", f"{wanted} bytes asked for at once, at most {MOST_BYTES} are given")
        if peer in asking or bars(peer):
            raise WireError("busy")
        asking.add(peer)
        try:
            return (await _given(budget, wanted)).to_bytes(_NUMBER_BYTES)
        finally:
            asking.remove(peer)

    await transport.serve(CHANNEL, answer)


async def _given(budget: Budget, wanted: int) -> int:
    """How many bytes of `wanted` may be sent now: what the budget has within GRANT_S, and at least one piece."""
    now = asyncio.get_running_loop().time
    since, given = now(), 0
    while given < wanted and now() - since < GRANT_S:
        piece = min(PIECE_BYTES, wanted - given)
        await asyncio.sleep(budget.spend(piece, now=now()) - now())
        given += piece
    return given


class Allowance:
    """What we may send through one relay, all streams together, each in turn."""

    def __init__(self, transport: Transport, relay: PeerId) -> None:
        self._transport = transport
        self._relay = relay
        self._left = FREE_BYTES
        self._turn = asyncio.Lock()  # first come, first served: else whoever just sent would be the first to ask again
        self._ask_at = float("-inf")

    async def spend(self, num_bytes: int, *, of: int) -> None:
        """Returns once `num_bytes`, at most PIECE_BYTES, may be sent; they count as sent.

        of: how many are to be sent now, these included, and so asked for.
        """
        assert num_bytes <= PIECE_BYTES, f"{num_bytes} bytes at once; at most {PIECE_BYTES} may be"
        now = asyncio.get_running_loop().time
        async with self._turn:
            while self._left < num_bytes and now() >= self._ask_at:
                try:
                    self._left += await self._asked(min(of - self._left, MOST_BYTES))
                except (TransportError, WireError) as error:
                    logger.debug("%s is not asked for bytes to send through it: %s", self._relay, error)
                    self._ask_at = now() + UNASKED_S
            self._left = max(0, self._left - num_bytes)

    async def _asked(self, wanted: int) -> int:
        """How many of so many bytes the relay gives us now. Raises TransportError or WireError."""
        question = wanted.to_bytes(_NUMBER_BYTES)
        given = _number(await self._transport.request(self._relay, CHANNEL, question, timeout_s=ANSWER_S))
        if not 0 < given <= wanted:
            raise WireError("malformed", f"{given} bytes to send, of {wanted} asked for")
        return given


def _number(raw: bytes) -> int:
    """The number in a payload. Raises WireError."""
    if len(raw) != _NUMBER_BYTES:
        raise WireError("malformed", f"a number of bytes in {len(raw)} bytes")
    return int.from_bytes(raw)
