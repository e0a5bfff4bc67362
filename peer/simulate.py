"""`dugnad simulate`: a whole run in virtual time, from one seed: how fast it is, what it sends, who waits for whom.

The machines of production in `world`, with lines that share bandwidth and messages of their true size; gossip, which
`world` leaves out, by itself in `simulate_gossip`. What a run costs is counted; what volunteers wait for is looked at
every `LOOK_S`, and that moment stands for the time since the last.
"""

import json
import math
import os
import random
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dugnad.configs.recipe import Recipe
from dugnad.coordinator.messages import MAX_PEERS
from dugnad.coordinator.rounds import Phase
from dugnad.coordinator.votes import QuorumRule
from dugnad.dht.identity import PeerId
from dugnad.peer.invariants import InvariantBroken
from dugnad.peer.lifecycle import State
from dugnad.peer.simulate_gossip import simulate_gossip
from dugnad.peer.stage import COORDINATOR
from dugnad.peer.traffic import BULK
from dugnad.peer.virtual import Network
from dugnad.peer.volunteer_node import VolunteerNode
from dugnad.peer.world import World

LOOK_S = 0.2
"""Virtual seconds from one look at what everyone waits for to the next."""
PATIENCE = 10
"""After how many times the longest round that the recipe allows without any commit a run counts as at a standstill."""
NAME_LETTERS = 52
"""How long the id of a real peer is: names travel in nearly every message."""
ARRIVAL_S = 1.0
"""Within how long the first volunteers come."""
REPLACED_S = (1.0, 10.0)
"""The least and the most until somebody new comes for one who died."""
TELL_S = (0.2, 5.0)
"""How often progress is shown: on a terminal, and elsewhere."""
SHOWN_KINDS = 6
MOST_PEERS = 1000
assert MOST_PEERS < MAX_PEERS
_UNITS = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}

SLOWEST, UPLOAD, UPLOADS = "training of the slowest", "own upload", "uploads of others"
AVERAGES, VOTES, APPLY = "averages", "votes", "applying the round"
PLAN, MODEL, LEADER = "the next plan", "download of the model", "someone to lead"


class SimulationError(Exception):
    """Something that can't be simulated; the message says what to ask for instead."""


