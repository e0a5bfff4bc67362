"""Small messages out: one outbox per peer, in order; a peer that does not answer delays nobody else.

Nothing is sent twice: what was lost is said again by the protocol, when reports show that it did not arrive.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Transport, TransportError

ANSWER_S = 5.0
"""How long a peer may take to acknowledge a small message."""
OUTBOX_MESSAGES = 256
"""How many messages may wait for one peer; the oldest goes first when they are too many."""


class Mail:
    """Sends sealed messages on `channel`; `unreachable` hears of peers that did not take theirs."""

    def __init__(
        self,
        transport: Transport,
        channel: str,
        tasks: asyncio.TaskGroup,
        *,
        unreachable: Callable[[PeerId, str], None],
    ) -> None:
        self._transport = transport
        self._channel = channel
        self._tasks = tasks
        self._unreachable = unreachable
        self._outboxes: dict[PeerId, deque[bytes]] = {}
        self._workers: dict[PeerId, asyncio.Task[None]] = {}

    def post(self, to: PeerId, raw: bytes) -> None:
        """Put one message on its way."""
        self._outboxes.setdefault(to, deque(maxlen=OUTBOX_MESSAGES)).append(raw)
        if to not in self._workers:
            self._workers[to] = self._tasks.create_task(self._empty(to))

    async def flush(self, within_s: float) -> None:
        """Wait until everything posted is sent, or has failed, or the time is over."""
        if self._workers:
            await asyncio.wait(self._workers.values(), timeout=within_s)

    async def _empty(self, to: PeerId) -> None:
        outbox = self._outboxes[to]
        try:
            while outbox:
                await self._transport.request(to, self._channel, outbox.popleft(), timeout_s=ANSWER_S)
        except TransportError as error:
            outbox.clear()
            self._unreachable(to, str(error))
        del self._workers[to], self._outboxes[to]
        for raw in outbox:  # posted by `unreachable` itself
            self.post(to, raw)
