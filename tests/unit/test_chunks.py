"""Which chunk is asked of which donor, whatever order things happen in."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dugnad.dht.chunks import BROKEN_TRIES, LATE, Cancel, Done, Effect, Failure, Fetcher, Request, Stuck
from dugnad.dht.identity import PeerId

ANN, BOB, EVE, JOE = PEERS = tuple(PeerId(name) for name in ("ann", "bob", "eve", "joe"))
A, B, C, D, E = DIGESTS = tuple(letter * 32 for letter in (b"a", b"b", b"c", b"d", b"e"))
SIZES = {digest: 100 + k for k, digest in enumerate(DIGESTS)}


def asked(peer: PeerId, *digests: bytes) -> list[Request]:
    return [Request(peer, digest, SIZES[digest]) for digest in digests]


def cancelled(peer: PeerId, *digests: bytes) -> list[Cancel]:
    return [Cancel(peer, digest) for digest in digests]


def fetching(*wanted: bytes, donors: Iterable[PeerId] = (), per_donor: int = 2) -> Fetcher:
    fetcher = Fetcher({digest: SIZES[digest] for digest in wanted}, per_donor=per_donor)
    for donor in donors:
        fetcher.add_donors(donor)
    return fetcher


def stuck_reason(effects: list[Effect]) -> str:
    (effect,) = effects
    assert isinstance(effect, Stuck)
    return effect.reason


# -- asking


def test_a_donor_is_asked_for_as_much_as_it_may_be_in_the_order_wanted() -> None:
    fetcher = fetching(*DIGESTS)
    assert fetcher.add_donors(ANN) == asked(ANN, A, B)
    assert fetcher.add_donors(BOB) == asked(BOB, C, D)
    assert fetcher.arrived(B, ANN) == asked(ANN, E)
    assert fetching(*DIGESTS, per_donor=4).add_donors(ANN) == asked(ANN, A, B, C, D)


def test_all_is_done_when_the_last_chunk_arrives() -> None:
    fetcher = fetching(A, B, donors=[ANN])
    assert (fetcher.missing, fetcher.done) == (frozenset({A, B}), False)
    assert fetcher.arrived(B, ANN) == []
    assert (fetcher.missing, fetcher.done) == (frozenset({A}), False)
    assert fetcher.arrived(A, ANN) == [Done()]
    assert (fetcher.missing, fetcher.done) == (frozenset(), True)
    assert fetcher.add_donors(BOB) == fetcher.donor_lost(ANN) == []


def test_where_nothing_is_wanted_nobody_is_asked() -> None:
    fetcher = fetching()
    assert fetcher.done
    assert fetcher.add_donors(ANN) == fetcher.donor_lost(ANN) == []


def test_a_known_donor_that_is_added_again_is_no_news() -> None:
    assert fetching(*DIGESTS, donors=[ANN]).add_donors(ANN) == []


def test_the_least_loaded_is_asked_first_then_the_most_reliable_then_who_came_first() -> None:
    fetcher = fetching(A, B, C, D, donors=[ANN, BOB])  # two each
    fetcher.arrived(A, ANN)
    fetcher.arrived(C, BOB)
    assert fetcher.failed(D, BOB, Failure.BROKEN) == asked(BOB, D)  # it has nothing else to do
    fetcher.arrived(B, ANN)
    assert fetcher.failed(D, BOB, Failure.BROKEN) == asked(ANN, D)  # as idle, and has not broken off
    assert fetcher.failed(D, ANN, Failure.GONE) == asked(BOB, D)

    level = fetching(A, donors=[ANN, BOB, EVE])
    assert level.failed(A, ANN, Failure.BROKEN) == asked(BOB, A)
    assert level.failed(A, BOB, Failure.BROKEN) == asked(EVE, A)
    assert level.failed(A, EVE, Failure.BROKEN) == asked(ANN, A)


def test_what_failed_is_asked_for_after_what_was_never_asked_for() -> None:
    fetcher = fetching(A, B, C, donors=[ANN], per_donor=1)
    assert fetcher.failed(A, ANN, Failure.BROKEN) == asked(ANN, B)
    assert fetcher.arrived(B, ANN) == asked(ANN, C)
    assert fetcher.arrived(C, ANN) == asked(ANN, A)


def test_donors_that_come_together_share_out_what_is_wanted() -> None:
    fetcher = fetching(A, B, C)
    assert fetcher.add_donors(ANN, BOB) == [*asked(ANN, A), *asked(BOB, B), *asked(ANN, C)]
    assert fetcher.add_donors(BOB, ANN) == []


# -- the end: what is late is asked of a second donor


def overtaken() -> Fetcher:
    """All is here but A, which was asked of Ann long ago."""
    fetcher = fetching(*DIGESTS, per_donor=1)
    assert fetcher.add_donors(ANN, BOB) == [*asked(ANN, A), *asked(BOB, B)]
    for digest, following in ((B, C), (C, D), (D, E)):
        assert fetcher.arrived(digest, BOB) == asked(BOB, following)
    assert fetcher.arrived(E, BOB) == asked(BOB, A)
    return fetcher


def test_an_idle_donor_is_asked_for_what_is_late_and_who_is_first_counts() -> None:
    fetcher = overtaken()
    assert fetcher.arrived(A, BOB) == [*cancelled(ANN, A), Done()]
    assert fetcher.arrived(A, ANN) == []
    fetcher = overtaken()
    assert fetcher.arrived(A, ANN) == [*cancelled(BOB, A), Done()]
    assert fetcher.arrived(A, BOB) == []


def test_nobody_is_asked_a_second_time_for_what_is_not_late() -> None:
    fetcher = Fetcher({A: 100, B: 99, C: 99, D: 2}, per_donor=1)
    fetcher.add_donors(ANN, BOB, EVE, JOE)
    assert fetcher.add_donors(PeerId("zoe")) == []
    assert fetcher.arrived(B, BOB) == []
    assert fetcher.arrived(C, EVE) == []  # Ann may be as fast as these two
    assert fetcher.arrived(D, JOE) == [Request(BOB, A, 100)]


def test_a_chunk_is_asked_of_two_donors_at_most() -> None:
    fetcher = overtaken()
    assert fetcher.add_donors(EVE) == []
    assert fetcher.failed(A, BOB, Failure.GONE) == asked(EVE, A)  # Ann is as late as before
    assert fetcher.failed(A, ANN, Failure.BROKEN) == []  # Eve was asked just now
    assert fetcher.arrived(A, EVE) == [Done()]


def test_a_late_chunk_is_not_lost_with_one_of_two_donors() -> None:
    fetcher = overtaken()
    assert fetcher.donor_lost(BOB) == cancelled(BOB, A)
    assert fetcher.missing == {A}
    assert fetcher.add_donors(EVE) == asked(EVE, A)
    assert fetcher.donor_lost(ANN) == cancelled(ANN, A)
    assert fetcher.failed(A, EVE, Failure.WRONG_HASH) != []
    assert fetcher.add_donors(BOB) == asked(BOB, A)


def test_a_donor_that_is_rid_of_a_late_chunk_is_asked_for_what_waits() -> None:
    fetcher = fetching(*DIGESTS, donors=[ANN, BOB], per_donor=1)  # A of Ann, B of Bob
    for digest in (A, B):
        fetcher.failed(digest, BOB, Failure.GONE)
    assert fetcher.failed(C, BOB, Failure.GONE) == asked(BOB, D)
    assert fetcher.arrived(D, BOB) == asked(BOB, E)
    assert fetcher.arrived(E, BOB) == asked(BOB, A)  # B and C wait, but not for Bob
    assert fetcher.arrived(A, BOB) == [*cancelled(ANN, A), *asked(ANN, B)]


# -- donors that fail


def test_a_liar_is_dropped_with_all_it_was_asked_for_and_never_asked_again() -> None:
    fetcher = fetching(A, B, donors=[ANN, BOB])
    assert fetcher.failed(A, ANN, Failure.WRONG_HASH) == [*cancelled(ANN, B), *asked(BOB, A, B)]
    assert fetcher.add_donors(ANN) == fetcher.donor_lost(ANN) == []
    assert fetcher.arrived(B, ANN) == fetcher.failed(B, ANN, Failure.BROKEN) == []
    why = "2 of 2 chunks are missing, 6161616161616161 the first: no donor is left"
    assert stuck_reason(fetcher.donor_lost(BOB)[2:]) == why
    assert fetcher.add_donors(ANN) == []


def test_a_donor_that_lacks_a_chunk_is_asked_for_others_only() -> None:
    fetcher = fetching(A, B, C, donors=[ANN])
    assert fetcher.failed(A, ANN, Failure.GONE) == asked(ANN, C)
    assert fetcher.arrived(B, ANN) == []
    why = "1 of 3 chunks are missing, 6161616161616161 the first: none of 1 donors has it"
    assert stuck_reason(fetcher.arrived(C, ANN)) == why
    assert fetcher.add_donors(BOB) == asked(BOB, A)


@pytest.mark.parametrize("per_donor", [1, 2])
def test_a_donor_that_breaks_off_is_asked_again_until_it_did_so_too_often_in_a_row(per_donor: int) -> None:
    fetcher = fetching(*DIGESTS[:per_donor], donors=[ANN], per_donor=per_donor)
    for _ in range(BROKEN_TRIES - 1):
        assert fetcher.failed(A, ANN, Failure.BROKEN) == asked(ANN, A)
    effects = fetcher.failed(A, ANN, Failure.BROKEN)
    assert effects[:-1] == cancelled(ANN, *DIGESTS[1:per_donor])
    assert stuck_reason(effects[-1:]).endswith("no donor is left")
    assert len(fetcher.add_donors(ANN)) == per_donor


def test_a_chunk_that_arrives_makes_good_for_breaking_off() -> None:
    fetcher = fetching(A, B, donors=[ANN])
    for _ in range(BROKEN_TRIES - 1):
        fetcher.failed(A, ANN, Failure.BROKEN)
    fetcher.arrived(B, ANN)
    for _ in range(BROKEN_TRIES - 1):
        assert fetcher.failed(A, ANN, Failure.BROKEN) == asked(ANN, A)


def test_a_lost_donors_chunks_are_asked_of_others_and_of_it_when_it_is_back() -> None:
    fetcher = fetching(A, B, C, donors=[ANN, BOB])
    assert fetcher.donor_lost(ANN) == [*cancelled(ANN, A, B), *asked(BOB, A)]
    assert fetcher.arrived(A, ANN) == []  # too late: it is asked of another now
    assert fetcher.add_donors(ANN) == asked(ANN, B)


def test_a_donor_that_is_back_may_have_what_it_lacked() -> None:
    fetcher = fetching(A, donors=[ANN])
    fetcher.failed(A, ANN, Failure.GONE)
    fetcher.donor_lost(ANN)
    assert fetcher.add_donors(ANN) == asked(ANN, A)


def test_nobody_is_given_up_for_stuck_while_a_request_is_out() -> None:
    fetcher = fetching(A, B, donors=[ANN])
    assert fetcher.failed(A, ANN, Failure.GONE) == []
    assert stuck_reason(fetcher.failed(B, ANN, Failure.GONE)).startswith("2 of 2 chunks are missing")


# -- every order of everything


@given(st.data())
@settings(max_examples=150)
def test_all_that_honest_donors_have_arrives_and_every_schedule_ends(data: st.DataObject) -> None:
    wanted = DIGESTS[: data.draw(st.integers(1, len(DIGESTS)))]
    has = {peer: data.draw(st.sets(st.sampled_from(wanted))) for peer in PEERS}
    honest = data.draw(st.sets(st.sampled_from(PEERS)))
    fetcher = fetching(*wanted, per_donor=data.draw(st.integers(1, 3)))
    out: set[tuple[PeerId, bytes]] = set()
    ends: list[Effect] = []
    arrived: Counter[bytes] = Counter()

    def take(effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Request(donor, digest):
                    out.add((donor, digest))
                case Cancel(donor, digest):
                    out.remove((donor, digest))
                case _:
                    ends.append(effect)

    for peer in PEERS:
        take(fetcher.add_donors(peer))
    for _ in range(len(PEERS) * len(wanted) * BROKEN_TRIES * 2):
        if not out:
            break
        donor, digest = data.draw(st.sampled_from(sorted(out)))
        out.remove((donor, digest))
        outcome = None if digest in has[donor] else Failure.GONE
        if donor not in honest:
            outcome = data.draw(st.sampled_from([outcome, Failure.BROKEN, Failure.WRONG_HASH]))
        if outcome is None:
            arrived[digest] += 1
            take(fetcher.arrived(digest, donor))
        else:
            take(fetcher.failed(digest, donor, outcome))
    assert not out
    assert arrived.keys() >= set().union(*(has[peer] for peer in honest))
    assert set(arrived.values()) <= {1}
    assert fetcher.missing == set(wanted) - arrived.keys()
    assert isinstance(ends[-1], Stuck if fetcher.missing else Done)


class Fetching(RuleBasedStateMachine):
    """A fetch against a model of who was asked for what and how that ended."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: set[bytes] = set()
        self.here: set[bytes] = set()
        self.donors: set[PeerId] = set()
        """Who may be asked now."""
        self.liars: set[PeerId] = set()
        self.out: dict[bytes, list[PeerId]] = {}
        """Of whom each chunk is asked, the first one first."""
        self.asked: list[tuple[bytes, PeerId]] = []
        """All requests ever, in order."""
        self.overtaken: Counter[bytes] = Counter()
        self.lacks: dict[PeerId, set[bytes]] = defaultdict(set)
        self.broken: Counter[PeerId] = Counter()
        self.done = False
        self.stuck = False
        """Whether that was the last word."""

    def load(self, peer: PeerId) -> int:
        return sum(peers.count(peer) for peers in self.out.values())

    def rank(self, peer: PeerId) -> tuple[int, int]:
        """Less is better."""
        return self.load(peer), self.broken[peer]

    def able(self, digest: bytes) -> set[PeerId]:
        """Who could be asked for `digest` now."""
        return {peer for peer in self.donors if digest not in self.lacks[peer] and self.load(peer) < self.per_donor}

    def end(self, digest: bytes, peer: PeerId) -> None:
        """A request is no longer out."""
        if self.out[digest][0] == peer:
            self.overtaken[digest] = 0
        self.out[digest].remove(peer)
        if not self.out[digest]:
            del self.out[digest]

    def number(self, digest: bytes, peer: PeerId) -> int:
        """Of the newest request for `digest` of `peer`."""
        return max(k for k, request in enumerate(self.asked) if request == (digest, peer))

    def idle(self, digest: bytes) -> set[PeerId]:
        """Who could be asked for a chunk that is late elsewhere."""
        return {peer for peer in self.donors if not self.load(peer) and digest not in self.lacks[peer]}

    def late(self) -> set[bytes]:
        return {d for d, peers in self.out.items() if len(peers) == 1 and self.overtaken[d] >= LATE * SIZES[d]}

    def drop(self, peer: PeerId) -> None:
        self.donors.discard(peer)
        self.lacks[peer].clear()
        self.broken[peer] = 0

    def take(self, effects: list[Effect]) -> None:
        """Check each effect against what the rules say, as it comes out."""
        for effect in effects:
            match effect:
                case Request(donor, digest, size):
                    self.check_request(donor, digest)
                    assert size == SIZES[digest]
                    self.out.setdefault(digest, []).append(donor)
                    self.asked.append((digest, donor))
                case Cancel(donor, digest):
                    assert donor not in self.donors or digest in self.here, "cancelled: the dropped, and the slower"
                    assert donor in self.out[digest], "only what is out is cancelled"
                    self.end(digest, donor)
                case Done():
                    assert not self.done, "the end is said once"
                    assert self.here == self.wanted
                    self.done = True
                case Stuck(reason):
                    self.check_stuck(reason)
            self.stuck = isinstance(effect, Stuck)

    def check_request(self, donor: PeerId, digest: bytes) -> None:
        assert digest in self.wanted - self.here, "only what is missing is asked for"
        assert donor in self.donors - self.liars, "liars and those who are gone are not asked"
        assert digest not in self.lacks[donor], "nobody is asked again for what it lacks"
        if digest in self.out:
            assert digest in self.late(), "a second donor is asked only for what is late, a third never"
            assert donor in self.idle(digest), "the second donor had nothing to do"
            waiting = self.wanted - self.here - self.out.keys()
            assert waiting <= self.lacks[donor], "what waits comes first"
            assert self.rank(donor) == min(map(self.rank, self.idle(digest))), "the best is asked"
            return
        assert donor in self.able(digest), "nobody is asked for more at a time than it may be"
        assert self.rank(donor) == min(map(self.rank, self.able(digest))), "the best is asked"

    def check_stuck(self, reason: str) -> None:
        missing = self.wanted - self.here
        assert missing
        assert not self.out, "while a request is out, there is hope"
        assert all(missing <= self.lacks[donor] for donor in self.donors), "nobody is left that could have it"
        assert reason.startswith(f"{len(missing)} of {len(self.wanted)} chunks are missing")

    @initialize(wanted=st.lists(st.sampled_from(DIGESTS), unique=True), per_donor=st.integers(1, 3))
    def begin(self, wanted: list[bytes], per_donor: int) -> None:
        self.wanted, self.per_donor = set(wanted), per_donor
        self.fetcher = fetching(*wanted, per_donor=per_donor)

    @rule(peer=st.sampled_from(PEERS))
    def a_donor_comes(self, peer: PeerId) -> None:
        news = peer not in self.donors | self.liars
        if news:
            self.donors.add(peer)
        effects = self.fetcher.add_donors(peer)
        assert news or not effects, "a liar or a known donor is no news"
        self.take(effects)

    @rule(peer=st.sampled_from(PEERS))
    def donor_lost(self, peer: PeerId) -> None:
        self.drop(peer)
        self.take(self.fetcher.donor_lost(peer))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def a_chunk_arrives(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.out)))
        donor = data.draw(st.sampled_from(self.out[digest]))
        number = self.number(digest, donor)
        self.end(digest, donor)
        self.here.add(digest)
        self.broken[donor] = 0
        for other, (first, *_) in self.out.items():
            if other != digest and self.number(other, first) < number:
                self.overtaken[other] += SIZES[digest]
        self.take(self.fetcher.arrived(digest, donor))
        assert digest not in self.out, "nobody goes on sending what is here"
        assert self.done == (self.here == self.wanted), "the end is said as soon as it is there"

    @precondition(lambda self: self.out)
    @rule(data=st.data(), reason=st.sampled_from(Failure))
    def a_request_fails(self, data: st.DataObject, reason: Failure) -> None:
        digest = data.draw(st.sampled_from(sorted(self.out)))
        donor = data.draw(st.sampled_from(self.out[digest]))
        self.end(digest, donor)
        match reason:
            case Failure.GONE:
                self.lacks[donor].add(digest)
            case Failure.WRONG_HASH:
                self.liars.add(donor)
                self.drop(donor)
            case Failure.BROKEN:
                self.broken[donor] += 1
                if self.broken[donor] == BROKEN_TRIES:
                    self.drop(donor)
        self.take(self.fetcher.failed(digest, donor, reason))

    @rule(
        peer=st.sampled_from(PEERS),
        digest=st.sampled_from([*DIGESTS, b"f" * 32]),
        reason=st.none() | st.sampled_from(Failure),
    )
    def a_report_about_no_request_changes_nothing(self, peer: PeerId, digest: bytes, reason: Failure | None) -> None:
        if peer in self.out.get(digest, ()):
            return
        fetcher = self.fetcher
        assert (fetcher.failed(digest, peer, reason) if reason else fetcher.arrived(digest, peer)) == []

    @invariant()
    def what_has_not_arrived_is_missing(self) -> None:
        assert self.fetcher.missing == self.wanted - self.here
        assert self.fetcher.done == (self.wanted == self.here)

    @invariant()
    def who_is_dropped_has_no_request_out(self) -> None:
        assert {peer for peers in self.out.values() for peer in peers} <= self.donors

    @invariant()
    def whatever_can_be_asked_for_is_asked_for(self) -> None:
        for digest in self.wanted - self.here - self.out.keys():
            assert not self.able(digest), "somebody idle might have it"
        for digest in self.late():
            assert not self.idle(digest), "somebody idle could be faster"

    @invariant()
    def who_waits_for_nothing_was_told_that_it_is_stuck(self) -> None:
        if self.wanted - self.here and not self.out and self.stuck_can_be_known:
            assert self.stuck

    @property
    def stuck_can_be_known(self) -> bool:
        """Before the first donor nothing has happened."""
        return bool(self.donors or self.liars or self.here)


Fetching.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestFetching = Fetching.TestCase
