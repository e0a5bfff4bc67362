"""The run's time: as most clocks say, whoever lies, and the same for all who ask each other."""

import contextlib
import random
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dugnad.dht.clock import (
    ANSWER_BYTES,
    KEEP_S,
    MAX_PEERS,
    NEGLIGIBLE_S,
    SLOW_S,
    Clock,
    Correction,
    Sample,
    Time,
    decode_time,
    encode_time,
    in_words,
)
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.wire import WireError

NOW = 1_700_000_000.0
HOUR = 3600.0
ME, *OTHERS = (Identity.from_seed(number.to_bytes(32)).peer_id for number in range(MAX_PEERS + 8))


def sample(
    ahead_s: float, *, took_s: float = 0.1, at_s: float = 0.0, age_s: int = 1000, correction_s: float = 0.0
) -> Sample:
    """The answer of a clock that is so far ahead of ours, which came in the middle of the time that it took."""
    sent_s = NOW + at_s
    clock_ms = round((sent_s + took_s / 2 + ahead_s) * 1000)
    return Sample(sent_s, sent_s + took_s, Time(clock_ms, round(correction_s * 1000), age_s), at_s)


def clock_among(*ahead_s: float, age_s: int = 1000) -> Clock:
    clock = Clock(ME)
    clock.begin(at_s=0.0)
    for peer, one in zip(OTHERS, ahead_s, strict=False):
        clock.take(peer, sample(one, age_s=age_s))
    return clock


def test_a_clock_that_is_an_hour_off_is_corrected_by_those_of_others() -> None:
    for off_s in (HOUR, -HOUR):
        clock = clock_among(off_s, off_s + 0.3, off_s - 0.2)
        assert clock.correction.offset_s == pytest.approx(off_s, abs=0.3)
        assert clock.correction.num_peers == 3
        assert clock.now(NOW) == pytest.approx(NOW + off_s, abs=0.3)


def test_a_right_clock_is_left_as_it_is() -> None:
    assert clock_among(0.4, -0.3, 0.2).correction == Correction(0.0, 3)
    assert Clock(ME).now(NOW) == NOW


@given(
    st.lists(st.floats(-0.4, 0.4), min_size=2, max_size=12),
    st.lists(st.floats(-1e9, 1e9), max_size=11),
    st.randoms(use_true_random=False),
)
def test_a_minority_of_liars_moves_the_time_no_further_than_honest_clocks_differ(
    honest: list[float], liars: list[float], rng: random.Random
) -> None:
    said = [*honest, *liars[: len(honest) - 1]]
    rng.shuffle(said)
    assert clock_among(*said, age_s=2**31).correction.offset_s == pytest.approx(0.0, abs=NEGLIGIBLE_S)


def test_of_several_answers_of_one_peer_the_quickest_counts() -> None:
    clock = Clock(ME)
    clock.take(OTHERS[0], sample(HOUR, took_s=0.1))
    slow = sample(HOUR, took_s=4.0)
    late = Sample(slow.sent_s, slow.received_s, Time(slow.theirs.clock_ms + 1900, 0, 1000), 1.0)
    assert not clock.take(OTHERS[0], late)
    assert clock.correction.offset_s == pytest.approx(HOUR, abs=0.01)
    assert clock.correction.num_peers == 1


def test_an_answer_that_took_too_long_or_came_before_the_question_says_nothing() -> None:
    clock = Clock(ME)
    for took_s in (SLOW_S + 0.1, -0.1):
        assert not clock.take(OTHERS[0], sample(HOUR, took_s=took_s))
    assert clock.correction == Correction()


def test_between_two_the_elder_keeps_its_time_and_the_younger_takes_it() -> None:
    elder, younger = Clock(ME), Clock(OTHERS[0])
    elder.begin(at_s=0.0)
    younger.begin(at_s=100.0)
    elder.take(OTHERS[0], sample(HOUR, at_s=101.0, age_s=1))
    younger.take(ME, sample(-HOUR, at_s=101.0, age_s=101))
    assert elder.correction == Correction(0.0, 1)
    assert younger.correction.offset_s == pytest.approx(-HOUR)
    assert younger.correction.num_peers == 1


@pytest.mark.parametrize("age_s", [0.0, 1.0, 2.4])
def test_two_of_about_the_same_age_agree_all_the_same(age_s: float) -> None:
    one, other = Clock(ME), Clock(OTHERS[0])
    one.begin(at_s=0.0)
    other.begin(at_s=age_s)
    for first, second, peer, ahead_s in ((one, other, OTHERS[0], HOUR), (other, one, ME, -HOUR)):
        theirs = second.answer(clock_s=NOW + ahead_s, at_s=10.0)
        first.take(peer, Sample(NOW, NOW, theirs, 10.0))
    assert one.now(NOW) == pytest.approx(other.now(NOW + HOUR))


