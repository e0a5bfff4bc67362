from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dugnad.dht.identity import PeerId
from dugnad.optim.reduce import FEW_VECTORS, RETRY_S, Deliver, Drop, Effect, Fold, Holds, Reducer, Upload, Weighed

ME, ANN, BOB, EVE = PEERS = tuple(PeerId(name) for name in ("me", "ann", "bob", "eve"))
LEADER = PeerId("leader")
OWNERS = (ME, ANN, ME, BOB, ANN)
ROOTS = {peer: peer.encode().ljust(32, b".") for peer in PEERS}
OTHER = b"other work".ljust(32)
SET = (Weighed(ANN, ROOTS[ANN], 5), Weighed(ME, ROOTS[ME], 7))
RESULTS = {0: b"a" * 32, 2: b"c" * 32}


def holds(*peers: PeerId) -> Holds:
    """All our parts of the vectors of these peers are here."""
    return Holds(tuple((peer, ROOTS[peer]) for peer in sorted(peers)))


def planned() -> Reducer:
    reducer = Reducer(ME)
    assert reducer.plan(OWNERS, (*PEERS, LEADER), now=0.0) == []
    return reducer


def folding() -> Reducer:
    """One that holds what it folds from, and was told to fold it."""
    reducer = planned()
    reducer.contribute(ROOTS[ME], now=0.0)
    reducer.received(ANN, ROOTS[ANN], (0, 2), now=0.0)
    assert Fold((0, 2), SET) in reducer.freeze(SET, now=0.0)
    return reducer


# -- uploads


def test_own_work_goes_to_each_owner_in_one_upload_and_is_held_by_ourselves() -> None:
    reducer = planned()
    assert not reducer.contributed
    effects = reducer.contribute(ROOTS[ME], now=0.0)
    assert effects == [Upload(ANN, ROOTS[ME], (1, 4)), Upload(BOB, ROOTS[ME], (3,)), holds(ME)]
    assert reducer.contributed
    assert reducer.own_parts == (0, 2)


def test_nothing_is_uploaded_before_the_work_is_done() -> None:
    reducer = planned()
    assert reducer.tick(now=100.0) == []
    assert reducer.plan((BOB,) * 5, PEERS, now=100.0) == []


def test_a_broken_upload_is_tried_again_after_a_while_and_only_that_one() -> None:
    reducer = planned()
    reducer.contribute(ROOTS[ME], now=0.0)
    assert reducer.uploaded(ANN, ROOTS[ME], (1, 4), now=0.1) == []
    assert reducer.upload_failed(BOB, ROOTS[ME], (3,), now=0.5) == []
    assert Upload(BOB, ROOTS[ME], (3,)) not in reducer.tick(now=0.5 + RETRY_S - 0.01)
    assert [e for e in reducer.tick(now=0.5 + RETRY_S) if isinstance(e, Upload)] == [Upload(BOB, ROOTS[ME], (3,))]
    assert [e for e in reducer.tick(now=60.0) if isinstance(e, Upload)] == []


def test_it_wakes_when_an_upload_is_due_again() -> None:
    reducer = Reducer(ME)
    reducer.plan((ANN, BOB), PEERS, now=0.0)
    assert reducer.wake_at() == float("inf")
    reducer.contribute(ROOTS[ME], now=0.0)
    reducer.upload_failed(BOB, ROOTS[ME], (1,), now=0.5)
    assert reducer.wake_at() == 0.5 + RETRY_S


def test_a_new_view_uploads_only_what_its_owners_lack() -> None:
    reducer = planned()
    reducer.contribute(ROOTS[ME], now=0.0)
    reducer.uploaded(ANN, ROOTS[ME], (1, 4), now=0.1)
    reducer.uploaded(BOB, ROOTS[ME], (3,), now=0.1)
    effects = reducer.plan((ME, ANN, ANN, ANN, ANN), PEERS, now=1.0)
    assert effects == [Upload(ANN, ROOTS[ME], (2, 3)), holds(ME)]


def test_an_owner_that_was_gone_for_a_view_gets_everything_again() -> None:
    reducer = planned()
    reducer.contribute(ROOTS[ME], now=0.0)
    reducer.uploaded(ANN, ROOTS[ME], (1, 4), now=0.1)
    reducer.uploaded(BOB, ROOTS[ME], (3,), now=0.1)
    reducer.plan((ME, ANN, ME, ANN, ANN), PEERS, now=1.0)
    reducer.uploaded(ANN, ROOTS[ME], (3,), now=1.1)
    assert [e for e in reducer.plan(OWNERS, PEERS, now=2.0) if isinstance(e, Upload)] == [Upload(BOB, ROOTS[ME], (3,))]


