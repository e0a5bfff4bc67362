"""Shells to test: a run of a small model that real keys have signed, and a role that follows it."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import msgspec
import numpy as np
from blake3 import blake3

from dugnad.configs import recipe
from dugnad.coordinator.chain import Chain
from dugnad.coordinator.checkpoint import CheckpointMeta
from dugnad.coordinator.checkpoints import Checkpoints
from dugnad.coordinator.ledger import Charter, Ledger
from dugnad.coordinator.machine import Machine
from dugnad.coordinator.messages import (
    PRECOMMIT,
    Ballot,
    Block,
    Commit,
    Genesis,
    Plan,
    applied_payload,
    epoch_payload,
    vote_payload,
)
from dugnad.coordinator.shell import KeySigner, Shell
from dugnad.coordinator.state import Model
from dugnad.coordinator.surroundings import Surroundings
from dugnad.coordinator.tensorfile import Tensors
from dugnad.dht.blobs import Blobs
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.paths import Abilities, Reach
from dugnad.dht.transport import Transport
from dugnad.monitoring.metrics import Metrics
from dugnad.optim.codec import Int8Codec
from dugnad.optim.layout import Layout
from dugnad.optim.outer import SharedModel, wanted_blobs
from dugnad.optim.plan import assign_parts
from dugnad.peer.lifecycle import Volunteer
from tests.unit.chains import a_block, an_entry, disk_of

ANN, BOB, EVE, ORGANIZER = (Identity.from_seed(bytes([k]) * 32) for k in range(11, 15))
RECIPE = dataclasses.replace(
    recipe.load("tiny-books"),
    checkpoints=recipe.CheckpointSettings(every_rounds=4, keep=3),
    admission=recipe.AdmissionSettings(kind="open"),  # with so few, votes weigh the same as among those invited
)
LAYOUT = Layout([("bias", (7,)), ("embed", (40, 5))], 64, 128)


class SmallNumerics:
    """`state.Numerics` of a model of a few hundred values; another `seed` computes another first model."""

    assign_parts = staticmethod(assign_parts)

    def __init__(self, seed: int = 1) -> None:
        self.layout = LAYOUT
        self.part_bytes = tuple(Int8Codec(64).part_bytes(len(part)) for part in LAYOUT.parts)
        self._seed = seed

    def check_part(self, payload: bytes | bytearray | memoryview) -> None:
        """Raise CodecError."""
        Int8Codec(64).check(payload)

    def first_model(self) -> SharedModel:
        """Of random values."""
        rng = np.random.default_rng(self._seed)
        values = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in LAYOUT.tensors}
        return SharedModel.initial(LAYOUT, values)

    def model_of(self, weights: Tensors, momentum: Tensors) -> SharedModel:
        """The model of these tensors."""
        return SharedModel(LAYOUT, LAYOUT.flatten(weights), LAYOUT.flatten(momentum))

    def wanted(self, manifest: bytes) -> dict[bytes, int]:
        """The chunks of a manifest."""
        return wanted_blobs(LAYOUT, manifest)

    def model_from(self, manifest: bytes, blob: Callable[[bytes], bytes | memoryview | None]) -> SharedModel:
        """The model of its chunks."""
        return SharedModel.from_manifest(LAYOUT, manifest, blob)

    def validation_loss(self, model: Model) -> float:
        """Always the same."""
        return 1.5


class Run:
    """A run of rounds in which `workers` do all the work and all the voting; the first of them founded it.

    incarnation: of the founder's disk; by default the one that `disk_of` names, which no folder has.
    """

    def __init__(self, *workers: Identity, organizer: Identity = ORGANIZER, incarnation: bytes | None = None) -> None:
        self.workers, self.organizer = workers, organizer
        founder = workers[0].peer_id
        self.disks = {peer.peer_id: disk_of(peer.peer_id) for peer in workers}
        self.disks[founder] = incarnation or self.disks[founder]
        self.models = [SmallNumerics().first_model()]
        """After each round."""
        self.genesis = Genesis(
            recipe.encode(RECIPE), organizer.peer_id, founder, self.disks[founder], self.models[0].digest()
        )
        self.ledger = Ledger(Charter.of(self.genesis, RECIPE.admission.kind), KeySigner(workers[0]))
        self.commits: list[Commit] = []
        self.parts: list[list[bytes]] = []
        """The averages of each round."""

    def grow(self, num_rounds: int) -> list[Commit]:
        """So many rounds more."""
        for _ in range(num_rounds):
            self._add_round()
        return self.commits

    def _add_round(self) -> None:
        ledger, number = self.ledger, len(self.commits) + 1
        rng = np.random.default_rng((number, ledger.head.epoch))
        vector = rng.standard_normal(LAYOUT.total_elements, dtype=np.float32)
        LAYOUT.clear_padding(vector)
        parts = [bytes(Int8Codec(64).encode(vector[part.start : part.stop])) for part in LAYOUT.parts]
        cursor = ledger.head.cursor
        entries = [
            an_entry(peer, (cursor + 10 * k, cursor + 10 * k + 10))
            for k, peer in enumerate(sorted(peer.peer_id for peer in self.workers))
        ]
        block = msgspec.structs.replace(
            a_block(ledger.head, *entries, seat=None),
            model_before=self.models[-1].digest(),
            parts=tuple(blake3(part).digest() for part in parts),
            committee=ledger.rule.weigh(self.disks, None, {}),
        )
        model = self.models[-1].apply(parts, RECIPE.outer, global_step=ledger.head.global_step)
        self._append(Commit(block, 0, self._precommits(block)), parts, model)

    def _precommits(self, block: Block) -> tuple[Ballot, ...]:
        head = self.ledger.head
        return tuple(
            Ballot(one.peer_id, one.sign(vote_payload(*place, voter.incarnation)))
            for one in self.workers
            if (voter := head.voter(one.peer_id)) is not None
            for place in [(self.ledger.run, block.epoch, block.round, 0, PRECOMMIT, block.hash)]
        )

    def _append(self, commit: Commit, parts: list[bytes], model: SharedModel) -> None:
        self.ledger.check_commit(commit)
        self.ledger.append(commit)
        self.commits.append(commit)
        self.parts.append(parts)
        self.models.append(model)

    def begin_epoch(self, after_round: int) -> Commit:
        """The organizer's word that what followed that round counts no more."""
        del self.commits[after_round:], self.parts[after_round:], self.models[after_round + 1 :]
        self.ledger.rewind(self.commits[-1].block.hash if self.commits else self.genesis.run)
        head = self.ledger.head
        block = msgspec.structs.replace(
            a_block(head, redo=head.redo, seat=None),
            epoch=head.epoch + 1,
            model_before=self.models[-1].digest(),
            committee=self.ledger.rule.weigh(self.disks, None, {}),
        )
        signature = self.organizer.sign(epoch_payload(self.genesis.run, block.hash))
        ballot = Ballot(self.organizer.peer_id, signature)
        commit = Commit(block, 0, (ballot,))
        self._append(commit, [], self.models[-1])
        return commit

    def vouched(self, round_: int, by: Sequence[Identity], *, model: bytes | None = None) -> tuple[Ballot, ...]:
        """What those sign who have applied a round: unless told, that they have the true model."""
        digest = self.models[round_].digest() if model is None else model
        payload = applied_payload(self.genesis.run, round_, self.commits[round_ - 1].block.hash, digest)
        return tuple(Ballot(one.peer_id, one.sign(payload)) for one in by)

    def keep_in(self, folder: Path, *, up_to: int | None = None) -> Path:
        """Make the folder of one who has followed the chain, and holds the averages, but no model."""
        folder.mkdir(exist_ok=True)
        blobs = Blobs(folder / "blobs")
        with closing(Chain(folder / "chain.sqlite")) as chain:
            chain.found(self.genesis)
            for commit, parts in list(zip(self.commits, self.parts, strict=True))[:up_to]:
                chain.append(commit, at_s=0.0)
                for part in parts:
                    blobs.put(part)
        return folder

    def checkpoint_in(self, folder: Path, round_: int, *, by: Identity = ANN) -> Path:
        """Save the checkpoint of a round there."""
        commit, model = self.commits[round_ - 1], self.models[round_]
        meta = CheckpointMeta(
            run=self.genesis.run.hex(),
            recipe=RECIPE.name,
            recipe_json=self.genesis.recipe.decode(),
            block=commit.block.hash.hex(),
            model_digest=model.digest().hex(),
            global_step=commit.block.global_step,
            val_loss=None,
        )
        kept = Checkpoints(folder / "checkpoints", keep=RECIPE.checkpoints.keep, signer=KeySigner(by))
        return kept.save(round_, model.tensors(), meta=meta)


