from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dugnad.coordinator.follower import (
    FETCH_AFTER_S,
    REPLAY_ROUNDS,
    RETRY_S,
    Apply,
    CatchUp,
    Effect,
    Fetch,
    Follower,
    Refused,
    Resync,
    Send,
    Store,
)
from dugnad.coordinator.ledger import Ledger
from dugnad.coordinator.messages import (
    Applied,
    Block,
    Commit,
    Delegation,
    Message,
    Proposal,
    Vote,
    applied_payload,
    delegation_payload,
    vote_payload,
)
from dugnad.dht.identity import PeerId
from tests.unit.chains import FOUNDER, GENESIS, NO_COST, RUN, FakeSigner, an_entry, certify, digest, extend, model_after

ME, ANN, EVE = PeerId("a"), PeerId("b"), PeerId("eve")
replace = msgspec.structs.replace


def delegation(leader: PeerId, term: int, *, by: PeerId = GENESIS.organizer) -> Delegation:
    return Delegation(leader, term, FakeSigner(by).sign(delegation_payload(RUN, leader, term)))


def chain(rounds: int) -> list[Commit]:
    """Rounds in which two peers, one of them `ME`, do ten samples each."""
    ledger = Ledger(RUN, FOUNDER)
    starts = range(0, 20 * rounds, 20)
    return [extend(ledger, an_entry(ME, (k, k + 10)), an_entry(ANN, (k + 10, k + 20))) for k in starts]


CHAIN = chain(REPLAY_ROUNDS + 10)


def proposal(round_: int, *, term: int = 1, view: int = 0, part: str = "average") -> Proposal:
    """A block for `round_` of the chain, as a leader may propose it; of another view, term or part it is another."""
    block = CHAIN[round_ - 1].block
    return Proposal(replace(block, term=term, view=view, parts=(digest(f"{part} of round {round_}"),)))


def a_follower(rounds: int = 1, *, me: PeerId = ME) -> Follower:
    """One that has applied that many rounds and knows its leader."""
    follower = Follower(FakeSigner(me), Ledger(RUN, FOUNDER), GENESIS.organizer)
    follower.restore(CHAIN[:rounds], ())
    follower.receive(FOUNDER, delegation(FOUNDER, 1), now=0.0)
    assert follower.synced(rounds, model_after(rounds), (), now=0.0) == []
    return follower


def votes(effects: Iterable[Effect]) -> list[Vote]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Vote)]


def kinds(effects: Iterable[Effect]) -> list[type[Effect]]:
    return [type(effect) for effect in effects]


# -- who leads


def test_of_two_delegations_the_higher_term_holds() -> None:
    follower = a_follower()
    assert follower.receive(EVE, delegation(ANN, 3), now=0.0) == []
    assert follower.receive(EVE, delegation(EVE, 2), now=0.0) == []
    assert (follower.leader, follower.term) == (ANN, 3)
    assert follower.delegation == delegation(ANN, 3)


def test_a_delegation_that_the_organizer_did_not_sign_is_refused() -> None:
    follower = a_follower()
    assert kinds(follower.receive(EVE, delegation(EVE, 9, by=EVE), now=0.0)) == [Refused]
    assert (follower.leader, follower.term) == (FOUNDER, 1)


def test_a_new_leader_hears_what_was_applied_last() -> None:
    follower = a_follower()
    follower.holds(CHAIN[1].block.parts, now=0.0)
    follower.receive(FOUNDER, CHAIN[1], now=0.0)
    follower.applied(2, model_after(2), NO_COST, now=0.0)
    (said,) = follower.receive(EVE, delegation(ANN, 2), now=0.0)
    assert isinstance(said, Send)
    assert isinstance(said.message, Applied)
    assert (said.to, said.message.round, said.message.model) == ((ANN,), 2, model_after(2))


# -- votes


def test_it_votes_once_all_bytes_are_held_and_its_vote_is_signed_for_that_block() -> None:
    follower = a_follower()
    block = proposal(2).block
    assert follower.receive(FOUNDER, Proposal(block), now=0.0) == []
    (sent,) = follower.holds(block.parts, now=0.1)
    assert isinstance(sent, Send)
    assert sent.to == (FOUNDER,)
    (vote,) = votes([sent])
    assert vote.block == block.hash
    assert FakeSigner(ME).verify(ME, vote_payload(RUN, 0, 2, 1, 0, block.hash), vote.signature)


