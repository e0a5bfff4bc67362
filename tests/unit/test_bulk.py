"""Bulk bytes: what is pushed or fetched arrives whole, and no stranger's bytes do harm at either end."""

import asyncio
import struct
import threading
import tracemalloc
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dugnad.dht import bulk
from dugnad.dht.budget import PIECE_BYTES, Budget
from dugnad.dht.bulk import (
    BLOB_CHANNEL,
    MAX_BUFFERS,
    SILENCE_S,
    SLOWEST_BYTES_PER_S,
    Gone,
    Nonsense,
    PushRefused,
    Stalled,
    Unavailable,
    WrongHash,
    fetch,
    fetch_all,
    push,
    serve_blobs,
    serve_push,
)
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import Stream, TransportError, Unreachable
from tests.unit.memory_transport import BUFFER_BYTES, Fault, MemoryTransport, Net, network

Heard = TypeVar("Heard")

ME, ANN, BOB, EVE = (PeerId(name) for name in ("me", "ann", "bob", "eve"))
CHANNEL = "test/push/1"
SHORT_S, PATIENT_S, LONG_S = 0.05, 0.3, 60.0
HEADER_CAP = 64
TOTAL_CAP = 1 << 28
"""So much is promised in these tests, and never sent."""
SMALL = 4 * PIECE_BYTES
"""So many bytes may be allocated for one who has not earned more; no less than the framing itself may take."""
FINE, REFUSED = 0, 1
HEAD, PAYLOADS = b"a header", [b"one", b"three"]


# -- the wire, by hand


def opening(
    header: bytes = HEAD,
    sizes: tuple[int, ...] = (3, 5),
    *,
    kind: bytes = b"upload",
    kind_length: int | None = None,
    header_length: int | None = None,
    count: int | None = None,
) -> bytes:
    """How a push begins, with any of its lengths a lie."""
    return b"".join(
        (
            bytes([len(kind) if kind_length is None else kind_length]) + kind,
            struct.pack(">I", len(header) if header_length is None else header_length) + header,
            struct.pack(">I", len(sizes) if count is None else count) + struct.pack(f">{len(sizes)}Q", *sizes),
        )
    )


def verdict(number: int, words: bytes = b"", *, length: int | None = None) -> bytes:
    return bytes([number]) + struct.pack(">I", len(words) if length is None else length) + words


def request(digest: bytes, size: int, *, kind: bytes = b"fetch", kind_length: int | None = None) -> bytes:
    return bytes([len(kind) if kind_length is None else kind_length]) + kind + digest + struct.pack(">Q", size)


PUSHED = opening() + b"onethree"
"""All that an honest pusher says."""
ANSWERED = verdict(FINE) + verdict(FINE, b"thanks")
"""All that is said to it."""


# -- the peers


@dataclass
class Taker:
    """Whoever takes pushes: why it would not, what it was asked, and what it took."""

    refuses: str | None = None
    asked: list[tuple[PeerId, bytes, tuple[int, ...]]] = field(default_factory=list)
    taken: list[tuple[PeerId, bytes, list[bytes]]] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing is taken before this is set."""

    async def serve(self, transport: MemoryTransport) -> None:
        self.open.set()
        await serve_push(transport, CHANNEL, self.accept, self.take, header_cap=HEADER_CAP, total_cap=TOTAL_CAP)

    def accept(self, sender: PeerId, header: bytes, sizes: tuple[int, ...]) -> str | None:
        self.asked.append((sender, header, sizes))
        return self.refuses

    async def take(self, sender: PeerId, header: bytes, payloads: list[memoryview]) -> bytes:
        await self.open.wait()
        self.taken.append((sender, header, [bytes(payload) for payload in payloads]))
        return b"thanks"


async def give(net: Net, peer: PeerId, blobs: Mapping[bytes, bytes]) -> None:
    """Have `peer` serve `blobs`."""
    await serve_blobs(net.join(peer), blobs.get, budget=Budget(1e12))


async def rest(stream: Stream) -> bytes:
    """All that the other side still says."""
    said = bytearray()
    with suppress(Unreachable):
        while True:
            said += await stream.read_exactly(1)
    return bytes(said)


async def say(net: Net, transport: MemoryTransport, channel: str, said: bytes, fault: Fault | None = None) -> bytes:
    """What `ME` answers to a stranger that says exactly this, and no more."""
    net.faults[transport.peer_id, ME] = fault or Fault(cut_after=len(said))
    try:
        stream = await transport.open(ME, channel, kind="strange")
    finally:
        del net.faults[transport.peer_id, ME]
    with suppress(Unreachable):
        await stream.write(said + b"\0")  # one more, for the cut to end the stream also after nothing
    answer = await rest(stream)
    await stream.close()
    return answer


async def serve_stranger(net: Net, peer: PeerId, channel: str, said: bytes, *, then_ends: bool) -> None:
    """Have `peer` answer whatever it is told with exactly this; then it ends the stream, or is silent."""

    async def serve(sender: PeerId, stream: Stream) -> None:
        with suppress(Unreachable):
            await stream.write(said + b"\0" if then_ends else said)
        await rest(stream)

    if then_ends:
        net.faults[peer, ME] = Fault(cut_after=len(said))
    await net.join(peer).serve_stream(channel, serve)


async def hear_stranger(
    channel: str, said: bytes, ask: Callable[[MemoryTransport], Coroutine[None, None, Heard]], *, then_ends: bool = True
) -> Heard:
    """What `ask` makes out of these bytes of `EVE`; its error, if it has one, as it is."""
    async with network() as net:
        await serve_stranger(net, EVE, channel, said, then_ends=then_ends)
        (heard,) = await asyncio.gather(ask(net.join(ME)), return_exceptions=True)
    if isinstance(heard, BaseException):
        raise heard
    return heard


def push_to_stranger(said: bytes, *, then_ends: bool = True) -> Coroutine[None, None, bytes]:
    """The reply that `ME` makes out of this."""
    return hear_stranger(
        CHANNEL,
        said,
        lambda me: push(me, EVE, CHANNEL, HEAD, PAYLOADS, kind="upload", timeout_s=LONG_S),
        then_ends=then_ends,
    )


def fetch_from_stranger(
    digest: bytes, size: int, said: bytes, *, then_ends: bool = True
) -> Coroutine[None, None, memoryview]:
    """The blob that `ME` makes out of this."""
    return hear_stranger(
        BLOB_CHANNEL,
        said,
        lambda me: fetch(me, EVE, digest, size, kind="fetch", timeout_s=LONG_S if then_ends else SHORT_S),
        then_ends=then_ends,
    )


@asynccontextmanager
async def taking(taker: Taker) -> AsyncIterator[tuple[Net, MemoryTransport, MemoryTransport]]:
    """A network in which `ME` takes pushes: with it, a stranger and an honest peer."""
    async with network() as net:
        await taker.serve(net.join(ME))
        yield net, net.join(EVE), net.join(ANN)


async def still_serves(taker: Taker, *peers: MemoryTransport) -> None:
    """An honest push of each peer gets through."""
    for peer in peers:
        taker.taken.clear()
        assert await push(peer, ME, CHANNEL, HEAD, PAYLOADS, kind="upload", timeout_s=LONG_S) == b"thanks"
        assert taker.taken == [(peer.peer_id, HEAD, PAYLOADS)]


@contextmanager
def allocating_at_most(num_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before <= num_bytes


class Clock:
    """The running loop's time; it stands still until it is told to pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._now_s = loop.time()
        monkeypatch.setattr(loop, "time", lambda: self._now_s)

    async def passes(self, seconds: float) -> None:
        """First everyone gets to where it waits, then time passes, then everyone notices."""
        await self._settle()
        self._now_s += seconds
        await self._settle()

    async def _settle(self) -> None:
        for _ in range(100):
            await asyncio.sleep(0)


