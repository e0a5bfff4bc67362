import dataclasses
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.coordinator import ranges
from dugnad.coordinator.audit import Applieds, Audit, audit
from dugnad.coordinator.ledger import Charter
from dugnad.coordinator.messages import Ballot, Block, Commit, Voter
from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import PeerId
from tests.unit.chains import (
    CHARTER,
    FOUNDER,
    GENESIS,
    ORGANIZER,
    SIGNER,
    a_block,
    a_ledger,
    an_entry,
    an_epoch,
    certify,
    committee,
    delegation,
    digest,
    disk_of,
    extend,
    honest_chain,
    honest_chains,
    ledger_of,
    model_after,
    relinked,
)

replace = msgspec.structs.replace
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
VOTERS = (Voter(A, 1, disk_of(A)), Voter(C, 1, disk_of(C)))


def audited(commits: list[Commit], applied: Applieds | None = None) -> Audit:
    return audit(CHARTER, commits, applied or {}, SIGNER)


def audited_blocks(**changes: Callable[[Block], Block]) -> Audit:
    """Audit the honest chain with `round_<n>` changed, linked and signed anew by the whole committee."""
    blocks = {f"round_{commit.block.round}": commit.block for commit in honest_chain()}
    for name, change in changes.items():
        blocks[name] = change(blocks[name])
    return audited(relinked(list(blocks.values())))


def everyone_has(*models: bytes) -> dict[PeerId, bytes]:
    return {PeerId(f"p{i}"): model for i, model in enumerate(models)}


@given(honest_chains())
def test_an_honest_chain_is_clean_and_accounts_for_every_sample(commits: list[Commit]) -> None:
    found = audited(commits, {commit.block.round: {A: model_after(commit.block.round)} for commit in commits})
    last = commits[-1].block
    assert found.clean, found
    assert found.rounds == len(commits)
    assert found.samples_done + ranges.count(last.redo) == last.cursor
    assert found.credit.total() == 7 * found.samples_done
    assert found.ranges_to_redo == last.redo


def test_linking_and_signing_anew_changes_nothing_in_an_honest_chain() -> None:
    assert relinked([commit.block for commit in honest_chain()]) == honest_chain()
    assert audited_blocks().clean


def test_samples_left_undone_at_the_end_are_to_redo_not_lost() -> None:
    found = audited(honest_chain()[:2])
    assert found.clean
    assert (found.samples_done, found.ranges_to_redo, found.ranges_lost) == (43, ((43, 50),), ())


def test_a_lost_range_is_found() -> None:
    found = audited_blocks(round_3=lambda b: replace(b, entries=b.entries[1:]))
    assert (found.clean, found.ranges_lost, found.ranges_doubled) == (False, ((43, 53),), ())


def test_samples_skipped_by_the_cursor_are_lost() -> None:
    found = audited_blocks(round_4=lambda b: replace(b, cursor=70))
    assert (found.clean, found.ranges_lost) == (False, ((63, 70),))


def test_a_range_done_in_two_rounds_is_doubled() -> None:
    found = audited_blocks(round_3=lambda b: replace(b, entries=(an_entry("a", (5, 8), (43, 53)), b.entries[1])))
    assert (found.clean, found.ranges_doubled, found.ranges_lost) == (False, ((5, 8),), ())


def test_a_range_done_by_two_peers_in_one_round_is_doubled() -> None:
    found = audited_blocks(round_1=lambda b: replace(b, entries=(an_entry("a", (0, 12)), b.entries[1])))
    assert (found.clean, found.ranges_doubled) == (False, ((10, 12),))


def test_a_range_done_that_stands_in_redo_is_doubled() -> None:
    found = audited_blocks(round_4=lambda b: replace(b, redo=((0, 3),)))
    assert (found.clean, found.ranges_doubled) == (False, ((0, 3),))