def bytes_per_s(rate: str) -> float:
    """The bytes per second of a rate like "100mbit". Raises SimulationError."""
    said = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)(?:/s)?\s*", rate, re.IGNORECASE)
    unit = "" if said is None else said[2].lower()
    if said is None or unit not in _UNITS or float(said[1]) <= 0:
        raise SimulationError(f'--uplink "{rate}" is no rate: a number above 0 and kbit, mbit or gbit, as in 100mbit')
    return float(said[1]) * _UNITS[unit]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the command was asked to simulate; all that happens follows from it. Raises SimulationError."""

    recipe: str
    """Its name or path, as it was given."""
    peers: int
    churn: float
    uplink: str
    seed: int
    rounds: int | None = None
    step_s: float = 0.1

    def check(self, recipe: Recipe) -> None:
        """Raise SimulationError for what can't be simulated."""
        least = recipe.rounds.min_peers
        if self.peers < 1 or self.peers > MOST_PEERS:
            raise SimulationError(f"--peers is {self.peers}: a simulated run has 1 to {MOST_PEERS} volunteers")
        if self.peers < least:
            raise SimulationError(f"--peers is {self.peers}, but {recipe.name} waits for {least} (rounds.min_peers)")
        if not 0 <= self.churn <= 1:
            raise SimulationError(f"--churn is {self.churn:g}: it is a share, from 0 to 1 (0.01: one in a hundred)")
        if not 0 < self.step_s < math.inf:
            raise SimulationError(f"--step-s is {self.step_s:g}: it must be above 0")
        bytes_per_s(self.uplink)

    @property
    def command(self) -> str:
        """What replays it."""
        words = ["dugnad", "simulate", self.recipe, "--peers", str(self.peers), "--churn", f"{self.churn!r}"]
        words += ["--uplink", self.uplink, "--seed", str(self.seed)]
        words += [] if self.rounds is None else ["--rounds", str(self.rounds)]
        words += [] if self.step_s == 0.1 else ["--step-s", f"{self.step_s!r}"]
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What came of a simulated run."""

    asked: Asked
    virtual_s: float
    rounds_committed: int
    """Blocks with work in them."""
    rounds_discarded: int
    """Attempts at a round that were given up and made again; the work that was done for them may still have counted."""
    invariants_broken: tuple[str, ...]
    stood_still: str | None
    """Why the run did not come to its end, if no rule broke; the reason of whoever leads, if someone does."""
    utilization: float
    """Share of the volunteers' time that was training, 0..1."""
    bytes_per_peer_s: dict[str, float]
    """Sent, by kind, on average over all peers and the time that each was up."""
    largest_bytes_s: float
    """Sent by the peer that sent most of what is not bulk, gossip left out."""
    waits: dict[str, float]
    """Seconds that all volunteers together waited, by what for."""
    waited_for: tuple[str, int] | None
    """Who was the last to finish training most often, and in how many rounds."""

    @property
    def rounds_per_hour(self) -> float:
        """Of virtual time."""
        return self.rounds_committed * 3600 / self.virtual_s if self.virtual_s else 0.0

    @property
    def control_bytes_s(self) -> float:
        """What a peer sends per second besides work, averages and models."""
        return sum(count for kind, count in self.bytes_per_peer_s.items() if kind not in BULK)

    def as_json(self) -> dict[str, Any]:
        """What is written for programs."""
        return {
            "seed": self.asked.seed,
            "peers": self.asked.peers,
            "rounds_committed": self.rounds_committed,
            "rounds_discarded": self.rounds_discarded,
            "invariants_broken": list(self.invariants_broken),
            "utilization": round(self.utilization, 4),
            "bytes_per_peer_s": {kind: round(count, 1) for kind, count in self.bytes_per_peer_s.items()},
            "waits": {what: round(seconds, 1) for what, seconds in self.waits.items()},
        }

    def text(self) -> str:
        """What is shown to people."""
        asked, waited_s = self.asked, sum(self.waits.values())
        idle = 1 - self.utilization
        rows = [
            f"{asked.recipe}: {asked.peers} volunteers, {asked.uplink} each, {asked.churn:.1%} die in a round, seed "
            f"{asked.seed}",
            f"rounds    {self.rounds_committed} in {self.virtual_s:.0f} s: {self.rounds_per_hour:.0f} an hour; "
            f"{self.rounds_discarded} attempts given up",
            f"training  {self.utilization:.1%} of the volunteers' time; they wait the other {idle:.1%}:",
        ]
        for what, seconds in _largest_first(self.waits):
            who = f"  (most often {self.waited_for[0]}: {self.waited_for[1]} rounds)" if self.waited_for else ""
            rows.append(f"{idle * seconds / waited_s:9.1%} {what}{who if what == SLOWEST else ''}")
        bulk = [(kind, count) for kind, count in _largest_first(self.bytes_per_peer_s) if kind in BULK]
        control = [(kind, count) for kind, count in _largest_first(self.bytes_per_peer_s) if kind not in BULK]
        rows.append(f"sent      {_kilobytes(bulk)} per peer: work, averages, models ({_by_kind(bulk)})")
        rows.append(f"          {_kilobytes(control)} per peer: messages and gossip ({_by_kind(control)})")
        rows.append(f"          {self.largest_bytes_s / 1e3:.1f} kB/s of messages by the peer that sends most")
        for rule in self.invariants_broken:
            rows += [f"BROKEN    {rule}", f"replay    {asked.command}"]
        if self.stood_still is not None:
            rows.append(f"stopped   {self.stood_still}")
        return "\n".join(rows)


