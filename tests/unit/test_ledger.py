from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given

from dugnad.coordinator.ledger import Ledger, LedgerError
from dugnad.coordinator.messages import Ballot, Block, Commit, Voter
from dugnad.coordinator.votes import committee_of
from dugnad.dht.identity import PeerId
from tests.unit.chains import (
    FOUNDER,
    RUN,
    SIGNER,
    FakeSigner,
    a_block,
    an_entry,
    certify,
    digest,
    honest_chain,
    honest_chains,
    ledger_of,
)

replace = msgspec.structs.replace
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


@pytest.fixture
def ledger() -> Ledger:
    """After round 2: samples 43-49 are to be redone, new ones begin at 50, and founder, a, b, c vote."""
    return ledger_of(honest_chain()[:2])


def a_good_block(ledger: Ledger) -> Block:
    return a_block(ledger.head, an_entry("a", (43, 50)), an_entry("d", (50, 60)), redo=((60, 65),))


FORGERIES: dict[str, tuple[Callable[[Block], Block], str]] = {
    "another parent": (lambda b: replace(b, parent=digest("elsewhere")), "does not follow"),
    "a round skipped": (lambda b: replace(b, round=b.round + 1), "does not follow"),
    "a round repeated": (lambda b: replace(b, round=b.round - 1), "does not follow"),
    "another epoch": (lambda b: replace(b, epoch=1), "does not follow"),
    "too many steps": (lambda b: replace(b, global_step=b.global_step + 1), "was expected"),
    "steps without work": (lambda b: replace(b, entries=(), redo=((43, 65),)), "or none of them"),
    "work without parts": (lambda b: replace(b, parts=()), "or none of them"),
    "work without steps": (lambda b: replace(b, steps=0, global_step=b.global_step - b.steps), "or none of them"),
    "contributions out of order": (lambda b: replace(b, entries=b.entries[::-1]), "peer-id order"),
    "two contributions of one peer": (
        lambda b: replace(b, entries=(an_entry("a", (43, 50)), an_entry("a", (50, 60)))),
        "one peer has two",
    ),
    "a contribution without tokens": (
        lambda b: replace(b, entries=(replace(b.entries[0], tokens=0), b.entries[1])),
        "without tokens",
    ),
    "a contribution without samples": (
        lambda b: replace(b, entries=(replace(b.entries[0], ranges=()), b.entries[1]), redo=((43, 50), (60, 65))),
        "without tokens",
    ),
    "a cursor that goes back": (lambda b: replace(b, cursor=49), "went back"),
    "a range lost": (lambda b: replace(b, redo=()), "lost or invented"),
    "a range to be redone lost": (lambda b: replace(b, entries=b.entries[1:]), "lost or invented"),
    "a range invented": (lambda b: replace(b, redo=((60, 70),)), "lost or invented"),
    "a range of a round long done": (lambda b: replace(b, redo=((0, 5), (60, 65))), "lost or invented"),
    "a range done and to be redone": (lambda b: replace(b, redo=((55, 65),)), "doubled"),
    "a range done twice": (
        lambda b: replace(b, entries=(an_entry("a", (43, 51)), an_entry("d", (50, 60)))),
        "doubled",
    ),
    "an empty range": (lambda b: replace(b, redo=((60, 60), (60, 65))), "empty"),
    "a backwards range": (lambda b: replace(b, redo=((65, 60), (60, 65))), "backwards"),
    "a voter from nowhere": (
        lambda b: replace(b, committee=committee_of(FOUNDER, [A, PeerId("stranger")])),
        "neither contributed nor voted",
    ),
    "a voter named twice": (
        lambda b: replace(b, committee=(*b.committee, b.committee[-1])),
        "or twice",
    ),
    "a voter that weighs too much": (
        lambda b: replace(b, committee=(*b.committee[:-1], Voter(PeerId("d"), 9))),
        "weights",
    ),
}


def test_a_new_ledger_stands_at_genesis_with_the_founder_as_its_whole_committee() -> None:
    head = Ledger(RUN, FOUNDER).head
    assert (head.round, head.hash, head.global_step, head.cursor) == (0, RUN, 0, 0)
    assert head.committee == (Voter(FOUNDER, 1),)


