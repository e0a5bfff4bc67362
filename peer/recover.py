"""Begins a new epoch with the organizer's key, after a quorum of the committee is gone for good.

Only the organizer may: a coordinator that is merely cut off from the others must not decide alone.
"""

import contextlib
from dataclasses import dataclass

from dugnad.configs.recipe import decode
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.ledger import Charter, Ledger
from dugnad.coordinator.messages import Ballot, Block, Commit, epoch_payload
from dugnad.coordinator.shell import KeySigner
from dugnad.dht.delegation import LASTS_S, delegate
from dugnad.peer.folder import Folder, FolderError


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a new epoch changes."""

    run: str
    """Name of the recipe."""
    epoch: int
    after_round: int
    """The newest round that stays; what others committed after it is undone."""
    committee: tuple[str, ...]
    """Whose votes were needed so far."""


class Recoverer:
    """A new epoch on the chain of a coordinator's folder, in which no process may live meanwhile; at_s: unix seconds.

    Raises FolderError where the folder has no run, or not its key.
    """

    def __init__(self, folder: Folder, *, at_s: float) -> None:
        self._folder = folder
        if not folder.has_run_key or not folder.chain.exists():
            raise FolderError(
                f"{folder.path}: to begin an epoch takes the run.key and the chain.sqlite of a coordinator's folder. "
                "On a new machine, first: dugnad launch --resume DIR --invite INVITE, and Ctrl+C once it has the chain."
            )
        self._chain = Chain(folder.chain)
        with contextlib.ExitStack() as stack:
            stack.callback(self._chain.close)
            self._plan(at_s)
            stack.pop_all()

    def close(self) -> None:
        """Release the file."""
        self._chain.close()

    def _plan(self, at_s: float) -> None:
        genesis = self._chain.genesis()
        identity, organizer = self._folder.identity(), self._folder.organizer()
        if genesis is None or genesis.organizer != organizer.peer_id:
            raise FolderError(f"{self._folder.path}: run.key is not the key of the run in chain.sqlite.")
        recipe = decode(genesis.recipe)
        ledger = Ledger(Charter.of(genesis, recipe.admission.kind), KeySigner(identity))
        for commit in self._chain.commits():
            ledger.append(commit)
        head = ledger.head
        model = self._model_after(head.round, genesis.first_model)
        term = self._chain.next_term(at_s=at_s)
        me = identity.peer_id
        seat = delegate(organizer, genesis.run, me, term, int(at_s + LASTS_S))
        block = Block(
            epoch=head.epoch + 1,
            round=head.round + 1,
            parent=head.hash,
            model_before=model,
            global_step=head.global_step,
            steps=0,
            entries=(),
            parts=(),
            redo=head.redo,
            cursor=head.cursor,
            committee=ledger.rule.weigh({me: self._chain.incarnation()}, me, ledger.credit),
            coordinator=seat,
        )
        ballot = Ballot(organizer.peer_id, organizer.sign(epoch_payload(genesis.run, block.hash)))
        self._commit = Commit(block, 0, (ballot,))
        ledger.check_commit(self._commit)
        committee = tuple(voter.peer for voter in head.committee)
        self.recovery = Recovery(recipe.name, block.epoch, head.round, committee)

    def _model_after(self, round_: int, first_model: bytes) -> bytes:
        if round_ == 0:
            return first_model
        said = {applied.model for applied in self._chain.applieds(after_round=round_ - 1).get(round_, {}).values()}
        if len(said) != 1:
            raise FolderError(
                f"{self._folder.path}: the model after round {round_} is not known here yet. Start the coordinator "
                "once (dugnad launch --resume), until it says that it stands at that round, and stop it."
            )
        return said.pop()

    def begin(self, *, at_s: float) -> None:
        """Store the first block of the epoch; the coordinator that is started next shows it to everyone."""
        self._chain.append(self._commit, at_s=at_s)
