"""Where one who starts or falls behind takes the chain and the model from: its own disk, or whoever has them."""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence

from dugnad.coordinator import sync
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.damage import CheckpointError, Damage
from dugnad.coordinator.follower import Follower
from dugnad.coordinator.messages import Commit
from dugnad.coordinator.replica import REPLAY_ROUNDS
from dugnad.coordinator.state import SHORT_REPLAY_ROUNDS, Model, Numerics, State
from dugnad.coordinator.surroundings import Surroundings
from dugnad.coordinator.votes import Signer
from dugnad.dht import bulk
from dugnad.dht.download import Incoming, Progress, download
from dugnad.dht.identity import PeerId, nickname
from dugnad.dht.transport import TransportError
from dugnad.dht.wire import WireError

log = logging.getLogger(__name__)

SILENCE_S = 5.0
"""How long a transfer may stand still."""
LOOK_S = 5.0
"""How often one asks somebody how far the chain has come, on average."""
REPAIR_S = 4.0
"""How long after a start, or a failure, other keepers are asked for what is damaged here."""
DONORS_ASKED = 8
"""Of how many, one after the other, the newest model is asked, before it is tried again later."""


class Sources:
    """Takes chain, model and blobs of one run, for the peer whose chain `follower` keeps.

    take: hands a commit of that peer to the machine.
    """

    def __init__(
        self,
        around: Surroundings,
        numerics: Numerics,
        *,
        chain: Chain,
        state: State,
        follower: Follower,
        signer: Signer,
        take: Callable[[PeerId, Commit], None],
    ) -> None:
        self.downloading: Progress | None = None
        """How far the model is that we take from peers."""
        self._me = around.identity.peer_id
        self._genesis = around.genesis
        self._numerics = numerics
        self._transport = around.transport
        self._asker = sync.Asker(around.transport, around.identity, around.genesis.run)
        self._chain = chain
        self._state = state
        self._follower = follower
        self._signer = signer
        self._incoming = around.directory / "incoming"
        self._contacts = around.contacts
        self.caught_up_round = 0
        """The newest whose commit we took out of another's chain: when it was committed, we do not know."""
        self._take = take
        self._rng = random.Random()

    def known_peers(self) -> set[PeerId]:
        """Who may have something, but us."""
        return {*self._follower.ledger.head.voters, *self._contacts()} - {self._me}

    async def fetch(
        self, donors: Sequence[PeerId], sizes: Mapping[bytes, int], *, kind: str, on_blob: bulk.OnBlob
    ) -> None:
        """Get blobs, {digest: bytes}, from any of `donors`. Raises TransportError if one can't be had."""
        others = [peer for peer in donors if peer != self._me]
        await bulk.fetch_all(self._transport, others, sizes, kind=kind, timeout_s=SILENCE_S, on_blob=on_blob)

    # -- the chain

    async def catch_up(self, donor: PeerId, after: tuple[int, int]) -> None:
        """Take the commits of `donor` after that place, (epoch, round), if it has any."""
        try:
            await self._take_commits(donor, after)
        except (TransportError, WireError, sync.SyncError) as error:
            log.debug("could not catch up after round %d: %s", after[1], error)

    async def _take_commits(self, donor: PeerId, after: tuple[int, int]) -> None:
        def take(commit: Commit) -> tuple[int, int]:
            if commit.block.round > self._follower.ledger.head.round:
                self.caught_up_round = commit.block.round
            self._take(donor, commit)
            return self._follower.ledger.head.place

        await self._asker.commits(donor, after, take)

    async def keep_looking(self) -> None:
        """Ask somebody now and then how far the chain has come: we may hear no leader, or one whose epoch is over."""
        while True:
            await asyncio.sleep(LOOK_S * (0.5 + self._rng.random()))
            others = sorted(self.known_peers())
            if others:
                await self.catch_up(self._rng.choice(others), self._follower.ledger.head.place)

    # -- the model

    async def own_model(self) -> tuple[int, Model] | None:
        """The newest (round, model) of this disk from which the head can be reached."""
        head = self._follower.ledger.head.round
        newest = self._chain.commits(after_round=head - REPLAY_ROUNDS - 1)
        blocks = {commit.block.round: commit.block.hash for commit in newest}
        found = await asyncio.to_thread(self._state.take_up, head, blocks)
        if found is None or self._block_at(found[0]) != blocks.get(found[0]):  # an epoch may have undone it meanwhile
            return None
        return found

    async def model(self, *, now: float) -> tuple[int, Model]:
        """A proven (round, model) from which the head can be reached, of whoever has it. Raises SyncError."""
        first = [peer for peer in self._follower.contacts(now=now) if peer != self._me]
        rest = sorted(self.known_peers())
        self._rng.shuffle(rest)
        why = "nobody is known who could have the model"
        for donor in list(dict.fromkeys([*first, *rest]))[:DONORS_ASKED]:
            try:
                return await self._model_of(donor)
            except (TransportError, WireError, sync.SyncError, ValueError) as error:
                why = str(error)
                log.debug("no model from %s: %s", nickname(donor), error)
        raise sync.SyncError(why)

    async def _model_of(self, donor: PeerId) -> tuple[int, Model]:
        await self._take_commits(donor, self._follower.ledger.head.place)
        if self._follower.ledger.head.round <= SHORT_REPLAY_ROUNDS and self._state.newest is None:
            first = await asyncio.to_thread(self._state.first_model)
            if first is not None:
                return 0, first
        charter = self._follower.ledger.charter
        offer = await self._asker.state(donor, charter, self._genesis.first_model, self._chain.commit, self._signer)
        if self._follower.ledger.head.round - offer.round > REPLAY_ROUNDS:
            raise sync.SyncError(f"{donor} offers the model after round {offer.round}, which is too old to replay from")
        known = self._block_at(offer.round)
        model = await self.download(offer.manifest, donor)
        if self._block_at(offer.round) != known:
            raise sync.SyncError(f"an epoch began before round {offer.round} while its model came")
        log.info("the model after round %d is here, verified", offer.round)
        return offer.round, model

    def _block_at(self, round_: int) -> bytes | None:
        """The hash of a round's block in our chain."""
        commit = self._chain.commit(round_)
        return None if commit is None else commit.block.hash

    async def download(self, manifest: bytes, donor: PeerId) -> Model:
        """The model of `manifest`, which is proven, from everyone who has it. Raises ValueError if it can't be one."""

        def told(progress: Progress) -> None:
            self.downloading = progress

        wanted = self._numerics.wanted(manifest)
        donors = [*sorted(self.known_peers() - {donor}), donor]  # the last serves all who ask what the newest is
        incoming = Incoming(self._incoming, self._state.lookup)
        try:
            await download(self._transport, donors, wanted, incoming, timeout_s=SILENCE_S, told=told)
            model = await asyncio.to_thread(self._numerics.model_from, manifest, incoming.chunk)
            await asyncio.to_thread(incoming.clear)
        finally:
            self.downloading = None
        return model

    # -- checkpoints

    async def keep_repairing(self) -> None:
        """Replace damaged checkpoints from other keepers, as soon as one of them can be reached."""

        async def fetch(wanted: Mapping[bytes, int], on_blob: bulk.OnBlob) -> None:
            await self.fetch(sorted(self.known_peers()), wanted, kind="state", on_blob=on_blob)

        async def repaired(damage: Damage) -> bool:
            try:
                await self._state.repair(damage, fetch, self._chain.commit)
            except CheckpointError as error:
                log.debug("%s", error)
                return False
            log.info("%s is whole again: what was damaged came from other keepers", damage.path.name)
            return True

        left = self._state.damaged
        while left:
            await asyncio.sleep(REPAIR_S * (0.5 + self._rng.random()))
            # one that is gone became too old to be kept
            left = [damage for damage in left if damage.path.exists() and not await repaired(damage)]