async def raised_by(work: Coroutine[None, None, bytes], clock: Clock, after_s: float) -> BaseException | None:
    """What `work` raises when time passes; nothing yet shortly before."""
    task = asyncio.create_task(work)
    await clock.passes(after_s - 0.5)
    assert not task.done()
    await clock.passes(1.0)
    await asyncio.wait([task])
    return task.exception()


# -- push: what arrives


@pytest.mark.parametrize(
    ("buffer_bytes", "sizes"),
    [
        (1, (0, 1, 300)),
        (1000, (0, PIECE_BYTES + 1, 0)),
        (BUFFER_BYTES, (PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * BUFFER_BYTES)),
        (BUFFER_BYTES, ()),
        (BUFFER_BYTES, (1,) * MAX_BUFFERS),
    ],
)
async def test_what_is_pushed_is_taken_whole_and_answered(buffer_bytes: int, sizes: tuple[int, ...]) -> None:
    payloads = [bytes([k % 251]) * size for k, size in enumerate(sizes)]
    taker = Taker()
    async with network(buffer_bytes=buffer_bytes) as net:
        await taker.serve(net.join(ME))
        reply = await push(net.join(ANN), ME, CHANNEL, HEAD, payloads, kind="upload", timeout_s=LONG_S)
    assert reply == b"thanks"
    assert taker.asked == [(ANN, HEAD, sizes)]
    assert taker.taken == [(ANN, HEAD, payloads)]


async def test_all_kinds_of_buffers_are_pushed_as_their_bytes() -> None:
    floats = array("f", [1.0, -2.5, 3.25])
    taker = Taker()
    async with taking(taker) as (_, _, ann):
        payloads: list[memoryview | bytearray | bytes]
        payloads = [memoryview(floats), bytearray(b"abc"), memoryview(b"defg")[1:3], b""]
        await push(ann, ME, CHANNEL, b"", payloads, kind="upload", timeout_s=LONG_S)
    assert taker.taken == [(ANN, b"", [floats.tobytes(), b"abc", b"ef", b""])]


async def test_bytes_said_by_hand_are_a_push_and_the_answer_is_as_the_module_says() -> None:
    taker = Taker()
    async with taking(taker) as (net, eve, _):
        assert await say(net, eve, CHANNEL, PUSHED) == ANSWERED
    assert taker.taken == [(EVE, HEAD, PAYLOADS)]


async def test_pushed_bytes_are_counted_as_their_kind_on_both_sides() -> None:
    async with network() as net:
        ann, me = net.join(ANN), net.join(ME)
        await Taker().serve(me)
        await push(ann, ME, CHANNEL, HEAD, PAYLOADS, kind="upload", timeout_s=LONG_S)
        assert ann.metered == {("sent", "upload"): len(PUSHED), ("received", "upload"): len(ANSWERED)}
        unknown = 1 + len("upload")  # nobody knows the kind before it is read
        assert me.metered == {
            ("received", "unknown"): unknown,
            ("received", "upload"): len(PUSHED) - unknown,
            ("sent", "upload"): len(ANSWERED),
        }


