"""The coordinator's process: it leads when it is its turn, follows without training, and measures.

It holds nothing that the peers do not hold, but for the run key. What it keeps in its folder is enough to go on:

    chain.sqlite   every commit        blobs/   the bytes of recent rounds        checkpoints/   the model now and then
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from dugnad.coordinator import history
from dugnad.coordinator.effects import Cost
from dugnad.coordinator.keeper import Keeper
from dugnad.coordinator.messages import Commit
from dugnad.coordinator.rounds import Phase
from dugnad.coordinator.shell import Shell
from dugnad.coordinator.state import Model, Numerics
from dugnad.coordinator.surroundings import Surroundings
from dugnad.dht.delegation import LASTS_S, RENEW_S, Delegation, delegate
from dugnad.dht.identity import Identity, PeerId

log = logging.getLogger(__name__)

GOODBYE_S = 10.0
"""How long members of a finished run are awaited to take note and leave."""
BEHIND_ROUNDS = 4
"""When more rounds than these wait to be measured, some are left out: checkpoints, which wait as well, matter more."""


class Dismissed(Exception):
    """The run wants this peer no more, or never did; the message is for the user."""


class Coordinator(Shell):
    """Keeps one run from `directory` until its steps are done or `stop` is called; `serve` raises Dismissed.

    mandate: the run's key, by which it delegates to itself as long as it is there; or, where that key is kept offline,
    the delegation that it was left with.
    """

    machine: Keeper

    def __init__(self, around: Surroundings, mandate: Identity | Delegation, numerics: Numerics) -> None:
        super().__init__(around, numerics)
        me = self.identity.peer_id
        self._mandate = mandate
        self._clock = around.clock
        rounds = self.recipe.rounds
        self.machine = Keeper(
            me,
            self.leader,
            self._delegation(),
            report_s=rounds.report_s,
            leave_s=rounds.train_s + rounds.exchange_s,
        )
        self._yielded = False

    def _delegation(self) -> Delegation:
        """A new one, by the run's key; its term is the clock of this machine, whose chain file sees that it grows."""
        if isinstance(self._mandate, Delegation):
            return self._mandate
        term = self.chain.next_term(at_s=time.time())
        return delegate(self._mandate, self.run, self.identity.peer_id, term, int(self._clock() + LASTS_S))

    def stop(self) -> None:
        """Finish the round under way, leave the committee to the others, write a checkpoint, and end."""
        self.perform(self.machine.stop(now=self.now()))

    # -- the role's part of the shell

    async def serve(self) -> None:
        """Take part until there is nothing more to do. Raises Dismissed if that is because we are banned."""
        await super().serve()
        if self.machine.dismissed is not None:
            raise Dismissed(self.machine.dismissed)

    async def begin(self) -> None:
        """Renew the delegation long before it ends."""
        self.spawn(self._keep_delegated())

    async def _keep_delegated(self) -> None:
        while not isinstance(self._mandate, Delegation):
            await asyncio.sleep(RENEW_S)
            self.perform(self.machine.renew(self._delegation(), now=self.now()))

    def perform(self, effects: Sequence[object]) -> None:
        """Do the effects, and see whether the run, or our part in it, has come to its end."""
        super().perform(effects)
        if self.machine.yields and not self._yielded:
            self._yielded = True
            log.warning(self.machine.reason)
        over = (self.leader.finished and self.follower.ledger.head.round > 0) or self.machine.may_go(now=self.now())
        if over and (self.follower.at_head or self.machine.dismissed is not None):
            self.finish()

    def on_applied(self, commit: Commit, model: Model, cost: Cost) -> None:
        """Count the round; it is measured and saved beside, and the next one does not wait for that."""
        self.count_round(commit, cost)

    # -- what follows a round

    async def measure(self, commit: Commit, model: Model) -> float | None:
        """The loss on held-out data, every so many rounds; tells what the round was."""
        block, loss = commit.block, None
        behind = self._aftermath.qsize() > BEHIND_ROUNDS
        if block.parts and block.round % self.recipe.evaluation.every_rounds == 0 and not behind:
            loss = await asyncio.to_thread(self._numerics.validation_loss, model)
            self.chain.validated(block.round, loss)
            self.leader.validation = (block.round, loss)
            self.metrics.validated(loss)
        self._tell(block.round)
        return loss

    def _tell(self, round_: int) -> None:
        row = history.rows(self.chain, after_round=round_ - 1)[0]
        if not row.roster:
            log.info("round %d  the committee is %d strong", round_, len(self.follower.ledger.head.committee))
            return
        measured = f"  validation {row.val_loss:.3f}" if row.val_loss is not None else ""
        # of what was committed without us, and of what followed next, this disk knows no time
        without_us = max(self._came_at_round, self.sources.caught_up_round)
        took = f"  {row.duration_s:.1f} s" if not without_us or round_ > without_us + 1 else ""
        log.info(
            "round %d  %d peers  %d tokens  loss %.3f%s%s",
            round_, len(row.roster), row.tokens, row.train_loss, measured, took,
        )  # fmt: skip

    async def farewell(self) -> None:
        """Let others vouch for the last model, and members of a finished run see that it is finished."""
        newest = self.state.newest
        if newest is None or self.machine.dismissed is not None:
            return  # nothing to vouch for, or nobody who would
        round_, model = newest
        deadline = self.now() + GOODBYE_S
        while (
            self._others() and not self.state.proven(round_, model, self.chain, self.leader) and self.now() < deadline
        ):
            await asyncio.sleep(0.1)  # a model that nobody vouches for can't be given to anyone after a restart
        if self.leader.finished:
            while self._awaited() and self.now() < deadline:
                await asyncio.sleep(0.1)

    def _others(self) -> bool:
        return bool(set(self.leader.membership.live()) - {self.identity.peer_id})

    def _awaited(self) -> set[PeerId]:
        """Who does not know yet that the run is finished: it is here, or has not been heard of since we started."""
        members, me = self.leader.membership, self.identity.peer_id
        if self.leader.phase is Phase.FOLLOWING:
            return set()
        unheard = {peer for peer in self.follower.ledger.head.voters - {me} if members.report(peer) is None}
        return (set(members.live()) | unheard) - members.leaving()
