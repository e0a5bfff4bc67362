"""A machine that stands still, for tests of the shell around it."""

from collections.abc import Iterable, Mapping, Sequence

from dugnad.coordinator.effects import Cost
from dugnad.coordinator.messages import Applied, Commit, Plan
from dugnad.dht.identity import PeerId
from dugnad.dht.paths import Abilities
from dugnad.dht.wire import Message


class Still:
    """Does nothing, whatever it is told; `plan` is the one under way, `results` what was brought."""

    def __init__(self, plan: Plan) -> None:
        self.abilities = Abilities()
        self.plan: Plan | None = plan
        self.results: list[tuple[PeerId, tuple[int, int, int], dict[int, bytes]]] = []

    def restore(self, digests: Mapping[int, Mapping[PeerId, Applied]], validation: tuple[int, float | None]) -> None:
        pass

    def receive(self, sender: PeerId, message: Message, *, now: float) -> Sequence[object]:
        return ()

    def result(
        self, owner: PeerId, order: tuple[int, int, int], parts: dict[int, bytes], *, now: float
    ) -> Sequence[object]:
        self.results.append((owner, order, parts))
        return ()

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> Sequence[object]:
        return ()

    def synced(self, round_: int, model: bytes, since: Iterable[Commit], *, now: float) -> Sequence[object]:
        return ()

    def sync_failed(self, why: str, *, now: float) -> Sequence[object]:
        return ()

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> Sequence[object]:
        return ()

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> Sequence[object]:
        return ()

    def lost(self, peer: PeerId, why: str, *, now: float) -> Sequence[object]:
        return ()

    def tick(self, *, now: float) -> Sequence[object]:
        return ()

    def wake_at(self) -> float:
        return float("inf")