# -- push: refusals


async def test_why_a_push_is_refused_reaches_the_pusher_and_nothing_but_the_header_travels() -> None:
    taker = Taker(refuses="this round is over — sorry")
    async with taking(taker) as (_, _, ann):
        payloads = [bytes(5 * BUFFER_BYTES)]
        with pytest.raises(PushRefused, match="this round is over — sorry") as caught:
            await push(ann, ME, CHANNEL, HEAD, payloads, kind="upload", timeout_s=LONG_S)
        assert (caught.value.peer, caught.value.reason) == (ME, taker.refuses)
        assert ann.metered["sent", "upload"] == len(opening(sizes=(0,)))
        taker.refuses = None
        await still_serves(taker, ann)


async def test_who_takes_the_payloads_may_still_refuse_them() -> None:
    async def take(sender: PeerId, header: bytes, payloads: list[memoryview]) -> bytes:
        raise PushRefused(sender, "part 3 is not what its digest promised")

    async with network() as net:
        await serve_push(net.join(ME), CHANNEL, lambda *_: None, take, header_cap=HEADER_CAP, total_cap=TOTAL_CAP)
        ann = net.join(ANN)
        for _ in range(2):
            with pytest.raises(PushRefused, match="part 3 is not what its digest promised"):
                await push(ann, ME, CHANNEL, HEAD, PAYLOADS, kind="upload", timeout_s=LONG_S)
        assert ann.metered["sent", "upload"] == 2 * len(PUSHED)


async def test_a_sender_has_one_push_at_a_time_and_others_are_not_held_up() -> None:
    taker = Taker()
    async with taking(taker) as (_, eve, ann), asyncio.TaskGroup() as tasks:
        taker.open.clear()
        first = tasks.create_task(push(ann, ME, CHANNEL, b"1", PAYLOADS, kind="upload", timeout_s=LONG_S))
        while not taker.asked:
            await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(PushRefused, match="one push at a time"):
                await push(ann, ME, CHANNEL, b"2", PAYLOADS, kind="upload", timeout_s=LONG_S)
        other = tasks.create_task(push(eve, ME, CHANNEL, b"3", PAYLOADS, kind="upload", timeout_s=LONG_S))
        while len(taker.asked) < 2:
            await asyncio.sleep(0)
        taker.open.set()
        assert await first == await other == b"thanks"
        assert [(sender, header) for sender, header, _ in taker.taken] == [(ANN, b"1"), (EVE, b"3")]
        await still_serves(taker, ann, eve)


OVERSIZES = [
    (opening(b"", (), header_length=HEADER_CAP + 1), "a header of 65 bytes"),
    (opening(b"", (), header_length=2**32 - 1), f"a header of {2**32 - 1} bytes"),
    (opening(bytes(HEADER_CAP + 1), (3,)), "a header of 65 bytes"),
    (opening(sizes=(), count=MAX_BUFFERS + 1), f"{MAX_BUFFERS + 1} payloads"),
    (opening(sizes=(), count=2**32 - 1), f"{2**32 - 1} payloads"),
    (opening(sizes=(TOTAL_CAP + 1,)), f"{TOTAL_CAP + 1} bytes"),
    (opening(sizes=(TOTAL_CAP, 0, 1)), f"{TOTAL_CAP + 1} bytes"),
    (opening(sizes=(2**64 - 1,)), f"{2**64 - 1} bytes"),
    (opening(sizes=(2**63,) * 4), f"{2**65} bytes"),  # 0 for who sums in 64 bits
    (opening(sizes=(2**64 - 1,) * MAX_BUFFERS), f"{(2**64 - 1) * MAX_BUFFERS} bytes"),
]


@pytest.mark.parametrize(("said", "why"), OVERSIZES, ids=[f"{why:.30}" for _, why in OVERSIZES])
async def test_a_push_over_a_cap_is_refused_unasked_with_nothing_allocated(said: bytes, why: str) -> None:
    taker = Taker()
    async with taking(taker) as (net, eve, ann):
        with allocating_at_most(SMALL + 4 * len(said)):
            answer = await say(net, eve, CHANNEL, said)
        assert answer[0] == REFUSED
        assert answer[5:].decode().startswith(f"{why}; at most")
        assert taker.asked == []
        await still_serves(taker, eve, ann)


