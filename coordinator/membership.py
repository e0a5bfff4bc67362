"""Who is here: what each peer last said of itself, and who is lost.

Nothing is concluded from one message: a peer is what its newest `Report` says, and it is lost when it has been silent
for `silence_s` or when the network says that nobody answers there. A lost peer that speaks again is back.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from dugnad.coordinator.ledger import Head
from dugnad.coordinator.messages import MAX_PEERS, Report
from dugnad.dht.identity import PeerId


def stretch(contributors: int) -> float:
    """By how much reports are rarer, and silences longer, in a swarm of that size: a leader hears all of it."""
    return max(1.0, contributors / 200)


class Stage(StrEnum):
    """What a member says it is doing, in the order in which a round passes through it."""

    SYNCING = "syncing"
    """It has no shared model of the head yet."""
    WAITING = "waiting"
    """It stands at the head and has no work."""
    TRAINING = "training"
    CONTRIBUTED = "contributed"
    """Its parts are promised and on their way."""
    REDUCING = "reducing"
    """It knows the frozen set."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Who takes part in the next round, or why there is none yet."""

    members: tuple[PeerId, ...]
    reason: str


@dataclass(slots=True)
class _Presence:
    report: Report
    heard_at: float
    lost: str | None = None


class Membership:
    """What the leader knows of everyone who reports to it; `silence_s` without a word means lost."""

    def __init__(self, silence_s: float) -> None:
        self._shortest_s = self._silence_s = silence_s
        self._peers: dict[PeerId, _Presence] = {}
        self.changes = 0
        """How often someone came, went, or said something new of itself: while it stands, so does all that follows."""

    def heard(self, peer: PeerId, report: Report, *, now: float) -> bool:
        """`peer` said `report`; whether there is room for it."""
        if peer not in self._peers and len(self._peers) >= MAX_PEERS and not self._forget_lost():
            return False
        before = self._peers.pop(peer, None)  # they stand in the order in which they were last heard
        if before is None or before.lost is not None or before.report != report:
            self.changes += 1
        self._peers[peer] = _Presence(report, now)
        return True

    def _forget_lost(self) -> bool:
        """Forget the lost peer that has been silent longest, if there is one: newcomers need its place."""
        lost = next((peer for peer, presence in self._peers.items() if presence.lost is not None), None)
        if lost is not None:
            del self._peers[lost]
            self.changes += 1
        return lost is not None

    def resize(self, contributors: int) -> None:
        """The swarm is that large now: silences are judged by it."""
        self._silence_s = self._shortest_s * stretch(contributors)

    def forget(self) -> None:
        """Forget everyone: who is here will say so."""
        self._peers.clear()
        self.changes += 1

    def lose(self, peer: PeerId, why: str) -> None:
        """The network says that `peer` does not answer; it is back with its next report."""
        if peer in self._peers and self._peers[peer].lost is None:
            self._peers[peer].lost = why
            self.changes += 1

    def tick(self, *, now: float) -> None:
        """Lose those who have been silent too long, and forget those long gone."""
        gone: list[PeerId] = []
        for peer, presence in self._peers.items():
            silent_s = now - presence.heard_at
            # as `wake_at` adds, not by silent_s: rounding would leave someone neither lost nor waited for
            if now < presence.heard_at + self._silence_s:
                break
            if presence.lost is None:
                presence.lost = f"silent for {silent_s:.0f} s"
                self.changes += 1
            if silent_s > 10 * self._silence_s + 60:
                gone.append(peer)
        for peer in gone:
            del self._peers[peer]
            self.changes += 1

    def wake_at(self) -> float:
        """When the next peer would be lost by silence."""
        heard_at = next((presence.heard_at for presence in self._peers.values() if presence.lost is None), float("inf"))
        return heard_at + self._silence_s

    def report(self, peer: PeerId) -> Report | None:
        """The newest report of `peer`."""
        presence = self._peers.get(peer)
        return presence.report if presence else None

    def live(self) -> tuple[PeerId, ...]:
        """Everyone who is here, in peer-id order."""
        return tuple(sorted(peer for peer, presence in self._peers.items() if presence.lost is None))

    def is_live(self, peer: PeerId) -> bool:
        """Whether `peer` is here."""
        presence = self._peers.get(peer)
        return presence is not None and presence.lost is None

    def why_lost(self, peer: PeerId) -> str:
        """Why `peer` counts as lost, in words; empty while it is here."""
        presence = self._peers.get(peer)
        return "never heard of" if presence is None else presence.lost or ""

    def leaving(self) -> frozenset[PeerId]:
        """Those who said that they want to leave."""
        return frozenset(peer for peer, presence in self._peers.items() if presence.report.leaving)

    def ready(self, head: Head) -> tuple[PeerId, ...]:
        """Those who stand at the head, are here, train and want to stay, in peer-id order."""
        return tuple(peer for peer in self.live() if self._peers[peer].report.trains and self.stands(peer, head))

    def stands(self, peer: PeerId, head: Head) -> bool:
        """Whether `peer` is here, has the model of the head, and wants to stay."""
        presence = self._peers.get(peer)
        if presence is None or presence.lost is not None:
            return False
        said = presence.report
        return said.head == head.hash and said.stage != Stage.SYNCING and not said.leaving

    def is_arriving(self, peer: PeerId, head: Head) -> bool:
        """Whether `peer` is here, has the chain up to its head, and is busy getting the model of it."""
        said = self.report(peer)
        return said is not None and self.is_live(peer) and said.head == head.hash and said.stage == Stage.SYNCING

    def holds_up(self, peer: PeerId, head: Head, barred: frozenset[PeerId]) -> bool:
        """Whether the round after `head` waits for `peer`, of those who are awaited: unheard of, or still applying."""
        if peer in barred:
            return False
        presence = self._peers.get(peer)
        if presence is None:
            return True
        works = presence.lost is None and presence.report.trains and not presence.report.leaving
        return works and not self.stands(peer, head)

    def decide(
        self, head: Head, *, min_peers: int, awaited: Iterable[PeerId], barred: frozenset[PeerId] = frozenset()
    ) -> Decision:
        """Who takes part in the round after `head`, without the `barred`.

        awaited: peers worth a short wait (those of the last round, who still apply it); empty once the wait is over.
        """
        applying, unheard = 0, 0
        for peer in awaited:
            if self.holds_up(peer, head, barred):
                unheard += peer not in self._peers
                applying += peer in self._peers
        if applying:
            return Decision((), f"waiting for {applying} to apply round {head.round}")
        if unheard:
            return Decision((), f"waiting for {unheard} of the last round to say that they are here")
        ready = tuple(peer for peer in self.ready(head) if peer not in barred)
        if len(ready) < min_peers:
            missing = min_peers - len(ready)
            here = {peer for peer in self.live() if self._peers[peer].report.trains}
            syncing = len(here - set(ready) - self.leaving())
            return Decision((), f"waiting for {missing} more peer{'s' * (missing > 1)} ({syncing} syncing)")
        return Decision(ready, f"{len(ready)} peers are ready")
