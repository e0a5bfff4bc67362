"""Two things that one voter signed, and that no honest voter signs both, convict it wherever they are found."""

import contextlib
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.coordinator.effects import Accuse, Promises
from dugnad.coordinator.equivocation import SORT, checker, side
from dugnad.coordinator.messages import PRECOMMIT, PREVOTE, Lock, ViewChange, pledge_payload, vote_payload
from dugnad.dht.evidence import Proofs
from dugnad.dht.identity import Identity, PeerId, verify
from dugnad.dht.wire import WireError
from tests.unit import test_rounds as rounds
from tests.unit import test_views as views
from tests.unit.chains import RUN, FakeSigner, digest, locked, new_view, pledged
from tests.unit.test_rounds import A, voting
from tests.unit.test_views import FOURTH, HEAD, NEXT, ONE, OTHER, THIRD, VOTERS, a_voter, replace

DISK = b"one disk"
check = checker(FakeSigner(A).verify)


def a_vote(
    block: str, *, by: PeerId = A, view: int = 2, phase: int = PREVOTE, round_: int = 5, disk: bytes = DISK
) -> bytes:
    payload = vote_payload(RUN, 0, round_, view, phase, digest(block), disk)
    return side(by, payload, FakeSigner(by).sign(payload))


def a_pledge(locked: int, *, by: PeerId = A, view: int = 4, disk: bytes = DISK) -> bytes:
    payload = pledge_payload(RUN, 0, 5, view, locked, digest("block") if locked else b"", disk)
    return side(by, payload, FakeSigner(by).sign(payload))


def accused(effects: Iterable[object]) -> list[PeerId | None]:
    return [check(RUN, effect.first, effect.second) for effect in effects if isinstance(effect, Accuse)]


# -- what is proof


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (a_vote("block"), a_vote("other")),
        (a_vote("block", phase=PRECOMMIT), a_vote("other", phase=PRECOMMIT)),
        (a_pledge(0), a_pledge(3)),
        (a_vote("block", phase=PRECOMMIT, view=2), a_pledge(0)),
        (a_vote("block", phase=PRECOMMIT, view=2), a_pledge(2)),
    ],
)
def test_two_words_of_which_an_honest_voter_says_one_convict(one: bytes, other: bytes) -> None:
    assert check(RUN, one, other) == check(RUN, other, one) == A


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(a_vote("block"), id="the same"),
        pytest.param(a_vote("other", view=3), id="another view"),
        pytest.param(a_vote("other", phase=PRECOMMIT), id="another phase"),
        pytest.param(a_vote("other", round_=6), id="another round"),
        pytest.param(a_vote("other", disk=b"new disk"), id="another disk: that is another voter"),
        pytest.param(a_vote("other", by=rounds.B), id="another voter"),
        pytest.param(a_pledge(0), id="a prevote locks nobody"),
    ],
)
def test_an_honest_voter_may_say_both(other: bytes) -> None:
    assert check(RUN, a_vote("block"), other) is None


def test_a_pledge_that_knows_of_the_vote_to_commit_or_is_of_an_earlier_view_convicts_nobody() -> None:
    vote = a_vote("block", phase=PRECOMMIT, view=2)
    assert check(RUN, vote, a_pledge(3)) is None
    assert check(RUN, vote, a_pledge(0, view=2)) is None


def test_what_someone_else_signed_or_another_run_heard_convicts_nobody() -> None:
    payload = vote_payload(RUN, 0, 5, 2, PREVOTE, digest("other"), DISK)
    forged = side(A, payload, FakeSigner(rounds.B).sign(payload))
    assert check(RUN, a_vote("block"), forged) is None
    assert check(digest("another run"), a_vote("block"), a_vote("other")) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_no_proof_or_a_wire_error(raw: bytes) -> None:
    for one in (raw, side(A, b"dugnad/vote/2" + raw, bytes(64))):
        with contextlib.suppress(WireError):
            assert check(RUN, a_vote("block"), one) is None


