"""Streams on one connection: whatever two honest sides do, bytes arrive whole and in order, and memory is bounded."""

from collections import defaultdict, deque

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dugnad.dht import mux
from dugnad.dht.mux import Arrived, Closed, Kind, MayWrite, Mux, Opened, Ponged, Reply, SeenAs
from dugnad.dht.wire import WireError

EMPTY = memoryview(b"")


def frames(raw: bytes) -> list[tuple[Kind, int, memoryview]]:
    """The frames in some bytes."""
    found = []
    while raw:
        kind, stream, length = mux.check_header(raw[: mux.HEADER.size])
        raw = raw[mux.HEADER.size :]
        found.append((kind, stream, memoryview(raw[:length])))
        raw = raw[length:]
    return found


def hear(side: Mux, raw: bytes) -> list[mux.Event]:
    return [event for kind, stream, payload in frames(raw) for event in side.receive(kind, stream, payload)]


def pair() -> tuple[Mux, Mux]:
    return Mux(dialler=True), Mux(dialler=False)


def test_a_stream_is_opened_carries_bytes_and_is_closed() -> None:
    ann, bob = pair()
    stream, opening = ann.open("parts")
    assert hear(bob, opening) == [Opened(stream, "parts")]
    assert hear(bob, ann.data(stream, 5) + b"hello") == [Arrived(stream, memoryview(b"hello"))]
    assert hear(ann, bob.data(stream, 2) + b"ok") == [Arrived(stream, memoryview(b"ok"))]
    assert hear(bob, ann.close(stream)) == [Closed(stream)]
    assert bob.close(stream) == b"", "both know"


def test_the_two_sides_number_their_streams_apart() -> None:
    ann, bob = pair()
    assert [ann.open("x")[0], bob.open("x")[0], ann.open("x")[0], bob.open("x")[0]] == [1, 2, 3, 4]


def test_credit_is_spent_and_given_back_as_bytes_are_taken() -> None:
    ann, bob = pair()
    stream, opening = ann.open("x")
    hear(bob, opening)
    while credit := ann.credit(stream):
        size = min(credit, mux.FRAME_BYTES)
        hear(bob, ann.data(stream, size) + bytes(size))
    assert bob.consumed(stream, 1000) == b"", "not worth a frame"
    granted = bob.consumed(stream, mux.WINDOW_BYTES // 2)
    assert hear(ann, granted) == [MayWrite(stream)]
    assert ann.credit(stream) == mux.WINDOW_BYTES // 2 + 1000


def test_what_was_under_way_when_a_stream_was_closed_is_dropped() -> None:
    ann, bob = pair()
    stream, opening = ann.open("x")
    hear(bob, opening)
    bob.close(stream)
    assert hear(bob, ann.data(stream, 3) + b"abc") == []
    assert bob.consumed(stream, 3) == b""
    assert bob.credit(stream) == 0


def test_a_ping_comes_back_and_each_side_is_told_how_it_is_seen() -> None:
    ann, bob = pair()
    (reply,) = hear(bob, mux.ping(b"12345678"))
    assert isinstance(reply, Reply)
    assert hear(ann, reply.frame) == [Ponged(b"12345678")]
    assert hear(ann, mux.seen("11.0.0.7:4002")) == [SeenAs("11.0.0.7:4002")]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (mux.HEADER.pack(9, 0, 0), "malformed"),
        (mux.HEADER.pack(0, 0, 0), "malformed"),
        (mux.HEADER.pack(Kind.DATA, 1, mux.FRAME_BYTES + 1), "too large"),
        (mux.HEADER.pack(Kind.OPEN, 1, mux.CHANNEL_BYTES + 1), "too large"),
        (mux.HEADER.pack(Kind.CLOSE, 1, 1), "too large"),
        (mux.HEADER.pack(Kind.PING, 0, 9), "too large"),
    ],
)
def test_a_header_is_checked_before_anything_is_allocated(raw: bytes, reason: str) -> None:
    with pytest.raises(WireError) as raised:
        mux.check_header(raw)
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    ("kind", "stream", "payload"),
    [
        (Kind.OPEN, 0, b"x"),
        (Kind.OPEN, 2, b"x"),
        (Kind.OPEN, 1, b"\xff"),
        (Kind.OPEN, 1, b"a\nb"),
        (Kind.OPEN, 3, b"x"),
        (Kind.CREDIT, 5, b"\0\0\0\1"),
        (Kind.CREDIT, 5, b"\0"),
        (Kind.DATA, 5, b""),
        (Kind.SEEN, 0, b"\x1b[2J"),
        (Kind.SEEN, 0, b"garbage"),
        (Kind.SEEN, 0, b"11.0.0.7:70000"),
    ],
    ids=[
        "zero",
        "ours",
        "no text",
        "line break",
        "old",
        "unearned credit",
        "half a credit",
        "no data",
        "escape",
        "no place",
        "no port",
    ],
)
def test_what_no_honest_side_sends_is_refused(kind: Kind, stream: int, payload: bytes) -> None:
    bob = Mux(dialler=False)
    bob.receive(Kind.OPEN, 5, memoryview(b"x")) if stream in (3, 5) else None
    with pytest.raises(WireError):
        bob.receive(kind, stream, memoryview(payload))