@pytest.mark.parametrize(
    ("header", "sizes"),
    [(bytes(HEADER_CAP), (TOTAL_CAP,)), (b"", (TOTAL_CAP // MAX_BUFFERS,) * MAX_BUFFERS)],
    ids=["one", "many"],
)
async def test_a_push_at_the_caps_is_asked_about_before_anything_is_allocated(
    header: bytes, sizes: tuple[int, ...]
) -> None:
    taker = Taker(refuses="not now")
    async with taking(taker) as (net, eve, _):
        with allocating_at_most(SMALL + 16 * 8 * len(sizes)):
            assert await say(net, eve, CHANNEL, opening(header, sizes)) == verdict(REFUSED, b"not now")
        assert taker.asked == [(EVE, header, sizes)]


async def test_a_payload_is_allocated_no_sooner_than_its_turn_comes() -> None:
    taker = Taker()
    async with taking(taker) as (net, eve, ann):
        sizes = (PIECE_BYTES,) * (TOTAL_CAP // PIECE_BYTES)
        with allocating_at_most(SMALL + 16 * 8 * len(sizes)):
            assert await say(net, eve, CHANNEL, opening(sizes=sizes)) == verdict(FINE)
        assert taker.taken == []
        await still_serves(taker, eve, ann)


# -- push: strange senders


async def test_no_truncated_push_is_taken_and_none_holds_up_the_next() -> None:
    taker = Taker()
    async with taking(taker) as (net, eve, ann):
        for end in range(len(PUSHED)):
            answer = await say(net, eve, CHANNEL, PUSHED[:end])
            assert answer == (b"" if end < len(opening()) else verdict(FINE))
            assert taker.taken == []
        await still_serves(taker, eve, ann)


async def test_a_push_with_a_flipped_byte_is_refused_dropped_or_taken_as_what_it_became() -> None:
    taker = Taker()
    async with taking(taker) as (net, eve, ann):
        for at in range(len(PUSHED)):
            fault = Fault(cut_after=len(PUSHED), corrupt_at=at)
            answer = await say(net, eve, CHANNEL, PUSHED, fault)
            became = bytearray(PUSHED)
            became[at] ^= 0xFF
            for sender, header, payloads in taker.taken:
                assert opening(header, tuple(map(len, payloads))) + b"".join(payloads) == bytes(became)
                assert (sender, answer) == (EVE, ANSWERED)
            assert len(taker.taken) == (answer == ANSWERED)
            taker.taken.clear()
        await still_serves(taker, eve, ann)


@pytest.mark.parametrize(
    "said",
    [
        opening(kind=b""),
        opening(kind=b"seventeen letters"),
        opening(kind_length=255),
        opening(kind=b"upl\xffad"),
        opening(kind="låst".encode()),
    ],
    ids=["none", "too long", "far too long", "no ascii", "utf-8"],
)
async def test_bytes_of_no_kind_are_not_answered(said: bytes) -> None:
    taker = Taker()
    async with taking(taker) as (net, eve, ann):
        assert await say(net, eve, CHANNEL, said + b"onethree") == b""
        assert taker.asked == []
        await still_serves(taker, eve, ann)


lengths = st.integers(0, 2**32 - 1) | st.integers(0, HEADER_CAP + 1)
openings = st.builds(
    opening,
    st.binary(max_size=HEADER_CAP + 1),
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=5).map(tuple),
    kind=st.binary(max_size=17),
    kind_length=st.none() | st.integers(0, 255),
    header_length=st.none() | lengths,
    count=st.none() | lengths,
)


@given(st.lists(st.binary(max_size=200) | st.builds(bytes.__add__, openings, st.binary(max_size=40)), max_size=5))
@settings(max_examples=80)
@example([bytes(200), b"\xff" * 200, b"\x01a" + b"\xff" * 200])
def test_no_garbage_ends_who_takes_pushes(sessions: list[bytes]) -> None:
    async def scenario() -> None:
        taker = Taker(refuses="no")
        async with taking(taker) as (net, eve, ann):
            with allocating_at_most(2 * SMALL):
                for said in sessions:
                    answer = await say(net, eve, CHANNEL, said)
                    assert answer[:1] in (b"", bytes([REFUSED]))
            taker.refuses = None
            await still_serves(taker, eve, ann)

    asyncio.run(scenario())


async def test_a_sender_that_stalls_is_given_up_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    taker = Taker()
    async with taking(taker) as (net, eve, ann):
        for end in range(len(PUSHED)):
            talk = asyncio.create_task(say(net, eve, CHANNEL, PUSHED, Fault(stall_after=end)))
            await clock.passes(SILENCE_S - 0.1)
            assert not talk.done()
            await clock.passes(SILENCE_S)  # what moved before was noticed just now
            assert await talk == (b"" if end < len(opening()) else verdict(FINE))
        assert taker.taken == []
        await still_serves(taker, eve, ann)


async def test_a_sender_that_is_slow_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    taker = Taker()
    async with taking(taker) as (_, _, ann):
        stream = await ann.open(ME, CHANNEL, kind="upload")
        await stream.write(opening(sizes=(5 * PIECE_BYTES,)))
        for k in range(5):
            await clock.passes(SILENCE_S - 0.1)
            await stream.write(bytes([k]) * PIECE_BYTES)
        await clock.passes(SILENCE_S - 0.1)
        assert await rest(stream) == ANSWERED
        await stream.close()
    assert taker.taken == [(ANN, HEAD, [b"".join(bytes([k]) * PIECE_BYTES for k in range(5))])]


# -- push: strange takers


async def test_what_a_stranger_answers_by_hand_is_a_reply() -> None:
    assert await push_to_stranger(ANSWERED) == b"thanks"
    assert await push_to_stranger(ANSWERED + b"more than it should") == b"thanks"
    longest = bytes(64 * 1024)
    assert await push_to_stranger(verdict(FINE, b"?") + verdict(FINE, longest)) == longest


async def test_every_truncated_answer_is_unreachable() -> None:
    for end in range(len(ANSWERED)):
        with pytest.raises(Unreachable):
            await push_to_stranger(ANSWERED[:end])


@pytest.mark.parametrize("before", [b"", verdict(FINE)], ids=["first", "last"])
async def test_a_verdict_that_is_none_is_nonsense_and_nothing_is_allocated_for_it(before: bytes) -> None:
    for number in range(2, 256):
        with pytest.raises(Nonsense):
            await push_to_stranger(before + verdict(number, b"words"))
    for number in (FINE, REFUSED):
        for length in (64 * 1024 + 1, 2**32 - 1):
            with allocating_at_most(SMALL), pytest.raises(Nonsense):
                await push_to_stranger(before + verdict(number, b"words", length=length))


@pytest.mark.parametrize("before", [b"", verdict(FINE)], ids=["first", "last"])
@pytest.mark.parametrize(
    ("words", "reason"),
    [(b"", ""), (b"no", "no"), (b"\xffno\xc3", "\ufffdno\ufffd"), (b"x" * 65536, "x" * 200)],
    ids=["none", "short", "not utf-8", "long"],
)
async def test_a_refusal_is_told_in_its_words_whatever_they_are(before: bytes, words: bytes, reason: str) -> None:
    with pytest.raises(PushRefused) as caught:
        await push_to_stranger(before + verdict(REFUSED, words))
    assert (caught.value.peer, caught.value.reason) == (EVE, reason)


@given(st.binary(max_size=60) | st.binary(max_size=40).map(verdict(FINE).__add__))
@settings(max_examples=80)
@example(b"")
@example(verdict(FINE) + b"\0\xff\xff\xff\xff")
def test_garbage_in_answer_to_a_push_is_a_reply_or_a_transport_error(said: bytes) -> None:
    with suppress(TransportError):
        reply = asyncio.run(push_to_stranger(said))
        assert said.startswith(said[:5] + said[5 : 5 + int.from_bytes(said[1:5])] + verdict(FINE, reply))


async def test_a_taker_that_stalls_is_given_up_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for end in range(len(ANSWERED)):
        pushing = push_to_stranger(ANSWERED[:end], then_ends=False)
        assert isinstance(await raised_by(pushing, clock, LONG_S), Stalled)


async def test_a_taker_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def serve(sender: PeerId, stream: Stream) -> None:
        await stream.write(verdict(FINE))
        await asyncio.Event().wait()

    async with network() as net:
        await net.join(EVE).serve_stream(CHANNEL, serve)
        sending = push(net.join(ANN), EVE, CHANNEL, HEAD, [bytes(3 * BUFFER_BYTES)], kind="upload", timeout_s=LONG_S)
        task = asyncio.create_task(sending)
        for _ in range(10):  # what fits into the buffers on the way is gone by the first look
            await clock.passes(LONG_S / 10)
            assert not task.done()
        for _ in range(3):
            await clock.passes(LONG_S / 10)
        assert isinstance(task.exception(), Stalled)


async def test_the_last_word_on_many_bytes_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    taker = Taker()
    payloads = [bytes(3 * SLOWEST_BYTES_PER_S)]  # they may lie in buffers on the way for 3 s
    async with taking(taker) as (_, _, ann):
        taker.open.clear()
        sending = push(ann, ME, CHANNEL, HEAD, payloads, kind="upload", timeout_s=LONG_S)
        assert isinstance(await raised_by(sending, clock, LONG_S + 3.0), Stalled)


async def test_nobody_to_push_to_is_unreachable() -> None:
    async with network() as net:
        ann = net.join(ANN)
        for peer in (EVE, net.join(BOB).peer_id):  # nobody, and one who takes no pushes
            with pytest.raises(Unreachable):
                await push(ann, peer, CHANNEL, HEAD, PAYLOADS, kind="upload", timeout_s=LONG_S)


# -- fetch: what arrives

BLOB = bytes(range(100))
DIGEST = blake3(BLOB).digest()


def blobs_of(*sizes: int) -> dict[bytes, bytes]:
    """Blobs of these sizes, all different, by their digests."""
    blobs = [k.to_bytes(2)[:size] + bytes(max(size - 2, 0)) for k, size in enumerate(sizes, start=1)]
    return {blake3(blob).digest(): blob for blob in blobs}


@pytest.mark.parametrize(
    ("buffer_bytes", "size"),
    [(1, 0), (1, 300), (BUFFER_BYTES, PIECE_BYTES - 1), (1000, PIECE_BYTES), (BUFFER_BYTES, 3 * BUFFER_BYTES + 1)],
)
async def test_what_is_fetched_is_what_was_asked_for(buffer_bytes: int, size: int) -> None:
    ((digest, blob),) = blobs_of(size).items()
    async with network(buffer_bytes=buffer_bytes) as net:
        await give(net, ANN, {digest: blob})
        got = await fetch(net.join(ME), ANN, digest, size, kind="state", timeout_s=LONG_S)
    assert got == blob


async def test_a_blob_may_be_a_view_of_anything() -> None:
    floats = array("f", [1.0, -2.5, 3.25])
    async with network() as net:
        await serve_blobs(net.join(ANN), lambda digest: memoryview(floats), budget=Budget(1e12))
        digest = blake3(floats.tobytes()).digest()
        assert await fetch(net.join(ME), ANN, digest, 12, kind="state", timeout_s=LONG_S) == floats.tobytes()


async def test_fetched_bytes_are_counted_as_their_kind_on_both_sides() -> None:
    async with network() as net:
        await give(net, ANN, {DIGEST: BLOB})
        me = net.join(ME)
        await fetch(me, ANN, DIGEST, 100, kind="state", timeout_s=LONG_S)
        asked = request(DIGEST, 100, kind=b"state")
        assert me.metered == {("sent", "state"): len(asked), ("received", "state"): 101}
        assert net.find(ANN).metered == {
            ("received", "unknown"): 6,
            ("received", "state"): len(asked) - 6,
            ("sent", "state"): 101,
        }


@pytest.mark.parametrize(
    ("digest", "size"),
    [(bytes(32), 100), *((DIGEST, size) for size in (0, 99, 101, TOTAL_CAP, 2**64 - 1))],
    ids=["unknown", "empty", "cut", "longer", "large", "largest"],
)
async def test_a_blob_that_is_not_there_in_this_size_is_gone_with_nothing_allocated(digest: bytes, size: int) -> None:
    async with network() as net:
        await give(net, ANN, {DIGEST: BLOB})
        me = net.join(ME)
        with allocating_at_most(SMALL), pytest.raises(Gone):
            await fetch(me, ANN, digest, size, kind="fetch", timeout_s=LONG_S)
        assert await fetch(me, ANN, DIGEST, 100, kind="fetch", timeout_s=LONG_S) == BLOB


# -- fetch: strange askers


@asynccontextmanager
async def giving() -> AsyncIterator[tuple[Net, MemoryTransport]]:
    """A network in which `ME` gives a blob, which it still does in the end: with it, a stranger."""
    async with network() as net:
        await give(net, ME, {DIGEST: BLOB})
        yield net, net.join(EVE)
        assert await fetch(net.join(ANN), ME, DIGEST, 100, kind="fetch", timeout_s=LONG_S) == BLOB


async def test_only_a_whole_request_is_answered() -> None:
    asked = request(DIGEST, 100)
    async with giving() as (net, eve):
        for end in range(len(asked)):
            assert await say(net, eve, BLOB_CHANNEL, asked[:end]) == b""
        assert await say(net, eve, BLOB_CHANNEL, asked) == b"\1" + BLOB
        assert await say(net, eve, BLOB_CHANNEL, asked + asked) == b"\1" + BLOB


async def test_a_request_with_a_flipped_byte_is_of_no_kind_or_for_a_blob_that_is_not_there() -> None:
    asked = request(DIGEST, 100)
    async with giving() as (net, eve):
        for at in range(len(asked)):
            answer = await say(net, eve, BLOB_CHANNEL, asked, Fault(cut_after=len(asked), corrupt_at=at))
            assert answer == (b"\0" if at > len("fetch") else b"")


@pytest.mark.parametrize(
    "said",
    [
        request(DIGEST, 100, kind=b""),
        request(DIGEST, 100, kind=b"seventeen letters"),
        request(DIGEST, 100, kind_length=255),
        request(DIGEST, 100, kind=b"\x80"),
        b"\xff" * 100,
    ],
    ids=["none", "too long", "far too long", "no ascii", "all ones"],
)
async def test_a_request_of_no_kind_is_not_answered(said: bytes) -> None:
    async with giving() as (net, eve):
        assert await say(net, eve, BLOB_CHANNEL, said) == b""


requests = st.builds(
    request,
    st.binary(min_size=32, max_size=32) | st.just(DIGEST),
    st.integers(0, 2**64 - 1) | st.just(len(BLOB)),
    kind=st.binary(max_size=17),
)


@given(st.lists(st.binary(max_size=100) | requests, max_size=5))
@settings(max_examples=80)
def test_no_garbage_ends_who_gives_blobs(sessions: list[bytes]) -> None:
    async def scenario() -> None:
        async with giving() as (net, eve):
            with allocating_at_most(2 * SMALL):
                for said in sessions:
                    assert await say(net, eve, BLOB_CHANNEL, said) in (b"", b"\0", b"\1" + BLOB)

    asyncio.run(scenario())


async def test_an_asker_that_stalls_is_given_up_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(DIGEST, 100)
    async with giving() as (net, eve):
        with monkeypatch.context() as patched:
            clock = Clock(patched)
            for end in range(len(asked)):
                talk = asyncio.create_task(say(net, eve, BLOB_CHANNEL, asked, Fault(stall_after=end)))
                await clock.passes(SILENCE_S - 0.1)
                assert not talk.done()
                await clock.passes(0.2)
                assert await talk == b""


async def test_an_asker_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "SILENCE_S", SHORT_S)
    ((digest, blob),) = blobs_of(4 * BUFFER_BYTES).items()
    async with network() as net:
        await give(net, ANN, {digest: blob})
        stream = await net.join(EVE).open(ANN, BLOB_CHANNEL, kind="fetch")
        await stream.write(request(digest, len(blob)))
        with pytest.raises(Unreachable):  # no more is read there, so this waits for the end
            await stream.write(bytes(2 * BUFFER_BYTES))
        assert len(await rest(stream)) < len(blob)


# -- fetch: strange donors


async def test_every_flipped_byte_of_a_blob_is_seen() -> None:
    for at in range(100):
        wrong = bytearray(BLOB)
        wrong[at] ^= 1 << at % 8
        with pytest.raises(WrongHash):
            await fetch_from_stranger(DIGEST, 100, b"\1" + wrong)
    assert await fetch_from_stranger(DIGEST, 100, b"\1" + BLOB) == BLOB
    assert await fetch_from_stranger(DIGEST, 100, b"\1" + BLOB + b"more than it should") == BLOB


async def test_a_byte_flipped_on_the_way_is_seen_too() -> None:
    async with network() as net:
        await give(net, ANN, {DIGEST: BLOB})
        me = net.join(ME)
        for at in (1, 50, 100):
            net.faults[ANN, ME] = Fault(corrupt_at=at)
            with pytest.raises(WrongHash):
                await fetch(me, ANN, DIGEST, 100, kind="fetch", timeout_s=LONG_S)


async def test_every_truncated_blob_is_unreachable() -> None:
    for end in range(101):
        with pytest.raises(Unreachable):
            await fetch_from_stranger(DIGEST, 100, (b"\1" + BLOB)[:end])


async def test_whoever_does_not_say_here_does_not_have_it_and_nothing_is_allocated() -> None:
    for first in (0, *range(2, 256)):
        with allocating_at_most(SMALL), pytest.raises(Gone):
            await fetch_from_stranger(DIGEST, TOTAL_CAP, bytes([first]) + BLOB)


@given(st.binary(max_size=130) | st.binary(max_size=130).map(b"\1".__add__))
@settings(max_examples=80)
def test_garbage_in_answer_to_a_fetch_is_a_transport_error(said: bytes) -> None:
    with pytest.raises(TransportError):
        asyncio.run(fetch_from_stranger(DIGEST, 100, said))


@pytest.mark.parametrize("end", [0, 1, 2, 100])
async def test_a_donor_that_stalls_is_given_up(end: int) -> None:
    with pytest.raises(Stalled):
        await fetch_from_stranger(DIGEST, 100, (b"\1" + BLOB)[:end], then_ends=False)


async def test_nobody_to_fetch_from_is_unreachable() -> None:
    async with network() as net:
        me = net.join(ME)
        for peer in (EVE, net.join(BOB).peer_id):
            with pytest.raises(Unreachable):
                await fetch(me, peer, DIGEST, 100, kind="fetch", timeout_s=LONG_S)


# -- fetch_all

MANY = blobs_of(*range(2, 32), PIECE_BYTES, 2 * PIECE_BYTES + 1)
DONORS = tuple(PeerId(f"donor {k}") for k in range(6))


async def fetch_many(
    net: Net, *donors: PeerId, wanted: Mapping[bytes, bytes], timeout_s: float = LONG_S
) -> dict[bytes, bytes]:
    """What has come of `wanted` when `fetch_all` ends; it says if something has not, and counts all as "state"."""
    got: dict[bytes, bytes] = {}
    why = ""

    def keep(digest: bytes, blob: memoryview) -> None:
        got[digest] = bytes(blob)

    me = net.join(ME)
    sizes = {digest: len(blob) for digest, blob in wanted.items()}
    try:
        await fetch_all(me, donors, sizes, kind="state", timeout_s=timeout_s, on_blob=keep)
    except Unavailable as error:
        why = str(error)
    missing = len(wanted) - len(got)
    assert why.startswith(f"{missing} of {len(wanted)} blobs can't be had: ") if missing else not why
    assert all(wanted[digest] == blob for digest, blob in got.items())
    assert {kind for _, kind in me.metered} <= {"state"}
    return got


async def test_everything_comes_from_many_donors_of_which_none_has_all() -> None:
    async with network() as net:
        for k, donor in enumerate(DONORS):
            await give(net, donor, {digest: blob for digest, blob in MANY.items() if digest[0] % len(DONORS) != k})
        assert await fetch_many(net, *DONORS, wanted=MANY) == MANY
        assert all(net.find(donor).metered["sent", "state"] for donor in DONORS)


async def test_each_blob_comes_once_and_is_paid_for_once_where_all_are_honest() -> None:
    got: list[bytes] = []
    async with network() as net:
        for donor in DONORS:
            await give(net, donor, MANY)
        me = net.join(ME)
        sizes = {digest: len(blob) for digest, blob in MANY.items()}
        await fetch_all(me, DONORS, sizes, kind="state", timeout_s=LONG_S, on_blob=lambda digest, _: got.append(digest))
        assert sorted(got) == sorted(MANY)
        assert me.metered["received", "state"] == sum(sizes.values()) + len(MANY)


async def test_nothing_is_fetched_where_nothing_is_wanted() -> None:
    async with network() as net:
        await give(net, ANN, MANY)
        assert await fetch_many(net, ANN, wanted={}) == {}
        assert await fetch_many(net, wanted={}) == {}
        assert not net.find(ANN).metered


FAULTS = [
    Fault(corrupt_at=0),
    Fault(corrupt_at=2),
    Fault(cut_after=0),
    Fault(cut_after=5),
    Fault(stall_after=0),
    Fault(stall_after=3),
]


async def give_badly(net: Net, donor: PeerId, blobs: Mapping[bytes, bytes], fault: Fault) -> None:
    """Have `donor` serve `blobs` with a fault in each answer."""
    if fault.stall_after is not None:  # an honest donor would end the stream after its answer
        await serve_stranger(net, donor, BLOB_CHANNEL, b"\1ab"[: fault.stall_after], then_ends=False)
    else:
        net.faults[donor, ME] = fault
        await give(net, donor, blobs)


async def test_one_good_donor_is_enough_whatever_the_others_do() -> None:
    async with network() as net:
        for donor, fault in zip(DONORS, FAULTS, strict=True):
            await give_badly(net, donor, MANY, fault)
        await give(net, ANN, MANY)
        net.join(BOB)  # gives no blobs
        assert await fetch_many(net, EVE, BOB, *DONORS, ANN, wanted=MANY, timeout_s=PATIENT_S) == MANY


async def test_a_liar_is_asked_no_more_and_what_it_was_asked_for_is_not_waited_for() -> None:
    asked: list[Stream] = []

    async def serve(sender: PeerId, stream: Stream) -> None:
        asked.append(stream)
        if len(asked) == 1:
            await stream.write(b"\1" + bytes(PIECE_BYTES))
        await rest(stream)

    async with network() as net, asyncio.timeout(LONG_S / 2):
        await net.join(EVE).serve_stream(BLOB_CHANNEL, serve)
        await give(net, ANN, MANY)
        assert await fetch_many(net, EVE, ANN, wanted=MANY) == MANY
    assert len(asked) == 2


async def test_donors_make_up_for_each_others_faults() -> None:
    small = {digest: blob for digest, blob in MANY.items() if len(blob) < PIECE_BYTES}
    large = {digest: blob for digest, blob in MANY.items() if digest not in small}
    async with network() as net:
        for donor in DONORS[:2]:
            await give(net, donor, MANY)
            net.faults[donor, ME] = Fault(cut_after=PIECE_BYTES)  # it breaks off with all that is large
        await give(net, ANN, small)
        await give(net, BOB, large)
        assert await fetch_many(net, *DONORS[:2], ANN, BOB, wanted=MANY) == MANY


@given(st.data())
@settings(max_examples=25)
def test_all_that_good_donors_have_comes_whatever_the_others_do(data: st.DataObject) -> None:
    small = blobs_of(*[9] * data.draw(st.integers(1, 12)))
    some = st.sets(st.sampled_from(sorted(small)))
    bad = data.draw(st.lists(st.sampled_from(FAULTS[:4]), max_size=4))  # none that stalls: that takes time
    good = data.draw(st.lists(some, max_size=2))
    kept: list[tuple[Fault, set[bytes]]] = [*((fault, data.draw(some)) for fault in bad), *((Fault(), s) for s in good)]
    order = data.draw(st.permutations(range(len(kept))))

    async def scenario() -> None:
        async with network() as net:
            for k, (fault, digests) in enumerate(kept):
                await give_badly(net, DONORS[k], {digest: small[digest] for digest in digests}, fault)
            donors = [DONORS[k] for k in order]
            got = await fetch_many(net, *donors, wanted=small)
            assert got.keys() >= set().union(*good)
            assert got.keys() <= set().union(*(digests for _, digests in kept))

    asyncio.run(scenario())


async def test_what_nobody_has_is_unavailable_and_the_rest_comes_all_the_same() -> None:
    here = dict(list(MANY.items())[1:])
    async with network() as net:
        for donor in DONORS[:2]:
            await give(net, donor, here)
        assert await fetch_many(net, *DONORS[:2], wanted=MANY) == here


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_nothing_but_bad_donors_is_unavailable(fault: Fault) -> None:
    async with network() as net:
        for donor in DONORS[:2]:
            await give_badly(net, donor, {DIGEST: BLOB}, fault)
        assert await fetch_many(net, *DONORS[:2], wanted={DIGEST: BLOB}, timeout_s=SHORT_S) == {}


async def test_nobody_to_ask_is_unavailable() -> None:
    async with network() as net:
        with pytest.raises(Unavailable, match="there is nobody to ask"):
            await fetch_all(net.join(ME), (), {DIGEST: 100}, kind="state", timeout_s=LONG_S, on_blob=lambda *_: None)
        assert await fetch_many(net, EVE, BOB, wanted=MANY) == {}


async def test_who_gives_up_a_fetch_leaves_no_stream_open() -> None:
    ended: list[bytes] = []

    async def serve(sender: PeerId, stream: Stream) -> None:
        ended.append(await rest(stream))

    async with network() as net, asyncio.TaskGroup() as tasks:
        await net.join(EVE).serve_stream(BLOB_CHANNEL, serve)
        work = fetch_many(net, EVE, wanted=MANY)
        task = tasks.create_task(work)
        while not net.find(EVE).metered:
            await asyncio.sleep(0)
        task.cancel()
        while len(ended) < 2:
            await asyncio.sleep(0)


async def test_what_a_liar_gave_before_it_was_found_out_is_not_handed_over_a_second_time() -> None:
    blobs = [bytes([k]) * 9 for k in range(3)]
    first, second, third = digests = [blake3(blob).digest() for blob in blobs]
    got: list[bytes] = []
    slow = threading.Event()

    async def lie(sender: PeerId, stream: Stream) -> None:
        asked = await stream.read_exactly(6 + 40)
        await stream.write(b"\1" + (b"x" * 9 if asked[6:38] == first else blobs[1]))

    def take(digest: bytes, blob: memoryview) -> None:
        got.append(digest)
        if digest == third:
            slow.wait(0.2)  # meanwhile more has come

    async with network() as net:
        await net.join(EVE).serve_stream(BLOB_CHANNEL, lie)
        await give(net, ANN, dict(zip(digests, blobs, strict=True)))
        wanted = dict.fromkeys((first, second, third), 9)
        await fetch_all(net.join(ME), [EVE, ANN], wanted, kind="fetch", timeout_s=9, on_blob=take)
    assert sorted(got) == sorted(digests)
