"""What a role is given by the process that it lives in."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dugnad.coordinator.messages import Genesis
from dugnad.dht.budget import GIVE_MBIT, Budget
from dugnad.dht.decisions import Decisions
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.paths import Abilities
from dugnad.dht.transport import Transport
from dugnad.monitoring.metrics import Metrics


def _hears_nothing(first: bytes, second: bytes) -> None:
    """Accusations lead to nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """Of a role in one run; of the functions, a role that is alone can do without."""

    identity: Identity
    genesis: Genesis
    transport: Transport
    directory: Path
    """Where it keeps what must survive it."""
    metrics: Metrics
    budget: Budget = field(default_factory=lambda: Budget.of_mbit(GIVE_MBIT))
    """What the process gives away, of which those who fetch from the role are served."""
    abilities: Callable[[], Abilities] = Abilities
    """Where and how the role can be reached now."""
    contacts: Callable[[], Iterable[PeerId]] = tuple
    """Peers of the run that are known from elsewhere, for one who hears of no leader."""
    quarantined: Callable[[], frozenset[PeerId]] = frozenset
    """Who is proven to lie: no seat and no vote."""
    decisions: Decisions = field(default_factory=Decisions)
    """What the organizer has decided so far; more come in as they are heard of."""
    clock: Callable[[], float] = time.time
    """The run's time, unix seconds."""
    accuse: Callable[[bytes, bytes], None] = _hears_nothing
    """Hears the two halves of each proof that a voter lies."""
