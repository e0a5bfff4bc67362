"""The half of a round that only its leader runs: plan, freeze, propose, lock, commit.

    FOLLOWING  another peer leads      until the view is ours                                         -> IDLE
    IDLE       who is ready?           -> Plan to the members                                         -> GATHER
    GATHER     Contribution, Have      -> everyone here is held whole, or the deadline: Freeze        -> REDUCE
    REDUCE     result bytes arrive     -> every part is here: Proposal to the committee               -> VOTE
    VOTE       prevotes: a quorum      -> Lock;   precommits: a quorum -> Commit, durable before said -> IDLE

A member that is lost is no longer waited for. A lost *owner* of parts, or one that does not deliver by the deadline,
costs an attempt: the same round is planned again, the backups of the lost take over their parts, and every contribution
that is still held whole counts. Nothing is undone by a failed attempt, since nothing was done: the model moves by
commits alone. In one view a leader proposes one block at most; where a lock says which, it proposes that one.

Reports say what each member last saw, so what was lost on the way is said again; Standing does the same for the leader.
In a swarm of more than MAX_VOTERS a leader would spend its uplink on repeating long lists. There the whole plan goes to
voters and owners, and to others what concerns them; the Freeze to owners; the Proposal to voters; and voters pass the
Commit on.
Every voter carries this machine, and the follower says when it is its turn.

Here stand the phases. Whom a round waits for before it is planned is `awaited`; the round itself, its seats, owners and
what is held of it, `planning`; its vote `poll`; who votes next `committee`; what proves a model to joiners `vouched`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

import msgspec

from dugnad.configs.recipe import Recipe
from dugnad.coordinator import follower as following
from dugnad.coordinator.awaited import SETTLE_S, Awaited
from dugnad.coordinator.committee import Succession
from dugnad.coordinator.effects import Cost, Effect, LeftOut, Refused, Send, Store
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.ledger import Head
from dugnad.coordinator.membership import Membership, Stage, stretch
from dugnad.coordinator.messages import (
    MAX_PEERS,
    Applied,
    Block,
    Commit,
    Contribution,
    Entry,
    Freeze,
    Have,
    Lock,
    Plan,
    Proposal,
    Report,
    Standing,
    ViewChange,
    Vote,
)
from dugnad.coordinator.planning import Assign, Round
from dugnad.coordinator.poll import Poll
from dugnad.coordinator.votes import Signer
from dugnad.coordinator.vouched import Vouched
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message

PASS_ON_S = 3.0
"""How long voters may take to pass a commit on, before a member that lacks it is told by the leader."""


class Phase(StrEnum):
    """Where the leader is in a round."""

    FOLLOWING = following.FOLLOWING
    IDLE = "idle"
    GATHER = "gather"
    REDUCE = "reduce"
    VOTE = "vote"
    FINISHED = "finished"


class Leader:
    """Leads the run whenever `follower`, this peer's own voting half, says that it is its turn.

    started: unix seconds when this process began, so that its attempts are told from those before. known_plan: the
    newest plan of the round under way that this peer was given by another leader.
    """

    def __init__(
        self,
        follower: Follower,
        signer: Signer,
        recipe: Recipe,
        num_parts: int,
        assign: Assign,
        *,
        started: int,
        known_plan: Callable[[], Plan | None] = lambda: None,
    ) -> None:
        self.phase = Phase.FOLLOWING
        self.reason = "starting"
        self.leaving = False
        """Whether this peer wants to go, and so to be in no later committee."""
        self.membership = Membership(recipe.rounds.silence_s)
        self.follower = follower
        self.validation: tuple[int, float | None] = (0, None)
        """The newest (round, validation loss) that the shell measured."""
        self.vouched = Vouched(follower.ledger, signer)
        self._signer = signer
        self._recipe = recipe
        self._num_parts = num_parts
        self._assign = assign
        self._known_plan = known_plan
        self._round: Round | None = None
        self._led: tuple[bytes, int] | None = None
        """(head, view) that we lead."""
        self._led_at = 0.0
        """When we took the lead, and forgot whom we knew."""
        self._committed_at = 0.0
        self._next_attempt = started
        self._awaited = Awaited(self.membership, recipe.rounds.exchange_s)
        self._passed_on_by = 0.0
        self._stand_at = 0.0
        self._told_at: dict[PeerId, float] = {}
        self._handlers: dict[type[Message], Callable[..., list[Effect]]] = {
            Report: self._on_report,
            Contribution: self._on_contribution,
            Have: self._on_have,
            Vote: self._on_vote,
            ViewChange: self._on_view_change,
            Applied: self._on_applied,
        }

    # -- what happens to the leader

    def handles(self, message: Message) -> bool:
        """Whether `message` is this machine's or its follower's."""
        return type(message) in self._handlers or self.follower.handles(message)

    def receive(self, sender: PeerId, message: Message, *, now: float) -> list[Effect]:
        """Take one of the messages that `handles` names; effects in the order in which they must happen."""
        self.follower.heard(sender, message, now=now)
        handler = self._handlers.get(type(message))
        if handler is not None:
            return self._settle(handler(sender, message, now), now)
        if self.follower.handles(message):
            return self._settle(self.follower.receive(sender, message, now=now), now)
        return [Refused(sender, "misdirected", f"{type(message).__name__} is for members")]

    def result(
        self, owner: PeerId, order: tuple[int, int, int], parts: dict[int, bytes], *, now: float
    ) -> list[Effect]:
        """The bytes of encoded averages of `owner` are here, {part: digest}, checked and on disk.

        order: the (round, view, attempt) that they were made in.
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
        """This peer's copy of the model has taken `round_`."""
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
        self.vouched.restore(digests)
        self.validation = validation

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> list[Effect]:
        """The shell holds the model after `round_`; `since` are the commits after it."""
        return self._settle(self.follower.synced(round_, model, since, now=now), now)

    def leave(self, *, now: float) -> list[Effect]:
        """This peer wants to go: it is left out of the next committee, if someone else is in it."""
        self.leaving = True
        return self._settle([], now)

    def tick(self, *, now: float) -> list[Effect]:
        """Let time pass: silences, deadlines, and the leader's own standing."""
        self.membership.tick(now=now)
        out = self._settle(self.follower.tick(now=now), now)
        if self._led is not None and now >= self._stand_at:
            self._stand_at = now + self._recipe.rounds.report_s * stretch(self.follower.ledger.head.contributors)
            others = tuple(peer for peer in self._hearers() if peer != self._signer.peer_id)
            out += self._settle(self.follower.receive(self._signer.peer_id, self.standing(), now=now), now)
            out.append(Send(others, self.standing()))
        return out

    def wake_at(self) -> float:
        """When `tick` has something to do next."""
        if self._led is None:
            return self.follower.wake_at()
        return min(self._stand_at, self.membership.wake_at(), self.follower.wake_at(), self._decide_at())

    def _decide_at(self) -> float:
        """When time alone makes a difference to the round."""
        work = self._round
        if work is None:
            return self._awaited.wake_at()
        waits_for_us = self.phase is Phase.REDUCE and not work.missing()
        return float("inf") if waits_for_us else work.deadline

    # -- what others may ask

    def standing(self) -> Standing:
        """Where the run stands, in words."""
        said = self.follower.position()
        if self._led is None:
            return said
        val_round, val_loss = self.validation
        return msgspec.structs.replace(
            said,
            phase=str(self.phase),
            reason=self.reason[:200],
            finished=self.finished,
            val_round=val_round,
            val_loss=val_loss,
        )

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are done."""
        return self._recipe.rounds.steps_at(self.follower.ledger.head.global_step) == 0

    @property
    def plan(self) -> Plan | None:
        """The plan of the round that we lead."""
        return self._round.plan if self._round and self._round.plan.seats else None

    def expects(self, owner: PeerId, order: tuple[int, int, int], parts: Iterable[int]) -> bool:
        """Whether averages of these parts, made by `owner` in that attempt, are on their way here."""
        plan = self.plan or self._known_plan()
        return plan is not None and plan.order == order and all(plan.owners[part] == owner for part in parts)

    def deserted(self, *, now: float) -> bool:
        """Whether we lead, and nobody else of the committee is here, though there was time to say so.

        Also while votes are awaited: none will come.
        """
        works = self.phase in (Phase.FOLLOWING, Phase.GATHER, Phase.REDUCE)
        unheard = now < max(self._led_at, self._committed_at) + SETTLE_S
        return not works and not unheard and not self._others(self.follower.ledger.head)

    def _hearers(self) -> tuple[PeerId, ...]:
        """Whom a leader keeps in touch with: who is here, and the voters, who may not know yet whom to report to."""
        return tuple(sorted({*self.membership.live(), *self.follower.ledger.head.voters}))

    # -- messages

    def _on_report(self, sender: PeerId, said: Report, now: float) -> list[Effect]:
        place, head = (said.epoch, said.head_round), self.follower.ledger.head
        behind = self.follower.behind(place, sender, now=now)  # our disk is an older copy, or another epoch began
        if self._led is None or place != head.place or said.in_view < self.follower.view:
            if self._led is not None:
                self.membership.heard(sender, said, now=now)
            if now < self._passed_on_by and place == (head.epoch, head.round - 1):
                return [*behind]
            return [*behind, *self.follower.put_right(sender, place, said.in_view, now=now)]
        if not self.membership.heard(sender, said, now=now):
            return [Refused(sender, "full", f"{MAX_PEERS} peers are here already")]
        out = self._outbid(said, now)
        again_s = self._recipe.rounds.report_s * stretch(head.contributors)
        if out or now < self._told_at.get(sender, -1e9) + again_s:
            return out
        again = self._unheard(sender, said)
        return self._tell((sender,), again, now) if again is not None else []

    def _outbid(self, said: Report, now: float) -> list[Effect]:
        """A process that led this view before us, and died, may have got further than our attempts: go beyond."""
        if (said.round, said.view) != (self.follower.ledger.head.round + 1, self.follower.view):
            return []
        if said.attempt < self._next_attempt:
            return []
        self._next_attempt = said.attempt + 1
        planning = self._round is not None and self.phase in (Phase.GATHER, Phase.REDUCE)
        return self._attempt(self._round, now) if planning and self._round is not None else []

    def _unheard(self, peer: PeerId, said: Report) -> Message | None:
        """What `peer`, by its own report, has not heard yet."""
        work, voters = self._round, self.follower.ledger.head.voters
        if work is None:
            return None
        if self.phase is Phase.VOTE:
            assert work.poll is not None
            return work.poll.unheard(peer) if peer in voters else None
        if (said.round, said.view, said.attempt) != work.plan.order:
            return work.plan_for(peer, voters) if work.plan.seat_of(peer) else None
        if peer not in work.folding:
            return None
        return work.freeze if said.stage in (Stage.TRAINING, Stage.CONTRIBUTED) else None

    def _on_contribution(self, sender: PeerId, said: Contribution, now: float) -> list[Effect]:
        work, head = self._round, self.follower.ledger.head
        if (said.epoch, said.round, said.head) != (head.epoch, head.round + 1, head.hash):
            return [LeftOut(sender, "stale contribution", f"round {said.round}; this is round {head.round + 1}")]
        if work is None:
            return []  # we have only just taken the lead; it is said again
        return [*work.promise(sender, said, self._recipe.model.context)]

    def _on_have(self, sender: PeerId, said: Have, now: float) -> list[Effect]:
        work = self._round
        if work is None or said.order != work.plan.order:
            return []
        if sender not in work.owners:
            return [Refused(sender, "no seat", "it holds parts that nobody gave it")]
        work.hold(sender, said)
        return []

    def _on_vote(self, sender: PeerId, said: Vote, now: float) -> list[Effect]:
        poll = self._poll
        return [] if poll is None else poll.count(sender, said)

    def _on_view_change(self, sender: PeerId, said: ViewChange, now: float) -> list[Effect]:
        """A voter gives us up."""
        poll = self._poll
        accused = [] if poll is None else poll.given_up(sender, said)
        return [*accused, *self.follower.receive(sender, said, now=now)]

    @property
    def _poll(self) -> Poll | None:
        return None if self._round is None else self._round.poll

    def _on_applied(self, sender: PeerId, said: Applied, now: float) -> list[Effect]:
        return self.vouched.take(sender, said, is_here=self.membership.report(sender) is not None)

    # -- decisions

    def _settle(self, effects: Sequence[Effect], now: float) -> list[Effect]:
        """Hand our own messages to ourselves and take every step that is now possible, until nothing changes."""
        done: list[Effect] = []
        pending = effects
        while True:
            for effect in pending:
                if isinstance(effect, Send) and self._signer.peer_id in effect.to and self.handles(effect.message):
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
        handler, me = self._handlers.get(type(message)), self._signer.peer_id
        return handler(me, message, now) if handler else list(self.follower.receive(me, message, now=now))

    def _step(self, now: float) -> list[Effect]:
        if not self._leads(now):
            return []
        work = self._round
        if work is not None and work.plan.head != self.follower.ledger.head.hash:
            return self._abandon("the chain went on without this round")
        if work is not None:
            work.bar(self._barred())
        if self.phase is Phase.GATHER:
            return self._gather(now)
        if self.phase is Phase.REDUCE:
            return self._reduce(now)
        if self.phase is Phase.VOTE:
            return self._count_votes(now)
        return self._idle(now)

    def _leads(self, now: float) -> bool:
        """Whether it is our turn; takes up the lead, or lays it down."""
        follower = self.follower
        if not follower.leads or follower.model is None:
            if self._led is not None:
                self._led = None
                self._awaited.end()
                self.membership.forget()
            self._round, self.phase, self.reason = None, Phase.FOLLOWING, "another peer leads"
            return False
        led = (follower.ledger.head.hash, follower.view)
        if self._led is None or (self._led != led and follower.view > 0):
            self._round, self.phase, self.reason = None, Phase.IDLE, "taking the lead"
            given_up = {follower.ledger.head.leader(view) for view in range(follower.view)}
            others = follower.ledger.head.voters - given_up - {self._signer.peer_id}
            self._awaited.begin(tuple(sorted(others)), now=now)
            self._stand_at = self._led_at = now
        if self._led != led:
            self.membership.resize(follower.ledger.head.contributors)
        self._led = led
        return True

    def _idle(self, now: float) -> list[Effect]:
        head = self.follower.ledger.head
        bound = self.follower.bound_to
        if bound is not None:
            return self._propose_again(bound, now)
        barred = self._barred() | self._strangers()
        self._awaited.tick(head, now=now)
        if not self.leaving and self._awaited.holds_up(head, barred, now=now):
            return []
        steps = self._recipe.rounds.steps_at(head.global_step)
        if steps == 0:
            self.phase, self.reason = Phase.FINISHED, f"finished: all {head.global_step} steps are done"
            return []
        self.phase = Phase.IDLE
        decision = self._awaited.decide(head, self._recipe.rounds.min_peers, barred, now=now)
        self.reason = decision.reason
        if decision.members and not (self.leaving and self._others(head)):
            return self._open(decision.members, steps, now)
        return self._change_committee(now) if self._awaited.peers == () or self.leaving else []

    def _others(self, head: Head) -> bool:
        """Whether someone else is in the committee, and here."""
        return any(self.membership.is_live(peer) for peer in head.voters - {self._signer.peer_id})

    def _open(self, members: Sequence[PeerId], steps: int, now: float) -> list[Effect]:
        head = self.follower.ledger.head
        deadline = now + self._recipe.rounds.train_s + self._recipe.rounds.exchange_s
        work = self._new_round(steps, deadline)
        known = self._known_plan()
        if known is not None and known.head == head.hash:
            work.inherit(known.seats)
        for peer in sorted(set(members) - work.seats.keys()):
            work.give_seat(peer, steps * self._recipe.inner.batch_sequences)
        self._round = work
        return self._attempt(work, now)

    def _new_round(self, steps: int, deadline: float = float("inf")) -> Round:
        """A round in which nobody has work yet."""
        head = self.follower.ledger.head
        return Round(self.membership, head.redo, head.cursor, steps, self._empty_plan(), deadline)

    def _empty_plan(self) -> Plan:
        head, rounds = self.follower.ledger.head, self._recipe.rounds
        return Plan(
            head.epoch, head.round + 1, self.follower.view, self._next_attempt, head.hash, head.global_step,
            (), (), (), rounds.train_s, rounds.exchange_s,
        )  # fmt: skip

    def _attempt(self, work: Round, now: float) -> list[Effect]:
        """Plan the round, first or again, for those who are here; their data ranges stay as they were."""
        if not work.attempt(self._empty_plan(), self._assign, self._num_parts):
            return self._abandon("everyone who had work is gone")
        self._next_attempt += 1
        work.deadline = max(work.deadline, now + self._recipe.rounds.exchange_s)
        self.phase = Phase.GATHER
        self.reason = f"round {work.plan.round}: {len(work.plan.seats)} peers work, {len(work.owners)} reduce"
        plans = work.plans(self.follower.ledger.head.voters)
        return [effect for to, plan in plans for effect in self._tell(to, plan, now)]

    def _abandon(self, reason: str) -> list[Effect]:
        self._round, self.phase, self.reason = None, Phase.IDLE, reason
        return []

    def _gather(self, now: float) -> list[Effect]:
        work = self._round
        assert work is not None
        if work.lost_owners():
            return self._attempt(work, now)
        waiting = work.waits_for() is not None
        self.reason = f"round {work.plan.round}: {len(work.whole)} of {len(work.plan.seats)} contributions held"
        if waiting and now < work.deadline:
            return []
        entries = self._admitted(work)
        if entries:
            return self._freeze(work, entries, now)
        if not waiting:
            return self._abandon("nobody's work could be gathered")
        work.mark_slow({owner for owner in work.owners if work.holds_nothing(owner)})
        return self._attempt(work, now)

    def _admitted(self, work: Round) -> tuple[Entry, ...]:
        """What is held whole of those who may contribute; what proves that they may is kept for the block."""
        entries = work.entries()
        proofs = self.follower.admission.proofs((entry.peer, self._claim(entry.peer)) for entry in entries)
        work.admissions = tuple(proof for proof in proofs.values() if proof)
        return tuple(entry for entry in entries if entry.peer in proofs)

    def _freeze(self, work: Round, entries: tuple[Entry, ...], now: float) -> list[Effect]:
        work.freeze = Freeze(*work.plan.order, entries)
        work.deadline = now + self._recipe.rounds.exchange_s
        self.phase = Phase.REDUCE
        left_out = work.contributions.keys() - {entry.peer for entry in entries}
        told = [LeftOut(peer, *self._why_left_out(work, peer)) for peer in sorted(left_out)]
        return [*told, *self._tell(work.folding, work.freeze, now)]

    def _why_left_out(self, work: Round, peer: PeerId) -> tuple[str, str]:
        # asked as `proofs` is: to a voter that an epoch made a stranger `Follower.refuses` is kinder
        refusal = self.follower.admission.refuses(peer, self._claim(peer))
        if refusal is not None:
            said = f" ({refusal.why})" if refusal.why else ""
            return "not admitted", f"it may not take part: {refusal.code} {refusal.reason}{said}"
        if peer in work.barred:
            return "barred", "it is proven to lie"
        if peer in work.whole:
            return "no room", f"round {work.plan.round} admits others who came first; the next looks at it again"
        return "late", f"not all of its bytes were there when round {work.plan.round} was frozen"

    def _reduce(self, now: float) -> list[Effect]:
        work = self._round
        assert work is not None
        assert work.freeze is not None
        if work.lost_owners() or work.counts_barred:
            return self._attempt(work, now)
        missing = work.missing()
        self.reason = f"round {work.plan.round}: {self._num_parts - len(missing)} of {self._num_parts} parts reduced"
        if missing and now >= work.deadline:
            work.mark_slow({work.plan.owners[part] for part in missing})
            return self._attempt(work, now)
        if missing or not self.follower.at_head or self.follower.model is None:
            return []
        parts = tuple(work.results[part] for part in range(self._num_parts))
        succession = self._succession()
        members = succession.members(entry.peer for entry in work.freeze.entries) or succession.last_member
        if not members:
            self.reason = f"round {work.plan.round}: nobody is left who may vote on the next"
            return []
        block = self._block(work, parts, succession, members)
        if self.follower.admission.outdated(block) is not None:
            return self._attempt(work, now)  # since the freeze someone in it has lost what it came in by
        return self._put_to_vote(work, block, now)

    def _change_committee(self, now: float) -> list[Effect]:
        """Between rounds: a block that changes nothing but the committee, where someone is to go or to come."""
        if not self.follower.at_head or self.follower.model is None:
            return []
        succession = self._succession()
        members = succession.change(settled=now >= self._led_at + SETTLE_S)
        if not members:
            return []
        self._round = self._new_round(steps=0)
        return self._put_to_vote(self._round, self._block(self._round, (), succession, members), now)

    def _succession(self) -> Succession:
        follower = self.follower
        return Succession(
            follower.ledger,
            self.membership,
            self._signer.peer_id,
            follower.incarnation,
            follower.delegation,
            self._barred(),
            self.leaving,
            self.follower.admission.is_banned(self._signer.peer_id),
        )

    def _barred(self) -> frozenset[PeerId]:
        """Who gets no seat and no vote, and whose work counts no more."""
        return self.follower.barred(self._claim)

    def _strangers(self) -> frozenset[PeerId]:
        """Who of those that are here may not contribute: not admitted, and without a claim that is good now."""
        admission, admitted = self.follower.admission, self.follower.ledger.head.roll.members
        if admission.is_open:
            return frozenset()
        new = [peer for peer in self.membership.live() if peer not in admitted]
        return frozenset(new) - admission.proofs((peer, self._claim(peer)) for peer in new).keys()

    def _claim(self, peer: PeerId) -> bytes:
        said = self.membership.report(peer)
        return b"" if said is None else said.claim

    def _block(
        self, work: Round, parts: tuple[bytes, ...], succession: Succession, members: Mapping[PeerId, bytes]
    ) -> Block:
        assert self.follower.model is not None
        committee, seat = succession.committee(members), succession.seat(members)
        return work.block(self.follower.ledger.head, self.follower.model, parts, committee, seat)

    def _propose_again(self, block: Block, now: float) -> list[Effect]:
        """Propose what a lock, or our own prevote of before a restart, binds us to."""
        self._round = self._new_round(block.steps)
        return self._put_to_vote(self._round, block, now)

    def _put_to_vote(self, work: Round, block: Block, now: float) -> list[Effect]:
        work.poll = Poll(Proposal(self.follower.view, block), self.follower.ledger, self._signer)
        work.deadline = float("inf")
        self.phase = Phase.VOTE
        # members without a vote, if few, get it too: they hold its parts and may apply it without asking for them
        members = set(work.plan.members) if work.is_small else set()
        to = tuple(sorted(self.follower.ledger.head.voters | members | {self._signer.peer_id}))
        return self._tell(to, work.poll.proposal, now)

    def _count_votes(self, now: float) -> list[Effect]:
        poll, head = self._poll, self.follower.ledger.head
        assert poll is not None
        if not poll.is_decided:
            absent = [peer for peer in head.voters if peer not in poll.given and not self.membership.is_live(peer)]
            gone = f"; {len(absent)} voters are gone" if absent else ""
            self.reason = f"round {head.round + 1}: {poll.progress()}{gone}"
            return []
        proposal, ballots = poll.proposal, poll.certificate()
        if poll.lock is None:
            poll.lock = Lock(proposal.view, proposal.block, ballots)
            return self._tell(tuple(sorted(head.voters)), poll.lock, now)
        return self._commit(Commit(proposal.block, proposal.view, ballots), now)

    def _commit(self, commit: Commit, now: float) -> list[Effect]:
        head = self.follower.ledger.head
        passed_on = {peer for voter in head.voters for peer in self.follower.passes_on(voter, commit)}
        hearers = tuple(peer for peer in self._hearers() if peer not in passed_on)
        self._passed_on_by = now + PASS_ON_S if passed_on else 0.0
        self._round, self.phase, self._committed_at = None, Phase.IDLE, now
        self._awaited.begin(self.membership.ready(head), now=now)
        followed = self.follower.receive(self._signer.peer_id, commit, now=now)
        assert isinstance(followed[0], Store), "a commit is durable before anyone hears of it"
        others = tuple(peer for peer in hearers if peer != self._signer.peer_id)
        return [followed[0], *self._tell(others, commit, now), *followed[1:]]

    def _tell(self, to: tuple[PeerId, ...], message: Message, now: float) -> list[Effect]:
        for peer in to:
            self._told_at[peer] = now
        return [Send(to, message)]
