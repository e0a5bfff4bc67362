"""How fast bytes go to a peer and come from it, tried with some of them.

    asker      u8 1 it sends / 2 it is sent                                       ->
    other      u8 0 busy / 1 go                                                   <-
    who sends  pieces of PIECE_BYTES, at most NUM_PIECES, for at most TIME_S
    who gets   after each of them: u32 microseconds since the first one came

The asker ends it when its time is up: what has come by then counts. No more is on its way than what has come already,
and FIRST_PIECES, so that a slow line is not blocked for long by what was sent in vain. Over a fast line to somebody far
away it takes a while to get going, so that the rate is rather too low than too high.
"""

import asyncio
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from dugnad.dht.bulk import SILENCE_S, Nonsense, Stalled
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Stream, StreamHandler, Transport, TransportError

CHANNEL = "dugnad/speed/1"
KIND = "speed"
PIECE_BYTES = 16 * 1024
NUM_PIECES = 256
"""4 MiB."""
FIRST_PIECES = 8
TIME_S = 1.5
AGAIN_S = 10.0
"""After how long the same peer may try the same direction again."""
MAX_REMEMBERED = 1024
_UP, _DOWN = b"\1", b"\2"
_BUSY, _GO = b"\0", b"\1"
_MARK = struct.Struct(">I")
_PIECE = os.urandom(PIECE_BYTES)  # random: a tunnel on the way may compress


class Busy(TransportError):
    """A peer measures with somebody else now, or has just done so with us."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Megabits a second to a peer and from it."""

    up_mbit: float
    down_mbit: float


async def measure(transport: Transport, peer: PeerId) -> Speeds:
    """The rates to `peer` and from it, in two times TIME_S at most once there is a way there.

    Raises Busy, Unreachable, Nonsense, and Stalled also where a line is too slow to tell.
    """
    down_mbit = await _try(transport, peer, _DOWN)  # first: lines are slow upwards, where what was sent still waits
    return Speeds(await _try(transport, peer, _UP), down_mbit)


def service(*, bars: Callable[[PeerId], bool]) -> StreamHandler:
    """Lets others measure, one at a time, who open a stream on CHANNEL; nobody whom `bars` names."""
    turns = Turns()

    async def answer(peer: PeerId, stream: Stream) -> None:
        stream.kind = KIND
        try:
            async with asyncio.timeout(SILENCE_S):
                direction = await stream.read_exactly(1)
        except TimeoutError:
            raise Stalled(f"{peer}: it opened a stream and said nothing") from None
        if direction not in (_UP, _DOWN):
            raise Nonsense(f"{peer}: direction {direction[0]}")
        if bars(peer):
            return
        now = asyncio.get_running_loop().time()
        if not turns.take(peer, direction, now=now):
            await stream.write(_BUSY)
            return
        try:
            async with asyncio.timeout(2 * TIME_S):  # more than the asker takes, which ends it
                await stream.write(_GO)
                await (_receive if direction == _UP else _send)(stream, peer, [])
        except TimeoutError:
            raise Stalled(f"{peer}: it does not end what it asked for") from None
        finally:
            turns.give_back(peer)

    return answer


@dataclass(slots=True)
class Turns:
    """Who may measure: one peer at a time, and each in each direction once in a while."""

    _measuring: list[PeerId] = field(default_factory=list)
    """One, or twice the same: it may go on with the other direction before we see that the first has ended."""
    _served: dict[tuple[PeerId, bytes], float] = field(default_factory=dict)

    def take(self, peer: PeerId, direction: bytes, *, now: float) -> bool:
        """Whether it is the turn of `peer`, until that is given back."""
        self._served = {who: at for who, at in self._served.items() if now - at < AGAIN_S}
        taken = any(other != peer for other in self._measuring)
        if taken or (peer, direction) in self._served or len(self._served) >= MAX_REMEMBERED:
            return False
        self._measuring.append(peer)
        self._served[peer, direction] = now
        return True

    def give_back(self, peer: PeerId) -> None:
        """The turn is over."""
        self._measuring.remove(peer)


async def _try(transport: Transport, peer: PeerId, direction: bytes) -> float:
    """The rate in one direction, in megabits a second."""
    marks: list[float] = []
    stream = await transport.open(peer, CHANNEL, kind=KIND)
    try:
        await _ask(stream, peer, direction)
        async with asyncio.timeout(TIME_S):
            await (_send if direction == _UP else _receive)(stream, peer, marks)
    except TimeoutError:
        pass  # what has come by now counts
    finally:
        await stream.close()
    if len(marks) < 2:
        raise Stalled(f"{peer}: less than {2 * PIECE_BYTES // 1024} KiB moved in {TIME_S:g} s")
    return (len(marks) - 1) * PIECE_BYTES * 8e-6 / max(marks[-1], 1e-6)


async def _ask(stream: Stream, peer: PeerId, direction: bytes) -> None:
    """Wait for the word to go. Raises Busy or Stalled."""
    try:
        async with asyncio.timeout(SILENCE_S):
            await stream.write(direction)
            if await stream.read_exactly(1) != _GO:
                raise Busy(f"{peer} is busy; try again in {AGAIN_S:.0f} s")
    except TimeoutError:
        raise Stalled(f"{peer}: no answer in {SILENCE_S:g} s") from None


async def _send(stream: Stream, peer: PeerId, marks: list[float]) -> None:
    """Send pieces, and note in `marks` how long after the first each one came. Raises Nonsense."""
    now = asyncio.get_running_loop().time
    sent, until = 0, now() + TIME_S
    while len(marks) < NUM_PIECES:
        if sent < min(NUM_PIECES, 2 * len(marks) + FIRST_PIECES) and now() < until:
            await stream.write(_PIECE)
            sent += 1
            continue
        (microseconds,) = _MARK.unpack(await stream.read_exactly(_MARK.size))
        if marks and microseconds * 1e-6 < marks[-1]:
            raise Nonsense(f"{peer}: it says of a piece that it came before the one before")
        marks.append(microseconds * 1e-6)


async def _receive(stream: Stream, peer: PeerId, marks: list[float]) -> None:
    """Take pieces, and say and note in `marks` how long after the first each one came."""
    now = asyncio.get_running_loop().time
    buffer, first_at = memoryview(bytearray(PIECE_BYTES)), 0.0
    while len(marks) < NUM_PIECES:
        await stream.read_into(buffer)
        first_at = first_at if marks else now()
        marks.append(now() - first_at)
        await stream.write(_MARK.pack(int(marks[-1] * 1e6)))
