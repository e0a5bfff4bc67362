"""What the outside sees of a role, also while it is not there yet: status, metrics that are looked at, progress."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from dugnad.coordinator.roll import ALLOW_LIST
from dugnad.coordinator.service import Coordinator
from dugnad.dht.direct import Direct
from dugnad.dht.hello import BANNED, Verdict
from dugnad.dht.identity import PeerId, nickname
from dugnad.dht.records import ProgressBody
from dugnad.dht.swarm import Swarm
from dugnad.dht.transport import printable
from dugnad.monitoring.metrics import Metrics, PairSeen
from dugnad.peer import report
from dugnad.peer.report import Report
from dugnad.peer.why import ways

if TYPE_CHECKING:
    from dugnad.peer.session import Session  # and with it torch, which takes seconds

log = logging.getLogger(__name__)

_LOOK_S = 1.0


class Face:
    """Says what `role` is doing, once it and the swarm are set."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.role: Coordinator | Session | None = None
        self.swarm: Swarm | None = None
        self.direct: Direct | None = None
        self.claim = b""
        """Why we may take part, to be shown until the chain says it."""
        self.invite: Callable[[], str] = str
        """Makes one that leads to this peer."""
        self.invite_note: Callable[[], str] = str
        """What whoever gives it to somebody should know."""
        self._state = ("", 0.0)
        """What the role does, and since when, by the monotonic clock."""
        self._told_ways: object = None
        """How the others were reached when that was last said."""

    def status(self) -> Report:
        """The role's report; an empty one before there is a role."""
        if self.role is None or self.swarm is None:
            return {}
        role = self.role
        said = report.of_coordinator(role) if isinstance(role, Coordinator) else report.of_volunteer(role, self.swarm)
        if said["state"] != self._state[0]:
            self._state = (said["state"], time.monotonic())
        correction = self.swarm.clock.correction
        return said | {
            "reason": printable(str(said["reason"])),  # a stranger may have written it, in refusing us
            "clock_offset_s": correction.offset_s,
            "clock_warning": correction.warning,
            "quarantined": len(self.swarm.quarantined()),
            "out": said["peer"] in self.swarm.quarantined(),
            "key_in_use": self.swarm.key_in_use,
            "state_s": time.monotonic() - self._state[1],
            "invite": self.invite(),
            "invite_note": self.invite_note(),
            **self._ways(),
        }

    def judge(self, peer: PeerId) -> Verdict:
        """What keeps a peer out that says hello, as far as its name alone tells."""
        role = self.role
        refusal = None if role is None else role.follower.refuses(peer)
        if role is None or refusal is None:
            return Verdict()
        # who comes by invitation shows its claim later; and without the chain, we do not know whom it admitted
        judged = role.charter.admission == ALLOW_LIST and role.follower.model is not None
        return Verdict(refusal.code, refusal.why) if judged or refusal.code == BANNED else Verdict()

    def refuses(self, peer: PeerId, claim: bytes) -> str | None:
        """Why `peer`, who shows this claim, may have no direct connection with us."""
        if self.swarm is None:
            return "we are just starting"
        if peer in self.swarm.quarantined():
            return "it is quarantined"
        refusal = self.role.follower.refuses(peer, claim) if self.role is not None else None
        return str(refusal) if refusal is not None else None

    def bars(self, peer: PeerId) -> bool:
        """Whether `peer` gets nothing from us at all, not even what strangers get."""
        quarantined = self.swarm is not None and peer in self.swarm.quarantined()
        return quarantined or self.judge(peer).code == BANNED

    def _ways(self) -> Report:
        """How others reach us, and we them."""
        if self.direct is None:
            return {}
        return {
            "reach": self.direct.rendezvous.reach,
            "outside": self.direct.rendezvous.outside or None,
            "bulk_port": self.direct.rendezvous.carrier.port,
            "paths": [
                {
                    "peer": pair.peer,
                    "nickname": nickname(pair.peer),
                    "path": pair.path,
                    "rtt_s": pair.rtt_s,
                    "sent_mbit": pair.sent_bytes_per_s * 8e-6,
                    "received_mbit": pair.received_bytes_per_s * 8e-6,
                    "why": self.direct.rendezvous.why_not(pair.peer),
                }
                for pair in self.direct.paths()
            ],
        }

    def decide(self, raw: bytes) -> str | None:
        """Take and spread a decision of the organizer's; why it is refused, or None."""
        return "this role is only starting" if self.swarm is None else self.swarm.decide(raw)

    def decisions(self) -> list[dict[str, object]]:
        """What the organizer has decided, as far as it counts, oldest first."""
        known = [] if self.swarm is None else self.swarm.decisions.holding(now=self.swarm.now())
        return [
            {"subject": said.subject, "verdict": said.verdict, "reason": said.reason, "at_s": said.at_s}
            for said in known
        ]

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
        if self.direct is not None:
            self.metrics.reached(said["reach"])
            pairs = self.direct.paths()
            self.metrics.pairs_seen(
                PairSeen(nickname(one.peer), one.path, one.rtt_s, one.sent_bytes_per_s, one.received_bytes_per_s)
                for one in pairs
            )
        self._tell_ways(said)

    def _tell_ways(self, said: Report) -> None:
        """Say how the others are reached once another kind of way is used; not whenever somebody comes or goes."""
        kinds = (said.get("reach"), frozenset(one["path"] for one in said.get("paths", [])))
        if kinds != self._told_ways and (sentences := ways(said)):
            self._told_ways = kinds
            log.info("%s", " ".join(sentences))
