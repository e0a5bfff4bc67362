"""The half of a round that every voter runs, whoever leads: hold, check, vote, give up a leader, follow the commits.

    Proposal    -> all parts held?  no: wait, then fetch them       yes: Remember, then Vote (prevote)
    Lock        -> a quorum prevoted: Remember, then Vote (precommit)
    silence     -> of the leader: Remember, then ViewChange to all voters; a quorum of those is a NewView
    NewView     -> the next leader leads; it must propose what the highest lock among the pledges names
    Commit      -> proven?  no: refuse    yes: Store, then hold all parts, then Apply, then Applied

Why no two blocks can be committed for one round: a commit is a quorum that was locked on its block in one view. Whoever
changes the view pledges to vote in no earlier one, and says what it is locked on; any quorum of pledges holds one of
those locked voters, so every later view must propose that same block. Promises are on disk before they are said.
"""

from collections.abc import Callable, Iterable

from msgspec import structs

from dugnad.coordinator import equivocation
from dugnad.coordinator.admission import Admission, Refusal
from dugnad.coordinator.effects import (
    Accuse,
    CatchUp,
    Cost,
    Effect,
    Fetch,
    Promises,
    Refused,
    Remember,
    Resync,
    Rewind,
    Send,
    Store,
)
from dugnad.coordinator.ledger import Ledger, LedgerError
from dugnad.coordinator.membership import stretch
from dugnad.coordinator.messages import (
    MAX_VOTERS,
    PRECOMMIT,
    PREVOTE,
    Applied,
    Block,
    Commit,
    Freeze,
    Lock,
    NewView,
    Plan,
    Pledge,
    Proposal,
    Standing,
    ViewChange,
    Vote,
    applied_payload,
    pledge_payload,
    vote_payload,
)
from dugnad.coordinator.patience import NEVER, Patience, Watch
from dugnad.coordinator.replica import Replica
from dugnad.coordinator.votes import Signer, leaders, weight_of
from dugnad.dht.delegation import Delegation
from dugnad.dht.hello import NOT_ADMITTED
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message

FETCH_AFTER_S = 2.0
"""How long proposed parts may still be on their way from their owners before a voter asks others for them."""
RETRY_S = 3.0
"""How long a fetch or a catch-up may take before it is asked for again."""
PLEDGE_AGAIN_S = 2.0
"""How often a pledge is said again while nothing comes of it."""
FOLLOWING = "following"
"""The phase in a `Standing` of who does not lead."""
LEADERS_WORDS = (Standing, Plan, Freeze, Proposal, Lock, Commit)


