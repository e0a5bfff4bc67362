"""What the outside sees of a role, also while it is not there yet: status, metrics that are looked at, progress."""

import asyncio
from collections import Counter
from collections.abc import Callable

from dugnad.coordinator.service import Coordinator
from dugnad.dht.records import ProgressBody
from dugnad.dht.swarm import Swarm
from dugnad.dht.transport import printable
from dugnad.monitoring.metrics import Metrics
from dugnad.peer import report
from dugnad.peer.report import Report
from dugnad.peer.session import Session

_LOOK_S = 1.0


class Face:
    """Says what `role` is doing, once it and the swarm are set."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.role: Coordinator | Session | None = None
        self.swarm: Swarm | None = None
        self.invite: Callable[[], str] = str
        """Makes one that leads to this peer."""

    def status(self) -> Report:
        """The role's report; an empty one before there is a role."""
        if self.role is None or self.swarm is None:
            return {}
        role = self.role
        said = report.of_coordinator(role) if isinstance(role, Coordinator) else report.of_volunteer(role, self.swarm)
        correction = self.swarm.clock.correction
        return said | {
            "reason": printable(str(said["reason"])),  # a stranger may have written it, in refusing us
            "clock_offset_s": correction.offset_s,
            "clock_warning": correction.warning,
            "quarantined": len(self.swarm.quarantined()),
            "invite": self.invite(),
        }

    def line(self) -> str:
        """One line for a person who waits."""
        said = self.status()
        return report.line(said) if said else "looking for the run"

    def progress(self) -> ProgressBody | None:
        """What others should know of us."""
        said = self.status()
        if not said:
            return None
        digest = bytes.fromhex(said["model_digest"] or "")
        state, reason = str(said["state"]), str(said["reason"])[:200]
        step, speed, loss = said.get("step", 0), said.get("tokens_per_s", 0.0), said.get("loss")
        return ProgressBody(said["round"], state, reason, step, speed, loss, digest)

    async def keep_looking(self) -> None:
        """Keep those metrics fresh that nobody counts as they happen."""
        while True:
            self.look()
            await asyncio.sleep(_LOOK_S)

    def look(self) -> None:
        """Set those metrics to what is so now."""
        said = self.status()
        if not said:
            return
        self.metrics.peers_seen(Counter(str(peer["state"]) for peer in said["peers"]))
        self.metrics.led(said["view"], by_us=said["leads"])
        self.metrics.coordinator_silent(said["coordinator"]["gone_s"])
        self.metrics.clock_corrected(said["clock_offset_s"])
        self.metrics.quarantined(said["quarantined"])