def test_a_vote_waits_for_the_last_of_many_parts() -> None:
    follower = a_follower()
    block = replace(proposal(2).block, parts=(digest("one"), digest("two"), digest("three")))
    follower.receive(FOUNDER, Proposal(block), now=0.0)
    assert follower.holds(block.parts[:1], now=0.0) == []
    assert follower.holds(block.parts[2:], now=0.0) == []
    assert len(votes(follower.holds(block.parts[1:2], now=0.0))) == 1


def test_bytes_that_came_before_the_proposal_count() -> None:
    follower = a_follower()
    follower.holds(proposal(2).block.parts, now=0.0)
    assert len(votes(follower.receive(FOUNDER, proposal(2), now=0.0))) == 1


def test_a_proposal_said_again_gets_the_same_vote_again() -> None:
    follower = a_follower()
    follower.holds(proposal(2).block.parts, now=0.0)
    first = votes(follower.receive(FOUNDER, proposal(2), now=0.0))
    assert votes(follower.receive(FOUNDER, proposal(2), now=1.0)) == first


def test_it_never_votes_for_a_second_block_in_one_view() -> None:
    follower = a_follower()
    first, second = proposal(2), proposal(2, part="other")
    follower.holds((*first.block.parts, *second.block.parts), now=0.0)
    assert len(votes(follower.receive(FOUNDER, first, now=0.0))) == 1
    again = votes(follower.receive(FOUNDER, second, now=0.0))
    assert {vote.block for vote in again} <= {first.block.hash}


def test_a_later_view_gets_a_vote_and_an_earlier_one_none_any_more() -> None:
    follower = a_follower()
    later, earlier = proposal(2, view=2), proposal(2, view=1, part="other")
    follower.holds((*later.block.parts, *earlier.block.parts), now=0.0)
    assert [vote.view for vote in votes(follower.receive(FOUNDER, proposal(2), now=0.0))] == [0]
    assert [vote.view for vote in votes(follower.receive(FOUNDER, later, now=0.0))] == [2]
    assert {vote.view for vote in votes(follower.receive(FOUNDER, earlier, now=0.0))} <= {2}


def test_a_vote_is_not_forgotten_when_another_proposal_makes_it_take_the_model_anew() -> None:
    follower = a_follower()
    blocks = [proposal(2, view=view).block for view in (0, 1)]
    twins = [proposal(2, view=view, part="other").block for view in (0, 1)]
    foreign = replace(proposal(2, view=2).block, model_before=digest("another model"))
    follower.holds(tuple(part for block in (*blocks, *twins) for part in block.parts), now=0.0)
    for block in blocks:
        assert [vote.block for vote in votes(follower.receive(FOUNDER, Proposal(block), now=0.0))] == [block.hash]
    assert kinds(follower.receive(FOUNDER, Proposal(foreign), now=0.0)) == [Resync]
    assert follower.synced(1, model_after(1), (), now=1.0) == []
    for block in twins:
        assert kinds(follower.receive(FOUNDER, Proposal(block), now=1.0)) == [Refused]


def test_who_has_no_vote_holds_the_bytes_and_says_nothing() -> None:
    follower = a_follower(me=EVE)
    follower.holds(proposal(2).block.parts, now=0.0)
    assert follower.receive(FOUNDER, proposal(2), now=0.0) == []


@pytest.mark.parametrize(
    ("sender", "said"),
    [(EVE, proposal(2)), (ANN, proposal(2)), (FOUNDER, proposal(2, term=2)), (FOUNDER, proposal(2, term=0))],
    ids=["a stranger", "a voter", "a later term", "an earlier term"],
)
def test_a_proposal_of_one_who_does_not_lead_this_term_is_refused(sender: PeerId, said: Proposal) -> None:
    follower = a_follower()
    follower.holds(said.block.parts, now=0.0)
    assert kinds(follower.receive(sender, said, now=0.0)) == [Refused]