def test_more_bytes_than_were_granted_are_refused() -> None:
    bob = Mux(dialler=False)
    bob.receive(Kind.OPEN, 1, memoryview(b"x"))
    for _ in range(mux.WINDOW_BYTES // mux.FRAME_BYTES):
        bob.receive(Kind.DATA, 1, memoryview(bytes(mux.FRAME_BYTES)))
    with pytest.raises(WireError, match="granted"):
        bob.receive(Kind.DATA, 1, memoryview(b"x"))


def test_more_streams_than_are_allowed_are_refused() -> None:
    bob = Mux(dialler=False)
    for number in range(mux.MAX_STREAMS):
        bob.receive(Kind.OPEN, 2 * number + 1, memoryview(b"x"))
    with pytest.raises(WireError, match="open already"):
        bob.receive(Kind.OPEN, 2 * mux.MAX_STREAMS + 1, memoryview(b"x"))


class TwoSides(RuleBasedStateMachine):
    """Two honest sides with bytes under way between them: neither ever refuses the other."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = pair()
        self.under_way: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
        """To each side."""
        self.sent: defaultdict[tuple[int, int], bytearray] = defaultdict(bytearray)
        self.got: defaultdict[tuple[int, int], bytearray] = defaultdict(bytearray)
        self.unread: defaultdict[tuple[int, int], int] = defaultdict(int)
        self.open: tuple[set[int], set[int]] = (set(), set())
        self.seed = 0

    which = st.integers(0, 1)

    @rule(side=which)
    def opens(self, side: int) -> None:
        if self.sides[side].num_ours < mux.MAX_STREAMS:
            stream, raw = self.sides[side].open("x")
            self.open[side].add(stream)
            self.under_way[1 - side].append(raw)

    @precondition(lambda self: any(self.open))
    @rule(side=which, data=st.data(), size=st.integers(1, mux.FRAME_BYTES))
    def writes(self, side: int, data: st.DataObject, size: int) -> None:
        if not self.open[side]:
            return
        stream = data.draw(st.sampled_from(sorted(self.open[side])))
        size = min(size, self.sides[side].credit(stream))
        if size:
            self.seed += 1
            piece = self.seed.to_bytes(4) * (size // 4) + bytes(size % 4)
            self.sent[1 - side, stream] += piece
            self.under_way[1 - side].append(self.sides[side].data(stream, size) + piece)

    @rule(side=which, frames_at_most=st.integers(1, 8))
    def hears(self, side: int, frames_at_most: int) -> None:
        for _ in range(min(frames_at_most, len(self.under_way[side]))):
            for event in hear(self.sides[side], self.under_way[side].popleft()):
                match event:
                    case Opened(stream, _):
                        self.open[side].add(stream)
                    case Arrived(stream, data):
                        self.got[side, stream] += data
                        self.unread[side, stream] += len(data)
                    case Closed(stream):
                        self.open[side].discard(stream)

    @precondition(lambda self: any(self.open))
    @rule(side=which, data=st.data())
    def takes(self, side: int, data: st.DataObject) -> None:
        if not self.open[side]:
            return
        stream = data.draw(st.sampled_from(sorted(self.open[side])))
        credit = self.sides[side].consumed(stream, self.unread.pop((side, stream), 0))
        if credit:
            self.under_way[1 - side].append(credit)

    @precondition(lambda self: any(self.open))
    @rule(side=which, data=st.data())
    def closes(self, side: int, data: st.DataObject) -> None:
        if not self.open[side]:
            return
        stream = data.draw(st.sampled_from(sorted(self.open[side])))
        self.open[side].discard(stream)
        if raw := self.sides[side].close(stream):
            self.under_way[1 - side].append(raw)

    @invariant()
    def what_arrives_is_a_beginning_of_what_was_sent(self) -> None:
        for key, got in self.got.items():
            assert self.sent[key].startswith(got)

    @invariant()
    def what_lies_unread_is_bounded(self) -> None:
        assert all(count <= mux.WINDOW_BYTES for count in self.unread.values())


TestTwoSides = TwoSides.TestCase
