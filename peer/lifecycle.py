"""A volunteer's life in a run, as a machine: sync, wait, train, reduce, vote, leave.

    SYNC ──synced──> WAIT ──Plan with a seat──> TRAIN ──trained──> REDUCE ──Commit, applied──> WAIT
      ^               │                           │ nothing finite: back to WAIT, the round goes on without us
      └── Resync ─────┴── (from anywhere)         └ a new plan, the same seat: keep the work, send it to the new owners

While nobody leads whom we hear, it coasts: the interval under way goes on to its end, and the work is kept until
somebody leads again; the shared model stays as it is.

It joins machines that do not know each other: the `Leader`, which waits for its turn, with the `Follower` that votes
and follows the chain, and the `Reducer` of the round under way. What one of us says to the leader stays in here while
we lead. Effects come out in the order in which they must happen.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from msgspec import structs

from dugnad.coordinator import follower as following
from dugnad.coordinator import ranges
from dugnad.coordinator.admission import Refusal
from dugnad.coordinator.effects import Cost, Refused, Resync, Send
from dugnad.coordinator.effects import Effect as LeaderEffect
from dugnad.coordinator.membership import Stage, stretch
from dugnad.coordinator.messages import Applied, Commit, Contribution, Freeze, Have, Plan, Report, Seat, Standing
from dugnad.coordinator.rounds import Leader
from dugnad.dht.hello import BANNED
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Abilities
from dugnad.dht.wire import Message
from dugnad.optim import reduce as reducing
from dugnad.optim.reduce import Reducer, Weighed


class State(StrEnum):
    """What a volunteer is doing."""

    SYNC = "sync"
    WAIT = "wait"
    TRAIN = "train"
    REDUCE = "reduce"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Train:
    """Train on `seat` from the model at the plan's head, and say `trained` or `not_trained`."""

    plan: Plan
    seat: Seat


@dataclass(frozen=True, slots=True)
class StopTraining:
    """Come to the end after the step under way: what is done is contributed, or, if not `keep`, forgotten."""

    keep: bool


@dataclass(frozen=True, slots=True)
class Leave:
    """It is safe to go: nothing of ours is awaited any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reduce:
    """An effect of the round's all-reduce; `plan` says of which view."""

    plan: Plan
    effect: reducing.Upload | reducing.Fold | reducing.Deliver | reducing.Drop


Effect = LeaderEffect | Train | StopTraining | Leave | Reduce


@dataclass(frozen=True, slots=True)
class Work:
    """A finished interval over the first `samples` of a seat: their mean `loss`, and the root of the encoded parts."""

    root: bytes
    samples: int
    tokens: int
    loss: float


GOODBYE_S = 10.0
"""How long whoever leads a finished run waits for the others to see that it is finished."""
REFUSED_S = 5.0
"""How long who is not admitted waits for the organizer's word, or for someone to give up a place, before it leaves."""


