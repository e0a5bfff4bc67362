import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.coordinator.messages import Ballot, Voter
from dugnad.coordinator.votes import certified_by, committee_of, has_quorum, quorum_weight, weight_of
from dugnad.dht.identity import PeerId
from tests.unit.chains import FOUNDER, SIGNER, FakeSigner

peers = st.sets(st.sampled_from([PeerId(f"p{i}") for i in range(9)]))
committees = peers.map(lambda others: committee_of(FOUNDER, others))
weighed = st.lists(st.integers(1, 9), min_size=1, max_size=9).map(
    lambda weights: tuple(Voter(PeerId(f"p{i}"), weight) for i, weight in enumerate(weights))
)


@pytest.mark.parametrize(("num_others", "weight"), [(0, 1), (1, 2), (2, 1), (5, 1), (6, 2), (9, 3), (30, 10)])
def test_the_coordinator_weighs_a_third_of_the_others(num_others: int, weight: int) -> None:
    committee = committee_of(FOUNDER, [PeerId(f"p{i:02}") for i in range(num_others)])
    assert committee[0] == Voter(FOUNDER, weight)
    assert [voter.weight for voter in committee[1:]] == [1] * num_others


def test_a_coordinator_goes_on_alone_when_its_only_peer_vanishes() -> None:
    assert has_quorum(committee_of(FOUNDER, [PeerId("a")]), [FOUNDER])
    assert not has_quorum(committee_of(FOUNDER, [PeerId("a")]), [PeerId("a")])


@given(peers)
def test_a_committee_does_not_depend_on_the_order_or_on_naming_the_coordinator_twice(others: set[PeerId]) -> None:
    assert committee_of(FOUNDER, sorted(others)) == committee_of(FOUNDER, [*sorted(others, reverse=True), FOUNDER])


@given(weighed | committees, st.data())
def test_any_two_quorums_share_a_voter(committee: tuple[Voter, ...], data: st.DataObject) -> None:
    said = data.draw(st.sets(st.sampled_from([voter.peer for voter in committee])))
    rest = {voter.peer for voter in committee} - said
    assert not (has_quorum(committee, said) and has_quorum(committee, rest))


@given(weighed | committees)
def test_the_whole_committee_is_a_quorum_and_nobody_is_none(committee: tuple[Voter, ...]) -> None:
    assert has_quorum(committee, [voter.peer for voter in committee])
    assert not has_quorum(committee, [])


@given(weighed)
def test_a_quorum_is_the_least_weight_above_half(committee: tuple[Voter, ...]) -> None:
    total = sum(voter.weight for voter in committee)
    assert 2 * (quorum_weight(committee) - 1) <= total < 2 * quorum_weight(committee)


@given(st.integers(2, 40))
def test_no_committee_of_three_or_more_is_ruled_by_its_coordinator(num_others: int) -> None:
    assert not has_quorum(committee_of(FOUNDER, [PeerId(f"p{i}") for i in range(num_others)]), [FOUNDER])


def test_strangers_and_repeated_votes_weigh_nothing() -> None:
    committee = committee_of(FOUNDER, [PeerId("a"), PeerId("b")])
    assert weight_of(committee, [PeerId("a"), PeerId("a"), PeerId("stranger")]) == 1


def test_only_ballots_signed_by_their_peer_over_that_payload_count() -> None:
    a, b, c = PeerId("a"), PeerId("b"), PeerId("c")
    ballots = [
        Ballot(a, FakeSigner(a).sign(b"block")),
        Ballot(b, FakeSigner(a).sign(b"block")),
        Ballot(c, FakeSigner(c).sign(b"another block")),
    ]
    assert certified_by(SIGNER, b"block", ballots) == {a}