def test_an_acknowledgment_of_an_older_view_still_counts() -> None:
    reducer = planned()
    reducer.contribute(ROOTS[ME], now=0.0)
    effects = reducer.plan((ANN,) * 5, PEERS, now=1.0)
    assert Upload(ANN, ROOTS[ME], (0, 1, 2, 3, 4)) in effects
    reducer.uploaded(ANN, ROOTS[ME], (1, 4), now=1.1)
    reducer.upload_failed(ANN, ROOTS[ME], (0, 1, 2, 3, 4), now=1.2)
    assert reducer.tick(now=3.0) == [Upload(ANN, ROOTS[ME], (0, 2, 3))]


def test_work_that_is_void_leaves_no_trace_in_what_is_uploaded_of_the_other_work() -> None:
    reducer = planned()
    reducer.contribute(ROOTS[ME], now=0.0)
    reducer.received(ANN, ROOTS[ANN], (0, 2), now=0.0)
    reducer.restart()
    assert reducer.plan(OWNERS, PEERS, now=1.0) == [Drop(ME, ROOTS[ME]), holds(ANN)]
    assert not reducer.contributed
    assert reducer.uploaded(ANN, ROOTS[ME], (1, 4), now=1.1) == []
    effects = reducer.contribute(OTHER, now=2.0)
    assert [e for e in effects if isinstance(e, Upload)] == [Upload(ANN, OTHER, (1, 4)), Upload(BOB, OTHER, (3,))]


def test_an_upload_of_void_work_that_ends_late_does_not_count_for_the_other_work() -> None:
    reducer = planned()
    reducer.contribute(ROOTS[ME], now=0.0)
    reducer.restart()
    reducer.plan(OWNERS, PEERS, now=1.0)
    reducer.contribute(OTHER, now=2.0)
    assert reducer.uploaded(ANN, ROOTS[ME], (1, 4), now=2.1) == []
    reducer.upload_failed(ANN, OTHER, (1, 4), now=2.2)
    assert Upload(ANN, OTHER, (1, 4)) in reducer.tick(now=9.0)


def test_who_missed_a_view_offers_all_of_its_work_again() -> None:
    reducer = planned()
    reducer.contribute(ROOTS[ME], now=0.0)
    reducer.uploaded(ANN, ROOTS[ME], (1, 4), now=0.1)
    reducer.uploaded(BOB, ROOTS[ME], (3,), now=0.1)
    assert not [e for e in reducer.plan(OWNERS, PEERS, now=1.0) if isinstance(e, Upload)]
    reducer.doubt()
    uploads = [e for e in reducer.plan(OWNERS, PEERS, now=2.0) if isinstance(e, Upload)]
    assert uploads == [Upload(ANN, ROOTS[ME], (1, 4)), Upload(BOB, ROOTS[ME], (3,))]


def test_a_delivery_that_is_under_way_when_a_new_view_begins_keeps_what_it_delivers() -> None:
    reducer = folding()
    deliveries = [e for e in reducer.folded(RESULTS, now=1.0) if isinstance(e, Deliver)]
    reducer.plan(OWNERS, PEERS, now=2.0)
    assert [dict(e.parts) for e in deliveries] == [RESULTS] * len(deliveries)


# -- holding


def test_of_one_peer_two_vectors_are_taken_and_none_of_them_is_dropped_within_a_view() -> None:
    reducer = planned()
    reducer.received(ANN, ROOTS[ANN], (0, 2), now=0.0)
    assert reducer.takes(ANN, OTHER)
    reducer.received(ANN, OTHER, (0,), now=0.0)
    assert not reducer.takes(ANN, b"a third".ljust(32))
    assert reducer.takes(ANN, ROOTS[ANN])
    assert reducer.takes(ANN, OTHER)
    assert reducer.takes(BOB, b"a third".ljust(32))
    assert Fold((0, 2), SET[:1]) in reducer.freeze(SET[:1], now=0.0)


