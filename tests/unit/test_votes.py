import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.coordinator.messages import MAX_VOTERS, Voter
from dugnad.coordinator.votes import MIN_EARNERS, QuorumRule, chosen, leaders, weight_of
from dugnad.dht.identity import PeerId
from tests.unit.chains import FOUNDER, committee, digest, disk_of

INVITED, OPEN = QuorumRule(), QuorumRule(open=True)
HEAD = digest("the newest block")
names = st.sampled_from([PeerId(f"p{i}") for i in range(9)])
peers = st.sets(names)
rules = st.sampled_from([INVITED, OPEN])
committees = st.builds(lambda rule, others, credit: committee(*others, rule=rule, credit=credit), rules, peers,
                       st.dictionaries(names | st.just(FOUNDER), st.integers(1, 9)))  # fmt: skip
weighed = (
    st.lists(st.integers(0, 9), min_size=1, max_size=9)
    .filter(any)
    .map(lambda weights: tuple(Voter(PeerId(f"p{i}"), weight, bytes(8)) for i, weight in enumerate(weights)))
)


def members(*peers: PeerId) -> dict[PeerId, bytes]:
    return {peer: disk_of(peer) for peer in peers}


# -- weights


@pytest.mark.parametrize(("num_others", "weight"), [(0, 1), (1, 2), (2, 1), (5, 1), (6, 2), (9, 3), (30, 10)])
def test_by_invitation_the_coordinator_weighs_a_third_of_the_others(num_others: int, weight: int) -> None:
    voters = committee(*(f"p{i:02}" for i in range(num_others)))
    assert voters[0] == Voter(FOUNDER, weight, disk_of(FOUNDER))
    assert [voter.weight for voter in voters[1:]] == [1] * num_others


def test_a_committee_without_a_coordinator_has_one_vote_each() -> None:
    assert [voter.weight for voter in committee("a", "b", "c", "d", seat=None)] == [1] * 4
    assert [voter.weight for voter in committee("a", "b", seat=None)] == [1, 1], "neither outvotes the other"


def test_a_coordinator_goes_on_alone_when_its_only_peer_vanishes() -> None:
    assert INVITED.decided(committee("a"), [FOUNDER])
    assert not INVITED.decided(committee("a"), [PeerId("a")])


@given(peers, rules)
def test_a_committee_does_not_depend_on_the_order_in_which_its_members_are_told(
    others: set[PeerId], rule: QuorumRule
) -> None:
    credit = {peer: 1 + len(peer) for peer in others}
    told = {peer: disk_of(peer) for peer in sorted(others)}
    backwards = {peer: disk_of(peer) for peer in sorted(others, reverse=True)}
    assert rule.weigh(told, None, credit) == rule.weigh(backwards, None, credit)


@pytest.mark.parametrize("earners", [0, 3, 4, 6])
def test_in_an_open_run_votes_weigh_what_was_earned_once_there_are_enough_who_earned(earners: int) -> None:
    names = [f"p{i}" for i in range(6)]
    credit = {PeerId(name): 10 * (i + 1) for i, name in enumerate(names[:earners])}
    voters = {voter.peer: voter.weight for voter in committee(*names, rule=OPEN, credit=credit)}
    if earners < MIN_EARNERS:
        assert voters == {FOUNDER: 2} | dict.fromkeys(map(PeerId, names), 1)
    else:
        assert voters == {peer: credit.get(peer, 0) for peer in voters}, "newcomers and the coordinator weigh nothing"


# -- quorums


@given(weighed | committees, st.data())
def test_any_two_quorums_share_a_voter(voters: tuple[Voter, ...], data: st.DataObject) -> None:
    said = data.draw(st.sets(st.sampled_from([voter.peer for voter in voters])))
    rest = {voter.peer for voter in voters} - said
    for rule in (INVITED, OPEN):
        assert not (rule.decided(voters, said) and rule.decided(voters, rest))


@given(weighed | committees, st.data(), rules)
def test_who_blocks_leaves_no_quorum_to_the_others_and_no_more_are_said_to_block(
    voters: tuple[Voter, ...], data: st.DataObject, rule: QuorumRule
) -> None:
    said = data.draw(st.sets(st.sampled_from([voter.peer for voter in voters])))
    rest = {voter.peer for voter in voters} - said
    assert rule.blocks(voters, said) == (not rule.decided(voters, rest))


