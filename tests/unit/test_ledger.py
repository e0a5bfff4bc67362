import dataclasses
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given

from dugnad.coordinator.ledger import KEPT_BLOCKS, Charter, Ledger, LedgerError
from dugnad.coordinator.messages import PRECOMMIT, PREVOTE, Ballot, Block, Commit, Voter, epoch_payload
from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.identity import PeerId
from tests.unit.chains import (
    FOUNDER,
    GENESIS,
    ORGANIZER,
    RUN,
    SEAT,
    SIGNER,
    FakeSigner,
    a_block,
    a_ledger,
    an_entry,
    an_epoch,
    ballots,
    certify,
    committee,
    delegation,
    digest,
    disk_of,
    extend,
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
        lambda b: replace(b, committee=committee("a", "stranger")),
        "neither contributed nor voted",
    ),
    "a voter named twice": (
        lambda b: replace(b, committee=(*b.committee, b.committee[-1])),
        "someone twice",
    ),
    "a voter that weighs too much": (
        lambda b: replace(b, committee=(*b.committee[:-1], replace(b.committee[-1], weight=9))),
        "weights",
    ),
    "a coordinator without a seat that weighs as if it had one": (
        lambda b: replace(b, coordinator=None, committee=(Voter(FOUNDER, 2, disk_of(FOUNDER)), *committee("a")[1:])),
        "weights",
    ),
    "a coordinator of an earlier term": (lambda b: replace(b, coordinator=delegation(FOUNDER, 0)), "older than 1"),
    "a coordinator that the organizer did not name": (
        lambda b: replace(b, coordinator=delegation(A, 2, by=A)),
        "unsigned",
    ),
    "a coordinator's seat for one who is not in the committee": (
        lambda b: replace(b, coordinator=delegation(PeerId("new"), 2)),
        "lacks the coordinator",
    ),
}


# -- blocks


def test_a_new_ledger_stands_at_genesis_with_the_founder_as_its_whole_committee() -> None:
    head = a_ledger().head
    assert (head.epoch, head.round, head.hash, head.global_step, head.cursor) == (0, 0, RUN, 0, 0)
    assert head.committee == (Voter(FOUNDER, 1, disk_of(FOUNDER)),)
    assert (head.leader(0), head.leader(7), head.coordinator, head.term) == (FOUNDER, FOUNDER, FOUNDER, 0)


@pytest.mark.parametrize("kind", ["invited", "allow-list", "open"])
def test_a_charter_is_what_the_genesis_fixes(kind: str) -> None:
    rule = QuorumRule(open=kind == "open")
    assert Charter.of(GENESIS, kind) == Charter(GENESIS.run, ORGANIZER, FOUNDER, GENESIS.incarnation, rule, kind)


@given(honest_chains())
def test_every_honest_round_is_accepted_and_credited(commits: list[Commit]) -> None:
    ledger = ledger_of(commits)
    block = commits[-1].block
    assert (ledger.head.round, ledger.head.hash, ledger.head.cursor) == (block.round, block.hash, block.cursor)
    assert ledger.tip == commits[-1]
    assert ledger.credit.total() == sum(entry.tokens for commit in commits for entry in commit.block.entries)
    worked = [len(commit.block.entries) for commit in commits if commit.block.entries]
    assert ledger.head.contributors == (worked[-1] if worked else 0)


def test_a_block_that_changes_only_the_committee_moves_nothing_else(ledger: Ledger) -> None:
    before = ledger.head
    block = replace(a_block(before, redo=before.redo), committee=committee("a", "b"))
    ledger.check(block)
    ledger.append(certify(block, [FOUNDER, A, B]))
    assert (ledger.head.global_step, ledger.head.redo, ledger.head.cursor) == (before.global_step, before.redo, 50)
    assert ledger.head.committee == committee("a", "b")
    assert ledger.head.contributors == before.contributors


def test_who_did_not_contribute_may_keep_the_vote_it_had(ledger: Ledger) -> None:
    ledger.check(replace(a_good_block(ledger), committee=committee("b", "c")))


