"""The half of a round that only the leader runs: plan, freeze, propose, commit.

    IDLE     who is ready?            -> Plan to the members                                    -> GATHER
    GATHER   Contribution, Have       -> everyone here is held whole, or the deadline: Freeze   -> REDUCE
    REDUCE   result bytes arrive      -> every part is here: Proposal to the committee          -> VOTE
    VOTE     Vote                     -> a quorum: Commit, durable before it is said            -> IDLE

A member that is lost is no longer waited for. A lost *owner* of parts, or one that does not deliver by the deadline,
costs a view: the same round is planned again with other owners, and every contribution that is still held whole
counts. Nothing is undone by a failed attempt, since nothing was done: the model moves by commits alone.

Reports say what each member last saw, so what was lost on the way is said again; Standing does the same for the leader.
The lead itself is a seat that one peer holds, by the organizer's delegation, for a term.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from dugnad.configs.recipe import Recipe
from dugnad.coordinator import follower as following
from dugnad.coordinator import ranges
from dugnad.coordinator.follower import Cost, Follower, Refused, Send, Store
from dugnad.coordinator.membership import Membership, Stage
from dugnad.coordinator.messages import (
    MAX_PEERS,
    Applied,
    Ballot,
    Block,
    Commit,
    Contribution,
    Delegation,
    Entry,
    Freeze,
    Have,
    Message,
    Plan,
    Proposal,
    Report,
    Seat,
    Standing,
    Vote,
    applied_payload,
    vote_payload,
)
from dugnad.coordinator.votes import Signer, committee_of, has_quorum, quorum_weight, weight_of
from dugnad.dht.identity import PeerId

MAX_VECTORS = 2
"""How many vectors of one contributor an owner holds: the newest, and one of a seat that was changed."""
SETTLE_S = 5.0
"""How long those of the last round are awaited, after a commit or a start, to say that they stand at the head.

Who says that it is getting there is awaited for as long as an exchange may take.
"""
SHOWN_ROUNDS = 8
"""Of how many rounds the signed model digests are kept to show to joiners."""


class Assign(Protocol):
    """`optim.plan.assign_parts`, which this floor does not import."""

    def __call__(
        self, num_parts: int, members: Sequence[tuple[PeerId, float]], *, previous: tuple[PeerId, ...] | None
    ) -> tuple[PeerId, ...]:
        """Return the owner of each part."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The work of `peer` does not count in this round, for a reason in a word or two."""

    peer: PeerId
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep durably what `peer` signed to have applied; nothing waits for it."""

    peer: PeerId
    said: Applied


Effect = following.Effect | Keep | LeftOut


class Phase(StrEnum):
    """Where the leader is in a round."""

    IDLE = "idle"
    GATHER = "gather"
    REDUCE = "reduce"
    VOTE = "vote"
    FINISHED = "finished"


@dataclass(slots=True)
class _Round:
    """One round in the making; `seats` holds everyone who was ever given work in it, for the data ranges' sake."""

    redo: ranges.Ranges
    cursor: int
    steps: int
    plan: Plan
    deadline: float
    seats: dict[PeerId, Seat] = field(default_factory=dict)
    contributions: dict[PeerId, Contribution] = field(default_factory=dict)
    held: dict[tuple[PeerId, PeerId], tuple[bytes, ...]] = field(default_factory=dict)
    """(owner, contributor) -> roots of what the owner holds whole, in this view; newest last, MAX_VECTORS at most."""
    slow: set[PeerId] = field(default_factory=set)
    """Owners that were here and did not deliver."""
    freeze: Freeze | None = None
    results: dict[int, bytes] = field(default_factory=dict)
    proposal: Proposal | None = None
    ballots: dict[PeerId, Ballot] = field(default_factory=dict)


