"""How a leader is given up and the next one begins: patience, pledges, the proof of a view, what binds its leader."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dugnad.coordinator.effects import CatchUp, Effect, Promises, Refused, Remember, Send, Store
from dugnad.coordinator.follower import FOLLOWING, PLEDGE_AGAIN_S, Follower
from dugnad.coordinator.ledger import Charter, Ledger
from dugnad.coordinator.messages import (
    PRECOMMIT,
    PREVOTE,
    Ballot,
    Block,
    Commit,
    Freeze,
    Lock,
    NewView,
    Proposal,
    Standing,
    ViewChange,
    Vote,
    pledge_payload,
)
from dugnad.coordinator.patience import Patience
from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message
from tests.unit.chains import (
    CHARTER,
    FOUNDER,
    GENESIS,
    RUN,
    SIGNER,
    FakeSigner,
    a_block,
    a_ledger,
    an_entry,
    certify,
    committee,
    digest,
    disk_of,
    extend,
    ledger_of,
    locked,
    model_after,
    new_view,
    pledged,
)

SILENCE_S = 10.0
PATIENCE = Patience(silence_s=SILENCE_S, round_s=60.0, vote_s=20.0)
EVE = PeerId("eve")
replace = msgspec.structs.replace
M = TypeVar("M", bound=Message)


def first_round() -> Commit:
    """After it four vote, with one vote each: the founder, who leads, and a, b, c."""
    return extend(a_ledger(), *(an_entry(peer, (10 * k, 10 * k + 10)) for k, peer in enumerate("abc")))


FIRST = first_round()
HEAD = ledger_of([FIRST]).head
ORDER = [HEAD.leader(view) for view in range(4)]
"""Who leads round 2, view by view."""
NEXT, THIRD, FOURTH = ORDER[1:]
VOTERS = sorted(ORDER)


def a_block_of(part: str) -> Block:
    """One of many blocks that may follow."""
    block = a_block(HEAD, *(an_entry(peer, (30 + 10 * k, 40 + 10 * k)) for k, peer in enumerate("abc")))
    return replace(block, parts=(digest(part),))


ONE, OTHER = a_block_of("one"), a_block_of("other")


def a_voter(me: PeerId = FOURTH, *, disk: bytes | None = None, promises: Promises | None = None) -> Follower:
    """A voter of round 2 that stands at its head, and holds the parts of all blocks."""
    signer = FakeSigner(me)
    follower = Follower(signer, Ledger(CHARTER, signer), PATIENCE, disk_of(me) if disk is None else disk)
    follower.restore([FIRST], (*ONE.parts, *OTHER.parts), promises)
    follower.synced(1, model_after(1), (), now=0.0)
    return follower


def said(effects: Iterable[Effect], kind: type[M]) -> list[M]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def refusals(effects: Iterable[Effect]) -> list[str]:
    return [effect.reason for effect in effects if isinstance(effect, Refused)]


def standing(phase: str, *, view: int = 0) -> Standing:
    return Standing(0, 1, HEAD.hash, view, phase, "", False, 0, None)


def hear(follower: Follower, sender: PeerId, message: Message, *, now: float) -> list[Effect]:
    """As the machine around it does: whoever speaks is heard, then what it said is taken."""
    follower.heard(sender, message, now=now)
    return follower.receive(sender, message, now=now)


def gives_up_at(
    follower: Follower, *, until_s: float = 200.0, every_s: Callable[[float], object] = lambda now: None
) -> float | None:
    """When it first pledges itself to a higher view, while `every_s` happens each second."""
    before = follower.promises.pledged
    for second in range(1, int(until_s) + 1):
        every_s(float(second))
        follower.tick(now=float(second))
        if follower.promises.pledged > before:
            return float(second)
    return None


# -- patience


def test_a_silent_leader_is_given_up_durably_and_then_before_all_voters() -> None:
    follower = a_voter()
    for second in range(1, 10):
        assert follower.tick(now=float(second)) == []
    kept, sent = follower.tick(now=SILENCE_S)
    assert kept == Remember(Promises(0, 2, 1))
    assert sent == Send(tuple(VOTERS), pledged(FOURTH, HEAD, 1))
    assert (follower.view, follower.leader) == (0, FOUNDER), "one voice changes no view"


def test_it_wakes_in_time_to_give_up_a_silent_leader_however_rarely_anything_else_happens() -> None:
    follower = a_voter()
    follower.tick(now=0.0)
    now = 0.0
    while follower.promises.pledged == 0:
        assert follower.wake_at() > now
        now = follower.wake_at()
        follower.tick(now=now)
    assert now == SILENCE_S


@pytest.mark.parametrize(
    ("sender", "message", "shows"),
    [
        (FOUNDER, standing("idle"), True),
        (FOUNDER, Proposal(0, ONE), True),
        (FOUNDER, locked(ONE, []), True),
        (FOUNDER, FIRST, True),
        (FOUNDER, Freeze(2, 0, 1, ONE.entries), True),
        (FOUNDER, standing(FOLLOWING), False),
        (FOUNDER, pledged(FOUNDER, HEAD, 1), False),
        (NEXT, standing("idle"), False),
        (NEXT, FIRST, False),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_only_the_words_of_one_who_leads_show_that_it_is_there(sender: PeerId, message: Message, shows: bool) -> None:
    follower = a_voter()
    assert gives_up_at(follower, until_s=9.0) is None
    follower.heard(sender, message, now=9.0)
    assert (gives_up_at(follower, until_s=18.0) is None) == shows


@pytest.mark.parametrize(("phase", "at_s"), [("gather", 61.0), ("reduce", 61.0), ("vote", 21.0), ("idle", None)])
def test_a_leader_that_is_there_and_gets_nowhere_is_given_up_unless_it_has_nothing_to_do(
    phase: str, at_s: float | None
) -> None:
    follower = a_voter()
    assert gives_up_at(follower, every_s=lambda now: hear(follower, FOUNDER, standing(phase), now=now)) == at_s


def test_a_leader_that_rests_between_two_attempts_begins_anew() -> None:
    follower = a_voter()

    def working(now: float) -> None:
        hear(follower, FOUNDER, standing("idle" if now % 50 == 0 else "gather"), now=now)

    assert gives_up_at(follower, every_s=working) is None


def test_going_from_votes_back_to_work_takes_the_haste_out_of_it() -> None:
    follower = a_voter()

    def working(now: float) -> None:
        hear(follower, FOUNDER, standing("gather" if now % 15 == 0 else "vote"), now=now)

    assert gives_up_at(follower, every_s=working) == 61.0, "and yet the round has to come to its end"


@pytest.mark.parametrize("first", ["a tick", "a message"])
def test_who_stood_still_itself_does_not_blame_the_leader(first: str) -> None:
    for phase in ("nothing", "gather", "vote"):
        follower = a_voter()
        if phase != "nothing":
            hear(follower, FOUNDER, standing(phase), now=1.0)
        if first == "a message":
            hear(follower, NEXT, standing(FOLLOWING), now=500.0)
        follower.tick(now=500.0)
        assert follower.promises.pledged == 0, phase
        for second in range(501, 510):
            follower.tick(now=float(second))
        assert follower.promises.pledged == 0, phase
        follower.tick(now=510.0)
        assert follower.promises.pledged == 1, phase


def test_a_pause_shorter_than_half_the_silence_is_no_excuse() -> None:
    follower = a_voter()
    for now in (5.0, 10.0):
        follower.tick(now=now)
    assert follower.promises.pledged == 1


def test_in_a_large_swarm_leaders_are_given_longer() -> None:
    ledger = a_ledger()
    crowd = [f"p{k:04}" for k in range(400)]
    entries = [an_entry(peer, (k, k + 1)) for k, peer in enumerate(crowd)]
    block = replace(a_block(ledger.head, *entries), committee=committee(*crowd[:3]))
    signer = FakeSigner(PeerId(crowd[0]))
    follower = Follower(signer, Ledger(CHARTER, signer), PATIENCE, disk_of(signer.peer_id))
    follower.restore([certify(block, [FOUNDER])], ())
    follower.synced(1, model_after(1), (), now=0.0)
    assert gives_up_at(follower) == 2 * SILENCE_S


def test_who_has_no_vote_or_no_model_or_leads_alone_gives_up_nobody() -> None:
    stranger, restored = a_voter(EVE), a_voter(disk=b"new disk")
    modelless = Follower(FakeSigner(FOURTH), ledger_of([FIRST]), PATIENCE, disk_of(FOURTH))
    alone = Follower(SIGNER, a_ledger(), PATIENCE, disk_of(FOUNDER))
    alone.synced(0, model_after(0), (), now=0.0)
    assert alone.leads
    for follower in (stranger, restored, modelless, alone):
        assert gives_up_at(follower) is None


def test_who_leads_and_gets_nowhere_gives_itself_up_and_leads_no_more() -> None:
    follower = a_voter(FOUNDER)
    assert follower.leads
    assert gives_up_at(follower, every_s=lambda now: hear(follower, FOUNDER, standing("vote"), now=now)) == 21.0
    assert (follower.view, follower.leads) == (0, False)


def test_silence_is_worth_a_word_only_when_it_is_long_and_somebody_else_leads() -> None:
    follower, leader = a_voter(), a_voter(FOUNDER)
    assert follower.silent_s(now=SILENCE_S - 0.1) is None
    assert follower.silent_s(now=SILENCE_S) == SILENCE_S
    assert leader.silent_s(now=100.0) is None


# -- pledges


def test_a_pledge_is_said_again_and_a_view_that_does_not_begin_is_given_up_as_well() -> None:
    follower = a_voter()
    said_at: list[tuple[float, int]] = []
    for second in range(1, 62):
        for change in said(follower.tick(now=float(second)), ViewChange):
            said_at.append((second, change.view))
    first = [at for at, view in said_at if view == 1]
    assert first == [SILENCE_S + k * PLEDGE_AGAIN_S for k in range(10)]
    assert [min(at for at, view in said_at if view == v) for v in (1, 2, 3)] == [10, 30, 50]


def test_while_the_leader_that_was_given_up_is_there_after_all_no_further_view_is_pledged() -> None:
    follower = a_voter()
    assert gives_up_at(follower) == SILENCE_S
    for second in range(11, 100):
        hear(follower, FOUNDER, standing("gather"), now=float(second))
        follower.tick(now=float(second))
    assert follower.promises.pledged == 1
    for second in range(100, 110):
        follower.tick(now=float(second))
    assert follower.promises.pledged == 2


def test_a_pledge_tells_of_the_highest_lock() -> None:
    follower = a_voter()
    lock = locked(ONE, VOTERS[:3])
    follower.receive(FOUNDER, lock, now=0.0)
    (change,) = [c for s in range(1, 11) for c in said(follower.tick(now=float(s)), ViewChange)]
    assert change == pledged(FOURTH, HEAD, 1, lock)
    assert change.pledge.locked == 1


def test_who_pledged_a_view_votes_in_no_earlier_one() -> None:
    follower = a_voter(promises=Promises(0, 2, 1))
    assert said(follower.receive(FOUNDER, Proposal(0, ONE), now=0.0), Vote) == []
    assert said(follower.receive(FOUNDER, locked(ONE, VOTERS[:3]), now=0.0), Vote) == []
    assert follower.promises == Promises(0, 2, 1)


def forged_changes() -> dict[str, tuple[ViewChange, str]]:
    """What nobody may be made to believe that `THIRD` has said, and why it is refused."""
    lock = locked(ONE, VOTERS[:3])
    good, other = pledged(THIRD, HEAD, 2, lock), locked(OTHER, VOTERS[:3])
    few = locked(ONE, VOTERS[:2])
    return {
        "in the name of another": (pledged(NEXT, HEAD, 2), "not a member"),
        "not signed": (replace(good, pledge=replace(good.pledge, signature=bytes(64))), "invalid pledge"),
        "signed for another view": (replace(good, view=3), "invalid pledge"),
        "of another disk": (_of_disk(good, b"new disk"), "invalid pledge"),
        "of a lock that it does not show": (replace(good, lock=None), "invalid pledge"),
        "of no lock, and shows one": (replace(pledged(THIRD, HEAD, 2), lock=lock), "invalid pledge"),
        "of another lock than it shows": (replace(good, lock=other), "invalid pledge"),
        "with a lock of that very view": (pledged(THIRD, HEAD, 2, locked(ONE, VOTERS[:3], view=2)), "invalid pledge"),
        "with a lock of a later view": (pledged(THIRD, HEAD, 2, locked(ONE, VOTERS[:3], view=5)), "invalid pledge"),
        "with a lock that too few voted for": (pledged(THIRD, HEAD, 2, few), "invalid pledge"),
        "with a lock on a block that may not follow": (
            pledged(THIRD, HEAD, 2, locked(replace(ONE, cursor=99), VOTERS[:3])),
            "invalid pledge",
        ),
    }


def _of_disk(change: ViewChange, disk: bytes) -> ViewChange:
    pledge = change.pledge
    payload = pledge_payload(RUN, 0, 2, change.view, pledge.locked, pledge.block, disk)
    return replace(change, pledge=replace(pledge, signature=FakeSigner(pledge.peer).sign(payload)))


def test_the_pledge_that_every_forgery_is_made_from_is_taken() -> None:
    follower = a_voter(NEXT)
    assert follower.receive(THIRD, pledged(THIRD, HEAD, 2, locked(ONE, VOTERS[:3])), now=0.0) == []


@pytest.mark.parametrize("name", forged_changes())
def test_a_forged_pledge_is_refused(name: str) -> None:
    change, why = forged_changes()[name]
    follower = a_voter(NEXT)
    assert refusals(follower.receive(THIRD, change, now=0.0)) == [why]
    follower.receive(FOURTH, pledged(FOURTH, HEAD, 2), now=0.0)
    assert follower.promises.pledged == 0, "it counts with no other"


def test_who_has_no_vote_pledges_nothing_to_anyone() -> None:
    assert refusals(a_voter().receive(EVE, pledged(EVE, HEAD, 1), now=0.0)) == ["not a member"]


def test_of_each_voter_one_pledge_is_kept_the_highest() -> None:
    follower = a_voter(NEXT)
    for view in (7, 3, 9, 8, 5):
        follower.receive(THIRD, pledged(THIRD, HEAD, view), now=0.0)
    assert {view: set(by) for view, by in follower._pledges.items() if by} == {9: {THIRD}}


# -- joining those who give up a leader


def test_one_pledge_alone_makes_nobody_give_up_a_leader_and_so_many_that_no_quorum_is_left_do() -> None:
    follower = a_voter()
    assert follower.receive(THIRD, pledged(THIRD, HEAD, 3), now=0.0) == []
    kept, sent = follower.receive(NEXT, pledged(NEXT, HEAD, 2), now=0.0)
    assert kept == Remember(Promises(0, 2, 2)), "the highest view that both have pledged"
    assert said([sent], ViewChange) == [pledged(FOURTH, HEAD, 2)]


def test_who_has_given_up_a_leader_itself_goes_on_with_the_first_one_who_is_further() -> None:
    follower = a_voter(promises=Promises(0, 2, 1))
    effects = follower.receive(THIRD, pledged(THIRD, HEAD, 6), now=0.0)
    assert said(effects, ViewChange) == [pledged(FOURTH, HEAD, 6)]


def test_who_follows_the_view_that_it_pledged_is_not_drawn_on_by_one_voice() -> None:
    follower = a_voter(promises=Promises(0, 2, 1))
    follower.receive(NEXT, new_view(pledged(peer, HEAD, 1) for peer in VOTERS[:3]), now=0.0)
    assert follower.receive(THIRD, pledged(THIRD, HEAD, 6), now=0.0) == []


def test_in_an_open_run_a_third_of_the_weight_draws_nobody_on_since_it_may_lie() -> None:
    charter = Charter.of(GENESIS, "open")
    ledger = Ledger(charter, SIGNER)
    work = [an_entry(peer, (10 * k, 10 * k + 10)) for k, peer in enumerate("abcd")]
    ledger.append(certify(a_block(ledger.head, *work), [FOUNDER]))
    earned = committee("a", "b", "c", "d", rule=QuorumRule(open=True), credit=ledger.credit)
    ledger.append(certify(replace(a_block(ledger.head), committee=earned), ledger.head.voters))
    head = ledger.head
    me, *others = (PeerId(peer) for peer in "abcd")
    follower = Follower(FakeSigner(me), ledger, PATIENCE, disk_of(me))
    follower.restore([], (), Promises(0, 3, 1))
    follower.synced(2, model_after(2), (), now=0.0)
    assert follower.receive(others[0], pledged(others[0], head, 4), now=0.0) == []
    assert said(follower.receive(others[1], pledged(others[1], head, 5), now=0.0), ViewChange) != []
    assert follower.promises.pledged == 4


def test_a_voter_with_another_disk_joins_nobody() -> None:
    follower = a_voter(disk=b"new disk")
    for peer in (NEXT, THIRD):
        assert follower.receive(peer, pledged(peer, HEAD, 2), now=0.0) == []


# -- the proof of a view


def test_the_leader_of_a_view_begins_it_with_the_pledges_of_a_quorum_and_shows_them() -> None:
    follower = a_voter(NEXT)
    changes = [pledged(peer, HEAD, 1) for peer in (FOUNDER, THIRD, FOURTH)]
    assert follower.receive(FOUNDER, changes[0], now=0.0) == []
    joined = follower.receive(THIRD, changes[1], now=0.0)
    assert said(joined, ViewChange) == [pledged(NEXT, HEAD, 1)], "it pledges itself too, and so may lead"
    assert said(joined, NewView) == []
    effects = follower.receive(NEXT, pledged(NEXT, HEAD, 1), now=0.0)
    proof = new_view([*changes[:2], pledged(NEXT, HEAD, 1)])
    assert Send(tuple(peer for peer in VOTERS if peer != NEXT), proof) in effects
    assert (follower.view, follower.leads, follower.bound_to, follower.new_view) == (1, True, None, proof)


def test_who_does_not_lead_a_view_begins_nothing() -> None:
    follower = a_voter(THIRD)
    for peer in (FOUNDER, NEXT, FOURTH, THIRD):
        assert said(follower.receive(peer, pledged(peer, HEAD, 1), now=0.0), NewView) == []
    assert follower.view == 0


def test_the_leader_of_a_view_with_another_disk_does_not_begin_it() -> None:
    follower = a_voter(NEXT, disk=b"new disk")
    for peer in (FOUNDER, THIRD, FOURTH):
        assert follower.receive(peer, pledged(peer, HEAD, 1), now=0.0) == []
    assert follower.view == 0


def test_a_view_begins_with_the_highest_lock_of_its_pledges() -> None:
    low, high = locked(ONE, VOTERS[:3]), locked(OTHER, VOTERS[1:], view=2)
    follower = a_voter(ORDER[1], promises=Promises(0, 2, 5))
    changes = [pledged(FOUNDER, HEAD, 5, low), pledged(THIRD, HEAD, 5, high), pledged(NEXT, HEAD, 5)]
    for change in changes:
        effects = follower.receive(change.pledge.peer, change, now=0.0)
    (proof,) = said(effects, NewView)
    assert proof.lock == high
    assert (follower.view, follower.bound_to) == (5, OTHER)


def test_a_proof_is_good_from_whoever_it_comes_and_moves_every_voter_with_what_it_applied() -> None:
    follower = a_voter()
    (sent,) = follower.receive(EVE, new_view(pledged(peer, HEAD, 1) for peer in VOTERS[:3]), now=0.0)
    assert (follower.view, follower.leader) == (1, NEXT)
    assert isinstance(sent, Send)
    assert sent.to == tuple(sorted({FOURTH, FOUNDER, NEXT})), "the new leader hears what we applied"


def proofs() -> dict[str, NewView]:
    """What proves nothing, each in one way."""
    lock, high = locked(ONE, VOTERS[:3]), locked(OTHER, VOTERS[1:], view=1)
    changes = [
        pledged(VOTERS[0], HEAD, 2, lock),
        pledged(VOTERS[1], HEAD, 2, high),
        pledged(VOTERS[2], HEAD, 2),
    ]
    good = new_view(changes)
    forged = replace(good.pledges[0], signature=bytes(64))
    weak = pledged(VOTERS[1], HEAD, 2, locked(OTHER, VOTERS[:2], view=1))
    return {
        "too few pledges": new_view(changes[1:]),
        "one pledge three times": new_view([changes[1]] * 3),
        "a pledge that is not signed": replace(good, pledges=(forged, *good.pledges[1:])),
        "a pledge of a stranger": new_view([*changes[1:], pledged(EVE, HEAD, 2)]),
        "a pledge of another disk": new_view([_of_disk(changes[0], b"new disk"), *changes[1:]]),
        "a pledge to another view": new_view([*changes[1:], replace(pledged(VOTERS[0], HEAD, 1), view=2)]),
        "a pledge that denies its lock": replace(
            good, pledges=(good.pledges[0], replace(good.pledges[1], locked=0, block=b""), good.pledges[2])
        ),
        "without the lock": replace(good, lock=None),
        "with the lower lock": replace(good, lock=lock),
        "with a lock that nobody pledged": replace(new_view([changes[2], *_unlocked()]), lock=high),
        "with a lock that too few voted for": new_view([weak, *_unlocked()]),
        "with a lock of another view than pledged": replace(good, lock=replace(high, view=0)),
    }


def _unlocked() -> list[ViewChange]:
    return [pledged(peer, HEAD, 2) for peer in (VOTERS[0], VOTERS[3])]


def test_the_proof_that_every_forgery_is_made_from_holds() -> None:
    lock, high = locked(ONE, VOTERS[:3]), locked(OTHER, VOTERS[1:], view=1)
    good = new_view([pledged(VOTERS[0], HEAD, 2, lock), pledged(VOTERS[1], HEAD, 2, high), pledged(VOTERS[2], HEAD, 2)])
    follower = a_voter()
    assert refusals(follower.receive(THIRD, good, now=0.0)) == []
    assert (follower.view, follower.bound_to) == (2, OTHER)


@pytest.mark.parametrize("name", proofs())
def test_a_forged_proof_moves_nobody(name: str) -> None:
    follower = a_voter()
    assert refusals(follower.receive(THIRD, proofs()[name], now=0.0)) == ["invalid view"]
    assert (follower.view, follower.leader) == (0, FOUNDER)


def test_a_proof_of_a_view_that_is_over_or_of_another_round_changes_nothing() -> None:
    follower = a_voter()
    for view in (2, 1, 2):
        follower.receive(THIRD, new_view(pledged(peer, HEAD, view) for peer in VOTERS[:3]), now=0.0)
    assert follower.view == 2
    ahead = NewView(0, 5, 1, (), None)
    assert follower.receive(THIRD, ahead, now=0.0) == [CatchUp(THIRD, (0, 1))]
    assert follower.receive(THIRD, NewView(0, 1, 1, (), None), now=0.0) == []


# -- what binds a leader


def test_a_view_that_began_with_a_lock_takes_no_other_block() -> None:
    follower = a_voter()
    lock = locked(ONE, VOTERS[:3])
    unlocked = [pledged(peer, HEAD, 1) for peer in (NEXT, THIRD)]
    follower.receive(EVE, new_view([pledged(FOUNDER, HEAD, 1, lock), *unlocked]), now=0.0)
    assert refusals(follower.receive(NEXT, Proposal(1, OTHER), now=0.0)) == ["not locked"]
    assert [vote.block for vote in said(follower.receive(NEXT, Proposal(1, ONE), now=0.0), Vote)] == [ONE.hash]


def test_a_view_that_began_without_a_lock_takes_any_block_even_from_who_prevoted_another() -> None:
    follower = a_voter()
    assert said(follower.receive(FOUNDER, Proposal(0, ONE), now=0.0), Vote) != []
    follower.receive(EVE, new_view(pledged(peer, HEAD, 1) for peer in VOTERS[:3]), now=0.0)
    assert [vote.block for vote in said(follower.receive(NEXT, Proposal(1, OTHER), now=0.0), Vote)] == [OTHER.hash]


def test_a_lock_of_its_own_that_the_proof_did_not_speak_of_does_not_hold_it_back() -> None:
    """The quorum of pledges shows that the block of that lock can't have been committed, or it would be spoken of."""
    follower = a_voter()
    follower.receive(FOUNDER, locked(ONE, VOTERS[:3]), now=0.0)
    others = [peer for peer in VOTERS if peer != FOURTH]
    follower.receive(EVE, new_view(pledged(peer, HEAD, 1) for peer in others), now=0.0)
    assert [vote.block for vote in said(follower.receive(NEXT, Proposal(1, OTHER), now=0.0), Vote)] == [OTHER.hash]
    lock = follower.promises.lock
    assert lock is not None
    assert lock.block == ONE, "it is locked on the first until a later lock moves it"


