"""How long the phases of the rounds that this peer leads take, and which attempts fail, for the metrics."""

from typing import Literal

from dugnad.coordinator.rounds import Leader, Phase
from dugnad.monitoring.metrics import Metrics

_TIMED: dict[Phase, Literal["gather", "reduce", "vote"]] = {
    Phase.GATHER: "gather",
    Phase.REDUCE: "reduce",
    Phase.VOTE: "vote",
}


class PhaseWatch:
    """Looks at `leader` after everything that happens to it."""

    def __init__(self, leader: Leader, metrics: Metrics) -> None:
        self._leader = leader
        self._metrics = metrics
        self._phase, self._since = leader.phase, 0.0
        self._order = (0, 0, 0)
        """Of the newest plan that was counted."""

    def look(self, *, now: float) -> None:
        """Count what has ended since the last look."""
        phase, plan = self._leader.phase, self._leader.plan
        if phase is not self._phase:
            if self._phase in _TIMED:
                self._metrics.phase_took(_TIMED[self._phase], now - self._since)
            self._phase, self._since = phase, now
        if plan is not None and plan.order > self._order:
            if plan.order[:2] == self._order[:2]:
                self._metrics.attempt_failed()
            self._order = plan.order