@pytest.mark.parametrize(
    "changed",
    [
        {"parent": digest("another chain")},
        {"epoch": 1},
        {"cursor": 41},
        {"redo": ((0, 5),)},
        {"global_step": 0},
        {"parts": ()},
        {"committee": CHAIN[0].block.committee[1:]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_block_that_breaks_the_chain_gets_no_vote(changed: dict[str, object]) -> None:
    follower = a_follower()
    block = replace(proposal(2).block, **changed)
    follower.holds(proposal(2).block.parts, now=0.0)
    assert kinds(follower.receive(FOUNDER, Proposal(block), now=0.0)) == [Refused]
    assert follower.tick(now=60.0) == []


def test_a_proposal_of_a_round_long_committed_is_passed_over() -> None:
    follower = a_follower(3)
    assert follower.receive(FOUNDER, proposal(3), now=0.0) == []
    assert follower.tick(now=60.0) == []


def test_a_model_that_differs_from_the_committees_is_given_up_instead_of_voted_on() -> None:
    follower = a_follower()
    follower.synced(1, digest("a wrong model"), (), now=0.0)
    follower.holds(proposal(2).block.parts, now=0.0)
    assert kinds(follower.receive(FOUNDER, proposal(2), now=0.0)) == [Resync]
    assert not follower.at_head
    assert follower.receive(FOUNDER, proposal(2), now=1.0) == []
    assert len(votes(follower.synced(1, model_after(1), (), now=2.0))) == 1


def test_one_that_has_no_model_yet_does_not_vote() -> None:
    follower = Follower(FakeSigner(ME), Ledger(RUN, FOUNDER), GENESIS.organizer)
    follower.restore(CHAIN[:1], proposal(2).block.parts)
    follower.receive(FOUNDER, delegation(FOUNDER, 1), now=0.0)
    assert follower.receive(FOUNDER, proposal(2), now=0.0) == []
    assert len(votes(follower.synced(1, model_after(1), (), now=0.0))) == 1


# -- commits


def test_a_commit_is_stored_before_anything_else_and_then_applied_and_said() -> None:
    follower = a_follower()
    follower.holds(CHAIN[1].block.parts, now=0.0)
    assert follower.receive(FOUNDER, CHAIN[1], now=0.0) == [Store(CHAIN[1]), Apply(CHAIN[1])]
    assert not follower.at_head
    (said,) = follower.applied(2, model_after(2), NO_COST, now=0.1)
    assert follower.at_head
    assert isinstance(said, Send)
    assert isinstance(said.message, Applied)
    assert said.to == (FOUNDER,)
    payload = applied_payload(RUN, 2, CHAIN[1].block.hash, model_after(2))
    assert FakeSigner(ME).verify(ME, payload, said.message.signature)


def test_a_commit_counts_from_whoever_it_comes() -> None:
    follower = a_follower()
    assert follower.receive(EVE, CHAIN[1], now=0.0)[0] == Store(CHAIN[1])


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
    assert kinds(follower.receive(FOUNDER, commit, now=0.0)) == [Refused]
    assert follower.ledger.head.round == 1


def test_ballots_that_are_repeated_or_not_of_that_block_make_no_quorum() -> None:
    follower = a_follower()
    (ballot,) = certify(CHAIN[1].block, [ANN]).ballots
    others = certify(proposal(2, view=7).block, [FOUNDER, ME]).ballots
    for ballots in ((ballot, ballot, ballot), (ballot, *others)):
        assert kinds(follower.receive(FOUNDER, Commit(CHAIN[1].block, ballots), now=0.0)) == [Refused]


def test_a_commit_from_ahead_starts_one_catch_up_at_a_time() -> None:
    follower = a_follower()
    assert follower.receive(ANN, CHAIN[4], now=0.0) == [CatchUp(ANN, 1)]
    assert follower.receive(ANN, CHAIN[4], now=RETRY_S - 0.1) == []
    assert follower.receive(ANN, CHAIN[4], now=RETRY_S) == [CatchUp(ANN, 1)]
    assert follower.receive(FOUNDER, proposal(6), now=2 * RETRY_S) == [CatchUp(FOUNDER, 1)]


def test_parts_that_were_applied_are_held_no_longer_for_a_later_round() -> None:
    follower = a_follower()
    follower.holds(CHAIN[1].block.parts, now=0.0)
    follower.receive(FOUNDER, CHAIN[1], now=0.0)
    follower.applied(2, model_after(2), NO_COST, now=0.0)
    again = replace(proposal(3).block, parts=CHAIN[1].block.parts)
    assert follower.receive(FOUNDER, Proposal(again), now=0.0) == []


# -- what is missing


def test_proposed_parts_are_fetched_after_a_while_from_contributors_and_the_leader_last() -> None:
    follower = a_follower()
    block = replace(proposal(2).block, parts=(digest("one"), digest("two"), digest("three")))
    follower.receive(FOUNDER, Proposal(block), now=10.0)
    follower.holds(block.parts[1:2], now=10.1)
    assert follower.wake_at() == 10.0 + FETCH_AFTER_S
    assert follower.tick(now=10.0 + FETCH_AFTER_S - 0.1) == []
    wanted = ((0, block.parts[0]), (2, block.parts[2]))
    assert follower.tick(now=10.0 + FETCH_AFTER_S) == [Fetch(wanted, (ANN, FOUNDER))]
    assert follower.wake_at() == 10.0 + FETCH_AFTER_S + RETRY_S
    follower.holds(block.parts[:1], now=13.0)
    assert follower.tick(now=10.0 + FETCH_AFTER_S + RETRY_S) == [Fetch(wanted[1:], (ANN, FOUNDER))]


def test_nothing_is_fetched_once_all_is_held() -> None:
    follower = a_follower()
    follower.receive(FOUNDER, proposal(2), now=0.0)
    follower.holds(proposal(2).block.parts, now=0.1)
    assert follower.wake_at() == float("inf")
    assert follower.tick(now=60.0) == []


def test_committed_parts_that_are_still_on_their_way_are_fetched_only_after_a_while() -> None:
    follower = a_follower()
    follower.receive(FOUNDER, Proposal(CHAIN[1].block), now=0.0)
    assert follower.receive(FOUNDER, CHAIN[1], now=1.0) == [Store(CHAIN[1])]
    (fetch,) = follower.tick(now=1.0 + FETCH_AFTER_S)
    assert isinstance(fetch, Fetch)
    assert fetch.wanted == ((0, CHAIN[1].block.parts[0]),)
    assert fetch.donors == (ANN, FOUNDER), "those who signed that they hold it, and the leader last"


# -- a restart, and far behind


def test_after_a_restart_the_rounds_between_the_model_and_the_head_are_replayed() -> None:
    follower = Follower(FakeSigner(ME), Ledger(RUN, FOUNDER), GENESIS.organizer)
    follower.restore(CHAIN[:4], [part for commit in CHAIN[:3] for part in commit.block.parts])
    assert follower.ledger.head.round == 4
    assert follower.synced(2, model_after(2), CHAIN[2:4], now=0.0) == [Apply(CHAIN[2])]
    (fetch,) = follower.applied(3, model_after(3), NO_COST, now=0.0)
    assert isinstance(fetch, Fetch)
    assert fetch.wanted == tuple(enumerate(CHAIN[3].block.parts))
    assert follower.holds(CHAIN[3].block.parts, now=1.0) == [Apply(CHAIN[3])]


def test_a_restart_with_the_model_of_the_head_has_nothing_to_replay() -> None:
    follower = Follower(FakeSigner(ME), Ledger(RUN, FOUNDER), GENESIS.organizer)
    follower.restore(CHAIN[:4], ())
    assert follower.synced(4, model_after(4), (), now=0.0) == []
    assert follower.at_head


@pytest.mark.parametrize("behind", [REPLAY_ROUNDS, REPLAY_ROUNDS + 1])
def test_too_many_rounds_behind_it_takes_the_model_instead_of_replaying(behind: int) -> None:
    follower = Follower(FakeSigner(ME), Ledger(RUN, FOUNDER), GENESIS.organizer)
    follower.restore(CHAIN[: behind + 1], ())
    effects = follower.synced(1, model_after(1), CHAIN[1 : behind + 1], now=0.0)
    assert kinds(effects) == [Fetch if behind <= REPLAY_ROUNDS else Resync]
    if behind > REPLAY_ROUNDS:
        missing = follower.synced(behind, model_after(behind), CHAIN[behind : behind + 1], now=1.0)
        assert [e.wanted for e in missing if isinstance(e, Fetch)] == [tuple(enumerate(CHAIN[behind].block.parts))]
        assert follower.synced(behind + 1, model_after(behind + 1), (), now=1.0) == []
        assert follower.at_head


def test_many_commits_that_arrive_while_one_is_applied_do_not_confuse_which_one_it_was() -> None:
    follower = a_follower()
    follower.holds(CHAIN[1].block.parts, now=0.0)
    assert follower.receive(FOUNDER, CHAIN[1], now=0.0) == [Store(CHAIN[1]), Apply(CHAIN[1])]
    for commit in CHAIN[2 : REPLAY_ROUNDS + 5]:
        assert follower.receive(FOUNDER, commit, now=0.0) == [Store(commit)]
    effects = follower.applied(2, model_after(2), NO_COST, now=1.0)
    assert kinds(effects) == [Send, Resync]


def test_only_delegations_proposals_and_commits_are_its_to_receive() -> None:
    follower = a_follower()
    said: list[Message] = [delegation(ANN, 2), proposal(2), CHAIN[1]]
    assert all(follower.handles(message) for message in said)
    assert not follower.handles(Vote(0, 2, 1, 0, bytes(32), bytes(64)))


# -- every order of everything


class Following(RuleBasedStateMachine):
    """A follower under proposals and commits of a round, in any order, with a crash now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.held: set[bytes] = set()
        self.stored: list[Commit] = []
        self.voted: dict[tuple[int, int, int], bytes] = {}
        self.model_round = 0
        self.applying: Commit | None = None
        self.follower = self.started()

    def started(self) -> Follower:
        follower = Follower(FakeSigner(ME), Ledger(RUN, FOUNDER), GENESIS.organizer)
        follower.restore(self.stored, self.held)
        follower.receive(FOUNDER, delegation(FOUNDER, 1), now=self.now)
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
                case Apply(commit):
                    assert self.applying is None, "one commit is applied at a time"
                    assert commit.block.round == self.model_round + 1, "commits are applied in order"
                    assert commit in self.stored, "nothing is applied that was not committed and stored"
                    assert set(commit.block.parts) <= self.held, "nothing is applied that is not held"
                    self.applying = commit
                case Send(_, Vote() as vote):
                    self.check_vote(vote)
                case Fetch(wanted, donors):
                    assert wanted
                    assert not {digest_ for _, digest_ in wanted} & self.held, "nothing is fetched that is held"
                    assert ME not in donors
                case Resync():
                    raise AssertionError("this model is everyone's")

    def check_vote(self, vote: Vote) -> None:
        order = (vote.round, vote.term, vote.view)
        assert self.voted.setdefault(order, vote.block) == vote.block, "one vote in a view"
        assert vote.round == len(self.stored) + 1 == self.model_round + 1, "votes are cast at the head"
        block = next(b for b in self.blocks() if b.hash == vote.block)
        assert set(block.parts) <= self.held, "nobody votes for bytes that it does not hold"

    def blocks(self) -> list[Block]:
        round_ = min(self.follower.ledger.head.round + 1, 30)
        twins = [proposal(round_, view=view, part=part).block for view in range(3) for part in ("average", "other")]
        return [CHAIN[round_ - 1].block, *twins]

    @rule(data=st.data())
    def propose(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.blocks()))
        self.take(self.follower.receive(FOUNDER, Proposal(block), now=self.now))

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
        self.voted.clear()  # votes are on no disk: that a leader proposes one block in a view is what a term is for
        self.follower = self.started()
        since = self.stored[self.model_round :]
        self.take(self.follower.synced(self.model_round, model_after(self.model_round), since, now=self.now))

    @rule(seconds=st.sampled_from([0.0, FETCH_AFTER_S, 10.0]))
    def time_passes(self, seconds: float) -> None:
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


Following.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestFollowing = Following.TestCase
