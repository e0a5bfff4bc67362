"""What the nodes of a simulated run share: disks that survive them, signatures, what was decided, and the rules.

A model is the hash of the one before and the parts applied to it; an average is the hash of the set it was folded
from; so two peers that disagree about anything end up different.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from blake3 import blake3

from dugnad.configs.recipe import Recipe
from dugnad.coordinator import effects, equivocation, ranges
from dugnad.coordinator.effects import Promises
from dugnad.coordinator.ledger import Charter
from dugnad.coordinator.messages import Commit
from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.decisions import Decision
from dugnad.dht.identity import PeerId
from dugnad.dht.ticket import Terms, Ticket, issue
from dugnad.peer.invariants import Invariants
from dugnad.peer.virtual import Net, Network, Station

RUN = blake3(b"a simulated run").digest()
FIRST_MODEL = blake3(b"a simulated first model").digest()
FIRST_INCARNATION = bytes(8)
ORGANIZER = PeerId("organizer")
COORDINATOR = PeerId("coordinator")
TICKET = PeerId("ticket")
"""The key of all tickets."""
PART_BYTES = 65_792
WALL_S = 1.7e9
"""Unix seconds when a simulated run begins."""


@dataclass(frozen=True, slots=True)
class SimSigner:
    """A keyed hash for a signature: as unforgeable as a simulation needs, a hundred times cheaper."""

    peer_id: PeerId

    def sign(self, payload: bytes) -> bytes:
        return blake3(self.peer_id.encode() + b"\0" + payload).digest(length=64)

    def verify(self, peer: PeerId, payload: bytes, signature: bytes) -> bool:
        return signature == SimSigner(peer).sign(payload)


check_evidence = equivocation.checker(SimSigner(ORGANIZER).verify)


@dataclass(slots=True)
class Disk:
    """What survives a crash."""

    commits: list[Commit] = field(default_factory=list)
    blobs: set[bytes] = field(default_factory=set)
    promises: Promises | None = None
    incarnation: bytes = FIRST_INCARNATION
    model_round: int = 0
    model_block: bytes = RUN
    """The block that the model is after."""
    model: bytes | None = None
    """None on a new disk; the organizer's first coordinator makes the first model itself."""

    def block(self, round_: int) -> bytes | None:
        """The block of that round in the chain that is here; before the first it is the run itself."""
        if round_ == 0:
            return RUN
        return self.commits[round_ - 1].block.hash if round_ <= len(self.commits) else None


S = TypeVar("S", bound=Station)


class Stage(Net[S]):
    """What all nodes of a run share: the recipe, the rules, what the organizer decided, and every disk.

    convicts: whether a peer that is proven to lie loses its seat; without that, agreement has to bear it to the end.
    """

    def __init__(
        self,
        seed: int,
        recipe: Recipe,
        *,
        num_parts: int = 12,
        part_bytes: Sequence[int] = (),
        network: Network | None = None,
        rule: QuorumRule | None = None,
        convicts: bool = True,
    ) -> None:
        super().__init__(seed, network or Network())
        self.recipe = recipe
        self.part_bytes = tuple(part_bytes) or (PART_BYTES,) * num_parts
        self.num_parts = len(self.part_bytes)
        kind = recipe.admission.kind
        self.charter = Charter(RUN, ORGANIZER, COORDINATOR, FIRST_INCARNATION, rule or QuorumRule(), kind)
        self.gate = self.charter.gate(SimSigner(ORGANIZER).verify)
        """Shared: what one of a thousand peers found out about a claim need not be found out a thousand times."""
        self.ticket = self.issue(Terms())
        """What volunteers come with from now on."""
        self.decisions: list[Decision] = []
        """What the organizer has decided, oldest first: who starts later hears of it at once."""
        self.disks: dict[PeerId, Disk] = {}
        self.models: dict[bytes, bytes] = {RUN: FIRST_MODEL}
        """Hash of a block -> the model after it."""
        self.trained: dict[bytes, ranges.Ranges] = {}
        """Root of a contribution -> the samples that it was trained on."""
        self.incarnations: dict[bytes, Disk] = {}
        """Every disk that there ever was."""
        self.rules = Invariants(
            self.charter,
            SimSigner(COORDINATOR).verify,
            fail=self.fail,
            disks=self.incarnations,
            trained=self.trained,
            models=self.models,
        )
        self.step: Callable[[S, str, Callable[[], object]], object] = lambda node, what, act: act()
        """Does one durable write or one Send of a node, (node, its name, it): a test may kill the node around it."""
        self.starts = 0
        self.left: dict[PeerId, str] = {}
        self.refusals: list[effects.Refused] = []
        self.convicts = convicts
        self.convicted: set[PeerId] = set()
        """Whom evidence names: in `rules` stands who lies indeed."""

    def wall_s(self) -> float:
        """The run's time, unix seconds."""
        return WALL_S + self.now

    def issue(self, terms: Terms) -> Ticket:
        """A ticket of the organizer's."""
        return issue(SimSigner(ORGANIZER), RUN, TICKET, terms)

    def accuse(self, first: bytes, second: bytes) -> None:
        """Everyone hears of a proof at once: how it spreads is the gossip's, and tried there."""
        accused = check_evidence(RUN, *sorted((first, second)))
        if accused is not None and accused not in self.rules.liars:
            self.fail(f"{accused} is honest, and is convicted")
        self.convicted |= set() if accused is None else {accused}