def test_a_new_view_keeps_of_each_peer_the_vector_that_was_last_added_to() -> None:
    reducer = planned()
    for root, part in ((ROOTS[ANN], 0), (OTHER, 0), (ROOTS[ANN], 2)):
        reducer.received(ANN, root, (part,), now=0.0)
    reducer.received(BOB, ROOTS[BOB], (0, 2), now=0.0)
    assert reducer.plan(OWNERS, PEERS, now=1.0) == [Drop(ANN, OTHER), holds(ANN, BOB)]
    assert reducer.takes(ANN, b"a third".ljust(32))


def test_a_contribution_is_held_once_all_our_parts_of_it_are_here() -> None:
    reducer = planned()
    assert reducer.received(ANN, ROOTS[ANN], (0,), now=0.0) == []
    assert reducer.received(ANN, ROOTS[ANN], (2,), now=0.0) == [holds(ANN)]
    assert reducer.received(ANN, ROOTS[ANN], (0, 2), now=0.0) == []


def test_parts_under_two_roots_are_two_contributions() -> None:
    reducer = planned()
    assert reducer.received(ANN, ROOTS[ANN], (0,), now=0.0) == []
    assert reducer.received(ANN, b"another root".ljust(32), (2,), now=0.0) == []


def test_what_is_held_is_said_again_until_the_set_is_frozen() -> None:
    reducer = planned()
    reducer.received(ANN, ROOTS[ANN], (0, 2), now=0.0)
    assert reducer.wake_at() == RETRY_S
    assert reducer.tick(now=RETRY_S) == [holds(ANN)]
    assert reducer.tick(now=2 * RETRY_S) == [holds(ANN)]
    reducer.freeze(SET, now=2.5)
    assert reducer.wake_at() == float("inf")
    assert reducer.tick(now=60.0) == []


def test_in_a_crowd_what_came_since_is_said_together_and_all_of_it_only_now_and_then() -> None:
    reducer = planned()
    crowd = [PeerId(f"p{k:03}") for k in range(FEW_VECTORS + 2)]
    said: list[Effect] = []
    for peer in crowd:
        said += reducer.received(peer, OTHER, (0, 2), now=0.0)
    assert said == [Holds(((peer, OTHER),)) for peer in crowd[:FEW_VECTORS]]
    assert reducer.wake_at() == RETRY_S
    everything = Holds(tuple((peer, OTHER) for peer in crowd))
    assert reducer.tick(now=RETRY_S) == [everything], "the first time all of it is due"
    reducer.received(PeerId("p999"), OTHER, (0, 2), now=RETRY_S)
    assert reducer.tick(now=2 * RETRY_S) == [Holds(((PeerId("p999"), OTHER),))]
    assert reducer.tick(now=3 * RETRY_S) == [], "what was said is not said again at once"
    again = [effect for k in range(4, 7) for effect in reducer.tick(now=k * RETRY_S)]
    assert again == [Holds((*everything.vectors, (PeerId("p999"), OTHER)))]


def test_what_is_held_stays_held_in_a_new_view() -> None:
    reducer = planned()
    reducer.received(ANN, ROOTS[ANN], (0, 2), now=0.0)
    assert reducer.plan((BOB, ME, ME, BOB, BOB), PEERS, now=1.0) == []
    assert reducer.received(ANN, ROOTS[ANN], (1,), now=1.1) == [holds(ANN)]
    assert reducer.plan(OWNERS, PEERS, now=2.0) == [holds(ANN)]


def test_who_owns_no_part_holds_and_folds_nothing() -> None:
    reducer = Reducer(ME)
    reducer.plan((ANN, BOB), PEERS, now=0.0)
    assert reducer.contribute(ROOTS[ME], now=0.0) == [Upload(ANN, ROOTS[ME], (0,)), Upload(BOB, ROOTS[ME], (1,))]
    assert reducer.received(ANN, ROOTS[ANN], (0, 1), now=0.0) == []
    assert reducer.freeze(SET, now=0.0) == []
    assert reducer.folded({}, now=0.0) == []


# -- folding


def test_the_fold_waits_for_the_last_part_of_the_frozen_set_and_happens_once() -> None:
    reducer = planned()
    reducer.contribute(ROOTS[ME], now=0.0)
    assert reducer.freeze(SET, now=0.0) == []
    assert reducer.frozen
    assert reducer.received(ANN, ROOTS[ANN], (0,), now=0.0) == []
    assert reducer.received(ANN, ROOTS[ANN], (2,), now=0.0) == [Fold((0, 2), SET)]
    assert reducer.received(ANN, ROOTS[ANN], (0, 2), now=0.0) == []
    assert reducer.freeze(SET, now=0.0) == []
    reducer.folded(RESULTS, now=0.0)
    assert reducer.freeze(SET, now=0.0) == []
    assert reducer.received(BOB, ROOTS[BOB], (0, 2), now=0.0) == [], "the set is known: nobody asks any more"


