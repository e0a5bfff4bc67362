from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from dugnad.coordinator.chain import Chain
from dugnad.coordinator.history import rows
from dugnad.coordinator.messages import Commit
from dugnad.dht.identity import PeerId
from tests.unit.chains import GENESIS, a_ledger, an_entry, applied, digest, extend, honest_chain, model_after

A, B = PeerId("a"), PeerId("b")


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    chain = Chain(tmp_path / "chain.sqlite")
    chain.found(GENESIS)
    yield chain
    chain.close()


def fill(chain: Chain, commits: list[Commit]) -> None:
    """Commit rounds 1, 2, ... at 102 s, 104 s, ..."""
    for commit in commits:
        chain.append(commit, at_s=100.0 + 2 * commit.block.round)


def test_a_run_without_rounds_has_no_history(chain: Chain) -> None:
    assert rows(chain) == []


def test_a_row_says_who_worked_and_how_far_it_brought_the_run(chain: Chain) -> None:
    fill(chain, honest_chain())
    told = [(row.round, row.global_step, row.roster, row.tokens) for row in rows(chain)]
    assert told == [(1, 10, ("a", "b"), 140), (2, 20, ("a", "b", "c"), 161), (3, 30, ("a", "c"), 140), (4, 30, (), 0)]


def test_the_training_loss_is_a_mean_over_tokens(chain: Chain) -> None:
    ledger = a_ledger()
    fill(chain, [extend(ledger, an_entry("a", (0, 30), loss=1.0), an_entry("b", (30, 40), loss=3.0)), extend(ledger)])
    assert [row.train_loss for row in rows(chain)] == [1.5, None]


def test_the_validation_loss_stands_where_it_was_measured(chain: Chain) -> None:
    fill(chain, honest_chain())
    chain.validated(2, 1.75)
    assert [row.val_loss for row in rows(chain)] == [None, 1.75, None, None]


def test_a_row_says_what_each_peer_had_and_what_the_round_cost_it(chain: Chain) -> None:
    fill(chain, honest_chain()[:1])
    chain.applied(A, applied("a", 1, wall_s=3.0, sent={"bulk": 100, "control": 5}))
    chain.applied(B, applied("b", 1, wall_s=4.0, sent={"bulk": 20}))
    row = rows(chain)[0]
    assert row.model_digest == {A: model_after(1), B: model_after(1)}
    assert (row.train_s, row.wall_s) == ({A: 1.5, B: 2.0}, {A: 3.0, B: 4.0})
    assert row.sent_bytes == {A: {"bulk": 100, "control": 5}, B: {"bulk": 20}}
    assert row.wire_bytes == 125


@pytest.mark.parametrize(
    ("of_b", "agree"), [(None, True), (model_after(1), True), (digest("another model"), False)], ids=str
)
def test_peers_agree_while_all_who_applied_the_round_have_one_model(
    chain: Chain, of_b: bytes | None, agree: bool
) -> None:
    fill(chain, honest_chain()[:1])
    chain.applied(A, applied("a", 1))
    if of_b is not None:
        chain.applied(B, applied("b", 1, model=of_b))
    assert rows(chain)[0].agree == agree


def test_a_round_lasts_from_the_commit_before_and_the_first_as_long_as_its_slowest_peer(chain: Chain) -> None:
    fill(chain, honest_chain()[:3])
    chain.applied(A, applied("a", 1, wall_s=3.0))
    chain.applied(B, applied("b", 1, wall_s=7.0))
    assert [row.duration_s for row in rows(chain)] == [7.0, 2.0, 2.0]


def test_rows_after_a_round_are_the_same_as_in_the_whole_history(chain: Chain) -> None:
    fill(chain, honest_chain())
    chain.applied(A, applied("a", 3))
    assert rows(chain, after_round=2) == rows(chain)[2:]
    assert rows(chain, after_round=4) == []


class BusyChain(Chain):
    """A chain that a coordinator goes on writing to while it is read."""

    def committed_at(self) -> Mapping[int, float]:
        known = super().committed_at()
        self.append(honest_chain()[len(known)], at_s=200.0)
        return known


def test_a_round_committed_while_history_is_read_does_no_harm(tmp_path: Path) -> None:
    with closing(BusyChain(tmp_path / "chain.sqlite")) as chain:
        fill(chain, honest_chain()[:2])
        assert [row.round for row in rows(chain)] == [1, 2]
        assert [row.round for row in rows(chain)] == [1, 2, 3]