class Role(Shell):
    """A shell of the small model: a volunteer that is never given work, unless `machine` is another.

    Effects that only a role knows are functions here; `has_model` is set once the machine has one.
    """

    def __init__(
        self,
        transport: Transport,
        directory: Path,
        genesis: Genesis,
        *,
        me: Identity = ANN,
        machine: Machine | None = None,
        contacts: Sequence[PeerId] = (),
        numerics: SmallNumerics | None = None,
    ) -> None:
        around = Surroundings(
            identity=me,
            genesis=genesis,
            transport=transport,
            directory=directory,
            metrics=Metrics("volunteer", "run"),
            contacts=lambda: contacts,
        )
        super().__init__(around, numerics or SmallNumerics())
        report_s = RECIPE.rounds.report_s
        self.volunteer = Volunteer(me.peer_id, self.leader, num_parts=len(LAYOUT.parts), report_s=report_s)
        self.volunteer.abilities = Abilities((), Reach.OPEN, 1.0)
        self.machine = self.volunteer if machine is None else machine
        self.begun = asyncio.Event()

    async def begin(self) -> None:
        """It can be reached."""
        self.begun.set()

    def known_plan(self) -> Plan | None:
        """That of the machine."""
        return self.machine.plan

    def perform_role(self, effect: object) -> None:
        """Call it."""
        assert callable(effect), effect
        effect()

    async def stands_at(self, round_: int) -> SharedModel:
        """The model once it is that after `round_`."""
        while self.follower.model_round != round_ or self.follower.model is None:
            await asyncio.sleep(0.001)
        newest = self.state.newest
        assert newest is not None
        assert newest[0] == round_
        assert isinstance(newest[1], SharedModel)
        return newest[1]


@asynccontextmanager
async def serving(role: Shell) -> AsyncIterator[asyncio.Task[None]]:
    """Have a role serve meanwhile; it must still be alive in the end."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(role.serve())
        yield task
        assert not task.done()
        role.done.set()
