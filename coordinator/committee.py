"""Who votes after the next block: a leader's choice, from the committee that is and from what the others report.

Whoever contributed stays or comes in, and so does the coordinator that the newest delegation names, once it stands at
the head. Who is lost, leaves or is barred goes. A voter that reports another disk is named as that disk.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.membership import Membership
from dugnad.coordinator.messages import Voter
from dugnad.coordinator.votes import chosen
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import PeerId


@dataclass(frozen=True, slots=True)
class Succession:
    """What the choice depends on, at one moment; `barred`: who gets no vote, `leaving`: whether the leader wants to go.

    leader, incarnation: who chooses, as which disk. delegation: the newest that it knows. is_banned: whether the
    leader is.
    """

    ledger: Ledger
    membership: Membership
    leader: PeerId
    incarnation: bytes
    delegation: Delegation | None
    barred: frozenset[PeerId]
    leaving: bool
    is_banned: bool

    def members(self, stay: Iterable[PeerId]) -> dict[PeerId, bytes]:
        """Who of those that `stay`, and the coordinator, may vote next, {peer: incarnation}; not who leaves."""
        head, membership, mine = self.ledger.head, self.membership, {self.leader: self.incarnation}
        gone = membership.leaving() | self.barred | (mine.keys() if self.leaving else frozenset())
        delegated = self.delegation
        peers = set(stay)
        if delegated is not None and self._is_here(delegated.coordinator):
            peers.add(delegated.coordinator)
        elif head.coordinator is not None and not self._is_here(head.coordinator):
            peers.discard(head.coordinator)
        peers -= {peer for peer in peers if membership.report(peer) and not membership.is_live(peer)}
        told = {peer: said.incarnation for peer in peers if (said := membership.report(peer)) is not None}
        disks = self._disks | told | mine
        members = {peer: disks[peer] for peer in peers - gone if peer in disks}
        coordinator = delegated.coordinator if delegated is not None else head.coordinator
        return chosen(members, head.voters, coordinator, head.hash)

    @property
    def last_member(self) -> dict[PeerId, bytes]:
        """The leader: when all are leaving, somebody must be left to let the others go, and to go last.

        One that is banned is not: the others let each other go. One whose time is over may get more.
        """
        return {} if self.is_banned else {self.leader: self.incarnation}

    def seat(self, members: Mapping[PeerId, bytes]) -> Delegation | None:
        """Who has the coordinator's seat in a committee of `members`."""
        delegated = self.delegation
        holds = delegated is not None and delegated.coordinator in members.keys() - self.barred
        return delegated if holds else None

    def committee(self, members: Mapping[PeerId, bytes]) -> tuple[Voter, ...]:
        """The committee of `members`, weighed."""
        seat = self.seat(members)
        return self.ledger.rule.weigh(members, None if seat is None else seat.coordinator, self.ledger.credit)

    def change(self, *, settled: bool) -> dict[PeerId, bytes]:
        """Who is to vote instead of the committee that is, between rounds; empty where no block is needed for that.

        settled: whether whoever is here had time to say so.
        """
        head, rule, membership = self.ledger.head, self.ledger.rule, self.membership
        heard = {peer for peer in head.voters if membership.report(peer) or peer == self.leader}
        if heard != head.voters and not settled:
            return {}
        if not rule.decided(head.committee, {*membership.live(), self.leader}):
            return {}  # if the others come back, they should find the committee that they know
        members = self.members(heard) or self.last_member
        seat = self.seat(members)
        if not members or (members == self._disks and (seat is None or seat.coordinator == head.coordinator)):
            return {}
        # else it would wait for ever for who has died with the disk that the committee knows
        return members if self._can_decide(members) else {}

    @property
    def _disks(self) -> dict[PeerId, bytes]:
        """The committee that is, {peer: incarnation}."""
        return {voter.peer: voter.incarnation for voter in self.ledger.head.committee}

    def _is_here(self, peer: PeerId) -> bool:
        return peer == self.leader or self.membership.stands(peer, self.ledger.head)

    def _can_decide(self, members: Mapping[PeerId, bytes]) -> bool:
        """Whether those of `members` who are here, each with the disk that is named, are a quorum among them."""
        report = self.membership.report
        live = {
            peer for peer in self.membership.live() if (said := report(peer)) and said.incarnation == members.get(peer)
        }
        return self.ledger.rule.decided(self.committee(members), live | {self.leader})