@given(honest_chains())
def test_every_honest_round_is_accepted_and_credited(commits: list[Commit]) -> None:
    ledger = ledger_of(commits)
    block = commits[-1].block
    assert (ledger.head.round, ledger.head.hash, ledger.head.cursor) == (block.round, block.hash, block.cursor)
    assert ledger.tip == commits[-1]
    assert ledger.credit.total() == sum(entry.tokens for commit in commits for entry in commit.block.entries)


def test_a_block_that_changes_only_the_committee_moves_nothing_else(ledger: Ledger) -> None:
    before = ledger.head
    block = replace(a_block(before, redo=before.redo), committee=committee_of(FOUNDER, [A, B]))
    ledger.append(certify(block, [FOUNDER, A, B]))
    assert (ledger.head.global_step, ledger.head.redo, ledger.head.cursor) == (before.global_step, before.redo, 50)
    assert ledger.head.committee == committee_of(FOUNDER, [A, B])


def test_who_did_not_contribute_may_keep_the_vote_it_had(ledger: Ledger) -> None:
    ledger.check(replace(a_good_block(ledger), committee=committee_of(FOUNDER, [B, C])))


def test_the_block_that_every_forgery_is_made_from_is_valid(ledger: Ledger) -> None:
    ledger.check(a_good_block(ledger))


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_block_is_refused_with_its_reason_and_moves_nothing(ledger: Ledger, name: str) -> None:
    forge, why = FORGERIES[name]
    before, credit = ledger.head, ledger.credit.copy()
    everyone = [voter.peer for voter in before.committee]
    with pytest.raises(LedgerError, match=why):
        ledger.append(certify(forge(a_good_block(ledger)), everyone))
    assert (ledger.head, ledger.credit) == (before, credit)


@pytest.mark.parametrize(
    ("voters", "proven"),
    [
        ([FOUNDER, A, B, C], True),
        ([A, B, C], True),  # without the founder, while it is away
        ([FOUNDER, A], False),  # two of four votes
        ([FOUNDER, A, PeerId("d")], False),  # d contributes, but votes only from the next round on
        ([], False),
    ],
)
def test_a_commit_needs_more_than_half_of_the_committee(ledger: Ledger, voters: list[PeerId], proven: bool) -> None:
    commit = certify(a_good_block(ledger), voters)
    if proven:
        ledger.check_commit(commit, SIGNER)
    else:
        with pytest.raises(LedgerError, match="not a quorum"):
            ledger.check_commit(commit, SIGNER)


def test_one_voter_signing_three_times_is_no_quorum(ledger: Ledger) -> None:
    commit = certify(a_good_block(ledger), [A])
    with pytest.raises(LedgerError, match="not a quorum"):
        ledger.check_commit(replace(commit, ballots=commit.ballots * 3), SIGNER)


def test_votes_in_the_names_of_others_do_not_count(ledger: Ledger) -> None:
    commit = certify(a_good_block(ledger), [A])
    stolen = tuple(Ballot(peer, commit.ballots[0].signature) for peer in (FOUNDER, A, B, C))
    with pytest.raises(LedgerError, match="not a quorum"):
        ledger.check_commit(replace(commit, ballots=stolen), SIGNER)


@pytest.mark.parametrize("change", [{"view": 1}, {"term": 2}, {"model_before": digest("another model")}])
def test_votes_on_one_block_prove_no_other(ledger: Ledger, change: dict[str, int | bytes]) -> None:
    commit = certify(a_good_block(ledger), [FOUNDER, A, B, C])
    with pytest.raises(LedgerError, match="not a quorum"):
        ledger.check_commit(replace(commit, block=replace(commit.block, **change)), SIGNER)


def test_votes_of_another_run_prove_nothing_here() -> None:
    here, there = Ledger(digest("another run"), FOUNDER), Ledger(RUN, FOUNDER)
    block = replace(a_block(there.head, an_entry("a", (0, 10))), parent=here.run)
    with pytest.raises(LedgerError, match="not a quorum"):
        here.check_commit(certify(block, [FOUNDER]), FakeSigner(A))