@given(weighed, st.data())
def test_two_quorums_of_an_open_run_share_more_weight_than_may_lie(
    voters: tuple[Voter, ...], data: st.DataObject
) -> None:
    one, other = (data.draw(st.sets(st.sampled_from([voter.peer for voter in voters]))) for _ in range(2))
    if OPEN.decided(voters, one) and OPEN.decided(voters, other):
        assert weight_of(voters, one & other) > OPEN.faulty(voters)


@given(weighed | committees, rules)
def test_the_whole_committee_is_a_quorum_and_nobody_is_none(voters: tuple[Voter, ...], rule: QuorumRule) -> None:
    assert rule.decided(voters, [voter.peer for voter in voters])
    assert not rule.decided(voters, [])


@given(weighed)
def test_a_quorum_is_the_least_weight_above_half_or_above_two_thirds(voters: tuple[Voter, ...]) -> None:
    total = sum(voter.weight for voter in voters)
    assert 2 * (INVITED.needed(voters) - 1) <= total < 2 * INVITED.needed(voters)
    if sum(voter.weight > 0 for voter in voters) >= MIN_EARNERS:
        assert 3 * (OPEN.needed(voters) - 1) <= 2 * total < 3 * OPEN.needed(voters)
    else:
        assert OPEN.needed(voters) == INVITED.needed(voters)


def test_without_a_quorum_of_earners_nobody_is_taken_to_lie_and_in_an_open_run_just_under_a_third() -> None:
    four = tuple(Voter(PeerId(f"p{i}"), 10, bytes(8)) for i in range(4))
    assert (OPEN.faulty(four), OPEN.faulty(four[:3]), INVITED.faulty(four)) == (13, 0, 0)


@given(st.integers(2, 40))
def test_no_committee_of_three_or_more_is_ruled_by_its_coordinator(num_others: int) -> None:
    assert not INVITED.decided(committee(*(f"p{i}" for i in range(num_others))), [FOUNDER])


def test_strangers_and_repeated_votes_weigh_nothing() -> None:
    assert weight_of(committee("a", "b"), [PeerId("a"), PeerId("a"), PeerId("stranger")]) == 1


# -- who leads


def test_the_coordinator_leads_first_and_the_others_in_an_order_that_each_block_draws_anew() -> None:
    voters = committee(*(f"p{i}" for i in range(6)))
    orders = [leaders(digest(f"block {i}"), voters, FOUNDER) for i in range(20)]
    assert all(order[0] == FOUNDER for order in orders)
    assert all(sorted(order) == sorted(voter.peer for voter in voters) for order in orders)
    assert len({order[1] for order in orders}) > 1


def test_without_a_coordinator_everyone_leads_in_turn() -> None:
    voters = committee("a", "b", "c", seat=None)
    assert sorted(leaders(HEAD, voters, None)) == ["a", "b", "c"]
    assert leaders(HEAD, voters[::-1], None) == leaders(HEAD, voters, None)


# -- who votes next


def test_few_enough_candidates_are_all_chosen_with_their_disks() -> None:
    told = members(PeerId("a"), PeerId("b"), FOUNDER)
    assert chosen(told, [], FOUNDER, HEAD) == told


def test_of_too_many_the_coordinator_and_those_who_voted_before_stay_and_chance_takes_the_rest() -> None:
    everyone = [PeerId(f"p{i:03}") for i in range(2 * MAX_VOTERS)]
    voted = everyone[-10:]
    one = chosen(members(*everyone, FOUNDER), voted, FOUNDER, HEAD)
    other = chosen(members(*everyone, FOUNDER), voted, FOUNDER, digest("another block"))
    assert len(one) == len(other) == MAX_VOTERS
    assert {FOUNDER, *voted} <= one.keys() & other.keys()
    assert one.keys() != other.keys()
    assert one == chosen(members(FOUNDER, *everyone[::-1]), voted[::-1], FOUNDER, HEAD)


def test_a_coordinator_that_is_no_candidate_is_not_chosen() -> None:
    assert FOUNDER not in chosen(members(PeerId("a")), [FOUNDER], FOUNDER, HEAD)
