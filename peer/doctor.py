"""What stands in the way of taking part, by facts that were measured: each check is a verdict and the one thing to do.

Nothing is measured here (`measure.py` does), and what was not measured is said to be so, never guessed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dugnad.dht.clock import NEGLIGIBLE_S, WARN_S, in_words
from dugnad.dht.paths import Path as Way
from dugnad.dht.paths import Reach
from dugnad.dht.transport import ASK_FOR_AN_INVITE
from dugnad.peer.folder import ANOTHER
from dugnad.peer.needs import Needs

SLOW_MBIT = 1.0
"""Below this up rate a peer holds up the others' exchange."""
GB = 1e9


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    SKIPPED = "skipped"
    """Not looked at, or not measured: it says nothing of how things are."""
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and the one thing to do, "" if there is nothing to do.

    code: of the error, if it has one.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    code: str = ""

    def __str__(self) -> str:
        """One line, as people see it before a run."""
        found = f"check  {self.name:<9} {self.found} "
        note = "    (" + (f"{self.code} " if self.code else "") + f"{self.advice})" if self.advice else ""
        verdict = "-" if self.verdict is Verdict.SKIPPED else self.verdict
        return f"{found:.<72} {verdict}{note}"


class CheckFailed(Exception):
    """A check that keeps us from taking part; code: its error's, with which the text begins."""

    def __init__(self, check: Check) -> None:
        super().__init__(f"{check.code} {check.name}: {check.found}. {check.advice}".removeprefix(" "))
        self.code = check.code


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """Versions; "" for what is not installed."""

    dugnad: str
    python: str
    torch: str
    hivemind: str
    daemon_fault: str | None = None
    """Why the network daemon does not start, "" if it does; None: not tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is to work with."""

    memory_free_bytes: int
    disk_free_bytes: int
    folder: str
    folder_fault: str = ""
    """Why it can't be made or written in, "" if it can."""
    cores: int
    threads: int
    """Cores that torch would use."""
    gpu: str | None
    """Name of the NVIDIA GPU, "" if there is none; None: not looked for."""
    gpu_free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Port:
    """A port that was asked for; fault: why it can't be listened on, "" if it can."""

    option: str
    port: int
    fault: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkFacts:
    """What an attempt to reach a run found out; None: not measured."""

    asked: int
    """Addresses in the invite."""
    reached: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    """(address, reason) of each that led nowhere."""
    run: str = ""
    """What its members say that it is; "" if none did."""
    invite_fault: str = ""
    """Why the invite lets us in no more, or never did, with its code in front."""
    refused: str = ""
    """Why the members turn us away, with its code in front."""
    stranger: bool = True
    """Whether the members were asked under a key made for this, so that not being admitted says nothing."""
    clock_error_s: float | None = None
    """How far this machine's clock is ahead of the run's."""
    clock_peers: int = 0
    rtt_s: float | None = None
    path: Way | None = None
    """The way to the member that is reached best."""
    reach: Reach | None = None
    inbound: bool | None = None
    """Whether a member could connect to us."""
    up_mbit: float | None = None
    down_mbit: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything that was measured; network None: no invite was given."""

    software: Software
    machine: Machine
    needs: Needs = field(default_factory=Needs)
    ports: tuple[Port, ...] = ()
    network: NetworkFacts | None = None


def checks(facts: Facts) -> list[Check]:
    """All checks, in the order in which people read them."""
    machine, needs = facts.machine, facts.needs
    found = [
        software(facts.software),
        memory(machine, needs),
        disk(machine, needs),
        processor(machine),
        gpu(machine, needs),
        ports(facts.ports),
    ]
    if facts.network is None:
        given = "not looked at: give an invite"
        return [*found, *(Check(name, Verdict.SKIPPED, given) for name in ("network", "clock"))]
    return [*found, invite(facts.network), network(facts.network), clock(facts.network), *_ways(facts.network)]


MEASURED = ("reach", "inbound", "path", "rtt_s", "up_mbit", "down_mbit", "clock_error_s")
"""Of `NetworkFacts`, for programs; null: not measured."""


def as_json(found: Iterable[Check], facts: NetworkFacts | None = None) -> dict[str, Any]:
    """The same for programs, with what was measured of the network."""
    rows = [
        {"name": one.name, "verdict": str(one.verdict), "found": one.found, "advice": one.advice, "code": one.code}
        for one in found
    ]
    said: dict[str, Any] = {"checks": rows, "ok": all(row["verdict"] != Verdict.FAILURE for row in rows)}
    if facts is not None:
        said["network"] = {name: getattr(facts, name) for name in MEASURED}
    return said


def software(facts: Software) -> Check:
    """Whether what we stand on is there and starts."""
    found = f"dugnad {facts.dugnad}, python {facts.python}, torch {facts.torch or 'missing'}"
    for name, version in (("torch", facts.torch), ("hivemind", facts.hivemind)):
        if not version:
            return Check("software", Verdict.FAILURE, found, f"{name} is not installed:  make setup, in your clone")
    if facts.daemon_fault:
        advice = f"the network daemon does not start: {facts.daemon_fault}"
        return Check("software", Verdict.FAILURE, found, advice)
    return Check("software", Verdict.OK, found if facts.daemon_fault is None else f"{found}, libp2p starts")


def memory(machine: Machine, needs: Needs) -> Check:
    """Whether model, optimizer and batch fit."""
    found = f"{_gb(machine.memory_free_bytes)} GB free, needs {_gb_up(needs.memory_bytes)}"
    if machine.memory_free_bytes < needs.memory_bytes:
        return Check("memory", Verdict.FAILURE, found, "Close other programs, or join a smaller run.", "E302")
    return Check("memory", Verdict.OK, found)


def disk(machine: Machine, needs: Needs) -> Check:
    """Whether the role's folder can be used, and checkpoints and recent rounds fit."""
    if machine.folder_fault:
        return Check("disk", Verdict.FAILURE, f"{machine.folder} {machine.folder_fault}", ANOTHER)
    found = f"{_gb(machine.disk_free_bytes)} GB free, needs {_gb_up(needs.disk_bytes)}"
    if machine.disk_free_bytes < needs.disk_bytes:
        advice = f"Make room in {machine.folder}, or choose a folder on another disk with --dir."
        return Check("disk", Verdict.FAILURE, found, advice, "E303")
    return Check("disk", Verdict.OK, found)


