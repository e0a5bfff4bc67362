"""Asking other members what time it is, and correcting this machine's clock by it (`clock.py` decides)."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from dugnad.dht import clock as clocks
from dugnad.dht.clock import Sample
from dugnad.dht.host import Host
from dugnad.dht.identity import PeerId, nickname
from dugnad.dht.transport import TransportError
from dugnad.dht.wire import WireError

log = logging.getLogger(__name__)

CHANNEL = "dugnad/clock/1"
ASK_AGAIN_S = 300.0
"""How often others are asked again."""
NUM_ASKED = 8
"""How many of them; as long as fewer have answered, anyone who is new is asked at once."""
ANSWER_S = 3.0


class Timekeeper:
    """Keeps the clock of `host` right.

    members: whom to ask. corrected: hears that the time has changed, so that nobody may believe what was said until
    now. refused: hears in a word or two why an answer was nonsense.
    """

    def __init__(
        self,
        host: Host,
        *,
        members: Callable[[], Sequence[PeerId]],
        corrected: Callable[[], Awaitable[None]],
        refused: Callable[[str], None],
    ) -> None:
        self._host = host
        self._members = members
        self._corrected = corrected
        self._refused = refused
        self._rng = random.Random()
        self._warned_s = 0.0

    async def serve(self) -> None:
        """Answer others."""
        await self._host.serve(CHANNEL, self._answer)

    async def begin(self) -> None:
        """Be right, as far as members can be asked, before `keep`."""
        await self._ask(self._members()[:NUM_ASKED])
        self._host.clock.begin(at_s=_steady_s())

    async def keep(self) -> None:
        """Ask again and again, and at once when somebody sets this machine's clock."""
        asked: set[PeerId] = set(self._members()[:NUM_ASKED])
        ask_again_s = _steady_s() + ASK_AGAIN_S
        ahead_s = time.time() - _steady_s()
        while True:
            await asyncio.sleep(1.0)
            was_ahead_s, ahead_s = ahead_s, time.time() - _steady_s()
            if abs(ahead_s - was_ahead_s) > clocks.NEGLIGIBLE_S:
                self._host.clock.was_set(ahead_s - was_ahead_s)
                ask_again_s = 0.0
            if _steady_s() >= ask_again_s:
                asked.clear()
                ask_again_s = _steady_s() + ASK_AGAIN_S
            fresh = [peer for peer in self._members() if peer not in asked]
            chosen = self._rng.sample(fresh, min(len(fresh), max(0, NUM_ASKED - len(asked))))
            asked.update(chosen)
            if await self._ask(chosen):
                await self._corrected()

    async def _ask(self, peers: Iterable[PeerId]) -> bool:
        """Whether what they say changes our time."""
        answers = await asyncio.gather(*(self._time_of(peer) for peer in peers))
        changed = [self._host.clock.take(peer, sample) for peer, sample in answers if sample is not None]
        if any(changed):
            self._warn()
        return any(changed)

    async def _time_of(self, peer: PeerId) -> tuple[PeerId, Sample | None]:
        sent_s = time.time()
        try:
            raw = await self._host.request(peer, CHANNEL, b"", timeout_s=ANSWER_S)
            received_s = time.time()
            return peer, Sample(sent_s, received_s, clocks.decode_time(raw), _steady_s())
        except TransportError as error:
            log.debug("%s does not say what time it is: %s", nickname(peer), error)
        except WireError as error:
            self._refused(error.reason)
        return peer, None

    async def _answer(self, peer: PeerId, raw: bytes) -> bytes:
        return clocks.encode_time(self._host.clock.answer(clock_s=time.time(), at_s=_steady_s()))

    def _warn(self) -> None:
        correction = self._host.clock.correction
        if abs(correction.offset_s - self._warned_s) < clocks.WARN_S:
            return
        self._warned_s = correction.offset_s
        if correction.warning is None:
            log.info("this machine's clock is right again")
        else:
            log.warning("%s", correction.warning)


def _steady_s() -> float:
    """Seconds by a clock that nobody sets, and that goes on while the machine sleeps where there is such a one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