def test_a_range_that_was_never_handed_out_is_found() -> None:
    found = audited_blocks(round_4=lambda b: replace(b, redo=((100, 103),)))
    assert found.faults == ["round 4 names samples beyond its data cursor 63"]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_chain_with_a_round_missing_is_broken(missing: int) -> None:
    commits = honest_chain()
    del commits[missing]
    assert any("does not follow" in fault for fault in audited(commits).faults)


def test_a_block_on_another_parent_breaks_the_link() -> None:
    commits = honest_chain()
    other = replace(commits[3].block, parent=digest("elsewhere"))
    commits[3] = certify(other, [FOUNDER, A, C])
    assert audited(commits).faults == ["round 4 does not follow round 3"]


def test_a_chain_of_another_run_is_foreign_from_its_first_round_on() -> None:
    found = audit(dataclasses.replace(CHARTER, run=digest("another run")), honest_chain()[:1], {}, SIGNER)
    assert found.faults[:2] == ["round 1 does not follow round 0", "round 1 has no quorum of its committee"]


@pytest.mark.parametrize("voters", [[], [FOUNDER, A], [FOUNDER, A, PeerId("stranger")]])
def test_a_commit_without_a_quorum_is_found(voters: list[PeerId]) -> None:
    commits = honest_chain()
    commits[2] = certify(commits[2].block, voters)
    assert audited(commits).faults == ["round 3 has no quorum of its committee"]


@pytest.mark.parametrize("founder", [A, PeerId("stranger")])
def test_the_first_round_needs_the_vote_of_the_true_founder(founder: PeerId) -> None:
    charter = dataclasses.replace(CHARTER, founder=founder, incarnation=disk_of(founder))
    assert not audit(charter, honest_chain(), {}, SIGNER).clean


def test_the_first_round_needs_the_vote_of_the_disk_that_the_genesis_names() -> None:
    charter = dataclasses.replace(CHARTER, incarnation=b"new disk")
    assert audit(charter, honest_chain(), {}, SIGNER).faults == ["round 1 has no quorum of its committee"]


def test_a_committee_with_a_foreigner_is_found() -> None:
    found = audited_blocks(round_2=lambda b: replace(b, committee=committee("a", "stranger")))
    assert found.faults == ["round 2 gives a vote to someone who neither contributed nor voted before"]


@pytest.mark.parametrize(
    "committee",
    [
        (Voter(FOUNDER, 9, disk_of(FOUNDER)), *VOTERS),
        (Voter(FOUNDER, 1, disk_of(FOUNDER)), VOTERS[0], VOTERS[0]),
    ],
    ids=["too heavy", "twice"],
)
def test_a_committee_with_other_weights_is_found(committee: tuple[Voter, ...]) -> None:
    found = audited_blocks(round_3=lambda b: replace(b, committee=committee))
    assert found.faults == ["round 3 gives votes that do not weigh as the quorum rule says"]


@pytest.mark.parametrize("round_", [1, 2, 3, 4])
def test_a_wrong_step_count_is_found_in_the_round_that_says_it(round_: int) -> None:
    found = audited_blocks(**{f"round_{round_}": lambda b: replace(b, global_step=b.global_step + 1)})
    assert found.faults[0].startswith(f"round {round_} says step ")


@pytest.mark.parametrize("round_", [1, 2, 3, 4])
def test_peers_with_differing_models_are_found_after_any_round(round_: int) -> None:
    found = audited(honest_chain(), {round_: everyone_has(model_after(round_), digest("another model"))})
    assert (found.clean, found.digests_agree) == (False, False)
    assert found.faults == [f"model digests after round {round_} differ"]


def test_a_block_built_on_another_model_than_everyone_reported_is_found() -> None:
    found = audited(honest_chain(), {2: everyone_has(digest("another model"), digest("another model"))})
    assert (found.digests_agree, found.faults) == (False, ["model digests after round 2 differ"])


# -- views, terms and epochs