class Simulation:
    """One run of `recipe`, whose parts have `part_bytes`; tell: hears now and then how far it has come."""

    def __init__(
        self, recipe: Recipe, asked: Asked, part_bytes: Sequence[int], *, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        asked.check(recipe)
        self.recipe, self.asked = recipe, asked
        self.world = World(
            asked.seed,
            recipe,
            part_bytes=part_bytes,
            network=Network(bytes_per_s=bytes_per_s(asked.uplink), step_s=asked.step_s),
            rule=QuorumRule(recipe.admission.kind == "open"),
        )
        self._committed = self.world.rules.committed
        self._tell = tell
        self._rng = random.Random(f"deaths {asked.seed}")  # of its own: deaths do not change what else is drawn
        self._names = 0
        self._seen = 0
        self._committed_at = 0.0
        self._waits = _Waits()

    @property
    def rounds(self) -> int:
        """How many rounds with work in them are committed."""
        return sum(bool(commit.block.parts) for commit in self._committed.values())

    def run(self) -> Found:
        """Let the run come to its end, to a standstill, or to a rule that does not hold."""
        world, broken = self.world, ""
        world.start_coordinator()
        for _ in range(self.asked.peers):
            world.at(self._rng.random() * ARRIVAL_S, self._come)
        world.after(LOOK_S, self._look)
        try:
            world.run(math.inf, until=self._over)
            found = world.audit()
            if not found.clean:
                broken = f"seed {self.asked.seed}: the chain does not hold: {found}"
        except AssertionError as error:
            if not isinstance(error, InvariantBroken):  # a machine contradicted itself: where, says the traceback alone
                traceback.print_exception(error)
            broken = str(error) or f"seed {self.asked.seed}, {world.now:.3f} s: a machine contradicts itself"
        return self._found(broken)

    def _come(self) -> None:
        self._names += 1
        self.world.start_volunteer(f"p{self._names:04}".ljust(NAME_LETTERS, "."))

    def _die(self) -> None:
        up = [peer for peer in self.world.nodes if peer != COORDINATOR]
        if up:
            victim = self._rng.choice(up)
            self.world.crash(victim)
            self.world.wipe(victim)
            self.world.after(self._rng.uniform(*REPLACED_S), self._come)

    def _over(self) -> bool:
        """Whether that is all; called after everything that happens."""
        world = self.world
        if len(self._committed) == self._seen:
            return world.now > self._committed_at + self._patience_s
        self._seen = len(self._committed)
        newest = next(reversed(self._committed.values())).block
        took_s, self._committed_at = world.now - self._committed_at, world.now
        if newest.parts:
            self._waits.round_is_over()
            expected = self.asked.churn * self.asked.peers
            deaths = int(expected) + (self._rng.random() < expected % 1)
            for _ in range(deaths):  # somewhen in the round that begins, if it takes as long as this one did
                world.after(self._rng.random() * took_s, self._die)
        return newest.global_step >= self.recipe.rounds.total_steps

    @property
    def _patience_s(self) -> float:
        return PATIENCE * (self.recipe.rounds.train_s + self.recipe.rounds.exchange_s)

    def _look(self) -> None:
        world = self.world
        self._waits.look(world)
        total = self.recipe.rounds.num_rounds()
        up = len(world.nodes) - (COORDINATOR in world.nodes)
        self._tell(f"round {self.rounds} of {total}, {world.now:.0f} s of virtual time, {up} volunteers are up")
        world.after(LOOK_S, self._look)

    def _found(self, broken: str) -> Found:
        world, traffic = self.world, self.world.traffic
        up_s, training_s = defaultdict(float, traffic.up_s), defaultdict(float, traffic.training_s)
        for peer, node in world.nodes.items():
            up_s[peer] += world.now - node.up_since
            training_s[peer] += node.training_s()
        volunteers_s = sum(seconds for peer, seconds in up_s.items() if peer != COORDINATOR)
        sent: Counter[str] = Counter()
        for by_kind in traffic.sent.values():
            sent.update(by_kind)
        per_peer = {kind: count / max(1e-9, sum(up_s.values())) for kind, count in sent.items()}
        self._tell(f"gossip of {self.asked.peers + 1} peers")
        per_peer |= simulate_gossip(self.asked.peers + 1, seed=self.asked.seed, partition_s=0.0).mean_bytes_per_s
        control = {peer: sum(n for kind, n in said.items() if kind not in BULK) for peer, said in traffic.sent.items()}
        rounds = self.rounds
        done = bool(self._committed) and world.now <= self._committed_at + self._patience_s
        leader = world.leader()
        reason = "nobody leads" if leader is None else leader.leader().reason
        return Found(
            asked=self.asked,
            virtual_s=world.now,
            rounds_committed=rounds,
            rounds_discarded=len(traffic.plans) - len({(epoch, order[0]) for epoch, order in traffic.plans}),
            invariants_broken=(broken,) if broken else (),
            stood_still=None if done or broken else f"no round in {self._patience_s:.0f} s: {reason}",
            utilization=sum(training_s.values()) / volunteers_s if volunteers_s else 0.0,
            bytes_per_peer_s=dict(sorted(per_peer.items())),
            largest_bytes_s=max((n / max(1e-9, up_s[peer]) for peer, n in control.items()), default=0.0),
            waits=dict(sorted(self._waits.seconds.items())),
            waited_for=self._waits.waited_for,
        )


@dataclass(slots=True)
class _Waits:
    """What volunteers were seen to wait for."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _training: tuple[PeerId, ...] = ()
    """Who trained when somebody was last seen to, in this round."""
    _last: Counter[PeerId] = field(default_factory=Counter)

    def look(self, world: World) -> None:
        """Count what everyone waits for at this moment."""
        volunteers = [node for node in world.nodes.values() if isinstance(node, VolunteerNode)]
        training = tuple(node.peer for node in volunteers if node.machine.state is State.TRAIN)
        self._training = training or self._training
        leader = world.leader()
        phase = None if leader is None else leader.leader().phase
        for node in volunteers:
            what = _waits_for(node, phase, others_train=bool(training))
            if what is not None:
                self.seconds[what] += LOOK_S

    def round_is_over(self) -> None:
        """A round was committed."""
        if len(self._training) == 1:
            self._last[self._training[0]] += 1
        self._training = ()

    @property
    def waited_for(self) -> tuple[str, int] | None:
        """Who was most often the last to train, and in how many rounds."""
        most = max(self._last.items(), key=lambda item: (item[1], item[0]), default=None)
        return None if most is None else (most[0].rstrip("."), most[1])


def _waits_for(node: VolunteerNode, phase: Phase | None, *, others_train: bool) -> str | None:
    """What `node` waits for while whoever leads is in that phase; None while it trains."""
    machine = node.machine
    if machine.state is State.TRAIN:
        return None
    if machine.state is State.SYNC:
        return MODEL
    if not machine.follower.at_head:
        return APPLY
    if phase is None:
        return LEADER
    if phase is Phase.VOTE:
        return VOTES
    if phase is Phase.REDUCE:
        return AVERAGES
    if phase is not Phase.GATHER or machine.state is State.WAIT:
        return PLAN
    if node.uploads:
        return UPLOAD
    return SLOWEST if others_train else UPLOADS


def simulate(recipe: Recipe, asked: Asked, json_file: Path | None) -> int:
    """Simulate, show what came of it, and write it to `json_file`; the exit status: 0 if the run came to its end."""
    asked.check(recipe)
    from dugnad.peer.numerics import Numerics  # seconds, for torch: bad input is told at once

    progress = _Progress()
    found = Simulation(recipe, asked, Numerics(recipe).part_bytes, tell=progress.tell).run()
    progress.end()
    print(found.text())
    if json_file is not None:
        _write(json_file, json.dumps(found.as_json(), indent=1) + "\n")
    return 1 if found.invariants_broken or found.stood_still else 0


class _Progress:
    """One line that changes on a terminal, a line now and then elsewhere; on stderr: stdout is the same each time."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._next = time.monotonic() + TELL_S[0]

    def tell(self, line: str) -> None:
        """Show `line`, unless another was shown just now."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + TELL_S[not self._live]
            print(f"\r\x1b[K{line}" if self._live else f"{line}\n", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave nothing behind on a terminal."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _write(path: Path, text: str) -> None:
    """Put `text` at `path`, all or nothing."""
    descriptor, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _largest_first(counts: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _kilobytes(counts: Iterable[tuple[str, float]]) -> str:
    return f"{sum(count for _, count in counts) / 1e3:.1f} kB/s"


def _by_kind(counts: Sequence[tuple[str, float]]) -> str:
    shown = ", ".join(f"{kind} {count / 1e3:.1f}" for kind, count in counts[:SHOWN_KINDS])
    return shown + (", ..." if len(counts) > SHOWN_KINDS else "")
