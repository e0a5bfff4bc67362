"""What time it is in a run, on a machine whose clock may be wrong: as most of the members' clocks say.

A peer asks others for the time now and then. One answer tells the offset of another's clock to within half the time
that it took, so of several answers the quickest counts. The run's time is the median of the clocks of those asked and
our own: a minority that errs or lies moves it by no more than honest clocks differ. Where there is no majority (two
peers, half against half), the word of the eldest counts, for else two peers would each take the other's time. Answers
tell raw clocks, so peers that follow each other do not drift away together; only the eldest's word is its corrected
time, since it may know better than its clock, by others whom we have not met.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from dugnad.dht.identity import PeerId
from dugnad.dht.wire import WireError

NEGLIGIBLE_S = 1.0
"""An error that nothing notices: within it a clock is right."""
WARN_S = 5.0
"""From which error on people should hear of it."""
KEEP_S = 1800.0
"""How long an answer counts: clocks drift apart by some 50 ms in that time."""
MAX_PEERS = 64
SLOW_S = 10.0
"""An answer that took longer says nothing."""
SAME_AGE_S = 3.0
ANSWER_BYTES = 64
_LAST_MS = 2**53


class Time(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The answer to "what time is it?": by the answerer's clock, unix milliseconds, and what it adds to that."""

    clock_ms: Annotated[int, Meta(ge=0, le=_LAST_MS)]
    correction_ms: Annotated[int, Meta(ge=-_LAST_MS, le=_LAST_MS)]
    age_s: Annotated[int, Meta(ge=0, le=2**31)]
    """How long it has been in the run, this time."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question and its answer; `sent_s` and `received_s` by our uncorrected clock, `asked_at_s` a steady one's."""

    sent_s: float
    received_s: float
    theirs: Time
    asked_at_s: float

    @property
    def round_trip_s(self) -> float:
        """How long the answer took: the offset is off by half of that at most."""
        return self.received_s - self.sent_s

    @property
    def offset_s(self) -> float:
        """What to add to our clock to get theirs."""
        return self.theirs.clock_ms / 1000 - (self.sent_s + self.received_s) / 2


@dataclass(frozen=True, slots=True)
class Correction:
    """What to add to this machine's clock, and by how many peers that is known."""

    offset_s: float = 0.0
    num_peers: int = 0

    @property
    def warning(self) -> str | None:
        """What people should know of this machine's clock, if anything."""
        if abs(self.offset_s) < WARN_S:
            return None
        peers = "1 peer" if self.num_peers == 1 else f"{self.num_peers} peers"
        which = "fast" if self.offset_s < 0 else "slow"
        return f"this machine's clock is {in_words(abs(self.offset_s))} {which}; corrected against {peers}"


