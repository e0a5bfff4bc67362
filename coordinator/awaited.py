"""Whom the next round waits for: those of the last one, for a while, since they may still be applying it."""

from dugnad.coordinator.ledger import Head
from dugnad.coordinator.membership import Decision, Membership
from dugnad.coordinator.messages import MAX_VOTERS
from dugnad.dht.identity import PeerId

SETTLE_S = 5.0
"""How long those of the last round are awaited, after a commit or a start, to say that they stand at the head.

Who says that it is getting there is awaited for as long as an exchange may take.
"""
COUNT_S = 0.5
"""How often it is counted how many of more than MAX_VOTERS are still awaited."""


class Awaited:
    """Who is still awaited, of those whom `membership` may hear; exchange_s: how long those who get there have."""

    def __init__(self, membership: Membership, exchange_s: float) -> None:
        self.peers: tuple[PeerId, ...] = ()
        self._membership = membership
        self._exchange_s = exchange_s
        self._until = 0.0
        self._limit = 0.0
        self._held_up_by: PeerId | None = None
        """One of many awaited: while it is not there, who else is missing need not be counted at every message."""
        self._count_at = 0.0

    def begin(self, peers: tuple[PeerId, ...], *, now: float) -> None:
        """Wait for these from now on."""
        self.peers, self._held_up_by = peers, None
        self._until, self._limit = now + SETTLE_S, now + self._exchange_s

    def end(self) -> None:
        """Wait for nobody."""
        self.peers, self._held_up_by = (), None

    def tick(self, head: Head, *, now: float) -> None:
        """Give up those whose time is over."""
        if now >= self._until:
            arriving = now < self._limit
            self.peers = tuple(p for p in self.peers if arriving and self._membership.is_arriving(p, head))
            self._until, self._held_up_by = self._limit, None

    def wake_at(self) -> float:
        """When `tick` has someone to give up."""
        return self._until if self.peers else float("inf")

    def holds_up(self, head: Head, barred: frozenset[PeerId], *, now: float) -> bool:
        """Whether the one of many whom we know to be missing still is, and they need not be counted yet."""
        by = self._held_up_by
        return by is not None and now < self._count_at and self._membership.holds_up(by, head, barred)

    def decide(self, head: Head, min_peers: int, barred: frozenset[PeerId], *, now: float) -> Decision:
        """As `Membership.decide`, with those who are still awaited."""
        decision = self._membership.decide(head, min_peers=min_peers, awaited=self.peers, barred=barred)
        if len(self.peers) > MAX_VOTERS:
            missing = (peer for peer in self.peers if self._membership.holds_up(peer, head, barred))
            self._held_up_by, self._count_at = next(missing, None), now + COUNT_S
        return decision
