"""What a simulated run costs: lines that transfers share, and a count of every byte by who sent or took it."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import count

from dugnad.coordinator.messages import ROUND_KINDS
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Codec, Message

SEAL_BYTES = 137
"""What a seal adds to a body, besides the tag: version, run, sender's key, signature, and the heads of all these."""
BULK = frozenset({"upload", "result", "follow", "fetch", "state"})
"""Kinds of transfers: work, averages, models; all else is messages."""
CODEC = Codec(ROUND_KINDS)

Later = Callable[[float, Callable[[], None]], None]
"""(in how many seconds, what) to do."""


def sealed_bytes(message: Message) -> int:
    """How many bytes `message` has on the wire, seal included. One above its cap is our fault: AssertionError."""
    return SEAL_BYTES + len(CODEC.tag_of(message)) + len(CODEC.encode(message))


class Line:
    """One direction of a peer's line, `rate` in bytes/s: transfers share it evenly, and messages go before them."""

    def __init__(self, rate: float, later: Later) -> None:
        self.rate = rate
        self._later = later
        self._order = count()
        self._flows: list[tuple[float, int, Callable[[], None]]] = []
        """(what every transfer will have had when this one has had enough, order, what to do then)."""
        self._had = 0.0
        """Bytes that a transfer has had that was there from the beginning."""
        self._had_at = 0.0
        self._free_at = 0.0
        self._look_at = float("inf")

    def say(self, nbytes: int, *, now: float) -> float:
        """Put a message on the line; how long until it is through, in seconds. Transfers stand still meanwhile."""
        self._go_on(now)
        takes_s = nbytes / self.rate
        self._free_at = max(self._free_at, now) + takes_s
        if self._flows:
            self._had_at += takes_s
        return self._free_at - now

    def carry(self, nbytes: float, done: Callable[[], None], *, now: float) -> None:
        """Begin a transfer, and do `done` when all of it is through."""
        self._go_on(now)
        heapq.heappush(self._flows, (self._had + nbytes, next(self._order), done))
        self._look_again(now)

    def _go_on(self, now: float) -> None:
        if now > self._had_at:
            if self._flows:
                self._had += (now - self._had_at) * self.rate / len(self._flows)
            self._had_at = now

    def _look_again(self, now: float) -> None:
        enough, _, _ = self._flows[0]
        at = max(now, self._had_at + (enough - self._had) * len(self._flows) / self.rate)
        if at < self._look_at:
            self._look_at = at
            self._later(at - now, lambda: self._look(at))

    def _look(self, at: float) -> None:
        if at != self._look_at:
            return  # another look was due before this one, and saw to all
        self._look_at = float("inf")
        self._go_on(at)
        through: list[Callable[[], None]] = []
        while self._flows and self._flows[0][0] <= self._had + 1e-3:  # a thousandth of a byte: sums are rounded
            through.append(heapq.heappop(self._flows)[2])
        if self._flows:
            self._look_again(at)
        for done in through:
            done()


class Traffic:
    """Bytes by peer and kind, both ways, and seconds, of everyone who was ever there."""

    def __init__(self) -> None:
        self.sent: dict[PeerId, Counter[str]] = defaultdict(Counter)
        self.taken: dict[PeerId, Counter[str]] = defaultdict(Counter)
        self.up_s: dict[PeerId, float] = defaultdict(float)
        """For how long each peer was up, without the time since its last start if it is up."""
        self.training_s: dict[PeerId, float] = defaultdict(float)
        """For how long each peer trained, the same."""
        self.plans: set[tuple[int, tuple[int, int, int]]] = set()
        """(epoch, order) of every plan that gave work."""

    def moved(self, sender: PeerId, taker: PeerId, kind: str, nbytes: int) -> None:
        """`nbytes` went from one to the other."""
        self.sent[sender][kind] += nbytes
        self.taken[taker][kind] += nbytes
