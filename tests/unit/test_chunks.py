"""Which chunk is asked of which donor, whatever order things happen in."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dugnad.dht.chunks import BROKEN_TRIES, Cancel, Done, Effect, Failure, Fetcher, Request, Stuck
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
        fetcher.add_donor(donor)
    return fetcher


def stuck_reason(effects: list[Effect]) -> str:
    (effect,) = effects
    assert isinstance(effect, Stuck)
    return effect.reason


# -- asking


def test_a_donor_is_asked_for_as_much_as_it_may_be_in_the_order_wanted() -> None:
    fetcher = fetching(*DIGESTS)
    assert fetcher.add_donor(ANN) == asked(ANN, A, B)
    assert fetcher.add_donor(BOB) == asked(BOB, C, D)
    assert fetcher.arrived(B, ANN) == asked(ANN, E)
    assert fetching(*DIGESTS, per_donor=4).add_donor(ANN) == asked(ANN, A, B, C, D)


def test_all_is_done_when_the_last_chunk_arrives() -> None:
    fetcher = fetching(A, B, donors=[ANN])
    assert (fetcher.missing, fetcher.done) == (frozenset({A, B}), False)
    assert fetcher.arrived(B, ANN) == []
    assert (fetcher.missing, fetcher.done) == (frozenset({A}), False)
    assert fetcher.arrived(A, ANN) == [Done()]
    assert (fetcher.missing, fetcher.done) == (frozenset(), True)
    assert fetcher.add_donor(BOB) == fetcher.donor_lost(ANN) == []


def test_where_nothing_is_wanted_nobody_is_asked() -> None:
    fetcher = fetching()
    assert fetcher.done
    assert fetcher.add_donor(ANN) == fetcher.donor_lost(ANN) == []


def test_a_known_donor_that_is_added_again_is_no_news() -> None:
    assert fetching(*DIGESTS, donors=[ANN]).add_donor(ANN) == []


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


# -- donors that fail


def test_a_liar_is_dropped_with_all_it_was_asked_for_and_never_asked_again() -> None:
    fetcher = fetching(A, B, donors=[ANN, BOB])
    assert fetcher.failed(A, ANN, Failure.WRONG_HASH) == [*cancelled(ANN, B), *asked(BOB, A, B)]
    assert fetcher.add_donor(ANN) == fetcher.donor_lost(ANN) == []
    assert fetcher.arrived(B, ANN) == fetcher.failed(B, ANN, Failure.BROKEN) == []
    why = "2 of 2 chunks are missing, 6161616161616161 the first: no donor is left"
    assert stuck_reason(fetcher.donor_lost(BOB)[2:]) == why
    assert fetcher.add_donor(ANN) == []


def test_a_donor_that_lacks_a_chunk_is_asked_for_others_only() -> None:
    fetcher = fetching(A, B, C, donors=[ANN])
    assert fetcher.failed(A, ANN, Failure.GONE) == asked(ANN, C)
    assert fetcher.arrived(B, ANN) == []
    why = "1 of 3 chunks are missing, 6161616161616161 the first: none of 1 donors has it"
    assert stuck_reason(fetcher.arrived(C, ANN)) == why
    assert fetcher.add_donor(BOB) == asked(BOB, A)


@pytest.mark.parametrize("per_donor", [1, 2])
def test_a_donor_that_breaks_off_is_asked_again_until_it_did_so_too_often_in_a_row(per_donor: int) -> None:
    fetcher = fetching(*DIGESTS[:per_donor], donors=[ANN], per_donor=per_donor)
    for _ in range(BROKEN_TRIES - 1):
        assert fetcher.failed(A, ANN, Failure.BROKEN) == asked(ANN, A)
    effects = fetcher.failed(A, ANN, Failure.BROKEN)
    assert effects[:-1] == cancelled(ANN, *DIGESTS[1:per_donor])
    assert stuck_reason(effects[-1:]).endswith("no donor is left")
    assert len(fetcher.add_donor(ANN)) == per_donor


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
    assert fetcher.add_donor(ANN) == asked(ANN, B)


def test_a_donor_that_is_back_may_have_what_it_lacked() -> None:
    fetcher = fetching(A, donors=[ANN])
    fetcher.failed(A, ANN, Failure.GONE)
    fetcher.donor_lost(ANN)
    assert fetcher.add_donor(ANN) == asked(ANN, A)


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
        take(fetcher.add_donor(peer))
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
        self.out: dict[bytes, PeerId] = {}
        self.lacks: dict[PeerId, set[bytes]] = defaultdict(set)
        self.broken: Counter[PeerId] = Counter()
        self.done = False
        self.stuck = False
        """Whether that was the last word."""

    def load(self, peer: PeerId) -> int:
        return list(self.out.values()).count(peer)

    def rank(self, peer: PeerId) -> tuple[int, int]:
        """Less is better."""
        return self.load(peer), self.broken[peer]

    def able(self, digest: bytes) -> set[PeerId]:
        """Who could be asked for `digest` now."""
        return {peer for peer in self.donors if digest not in self.lacks[peer] and self.load(peer) < self.per_donor}

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
                    self.out[digest] = donor
                case Cancel(donor, digest):
                    assert donor not in self.donors, "only a donor that is dropped has its requests cancelled"
                    assert self.out.pop(digest) == donor, "only what is out is cancelled"
                case Done():
                    assert not self.done, "the end is said once"
                    assert self.here == self.wanted
                    self.done = True
                case Stuck(reason):
                    self.check_stuck(reason)
            self.stuck = isinstance(effect, Stuck)

    def check_request(self, donor: PeerId, digest: bytes) -> None:
        assert digest in self.wanted - self.here, "only what is missing is asked for"
        assert digest not in self.out, "a chunk is asked of one donor at a time"
        assert donor in self.donors - self.liars, "liars and those who are gone are not asked"
        assert digest not in self.lacks[donor], "nobody is asked again for what it lacks"
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
    def add_donor(self, peer: PeerId) -> None:
        news = peer not in self.donors | self.liars
        if news:
            self.donors.add(peer)
        effects = self.fetcher.add_donor(peer)
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
        donor = self.out.pop(digest)
        self.here.add(digest)
        self.broken[donor] = 0
        self.take(self.fetcher.arrived(digest, donor))
        assert self.done == (self.here == self.wanted), "the end is said as soon as it is there"

    @precondition(lambda self: self.out)
    @rule(data=st.data(), reason=st.sampled_from(Failure))
    def a_request_fails(self, data: st.DataObject, reason: Failure) -> None:
        digest = data.draw(st.sampled_from(sorted(self.out)))
        donor = self.out.pop(digest)
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
        if self.out.get(digest) == peer:
            return
        fetcher = self.fetcher
        assert (fetcher.failed(digest, peer, reason) if reason else fetcher.arrived(digest, peer)) == []

    @invariant()
    def what_has_not_arrived_is_missing(self) -> None:
        assert self.fetcher.missing == self.wanted - self.here
        assert self.fetcher.done == (self.wanted == self.here)

    @invariant()
    def who_is_dropped_has_no_request_out(self) -> None:
        assert set(self.out.values()) <= self.donors

    @invariant()
    def whatever_can_be_asked_for_is_asked_for(self) -> None:
        for digest in self.wanted - self.here - self.out.keys():
            assert not self.able(digest), "somebody idle might have it"

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
