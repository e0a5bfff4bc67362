"""The round in the making: who has work on which samples, who owns which part, and whose work is held whole.

Seats are given once and stay: work on them may be done already. Who owns and who backs up is planned anew with every
attempt, and with it forgotten what owners hold, which they say again.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from dugnad.coordinator import ranges
from dugnad.coordinator.effects import LeftOut
from dugnad.coordinator.ledger import Head
from dugnad.coordinator.membership import Membership, Stage
from dugnad.coordinator.messages import MAX_VOTERS, Block, Contribution, Entry, Freeze, Have, Plan, Seat, Voter
from dugnad.coordinator.poll import Poll
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Reach

MAX_VECTORS = 2
"""How many vectors of one contributor an owner holds: the newest, and one of a seat that was changed."""
MAX_OWNERS = 64
"""How many reduce at most: above that, connections and messages cost more than the work that is shared."""


class Assign(Protocol):
    """`optim.plan.assign_parts`, which this floor does not import."""

    def __call__(
        self, num_parts: int, members: Sequence[tuple[PeerId, float]], *, previous: tuple[PeerId, ...] | None
    ) -> tuple[PeerId, ...]:
        """Return the owner of each part."""


@dataclass(slots=True)
class Round:
    """One round in the making; `seats` holds everyone who was ever given work in it, for the data ranges' sake."""

    membership: Membership
    redo: ranges.Ranges
    cursor: int
    steps: int
    plan: Plan
    deadline: float
    seats: dict[PeerId, Seat] = field(default_factory=dict)
    contributions: dict[PeerId, Contribution] = field(default_factory=dict)
    held: dict[tuple[PeerId, PeerId], tuple[bytes, ...]] = field(default_factory=dict)
    """(owner, contributor) -> roots of what the owner holds whole in this attempt: MAX_VECTORS at most, newest last."""
    holders: Counter[tuple[PeerId, bytes]] = field(default_factory=Counter)
    """(contributor, root) -> how many owners hold it: the same, counted."""
    owners: tuple[PeerId, ...] = ()
    """Who owns parts in the plan, in peer-id order."""
    owners_seen: int = -1
    """At which `Membership.changes` all of them were there."""
    whole: set[PeerId] = field(default_factory=set)
    """Whose contributions every owner holds whole."""
    awaited: PeerId | None = None
    """Who was waited for when we looked last: while it still is, nobody else needs a look."""
    slow: set[PeerId] = field(default_factory=set)
    """Owners that were here and did not deliver."""
    barred: frozenset[PeerId] = frozenset()
    """Whose work counts no more, and who reduces nothing."""
    freeze: Freeze | None = None
    admissions: tuple[bytes, ...] = ()
    """Proofs of those in the frozen set who contribute for the first time."""
    results: dict[int, bytes] = field(default_factory=dict)
    poll: Poll | None = None

    # -- who works

    def inherit(self, seats: Sequence[Seat]) -> None:
        """Keep the seats that a leader before us gave in this round: work on them may be done already."""
        given = [r for seat in seats for r in seat.ranges]
        cursor = max([self.cursor, *(end for _, end in given)])
        allowed = ranges.normal((*self.redo, (self.cursor, cursor)))
        if not ranges.disjoint(given) or ranges.minus(given, allowed):
            return  # no seats at all rather than such as no block may have
        self.cursor, self.redo = cursor, ranges.minus(allowed, given)
        self.seats.update((seat.peer, seat) for seat in seats)

    def give_seat(self, peer: PeerId, samples: int) -> None:
        """Allot samples to `peer`: first those that others left undone, then new ones."""
        allotted, self.redo = ranges.take(self.redo, samples)
        fresh = samples - ranges.count(allotted)
        if fresh:
            allotted = (*allotted, (self.cursor, self.cursor + fresh))
            self.cursor += fresh
        report = self.membership.report(peer)
        self.seats[peer] = Seat(peer, self.steps, allotted, report.addresses if report else ())

    def bar(self, barred: frozenset[PeerId]) -> None:
        """Leave these out from now on."""
        if barred != self.barred:
            self.barred, self.owners_seen, self.awaited = barred, -1, None

    # -- who reduces

    def attempt(self, empty: Plan, assign: Assign, num_parts: int) -> bool:
        """Plan for those who are here, in the order of `empty`; whether there are any."""
        seats = tuple(seat for peer, seat in sorted(self.seats.items()) if self._may_reduce(peer))
        if not seats:
            return False
        able = self._able(tuple(seat.peer for seat in seats))
        owners = self._owners(able, assign, num_parts)
        backups = _backups(owners, sorted(able))
        self.plan = msgspec.structs.replace(empty, seats=seats, owners=owners, backups=backups)
        self.freeze, self.poll, self.admissions = None, None, ()
        self.owners, self.owners_seen = tuple(sorted(set(owners))), -1
        self.held.clear()
        self.holders.clear()
        self.whole.clear()
        self.results.clear()
        return True

    def _able(self, members: tuple[PeerId, ...]) -> dict[PeerId, float]:
        """Who of `members` may own parts, with its uplink."""
        reports = {peer: report for peer in members if (report := self.membership.report(peer))}
        able = [peer for peer in _reachable({peer: reports[peer].reach for peer in members}) if peer not in self.slow]
        if not able:
            self.slow.clear()
            able = list(members)
        # who does not know its uplink counts as the slowest who does
        slowest = min((reports[peer].uplink for peer in able if reports[peer].uplink > 0), default=1.0)
        weighed = {peer: reports[peer].uplink or slowest for peer in able}
        before = set(self.plan.owners)
        fastest = sorted(able, key=lambda peer: (peer not in before, -weighed[peer], peer))[:MAX_OWNERS]
        return {peer: weighed[peer] for peer in fastest}

    def _owners(self, able: Mapping[PeerId, float], assign: Assign, num_parts: int) -> tuple[PeerId, ...]:
        plan = self.plan
        if not plan.owners:
            return assign(num_parts, list(able.items()), previous=None)
        promoted = tuple(
            owner if owner in able else backup for owner, backup in zip(plan.owners, plan.backups, strict=True)
        )
        if set(promoted) <= able.keys():
            return promoted
        return assign(num_parts, list(able.items()), previous=promoted)

    def lost_owners(self) -> list[PeerId]:
        """Owners that are gone, or have started anew."""
        if self.owners_seen == self.membership.changes:
            return []
        lost = [peer for peer in self.owners if not self._may_reduce(peer)]
        self.owners_seen = -1 if lost else self.membership.changes
        return lost

    def _may_reduce(self, peer: PeerId) -> bool:
        """Whether `peer` is here and has not started anew, its bytes forgotten."""
        said = self.membership.report(peer)
        here = said is not None and said.stage != Stage.SYNCING and self.membership.is_live(peer)
        return here and peer not in self.barred

    def mark_slow(self, owners: set[PeerId]) -> None:
        """These did not take or deliver what they had to; where that is all of them, none is to blame alone."""
        if owners != set(self.owners):
            self.slow |= owners

    def missing(self) -> list[int]:
        """Parts whose average is not here."""
        return [part for part in range(len(self.plan.owners)) if part not in self.results]

    # -- whose work counts

    def promise(self, sender: PeerId, said: Contribution, context: int) -> list[LeftOut]:
        """Take a contribution, if it is work of its seat; context: tokens in a sample."""
        seat = self.seats.get(sender)
        if seat is None:
            return [LeftOut(sender, "no seat", f"no work was given in round {said.round}")]
        samples = ranges.count(said.ranges)
        if not samples or said.ranges != ranges.take(seat.ranges, samples)[0]:
            return [LeftOut(sender, "other samples", "it was trained on others than those of its seat")]
        if said.tokens != samples * context:
            return [LeftOut(sender, "bad contribution", f"{said.tokens} tokens in {samples} samples")]
        if not abs(said.loss) < float("inf"):
            return [LeftOut(sender, "non-finite", "its loss is not a finite number")]
        self.contributions[sender] = said
        self._look_whether_whole(sender)
        return []

    def hold(self, owner: PeerId, said: Have) -> None:
        """An owner holds these vectors whole."""
        for contributor, root in said.vectors:
            known = self.held.get((owner, contributor), ())
            if contributor not in self.seats or root in known:
                continue
            self.holders[contributor, root] += 1
            for old in known[: len(known) + 1 - MAX_VECTORS]:
                self.holders[contributor, old] -= 1
            self.held[owner, contributor] = (*known, root)[-MAX_VECTORS:]
            self._look_whether_whole(contributor)

    def _look_whether_whole(self, peer: PeerId) -> None:
        said = self.contributions.get(peer)
        if said is not None and self.holders[peer, said.root] == len(self.owners):
            self.whole.add(peer)
        else:
            self.whole.discard(peer)

    def holds_nothing(self, owner: PeerId) -> bool:
        """Whether an owner took nothing of what others promised."""
        promised = {peer: said.root for peer, said in self.contributions.items() if peer != owner}
        return bool(promised) and not any(root in self.held.get((owner, p), ()) for p, root in promised.items())

    def waits_for(self) -> PeerId | None:
        """A member that is here and may still contribute, if there is one."""
        if self.awaited is None or not self._may_contribute(self.awaited):
            self.awaited = next((peer for peer in self.plan.members if self._may_contribute(peer)), None)
        return self.awaited

    def _may_contribute(self, peer: PeerId) -> bool:
        awaited = peer not in self.whole and peer not in self.barred
        return awaited and self.membership.is_live(peer) and not self._declined(peer)

    def _declined(self, peer: PeerId) -> bool:
        """Whether `peer` knows this plan and says that it has nothing to contribute to it."""
        said = self.membership.report(peer)
        known = said is not None and (said.round, said.view, said.attempt) == self.plan.order
        return known and said is not None and said.stage == Stage.WAITING

    def entries(self) -> tuple[Entry, ...]:
        """What every owner holds whole and may count, in peer-id order."""
        return tuple(
            Entry(peer, said.root, said.tokens, said.loss, said.ranges)
            for peer, said in sorted(self.contributions.items())
            if peer in self.whole and peer not in self.barred
        )

    @property
    def counts_barred(self) -> bool:
        """Whether someone was barred whose work is in the frozen set."""
        return self.freeze is not None and any(entry.peer in self.barred for entry in self.freeze.entries)

    # -- what becomes of it

    def block(
        self,
        head: Head,
        model_before: bytes,
        parts: tuple[bytes, ...],
        committee: tuple[Voter, ...],
        coordinator: Delegation | None,
    ) -> Block:
        """The block that says what was done in this round, of which `parts` are the averages, and who votes next."""
        entries = self.freeze.entries if self.freeze else ()
        allotted = [r for seat in self.seats.values() for r in seat.ranges]
        done = [r for entry in entries for r in entry.ranges]
        return Block(
            epoch=head.epoch,
            round=head.round + 1,
            parent=head.hash,
            model_before=model_before,
            global_step=head.global_step + self.steps,
            steps=self.steps,
            entries=entries,
            parts=parts,
            redo=ranges.minus((*self.redo, *allotted), done),
            cursor=self.cursor,
            committee=committee,
            coordinator=coordinator,
            admissions=self.admissions if entries else (),
        )

    # -- who is told

    @property
    def is_small(self) -> bool:
        """Whether the whole of everything may be told to every member."""
        return len(self.plan.seats) <= MAX_VOTERS

    def plans(self, voters: frozenset[PeerId]) -> list[tuple[tuple[PeerId, ...], Plan]]:
        """Who is told which plan: the whole one those who need it, the others one each."""
        whole = tuple(peer for peer in self.plan.members if self._needs_all(peer, voters))
        others = [peer for peer in self.plan.members if not self._needs_all(peer, voters)]
        return [(whole, self.plan), *(((peer,), self.plan_for(peer, voters)) for peer in others)]

    def plan_for(self, peer: PeerId, voters: frozenset[PeerId]) -> Plan:
        """The plan, without the seats that are nothing to `peer`: it sends its work to the owners, and no further."""
        if self._needs_all(peer, voters):
            return self.plan
        seats = [seat for other in (*self.owners, peer) if (seat := self.plan.seat_of(other)) is not None]
        return msgspec.structs.replace(self.plan, seats=tuple(sorted(seats, key=lambda seat: seat.peer)))

    def _needs_all(self, peer: PeerId, voters: frozenset[PeerId]) -> bool:
        """Whether `peer` needs every seat: owners send to all members, and a voter may have to lead this round."""
        return self.is_small or peer in self.owners or peer in voters

    @property
    def folding(self) -> tuple[PeerId, ...]:
        """Who is told of the frozen set: owners fold it; others, as long as they are few, see how far the round is."""
        return self.plan.members if self.is_small else self.owners


def _reachable(reach: Mapping[PeerId, Reach]) -> list[PeerId]:
    """Those whom all the others reach without a relay; where there are none, those whom most of them do."""
    by_reach = {kind: [peer for peer, its in reach.items() if its is kind] for kind in Reach}
    punchable = by_reach[Reach.OPEN] + by_reach[Reach.CONE]  # any two of these get a connection of their own
    if len(punchable) == len(reach):
        return punchable
    return by_reach[Reach.OPEN] or by_reach[Reach.CONE]


def _backups(owners: tuple[PeerId, ...], able: Sequence[PeerId]) -> tuple[PeerId, ...]:
    """Who takes a part over when its owner is lost: the parts of one owner go to many, one after the other."""
    if len(able) == 1:
        return owners
    nth: Counter[PeerId] = Counter()
    at = {peer: index for index, peer in enumerate(able)}
    backups: list[PeerId] = []
    for owner in owners:
        step = 1 + nth[owner] % (len(able) - 1)
        nth[owner] += 1
        backups.append(able[(at[owner] + step) % len(able)])
    return tuple(backups)