def test_a_block_may_name_another_disk_of_a_voter(ledger: Ledger) -> None:
    block = a_good_block(ledger)
    fresh = replace(block.committee[0], incarnation=b"new disk")
    ledger.check(replace(block, committee=(fresh, *block.committee[1:])))


def test_the_block_that_every_forgery_is_made_from_is_valid(ledger: Ledger) -> None:
    ledger.check(a_good_block(ledger))


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_block_is_refused_with_its_reason(ledger: Ledger, name: str) -> None:
    forge, why = FORGERIES[name]
    with pytest.raises(LedgerError, match=why):
        ledger.check_commit(certify(forge(a_good_block(ledger)), ledger.head.voters))


def test_a_commit_of_another_chain_is_not_appended_whoever_asks_for_it(ledger: Ledger) -> None:
    before, credit = ledger.head, ledger.credit.copy()
    with pytest.raises(LedgerError, match="does not stand on round 2"):
        ledger.append(certify(replace(a_good_block(ledger), parent=digest("elsewhere")), before.voters))
    assert (ledger.head, ledger.credit) == (before, credit)


def test_the_hashes_of_the_newest_blocks_are_known(ledger: Ledger) -> None:
    chain = honest_chain()
    hashes = [ledger.block_hash(round_) for round_ in range(4)]
    assert hashes == [None, chain[0].block.hash, chain[1].block.hash, None]


# -- the coordinator's seat


@pytest.mark.parametrize("peer", [A, PeerId("new")], ids=["a voter", "one that was never heard of"])
def test_the_seat_goes_to_whom_the_organizer_names_in_a_later_term(ledger: Ledger, peer: PeerId) -> None:
    seat = delegation(peer, 2)
    block = a_block(ledger.head, an_entry("a", (43, 50)), seat=seat)
    ledger.check(block)
    ledger.append(certify(block, ledger.head.voters))
    assert (ledger.head.coordinator, ledger.head.term, ledger.head.leader(0)) == (peer, 2, peer)


def test_the_seat_may_stay_empty_and_its_term_is_not_forgotten(ledger: Ledger) -> None:
    extend(ledger, an_entry("a", (43, 50)), an_entry("b", (50, 60)), seat=None)
    assert (ledger.head.coordinator, ledger.head.term) == (None, 1)
    assert ledger.head.voters == {A, B}
    assert {ledger.head.leader(0), ledger.head.leader(1)} == {A, B}
    with pytest.raises(LedgerError, match="older than 1"):
        ledger.check(a_block(ledger.head, an_entry("a", (60, 70)), seat=delegation(FOUNDER, 0)))
    ledger.check(a_block(ledger.head, an_entry("a", (60, 70)), seat=SEAT))


def test_only_the_organizer_delegates(ledger: Ledger) -> None:
    assert ledger.delegates(delegation(A, 3))
    assert not ledger.delegates(delegation(A, 3, by=A))
    assert not ledger.delegates(replace(delegation(A, 3), term=4))
    assert not ledger.delegates(replace(delegation(A, 3), coordinator=B))


# -- votes


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
        ledger.check_commit(commit)
    else:
        with pytest.raises(LedgerError, match="not a quorum"):
            ledger.check_commit(commit)


@pytest.mark.parametrize("voters", ["abc", "ad", "abcd"])
def test_in_an_open_run_a_commit_needs_more_than_two_thirds_of_what_was_earned(voters: str) -> None:
    ledger = Ledger(Charter.of(GENESIS, "open"), SIGNER)
    work = (an_entry("a", (0, 10)), an_entry("b", (10, 20)), an_entry("c", (20, 30)), an_entry("d", (30, 70)))
    ledger.append(certify(a_block(ledger.head, *work), [FOUNDER]))
    weights = committee("a", "b", "c", "d", rule=ledger.rule, credit=ledger.credit)
    block = replace(a_block(ledger.head), committee=weights)
    assert [voter.weight for voter in weights if voter.peer != FOUNDER] == [70, 70, 70, 280]
    ledger.check(block)
    ledger.append(certify(block, ledger.head.voters))
    after = replace(a_block(ledger.head), committee=committee("a", "b", rule=ledger.rule, credit=ledger.credit))
    commit = certify(after, [PeerId(peer) for peer in voters])
    if voters == "abc":  # three of four, and less than half of what was earned
        with pytest.raises(LedgerError, match="not a quorum"):
            ledger.check_commit(commit)
    else:
        ledger.check_commit(commit)