def processor(machine: Machine) -> Check:
    """With how many cores we would train."""
    found = f"{machine.threads} of {machine.cores} cores to train with"
    if machine.threads > machine.cores:
        return Check("cpu", Verdict.WARNING, found, f"more threads than cores slow it down: --threads {machine.cores}")
    return Check("cpu", Verdict.OK, found)


def gpu(machine: Machine, needs: Needs) -> Check:
    """Whether there is one where the run needs one."""
    if machine.gpu:
        return Check("gpu", Verdict.OK, f"{machine.gpu}, {_gb(machine.gpu_free_bytes)} GB free")
    if machine.gpu is None:
        return Check("gpu", Verdict.SKIPPED, "not looked for")
    if needs.gpu:
        return Check("gpu", Verdict.FAILURE, "none", f"{needs.recipe} trains with adamw8bit, on NVIDIA GPUs only")
    return Check("gpu", Verdict.OK, "none")


def ports(wanted: Iterable[Port]) -> Check:
    """Whether the ports that were asked for are free."""
    asked = list(wanted)
    for one in asked:
        if one.fault:  # where any port would do, it is the address
            found = f"{one.option} {one.port}" if one.port else "--host"
            return Check("ports", Verdict.FAILURE, found, one.fault.removeprefix("E202 "), "E202")
    return Check(
        "ports", Verdict.OK, ", ".join(f"{one.option} {one.port}" for one in asked if one.port) or "any free ones"
    )


def invite(facts: NetworkFacts) -> Check:
    """Whether what the invite promises still holds; who was revoked, and how many came, the members know."""
    if not facts.invite_fault:
        return Check("invite", Verdict.OK, "readable and not expired")
    code, _, why = facts.invite_fault.partition(" ")
    found, _, advice = why.partition(". ")
    return Check("invite", Verdict.FAILURE, found, advice, code)