def test_who_knows_only_one_takes_its_corrected_time() -> None:
    clock = Clock(ME)
    clock.take(OTHERS[0], sample(HOUR, correction_s=-HOUR))
    assert clock.correction == Correction(0.0, 1)


def swarm_of(offsets_s: list[float], ages_s: list[float]) -> Iterator[list[float]]:
    """What time all hold it for, relative to the true one, each time that all have asked all others."""
    peers = [ME, *OTHERS][: len(offsets_s)]
    clocks = [Clock(peer) for peer in peers]
    for clock, age_s in zip(clocks, ages_s, strict=True):
        clock.begin(at_s=-age_s)
    for round_ in range(6):
        at_s = 300.0 * round_
        for clock, off_s in zip(clocks, offsets_s, strict=True):
            for peer, other, other_off_s in zip(peers, clocks, offsets_s, strict=True):
                if other is not clock:
                    theirs = other.answer(clock_s=NOW + at_s + other_off_s, at_s=at_s)
                    clock.take(peer, Sample(NOW + at_s + off_s, NOW + at_s + off_s, theirs, at_s))
        yield [clock.now(off_s) for clock, off_s in zip(clocks, offsets_s, strict=True)]


@example([(0.0, 0.0), (0.0, 1.0), (-HOUR, 0.0), (-HOUR, 3.0)])  # half against half, and hardly one older than another
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.3, -HOUR, HOUR, 7 * HOUR]), st.floats(0, 1e6)), min_size=2, max_size=9)
)
def test_all_who_ask_each_other_find_the_same_time(peers: list[tuple[float, float]]) -> None:
    offsets_s, ages_s = (list(part) for part in zip(*peers, strict=True))
    *_, before, last = swarm_of(offsets_s, ages_s)
    assert max(last) - min(last) <= 2 * NEGLIGIBLE_S
    assert last == pytest.approx(before, abs=NEGLIGIBLE_S)
    right = [off_s for off_s in offsets_s if abs(off_s) < 1]
    if 2 * len(right) > len(peers):
        assert last == pytest.approx([0.0] * len(peers), abs=NEGLIGIBLE_S)


def test_answers_are_forgotten_after_a_while_and_are_of_a_bounded_number_of_peers() -> None:
    clock = Clock(ME)
    for peer in OTHERS:
        clock.take(peer, sample(HOUR))
    assert clock.correction.num_peers == MAX_PEERS
    clock.take(OTHERS[0], sample(HOUR, at_s=KEEP_S + 1.0))
    assert clock.correction.offset_s == pytest.approx(HOUR)
    assert clock.correction.num_peers == 1


def test_a_clock_that_is_set_while_we_run_changes_nothing() -> None:
    clock = clock_among(HOUR, HOUR, HOUR)
    before_s = clock.now(NOW)
    clock.was_set(HOUR)  # its owner has seen the warning
    assert clock.now(NOW + HOUR) == before_s
    assert not clock.take(OTHERS[0], sample(0.0))
    assert clock.correction.offset_s == 0.0
    assert clock.now(NOW + HOUR) == pytest.approx(before_s, abs=NEGLIGIBLE_S)


@pytest.mark.parametrize(
    ("correction", "words"),
    [
        (Correction(-3720.0, 5), "this machine's clock is 1 h 2 min fast; corrected against 5 peers"),
        (Correction(8.2, 1), "this machine's clock is 8 s slow; corrected against 1 peer"),
        (Correction(4.9, 9), None),
        (Correction(), None),
    ],
)
def test_a_warning_names_the_error_in_words(correction: Correction, words: str | None) -> None:
    assert correction.warning == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.6, "1 min"),
        (90, "1 min 30 s"),
        (3600, "1 h"),
        (3605, "1 h"),
        (90_000, "1 d 1 h"),
        (86_400, "1 d"),
    ],
)
def test_durations_are_told_in_their_two_largest_units(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_an_answer_travels_as_few_bytes_and_garbage_is_a_wire_error() -> None:
    most = Time(2**53, -(2**53), 2**31)
    assert decode_time(encode_time(most)) == most
    assert len(encode_time(most)) <= ANSWER_BYTES
    nonsense = [b"", b"\xc0", b"x" * 100, *(msgspec.msgpack.encode(one) for one in ((1,), (-1, 0, 0), (0, 0, -1)))]
    for raw in nonsense:
        with pytest.raises(WireError):
            decode_time(raw)


@given(st.binary(max_size=100))
def test_any_bytes_are_an_answer_or_a_wire_error(raw: bytes) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(decode_time(raw), Time)


def test_the_peer_that_answers_is_named_by_whoever_took_the_answer() -> None:
    clock = clock_among(0.0, 0.0)
    assert list(clock.heard()) == [PeerId(peer) for peer in OTHERS[:2]]