def test_with_real_keys_it_travels_as_evidence() -> None:
    liar = Identity.generate()
    halves = []
    for block in ("block", "other"):
        payload = vote_payload(RUN, 0, 5, 2, PREVOTE, digest(block), DISK)
        halves.append(side(liar.peer_id, payload, liar.sign(payload)))
    proofs = Proofs({SORT: checker(verify)})
    found = proofs.convict(RUN, SORT, *halves)
    assert found is not None
    assert proofs.parse(found.raw, RUN).owner == liar.peer_id


# -- where it is found


@pytest.mark.parametrize("first", ["block", "other"])
@pytest.mark.parametrize("phase", [PREVOTE, PRECOMMIT])
def test_a_leader_finds_who_votes_for_its_block_and_for_another(first: str, phase: int) -> None:
    run, block = voting()
    other = replace(block, redo=((0, 1),))
    votes = [run.vote(A, block, phase), run.vote(A, other, phase)]
    effects = [effect for vote in (votes if first == "block" else votes[::-1]) for effect in run.hear(A, vote)]
    assert accused(effects) == [A]
    assert accused(run.hear(A, votes[1])) == [], "once is enough"


def test_a_leader_finds_who_votes_to_commit_and_gives_it_up_without_the_lock() -> None:
    run, block = voting()
    run.votes(block, PRECOMMIT, A)
    lock = Lock(0, block, ())
    assert accused(run.hear(A, pledged(A, rounds.HEAD, 1))) == [A]
    assert accused(run.hear(A, pledged(A, rounds.HEAD, 2, lock))) == []


def test_a_voter_finds_who_is_in_both_of_two_locks_of_one_view() -> None:
    follower = a_voter()
    follower.receive(HEAD.leader(0), locked(ONE, VOTERS[:3]), now=0.0)
    effects = follower.receive(HEAD.leader(0), locked(OTHER, VOTERS[1:]), now=0.0)
    assert accused(effects) == sorted(VOTERS[1:3])
    assert views.refusals(effects) == ["two locks"]


def test_ballots_that_nobody_signed_accuse_nobody() -> None:
    follower = a_voter()
    follower.receive(HEAD.leader(0), locked(ONE, VOTERS[:3]), now=0.0)
    forged = replace(locked(OTHER, VOTERS[1:]), ballots=locked(ONE, VOTERS[1:], view=7).ballots)
    assert accused(follower.receive(HEAD.leader(0), forged, now=0.0)) == [None, None]


def test_who_pledges_itself_to_one_view_with_two_locks_is_found_and_its_first_word_counts() -> None:
    follower = a_voter(NEXT)
    honest = pledged(THIRD, HEAD, 3)
    follower.receive(THIRD, honest, now=0.0)
    assert accused(follower.receive(THIRD, pledged(THIRD, HEAD, 3, locked(ONE, VOTERS)), now=0.0)) == [THIRD]
    assert follower._pledges[3][THIRD] == honest


def test_a_pledge_in_the_proof_of_a_view_that_was_told_otherwise_here_is_found() -> None:
    follower = a_voter(FOURTH)
    follower.receive(THIRD, pledged(THIRD, HEAD, 1, locked(ONE, VOTERS, view=0)), now=0.0)
    proof = new_view(pledged(peer, HEAD, 1) for peer in VOTERS)
    assert accused(follower.receive(NEXT, proof, now=0.0)) == [THIRD]


# -- what an honest voter must not do by mistake


def test_a_voter_that_starts_anew_locked_in_the_view_that_it_pledged_says_no_other_pledge() -> None:
    lock = locked(ONE, VOTERS, view=1)
    follower = a_voter(promises=Promises(0, 2, 1, None, lock))
    assert follower.view == 1
    for second in range(1, 9):
        effects = follower.tick(now=float(second))
        assert not views.said(effects, ViewChange)


def test_a_voter_that_comes_into_the_view_it_pledged_by_a_lock_says_its_pledge_no_more() -> None:
    follower = a_voter(promises=Promises(0, 2, 1))
    follower.receive(NEXT, locked(ONE, VOTERS, view=1), now=0.0)
    for second in range(1, 9):
        assert not views.said(follower.tick(now=float(second)), ViewChange)