def test_a_leader_is_bound_by_its_own_prevote_of_before_a_restart() -> None:
    leader = a_voter(FOUNDER, promises=Promises(0, 2, 0, Proposal(0, ONE)))
    assert leader.leads
    assert leader.bound_to == ONE
    follower = a_voter(NEXT, promises=Promises(0, 2, 1, Proposal(0, ONE)))
    follower.receive(EVE, new_view(pledged(peer, HEAD, 1) for peer in VOTERS[:3]), now=0.0)
    assert follower.leads
    assert follower.bound_to is None, "what it prevoted in another view binds nobody"


def test_who_has_given_up_its_own_view_leads_it_no_more_after_a_restart() -> None:
    assert not a_voter(FOUNDER, promises=Promises(0, 2, 1)).leads
    assert not a_voter(FOUNDER, disk=b"new disk").leads


# -- who lacks what


def test_who_is_in_an_earlier_view_is_shown_the_proof_of_ours() -> None:
    follower = a_voter()
    proof = new_view(pledged(peer, HEAD, 2) for peer in VOTERS[:3])
    follower.receive(THIRD, proof, now=0.0)
    for message in (pledged(NEXT, HEAD, 1), standing(FOLLOWING, view=1)):
        assert follower.receive(NEXT, message, now=5.0) == [Send((NEXT,), proof)]
        assert follower.receive(NEXT, message, now=5.9) == [], "once a second to each"
        assert follower.receive(NEXT, message, now=6.0) == [Send((NEXT,), proof)]
        follower.tick(now=20.0)
        follower._told_at.clear()


