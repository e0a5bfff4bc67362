"""What a shell drives: the machine of its role, a `Keeper` or a `Volunteer`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from dugnad.coordinator.effects import Cost
from dugnad.coordinator.messages import Applied, Commit, Plan
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Abilities
from dugnad.dht.wire import Message


class Machine(Protocol):
    """Hears of everything that happens, and answers with the effects that it has, in their order."""

    abilities: Abilities
    """What it says of itself; kept by the shell."""

    @property
    def plan(self) -> Plan | None:
        """The plan of the round under way."""

    def restore(self, digests: Mapping[int, Mapping[PeerId, Applied]], validation: tuple[int, float | None]) -> None:
        """What the disk kept of what others signed."""

    def receive(self, sender: PeerId, message: Message, *, now: float) -> Sequence[object]:
        """Take a message."""

    def result(
        self, owner: PeerId, order: tuple[int, int, int], parts: dict[int, bytes], *, now: float
    ) -> Sequence[object]:
        """Averages are here."""

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> Sequence[object]:
        """Blobs are here."""

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> Sequence[object]:
        """A model is here."""

    def sync_failed(self, why: str, *, now: float) -> Sequence[object]:
        """No model could be had."""

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> Sequence[object]:
        """A round is applied."""

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> Sequence[object]:
        """Blobs of the round being applied are damaged."""

    def lost(self, peer: PeerId, why: str, *, now: float) -> Sequence[object]:
        """A peer does not answer."""

    def tick(self, *, now: float) -> Sequence[object]:
        """Time has passed."""

    def wake_at(self) -> float:
        """When to tick next."""