def network(facts: NetworkFacts) -> Check:
    """Whether the run can be reached, and takes us."""
    found = f"{facts.reached} of {facts.asked} known addresses answer"
    each = "; ".join(f"{address} {reason}" for address, reason in facts.failures)
    if not facts.reached:
        return Check("network", Verdict.FAILURE, found, f"{each or 'nobody is there'}. {ASK_FOR_AN_INVITE}", "E201")
    code, _, why = facts.refused.partition(" ")
    if code in ("E401", "E403") and facts.stranger:  # of a key that was made a moment ago
        return Check("network", Verdict.OK, f"{found}; whether you are admitted shows in joining")
    if code:
        return Check("network", Verdict.FAILURE, found, why, code)
    if not facts.run:
        return Check("network", Verdict.WARNING, found, "none of them says what the run is: it may be starting")
    found = f"{found}: {facts.run}"
    return Check("network", Verdict.WARNING, found, each) if facts.failures else Check("network", Verdict.OK, found)


def clock(facts: NetworkFacts) -> Check:
    """Whether this machine's clock is right; the run corrects it anyway."""
    error_s = facts.clock_error_s
    if error_s is None:
        return Check("clock", Verdict.SKIPPED, "not compared: nobody answered")
    peers = "1 peer" if facts.clock_peers == 1 else f"{facts.clock_peers} peers"
    if abs(error_s) < NEGLIGIBLE_S:
        return Check("clock", Verdict.OK, f"right, by {peers}")
    found = f"{in_words(abs(error_s))} {'fast' if error_s > 0 else 'slow'}, corrected against {peers}"
    if abs(error_s) < WARN_S:
        return Check("clock", Verdict.OK, found)
    return Check("clock", Verdict.WARNING, found, "set it: what else runs here goes by it")


def _ways(facts: NetworkFacts) -> list[Check]:
    return [nat(facts), inbound(facts), path(facts), rates(facts)]


SYMMETRIC_ADVICE = "your router gives each connection another port: switch on UPnP, or forward two and say --announce"


def nat(facts: NetworkFacts) -> Check:
    """What kind of router stands before us."""
    match facts.reach:
        case None | Reach.UNKNOWN:
            return Check("nat", Verdict.SKIPPED, "not measured")
        case Reach.OPEN:
            return Check("nat", Verdict.OK, "none in the way: others can connect to this machine")
        case Reach.CONE:
            return Check("nat", Verdict.OK, "cone: through your router direct paths can be opened")
        case Reach.SYMMETRIC:
            return Check("nat", Verdict.WARNING, "symmetric: most paths go through a relay", SYMMETRIC_ADVICE)


def inbound(facts: NetworkFacts) -> Check:
    """Whether others can connect to us."""
    if facts.inbound is None:
        return Check("inbound", Verdict.SKIPPED, "not measured")
    if facts.inbound:
        some = "" if facts.reach is Reach.OPEN else "; your router may keep others out (if not, say --announce)"
        return Check("inbound", Verdict.OK, f"a member connected to this machine{some}")
    if facts.reach is Reach.CONE:
        return Check("inbound", Verdict.OK, "by paths that both sides open at once")
    advice = "inbound blocked: it works through others, slower. Switch on UPnP, or forward two ports and say --announce"
    return Check("inbound", Verdict.WARNING, "no member can connect to this machine", advice, "E203")


def path(facts: NetworkFacts) -> Check:
    """How we reach the members."""
    if facts.path is None:
        return Check("path", Verdict.SKIPPED, "not measured")
    rtt = "" if facts.rtt_s is None else f", {facts.rtt_s * 1000:.0f} ms there and back"
    return Check("path", Verdict.OK, f"{facts.path} to a member{rtt}")


def rates(facts: NetworkFacts) -> Check:
    """How fast bytes go up and down."""
    if facts.up_mbit is None and facts.down_mbit is None:
        return Check("rates", Verdict.SKIPPED, "not measured")
    up, down = (
        "?" if rate is None else f"{rate:.{1 if rate < 10 else 0}f}" for rate in (facts.up_mbit, facts.down_mbit)
    )
    found = f"up {up} / down {down} Mbit/s to a member"
    if facts.up_mbit is not None and facts.up_mbit < SLOW_MBIT:
        return Check(
            "rates", Verdict.WARNING, found, "a line this slow holds up each exchange; is another upload running?"
        )
    return Check("rates", Verdict.OK, found)


def _gb(nbytes: int) -> str:
    return f"{math.floor(nbytes / GB * 10) / 10:.1f}"  # down: what is free should not look like more than it is


def _gb_up(nbytes: int) -> str:
    return f"{math.ceil(nbytes / GB * 10) / 10:.1f}"