def test_one_voter_signing_three_times_is_no_quorum(ledger: Ledger) -> None:
    commit = certify(a_good_block(ledger), [A])
    with pytest.raises(LedgerError, match="not a quorum"):
        ledger.check_commit(replace(commit, ballots=commit.ballots * 3))


def test_votes_in_the_names_of_others_do_not_count(ledger: Ledger) -> None:
    commit = certify(a_good_block(ledger), [A])
    stolen = tuple(Ballot(peer, commit.ballots[0].signature) for peer in (FOUNDER, A, B, C))
    with pytest.raises(LedgerError, match="not a quorum"):
        ledger.check_commit(replace(commit, ballots=stolen))


def test_votes_on_one_block_prove_no_other(ledger: Ledger) -> None:
    commit = certify(a_good_block(ledger), ledger.head.voters)
    other = replace(commit.block, model_before=digest("another model"))
    with pytest.raises(LedgerError, match="not a quorum"):
        ledger.check_commit(replace(commit, block=other))


def test_votes_of_one_view_or_phase_prove_nothing_in_another(ledger: Ledger) -> None:
    block, voters = a_good_block(ledger), ledger.head.voters
    for phase, other in ((PREVOTE, PRECOMMIT), (PRECOMMIT, PREVOTE)):
        said = ballots(block, voters, phase=phase, view=3)
        assert ledger.certifies(block, 3, phase, said)
        assert not ledger.certifies(block, 3, other, said)
        assert not ledger.certifies(block, 2, phase, said)


def test_votes_of_a_disk_that_the_committee_does_not_know_prove_nothing(ledger: Ledger) -> None:
    commit = certify(a_good_block(ledger), [A, B, C])
    ledger.check_commit(commit)
    moved = tuple(replace(v, incarnation=b"new disk") if v.peer == A else v for v in ledger.head.committee)
    ledger.head = dataclasses.replace(ledger.head, committee=moved)
    with pytest.raises(LedgerError, match="not a quorum"):
        ledger.check_commit(commit)


def test_votes_of_another_run_prove_nothing_here() -> None:
    here = Ledger(
        Charter(digest("another run"), ORGANIZER, FOUNDER, disk_of(FOUNDER), QuorumRule(), "open"), FakeSigner(A)
    )
    block = replace(a_block(a_ledger().head, an_entry("a", (0, 10)), seat=None), parent=here.run)
    with pytest.raises(LedgerError, match="not a quorum"):
        here.check_commit(certify(block, [FOUNDER]))


def test_a_history_that_begins_with_another_genesis_is_refused_as_that() -> None:
    fake = honest_chain()
    here = Ledger(dataclasses.replace(a_ledger().charter, run=digest("the run of the invite")), SIGNER)
    with pytest.raises(LedgerError, match="another genesis than the one that names this run"):
        here.check_commit(fake[0])


# -- epochs


def test_the_organizer_begins_an_epoch_on_the_head_alone(ledger: Ledger) -> None:
    before = ledger.head
    commit = an_epoch(before, "a")
    ledger.check_commit(commit)
    ledger.append(commit)
    assert ledger.head.place == (1, 3) > before.place
    assert (ledger.head.redo, ledger.head.cursor) == (before.redo, before.cursor)
    assert ledger.head.voters == {FOUNDER, A}


def test_what_followed_the_block_on_which_an_epoch_begins_counts_no_more() -> None:
    chain = honest_chain()
    short, ledger = ledger_of(chain[:1]), ledger_of(chain)
    commit = an_epoch(short.head)
    ledger.check_commit(commit)
    ledger.rewind(commit.block.parent)
    assert (ledger.head, ledger.tip, ledger.credit) == (short.head, short.tip, short.credit)
    ledger.append(commit)
    assert ledger.head.place == (1, 2)
    assert ledger.block_hash(3) is None