class Leader:
    """Leads the run for one term; `follower` is this peer's own voting half."""

    def __init__(
        self, follower: Follower, signer: Signer, recipe: Recipe, delegation: Delegation, num_parts: int, assign: Assign
    ) -> None:
        self.phase = Phase.IDLE
        self.reason = "starting"
        self.stopping = False
        self.membership = Membership(recipe.rounds.silence_s)
        self.follower = follower
        self.validation: tuple[int, float | None] = (0, None)
        """The newest (round, validation loss) that the shell measured."""
        self.digests: dict[int, dict[PeerId, Applied]] = {}
        """round -> peer -> what it said it applied, of the newest rounds."""
        self._signer = signer
        self._recipe = recipe
        self._delegation = delegation
        self._num_parts = num_parts
        self._assign = assign
        self._round: _Round | None = None
        self._next_view = 0
        self._awaited: tuple[PeerId, ...] = ()
        self._settle_until = 0.0
        self._settle_limit = 0.0
        self._report_at = 0.0
        self._told_at: dict[PeerId, float] = {}
        self._handlers: dict[type[Message], Callable[..., list[Effect]]] = {
            Report: self._on_report,
            Contribution: self._on_contribution,
            Have: self._on_have,
            Vote: self._on_vote,
            Applied: self._on_applied,
        }
        follower.receive(signer.peer_id, delegation, now=0.0)

    # -- what happens to the leader

    def receive(self, sender: PeerId, message: Message, *, now: float) -> list[Effect]:
        """Take any message of a round; effects in the order in which they must happen."""
        handler = self._handlers.get(type(message))
        if handler is not None:
            return self._settle(handler(sender, message, now), now)
        if self.follower.handles(message):
            return self._settle(self.follower.receive(sender, message, now=now), now)
        return self._settle([Refused(sender, "not a member", f"{type(message).__name__} is a leader's word")], now)

    def result(
        self, owner: PeerId, order: tuple[int, int, int], parts: dict[int, bytes], *, now: float
    ) -> list[Effect]:
        """`owner` sent the bytes of encoded averages, {part: digest}; they are checked and on disk here.

        order: the (round, term, view) that they were made in.
        """
        out = self.follower.holds(tuple(parts.values()), now=now)
        work = self._round
        if work is not None and self.phase is Phase.REDUCE and order == work.plan.order:
            owned = {part for part, who in enumerate(work.plan.owners) if who == owner}
            work.results.update((part, digest) for part, digest in parts.items() if part in owned)
        return self._settle(out, now)

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """Blobs that were fetched are checked and on disk."""
        return self._settle(self.follower.holds(digests, now=now), now)

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> list[Effect]:
        """The coordinator's own copy of the model has taken `round_`."""
        return self._settle(self.follower.applied(round_, model, cost, now=now), now)

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """Blobs of the round being applied are damaged on this disk."""
        return self._settle(self.follower.damaged(digests, now=now), now)

    def lost(self, peer: PeerId, why: str, *, now: float) -> list[Effect]:
        """The network says that `peer` does not answer."""
        self.membership.lose(peer, why)
        return self._settle([], now)

    def restore(self, digests: Mapping[int, Mapping[PeerId, Applied]], validation: tuple[int, float | None]) -> None:
        """Take up what this peer's own disk kept of what others signed, and the newest validation loss."""
        self.digests.update({round_: dict(said) for round_, said in digests.items()})
        self.validation = validation

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> list[Effect]:
        """The shell holds the model after `round_`; `since` are the commits after it."""
        committee = self.follower.ledger.head.committee
        self._awaited = tuple(voter.peer for voter in committee if voter.peer != self._signer.peer_id)
        self._settle_until, self._settle_limit = now + SETTLE_S, now + self._recipe.rounds.exchange_s
        return self._settle(self.follower.synced(round_, model, since, now=now), now)

    def stop(self, *, now: float) -> list[Effect]:
        """Plan no further round; the one under way is finished. `phase` is IDLE when it is safe to go."""
        self.stopping = True
        return self._settle([], now)

    def tick(self, *, now: float) -> list[Effect]:
        """Let time pass: silences, deadlines, and the leader's own standing."""
        self.membership.tick(now=now)
        out = self._settle(self.follower.tick(now=now), now)
        if now >= self._report_at:
            self._report_at = now + self._recipe.rounds.report_s
            out.append(Send(self.membership.live(), self.standing()))
        return out

    def wake_at(self) -> float:
        """When `tick` has something to do next."""
        return min(self._report_at, self.membership.wake_at(), self.follower.wake_at(), self._decide_at())

    def _decide_at(self) -> float:
        """When time alone makes a difference to the round."""
        work = self._round
        if work is None:
            return self._settle_until if self._awaited else float("inf")
        waits_for_us = self.phase is Phase.REDUCE and not self._missing(work)
        return float("inf") if waits_for_us else work.deadline

    # -- what others may ask

    def standing(self) -> Standing:
        """Where the run stands, in words."""
        head = self.follower.ledger.head
        finished = self.phase is Phase.FINISHED
        val_round, val_loss = self.validation
        term = self._delegation.term
        return Standing(term, head.round, head.hash, self.phase, self.reason[:200], finished, val_round, val_loss)

    @property
    def plan(self) -> Plan | None:
        """The plan of the round under way."""
        return self._round.plan if self._round and self._round.plan.seats else None

    def state_ballots(self, round_: int, model: bytes) -> tuple[Ballot, ...]:
        """Who signed that `model` is the digest after `round_`."""
        said = self.digests.get(round_, {})
        return tuple(Ballot(peer, applied.signature) for peer, applied in said.items() if applied.model == model)

    # -- messages

    def _on_report(self, sender: PeerId, said: Report, now: float) -> list[Effect]:
        if not self.membership.heard(sender, said, now=now):
            return [Refused(sender, "full", f"{MAX_PEERS} peers are here already")]
        if said.term < self._delegation.term:
            return [Send((sender,), self._delegation)]
        if said.head_round > self.follower.ledger.head.round:  # our disk is an older copy
            return list(self.follower.behind(said.head_round, sender, now=now))
        if now < self._told_at.get(sender, 0.0) + self._recipe.rounds.report_s:
            return []
        again = self._unheard(sender, said)
        return self._tell((sender,), again, now) if again is not None else []

    def _unheard(self, peer: PeerId, said: Report) -> Message | None:
        """What `peer`, by its own report, has not heard yet."""
        ledger, work = self.follower.ledger, self._round
        if said.head_round < ledger.head.round:
            return ledger.tip if said.head_round == ledger.head.round - 1 else None
        if work is None:
            return None
        if self.phase is Phase.VOTE:
            votes = any(voter.peer == peer for voter in ledger.head.committee)
            return work.proposal if votes and peer not in work.ballots else None
        if (said.round, said.view) != (work.plan.round, work.plan.view):
            return work.plan if work.plan.seat_of(peer) else None
        return work.freeze if said.stage in (Stage.TRAINING, Stage.CONTRIBUTED) else None

    def _on_contribution(self, sender: PeerId, said: Contribution, now: float) -> list[Effect]:
        work, head = self._round, self.follower.ledger.head
        if work is None or (said.epoch, said.round, said.head) != (head.epoch, head.round + 1, head.hash):
            return [LeftOut(sender, "stale contribution", f"round {said.round}; this is round {head.round + 1}")]
        seat = work.seats.get(sender)
        if seat is None:
            return [LeftOut(sender, "no seat", f"no work was given in round {said.round}")]
        samples = ranges.count(said.ranges)
        if not samples or said.ranges != ranges.take(seat.ranges, samples)[0]:
            return [LeftOut(sender, "other samples", "it was trained on others than those of its seat")]
        if said.tokens != samples * self._recipe.model.context:
            return [LeftOut(sender, "bad contribution", f"{said.tokens} tokens in {samples} samples")]
        if not abs(said.loss) < float("inf"):
            return [LeftOut(sender, "non-finite", "its loss is not a finite number")]
        work.contributions[sender] = said
        return []

    def _on_have(self, sender: PeerId, said: Have, now: float) -> list[Effect]:
        work = self._round
        if work is None or (said.round, said.term, said.view) != work.plan.order:
            return []
        if sender not in work.plan.owners or said.contributor not in work.seats:
            return [Refused(sender, "no seat", f"it holds parts of {said.contributor} that nobody gave it")]
        known = work.held.get((sender, said.contributor), ())
        if said.root not in known:
            work.held[sender, said.contributor] = (*known, said.root)[-MAX_VECTORS:]
        return []

    def _on_vote(self, sender: PeerId, said: Vote, now: float) -> list[Effect]:
        work, ledger = self._round, self.follower.ledger
        if work is None or work.proposal is None or said.block != work.proposal.block.hash:
            return []
        if all(voter.peer != sender for voter in ledger.head.committee):
            return [Refused(sender, "not a member", "it has no vote in this round")]
        block = work.proposal.block
        # the block's own words, not the vote's: a certificate is checked against those
        payload = vote_payload(ledger.run, block.epoch, block.round, block.term, block.view, said.block)
        if not self._signer.verify(sender, payload, said.signature):
            return [Refused(sender, "bad signature", f"vote on round {said.round}")]
        work.ballots[sender] = Ballot(sender, said.signature)
        return []

    def _on_applied(self, sender: PeerId, said: Applied, now: float) -> list[Effect]:
        ledger = self.follower.ledger
        if said.block != ledger.hashes.get(said.round):
            return [Refused(sender, "foreign chain", f"it applied another block of round {said.round}, or an old one")]
        payload = applied_payload(ledger.run, said.round, said.block, said.model)
        if not self._signer.verify(sender, payload, said.signature):
            return [Refused(sender, "bad signature", f"model digest after round {said.round}")]
        kept: list[Effect] = []
        known_here = sender == self._signer.peer_id or self.membership.report(sender) is not None
        if known_here and said.round > ledger.head.round - SHOWN_ROUNDS:
            known = self.digests.setdefault(said.round, {})
            if sender not in known or known[sender].model != said.model:  # said again, it may have forgotten its cost
                known[sender] = said
                kept = [Keep(sender, said)]
        for old in [r for r in self.digests if r <= ledger.head.round - SHOWN_ROUNDS]:
            del self.digests[old]
        return kept

    # -- decisions

    def _settle(self, effects: Sequence[Effect], now: float) -> list[Effect]:
        """Hand our own messages to ourselves and take every step that is now possible, until nothing changes."""
        done: list[Effect] = []
        pending = effects
        while True:
            for effect in pending:
                if isinstance(effect, Send) and self._signer.peer_id in effect.to:
                    others = tuple(peer for peer in effect.to if peer != self._signer.peer_id)
                    if others:
                        done.append(Send(others, effect.message))
                    self_said = self._loop_back(effect.message, now)
                    done.extend(self._settle(self_said, now) if self_said else [])
                else:
                    done.append(effect)
            pending = self._step(now)
            if not pending:
                return done

    def _loop_back(self, message: Message, now: float) -> list[Effect]:
        handler = self._handlers.get(type(message))
        me = self._signer.peer_id
        return handler(me, message, now) if handler else list(self.follower.receive(me, message, now=now))

    def _step(self, now: float) -> list[Effect]:
        work = self._round
        if work is not None and work.plan.head != self.follower.ledger.head.hash:
            return self._abandon("the chain went on without this round")
        if self.phase is Phase.GATHER:
            return self._gather(now)
        if self.phase is Phase.REDUCE:
            return self._reduce(now)
        if self.phase is Phase.VOTE:
            return self._count_votes(now)
        return self._idle(now)

    def _idle(self, now: float) -> list[Effect]:
        head = self.follower.ledger.head
        if self.follower.model is None:
            return []  # starting
        if now >= self._settle_until:
            arriving = now < self._settle_limit
            self._awaited = tuple(p for p in self._awaited if arriving and self.membership.is_arriving(p, head))
            self._settle_until = self._settle_limit
        steps = self._recipe.rounds.steps_at(head.global_step)
        if steps == 0:
            self.phase, self.reason = Phase.FINISHED, f"finished: all {head.global_step} steps are done"
            return []
        if self.stopping:
            self.reason = "the coordinator is leaving"
            return []
        decision = self.membership.decide(head, min_peers=self._recipe.rounds.min_peers, awaited=self._awaited)
        self.reason = decision.reason
        if decision.members:
            return self._open(decision.members, steps, now)
        return self._propose_departures(now)

    def _open(self, members: Sequence[PeerId], steps: int, now: float) -> list[Effect]:
        head = self.follower.ledger.head
        deadline = now + self._recipe.rounds.train_s + self._recipe.rounds.exchange_s
        work = _Round(head.redo, head.cursor, steps, self._empty_plan(), deadline)
        for peer in sorted(members):
            work.seats[peer] = self._seat(work, peer)
        self._round = work
        return self._plan_view(work, now)

    def _seat(self, work: _Round, peer: PeerId) -> Seat:
        """Allot samples to `peer`: first those that others left undone, then new ones."""
        samples = work.steps * self._recipe.inner.batch_sequences
        allotted, work.redo = ranges.take(work.redo, samples)
        fresh = samples - ranges.count(allotted)
        if fresh:
            allotted = (*allotted, (work.cursor, work.cursor + fresh))
            work.cursor += fresh
        report = self.membership.report(peer)
        return Seat(peer, work.steps, allotted, report.addresses if report else ())

    def _empty_plan(self) -> Plan:
        head, rounds = self.follower.ledger.head, self._recipe.rounds
        return Plan(
            head.epoch, head.round + 1, self._delegation.term, self._next_view, head.hash, head.global_step,
            (), (), rounds.train_s, rounds.exchange_s,
        )  # fmt: skip

    def _plan_view(self, work: _Round, now: float) -> list[Effect]:
        """Plan the round, first or again, for those who are here; their data ranges stay as they were."""
        seats = tuple(seat for peer, seat in sorted(work.seats.items()) if self._may_reduce(peer))
        if not seats:
            return self._abandon("everyone who had work is gone")
        blank = self._empty_plan()
        owners = self._owners(work, tuple(seat.peer for seat in seats))
        work.plan = Plan(
            blank.epoch, blank.round, blank.term, blank.view, blank.head, blank.global_step,
            seats, owners, blank.train_s, blank.exchange_s,
        )  # fmt: skip
        self._next_view += 1
        work.deadline = max(work.deadline, now + self._recipe.rounds.exchange_s)
        work.freeze, work.proposal = None, None
        work.held.clear()
        work.results.clear()
        self.phase = Phase.GATHER
        self.reason = f"round {work.plan.round}: {len(seats)} peers work, {len(set(owners))} reduce"
        return self._tell(work.plan.members, work.plan, now)

    def _owners(self, work: _Round, members: tuple[PeerId, ...]) -> tuple[PeerId, ...]:
        reports = {peer: report for peer in members if (report := self.membership.report(peer))}
        able = [peer for peer in members if reports[peer].accepts and peer not in work.slow]
        if not able:
            work.slow.clear()
            able = list(members)
        # who does not know its uplink counts as the slowest who does
        slowest = min((reports[peer].uplink for peer in able if reports[peer].uplink > 0), default=1.0)
        weighed = [(peer, reports[peer].uplink or slowest) for peer in able]
        return self._assign(self._num_parts, weighed, previous=work.plan.owners or None)

    def _abandon(self, reason: str) -> list[Effect]:
        self._round, self.phase, self.reason = None, Phase.IDLE, reason
        return []

    def _lost_owners(self, work: _Round) -> list[PeerId]:
        return [peer for peer in sorted(set(work.plan.owners)) if not self._may_reduce(peer)]

    def _may_reduce(self, peer: PeerId) -> bool:
        """Whether `peer` is here and has not started anew, its bytes forgotten."""
        said = self.membership.report(peer)
        return said is not None and said.stage != Stage.SYNCING and self.membership.is_live(peer)

    def _whole(self, work: _Round) -> dict[PeerId, Contribution]:
        """Contributions of which every owner holds all its parts, in peer-id order."""
        owners = set(work.plan.owners)
        return {
            peer: said
            for peer, said in sorted(work.contributions.items())
            if all(said.root in work.held.get((owner, peer), ()) for owner in owners)
        }

    def _declined(self, work: _Round, peer: PeerId) -> bool:
        """Whether `peer` knows this plan and says that it has nothing to contribute to it."""
        said = self.membership.report(peer)
        order = (work.plan.round, work.plan.term, work.plan.view)
        return said is not None and said.stage == Stage.WAITING and (said.round, said.term, said.view) == order

    def _gather(self, now: float) -> list[Effect]:
        work = self._round
        assert work is not None
        if self._lost_owners(work):
            return self._plan_view(work, now)
        whole = self._whole(work)
        here = [p for p in work.plan.members if self.membership.is_live(p) and not self._declined(work, p)]
        waiting = [peer for peer in here if peer not in whole]
        self.reason = f"round {work.plan.round}: {len(whole)} of {len(work.plan.seats)} contributions held"
        if waiting and now < work.deadline:
            return []
        if whole:
            return self._freeze(work, now)
        if not waiting:
            return self._abandon("nobody's work could be gathered")
        self._mark_slow(work, {owner for owner in work.plan.owners if self._holds_nothing(work, owner)})
        return self._plan_view(work, now)

    def _holds_nothing(self, work: _Round, owner: PeerId) -> bool:
        promised = {peer: said.root for peer, said in work.contributions.items() if peer != owner}
        return bool(promised) and not any(root in work.held.get((owner, p), ()) for p, root in promised.items())

    @staticmethod
    def _mark_slow(work: _Round, owners: set[PeerId]) -> None:
        if owners != set(work.plan.owners):
            work.slow |= owners

    def _freeze(self, work: _Round, now: float) -> list[Effect]:
        entries = tuple(
            Entry(peer, said.root, said.tokens, said.loss, said.ranges) for peer, said in self._whole(work).items()
        )
        work.freeze = Freeze(work.plan.round, work.plan.term, work.plan.view, entries)
        work.deadline = now + self._recipe.rounds.exchange_s
        self.phase = Phase.REDUCE
        counted = {entry.peer for entry in entries}
        late = [
            LeftOut(peer, "late", f"not all of its bytes were there when round {work.plan.round} was frozen")
            for peer in sorted(work.contributions.keys() - counted)
        ]
        return [*late, *self._tell(work.plan.members, work.freeze, now)]

    def _reduce(self, now: float) -> list[Effect]:
        work = self._round
        assert work is not None
        assert work.freeze is not None
        if self._lost_owners(work):
            return self._plan_view(work, now)
        missing = self._missing(work)
        self.reason = f"round {work.plan.round}: {self._num_parts - len(missing)} of {self._num_parts} parts reduced"
        if missing and now >= work.deadline:
            self._mark_slow(work, {work.plan.owners[part] for part in missing})
            return self._plan_view(work, now)
        if missing or not self.follower.at_head or self.follower.model is None:
            return []
        parts = tuple(work.results[part] for part in range(self._num_parts))
        return self._propose(work, work.freeze.entries, parts, now)

    def _missing(self, work: _Round) -> list[int]:
        return [part for part in range(self._num_parts) if part not in work.results]

    def _propose_departures(self, now: float) -> list[Effect]:
        """Between rounds, let those who want to leave go: a block that changes nothing but the committee."""
        committee = self.follower.ledger.head.committee
        leaving = self.membership.leaving() & {voter.peer for voter in committee}
        if not leaving or not self.follower.at_head or self.follower.model is None:
            return []
        head = self.follower.ledger.head
        self._round = _Round(head.redo, head.cursor, 0, self._empty_plan(), float("inf"))
        self._next_view += 1
        return self._propose(self._round, (), (), now)

    def _propose(self, work: _Round, entries: tuple[Entry, ...], parts: tuple[bytes, ...], now: float) -> list[Effect]:
        head, plan = self.follower.ledger.head, work.plan
        assert self.follower.model is not None
        allotted = [r for seat in work.seats.values() for r in seat.ranges]
        done = [r for entry in entries for r in entry.ranges]
        stay = {e.peer for e in entries} if entries else {voter.peer for voter in head.committee}
        committee = committee_of(self._signer.peer_id, stay - self.membership.leaving())
        block = Block(
            epoch=head.epoch,
            round=plan.round,
            term=plan.term,
            view=plan.view,
            parent=head.hash,
            model_before=self.follower.model,
            global_step=head.global_step + work.steps,
            steps=work.steps,
            entries=entries,
            parts=parts,
            redo=ranges.minus((*work.redo, *allotted), done),
            cursor=work.cursor,
            committee=committee,
        )
        work.proposal = Proposal(block)
        work.deadline = float("inf")
        self.phase = Phase.VOTE
        voters = {voter.peer for voter in head.committee if self.membership.is_live(voter.peer)}
        # members without a vote get it too: they hold its parts and may apply it without asking for them
        to = tuple(sorted(voters | set(plan.members) | {self._signer.peer_id}))
        return self._tell(to, work.proposal, now)

    def _count_votes(self, now: float) -> list[Effect]:
        work = self._round
        assert work is not None
        assert work.proposal is not None
        committee = self.follower.ledger.head.committee
        if not has_quorum(committee, work.ballots):
            have, need = weight_of(committee, work.ballots), quorum_weight(committee)
            absent = [v.peer for v in committee if v.peer not in work.ballots and not self.membership.is_live(v.peer)]
            gone = f"; {len(absent)} voters are gone, and must come back with their folders" if absent else ""
            self.reason = f"round {work.plan.round}: {have} of {need} votes{gone}"
            return []
        voters = {voter.peer for voter in committee}
        ballots = tuple(ballot for peer, ballot in sorted(work.ballots.items()) if peer in voters)
        commit = Commit(work.proposal.block, ballots)
        self._round, self.phase, self._next_view = None, Phase.IDLE, 0
        self._awaited = self.membership.ready(self.follower.ledger.head)
        self._settle_until, self._settle_limit = now + SETTLE_S, now + self._recipe.rounds.exchange_s
        followed = self.follower.receive(self._signer.peer_id, commit, now=now)
        assert isinstance(followed[0], Store), "a commit is durable before anyone hears of it"
        return [followed[0], *self._tell(self.membership.live(), commit, now), *followed[1:]]

    def _tell(self, to: tuple[PeerId, ...], message: Message, now: float) -> list[Effect]:
        for peer in to:
            self._told_at[peer] = now
        return [Send(to, message)]
