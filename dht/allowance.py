"""What goes through a relay comes out of that relay's budget: whoever sends through it is given the bytes to send.

A relay's daemon passes on whatever comes, so it is the senders who keep to what the relay can give. They ask it as they
go along, at most AHEAD_BYTES ahead of its answers; a relay that does not answer, or refuses, is not asked for a while,
and the bytes go all the same. Only streams count: words are few.
"""

import asyncio
import logging
import struct
from collections.abc import Callable

from dugnad.dht.budget import PIECE_BYTES, Budget
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Transport, TransportError
from dugnad.dht.wire import WireError

logger = logging.getLogger(__name__)

CHANNEL = "dugnad/allowance/1"
AHEAD_BYTES = 2**20
"""At 100 Mbit/s enough for 80 ms, longer than an answer usually takes."""
GRANT_S = 0.25
"""For how long a relay collects what it gives in one answer, so that a slow one answers often and with little."""
ANSWER_S = 20.0
UNASKED_S = 60.0
"""For how long a relay that failed us is not asked again."""
_NUMBER = struct.Struct(">I")


async def serve(transport: Transport, budget: Budget, *, bars: Callable[[PeerId], bool]) -> None:
    """Let others have bytes of `budget` to send through us, each one answer at a time; nobody whom `bars` names."""
    asking: set[PeerId] = set()

    async def answer(peer: PeerId, payload: bytes) -> bytes:
        if len(payload) != _NUMBER.size or not 0 < (wanted := _NUMBER.unpack(payload)[0]) <= AHEAD_BYTES:
            raise WireError("malformed", "no number of bytes that one may ask for")
        if peer in asking or bars(peer):
            raise WireError("busy")
        asking.add(peer)
        try:
            return _NUMBER.pack(await _given(budget, wanted))
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
    """What we may send through one relay, all streams together."""

    def __init__(self, transport: Transport, relay: PeerId) -> None:
        self._transport = transport
        self._relay = relay
        self._left = AHEAD_BYTES
        self._asking: asyncio.Task[None] | None = None
        self._unasked_until = float("-inf")

    async def spend(self, num_bytes: int) -> None:
        """Returns once `num_bytes`, at most PIECE_BYTES, may be sent; they count as sent."""
        assert num_bytes <= PIECE_BYTES, f"{num_bytes} bytes at once; at most {PIECE_BYTES} may be"
        while asyncio.get_running_loop().time() >= self._unasked_until:
            if self._asking is None and self._left <= AHEAD_BYTES - PIECE_BYTES:
                self._asking = asyncio.create_task(self._ask(AHEAD_BYTES - self._left))
            if self._left >= num_bytes:
                self._left -= num_bytes
                return
            assert self._asking is not None, "what is left is less than a piece, so more is asked for"
            await asyncio.wait([self._asking])

    async def _ask(self, wanted: int) -> None:
        try:
            reply = await self._transport.request(self._relay, CHANNEL, _NUMBER.pack(wanted), timeout_s=ANSWER_S)
            if len(reply) != _NUMBER.size or not 0 < (given := _NUMBER.unpack(reply)[0]) <= wanted:
                raise WireError("malformed", "an answer that is no number of bytes, or not of those asked for")
            self._left += given
        except (TransportError, WireError) as error:
            logger.debug("%s is not asked for bytes to send through it: %s", self._relay, error)
            self._left, self._unasked_until = AHEAD_BYTES, asyncio.get_running_loop().time() + UNASKED_S
        finally:
            self._asking = None
