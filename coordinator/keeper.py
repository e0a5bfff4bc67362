"""The coordinator's machine: it follows without training, leads whenever it is its turn, and yields to a newer one.

    a block names its delegation  -> it has the coordinator's seat: the first to lead every round
    it was away, or is new        -> it reports like any member, shows its delegation, and the next block names it
    a later term is shown to it   -> it yields: another coordinator was started with the run key
    it is banned                  -> it helps to vote itself out, and goes

It is a convenience: whatever it does, the voters' next leader does while it is away.
"""

from collections.abc import Iterable, Mapping

from dugnad.coordinator.effects import Cost, Effect, Resync, Send
from dugnad.coordinator.follower import RETRY_S
from dugnad.coordinator.membership import Stage
from dugnad.coordinator.messages import Applied, Commit, Freeze, Plan, Report
from dugnad.coordinator.rounds import Leader, Phase
from dugnad.dht.delegation import Delegation
from dugnad.dht.hello import BANNED
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Abilities
from dugnad.dht.wire import Message

BANNED_S = 10.0
"""For how long a banned coordinator waits until the others have voted it out."""


class Keeper:
    """Holds the coordinator's seat, or waits for it, by `delegation`; report_s: how often it says that it is there.

    leave_s: how long it waits, when it wants to go, to be let out of the committee.
    """

    def __init__(
        self,
        me: PeerId,
        leader: Leader,
        delegation: Delegation,
        *,
        report_s: float,
        leave_s: float,
    ) -> None:
        self.leader = leader
        self.follower = leader.follower
        self._me = me
        self._delegation = delegation
        self.abilities = Abilities()
        """Kept by the shell: they change with the routers on the way."""
        self.dismissed: str | None = None
        """Why the organizer wants this coordinator to go, if so; one that yields to another may stay and watch."""
        self._report_s = report_s
        self._leave_s = leave_s
        self._leave_by = float("inf")
        self._report_at = 0.0
        self._reported: tuple[object, ...] = ()
        self._no_model = ""
        self._resync_at = float("inf")
        """When the model, which could not be had because of `_no_model`, is asked for again."""
        self.follower.receive(me, delegation, now=0.0)

    @property
    def plan(self) -> Plan | None:
        """The plan of the round that it leads."""
        return self.leader.plan

    @property
    def reason(self) -> str:
        """What it is doing, in words."""
        if self.yields:
            return "yields: another coordinator was started later with the run key"
        if self.dismissed is not None:
            return self.dismissed
        if self.follower.admission.is_over(self._delegation):
            return "its delegation is over: it takes the run's key to renew it"
        if self._no_model and self.follower.model is None:
            return f"has no model yet: {self._no_model}"
        if self.leader.phase is Phase.FOLLOWING:
            named = self.follower.ledger.head.coordinator == self._me
            return "another peer leads this round" if named else "back; a block must name it before it leads"
        return self.leader.reason

    @property
    def yields(self) -> bool:
        """Whether a coordinator of a later term is known."""
        newest = self.follower.delegation
        return newest is not None and newest.term > self._delegation.term and newest.coordinator != self._me

    def receive(self, sender: PeerId, message: Message, *, now: float) -> list[Effect]:
        """Take any message of a round."""
        if isinstance(message, Plan | Freeze):
            return []  # for those who train
        return self._settle(self.leader.receive(sender, message, now=now), now)

    def result(
        self, owner: PeerId, order: tuple[int, int, int], parts: dict[int, bytes], *, now: float
    ) -> list[Effect]:
        """Averages of `owner` are here, checked and on disk."""
        return self._settle(self.leader.result(owner, order, parts, now=now), now)

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """Blobs that were fetched are checked and on disk."""
        return self._settle(self.leader.holds(digests, now=now), now)

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> list[Effect]:
        """Our copy of the model has taken `round_`."""
        return self._settle(self.leader.applied(round_, model, cost, now=now), now)

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """Blobs of the round being applied are damaged on this disk."""
        return self._settle(self.leader.damaged(digests, now=now), now)

    def lost(self, peer: PeerId, why: str, *, now: float) -> list[Effect]:
        """The network says that `peer` does not answer."""
        return self._settle(self.leader.lost(peer, why, now=now), now)

    def restore(self, digests: Mapping[int, Mapping[PeerId, Applied]], validation: tuple[int, float | None]) -> None:
        """Take up what our disk kept of what others signed, and the newest validation loss."""
        self.leader.restore(digests, validation)

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> list[Effect]:
        """The model after `round_` is here; `since` are the commits after it."""
        return self._settle(self.leader.synced(round_, model, since, now=now), now)

    def sync_failed(self, why: str, *, now: float) -> list[Effect]:
        """The state could not be had yet; it is asked for again."""
        self._no_model, self._resync_at = why, now + RETRY_S
        return []

    def renew(self, delegation: Delegation, *, now: float) -> list[Effect]:
        """The organizer gave us another delegation, of a later term, unless it has given the seat to someone else."""
        if self.yields:
            return []
        self._delegation = delegation
        return self._settle(self.follower.receive(self._me, delegation, now=now), now)

    def stop(self, *, now: float) -> list[Effect]:
        """The organizer wants it to go: finish the round that it leads, and leave the committee to the others."""
        self._leave_by = now + self._leave_s
        return self._settle(self.leader.leave(now=now), now)

    def may_go(self, *, now: float) -> bool:
        """Whether nothing of ours is awaited any more."""
        leader, head = self.leader, self.follower.ledger.head
        if not leader.leaving or leader.phase in (Phase.GATHER, Phase.REDUCE, Phase.VOTE):
            return leader.leaving and now >= self._leave_by
        alone = head.voters <= {self._me}
        return self._me not in head.voters or alone or leader.deserted(now=now) or now >= self._leave_by

    def tick(self, *, now: float) -> list[Effect]:
        """Let time pass."""
        again: list[Effect] = []
        if now >= self._resync_at:
            self._resync_at = float("inf")
            again.append(Resync(self._no_model))
        refusal = self.follower.refuses(self._me)
        if self.dismissed is None and refusal is not None and refusal.code == BANNED:
            self.dismissed, self._leave_by = str(refusal), now + BANNED_S
            again += self.leader.leave(now=now)
        return self._settle([*again, *self.leader.tick(now=now)], now)

    def wake_at(self) -> float:
        """When `tick` has something to do."""
        return min(self._report_at, self._resync_at, self.leader.wake_at())

    def _settle(self, effects: list[Effect], now: float) -> list[Effect]:
        """Report what is new of us, to whoever leads instead."""
        head = self.follower.ledger.head
        reported = (head.hash, self.follower.at_head, self.follower.view, self.leader.leaving)
        if now < self._report_at and (reported == self._reported or self.follower.leads):
            return effects
        self._report_at, self._reported = now + self._report_s, reported
        to = () if self.follower.leads else self.follower.contacts(now=now)
        if not to:
            return effects
        news = [] if head.term >= self._delegation.term else [Send(to, self._delegation)]
        return [*effects, *news, Send(to, self._report())]

    def _report(self) -> Report:
        head = self.follower.ledger.head
        return Report(
            epoch=head.epoch,
            head_round=head.round,
            head=head.hash,
            in_view=self.follower.view,
            incarnation=self.follower.incarnation,
            trains=False,
            stage=Stage.WAITING if self.follower.at_head else Stage.SYNCING,
            round=0,
            view=0,
            attempt=0,
            step=0,
            of_steps=0,
            leaving=self.leader.leaving,
            reach=self.abilities.reach,
            uplink=0.0,
            addresses=self.abilities.addresses,
        )