def test_the_first_frozen_set_of_a_view_stands() -> None:
    reducer = planned()
    reducer.freeze(SET, now=0.0)
    other = (Weighed(BOB, ROOTS[BOB], 1),)
    assert reducer.freeze(other, now=0.0) == []
    assert reducer.received(BOB, ROOTS[BOB], (0, 2), now=0.0) == []


def test_a_contribution_that_is_not_in_the_set_is_not_waited_for() -> None:
    reducer = planned()
    assert reducer.received(ANN, ROOTS[ANN], (0, 2), now=0.0) == [holds(ANN)]
    assert reducer.freeze(SET[:1], now=0.0) == [Fold((0, 2), SET[:1])]


def test_results_of_a_view_that_is_over_are_dropped() -> None:
    reducer = folding()
    reducer.plan((ME, ANN, ANN, BOB, ANN), PEERS, now=1.0)
    assert reducer.folded(RESULTS, now=1.1) == []
    assert reducer.freeze(SET, now=1.2) == [Fold((0,), SET)]
    assert reducer.folded(RESULTS, now=1.3) == []


# -- delivering


def test_averages_go_to_everyone_but_ourselves_and_again_to_whom_they_did_not_reach() -> None:
    reducer = folding()
    effects = reducer.folded(RESULTS, now=0.0)
    assert effects == [Deliver(peer, RESULTS) for peer in (ANN, BOB, EVE, LEADER)]
    for peer in (ANN, BOB, LEADER):
        reducer.delivered(peer)
    reducer.uploaded(ANN, ROOTS[ME], (1, 4), now=0.0)
    reducer.uploaded(BOB, ROOTS[ME], (3,), now=0.0)
    reducer.deliver_failed(EVE, now=1.0)
    assert reducer.tick(now=1.0 + RETRY_S) == [Deliver(EVE, RESULTS)]
    reducer.delivered(EVE)
    assert reducer.tick(now=60.0) == []


def test_a_failure_after_the_delivery_was_acknowledged_is_no_reason_to_send_again() -> None:
    reducer = folding()
    reducer.folded(RESULTS, now=0.0)
    reducer.delivered(EVE)
    reducer.deliver_failed(EVE, now=1.0)
    assert reducer.tick(now=60.0) == []


def test_a_new_view_forgets_deliveries_of_the_old_one() -> None:
    reducer = folding()
    reducer.folded(RESULTS, now=0.0)
    reducer.plan(OWNERS, PEERS, now=0.5)
    reducer.deliver_failed(EVE, now=0.6)
    assert not [e for e in reducer.tick(now=60.0) if isinstance(e, Deliver)]


def test_a_delivery_that_broke_does_not_hold_up_the_upload_to_the_same_peer() -> None:
    reducer = Reducer(ME)
    reducer.plan((ANN, ME, ME, ME, ANN), (*PEERS, LEADER), now=0.0)
    entries = (Weighed(EVE, ROOTS[EVE], 10),)
    assert reducer.freeze(entries, now=0.0) == []
    assert reducer.freeze((Weighed(ANN, ROOTS[ANN], 10),), now=0.0) == []
    assert reducer.received(EVE, ROOTS[EVE], (1, 2, 3), now=0.0) == [Fold((1, 2, 3), entries)]
    assert len(reducer.folded({1: b"b", 2: b"c", 3: b"d"}, now=0.0)) == 4
    reducer.deliver_failed(ANN, now=0.0)
    # too late for this set, but the work is good for the next view as well
    assert reducer.contribute(ROOTS[ME], now=0.0) == [Upload(ANN, ROOTS[ME], (0, 4))]


def test_an_upload_that_broke_does_not_double_the_delivery_that_is_under_way_to_the_same_peer() -> None:
    reducer = folding()
    assert Deliver(ANN, RESULTS) in reducer.folded(RESULTS, now=0.0)
    reducer.upload_failed(ANN, ROOTS[ME], (1, 4), now=0.0)
    assert reducer.tick(now=RETRY_S) == [Upload(ANN, ROOTS[ME], (1, 4))]