def test_who_came_into_a_view_by_a_lock_shows_the_lock() -> None:
    follower = a_voter()
    lock = locked(ONE, VOTERS[:3], view=2)
    follower.receive(THIRD, lock, now=0.0)
    assert follower.put_right(NEXT, HEAD.place, 1, now=1.0) == [Send((NEXT,), lock)]


def test_who_is_a_round_behind_is_shown_the_commit_and_who_is_further_behind_where_we_stand() -> None:
    follower = a_voter()
    assert follower.put_right(NEXT, (0, 0), 0, now=1.0) == [Send((NEXT,), FIRST)]
    second = certify(ONE, VOTERS[:3])
    follower.receive(FOUNDER, second, now=1.0)
    assert follower.put_right(THIRD, (0, 0), 0, now=1.0) == [Send((THIRD,), follower.position())]
    assert follower.position() == Standing(0, 2, ONE.hash, 0, FOLLOWING, "", False, 0, None)


def test_who_is_where_we_are_or_further_or_ourselves_is_told_nothing() -> None:
    follower = a_voter()
    assert follower.put_right(NEXT, HEAD.place, 0, now=1.0) == []
    assert follower.put_right(NEXT, HEAD.place, 4, now=1.0) == []
    assert follower.put_right(NEXT, (0, 7), 0, now=1.0) == []
    assert follower.put_right(NEXT, (1, 0), 0, now=1.0) == []
    assert follower.put_right(FOURTH, (0, 0), 0, now=1.0) == []