class Volunteer:
    """One volunteer in one run; `leader` leads when it is our turn, `report_s` is how often it reports.

    num_parts: of the vector that is exchanged.
    """

    def __init__(self, me: PeerId, leader: Leader, *, num_parts: int, report_s: float) -> None:
        self.state = State.SYNC
        self.reason = "no model yet"
        self.leaving = False
        self.standing: Standing | None = None
        """What whoever leads said last."""
        self.plan: Plan | None = None
        """The newest plan of the round under way."""
        self.abilities = Abilities()
        """Kept by the shell: they change with the routers on the way."""
        self.step = 0
        """Inner steps done in the round under way; kept by the shell."""
        self.leader = leader
        self.follower = leader.follower
        self._me = me
        self._num_parts = num_parts
        self._report_s = report_s
        self._coordinator_at: float | None = None
        """When the coordinator was last there."""
        self._reducer = Reducer(me)
        self._promise: Contribution | None = None
        self._train_until = float("inf")
        self._report_at = self._look_at = 0.0
        self._reported: tuple[object, ...] = ()
        self._resync_at = 0.0
        self._leave_by = float("inf")
        self.refusal: Refusal | None = None
        """Why we may not take part, if that is so."""
        self.dismissed: Refusal | None = None
        """Why we leave, if we do not do so by ourselves."""
        self._refused_at = float("inf")
        self._handlers: dict[type[Message], Callable[..., list[Effect]]] = {
            Plan: self._on_plan,
            Freeze: self._on_freeze,
        }

    # -- what happens to it

    def receive(self, sender: PeerId, message: Message, *, now: float) -> list[Effect]:
        """Take any message of a round."""
        return self._settle(self._receive(sender, message, now), now)

    def _receive(self, sender: PeerId, message: Message, now: float) -> list[Effect]:
        follower = self.follower
        if self._coordinator_at is None or sender in (follower.ledger.head.coordinator, self._delegated):
            self._coordinator_at = now
        if type(message) in self._handlers:
            follower.heard(sender, message, now=now)
            if sender != follower.leader:
                return [Refused(sender, "not leader", f"{type(message).__name__} from one who does not lead")]
            return self._handlers[type(message)](sender, message, now)
        if isinstance(message, Standing) and sender == follower.leader and message.phase != following.FOLLOWING:
            self.standing = _with_validation(message, self.standing)
        head = follower.ledger.head
        out: list[Effect] = list(self.leader.receive(sender, message, now=now))
        if follower.ledger.head is not head and follower.ledger.head.coordinator is not None:
            self._coordinator_at = now  # it was there to be named in the block
        return out

    @property
    def _delegated(self) -> PeerId | None:
        said = self.follower.delegation
        return None if said is None else said.coordinator

    def restore(self, digests: Mapping[int, Mapping[PeerId, Applied]], validation: tuple[int, float | None]) -> None:
        """Take up what our disk kept of what others signed, and the newest validation loss."""
        self.leader.restore(digests, validation)

    def lost(self, peer: PeerId, why: str, *, now: float) -> list[Effect]:
        """The network says that `peer` does not answer."""
        return self._settle(self.leader.lost(peer, why, now=now), now)

    def result(
        self, owner: PeerId, order: tuple[int, int, int], parts: dict[int, bytes], *, now: float
    ) -> list[Effect]:
        """Averages of `owner`, made in that view and attempt, are checked and on disk."""
        return self._settle(self.leader.result(owner, order, parts, now=now), now)

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> list[Effect]:
        """The model after `round_` is here; `since` are the commits after it that we have."""
        self._turn(State.WAIT, f"in sync with round {round_}")
        return self._settle(self.leader.synced(round_, model, since, now=now), now)

    def sync_failed(self, why: str, *, now: float) -> list[Effect]:
        """The state could not be had; it is tried again."""
        self.reason = why
        self._resync_at = now + following.RETRY_S
        return []

    def trained(self, plan: Plan, work: Work, *, now: float) -> list[Effect]:
        """The interval of `plan` is done and encoded."""
        seat = plan.seat_of(self._me)
        if seat is None or not self._trains(plan):
            return []
        self._turn(State.REDUCE, f"round {plan.round}: sending our work to its owners")
        self._train_until = float("inf")
        done, _ = ranges.take(seat.ranges, work.samples)
        self._promise = Contribution(plan.epoch, plan.round, plan.head, work.root, done, work.tokens, work.loss)
        return self._settle([*self._promised(), *self._reduced(self._reducer.contribute(work.root, now=now))], now)

    def not_trained(self, plan: Plan, why: str, *, now: float) -> list[Effect]:
        """Nothing of the interval can be contributed; the round goes on without us."""
        if self._trains(plan):
            self._turn(State.WAIT, why)
            self._train_until = float("inf")
        return self._settle([], now)

    def takes(self, contributor: PeerId, round_: int, root: bytes) -> bool:
        """Whether part bytes of this vector are wanted."""
        plan = self.plan
        given = plan is not None and plan.round == round_ and plan.seat_of(contributor) is not None
        return given and self._reducer.takes(contributor, root)

    def received(self, contributor: PeerId, root: bytes, parts: tuple[int, ...], *, now: float) -> list[Effect]:
        """Checked part bytes of `contributor` are here."""
        return self._settle(self._reduced(self._reducer.received(contributor, root, parts, now=now)), now)

    def uploaded(self, owner: PeerId, root: bytes, parts: tuple[int, ...], *, now: float) -> list[Effect]:
        """`owner` has those parts of our vector `root`."""
        return self._settle(self._reduced(self._reducer.uploaded(owner, root, parts, now=now)), now)

    def upload_failed(self, owner: PeerId, root: bytes, parts: tuple[int, ...], *, now: float) -> list[Effect]:
        """An upload broke."""
        return self._settle(self._reduced(self._reducer.upload_failed(owner, root, parts, now=now)), now)

    def folded(self, plan: Plan, results: dict[int, bytes], *, now: float) -> list[Effect]:
        """Our averages of this view are encoded and on disk: {part: digest}."""
        if self.plan is None or plan.order != self.plan.order:
            return []
        out: list[Effect] = self._reduced(self._reducer.folded(results, now=now))
        return self._settle([*out, *self.leader.result(self._me, plan.order, results, now=now)], now)

    def delivered(self, plan: Plan, to: PeerId, *, error: str | None, now: float) -> list[Effect]:
        """`to` has our averages of this view, or did not take them."""
        if self.plan is None or plan.order != self.plan.order:
            return []  # it says nothing of whether those of the new view arrive
        if error is None:
            self._reducer.delivered(to)
        else:
            self._reducer.deliver_failed(to, now=now)
        return []

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """Averages that were fetched are checked and on disk."""
        return self._settle(self.leader.holds(digests, now=now), now)

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> list[Effect]:
        """The model after `round_` is in place."""
        self._turn(State.WAIT, f"round {round_} applied; waiting for the next plan")
        return self._settle(self.leader.applied(round_, model, cost, now=now), now)

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """Blobs of the round being applied are damaged on this disk."""
        return self._settle(self.leader.damaged(digests, now=now), now)

    def leave(self, *, now: float) -> list[Effect]:
        """The user wants to go: finish what others count on, then `Leave`."""
        self.leaving = True
        return self._settle(self.leader.leave(now=now), now)

    def tick(self, *, now: float) -> list[Effect]:
        """Let time pass."""
        out: list[Effect] = []
        if self.state is State.SYNC and now >= self._resync_at:
            self._resync_at = float("inf")
            out.append(Resync(self.reason))
        if now >= self._train_until:
            self._train_until = float("inf")
            out.append(StopTraining(keep=True))
        out += self._reduced(self._reducer.tick(now=now)) if self.plan is not None else []
        self._look_whether_admitted(now)
        out += self.leader.leave(now=now) if self.dismissed is not None and not self.leader.leaving else []
        return self._settle([*out, *self.leader.tick(now=now)], now)

    def _look_whether_admitted(self, now: float) -> None:
        """Leave where we may not take part: at once when we are banned, else after a while, for it may change."""
        self._look_at = now + self._report_s  # its own: where rounds are short, no report is ever due
        self.refusal = self.follower.refuses(self._me, self.abilities.claim)
        if self.refusal is None or (self.refusal.code != BANNED and self.follower.model is None):
            self._refused_at = float("inf")  # without the chain, we do not know whom it admitted
            return
        self._refused_at = min(self._refused_at, now)
        if self.dismissed is None and (self.refusal.code == BANNED or now >= self._refused_at + REFUSED_S):
            self.dismissed, self.leaving, self._leave_by = self.refusal, True, now + GOODBYE_S

    def wake_at(self) -> float:
        """When `tick` has something to do."""
        if self.state is State.LEFT:
            return float("inf")
        resync_at = self._resync_at if self.state is State.SYNC else float("inf")
        of_parts = min(self._reducer.wake_at(), self.leader.wake_at())
        return min(self._report_at, self._look_at, self._train_until, resync_at, of_parts)

    # -- what it says of itself

    @property
    def stage(self) -> Stage:
        """What it is doing, in the words of a report."""
        if self.state is State.SYNC or not self.follower.at_head:
            return Stage.SYNCING
        if self.state is State.TRAIN:
            return Stage.TRAINING
        if self.state is State.REDUCE:
            return Stage.REDUCING if self._reducer.frozen else Stage.CONTRIBUTED
        return Stage.WAITING

    def coordinator_gone_s(self, *, now: float) -> float | None:
        """For how long the coordinator has not been there, if that is worth a word; else None."""
        if self._coordinator_at is None or self.follower.ledger.head.coordinator == self.follower.leader:
            return self.follower.silent_s(now=now)
        gone = now - self._coordinator_at
        return gone if self.follower.ledger.head.coordinator is None else None

    def why(self, *, now: float) -> str:
        """What it is doing, or why it does nothing, in words."""
        if self.refusal is not None and (self.refusal.code == BANNED or self.follower.model is not None):
            return str(self.refusal)
        silent = self.follower.silent_s(now=now)
        if silent is None or self.state is State.SYNC:
            return self.reason
        coasting = "coasting, the interval goes on to its end" if self.state is State.TRAIN else "paused, work is kept"
        return f"nobody leads since {silent:.0f} s ({coasting}): waiting for a quorum of the committee"

    # -- messages

    def _on_plan(self, sender: PeerId, plan: Plan, now: float) -> list[Effect]:
        head = self.follower.ledger.head
        if plan.epoch != head.epoch or plan.round > head.round + 1:
            return list(self.follower.behind((plan.epoch, plan.round - 1), sender, now=now))
        if plan.round <= head.round or plan.view != self.follower.view:
            return []
        if plan.head != head.hash:
            return [Refused(sender, "foreign chain", f"plan of round {plan.round} stands on another head")]
        if not self.follower.at_head or (self.plan is not None and plan.order <= self.plan.order):
            return []  # the leader says it again when our report shows that we stand at the head
        fault = self._fault_of(plan)
        if fault is not None:
            return [Refused(sender, "invalid plan", fault)]
        before, self.plan = self.plan, plan
        seat = plan.seat_of(self._me)
        if seat is None:
            return self._without_seat(plan, now)
        receivers = tuple(dict.fromkeys((*plan.members, sender)))
        if before is not None and before.seat_of(self._me) == seat and self._working:
            if (plan.view, plan.attempt) != (before.view, before.attempt + 1):
                self._reducer.doubt()  # we missed an attempt, in which an owner may have been replaced and come back
            return [*self._promised(), *self._reduced(self._reducer.plan(plan.owners, receivers, now=now))]
        self._reducer.restart()
        self._promise = None
        held = self._reduced(self._reducer.plan(plan.owners, receivers, now=now))
        self._turn(State.TRAIN, f"round {plan.round}: training {seat.steps} steps with {len(plan.seats)} peers")
        self._train_until = now + plan.train_s
        return [Train(plan, seat), *held]

    def _fault_of(self, plan: Plan) -> str | None:
        members = plan.members
        if len(plan.owners) != self._num_parts:
            return f"it has owners for {len(plan.owners)} of {self._num_parts} parts"
        if not set(plan.owners) <= set(members):
            return "someone owns a part without a seat"
        return None if ordered(members) else "its seats are not in peer-id order"

    def _trains(self, plan: Plan) -> bool:
        """Whether the interval of `plan` is the one under way: a new leader may have given other samples meanwhile."""
        now = self.plan
        given = now is not None and (plan.round, plan.seat_of(self._me)) == (now.round, now.seat_of(self._me))
        return given and self.state is State.TRAIN

    @property
    def _working(self) -> bool:
        return self.state in (State.TRAIN, State.REDUCE)

    def _without_seat(self, plan: Plan, now: float) -> list[Effect]:
        was, self._promise = self.state, None
        self._reducer.restart()
        dropped = self._reduced(self._reducer.plan(plan.owners, (), now=now))
        self._train_until = float("inf")
        self._turn(State.WAIT, f"round {plan.round} goes on without us")
        return [*([StopTraining(keep=False)] if was is State.TRAIN else []), *dropped]

    def _on_freeze(self, sender: PeerId, said: Freeze, now: float) -> list[Effect]:
        if self.plan is None or said.order != self.plan.order:
            return []
        if not ordered([entry.peer for entry in said.entries]):
            return [Refused(sender, "invalid freeze", "its entries are not in peer-id order")]
        entries = tuple(Weighed(entry.peer, entry.root, entry.tokens) for entry in said.entries)
        counted = any(entry.peer == self._me for entry in entries)
        if self.state is State.REDUCE:
            self.reason = f"round {said.round}: {'averaging' if counted else 'our work came too late'}"
        return self._reduced(self._reducer.freeze(entries, now=now))

    # -- inside

    def _turn(self, state: State, reason: str) -> None:
        if self.state is not State.LEFT:
            self.state, self.reason = state, reason

    def _promised(self) -> list[Effect]:
        return [] if self._promise is None else [Send((self.follower.leader,), self._promise)]

    def _reduced(self, effects: list[reducing.Effect]) -> list[Effect]:
        """The reducer's effects, with the view and attempt they belong to."""
        if self.plan is None:
            return []
        out: list[Effect] = []
        for effect in effects:
            if isinstance(effect, reducing.Holds):
                out.append(Send((self.follower.leader,), Have(*self.plan.order, effect.vectors)))
            else:
                out.append(Reduce(self.plan, effect))
        return out

    def _settle(self, effects: Sequence[Effect], now: float) -> list[Effect]:
        """Follow up on what just happened: a round that is over, a resync, a report that is due, a wish to leave."""
        if self.state is State.LEFT:
            return []
        out, head = self._looped(effects, now), self.follower.ledger.head
        if self.plan is not None and self.plan.head != head.hash:
            out += self._round_is_over()
        if any(isinstance(effect, Resync) for effect in out):
            out += self._work_is_void()
            self.state, self._resync_at = State.SYNC, float("inf")
        reason = self._may_leave(now)
        self.leaving = self.leaving or reason is not None
        order = self.plan.order if self.plan else ()
        reported = (self.stage, head.hash, order, self.leaving, self.follower.view)
        if now >= self._report_at or reported != self._reported:
            self._report_at, self._reported = now + self._report_s * stretch(head.contributors), reported
            said = [*self._report(now), *(self._promised() if not self._reducer.frozen else [])]
            out += self._looped(said, now)
        if reason is not None:
            self.state, self.reason = State.LEFT, reason
            out += [StopTraining(keep=False), Leave(reason)]
        return out

    def _looped(self, effects: Sequence[Effect], now: float) -> list[Effect]:
        """Hear ourselves what we say to ourselves as leader or member, and what comes of it."""
        out: list[Effect] = []
        for effect in effects:
            if isinstance(effect, Send) and self._me in effect.to:
                others = tuple(peer for peer in effect.to if peer != self._me)
                out += [Send(others, effect.message)] if others else []
                out += self._looped(self._receive(self._me, effect.message, now), now)
            else:
                out.append(effect)
        return out

    def _round_is_over(self) -> list[Effect]:
        """The round of our plan is committed: what we still did for it is of no use."""
        self.plan, self._reducer = None, Reducer(self._me)
        stopped = self._work_is_void()
        if self._working:
            self._turn(State.WAIT, "the round is committed")
        return stopped

    def _work_is_void(self) -> list[Effect]:
        """Our work of this round, or the model that it began from, is of no use: it is not gone on with or promised."""
        self._promise, self._train_until = None, float("inf")
        return [StopTraining(keep=False)] if self.state is State.TRAIN else []

    def _report(self, now: float) -> list[Effect]:
        follower, plan = self.follower, self.plan
        head, seat = follower.ledger.head, plan.seat_of(self._me) if plan else None
        said = Report(
            epoch=head.epoch,
            head_round=head.round,
            head=head.hash,
            in_view=follower.view,
            incarnation=follower.incarnation,
            trains=True,
            stage=self.stage,
            round=plan.round if plan else 0,
            view=plan.view if plan else 0,
            attempt=plan.attempt if plan else 0,
            step=self.step if seat else 0,
            of_steps=seat.steps if seat else 0,
            leaving=self.leaving,
            reach=self.abilities.reach,
            uplink=self.abilities.uplink,
            addresses=self.abilities.addresses,
            claim=follower.admission.shows(self._me, self.abilities.claim),
        )
        to = (self._me,) if follower.leads else follower.contacts(now=now)
        return [Send(to, said)] if to else []

    def _may_leave(self, now: float) -> str | None:
        """Why it is safe to leave now, or None."""
        follower, leader = self.follower, self.leader
        if leader.finished and follower.at_head and follower.ledger.head.round > 0 and self._is_dismissed(now):
            return "the run is finished"
        if self.dismissed is not None:
            # who is voted out is not awaited any more: without its last vote, that might be impossible
            gone = follower.ledger.head.voter(self._me) is None or now >= self._leave_by
            return str(self.dismissed) if gone else None
        if not self.leaving:
            return None
        if self._leave_by == float("inf"):
            self._leave_by = now
        silent, voters = follower.silent_s(now=now), follower.ledger.head.voters
        if self._me not in voters:
            in_place = not self._working and follower.model_round in (-1, follower.ledger.head.round)
            return "left in order" if in_place or silent is not None else None
        if follower.leads:
            return "left as the last: the run goes on from this folder" if leader.deserted(now=now) else None
        away = silent is not None and silent >= 3 * GOODBYE_S and now >= self._leave_by + GOODBYE_S
        modelless = silent is not None and follower.model is None
        return "left without a goodbye: nobody leads" if away or modelless else None

    def _is_dismissed(self, now: float) -> bool:
        """Whether nobody counts on us any more in a run that is finished."""
        follower, members = self.follower, self.leader.membership
        if not follower.leads:
            heard = self.standing is not None and self.standing.finished
            return heard or follower.silent_s(now=now) is not None
        if self._leave_by == float("inf"):
            self._leave_by = now + GOODBYE_S
        others = follower.ledger.head.voters | set(members.live())
        awaited = others - {self._me} - members.leaving()
        return not awaited or now >= self._leave_by


def ordered(peers: Sequence[PeerId]) -> bool:
    """Whether `peers` stand in peer-id order, each once."""
    return all(one < other for one, other in pairwise(peers))


def _with_validation(said: Standing, before: Standing | None) -> Standing:
    """With the loss that was measured last: a volunteer that leads measures none."""
    if said.val_loss is not None or before is None:
        return said
    return structs.replace(said, val_round=before.val_round, val_loss=before.val_loss)
