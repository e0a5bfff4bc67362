"""Every metric of a role, in one table: name, type, labels, unit, help.

A label's values are declared beside it, and any other value counts as "other": what a stranger sends can't grow the
number of series. Counters stand at zero from the start, so that a first increase is seen; gauges and histograms appear
once there is something to say, so that an unknown loss is absent and not 0.
"""

import threading
from collections import Counter as Counts
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Direction = Literal["sent", "received"]
Phase = Literal["gather", "reduce", "vote", "apply", "train", "exchange"]

OTHER = "other"


@dataclass(frozen=True, slots=True)
class Label:
    """A label and the values it may take; `values` None: any, of which there are few at a time."""

    name: str
    values: tuple[str, ...] | None

    def bounded(self, value: str) -> str:
        """The value itself if it is declared, "other" if not."""
        return value if self.values is None or value in self.values else OTHER


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric; `unit` is "" for what is merely counted, `buckets` are a histogram's upper bounds in its unit."""

    name: str
    type: Literal["gauge", "counter", "histogram"]
    help: str
    unit: str = ""
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels, in their order."""
        return tuple(label.name for label in self.labels)

    def bounded(self, values: tuple[str, ...]) -> tuple[str, ...]:
        """One value for each label, undeclared ones replaced by "other"."""
        return tuple(label.bounded(value) for label, value in zip(self.labels, values, strict=True))


_DIRECTION = Label("direction", ("sent", "received"))
_PEER = Label("peer", None)
_PATH = Label("path", ("direct", "punched", "relayed", OTHER))
_REACH = Label("reach", ("open", "cone", "symmetric", "unknown", OTHER))
_PHASE = Label("phase", ("gather", "reduce", "vote", "apply", "train", "exchange", OTHER))
_PEER_STATE = Label(
    "state",
    ("syncing", "waiting", "training", "contributed", "reducing", "voted", "in the round", "lost", "unknown", OTHER),
)
_TRAFFIC = Label("kind", ("message", "upload", "result", "follow", "fetch", "state", "speed", OTHER))
_MESSAGE = Label(
    "kind",
    (
        "delegation", "plan", "contribution", "have", "freeze", "proposal", "vote", "lock", "view-change", "new-view",
        "commit", "applied", "report", "standing", "welcome?", "welcome", "commits?", "commits", "state?", "state",
        "summary", "want", "push", "buckets", OTHER,
    ),
)  # fmt: skip
_BAD_MESSAGE = Label(
    "reason",
    (
        "malformed", "version", "unknown kind", "too large", "foreign run", "bad signature", "not the sender",
        "wrong answer", "not a member", "not leader", "misdirected", "delegation", "foreign chain", "two proposals",
        "two locks", "not locked", "invalid plan", "invalid freeze", "invalid block", "invalid lock", "invalid pledge",
        "invalid view", "invalid commit", "no seat", "from the future", "lifetime", "unknown key", "full",
        "no evidence", "not expected", "too many", "bad claim", "foreign genesis", "not delegated",
        "not the organizer", "busy", "not outside", "ticket bound to another key", "foreign ticket", "altered ticket",
        "not admitted", OTHER,
    ),
)  # fmt: skip
_BAD_CONTRIBUTION = Label(
    "reason",
    (
        "non-finite", "late", "other samples", "bad contribution", "stale contribution", "no seat", "not admitted",
        "barred", "no room", OTHER,
    ),
)  # fmt: skip

_ROUND_BUCKETS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0)
_PHASE_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_DISK_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

RUN_INFO = Declared(
    "dugnad_run_info", "gauge", "Always 1: which role of which run this is.",
    labels=(Label("role", ("coordinator", "volunteer", OTHER)), Label("run", None), Label("nickname", None)),
)  # fmt: skip
ROUND = Declared("dugnad_round", "gauge", "The last round that was committed.")
GLOBAL_STEP = Declared("dugnad_global_step", "gauge", "Inner steps of the run so far.")
TRAIN_LOSS = Declared("dugnad_train_loss_nats", "gauge", "Loss of the last inner step, per token.", "nats")
VALIDATION_LOSS = Declared("dugnad_validation_loss_nats", "gauge", "Last validation loss, per byte.", "nats")
TOKENS = Declared("dugnad_tokens_total", "counter", "Tokens trained on here.", "tokens")
SPEED = Declared("dugnad_tokens_per_second", "gauge", "Tokens per second of the last inner step.", "tokens_per_second")
ROUND_DURATION = Declared(
    "dugnad_round_duration_seconds", "histogram", "Wall time from one committed round to the next.", "seconds",
    buckets=_ROUND_BUCKETS_S,
)  # fmt: skip
PHASE_DURATION = Declared(
    "dugnad_phase_duration_seconds", "histogram", "Wall time of one phase of a round.", "seconds", (_PHASE,),
    _PHASE_BUCKETS_S,
)  # fmt: skip
PEERS = Declared("dugnad_peers", "gauge", "Peers known here, by what they do.", labels=(_PEER_STATE,))
BYTES = Declared(
    "dugnad_bytes_total", "counter", "Payload bytes over the network, by what they were for.", "bytes",
    (_DIRECTION, _TRAFFIC),
)  # fmt: skip
MESSAGES = Declared("dugnad_messages_total", "counter", "Signed messages.", "messages", (_DIRECTION, _MESSAGE))
UTILIZATION = Declared("dugnad_utilization_ratio", "gauge", "Share of the last round spent computing, 0 to 1.", "ratio")
PAIRS = Declared("dugnad_pairs", "gauge", "Peers that bytes go to or come from, by the way they take.", labels=(_PATH,))
PAIR_RTT = Declared("dugnad_pair_rtt_seconds", "gauge", "Round trip to each of those peers.", "seconds", (_PEER,))
PAIR_RATE = Declared(
    "dugnad_pair_bytes_per_second", "gauge", "Rate of the newest large transfer with each of those peers.",
    "bytes_per_second", (_PEER, _DIRECTION),
)  # fmt: skip
PUNCHES = Declared(
    "dugnad_punches_total", "counter", "Connections punched through routers, by how we are reached and by the outcome.",
    labels=(_REACH, Label("outcome", ("connected", "failed", OTHER))),
)  # fmt: skip
REACH = Declared("dugnad_reach", "gauge", "1 for the way in which others reach us, else 0.", labels=(_REACH,))
REJECTED_CONTRIBUTIONS = Declared(
    "dugnad_rejected_contributions_total", "counter", "Training results that were not counted, by reason.",
    labels=(_BAD_CONTRIBUTION,),
)  # fmt: skip
REJECTED_MESSAGES = Declared(
    "dugnad_rejected_messages_total", "counter", "Messages of others that were dropped, by reason.",
    labels=(_BAD_MESSAGE,),
)  # fmt: skip
ROUNDS_COMMITTED = Declared("dugnad_rounds_committed_total", "counter", "Rounds committed while this role ran.")
FAILED_ATTEMPTS = Declared(
    "dugnad_failed_attempts_total", "counter", "Attempts at a round that this role led and had to plan again."
)
VIEW = Declared("dugnad_view", "gauge", "How many leaders of the round under way were given up.")
LEADS = Declared("dugnad_leads", "gauge", "1 while this role leads the round under way, else 0.")
COORDINATOR_SILENT = Declared(
    "dugnad_coordinator_silent_seconds", "gauge", "Since the coordinator was last heard; 0 while it is there.",
    "seconds",
)  # fmt: skip
CLOCK_OFFSET = Declared(
    "dugnad_clock_offset_seconds", "gauge", "What is added to this machine's clock to get the run's time.", "seconds"
)
QUARANTINED = Declared("dugnad_quarantined_peers", "gauge", "Peers that are proven to have said two things.", "peers")
CHECKPOINT_ROUND = Declared("dugnad_checkpoint_round", "gauge", "The round of the last checkpoint on disk.")
CHECKPOINT_DURATION = Declared(
    "dugnad_checkpoint_duration_seconds", "histogram", "Wall time of writing one checkpoint.", "seconds",
    buckets=_DISK_BUCKETS_S,
)  # fmt: skip

DECLARED = (
    RUN_INFO, ROUND, GLOBAL_STEP, TRAIN_LOSS, VALIDATION_LOSS, TOKENS, SPEED, ROUND_DURATION, PHASE_DURATION, PEERS,
    BYTES, MESSAGES, UTILIZATION, REJECTED_CONTRIBUTIONS, REJECTED_MESSAGES, ROUNDS_COMMITTED, FAILED_ATTEMPTS, VIEW,
    LEADS, COORDINATOR_SILENT, CLOCK_OFFSET, QUARANTINED, CHECKPOINT_ROUND, CHECKPOINT_DURATION,
    PAIRS, PAIR_RTT, PAIR_RATE, PUNCHES, REACH,
)  # fmt: skip
"""The table: all that a role can say."""


@dataclass(frozen=True, slots=True)
class PairSeen:
    """The way to one peer: its nickname, the path, and what was measured."""

    peer: str
    path: str
    rtt_s: float | None
    sent_bytes_per_s: float
    received_bytes_per_s: float


class Metrics:
    """The metrics of one role in one run, in a registry of their own; every method may be called in any thread."""

    def __init__(self, role: str, run: str, *, nickname: str = "") -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._gauges = {one: _gauge(one) for one in DECLARED if one.type == "gauge"}
        self._histograms = {one: _histogram(one) for one in DECLARED if one.type == "histogram"}
        self._counters = {one: _counter(one, self.registry) for one in DECLARED if one.type == "counter"}
        self._shown: set[Declared] = set(self._counters)
        self._set(RUN_INFO, 1, role, run, nickname)

    # -- the run

    def round_committed(self, round_: int, global_step: int, duration_s: float) -> None:
        """Round `round_` is committed, `duration_s` seconds after the one before, and leads to `global_step`."""
        self._set(ROUND, round_)
        self._set(GLOBAL_STEP, global_step)
        self._add(ROUNDS_COMMITTED, 1)
        self._observe(ROUND_DURATION, duration_s)

    def round_replayed(self, round_: int, global_step: int) -> None:
        """Round `round_`, committed before we came, is in place."""
        self._set(ROUND, round_)
        self._set(GLOBAL_STEP, global_step)

    def attempt_failed(self) -> None:
        """An attempt at committing a round came to nothing."""
        self._add(FAILED_ATTEMPTS, 1)

    def led(self, view: int, *, by_us: bool) -> None:
        """The round under way is in that view, and whether we lead it."""
        self._set(VIEW, view)
        self._set(LEADS, by_us)

    def phase_took(self, phase: Phase, seconds: float) -> None:
        """A phase of a round is over, after `seconds`."""
        self._observe(PHASE_DURATION, seconds, phase)

    def utilized(self, ratio: float) -> None:
        """In the last round, this share (0..1) of the time was spent computing."""
        self._set(UTILIZATION, ratio)

    def peers_seen(self, num_by_state: Mapping[str, int]) -> None:
        """How many peers there are in each state; a state that is not named has none."""
        counts = dict.fromkeys(_PEER_STATE.values or (), 0)
        for state, num in num_by_state.items():
            counts[_PEER_STATE.bounded(state)] += num
        for state, num in counts.items():
            self._set(PEERS, num, state)

    def coordinator_silent(self, seconds: float) -> None:
        """The coordinator was last heard `seconds` ago; 0 while it is there."""
        self._set(COORDINATOR_SILENT, seconds)

    def clock_corrected(self, offset_s: float) -> None:
        """The run's time is `offset_s` seconds ahead of this machine's clock; 0 while that is right."""
        self._set(CLOCK_OFFSET, offset_s)

    def quarantined(self, num_peers: int) -> None:
        """So many peers are proven to have signed two contradicting things."""
        self._set(QUARANTINED, num_peers)

    # -- the ways to others

    def pairs_seen(self, pairs: Iterable[PairSeen]) -> None:
        """These are the pairs in use, and no others."""
        pairs = list(pairs)
        for metric in (PAIR_RTT, PAIR_RATE):
            self._gauges[metric].clear()
        paths = Counts(pair.path for pair in pairs)
        for path in _PATH.values or ():
            self._set(PAIRS, paths[path], path)
        for pair in pairs:
            if pair.rtt_s is not None:
                self._set(PAIR_RTT, pair.rtt_s, pair.peer)
            self._set(PAIR_RATE, pair.sent_bytes_per_s, pair.peer, "sent")
            self._set(PAIR_RATE, pair.received_bytes_per_s, pair.peer, "received")

    def punched(self, reach: str, *, connected: bool) -> None:
        """A connection was, or could not be, punched by us, who are reached so."""
        self._add(PUNCHES, 1, reach, "connected" if connected else "failed")

    def reached(self, reach: str) -> None:
        """Others reach us in this way."""
        for one in _REACH.values or ():
            self._set(REACH, one == reach, one)

    # -- the model

    def trained(self, tokens: int, loss: float, tokens_per_s: float) -> None:
        """An inner step on `tokens` tokens; `loss` in nats per token."""
        self._add(TOKENS, tokens)
        self._set(TRAIN_LOSS, loss)
        self._set(SPEED, tokens_per_s)

    def validated(self, loss: float) -> None:
        """The shared model was measured; `loss` in nats per byte."""
        self._set(VALIDATION_LOSS, loss)

    def checkpoint_written(self, round_: int, duration_s: float) -> None:
        """The model after `round_` is on disk, and writing it took `duration_s` seconds."""
        self._set(CHECKPOINT_ROUND, round_)
        self._observe(CHECKPOINT_DURATION, duration_s)

    # -- the network

    def bytes_moved(self, direction: Direction, kind: str, num_bytes: int) -> None:
        """`num_bytes` payload bytes passed; fit to be a transport's meter."""
        self._add(BYTES, num_bytes, direction, kind)

    def message_passed(self, direction: Direction, kind: str) -> None:
        """A signed message passed; `kind` is its tag on the wire."""
        self._add(MESSAGES, 1, direction, kind)

    def rejected_message(self, reason: str) -> None:
        """A message was dropped."""
        self._add(REJECTED_MESSAGES, 1, reason)

    def rejected_contribution(self, reason: str) -> None:
        """A training result, ours or another's, was not counted."""
        self._add(REJECTED_CONTRIBUTIONS, 1, reason)

    def sent_bytes(self) -> dict[str, int]:
        """Bytes sent so far, by kind; kinds without any are left out."""
        return self._bytes("sent")

    def received_bytes(self) -> dict[str, int]:
        """Bytes received so far, by kind; kinds without any are left out."""
        return self._bytes("received")

    def _bytes(self, direction: Direction) -> dict[str, int]:
        samples = [sample for family in self._counters[BYTES].collect() for sample in family.samples]
        return {
            sample.labels["kind"]: int(sample.value)
            for sample in samples
            if sample.name == BYTES.name and sample.labels["direction"] == direction and sample.value
        }

    # -- the registry

    def _set(self, metric: Declared, value: float, *labels: str) -> None:
        gauge = self._gauges[metric]
        (gauge.labels(*metric.bounded(labels)) if labels else gauge).set(value)
        self._show(metric, gauge)

    def _observe(self, metric: Declared, value: float, *labels: str) -> None:
        histogram = self._histograms[metric]
        (histogram.labels(*metric.bounded(labels)) if labels else histogram).observe(value)
        self._show(metric, histogram)

    def _add(self, metric: Declared, amount: float, *labels: str) -> None:
        counter = self._counters[metric]
        (counter.labels(*metric.bounded(labels)) if labels else counter).inc(amount)

    def _show(self, metric: Declared, collector: Gauge | Histogram) -> None:
        with self._lock:
            if metric not in self._shown:
                self.registry.register(collector)
                self._shown.add(metric)


def _gauge(one: Declared) -> Gauge:
    return Gauge(one.name, one.help, one.label_names, registry=None, unit=one.unit)


def _histogram(one: Declared) -> Histogram:
    return Histogram(one.name, one.help, one.label_names, registry=None, unit=one.unit, buckets=one.buckets)


def _counter(one: Declared, registry: CollectorRegistry) -> Counter:
    counter = Counter(one.name, one.help, one.label_names, registry=registry, unit=one.unit)
    if one.labels:
        for values in product(*(label.values or () for label in one.labels)):
            counter.labels(*values)
    return counter
