"""How much we give away, as a machine: no network, no clock.

    enter    one more asker wants something                      -> whose turn it is now
    leave    it has what it wanted, or is gone                   -> whose turn it is now
    spend    so many bytes are about to be given                 -> when that may be

Bytes are counted as by a token bucket: in any stretch of time no more than `bytes_per_s` times its length, and
`burst_bytes`. Pieces are paid for in the order in which they are announced, one at a time for each turn, so that all
who are served get the same. Only so many are served at once that each of them still gets LEAST_BYTES_PER_S; the
others wait in line, where who is being served least comes first, so that asking often brings nothing. What is relayed
is paid for without a turn, and comes on top.
"""

from dugnad.dht.identity import PeerId
from dugnad.dht.transport import TransportError

LEAST_BYTES_PER_S = 64 * 1024
"""How fast whoever is served gets its bytes, at least; whoever receives less takes the other side for stalled."""
AT_ONCE = 16
"""How many are served at once, at most: a line may be slower than its owner thinks."""
PER_ASKER = 2
"""How many turns one asker has at once."""
MAX_WAITING = 64
"""How many times one asker waits in line at once: whoever enters, all that wait are looked through."""
BURST_S = 0.25
"""For how long what was not given before may be given later on."""
PIECE_BYTES = 64 * 1024
"""The most that is given at once, and so what must move within the silence limit, again and again."""
GIVE_MBIT = 100.0
"""What a volunteer gives who has not said: it takes a few percent of one core, and what a fast home line can send."""


class LineFull(TransportError):
    """An asker waits in line too many times already."""


class Budget:
    """What one peer gives away; a ticket is whatever number the caller gives to one thing asked for.

    bytes_per_s: at least LEAST_BYTES_PER_S.
    """

    def __init__(self, bytes_per_s: float) -> None:
        if bytes_per_s < LEAST_BYTES_PER_S:
            raise ValueError(f"a budget of {bytes_per_s:.0f} bytes/s; at least {LEAST_BYTES_PER_S} are needed")
        self.bytes_per_s = bytes_per_s
        self.burst_bytes = max(PIECE_BYTES, int(bytes_per_s * BURST_S))
        self.at_once = int(min(AT_ONCE, bytes_per_s // LEAST_BYTES_PER_S))
        self._waiting: dict[int, PeerId] = {}
        """In the order in which they came."""
        self._served: dict[int, PeerId] = {}
        self._paid_until = float("-inf")
        """Up to when all time is used up by what was given."""

    @classmethod
    def of_mbit(cls, mbit_per_s: float) -> "Budget":
        """The budget of so many megabits a second."""
        return cls(mbit_per_s * 1e6 / 8)

    def enter(self, ticket: int, asker: PeerId) -> list[int]:
        """`asker` gets in line; returns the tickets whose turn it is now. Raises LineFull."""
        assert ticket not in self._waiting | self._served, f"ticket {ticket} is in use"
        if list(self._waiting.values()).count(asker) >= MAX_WAITING:
            raise LineFull(f"{asker} waits in line {MAX_WAITING} times already")
        self._waiting[ticket] = asker
        return self._call()

    def leave(self, ticket: int) -> list[int]:
        """The ticket is given back, from the line too; returns the tickets whose turn it is now."""
        self._waiting.pop(ticket, None)
        self._served.pop(ticket, None)
        return self._call()

    def spend(self, num_bytes: int, *, now: float) -> float:
        """When `num_bytes`, at most PIECE_BYTES, may be given, in seconds on the clock of `now`; they are paid for.

        Whoever does not give them after all has lost them, which is to the budget's good.
        """
        assert num_bytes <= PIECE_BYTES, f"{num_bytes} bytes at once; at most {PIECE_BYTES} may be"
        unused_since = max(self._paid_until, now - self.burst_bytes / self.bytes_per_s)
        self._paid_until = unused_since + num_bytes / self.bytes_per_s
        return max(now, self._paid_until)

    def _call(self) -> list[int]:
        called: list[int] = []
        while len(self._served) < self.at_once and (ticket := self._next()) is not None:
            self._served[ticket] = self._waiting.pop(ticket)
            called.append(ticket)
        return called

    def _next(self) -> int | None:
        """The ticket of who is served least, and has waited longest."""
        turns = list(self._served.values())
        able = {ticket: held for ticket, peer in self._waiting.items() if (held := turns.count(peer)) < PER_ASKER}
        return min(able, key=able.__getitem__, default=None)