class Clock:
    """The run's time, as far as one peer knows it. Times named `at_s` are by a steady clock, which nobody sets."""

    def __init__(self, me: PeerId) -> None:
        self.correction = Correction()
        self._me = me
        self._samples: dict[PeerId, list[Sample]] = {}
        self._began_at_s: float | None = None

    def begin(self, *, at_s: float) -> None:
        """We are in the run from now on."""
        self._began_at_s = at_s

    def now(self, clock_s: float) -> float:
        """The run's time, unix seconds, when this machine's clock shows `clock_s`."""
        return clock_s + self.correction.offset_s

    def answer(self, *, clock_s: float, at_s: float) -> Time:
        """What we say to one who asks for the time."""
        return Time(round(clock_s * 1000), round(self.correction.offset_s * 1000), int(self._age_s(at_s)))

    def take(self, peer: PeerId, sample: Sample) -> bool:
        """Take in an answer; whether the correction is another now."""
        if not 0 <= sample.round_trip_s <= SLOW_S:  # our clock was set meanwhile, or it tells us little
            return False
        kept = [*self._samples.pop(peer, ()), sample]
        self._samples[peer] = [one for one in kept if sample.asked_at_s - one.asked_at_s <= KEEP_S][-4:]
        for old in [one for one, said in self._samples.items() if sample.asked_at_s - said[-1].asked_at_s > KEEP_S]:
            del self._samples[old]
        while len(self._samples) > MAX_PEERS:
            del self._samples[next(iter(self._samples))]
        before = self.correction
        self.correction = self._estimate(sample.asked_at_s)
        return abs(self.correction.offset_s - before.offset_s) >= NEGLIGIBLE_S

    def was_set(self, by_s: float) -> None:
        """This machine's clock was set forward by `by_s` seconds, or back: what we know of it is of the old one."""
        moved = {peer: [_shifted(one, by_s) for one in said] for peer, said in self._samples.items()}
        self._samples = moved
        self.correction = replace(self.correction, offset_s=self.correction.offset_s - by_s)

    def heard(self) -> Collection[PeerId]:
        """Those whose answers count now."""
        return self._samples.keys()

    def _age_s(self, at_s: float) -> float:
        return 0.0 if self._began_at_s is None else at_s - self._began_at_s

    def _estimate(self, at_s: float) -> Correction:
        ours = _Voice(0.0, self.correction.offset_s, int(self._age_s(at_s)), self._me)  # whole, as others hear it
        voices = [ours]
        for peer, said in self._samples.items():
            best = min(said, key=lambda one: one.round_trip_s)
            corrected_s = best.offset_s + said[-1].theirs.correction_ms / 1000
            voices.append(_Voice(best.offset_s, corrected_s, said[-1].theirs.age_s + at_s - said[-1].asked_at_s, peer))
        offset_s = _median(voices)
        return Correction(offset_s if abs(offset_s) >= NEGLIGIBLE_S else 0.0, len(self._samples))


@dataclass(frozen=True, slots=True)
class _Voice:
    """What one clock says, ours or another's, as offsets from ours."""

    raw_s: float
    corrected_s: float
    age_s: float
    peer: PeerId


def _median(voices: list[_Voice]) -> float:
    """The median of the raw clocks; where two in the middle differ, what the eldest of those who say either holds."""
    ordered = sorted(voices, key=lambda voice: voice.raw_s)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    if high.raw_s - low.raw_s < NEGLIGIBLE_S:
        return (low.raw_s + high.raw_s) / 2
    # not only the two in the middle: who of several equal clocks stands there, each of us would see otherwise
    either = [v for v in voices if min(abs(v.raw_s - low.raw_s), abs(v.raw_s - high.raw_s)) < NEGLIGIBLE_S]
    return _eldest(either).corrected_s


def _eldest(voices: list[_Voice]) -> _Voice:
    """The one of the lowest id among those about as old as the oldest: all must find the same, with ages known roughly.

    Two by two they could not be compared: of three, each might be a little older than the next.
    """
    oldest_s = max(voice.age_s for voice in voices)
    return min((voice for voice in voices if oldest_s - voice.age_s < SAME_AGE_S), key=lambda voice: voice.peer)


def _shifted(sample: Sample, by_s: float) -> Sample:
    return replace(sample, sent_s=sample.sent_s + by_s, received_s=sample.received_s + by_s)


_encoder = msgspec.msgpack.Encoder()
_times = msgspec.msgpack.Decoder(Time)


def encode_time(time: Time) -> bytes:
    """An answer as bytes."""
    return _encoder.encode(time)


def decode_time(raw: bytes) -> Time:
    """The answer in some bytes from anyone. Raises WireError."""
    if len(raw) > ANSWER_BYTES:
        raise WireError("too large", f"the time in {len(raw)} bytes, at most {ANSWER_BYTES}")
    try:
        return _times.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("malformed", f"time: {error}") from error


def in_words(seconds: float) -> str:
    """A duration for people, in its two largest units: "1 h 2 min"."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rest, words = round(seconds), list[str]()
    for name, size in units:
        count, rest = divmod(rest, size)
        if count or words:
            words.append(f"{count} {name}" if count else "")
        if len(words) == 2:
            break
    return " ".join(word for word in words if word) or "0 s"