def test_who_stands_further_ahead_is_asked_for_what_we_lack() -> None:
    said_by_next = Standing(0, 9, digest("their head"), 0, FOLLOWING, "", False, 0, None)
    assert a_voter().receive(NEXT, said_by_next, now=0.0) == [CatchUp(NEXT, (0, 1))]
    another_epoch = replace(said_by_next, epoch=1, head_round=1)
    assert a_voter().receive(NEXT, another_epoch, now=0.0) == [CatchUp(NEXT, (0, 1))]


def test_a_word_of_another_round_tells_the_follower_whom_to_put_right() -> None:
    follower = a_voter()
    old = replace(pledged(NEXT, HEAD, 1), round=1)
    assert follower.receive(NEXT, old, now=1.0) == [Send((NEXT,), FIRST)]
    new = replace(pledged(NEXT, HEAD, 1), round=5)
    assert follower.receive(NEXT, new, now=1.0) == [CatchUp(NEXT, (0, 1))]


def test_it_tells_its_leader_where_it_stands_and_while_that_one_is_silent_everyone_in_turn() -> None:
    follower = a_voter()
    assert follower.contacts(now=1.0) == (FOUNDER,)
    told = {follower.contacts(now=SILENCE_S + 5.0 * k) for k in range(3)}
    assert all(FOUNDER in to for to in told)
    assert {peer for to in told for peer in to} == {FOUNDER, NEXT, THIRD}


