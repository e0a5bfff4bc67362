"""A machine that stands still, for tests of the shell around it."""

from collections.abc import Sequence

from dugnad.coordinator.follower import Cost
from dugnad.coordinator.messages import Message, Plan
from dugnad.dht.identity import PeerId


class Still:
    """Does nothing, whatever it is told; `plan` is the one under way."""

    def __init__(self, plan: Plan) -> None:
        self.plan: Plan | None = plan

    def receive(self, sender: PeerId, message: Message, *, now: float) -> Sequence[object]:
        return ()

    def holds(self, digests: tuple[bytes, ...], *, now: float) -> Sequence[object]:
        return ()

    def applied(self, round_: int, model: bytes, cost: Cost, *, now: float) -> Sequence[object]:
        return ()

    def damaged(self, digests: tuple[bytes, ...], *, now: float) -> Sequence[object]:
        return ()

    def tick(self, *, now: float) -> Sequence[object]:
        return ()

    def wake_at(self) -> float:
        return float("inf")