def test_a_round_may_be_certified_in_any_view_but_its_votes_are_of_one() -> None:
    commits = honest_chain()
    commits[2] = certify(commits[2].block, [FOUNDER, A, C], view=4)
    assert audited(commits).clean
    commits[2] = replace(commits[2], view=5)
    assert audited(commits).faults == ["round 3 has no quorum of its committee"]


def test_an_open_run_is_audited_by_the_weights_of_its_own_rule() -> None:
    charter = Charter.of(GENESIS, "open")
    assert charter.rule == QuorumRule(open=True)
    ledger = a_ledger()
    commits = [extend(ledger, *(an_entry(peer, (10 * k, 10 * k + 10)) for k, peer in enumerate("abcd")))]
    earned = dict.fromkeys(map(PeerId, "abcd"), 70)
    weighed = replace(a_block(ledger.head), committee=committee("a", "b", "c", "d", rule=charter.rule, credit=earned))
    commits.append(certify(weighed, ledger.head.voters))
    assert audit(charter, commits, {}, SIGNER).clean
    assert audited(commits).faults == ["round 2 gives votes that do not weigh as the quorum rule says"]


def recovered(**changes: object) -> list[Commit]:
    """A chain whose third round is given up for an epoch that begins on the second, and goes on."""
    commits = honest_chain()[:2]
    ledger = ledger_of(commits)
    began = an_epoch(ledger.head, "a")
    ledger.append(began)
    then = certify(a_block(ledger.head, an_entry("a", (43, 50)), seat=delegation(FOUNDER, 2)), [FOUNDER, A])
    return [*commits, replace(began, **changes), then]


def test_a_chain_that_an_epoch_of_the_organizer_goes_on_with_is_clean() -> None:
    found = audited(recovered())
    assert found.clean, found
    assert (found.rounds, found.samples_done, found.ranges_to_redo) == (4, 50, ())


@pytest.mark.parametrize("ballots", [(), (Ballot(ORGANIZER, bytes(64)),), (Ballot(FOUNDER, bytes(64)),)])
def test_an_epoch_that_the_organizer_did_not_begin_is_found(ballots: tuple[Ballot, ...]) -> None:
    assert audited(recovered(ballots=ballots)).faults == ["epoch 1 was not begun by the organizer"]


def test_an_epoch_that_loses_samples_is_found() -> None:
    commits = recovered()
    ledger = ledger_of(commits[:2])
    began = an_epoch(dataclasses.replace(ledger.head, redo=()), "a")
    assert audited([*commits[:2], began]).ranges_lost == ((43, 50),)


def test_an_epoch_that_goes_back_breaks_the_chain() -> None:
    commits = recovered()
    back = replace(commits[3].block, epoch=0)
    assert "round 4 does not follow round 3" in audited([*commits[:3], certify(back, [FOUNDER, A])]).faults


@pytest.mark.parametrize("seat", [delegation(A, 2, by=A), delegation(FOUNDER, 0)], ids=["not signed", "older"])
def test_a_coordinators_seat_that_the_organizer_did_not_give_is_found(seat: Delegation) -> None:
    given = {"coordinator": seat, "committee": committee("a", "c", seat=seat)}
    found = audited_blocks(round_3=lambda b: replace(b, **given))
    assert found.faults[0] == (f"round 3 gives the coordinator's seat to term {seat.term}, unsigned or older than 1")


def test_an_empty_chain_is_clean_and_proves_nothing() -> None:
    assert audited([]) == Audit()


@given(honest_chains(), st.data())
def test_no_contribution_can_vanish_unseen(commits: list[Commit], data: st.DataObject) -> None:
    blocks = [commit.block for commit in commits]
    worked = [i for i, block in enumerate(blocks) if block.entries]
    if not worked:
        return
    i = data.draw(st.sampled_from(worked))
    gone = data.draw(st.sampled_from(blocks[i].entries))
    blocks[i] = replace(blocks[i], entries=tuple(entry for entry in blocks[i].entries if entry is not gone))
    assert audited(relinked(blocks)).ranges_lost == ranges.normal(gone.ranges)