def test_who_would_lead_and_does_not_yet_asks_the_others_in_turn() -> None:
    follower = a_voter(FOUNDER, disk=b"new disk")
    assert not follower.leads
    told = {follower.contacts(now=5.0 * k) for k in range(3)}
    assert told == {(NEXT,), (THIRD,), (FOURTH,)}


# -- every order of everything


class Agreeing(RuleBasedStateMachine):
    """Four voters whose words are lost, doubled and overtaken, who restart from their promises; whoever leads proposes.

    Leaders may even propose what they like, as often as they like: of one round two blocks are never committed. And
    when all that is said arrives, and leaders propose what they are bound to, one is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.promises: dict[PeerId, Promises | None] = dict.fromkeys(VOTERS)
        self.commits: dict[PeerId, Commit] = {}
        self.voters = {peer: a_voter(peer) for peer in VOTERS}
        self.posted: list[tuple[PeerId, PeerId, Message]] = []
        """(from, to, what): all that was ever said, any of which may come at any time."""
        self.ballots: dict[tuple[int, int, bytes], dict[PeerId, Ballot]] = {}
        """(view, phase, block) -> the votes that were cast, which any leader may have got."""

    def take(self, peer: PeerId, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Remember(promises):
                    before = self.promises[peer]
                    assert before is None or promises.pledged >= before.pledged, "a pledge is never taken back"
                    self.promises[peer] = promises
                case Store(commit):
                    self.commits[peer] = commit
                case Send(to, message):
                    if isinstance(message, Vote):
                        key = (message.view, message.phase, message.block)
                        self.ballots.setdefault(key, {})[peer] = Ballot(peer, message.signature)
                    self.posted += [(peer, who, message) for who in to]
                case _:
                    pass

    def working(self) -> list[PeerId]:
        return [peer for peer in VOTERS if peer not in self.commits]

    @precondition(lambda self: self.posted)
    @rule(data=st.data())
    def a_message_comes(self, data: st.DataObject) -> None:
        """Any message at all, however old: the others count as lost until they come, and it may come again."""
        at = data.draw(st.integers(0, len(self.posted) - 1))
        self.deliver(self.posted[-1 - at])

    def deliver(self, posted: tuple[PeerId, PeerId, Message]) -> None:
        sender, to, message = posted
        if to in self.voters and self.voters[to].handles(message):
            self.take(to, hear(self.voters[to], sender, message, now=self.now))

    @rule(data=st.data(), block=st.sampled_from([ONE, OTHER]))
    def whoever_leads_proposes(self, data: st.DataObject, block: Block) -> None:
        leading = [peer for peer in self.working() if self.voters[peer].leads]
        if leading:
            self.propose(data.draw(st.sampled_from(leading)), block)

    def propose(self, peer: PeerId, block: Block) -> None:
        follower = self.voters[peer]
        view = follower.view
        self.take(peer, follower.receive(peer, Proposal(view, block), now=self.now))
        self.posted += [(peer, to, Proposal(view, block)) for to in VOTERS if to != peer]

    @rule()
    def leaders_count_votes(self) -> None:
        for (view, phase, digest_), given in sorted(self.ballots.items()):
            block = next(block for block in (ONE, OTHER) if block.hash == digest_)
            cast = tuple(given[peer] for peer in sorted(given))
            if CHARTER.rule.decided(HEAD.committee, given):
                said = Lock(view, block, cast) if phase == PREVOTE else Commit(block, view, cast)
                self.posted += [(HEAD.leader(view), to, said) for to in VOTERS]

    @rule(peer=st.sampled_from(VOTERS))
    def a_voter_restarts(self, peer: PeerId) -> None:
        if peer not in self.commits:
            self.voters[peer] = a_voter(peer, promises=self.promises[peer])
            self.voters[peer]._watch.ran_at = self.voters[peer]._watch.heard_at = self.now

    @rule(peer=st.sampled_from(VOTERS), seconds=st.integers(1, 25))
    def a_voter_loses_patience(self, peer: PeerId, seconds: int) -> None:
        for second in range(1, seconds + 1):
            self.take(peer, self.voters[peer].tick(now=self.now + second))

    @rule()
    def time_passes(self) -> None:
        self.now += 30.0

    @invariant()
    def one_block_is_committed_at_most(self) -> None:
        assert len({commit.block.hash for commit in self.commits.values()}) <= 1
        certified = {
            digest_
            for (_, phase, digest_), given in self.ballots.items()
            if phase == PRECOMMIT and CHARTER.rule.decided(HEAD.committee, given)
        }
        assert len(certified) <= 1, "two blocks have the precommits of a quorum"

    def teardown(self) -> None:
        """Left in peace, with everything that is said arriving, they commit."""
        for _ in range(150):
            heard_of = len(self.posted)
            self.now += 1.0
            for peer in self.working():
                follower = self.voters[peer]
                self.take(peer, follower.tick(now=self.now))
                if follower.leads:
                    self.propose(peer, follower.bound_to or ONE)
                    self.posted += [(peer, to, standing("vote", view=follower.view)) for to in VOTERS]
            self.leaders_count_votes()
            while heard_of < len(self.posted):
                self.deliver(self.posted[heard_of])
                heard_of += 1
            if not self.working():
                return
        raise AssertionError("a quorum that hears each other commits")


Agreeing.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
TestAgreeing = Agreeing.TestCase