def test_rewinding_to_the_very_beginning_leaves_a_chain_without_blocks() -> None:
    ledger = ledger_of(honest_chain())
    ledger.rewind(RUN)
    assert (ledger.head, ledger.tip, ledger.credit.total()) == (a_ledger().head, None, 0)


def test_once_an_epoch_has_begun_no_block_of_the_one_before_follows(ledger: Ledger) -> None:
    ledger.append(an_epoch(ledger.head, "a"))
    ledger.check(a_block(ledger.head, redo=ledger.head.redo, seat=delegation(FOUNDER, 2)))
    with pytest.raises(LedgerError, match="does not follow"):
        ledger.check_commit(certify(replace(a_block(ledger.head), epoch=0), [FOUNDER, A]))


EPOCHS: dict[str, tuple[Callable[[Ledger], Commit], str]] = {
    "not signed by the organizer": (lambda it: an_epoch(it.head, "a", by=FOUNDER), "not signed by the organizer"),
    "signed by its whole committee": (
        lambda it: certify(an_epoch(it.head).block, it.head.voters),
        "not signed by the organizer",
    ),
    "signed in the organizer's name": (
        lambda it: replace(an_epoch(it.head), ballots=(Ballot(ORGANIZER, bytes(64)),)),
        "not signed by the organizer",
    ),
    "on a block of another chain": (
        lambda it: _signed(replace(an_epoch(it.head).block, parent=digest("elsewhere"))),
        "not among the newest",
    ),
    "a round further": (
        lambda it: _signed(replace(an_epoch(it.head).block, round=it.head.round + 2)),
        "not among the newest",
    ),
    "with work in it": (lambda it: _signed(replace(a_good_block(it), epoch=1)), "holds no work"),
    "with steps in it": (
        lambda it: _signed(replace(an_epoch(it.head).block, global_step=it.head.global_step + 1)),
        "holds no work",
    ),
    "with data ranges changed": (
        lambda it: _signed(replace(an_epoch(it.head).block, redo=())),
        "changed the data ranges",
    ),
    "with a cursor changed": (
        lambda it: _signed(replace(an_epoch(it.head).block, cursor=it.head.cursor + 1)),
        "changed the data ranges",
    ),
    "with a coordinator of its own": (
        lambda it: _signed(replace(an_epoch(it.head).block, coordinator=delegation(A, 9, by=A))),
        "not delegated",
    ),
    "of the epoch under way": (lambda it: an_epoch(it.head, epoch=0), "not a quorum"),
}


def _signed(block: Block) -> Commit:
    """As the organizer's word."""
    return Commit(block, 0, (Ballot(ORGANIZER, FakeSigner(ORGANIZER).sign(epoch_payload(RUN, block.hash))),))


@pytest.mark.parametrize("name", EPOCHS)
def test_an_epoch_that_is_not_the_organizers_to_begin_so_is_refused(ledger: Ledger, name: str) -> None:
    forge, why = EPOCHS[name]
    with pytest.raises(LedgerError, match=why):
        ledger.check_commit(forge(ledger))


@pytest.mark.parametrize(("back", "known"), [(KEPT_BLOCKS, True), (KEPT_BLOCKS + 1, False)])
def test_an_epoch_begins_on_one_of_the_newest_blocks_only(back: int, known: bool) -> None:
    ledger = a_ledger()
    heads = [ledger.head]
    for k in range(KEPT_BLOCKS + 2):
        extend(ledger, an_entry("a", (10 * k, 10 * k + 10)))
        heads.append(ledger.head)
    commit = an_epoch(heads[-1 - back])
    if known:
        ledger.check_commit(commit)
        ledger.rewind(commit.block.parent)
        assert ledger.head == heads[-1 - back]
    else:
        with pytest.raises(LedgerError, match="not among the newest"):
            ledger.check_commit(commit)