class Follower:
    """Votes and follows as `signer.peer_id`; `incarnation` names the disk that keeps its promises.

    admission: who may take part, besides what the chain says; without it, whom the chain admits.
    """

    def __init__(
        self,
        signer: Signer,
        ledger: Ledger,
        patience: Patience,
        incarnation: bytes,
        admission: Admission | None = None,
    ) -> None:
        self.ledger = ledger
        self.admission = admission or Admission(ledger.gate, lambda: ledger.head.roll)
        self.incarnation = incarnation
        self.delegation: Delegation | None = None
        """The newest word of the organizer on who may have the coordinator's seat."""
        self.view = 0
        """Of the next round: 0, or what a NewView has proven."""
        self.new_view: NewView | None = None
        """The proof of `view`."""
        self.promises = Promises(0, 1)
        self.replica = Replica()
        self._signer = signer
        self._watch = Watch(patience)
        self._order: tuple[tuple[bytes, int], PeerId] = ((b"", 0), signer.peer_id)
        """(head, view), and who leads it: it is asked for all the time."""
        self._proposal: Proposal | None = None
        self._pledges: dict[int, dict[PeerId, ViewChange]] = {}
        """view -> who pledged it, in this round."""
        self._said: Applied | None = None
        self._fetch_at = NEVER
        """When to fetch missing parts, first or again."""
        self._catching_up_until = 0.0
        self._pledge_at = NEVER
        self._raise_at = NEVER
        """When the pledged view, of which no NewView has come, is given up as well."""
        self._told_at: dict[PeerId, float] = {}
        self._handlers: dict[type[Message], Callable[..., list[Effect]]] = {
            Delegation: self._on_delegation,
            Proposal: self._on_proposal,
            Lock: self._on_lock,
            ViewChange: self._on_view_change,
            NewView: self._on_new_view,
            Commit: self._on_commit,
            Standing: self._on_standing,
        }

    def restore(self, commits: Iterable[Commit], held: Iterable[bytes], promises: Promises | None = None) -> None:
        """Take up what this peer's own disk kept, and say which blobs are there; then `synced` may follow.

        Raises LedgerError if the commits are no chain.
        """
        for commit in commits:
            self.ledger.append(commit)
            self._note_seat(commit.block)
        self.replica.hold(held)
        head = self.ledger.head
        self.promises = Promises(head.epoch, head.round + 1)
        if promises is not None and (promises.epoch, promises.round) == (head.epoch, head.round + 1):
            self.promises = promises
            if promises.lock is not None:  # it proves its view: pledging to that once more would speak of another lock
                self.view = promises.lock.view

    # -- who leads

    @property
    def leader(self) -> PeerId:
        """Who leads the next round in the view that we know of."""
        key = (self.ledger.head.hash, self.view)
        if self._order[0] != key:
            self._order = (key, self.ledger.head.leader(self.view))
        return self._order[1]

    @property
    def leads(self) -> bool:
        """Whether that is us, with the disk that the committee knows, and we have not given this view up ourselves."""
        return self.leader == self._signer.peer_id and self.votes and self.promises.pledged <= self.view

    @property
    def votes(self) -> bool:
        """Whether we are in the committee, with this disk."""
        seat = self.ledger.head.voter(self._signer.peer_id)
        return seat is not None and seat.incarnation == self.incarnation

    @property
    def bound_to(self) -> Block | None:
        """What the leader of this view must propose, if anything: what may be committed, or what it has proposed."""
        must, before = self._must, self.promises.prevoted
        if must is not None:
            return must
        return before.block if before is not None and before.view == self.view else None

    @property
    def _must(self) -> Block | None:
        """The only block that may be proposed in this view, if a lock says so."""
        lock, proof = self.promises.lock, self.new_view
        if (lock is None or lock.view != self.view) and proof is not None and proof.view == self.view:
            lock = proof.lock
        elif lock is not None and lock.view != self.view:
            lock = None
        return None if lock is None else lock.block

    def silent_s(self, *, now: float) -> float | None:
        """For how long nobody has led whom we hear, if that is worth a word; else None."""
        silent = now - self._watch.heard_at
        return silent if silent >= self._silence_s and not self.leads else None

    @property
    def _silence_s(self) -> float:
        return self._watch.patience.silence_s * stretch(self.ledger.head.contributors)

    def heard(self, sender: PeerId, message: Message, *, now: float) -> None:
        """A message came: one that only leaders say shows that ours is there."""
        leading = isinstance(message, LEADERS_WORDS) and getattr(message, "phase", "") != FOLLOWING
        if leading and sender == self.leader and not self.admission.distrusts(sender, self.delegation):
            self._watch.heard_at = now

    def contacts(self, *, now: float) -> tuple[PeerId, ...]:
        """Whom to tell where we stand: the leader, and while it is not heard one more voter, another each time."""
        me, silence_s = self._signer.peer_id, self._silence_s
        head, silent = self.ledger.head, now - self._watch.heard_at
        if silent < silence_s and self.leader != me:
            return (self.leader,)
        out = [] if self.leader == me else [self.leader]
        order = [peer for peer in leaders(head.hash, head.committee, head.coordinator) if peer != me]
        if order:
            out.append(order[int(2 * max(0.0, silent) / silence_s) % len(order)])
        return tuple(dict.fromkeys(out))

    @property
    def model(self) -> bytes | None:
        """Digest of the model that is here, after `model_round`; None until there is one."""
        return self.replica.model

    @property
    def model_round(self) -> int:
        """After which round the model is that is here."""
        return self.replica.round

    @property
    def applying(self) -> Commit | None:
        """The commit that is being applied."""
        return self.replica.applying

    # -- who may take part

    def barred(self, claim_of: Callable[[PeerId], bytes] = lambda peer: b"") -> frozenset[PeerId]:
        """Who gets no seat and no vote now; claim_of: what someone shows, as it may be to go on as a member."""
        return self.admission.barred(self.delegation, claim_of)

    def refuses(self, peer: PeerId, claim: bytes = b"") -> Refusal | None:
        """Why `peer`, who shows this claim, may not take part, or None; a voter or coordinator needs no claim."""
        refusal, seat = self.admission.refuses(peer, claim), self.delegation
        stands = self.ledger.head.voter(peer) is not None or (seat is not None and seat.coordinator == peer)
        return None if refusal is not None and refusal.code == NOT_ADMITTED and stands else refusal

    # -- what happens

    def handles(self, message: Message) -> bool:
        """Whether `message` is this machine's to receive."""
        return type(message) in self._handlers

    def receive(self, sender: PeerId, message: Message, *, now: float) -> list[Effect]:
        """Take one of the messages that `handles` names."""
        self._watch.look(now, self._silence_s)
        return self._handlers[type(message)](sender, message, now)

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """The blobs `digests` are checked and on disk."""
        self.replica.hold(digests)
        return self._advance(now)

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> list[Effect]:
        """The shell holds the model after `round_`, which is proven; `since` are the commits after it."""
        self.replica.begin(round_, model, since)
        self._fetch_at = self._watch.heard_at = self._watch.ran_at = now
        if self.promises.pledged > self.view:  # before a restart
            self._pledge_at, self._raise_at = now, now + 2 * self._silence_s
        out: list[Effect] = []
        if self.at_head and self.ledger.tip is not None:
            out = self._sign_applied(self.ledger.tip.block, model, Cost(0.0, 0.0, {}))
        return [*out, *self._advance(now)]

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> list[Effect]:
        """The model after `round_` is in place."""
        commit = self.replica.applied(round_, model)
        if commit is None:
            return []
        self._fetch_at = now if self.replica.next else NEVER
        return [*self._sign_applied(commit.block, model, cost), *self._advance(now)]

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> list[Effect]:
        """These parts of the commit under way are no longer what they were on disk: get them anew."""
        if not self.replica.damaged(digests):
            return []
        self._fetch_at = now
        return self._advance(now)

    def forget(self, digests: Iterable[bytes]) -> None:
        """These blobs are no longer on disk, and belong to nothing that was committed."""
        self.replica.forget(digests)

    def behind(self, place: tuple[int, int], donor: PeerId, *, now: float) -> list[Effect]:
        """`donor` says that the chain has reached that place, (epoch, round): catch up if that is news."""
        if place <= self.ledger.head.place or now < self._catching_up_until:
            return []
        self._catching_up_until = now + RETRY_S
        return [CatchUp(donor, self.ledger.head.place)]

    def tick(self, *, now: float) -> list[Effect]:
        """Fetch what should have come by now, and give up a leader who is silent or gets nowhere."""
        self._watch.look(now, self._silence_s)
        out = self._fetch_missing(now) if now >= self._fetch_at else []
        if now >= self._impatient_at():
            return [*out, *self._give_up(max(self.view, self.promises.pledged) + 1, now)]
        if now >= self._pledge_at:
            out += self._say_pledge(now)
        return out

    def wake_at(self) -> float:
        """When `tick` has something to do."""
        impatient_at = self._impatient_at()
        watch_at = NEVER if impatient_at == NEVER else self._watch.ran_at + self._silence_s / 4
        return min(self._fetch_at, self._pledge_at, impatient_at, watch_at)

    @property
    def at_head(self) -> bool:
        """Whether the model is that of the chain's head."""
        return self.model is not None and self.model_round == self.ledger.head.round

    def position(self) -> Standing:
        """Where the run stands, as one who does not lead it says."""
        head = self.ledger.head
        return Standing(head.epoch, head.round, head.hash, self.view, FOLLOWING, "", False, 0, None)

    def put_right(self, sender: PeerId, place: tuple[int, int], view: int, *, now: float) -> list[Effect]:
        """`sender` says that it stands at that place and in that view of the next round: show it what it lacks."""
        head = self.ledger.head
        lacks_view = place == head.place and view < self.view
        if sender == self._signer.peer_id or not (place < head.place or lacks_view):
            return []
        if now < self._told_at.get(sender, -1.0) + 1.0:
            return []
        self._told_at = {peer: at for peer, at in self._told_at.items() if now < at + 1.0} | {sender: now}
        if lacks_view:
            lock = self.promises.lock
            proof = self.new_view if self.new_view is not None and self.new_view.view == self.view else lock
            return [] if proof is None else [Send((sender,), proof)]
        tip = self.ledger.tip
        if tip is not None and place == (head.epoch, head.round - 1):
            return [Send((sender,), tip)]
        return [Send((sender,), self.position())]

    # -- messages

    def _on_delegation(self, sender: PeerId, said: Delegation, now: float) -> list[Effect]:
        if said.term <= max(self.ledger.head.term, self.delegation.term if self.delegation else 0):
            return []
        if not self.ledger.delegates(said):
            return [Refused(sender, "delegation", f"term {said.term} is not signed by the organizer")]
        self.delegation = said
        return []

    def _note_seat(self, block: Block) -> None:
        """Keep the newest delegation: who catches up reads of coordinators that came before the one it knows."""
        seat, known = block.coordinator, self.delegation
        if seat is not None and (known is None or seat.term >= known.term):
            self.delegation = seat

    def _on_standing(self, sender: PeerId, said: Standing, now: float) -> list[Effect]:
        place = (said.epoch, said.head_round)
        if sender == self.leader and place == self.ledger.head.place and said.in_view == self.view:
            working = said.phase not in ("idle", "finished", FOLLOWING)
            self._watch.stands(working=working, voting=said.phase == "vote", now=now)
        return [*self.behind(place, sender, now=now), *self.put_right(sender, place, said.in_view, now=now)]

    def _on_proposal(self, sender: PeerId, said: Proposal, now: float) -> list[Effect]:
        block, head = said.block, self.ledger.head
        if (block.epoch, block.round) != (head.epoch, head.round + 1):
            return self.behind((block.epoch, block.round - 1), sender, now=now)
        if said.view > self.view:
            return []  # its leader says it again once our report shows that we do not know of the view
        if said.view < self.view or sender != self.leader:
            return [Refused(sender, "not leader", f"proposal of view {said.view}; view {self.view} has another leader")]
        try:
            self.ledger.check(block)
        except LedgerError as error:
            return [Refused(sender, "invalid block", str(error))]
        if self._must is not None and block != self._must:
            return [Refused(sender, "not locked", f"another block than that of the lock which began view {self.view}")]
        # what may be committed already, or has our own vote, is voted for: a committee of one has no other leader
        objection = None if block == self.bound_to else self.admission.objects(block, sender)
        if objection is not None:  # its leader had the time to know
            return [Refused(sender, "not admitted", objection)]
        if self._proposal is None or self._proposal.view < said.view:
            self._proposal = said
            self._fetch_at = now + FETCH_AFTER_S
        elif self._proposal.block != block:
            return [Refused(sender, "two proposals", f"two blocks in view {said.view} of round {block.round}")]
        return self._advance(now)

    def _on_lock(self, sender: PeerId, said: Lock, now: float) -> list[Effect]:
        head, held = self.ledger.head, self.promises.lock
        if (said.block.epoch, said.block.round) != (head.epoch, head.round + 1):
            return self.behind((said.block.epoch, said.block.round - 1), sender, now=now)
        if said.view < self.promises.pledged or not self.votes or (held is not None and said.view < held.view):
            return []
        if held is None or held.view < said.view:
            try:
                self._check_lock(said)
            except LedgerError as error:
                return [Refused(sender, "invalid lock", str(error))]
        elif held.block != said.block:
            why = f"two locks in view {said.view} of round {said.block.round}"
            return [Refused(sender, "two locks", why), *self._accuse_all(held, said)]
        out: list[Effect] = []
        if held is None or held.view < said.view:
            out = self._promise(structs.replace(self.promises, pledged=said.view, lock=said))
        if said.view > self.view:  # a quorum was there: that is as good a proof as a NewView
            self.view = said.view
            self._watch.begin(now)
            self._pledge_at = self._raise_at = NEVER
        return [*out, self._vote(said.block, said.view, PRECOMMIT)]

    def _accuse_all(self, one: Lock, other: Lock) -> list[Effect]:
        """Two quorums prevoted two blocks in one view: whoever is in both lied."""
        run, committee = self.ledger.run, self.ledger.head.committee
        first, second = (equivocation.prevotes(run, lock, committee) for lock in (one, other))
        return [Accuse(first[peer], second[peer]) for peer in sorted(first.keys() & second.keys())]

    def _on_view_change(self, sender: PeerId, said: ViewChange, now: float) -> list[Effect]:
        head = self.ledger.head
        if (said.epoch, said.round) != (head.epoch, head.round + 1):
            return [
                *self.behind((said.epoch, said.round - 1), sender, now=now),
                *self.put_right(sender, (said.epoch, said.round - 1), 0, now=now),
            ]
        if said.view <= self.view:
            return self.put_right(sender, head.place, said.view - 1, now=now)
        if said.pledge.peer != sender or head.voter(sender) is None:
            return [Refused(sender, "not a member", "it has no vote in this round")]
        fault = self._fault_of(said)
        if fault is not None:
            return [Refused(sender, "invalid pledge", fault)]
        for view in [v for v, pledged in self._pledges.items() if sender in pledged and v < said.view]:
            del self._pledges[view][sender]  # one pledge of each voter: it can't fill our memory
        if any(sender in pledged for view, pledged in self._pledges.items() if view > said.view):
            return []
        self._pledges.setdefault(said.view, {}).setdefault(sender, said)
        accused = self._accuse(said.view, (said.pledge,))
        if accused:
            return accused
        return self._count_pledges(now)

    def _on_new_view(self, sender: PeerId, said: NewView, now: float) -> list[Effect]:
        head = self.ledger.head
        if (said.epoch, said.round) != (head.epoch, head.round + 1) or said.view <= self.view:
            return self.behind((said.epoch, said.round - 1), sender, now=now)
        fault = self._fault_of_new_view(said)
        if fault is not None:
            return [Refused(sender, "invalid view", fault)]
        return [*self._accuse(said.view, said.pledges), *self._enter(said, now)]

    def _accuse(self, view: int, pledges: Iterable[Pledge]) -> list[Effect]:
        """Who gave another pledge to the same view before."""
        head, out, known = self.ledger.head, list[Effect](), self._pledges.get(view, {})
        for given in pledges:
            voter, before = head.voter(given.peer), known.get(given.peer)
            if voter is not None and before is not None and before.pledge != given:
                both = (
                    equivocation.pledge(self.ledger.run, head.epoch, head.round + 1, view, one, voter.incarnation)
                    for one in (before.pledge, given)
                )
                out.append(Accuse(*both))
        return out

    def _on_commit(self, sender: PeerId, said: Commit, now: float) -> list[Effect]:
        block, head = said.block, self.ledger.head
        if (block.epoch, block.round) <= head.place:
            return []
        unknown = not self.ledger.knows(block.parent)
        if unknown and (block.epoch > head.epoch or block.round > head.round + 1):
            return self.behind((block.epoch, block.round), sender, now=now)  # its parent may come with the rest
        try:
            self.ledger.check_commit(said)
        except LedgerError as error:
            return [Refused(sender, "invalid commit", str(error))]
        out = self._rewind(block) if block.parent != head.hash else []
        told = block.parent == head.hash and sender == head.leader(said.view)  # not when we catch up
        others = self.passes_on(self._signer.peer_id, said) if told else ()
        self.ledger.append(said)
        self._note_seat(block)
        # in the midst of a round its parts are still on their way here: fetching at once would move them twice
        arriving = self._proposal is not None or self.replica.holds_some(block)
        grace_s = FETCH_AFTER_S if arriving else 0.0
        self._begin_round(now)
        self.replica.follow(said)
        self._catching_up_until = 0.0
        if self.applying is None:
            self._fetch_at = now + grace_s
        passed_on: list[Effect] = [Send(others, said)] if others else []
        return [*out, Store(said), *passed_on, *self._advance(now)]

    def passes_on(self, voter: PeerId, commit: Commit) -> tuple[PeerId, ...]:
        """Whom `voter` tells of `commit`, which follows the head: in a large swarm the leader tells only the voters.

        Each tells some of the contributors without a vote; who is forgotten so, since that voter is gone, is told by
        the leader upon its next report.
        """
        entries, head = commit.block.entries, self.ledger.head
        if len(entries) <= MAX_VOTERS:
            return ()
        telling = sorted(head.voters - {head.leader(commit.view)})
        if voter not in telling:
            return ()
        hearing = [entry.peer for entry in entries if head.voter(entry.peer) is None]
        return tuple(hearing[telling.index(voter) :: len(telling)])

    # -- views

    def _begin_round(self, now: float) -> None:
        head = self.ledger.head
        self.promises = Promises(head.epoch, head.round + 1)
        self.view, self.new_view, self._proposal = 0, None, None
        self._pledges.clear()
        self._watch.begin(now)
        self._pledge_at = self._raise_at = NEVER

    def _impatient_at(self) -> float:
        """When we give up the leader, or the one to whom we have pledged ourselves and who has not begun."""
        if not self.votes or self.model is None:
            return NEVER
        silent_at = NEVER if self.leads else self._watch.heard_at + self._silence_s
        if self.promises.pledged > self.view:  # while its leader is there, the view may still come to its end
            return max(self._raise_at, silent_at)
        alone = len(self.ledger.head.committee) == 1
        return NEVER if alone else min(silent_at, self._watch.stuck_at())

    def _give_up(self, view: int, now: float) -> list[Effect]:
        """Pledge ourselves to `view`, durably, and tell all voters."""
        self._raise_at = now + 2 * self._silence_s
        return [*self._promise(structs.replace(self.promises, pledged=view)), *self._say_pledge(now)]

    def _say_pledge(self, now: float) -> list[Effect]:
        self._pledge_at = now + PLEDGE_AGAIN_S
        head, promises = self.ledger.head, self.promises
        locked, block = (0, b"") if promises.lock is None else (promises.lock.view + 1, promises.lock.block.hash)
        payload = pledge_payload(
            self.ledger.run, head.epoch, head.round + 1, promises.pledged, locked, block, self.incarnation
        )
        pledge = Pledge(self._signer.peer_id, locked, block, self._signer.sign(payload))
        said = ViewChange(head.epoch, head.round + 1, promises.pledged, pledge, promises.lock)
        return [Send(tuple(sorted(head.voters)), said)]

    def _count_pledges(self, now: float) -> list[Effect]:
        """Begin a view that is ours to lead, or join those who have given up a leader."""
        committee, rule = self.ledger.head.committee, self.ledger.rule
        for view, said in sorted(self._pledges.items(), reverse=True):
            ours = self.ledger.head.leader(view) == self._signer.peer_id and self.votes
            if ours and view > self.view and rule.decided(committee, said):
                return self._lead(view, said, now)
        pledged = max(self.view, self.promises.pledged)
        for view in sorted((v for v in self._pledges if v > pledged), reverse=True):
            higher = {peer for v, said in self._pledges.items() if v >= view for peer in said}
            lost = self.promises.pledged > self.view and weight_of(committee, higher) > rule.faulty(committee)
            if self.votes and (lost or rule.blocks(committee, higher)):
                return self._give_up(view, now)
        return []

    def _lead(self, view: int, said: dict[PeerId, ViewChange], now: float) -> list[Effect]:
        head = self.ledger.head
        locks = (one.lock for one in said.values() if one.lock is not None)
        highest = max(locks, key=lambda lock: lock.view, default=None)
        pledges = tuple(said[peer].pledge for peer in sorted(said))
        proof = NewView(head.epoch, head.round + 1, view, pledges, highest)
        others = tuple(sorted(head.voters - {self._signer.peer_id}))
        return [*self._enter(proof, now), *([Send(others, proof)] if others else [])]

    def _enter(self, proof: NewView, now: float) -> list[Effect]:
        self.view, self.new_view = proof.view, proof
        self._watch.begin(now)
        self._pledges = {view: said for view, said in self._pledges.items() if view > proof.view}
        if self.promises.pledged <= proof.view:
            self._pledge_at = self._raise_at = NEVER
        if self._proposal is not None and self._proposal.view < proof.view:
            self._proposal = None
        return self._say_applied()  # the new leader may not have heard it, and vouches for the model with it

    def _fault_of(self, said: ViewChange) -> str | None:
        pledge, lock = said.pledge, said.lock
        if not self._pledged(pledge, said.view):
            return f"the pledge of {pledge.peer} is not signed by the voter that the committee knows"
        if (pledge.locked, pledge.block) != ((0, b"") if lock is None else (lock.view + 1, lock.block.hash)):
            return f"the pledge of {pledge.peer} speaks of another lock than it shows"
        if lock is None:
            return None
        if lock.view >= said.view:
            return "a lock of the view that it pledges itself to"
        try:
            self._check_lock(lock)
        except LedgerError as error:
            return str(error)
        return None

    def _fault_of_new_view(self, said: NewView) -> str | None:
        committee, rule = self.ledger.head.committee, self.ledger.rule
        true = {pledge.peer for pledge in said.pledges if self._pledged(pledge, said.view)}
        if len(true) != len(said.pledges) or not rule.decided(committee, true):
            return f"the pledges to view {said.view} are not those of a quorum"
        highest = max((pledge.locked, pledge.block) for pledge in said.pledges)
        shown = (0, b"") if said.lock is None else (said.lock.view + 1, said.lock.block.hash)
        if highest != shown:
            return f"view {said.view} does not begin with the highest lock of its pledges"
        try:
            if said.lock is not None:
                self._check_lock(said.lock)
        except LedgerError as error:
            return str(error)
        return None

    def _pledged(self, pledge: Pledge, view: int) -> bool:
        head = self.ledger.head
        voter = head.voter(pledge.peer)
        if voter is None:
            return False
        payload = pledge_payload(
            self.ledger.run, head.epoch, head.round + 1, view, pledge.locked, pledge.block, voter.incarnation
        )
        return self._signer.verify(pledge.peer, payload, pledge.signature)

    def _check_lock(self, lock: Lock) -> None:
        self.ledger.check(lock.block)
        if not self.ledger.certifies(lock.block, lock.view, PREVOTE, lock.ballots):
            raise LedgerError(f"the prevotes of view {lock.view} are not a quorum")

    # -- votes

    def _promise(self, promises: Promises) -> list[Effect]:
        self.promises = promises
        return [Remember(promises)]

    def _vote(self, block: Block, view: int, phase: int) -> Send:
        payload = vote_payload(self.ledger.run, block.epoch, block.round, view, phase, block.hash, self.incarnation)
        said = Vote(block.epoch, block.round, view, phase, block.hash, self._signer.sign(payload))
        return Send((self.ledger.head.leader(view),), said)

    def _prevote(self, said: Proposal) -> list[Effect]:
        """Prevote, unless we have promised otherwise."""
        block, before = said.block, self.promises.prevoted
        if block.model_before != self.model:
            self._proposal, self.replica.model = None, None
            return [Resync(f"the committee's model after round {self.model_round} differs from ours")]
        if not self.votes or said.view < self.promises.pledged:
            return []
        if before is not None and (said.view < before.view or (said.view == before.view and said != before)):
            return [Refused(self.leader, "two proposals", f"two blocks in view {said.view} of round {block.round}")]
        out: list[Effect] = []
        if said != before:
            out = self._promise(structs.replace(self.promises, pledged=said.view, prevoted=said))
        return [*out, self._vote(block, said.view, PREVOTE)]

    # -- the chain and the model

    def _rewind(self, block: Block) -> list[Effect]:
        """The organizer began an epoch on an earlier block: what followed it counts no more."""
        self.ledger.rewind(block.parent)
        base = block.round - 1
        out: list[Effect] = [Rewind(base)]
        if self.replica.rewind(base):
            out.append(Resync(f"epoch {block.epoch} begins after round {base}, and our model is of a later one"))
        return out

    def _sign_applied(self, block: Block, model: bytes, cost: Cost) -> list[Effect]:
        payload = applied_payload(self.ledger.run, block.round, block.hash, model)
        sent = tuple(sorted(cost.sent_bytes.items()))
        signature = self._signer.sign(payload)
        self._said = Applied(block.round, block.hash, model, signature, cost.train_s, cost.wall_s, sent)
        return self._say_applied()

    def _say_applied(self) -> list[Effect]:
        """Tell the leader, and the coordinator, who keeps the books; our own word is kept here too."""
        coordinator = self.ledger.head.coordinator
        to = {self.leader, self._signer.peer_id} | ({coordinator} if coordinator is not None else set())
        return [] if self._said is None else [Send(tuple(sorted(to)), self._said)]

    def _advance(self, now: float) -> list[Effect]:
        """Apply the next commit, or vote on the proposal, as soon as all of its bytes are held."""
        if not self.replica.can_go_on:
            return []
        commit = self.replica.next
        if commit is not None:
            if self.replica.missing(commit.block) and commit.block.round == self.model_round + 1:
                return self._fetch_missing(now) if now >= self._fetch_at else []
            self._fetch_at = NEVER
            return self.replica.apply_next(self.ledger.head.round)
        said = self._proposal
        if said is None or not self.at_head or self.replica.missing(said.block):
            return []
        self._fetch_at = NEVER
        return self._prevote(said)

    def _fetch_missing(self, now: float) -> list[Effect]:
        """Ask for the parts of the next commit, or of the proposal, that are not here."""
        self._fetch_at = NEVER
        if not self.replica.can_go_on:
            return []
        commit = self.replica.next
        if commit is not None:
            block, donors = commit.block, [ballot.peer for ballot in commit.ballots]
        elif self._proposal is not None:
            block, donors = self._proposal.block, [entry.peer for entry in self._proposal.block.entries]
        else:
            return []
        missing = self.replica.missing(block)
        if not missing:
            return []
        self._fetch_at = now + RETRY_S
        # who has come since may have them too; the leader last: its uplink serves everyone
        donors = list(dict.fromkeys([*donors, *sorted(self.ledger.head.voters)]))
        others = [peer for peer in donors if peer not in (self._signer.peer_id, self.leader)]
        return [Fetch(missing, (*others, *(() if self.leads else (self.leader,))))]
