"""A new epoch, begun in a folder with the organizer's key: what it says, what it takes, and who follows it."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from dugnad.coordinator.chain import Chain
from dugnad.coordinator.ledger import Charter, Ledger, LedgerError
from dugnad.coordinator.messages import Applied, Ballot
from dugnad.coordinator.shell import KeySigner
from dugnad.peer.folder import Folder, FolderError
from dugnad.peer.recover import Recoverer
from tests.unit.shells import ANN, BOB, EVE, Run

AT_S = 1e9


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "role")
    folder.create()
    return folder


@pytest.fixture
def run(folder: Folder) -> Run:
    """Five rounds by Ann and Bob, of the organizer whose key is in the folder."""
    run = Run(ANN, BOB, organizer=folder.organizer())
    run.grow(5)
    return run


@pytest.fixture
def chain(folder: Folder, run: Run) -> Iterator[Chain]:
    """The chain in the folder, with the word of Ann on what she applied."""
    run.keep_in(folder.path)
    with closing(Chain(folder.chain)) as chain:
        say_applied(chain, run, 5)
        yield chain


def say_applied(chain: Chain, run: Run, round_: int, *, model: bytes | None = None, by: str = "ann") -> None:
    block, digest = run.commits[round_ - 1].block.hash, model or run.models[round_].digest()
    chain.applied(ANN.peer_id if by == "ann" else BOB.peer_id, Applied(round_, block, digest, bytes(64), 0.0, 0.0, ()))


def follower_of(run: Run) -> Ledger:
    """The chain of one who followed up to now."""
    ledger = Ledger(Charter.of(run.genesis, "open"), KeySigner(EVE))
    for commit in run.commits:
        ledger.check_commit(commit)
        ledger.append(commit)
    return ledger


def test_an_epoch_begins_on_the_newest_round_and_the_coordinator_decides_alone(
    folder: Folder, run: Run, chain: Chain
) -> None:
    with closing(Recoverer(folder, at_s=AT_S)) as recoverer:
        said = recoverer.recovery
        assert (said.epoch, said.after_round) == (1, 5)
        assert set(said.committee) == {ANN.peer_id, BOB.peer_id}
        assert list(chain.commits()) == run.commits, "nothing is written before the organizer has agreed"
        recoverer.begin(at_s=AT_S)
    commit = list(chain.commits())[5]
    ledger = follower_of(run)
    ledger.check_commit(commit)
    ledger.append(commit)
    me, head = folder.identity().peer_id, ledger.head
    assert (head.place, head.coordinator, set(head.voters)) == ((1, 6), me, {me})
    voter = head.voter(me)
    assert voter is not None
    assert voter.incarnation == chain.incarnation()
    assert commit.block.model_before == run.models[5].digest()
    assert ledger.delegates(commit.block.coordinator) if commit.block.coordinator else False


def test_those_who_had_gone_on_follow_the_epoch_back(folder: Folder, run: Run, chain: Chain) -> None:
    with closing(Recoverer(folder, at_s=AT_S)) as recoverer:
        recoverer.begin(at_s=AT_S)
    run.grow(2)
    ledger = follower_of(run)
    epoch = list(chain.commits())[5]
    ledger.check_commit(epoch)
    for changed in (
        msgspec.structs.replace(epoch, ballots=()),
        msgspec.structs.replace(epoch, ballots=(Ballot(EVE.peer_id, EVE.sign(b"an epoch")),)),
        msgspec.structs.replace(epoch, block=msgspec.structs.replace(epoch.block, model_before=bytes(32))),
    ):
        with pytest.raises(LedgerError, match="not signed by the organizer"):
            ledger.check_commit(changed)


def test_a_second_epoch_can_follow_the_first(folder: Folder, run: Run, chain: Chain) -> None:
    terms = []
    for epoch in (1, 2):
        with closing(Recoverer(folder, at_s=AT_S)) as recoverer:
            assert recoverer.recovery.epoch == epoch
            recoverer.begin(at_s=AT_S)
        commit = list(chain.commits())[-1]
        assert commit.block.coordinator is not None
        terms.append(commit.block.coordinator.term)
        said = Applied(commit.block.round, commit.block.hash, run.models[5].digest(), bytes(64), 0.0, 0.0, ())
        chain.applied(ANN.peer_id, said)
    assert terms[0] < terms[1], "two coordinators of one term could not be told apart"


@pytest.mark.parametrize("said", ["nothing", "two models"])
def test_where_the_model_is_not_known_for_sure_no_epoch_begins(folder: Folder, run: Run, said: str) -> None:
    run.keep_in(folder.path)
    with closing(Chain(folder.chain)) as chain:
        if said == "two models":
            say_applied(chain, run, 5)
            say_applied(chain, run, 5, model=bytes(32), by="bob")
        with pytest.raises(FolderError, match="the model after round 5 is not known here yet"):
            Recoverer(folder, at_s=AT_S)
        assert list(chain.commits()) == run.commits


def test_before_the_first_round_the_model_is_that_of_the_genesis(folder: Folder) -> None:
    run = Run(ANN, organizer=folder.organizer())
    run.keep_in(folder.path)
    with closing(Recoverer(folder, at_s=AT_S)) as recoverer:
        recoverer.begin(at_s=AT_S)
    with closing(Chain(folder.chain)) as chain:
        (commit,) = chain.commits()
    assert commit.block.model_before == run.genesis.first_model


def test_a_folder_without_the_key_or_the_chain_of_the_run_is_refused_in_words(tmp_path: Path, run: Run) -> None:
    keyless, chainless, foreign = (Folder(tmp_path / name) for name in ("keyless", "chainless", "foreign"))
    run.keep_in(keyless.path)
    run.keep_in(foreign.path)
    chainless.create()
    foreign.organizer(), chainless.organizer()
    for folder, why in (
        (keyless, "takes the run.key and the chain.sqlite"),
        (chainless, "takes the run.key and the chain.sqlite"),
        (foreign, "run.key is not the key of the run"),
    ):
        with pytest.raises(FolderError, match=why):
            Recoverer(folder, at_s=AT_S)
    assert not chainless.chain.exists(), "nothing is made by a refusal"
