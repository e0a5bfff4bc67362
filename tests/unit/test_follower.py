from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dugnad.coordinator.admission import GRACE_S
from dugnad.coordinator.effects import (
    Apply,
    CatchUp,
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
from dugnad.coordinator.follower import FETCH_AFTER_S, RETRY_S, Follower
from dugnad.coordinator.ledger import Head, Ledger
from dugnad.coordinator.messages import (
    PRECOMMIT,
    PREVOTE,
    Applied,
    Block,
    Commit,
    Lock,
    NewView,
    Proposal,
    ViewChange,
    Vote,
    applied_payload,
    vote_payload,
)
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.replica import REPLAY_ROUNDS
from dugnad.dht.decisions import Decision
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message
from tests.unit.chains import (
    CHARTER,
    FOUNDER,
    NO_COST,
    RUN,
    SEAT,
    FakeSigner,
    a_ledger,
    an_entry,
    an_epoch,
    certify,
    delegation,
    digest,
    disk_of,
    extend,
    ledger_of,
    locked,
    model_after,
    new_view,
    pledged,
)

ME, ANN, EVE = PeerId("a"), PeerId("b"), PeerId("eve")
PATIENCE = Patience(silence_s=10.0, round_s=60.0, vote_s=20.0)
replace = msgspec.structs.replace
M = TypeVar("M", bound=Message)


def chain(rounds: int) -> list[Commit]:
    """Rounds in which two peers, one of them `ME`, do ten samples each; they and the founder vote."""
    ledger = a_ledger()
    starts = range(0, 20 * rounds, 20)
    return [extend(ledger, an_entry(ME, (k, k + 10)), an_entry(ANN, (k + 10, k + 20))) for k in starts]


CHAIN = chain(REPLAY_ROUNDS + 10)


def head_after(rounds: int) -> Head:
    return ledger_of(CHAIN[:rounds]).head


def proposal(round_: int, *, view: int = 0, part: str = "average") -> Proposal:
    """A block for `round_` of the chain, as the leader of `view` may propose it; of another part it is another."""
    return Proposal(view, replace(CHAIN[round_ - 1].block, parts=(digest(f"{part} of round {round_}"),)))


def new_follower(me: PeerId = ME, *, disk: bytes | None = None) -> Follower:
    return Follower(FakeSigner(me), Ledger(CHARTER, FakeSigner(me)), PATIENCE, disk_of(me) if disk is None else disk)


def a_follower(
    rounds: int = 1, *, me: PeerId = ME, disk: bytes | None = None, promises: Promises | None = None
) -> Follower:
    """One that has applied that many rounds."""
    follower = new_follower(me, disk=disk)
    follower.restore(CHAIN[:rounds], (), promises)
    assert kinds(follower.synced(rounds, model_after(rounds), (), now=0.0)) == [Send] * (rounds > 0)
    return follower


def votes(effects: Iterable[Effect]) -> list[Vote]:
    return said(effects, Vote)


def said(effects: Iterable[Effect], kind: type[M]) -> list[M]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def kinds(effects: Iterable[Effect]) -> list[type[Effect]]:
    return [type(effect) for effect in effects]


def refusals(effects: Iterable[Effect]) -> list[str]:
    return [effect.reason for effect in effects if isinstance(effect, Refused)]


# -- what it may vote on


def test_it_prevotes_once_all_bytes_are_held_and_its_vote_is_signed_for_that_block_as_that_disk() -> None:
    follower = a_follower()
    asked = proposal(2)
    assert follower.receive(FOUNDER, asked, now=0.0) == []
    kept, sent = follower.holds(asked.block.parts, now=0.1)
    assert kept == Remember(Promises(0, 2, 0, asked)), "what is promised is durable before it is said"
    assert isinstance(sent, Send)
    assert sent.to == (FOUNDER,)
    (vote,) = votes([sent])
    assert (vote.epoch, vote.round, vote.view, vote.phase, vote.block) == (0, 2, 0, PREVOTE, asked.block.hash)
    payload = vote_payload(RUN, 0, 2, 0, PREVOTE, asked.block.hash, disk_of(ME))
    assert FakeSigner(ME).verify(ME, payload, vote.signature)


def test_a_vote_waits_for_the_last_of_many_parts() -> None:
    follower = a_follower()
    block = replace(proposal(2).block, parts=(digest("one"), digest("two"), digest("three")))
    follower.receive(FOUNDER, Proposal(0, block), now=0.0)
    assert follower.holds(block.parts[:1], now=0.0) == []
    assert follower.holds(block.parts[2:], now=0.0) == []
    assert len(votes(follower.holds(block.parts[1:2], now=0.0))) == 1


def test_bytes_that_came_before_the_proposal_count() -> None:
    follower = a_follower()
    follower.holds(proposal(2).block.parts, now=0.0)
    assert len(votes(follower.receive(FOUNDER, proposal(2), now=0.0))) == 1


def test_bytes_that_were_swept_away_count_no_more() -> None:
    follower = a_follower()
    follower.holds(proposal(2).block.parts, now=0.0)
    follower.forget(proposal(2).block.parts)
    assert follower.receive(FOUNDER, proposal(2), now=0.0) == []


def test_a_proposal_said_again_gets_the_same_vote_again_and_nothing_new_is_promised() -> None:
    follower = a_follower()
    follower.holds(proposal(2).block.parts, now=0.0)
    first = votes(follower.receive(FOUNDER, proposal(2), now=0.0))
    again = follower.receive(FOUNDER, proposal(2), now=1.0)
    assert (votes(again), kinds(again)) == (first, [Send])


def test_it_never_votes_for_a_second_block_in_one_view() -> None:
    follower = a_follower()
    first, second = proposal(2), proposal(2, part="other")
    follower.holds((*first.block.parts, *second.block.parts), now=0.0)
    assert len(votes(follower.receive(FOUNDER, first, now=0.0))) == 1
    assert refusals(follower.receive(FOUNDER, second, now=0.0)) == ["two proposals"]


def test_of_two_proposals_whose_bytes_are_awaited_the_first_stands() -> None:
    follower = a_follower()
    first, second = proposal(2), proposal(2, part="other")
    assert follower.receive(FOUNDER, first, now=0.0) == []
    assert refusals(follower.receive(FOUNDER, second, now=0.0)) == ["two proposals"]
    assert follower.holds(second.block.parts, now=0.0) == []
    assert [vote.block for vote in votes(follower.holds(first.block.parts, now=0.0))] == [first.block.hash]


def test_a_vote_is_not_forgotten_when_another_proposal_makes_it_take_the_model_anew() -> None:
    follower = a_follower()
    first, twin = proposal(2), proposal(2, part="other")
    follower.holds((*first.block.parts, *twin.block.parts), now=0.0)
    before = votes(follower.receive(FOUNDER, first, now=0.0))
    assert kinds(follower.synced(1, digest("a wrong model"), (), now=1.0)) == [Send, Resync]
    follower.synced(1, model_after(1), (), now=2.0)
    assert votes(follower.receive(FOUNDER, first, now=2.0)) == before
    follower.synced(1, digest("a wrong model"), (), now=3.0)
    follower.synced(1, model_after(1), (), now=4.0)
    assert refusals(follower.receive(FOUNDER, twin, now=4.0)) == ["two proposals"]


def test_who_has_no_vote_holds_the_bytes_and_says_nothing() -> None:
    follower = a_follower(me=EVE)
    follower.holds(proposal(2).block.parts, now=0.0)
    assert follower.receive(FOUNDER, proposal(2), now=0.0) == []
    assert follower.receive(FOUNDER, locked(proposal(2).block, [FOUNDER, ME]), now=0.0) == []


def test_another_disk_of_a_voter_has_no_vote_and_gives_up_nobody() -> None:
    follower = a_follower(disk=b"new disk")
    assert not follower.votes
    follower.holds(proposal(2).block.parts, now=0.0)
    assert follower.receive(FOUNDER, proposal(2), now=0.0) == []
    assert follower.receive(FOUNDER, locked(proposal(2).block, [FOUNDER, ANN]), now=0.0) == []
    assert waited(follower, 100.0) == []


@pytest.mark.parametrize("sender", [EVE, ANN], ids=["a stranger", "a voter"])
def test_a_proposal_of_one_who_does_not_lead_is_refused(sender: PeerId) -> None:
    follower = a_follower()
    follower.holds(proposal(2).block.parts, now=0.0)
    assert refusals(follower.receive(sender, proposal(2), now=0.0)) == ["not leader"]


def test_a_proposal_of_a_view_that_was_not_proven_waits_for_the_proof() -> None:
    follower = a_follower()
    later = proposal(2, view=1)
    follower.holds(later.block.parts, now=0.0)
    leader = head_after(1).leader(1)
    assert follower.receive(leader, later, now=0.0) == []
    moved = a_follower_in_view(1, follower)
    assert len(votes(moved.receive(leader, later, now=0.0))) == 1


def test_a_proposal_of_a_view_that_is_over_is_refused() -> None:
    follower = a_follower_in_view(1)
    follower.holds(proposal(2).block.parts, now=0.0)
    assert refusals(follower.receive(FOUNDER, proposal(2), now=0.0)) == ["not leader"]


@pytest.mark.parametrize(
    "changed",
    [
        {"parent": digest("another chain")},
        {"cursor": 41},
        {"redo": ((0, 5),)},
        {"global_step": 0},
        {"parts": ()},
        {"committee": CHAIN[0].block.committee[1:]},
        {"coordinator": delegation(FOUNDER, 2, by=EVE)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_block_that_breaks_the_chain_gets_no_vote(changed: dict[str, object]) -> None:
    follower = a_follower()
    block = replace(proposal(2).block, **changed)
    follower.holds(proposal(2).block.parts, now=0.0)
    assert refusals(follower.receive(FOUNDER, Proposal(0, block), now=0.0)) == ["invalid block"]
    assert follower.wake_at() < float("inf")
    assert not any(isinstance(effect, Fetch) for effect in follower.tick(now=5.0))


def test_a_proposal_of_a_round_long_committed_is_passed_over() -> None:
    follower = a_follower(3)
    assert follower.receive(FOUNDER, proposal(3), now=0.0) == []
    assert follower.tick(now=1.0) == []


def test_a_model_that_differs_from_the_committees_is_given_up_instead_of_voted_on() -> None:
    follower = a_follower()
    follower.synced(1, digest("a wrong model"), (), now=0.0)
    follower.holds(proposal(2).block.parts, now=0.0)
    assert kinds(follower.receive(FOUNDER, proposal(2), now=0.0)) == [Resync]
    assert not follower.at_head
    assert follower.receive(FOUNDER, proposal(2), now=1.0) == []
    assert len(votes(follower.synced(1, model_after(1), (), now=2.0))) == 1


def test_one_that_has_no_model_yet_does_not_vote() -> None:
    follower = new_follower()
    follower.restore(CHAIN[:1], proposal(2).block.parts)
    assert follower.receive(FOUNDER, proposal(2), now=0.0) == []
    assert len(votes(follower.synced(1, model_after(1), (), now=0.0))) == 1


# -- locks


def test_a_lock_is_remembered_and_then_precommitted_as_that_disk() -> None:
    follower = a_follower()
    lock = locked(proposal(2).block, [FOUNDER, ANN])
    kept, sent = follower.receive(FOUNDER, lock, now=0.0)
    assert kept == Remember(Promises(0, 2, 0, None, lock))
    (vote,) = votes([sent])
    assert (vote.view, vote.phase, vote.block) == (0, PRECOMMIT, lock.block.hash)
    payload = vote_payload(RUN, 0, 2, 0, PRECOMMIT, lock.block.hash, disk_of(ME))
    assert FakeSigner(ME).verify(ME, payload, vote.signature)


def test_a_lock_counts_without_the_bytes_and_from_whoever_it_comes() -> None:
    follower = a_follower()
    assert len(votes(follower.receive(EVE, locked(proposal(2).block, [FOUNDER, ANN]), now=0.0))) == 1


def test_a_lock_said_again_gets_the_same_vote_again() -> None:
    follower = a_follower()
    lock = locked(proposal(2).block, [FOUNDER, ANN])
    first = votes(follower.receive(FOUNDER, lock, now=0.0))
    again = follower.receive(FOUNDER, lock, now=0.0)
    assert (votes(again), kinds(again)) == (first, [Send])


@pytest.mark.parametrize("voters", [(), (FOUNDER,), (FOUNDER, EVE), (EVE, PeerId("y"), PeerId("z"))])
def test_prevotes_that_are_no_quorum_of_the_committee_lock_nobody(voters: Sequence[PeerId]) -> None:
    follower = a_follower()
    assert refusals(follower.receive(FOUNDER, locked(proposal(2).block, voters), now=0.0)) == ["invalid lock"]
    assert follower.promises.lock is None


def test_precommits_or_prevotes_of_another_view_are_no_lock() -> None:
    follower = a_follower()
    block = proposal(2).block
    precommits = Lock(0, block, certify(block, [FOUNDER, ANN]).ballots)
    moved = replace(locked(block, [FOUNDER, ANN], view=1), view=2)
    for lock in (precommits, moved):
        assert refusals(follower.receive(FOUNDER, lock, now=0.0)) == ["invalid lock"]


def test_a_lock_on_a_block_that_may_not_follow_is_refused() -> None:
    follower = a_follower()
    block = replace(proposal(2).block, cursor=41)
    assert refusals(follower.receive(FOUNDER, locked(block, [FOUNDER, ANN]), now=0.0)) == ["invalid lock"]


def test_a_lock_of_a_higher_view_takes_the_place_of_a_lower_one_and_never_the_other_way_round() -> None:
    follower = a_follower()
    low = locked(proposal(2).block, [FOUNDER, ANN], view=1)
    high = locked(proposal(2, part="other").block, [FOUNDER, ANN], view=3)
    assert [vote.view for vote in votes(follower.receive(EVE, low, now=0.0))] == [1]
    assert [vote.view for vote in votes(follower.receive(EVE, high, now=0.0))] == [3]
    assert follower.receive(EVE, low, now=0.0) == []
    assert follower.promises == Promises(0, 2, 3, None, high)


def test_of_two_locks_in_one_view_which_only_liars_can_make_the_first_stands() -> None:
    follower = a_follower()
    one, other = (locked(proposal(2, part=part).block, [FOUNDER, ANN]) for part in ("average", "other"))
    follower.receive(FOUNDER, one, now=0.0)
    assert refusals(follower.receive(FOUNDER, other, now=0.0)) == ["two locks"]
    assert follower.promises.lock == one


def test_who_is_locked_in_a_view_votes_on_no_proposal_of_an_earlier_one() -> None:
    follower = a_follower()
    follower.holds(proposal(2).block.parts, now=0.0)
    follower.receive(EVE, locked(proposal(2).block, [FOUNDER, ANN], view=2), now=0.0)
    assert votes(follower.receive(FOUNDER, proposal(2), now=0.0)) == []


def test_a_lock_of_a_later_view_proves_that_view() -> None:
    follower = a_follower()
    follower.receive(EVE, locked(proposal(2).block, [FOUNDER, ANN], view=2), now=0.0)
    assert (follower.view, follower.leader) == (2, head_after(1).leader(2))
    assert follower.bound_to == proposal(2).block


def test_a_lock_of_a_round_ahead_makes_it_catch_up() -> None:
    follower = a_follower()
    assert follower.receive(ANN, locked(CHAIN[4].block, [FOUNDER, ANN]), now=0.0) == [CatchUp(ANN, (0, 1))]
    assert follower.receive(ANN, locked(CHAIN[0].block, [FOUNDER, ANN]), now=0.0) == []


# -- promises


def test_promises_of_before_a_restart_hold() -> None:
    first, twin = proposal(2), proposal(2, part="other")
    lock = locked(first.block, [FOUNDER, ANN])
    follower = a_follower(promises=Promises(0, 2, 0, first, lock))
    follower.holds((*first.block.parts, *twin.block.parts), now=0.0)
    assert refusals(follower.receive(FOUNDER, twin, now=0.0)) != []
    assert [vote.block for vote in votes(follower.receive(FOUNDER, first, now=0.0))] == [first.block.hash]
    assert [vote.block for vote in votes(follower.receive(FOUNDER, lock, now=0.0))] == [first.block.hash]


def test_what_it_voted_for_before_a_restart_it_votes_for_though_someone_in_it_was_banned_since() -> None:
    asked = proposal(2)
    for promises, voted in ((Promises(0, 2, 0, asked), True), (None, False)):
        follower = a_follower(promises=promises)
        follower.admission.decisions.take(Decision(ANN, "ban", "", -GRACE_S, float("inf"), b""))
        follower.holds(asked.block.parts, now=0.0)
        effects = follower.receive(FOUNDER, asked, now=0.0)
        assert (bool(votes(effects)), refusals(effects)) == (voted, [] if voted else ["not admitted"])


def test_who_pledged_a_view_before_a_restart_votes_in_none_before_it_and_says_its_pledge_again() -> None:
    follower = a_follower(promises=Promises(0, 2, 1))
    follower.holds(proposal(2).block.parts, now=0.0)
    assert votes(follower.receive(FOUNDER, proposal(2), now=0.0)) == []
    assert follower.receive(FOUNDER, locked(proposal(2).block, [FOUNDER, ANN]), now=0.0) == []
    assert follower.wake_at() <= 0.0
    assert [change.view for change in said(follower.tick(now=0.0), ViewChange)] == [1]


@pytest.mark.parametrize("promises", [Promises(0, 1, 3), Promises(0, 3, 3), Promises(1, 2, 3)])
def test_promises_of_another_round_or_epoch_bind_nobody(promises: Promises) -> None:
    follower = a_follower(promises=promises)
    assert follower.promises == Promises(0, 2)


def test_promises_end_with_their_round() -> None:
    follower = a_follower(promises=Promises(0, 2, 4, None, locked(proposal(2).block, [FOUNDER, ANN], view=3)))
    follower.receive(FOUNDER, CHAIN[1], now=0.0)
    assert follower.promises == Promises(0, 3)
    assert (follower.view, follower.new_view, follower.bound_to) == (0, None, None)


# -- commits


def test_a_commit_is_stored_before_anything_else_and_then_applied_and_said() -> None:
    follower = a_follower()
    follower.holds(CHAIN[1].block.parts, now=0.0)
    assert follower.receive(FOUNDER, CHAIN[1], now=0.0) == [Store(CHAIN[1]), Apply(CHAIN[1])]
    assert not follower.at_head
    assert follower.applying == CHAIN[1]
    (sent,) = follower.applied(2, model_after(2), NO_COST, now=0.1)
    assert follower.at_head
    assert isinstance(sent, Send)
    assert isinstance(sent.message, Applied)
    assert sent.to == (ME, FOUNDER), "its own word is kept on its own disk too"
    payload = applied_payload(RUN, 2, CHAIN[1].block.hash, model_after(2))
    assert FakeSigner(ME).verify(ME, payload, sent.message.signature)


def test_a_commit_counts_from_whoever_it_comes_and_in_whatever_view_it_was_made() -> None:
    follower = a_follower()
    commit = certify(CHAIN[1].block, [FOUNDER, ANN], view=7)
    assert follower.receive(EVE, commit, now=0.0)[0] == Store(commit)


def test_a_commit_without_its_bytes_is_stored_at_once_and_applied_when_they_came() -> None:
    follower = a_follower()
    effects = follower.receive(FOUNDER, CHAIN[1], now=0.0)
    assert kinds(effects) == [Store, Fetch]
    assert follower.holds(CHAIN[1].block.parts, now=0.5) == [Apply(CHAIN[1])]


def test_commits_are_applied_one_by_one_in_order() -> None:
    follower = a_follower()
    follower.holds(tuple(part for commit in CHAIN[1:4] for part in commit.block.parts), now=0.0)
    assert follower.receive(FOUNDER, CHAIN[1], now=0.0) == [Store(CHAIN[1]), Apply(CHAIN[1])]
    assert follower.receive(FOUNDER, CHAIN[2], now=0.0) == [Store(CHAIN[2])]
    assert follower.receive(FOUNDER, CHAIN[3], now=0.0) == [Store(CHAIN[3])]
    assert follower.applied(2, model_after(2), NO_COST, now=0.0)[1:] == [Apply(CHAIN[2])]
    assert follower.applied(3, model_after(3), NO_COST, now=0.0)[1:] == [Apply(CHAIN[3])]
    assert len(follower.applied(4, model_after(4), NO_COST, now=0.0)) == 1
    assert follower.at_head


def test_a_commit_heard_twice_is_stored_once() -> None:
    follower = a_follower()
    follower.receive(FOUNDER, CHAIN[1], now=0.0)
    assert follower.receive(ANN, CHAIN[1], now=0.0) == []


@pytest.mark.parametrize("voters", [(), (FOUNDER,), (ME,), (ANN, EVE), (EVE, PeerId("z"), PeerId("y"))])
def test_a_commit_without_a_quorum_of_its_committee_is_refused(voters: tuple[PeerId, ...]) -> None:
    follower = a_follower()
    commit = certify(CHAIN[1].block, voters)
    follower.holds(commit.block.parts, now=0.0)
    assert refusals(follower.receive(FOUNDER, commit, now=0.0)) == ["invalid commit"]
    assert follower.ledger.head.round == 1


def test_ballots_that_are_repeated_or_of_another_block_or_phase_make_no_quorum() -> None:
    follower = a_follower()
    block = CHAIN[1].block
    (ballot,) = certify(block, [ANN]).ballots
    others = certify(proposal(2, part="other").block, [FOUNDER, ME]).ballots
    for ballots in ((ballot, ballot, ballot), (ballot, *others), locked(block, [FOUNDER, ME, ANN]).ballots):
        assert refusals(follower.receive(FOUNDER, Commit(block, 0, ballots), now=0.0)) == ["invalid commit"]


def test_a_commit_from_ahead_starts_one_catch_up_at_a_time() -> None:
    follower = a_follower()
    assert follower.receive(ANN, CHAIN[4], now=0.0) == [CatchUp(ANN, (0, 1))]
    assert follower.receive(ANN, CHAIN[4], now=RETRY_S - 0.1) == []
    assert follower.receive(ANN, CHAIN[4], now=RETRY_S) == [CatchUp(ANN, (0, 1))]
    assert follower.receive(FOUNDER, proposal(6), now=2 * RETRY_S) == [CatchUp(FOUNDER, (0, 1))]


def test_parts_that_were_applied_are_held_no_longer_for_a_later_round() -> None:
    follower = a_follower()
    follower.holds(CHAIN[1].block.parts, now=0.0)
    follower.receive(FOUNDER, CHAIN[1], now=0.0)
    follower.applied(2, model_after(2), NO_COST, now=0.0)
    again = replace(proposal(3).block, parts=CHAIN[1].block.parts)
    assert follower.receive(FOUNDER, Proposal(0, again), now=0.0) == []


# -- what is missing


def test_proposed_parts_are_fetched_after_a_while_from_contributors_and_the_leader_last() -> None:
    follower = a_follower()
    block = replace(proposal(2).block, parts=(digest("one"), digest("two"), digest("three")))
    follower.receive(FOUNDER, Proposal(0, block), now=1.0)
    follower.holds(block.parts[1:2], now=1.1)
    assert follower.wake_at() <= 1.0 + FETCH_AFTER_S
    assert follower.tick(now=1.0 + FETCH_AFTER_S - 0.1) == []
    wanted = ((0, block.parts[0]), (2, block.parts[2]))
    assert follower.tick(now=1.0 + FETCH_AFTER_S) == [Fetch(wanted, (ANN, FOUNDER))]
    assert follower.tick(now=1.0 + FETCH_AFTER_S + 0.1) == []
    follower.holds(block.parts[:1], now=4.0)
    assert follower.wake_at() <= 1.0 + FETCH_AFTER_S + RETRY_S
    assert follower.tick(now=1.0 + FETCH_AFTER_S + RETRY_S) == [Fetch(wanted[1:], (ANN, FOUNDER))]


def test_nothing_is_fetched_once_all_is_held() -> None:
    follower = a_follower()
    follower.receive(FOUNDER, proposal(2), now=0.0)
    follower.holds(proposal(2).block.parts, now=0.1)
    assert not any(isinstance(effect, Fetch) for effect in waited(follower, 60.0))


def test_committed_parts_that_are_still_on_their_way_are_fetched_only_after_a_while() -> None:
    follower = a_follower()
    follower.receive(FOUNDER, Proposal(0, CHAIN[1].block), now=0.0)
    assert follower.receive(FOUNDER, CHAIN[1], now=1.0) == [Store(CHAIN[1])]
    (fetch,) = follower.tick(now=1.0 + FETCH_AFTER_S)
    assert isinstance(fetch, Fetch)
    assert fetch.wanted == ((0, CHAIN[1].block.parts[0]),)
    assert fetch.donors == (ANN, FOUNDER), "those who signed that they hold it, and the leader last"


def test_who_leads_asks_its_voters_for_parts_and_not_itself() -> None:
    follower = a_follower(me=FOUNDER)
    assert follower.leads
    (_, fetch) = follower.receive(ANN, CHAIN[1], now=0.0)
    assert isinstance(fetch, Fetch)
    assert fetch.donors == (ME, ANN)


def test_parts_that_were_damaged_on_disk_are_fetched_anew_before_they_are_applied() -> None:
    follower = a_follower()
    parts = CHAIN[1].block.parts
    follower.holds(parts, now=0.0)
    assert follower.receive(FOUNDER, CHAIN[1], now=0.0)[1:] == [Apply(CHAIN[1])]
    (fetch,) = follower.damaged(parts, now=1.0)
    assert isinstance(fetch, Fetch)
    assert follower.holds(parts, now=2.0) == [Apply(CHAIN[1])]
    assert follower.damaged((digest("of no round"),), now=2.0) != [], "it starts over, whatever was damaged"


# -- a restart, and far behind


def test_after_a_restart_the_rounds_between_the_model_and_the_head_are_replayed() -> None:
    follower = new_follower()
    follower.restore(CHAIN[:4], [part for commit in CHAIN[:3] for part in commit.block.parts])
    assert follower.ledger.head.round == 4
    assert follower.synced(2, model_after(2), CHAIN[2:4], now=0.0) == [Apply(CHAIN[2])]
    _, fetch = follower.applied(3, model_after(3), NO_COST, now=0.0)
    assert isinstance(fetch, Fetch)
    assert fetch.wanted == tuple(enumerate(CHAIN[3].block.parts))
    assert follower.holds(CHAIN[3].block.parts, now=1.0) == [Apply(CHAIN[3])]


def test_a_restart_with_the_model_of_the_head_has_nothing_to_replay_and_says_again_what_it_has() -> None:
    follower = new_follower()
    follower.restore(CHAIN[:4], ())
    (applied,) = said(follower.synced(4, model_after(4), (), now=0.0), Applied)
    assert (applied.round, applied.model) == (4, model_after(4))
    assert follower.at_head


def test_a_restart_takes_up_the_newest_delegation_of_the_chain() -> None:
    ledger = a_ledger()
    seat = delegation(ANN, 5)
    commits = [extend(ledger, an_entry(ME, (0, 10)), seat=seat), extend(ledger, an_entry(ME, (10, 20)), seat=None)]
    follower = new_follower()
    follower.restore(commits, ())
    assert follower.delegation == seat


@pytest.mark.parametrize("behind", [REPLAY_ROUNDS, REPLAY_ROUNDS + 1])
def test_too_many_rounds_behind_it_takes_the_model_instead_of_replaying(behind: int) -> None:
    follower = new_follower()
    follower.restore(CHAIN[: behind + 1], ())
    effects = follower.synced(1, model_after(1), CHAIN[1 : behind + 1], now=0.0)
    assert kinds(effects) == [Fetch if behind <= REPLAY_ROUNDS else Resync]
    if behind > REPLAY_ROUNDS:
        missing = follower.synced(behind, model_after(behind), CHAIN[behind : behind + 1], now=1.0)
        assert [e.wanted for e in missing if isinstance(e, Fetch)] == [tuple(enumerate(CHAIN[behind].block.parts))]
        assert kinds(follower.synced(behind + 1, model_after(behind + 1), (), now=1.0)) == [Send]
        assert follower.at_head


def test_many_commits_that_arrive_while_one_is_applied_do_not_confuse_which_one_it_was() -> None:
    follower = a_follower()
    follower.holds(CHAIN[1].block.parts, now=0.0)
    assert follower.receive(FOUNDER, CHAIN[1], now=0.0) == [Store(CHAIN[1]), Apply(CHAIN[1])]
    for commit in CHAIN[2 : REPLAY_ROUNDS + 5]:
        assert follower.receive(FOUNDER, commit, now=0.0) == [Store(commit)]
    effects = follower.applied(2, model_after(2), NO_COST, now=1.0)
    assert kinds(effects) == [Send, Resync]


# -- epochs


def test_an_epoch_on_the_head_is_stored_and_followed_like_any_block() -> None:
    follower = a_follower(2)
    commit = an_epoch(follower.ledger.head, ME)
    assert follower.receive(EVE, commit, now=0.0) == [Store(commit), Apply(commit)]
    assert follower.ledger.head.place == (1, 3)
    assert follower.delegation == delegation(FOUNDER, 2)
    assert follower.promises == Promises(1, 4)


def test_an_epoch_on_an_earlier_block_rewinds_the_chain_and_the_model_is_taken_anew() -> None:
    follower = a_follower(4)
    commit = an_epoch(head_after(2), ME)
    rewound, resync, stored = follower.receive(EVE, commit, now=0.0)
    assert (rewound, stored) == (Rewind(2), Store(commit))
    assert isinstance(resync, Resync)
    assert follower.ledger.head.place == (1, 3)
    assert not follower.at_head
    assert follower.synced(2, model_after(2), [commit], now=1.0) == [Apply(commit)]


def test_a_model_of_before_the_epoch_is_kept_and_what_was_to_be_applied_is_forgotten() -> None:
    follower = a_follower(2)
    for later in CHAIN[2:4]:
        follower.receive(FOUNDER, later, now=0.0)
    commit = an_epoch(head_after(2), ME)
    assert follower.receive(EVE, commit, now=0.0) == [Rewind(2), Store(commit), Apply(commit)]
    assert follower.applying == commit


def test_what_was_being_applied_when_an_epoch_began_before_it_ends_without_a_trace() -> None:
    follower = a_follower(2)
    follower.holds(CHAIN[2].block.parts, now=0.0)
    assert follower.receive(FOUNDER, CHAIN[2], now=0.0)[1:] == [Apply(CHAIN[2])]
    commit = an_epoch(head_after(1), ME)
    assert kinds(follower.receive(EVE, commit, now=0.0)) == [Rewind, Resync, Store]
    assert follower.applying is None
    assert follower.applied(3, model_after(3), NO_COST, now=0.1) == []
    assert follower.model is None


def test_an_epoch_that_is_not_the_organizers_changes_nothing() -> None:
    follower = a_follower(2)
    before = follower.ledger.head
    assert refusals(follower.receive(FOUNDER, an_epoch(before, by=FOUNDER), now=0.0)) == ["invalid commit"]
    assert follower.ledger.head == before


def test_of_two_epochs_the_later_holds_whichever_comes_first() -> None:
    first, second = an_epoch(head_after(2), ME), an_epoch(head_after(1), ME, epoch=2)
    for order in ((first, second), (second, first)):
        follower = a_follower(3)
        for commit in order:
            follower.receive(EVE, commit, now=0.0)
        assert follower.ledger.head.place == (2, 2)


def test_a_commit_of_an_epoch_that_began_unheard_makes_it_catch_up_wherever_it_began() -> None:
    began = an_epoch(head_after(1), ME)
    ledger = ledger_of(CHAIN[:1])
    ledger.append(began)
    then = extend(ledger, an_entry(ME, (20, 30)), seat=delegation(FOUNDER, 2))
    for rounds in (1, 2, 3, 6):
        follower = a_follower(rounds)
        assert follower.receive(ANN, then, now=0.0) == [CatchUp(ANN, (0, rounds))]
        assert Store(began) in follower.receive(ANN, began, now=0.1)
        assert Store(then) in follower.receive(ANN, then, now=0.1)


# -- who may have the coordinator's seat


def test_of_two_delegations_the_later_term_holds_and_who_leads_is_for_a_block_to_say() -> None:
    follower = a_follower()
    assert follower.receive(EVE, delegation(ANN, 3), now=0.0) == []
    assert follower.receive(EVE, delegation(EVE, 2), now=0.0) == []
    assert follower.delegation == delegation(ANN, 3)
    assert follower.leader == FOUNDER


def test_a_delegation_that_the_organizer_did_not_sign_is_refused() -> None:
    follower = a_follower()
    assert refusals(follower.receive(EVE, delegation(EVE, 9, by=EVE), now=0.0)) == ["delegation"]
    assert follower.delegation == SEAT


def test_a_delegation_older_than_the_chain_knows_is_passed_over() -> None:
    follower = a_follower()
    assert follower.receive(EVE, delegation(EVE, 1), now=0.0) == []
    assert follower.delegation == SEAT


def test_who_catches_up_keeps_the_newest_delegation_though_blocks_name_coordinators_from_before() -> None:
    follower = new_follower()
    seat = delegation(ANN, 9)
    assert follower.receive(EVE, seat, now=0.0) == []
    for commit in CHAIN[:3]:
        follower.receive(FOUNDER, commit, now=0.0)
    assert CHAIN[0].block.coordinator is not None
    assert follower.ledger.head.round == 3
    assert follower.delegation == seat


def test_what_it_applied_is_said_to_the_leader_and_to_the_coordinator() -> None:
    follower = a_follower()
    (sent,) = entered(follower, 1)
    assert isinstance(sent, Send)
    assert sent.to == tuple(sorted({ME, FOUNDER, head_after(1).leader(1)}))
    assert isinstance(sent.message, Applied)


# -- helpers for views; all that is said of views is tested in test_views


def waited(follower: Follower, until_s: float, *, since_s: float = 0.0) -> list[Effect]:
    """What it does by itself while time passes, second by second."""
    out: list[Effect] = []
    for second in range(int(since_s) + 1, int(until_s) + 1):
        out += follower.tick(now=float(second))
    return out


def entered(follower: Follower, view: int) -> list[Effect]:
    """What it does when a quorum has pledged `view`, without locks."""
    return follower.receive(EVE, _proof(view), now=0.0)


def _proof(view: int) -> NewView:
    head = head_after(1)
    return new_view([pledged(peer, head, view) for peer in (FOUNDER, ANN)])


def a_follower_in_view(view: int, follower: Follower | None = None) -> Follower:
    """One that follows in that view of round 2."""
    moved = a_follower() if follower is None else follower
    entered(moved, view)
    return moved


# -- whose messages these are


def test_only_the_words_of_agreement_are_its_to_receive() -> None:
    follower = a_follower()
    words: list[Message] = [delegation(ANN, 2), proposal(2), locked(proposal(2).block, [ME]), CHAIN[1], _proof(1)]
    words += [pledged(ANN, head_after(1), 1), follower.position()]
    assert all(follower.handles(message) for message in words)
    assert not follower.handles(Vote(0, 2, 0, PREVOTE, bytes(32), bytes(64)))


# -- every order of everything


class Following(RuleBasedStateMachine):
    """A follower under proposals, locks, views and commits of a round, in any order, with a crash now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.held: set[bytes] = set()
        self.stored: list[Commit] = []
        self.promises: Promises | None = None
        self.voted: dict[tuple[int, int, int], bytes] = {}
        self.pledged: dict[int, int] = {}
        """round -> the highest view that it has pledged itself to."""
        self.model_round = 0
        self.applying: Commit | None = None
        self.follower = self.started()

    def started(self) -> Follower:
        follower = new_follower()
        follower.restore(self.stored, self.held, self.promises)
        return follower

    @initialize()
    def begin(self) -> None:
        self.take(self.follower.synced(0, model_after(0), (), now=self.now))

    def take(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Store(commit):
                    assert commit.block.round == len(self.stored) + 1, "the chain on disk has no gaps"
                    self.stored.append(commit)
                case Remember(promises):
                    assert promises.round == len(self.stored) + 1, "promises are made at the head"
                    self.promises = promises
                case Apply(commit):
                    assert self.applying is None, "one commit is applied at a time"
                    assert commit.block.round == self.model_round + 1, "commits are applied in order"
                    assert commit in self.stored, "nothing is applied that was not committed and stored"
                    assert set(commit.block.parts) <= self.held, "nothing is applied that is not held"
                    self.applying = commit
                case Send(_, Vote() as vote):
                    self.check_vote(vote)
                case Send(_, ViewChange() as change):
                    self.check_pledge(change)
                case Fetch(wanted, donors):
                    assert wanted
                    assert not {digest_ for _, digest_ in wanted} & self.held, "nothing is fetched that is held"
                    assert ME not in donors
                case Resync():
                    raise AssertionError("this model is everyone's")

    def check_vote(self, vote: Vote) -> None:
        assert self.promises is not None, "a promise is durable before it is said"
        assert vote.view >= self.pledged.get(vote.round, 0), "no vote in a view that was given up"
        order = (vote.round, vote.view, vote.phase)
        assert self.voted.setdefault(order, vote.block) == vote.block, "one vote in a view and phase"
        assert vote.round == len(self.stored) + 1, "votes are cast at the head"
        block = next(b for b in self.blocks() if b.hash == vote.block)
        if vote.phase == PREVOTE:
            assert vote.round == self.model_round + 1
            assert set(block.parts) <= self.held, "nobody votes for bytes that it does not hold"
            assert self.promises.prevoted == Proposal(vote.view, block)
        else:
            lock = self.promises.lock
            assert lock is not None
            assert (lock.view, lock.block) == (vote.view, block), "who votes to commit is locked"

    def check_pledge(self, change: ViewChange) -> None:
        assert self.promises is not None
        assert change.view == self.promises.pledged >= self.pledged.get(change.round, 0)
        assert change.lock == self.promises.lock, "whoever changes the view shows its lock"
        self.pledged[change.round] = change.view

    def blocks(self) -> list[Block]:
        round_ = min(self.follower.ledger.head.round + 1, 30)
        return [CHAIN[round_ - 1].block, *(proposal(round_, part=part).block for part in ("other", "a third"))]

    @rule(data=st.data(), view=st.integers(0, 3))
    def propose(self, data: st.DataObject, view: int) -> None:
        block = data.draw(st.sampled_from(self.blocks()))
        leader = self.follower.ledger.head.leader(view)
        if leader != ME:
            self.take(self.follower.receive(leader, Proposal(view, block), now=self.now))

    @precondition(lambda self: len(self.stored) > 0)
    @rule(data=st.data(), view=st.integers(0, 3))
    def lock(self, data: st.DataObject, view: int) -> None:
        """One block for each view: the quorums of one view share a voter."""
        block = self.blocks()[view % 3]
        voters = data.draw(st.sampled_from([(FOUNDER, ANN), (FOUNDER,)]))
        before = self.follower.promises
        self.take(self.follower.receive(ANN, locked(block, voters, view=view), now=self.now))
        if len(voters) < 2:
            same = before.lock is not None and (before.lock.view, before.lock.block) == (view, block)
            assert self.follower.promises == before or same, "no quorum, no lock"

    @precondition(lambda self: len(self.stored) > 0)
    @rule(view=st.integers(1, 3))
    def a_view_begins(self, view: int) -> None:
        head = self.follower.ledger.head
        before = self.follower.view
        proof = new_view([pledged(peer, head, view) for peer in (FOUNDER, ANN)])
        self.take(self.follower.receive(ANN, proof, now=self.now))
        assert self.follower.view == max(before, view)

    @precondition(lambda self: len(self.stored) < 30)
    @rule(ahead=st.integers(0, 2), voters=st.sampled_from([(FOUNDER, ME, ANN), (FOUNDER, ANN), (ANN,), ()]))
    def hear_a_commit(self, ahead: int, voters: tuple[PeerId, ...]) -> None:
        commit = certify(CHAIN[len(self.stored) + ahead].block, voters)
        before = len(self.stored)
        self.take(self.follower.receive(ANN, commit, now=self.now))
        if len(voters) < 2 and before > 0:
            assert len(self.stored) == before, "no quorum, no commit"

    @rule(data=st.data())
    def bytes_arrive(self, data: st.DataObject) -> None:
        rounds = range(self.model_round, min(self.model_round + 3, 30))
        digests = {part for k in rounds for part in CHAIN[k].block.parts}
        digests |= {part for block in self.blocks() for part in block.parts}
        some = data.draw(st.sets(st.sampled_from(sorted(digests)), min_size=1))
        self.held |= some
        self.take(self.follower.holds(tuple(sorted(some)), now=self.now))

    @precondition(lambda self: self.applying is not None)
    @rule()
    def finish_applying(self) -> None:
        assert self.applying is not None
        commit, self.applying = self.applying, None
        self.model_round = commit.block.round
        self.held -= set(commit.block.parts)
        model = model_after(self.model_round)
        self.take(self.follower.applied(self.model_round, model, NO_COST, now=self.now))

    @rule()
    def crash_and_restart(self) -> None:
        self.applying = None
        self.follower = self.started()
        since = self.stored[self.model_round :]
        self.take(self.follower.synced(self.model_round, model_after(self.model_round), since, now=self.now))

    @rule(seconds=st.sampled_from([0.0, FETCH_AFTER_S, 4.0]), times=st.integers(1, 5))
    def time_passes(self, seconds: float, times: int) -> None:
        for _ in range(times):
            self.now += seconds
            self.take(self.follower.tick(now=self.now))

    @invariant()
    def the_chain_in_memory_is_the_one_on_disk(self) -> None:
        assert self.follower.ledger.head.round == len(self.stored)
        assert self.follower.model_round == self.model_round or self.follower.model is None

    @invariant()
    def what_is_committed_and_held_is_being_applied(self) -> None:
        waiting = self.stored[self.model_round : self.model_round + 1]
        if waiting and set(waiting[0].block.parts) <= self.held and self.follower.model is not None:
            assert self.applying is not None

    @invariant()
    def what_is_due_was_done(self) -> None:
        self.take(self.follower.tick(now=self.now))
        assert self.follower.wake_at() > self.now


Following.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestFollowing = Following.TestCase
