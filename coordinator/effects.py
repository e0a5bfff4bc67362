"""What the machines of a round ask of the shell around them, and what a voter promises.

Effects are done in the order in which they come: what stands after a `Store` or a `Remember` may not leave before that
is durable.
"""

from dataclasses import dataclass

from msgspec import Struct

from dugnad.coordinator.messages import Applied, Commit, Lock, Proposal
from dugnad.dht.identity import PeerId
from dugnad.dht.wire import Message


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message`, sealed, to each of `to`."""

    to: tuple[PeerId, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Store:
    """Make `commit` durable; effects after this one must not leave before it is."""

    commit: Commit


@dataclass(frozen=True, slots=True)
class Rewind:
    """The `Store` that follows begins another epoch after `round_`; it durably takes the place of all that is later."""

    round_: int


class Promises(Struct, frozen=True, array_like=True):
    """What a voter has promised in one round, and must keep after a restart."""

    epoch: int
    round: int
    pledged: int = 0
    """It votes in no view before this one."""
    prevoted: Proposal | None = None
    """The newest proposal that it has prevoted."""
    lock: Lock | None = None


@dataclass(frozen=True, slots=True)
class Remember:
    """Make `promises` durable, in the place of those before; effects after this one must not leave before it is."""

    promises: Promises


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get these parts, (part, digest), from any of `donors`, store them, and say `holds`."""

    wanted: tuple[tuple[int, bytes], ...]
    donors: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply the committed parts of `commit`, all held, to the model, and say `applied`."""

    commit: Commit


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Ask `donor` for the commits after that place, (epoch, round), and hand them in."""

    donor: PeerId
    after: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Resync:
    """This model is of no use any more: take the state from peers, and say `synced`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A message was refused; `reason` is counted, `detail` logged."""

    sender: PeerId
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Accuse:
    """One voter signed both: two halves of a proof, as `equivocation` makes them."""

    first: bytes
    second: bytes


@dataclass(frozen=True, slots=True)
class Cost:
    """What a round cost this peer: seconds in training, seconds since the round before, bytes sent by kind."""

    train_s: float
    wall_s: float
    sent_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The work of `peer` does not count in this round, for a reason in a word or two."""

    peer: PeerId
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep durably what `peer` signed to have applied; nothing waits for it."""

    peer: PeerId
    said: Applied


Effect = Send | Store | Rewind | Remember | Fetch | Apply | CatchUp | Resync | Refused | Accuse | Keep | LeftOut