@pytest.mark.parametrize("results", [{}, {0: b"a"}, {0: b"a", 1: b"b"}, {0: b"a", 2: b"c", 3: b"d"}])
def test_results_of_other_parts_than_ours_are_dropped(results: dict[int, bytes]) -> None:
    assert folding().folded(results, now=0.0) == []


# -- every order of everything

owners_lists = st.tuples(*[st.sampled_from(PEERS)] * 5)
some_parts = st.sets(st.integers(0, 4), min_size=1).map(lambda parts: tuple(sorted(parts)))
others = st.sampled_from(PEERS[1:])


class Reducing(RuleBasedStateMachine):
    """A member's all-reduce against a model of what everyone has seen of it."""

    def __init__(self) -> None:
        super().__init__()
        self.reducer = Reducer(ME)
        self.now = 0.0
        self.view = 0
        self.owners: tuple[PeerId, ...] = ()
        self.contributed = False
        self.acknowledged: dict[PeerId, set[int]] = defaultdict(set)
        self.uploads: list[Upload] = []
        self.held: dict[PeerId, set[int]] = defaultdict(set)
        self.said_held: set[PeerId] = set()
        self.frozen: tuple[Weighed, ...] | None = None
        self.folds = 0
        self.folding = False
        self.results: dict[int, bytes] = {}
        self.undelivered: set[PeerId] = set()
        self.delivering: set[PeerId] = set()
        self.uploads_rest: dict[PeerId, float] = {}
        self.deliveries_rest: dict[PeerId, float] = {}
        """What broke, and until when it rests."""

    @property
    def mine(self) -> set[int]:
        return {part for part, owner in enumerate(self.owners) if owner == ME}

    def whole(self, peer: PeerId) -> bool:
        return bool(self.mine) and self.mine <= self.held[peer]

    def take(self, effects: list[Effect]) -> None:
        """Check each effect against what the rules say, as it comes out."""
        for effect in effects:
            match effect:
                case Upload(owner, root, parts):
                    assert root == ROOTS[ME]
                    self.check_upload(owner, parts)
                case Holds(vectors):
                    assert self.frozen is None, "once the set is known nobody asks what is held"
                    for peer, root in vectors:
                        assert root == ROOTS[peer]
                        assert self.whole(peer), "only what is here whole is said to be held"
                        self.said_held.add(peer)
                case Fold(parts, entries):
                    self.check_fold(parts, entries)
                case Deliver(to, parts):
                    assert parts == self.results, "everyone gets the same bytes"
                    self.check_delivery(to)

    def check_upload(self, owner: PeerId, parts: tuple[int, ...]) -> None:
        assert self.contributed, "nothing is uploaded before it is there"
        assert owner != ME
        assert parts
        assert all(self.owners[part] == owner for part in parts), "uploads go only to owners"
        assert not self.acknowledged[owner] & set(parts), "what was acknowledged is not sent again"
        assert all(upload.owner != owner for upload in self.uploads), "one upload at a time to each owner"
        assert self.now >= self.uploads_rest.pop(owner, self.now), "a broken upload rests before it is tried again"
        self.uploads.append(Upload(owner, ROOTS[ME], parts))

    def check_delivery(self, to: PeerId) -> None:
        assert to != ME
        assert to in self.undelivered, "who has acknowledged the averages does not get them again"
        assert to not in self.delivering, "one delivery at a time to each"
        assert self.now >= self.deliveries_rest.pop(to, self.now), "a broken delivery rests before it is tried again"
        self.delivering.add(to)

    def check_fold(self, parts: tuple[int, ...], entries: tuple[Weighed, ...]) -> None:
        self.folds += 1
        self.folding = True
        assert self.folds == 1, "every own part is folded at most once in a view"
        assert set(parts) == self.mine, "exactly the own parts are folded"
        assert entries == self.frozen, "the fold is from exactly the frozen set"
        assert all(self.whole(entry.peer) for entry in entries), "nothing is folded before all of it is here"

    @initialize(owners=owners_lists)
    def begin(self, owners: tuple[PeerId, ...]) -> None:
        self.plan(owners)

    @rule(owners=owners_lists)
    def plan(self, owners: tuple[PeerId, ...]) -> None:
        for newcomer in set(owners) - set(self.owners):
            self.acknowledged[newcomer].clear()
        self.owners, self.view = owners, self.view + 1
        self.uploads, self.said_held, self.delivering = [], set(), set()
        self.uploads_rest, self.deliveries_rest = {}, {}
        self.frozen, self.folds, self.folding, self.results, self.undelivered = None, 0, False, {}, set()
        self.take(self.reducer.plan(owners, (*PEERS, LEADER), now=self.now))

    @precondition(lambda self: not self.contributed)
    @rule()
    def contribute(self) -> None:
        self.contributed = True
        self.held[ME] = set(range(5))
        self.take(self.reducer.contribute(ROOTS[ME], now=self.now))

    @precondition(lambda self: self.uploads)
    @rule(data=st.data(), arrives=st.booleans())
    def end_of_an_upload(self, data: st.DataObject, arrives: bool) -> None:
        upload = data.draw(st.sampled_from(self.uploads))
        self.uploads.remove(upload)
        if arrives:
            self.acknowledged[upload.owner].update(upload.parts)
            self.take(self.reducer.uploaded(upload.owner, upload.root, upload.parts, now=self.now))
        else:
            self.uploads_rest[upload.owner] = self.now + RETRY_S
            self.take(self.reducer.upload_failed(upload.owner, upload.root, upload.parts, now=self.now))

    @rule(peer=others, parts=some_parts)
    def receive(self, peer: PeerId, parts: tuple[int, ...]) -> None:
        self.held[peer].update(parts)
        self.take(self.reducer.received(peer, ROOTS[peer], parts, now=self.now))

    @rule(peers=st.sets(others, min_size=1))
    def freeze(self, peers: set[PeerId]) -> None:
        promised = sorted(
            {*peers, ME} if self.contributed else peers
        )  # a leader counts nobody's work before its promise
        entries = tuple(Weighed(peer, ROOTS[peer], 10) for peer in promised)
        self.frozen = self.frozen or entries
        self.take(self.reducer.freeze(entries, now=self.now))

    @precondition(lambda self: self.frozen and self.mine and not self.folds)
    @rule()
    def what_is_missing_of_the_set_comes(self) -> None:
        for entry in self.frozen or ():
            self.receive(entry.peer, tuple(range(5)))

    @precondition(lambda self: self.folding)
    @rule()
    def finish_folding(self) -> None:
        self.folding = False
        self.results = {part: bytes([self.view % 256, part]) for part in self.mine}
        self.undelivered = {*PEERS[1:], LEADER}
        before = set(self.undelivered)
        effects = self.reducer.folded(self.results, now=self.now)
        assert {effect.to for effect in effects if isinstance(effect, Deliver)} == before
        self.take(effects)

    @rule(stale=st.dictionaries(st.integers(0, 4), st.just(b"stale")))
    def results_of_other_parts_change_nothing(self, stale: dict[int, bytes]) -> None:
        if set(stale) != self.mine or not self.folding:
            assert self.reducer.folded(stale, now=self.now) == []

    @precondition(lambda self: self.delivering)
    @rule(data=st.data(), arrives=st.booleans())
    def end_of_a_delivery(self, data: st.DataObject, arrives: bool) -> None:
        to = data.draw(st.sampled_from(sorted(self.delivering)))
        self.delivering.remove(to)
        if arrives:
            self.undelivered.discard(to)
            self.reducer.delivered(to)
        else:
            self.deliveries_rest[to] = self.now + RETRY_S
            self.reducer.deliver_failed(to, now=self.now)

    @rule(seconds=st.sampled_from([0.0, 0.1, RETRY_S, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.reducer.tick(now=self.now))
        assert self.reducer.wake_at() > self.now, "what is due was done"

    @invariant()
    def a_fold_is_never_forgotten(self) -> None:
        if self.frozen and self.mine and all(self.whole(entry.peer) for entry in self.frozen):
            assert self.folds == 1

    @invariant()
    def what_is_held_whole_was_said_unless_the_set_is_frozen(self) -> None:
        if self.frozen is None:
            assert {peer for peer in PEERS if self.whole(peer)} <= self.said_held

    @invariant()
    def every_owner_has_or_is_getting_our_parts(self) -> None:
        if self.contributed:
            for part, owner in enumerate(self.owners):
                under_way = any(upload.owner == owner for upload in self.uploads)
                assert owner == ME or part in self.acknowledged[owner] or under_way or owner in self.uploads_rest

    @invariant()
    def everyone_has_or_is_getting_our_averages(self) -> None:
        assert self.undelivered == self.delivering | set(self.deliveries_rest)


Reducing.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestReducing = Reducing.TestCase
