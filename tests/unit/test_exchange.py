import asyncio
import contextlib
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dugnad.dht import bulk
from dugnad.dht.identity import PeerId
from dugnad.dht.transport import TransportError, Unreachable
from dugnad.optim import exchange as module
from dugnad.optim.codec import MAX_CHANGE, Int8Codec, NonFinite
from dugnad.optim.exchange import CHANNEL, HEADER_BYTES, Exchange, Expects, root_of
from dugnad.optim.layout import Layout, Vector
from dugnad.optim.reduce import Deliver, Drop, Effect, Fold, Reducer, Upload, Weighed
from tests.unit.memory_transport import Fault, MemoryTransport, Net, network

ME, ANN, BOB, EVE = PEERS = tuple(PeerId(name) for name in ("me", "ann", "bob", "eve"))
LAYOUT = Layout([("embed", (40, 5)), ("bias", (7,))], 64, 128)
CODEC = Int8Codec(64)
PARTS = range(3)
SIZES = tuple(CODEC.part_bytes(len(part)) for part in LAYOUT.parts)
SHORT_S = 0.05
LONG_S = 10.0

Said = tuple[PeerId, bytes, tuple[int, ...]]


def a_vector(seed: int, *, scale: float = 1.0) -> Vector:
    values: Vector = np.random.default_rng(seed).standard_normal(LAYOUT.total_elements, dtype=np.float32)
    return values * np.float32(scale)


def payloads_of(vector: Vector) -> list[bytes]:
    """The encoded parts, made with the codec alone."""
    return [bytes(CODEC.encode(vector[part.start : part.stop])) for part in LAYOUT.parts]


def digests_of(payloads: Sequence[bytes]) -> list[bytes]:
    return [blake3(payload).digest() for payload in payloads]


def root(vector: Vector) -> bytes:
    return root_of(digests_of(payloads_of(vector)))


def average(payloads: Sequence[bytes], tokens: Sequence[int]) -> bytes:
    """Their token-weighted mean: float32, summed in the order given, encoded once."""
    mean = np.zeros(len(payloads[0]) * 64 // 66, np.float32)
    for payload, weight in zip(payloads, tokens, strict=True):
        mean += CODEC.decode(payload, mean.size) * np.float32(weight / sum(tokens))
    return bytes(CODEC.encode(mean))


def header_of(payloads: Sequence[bytes], parts: Sequence[int] = PARTS, *, round_: int = 1) -> bytes:
    raw: bytes = msgpack.packb([round_, digests_of(payloads), list(parts)])
    return raw


@dataclass(frozen=True, slots=True)
class Peer:
    """One who exchanges, in round 1, and what it heard."""

    exchange: Exchange
    transport: MemoryTransport
    heard: list[Said]

    async def folds(self, *entries: Weighed, parts: Sequence[int] = PARTS) -> dict[int, bytes]:
        return {part: bytes(payload) for part, payload in (await self.exchange.fold(parts, entries)).items()}

    async def held(self, contributor: PeerId, vector: Vector) -> list[int]:
        """Which parts of `vector` are here; that they are what was contributed is checked."""
        entry, payloads = Weighed(contributor, root(vector), 1), payloads_of(vector)
        folded = {part: payload for one in PARTS for part, payload in (await self.folds(entry, parts=(one,))).items()}
        assert all(payload == payloads[part] for part, payload in folded.items())
        return list(folded)

    async def holds(self, contributor: PeerId, vector: Vector) -> bool:
        """Whether all of `vector` is here."""
        return await self.held(contributor, vector) == list(PARTS)

    async def push(self, header: bytes, payloads: Sequence[bytes]) -> None:
        """Send this to `ME`, as it is."""
        await bulk.push(self.transport, ME, CHANNEL, header, payloads, kind="upload", timeout_s=LONG_S)

    async def send(self, vector: Vector, parts: Sequence[int] = PARTS) -> None:
        """Contribute, and have `ME` own `parts` of it."""
        assert await self.exchange.contribute(vector) == root(vector)
        await self.exchange.upload(ME, root(vector), parts)


def anyone(sender: PeerId, round_: int, root: bytes) -> bool:
    return True


async def join(net: Net, peer: PeerId, *, expects: Expects = anyone) -> Peer:
    heard: list[Said] = []
    transport = net.join(peer)

    def received(contributor: PeerId, root: bytes, parts: tuple[int, ...]) -> None:
        heard.append((contributor, root, parts))

    exchange = Exchange(transport, LAYOUT, expects=expects, received=received)
    await exchange.serve()
    exchange.begin(1)
    return Peer(exchange, transport, heard)


# -- what is kept


@pytest.mark.parametrize("buffer_bytes", [1, 7, 64 * 1024])
async def test_parts_arrive_as_they_were_encoded_however_the_bytes_are_cut(buffer_bytes: int) -> None:
    async with network(buffer_bytes=buffer_bytes) as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.send(a_vector(1), (0, 2))
        assert me.heard == [(ANN, root(a_vector(1)), (0, 2))]
        assert await me.held(ANN, a_vector(1)) == [0, 2]


async def test_the_sizes_of_the_parts_are_those_of_the_codec_and_the_last_may_be_shorter() -> None:
    async with network() as net:
        assert (await join(net, ME)).exchange.part_bytes == SIZES
    assert SIZES[2] < SIZES[0]


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=2, max_size=5, unique=True))
def test_a_root_promises_every_digest_and_their_order(digests: list[bytes]) -> None:
    assert root_of(digests) == root_of(iter(digests))
    others = [digests[1:], digests[:-1], digests[::-1], [*digests, digests[0]]]
    assert root_of(digests) not in [root_of(other) for other in others]


async def test_parts_of_one_vector_may_come_in_several_uploads() -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.send(a_vector(1), (2,))
        assert await me.held(ANN, a_vector(1)) == [2]
        await ann.exchange.upload(ME, root(a_vector(1)), (1, 0))
        await ann.exchange.upload(ME, root(a_vector(1)), (1,))
        assert [parts for _, _, parts in me.heard] == [(2,), (1, 0)]
        assert await me.holds(ANN, a_vector(1))


async def test_what_is_kept_is_kept_under_the_name_of_who_sent_it() -> None:
    async with network() as net:
        me, ann, bob = await join(net, ME), await join(net, ANN), await join(net, BOB)
        await ann.send(a_vector(1))
        assert await me.held(BOB, a_vector(1)) == []
        await bob.send(a_vector(1), (1,))
        assert await me.held(BOB, a_vector(1)) == [1]


# -- what is refused


def changed(**fields: Any) -> bytes:
    """An honest header for all parts of vector 1, with other fields; `None` leaves one out."""
    honest = {"round": 1, "digests": digests_of(payloads_of(a_vector(1))), "parts": list(PARTS)}
    raw: bytes = msgpack.packb([value for value in (honest | fields).values() if value is not None])
    return raw


DIGEST = bytes(32)
MALFORMED = {
    "empty": b"",
    "text": b"hello",
    "nothing": b"\xc0",
    "text that is not utf-8": b"\x93\xa4\xff\xff\xff\xff\x90\x90",
    "map": msgpack.packb({"round": 1, "digests": [DIGEST] * 3, "parts": [0, 1, 2]}),
    "field too few": changed(parts=None),
    "field too many": changed(more=1),
    "bytes after it": changed() + b"\0",
    "round is text": changed(round="1"),
    "round is true": changed(round=True),
    "round is a list": changed(round=[1]),
    "short digest": changed(digests=[DIGEST, DIGEST, DIGEST[:31]]),
    "text for a digest": changed(digests=[DIGEST, DIGEST, "d" * 32]),
    "digests of nothing": changed(digests=[None, DIGEST, DIGEST]),
    "parts is a number": changed(parts=3),
    "part is half": changed(parts=[0, 1, 1.5]),
    "too many digests": changed(digests=[DIGEST] * 8193),
    "too many parts": changed(parts=[0] * 8193),
    "huge array": b"\x93\x01\xdd\xff\xff\xff\xff",
    "huge bytes": b"\x93\x01\x91\xc6\xff\xff\xff\xff",
    "deep": b"\x91" * 100_000,
    "deep field": b"\x93\x01" + b"\x91" * 100_000,
    "deep surplus": changed(more=1)[:-1] + b"\x91" * 100_000,
}
UNFIT = {
    "an older round": (changed(round=0), "not wanted in round 0"),
    "a later round": (changed(round=2), "not wanted in round 2"),
    "a negative round": (changed(round=-1), "not wanted in round -1"),
    "a huge round": (changed(round=2**64 - 1), "not wanted in round"),
    "no digests": (changed(digests=[]), "the vector has 3 parts"),
    "a digest too few": (changed(digests=[DIGEST] * 2), "the vector has 3 parts"),
    "a digest too many": (changed(digests=[DIGEST] * 4), "the vector has 3 parts"),
    "a part beyond the last": (changed(parts=[0, 1, 3]), "the vector has 3 parts"),
    "a negative part": (changed(parts=[0, 1, -1]), "the vector has 3 parts"),
    "a huge part": (changed(parts=[0, 1, 2**63]), "the vector has 3 parts"),
    "a part for another": (changed(parts=[0, 2, 1]), "another size"),
    "fewer parts than bytes": (changed(parts=[0, 1]), "another size"),
    "more parts than bytes": (changed(parts=[0, 1, 2, 2]), "another size"),
    "other digests": (changed(digests=[DIGEST] * 3), "part 0 is not what its digest promised"),
}


async def refused(header: bytes, payloads: Sequence[bytes]) -> str:
    """Why `ME` refuses this of `ANN`; that it keeps nothing of it is checked."""
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        with pytest.raises(bulk.PushRefused) as caught:
            await ann.push(header, payloads)
        assert me.heard == []
        assert await me.held(ANN, a_vector(1)) == []
        await ann.send(a_vector(1))  # the one who erred is heard again
        assert await me.holds(ANN, a_vector(1))
        return caught.value.reason


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_header_that_says_nothing_is_refused(header: bytes) -> None:
    assert (await refused(header, payloads_of(a_vector(1)))).startswith("malformed header")


@pytest.mark.parametrize(("header", "why"), UNFIT.values(), ids=UNFIT.keys())
async def test_a_header_that_does_not_fit_the_round_the_layout_or_the_bytes_is_refused(header: bytes, why: str) -> None:
    assert why in await refused(header, payloads_of(a_vector(1)))


async def test_a_header_cut_off_at_any_byte_is_refused() -> None:
    honest = changed()
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        for end in range(len(honest)):
            with pytest.raises(bulk.PushRefused, match="malformed header"):
                await ann.push(honest[:end], payloads_of(a_vector(1)))
        assert me.heard == []


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5)
    | st.binary(max_size=40) | st.sampled_from([DIGEST, 0, 1, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200)
@given(
    st.binary(max_size=60) | anything.map(msgpack.packb) | st.tuples(anything, anything, anything).map(msgpack.packb)
)
async def test_any_header_is_refused_in_words_or_promises_a_whole_vector(header: bytes) -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        try:
            await ann.push(header, ())
        except bulk.PushRefused:
            assert me.heard == []
        else:
            round_, digests, parts = msgpack.unpackb(header)
            assert (round_, len(digests), parts) == (1, 3, [])


async def test_a_header_above_its_cap_is_refused_unread() -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        stream = await ann.transport.open(ME, CHANNEL, kind="upload")
        await stream.write(opening(bytes(HEADER_BYTES + 1), ())[: len(b".upload") + 4])
        verdict, length = struct.unpack(">BI", await stream.read_exactly(5))
        why = (await stream.read_exactly(length)).decode()
        assert (verdict, why) == (1, f"a header of {HEADER_BYTES + 1} bytes; at most {HEADER_BYTES} are allowed")
        with pytest.raises(TransportError):
            await ann.push(bytes(HEADER_BYTES + 1), payloads_of(a_vector(1)))
        assert me.heard == []


@pytest.mark.parametrize("wrong_by", [-66, -1, 1, 66, 2**40])
async def test_a_part_of_another_size_is_refused_before_a_byte_of_it_travels(wrong_by: int) -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        stream = await ann.transport.open(ME, CHANNEL, kind="upload")
        await stream.write(opening(changed(parts=[1]), (SIZES[1] + wrong_by,)))
        verdict, length = struct.unpack(">BI", await stream.read_exactly(5))
        why = (await stream.read_exactly(length)).decode()
        assert verdict == 1
        assert "another size" in why or "bytes; at most" in why
        assert me.heard == []


@given(st.integers(0, len(SIZES) - 1), st.integers(0, min(SIZES) - 1), st.integers(1, 255))
async def test_a_part_with_any_byte_changed_is_refused_with_all_that_came_with_it(
    part: int, at: int, flip: int
) -> None:
    payloads = payloads_of(a_vector(1))
    damaged = bytearray(payloads[part])
    damaged[at] ^= flip
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        with pytest.raises(bulk.PushRefused, match=f"part {part} is not what its digest promised"):
            await ann.push(header_of(payloads), [*payloads[:part], bytes(damaged), *payloads[part + 1 :]])
        assert me.heard == []
        assert await me.held(ANN, a_vector(1)) == []


def _with_scale(payload: bytes, scale: int) -> bytes:
    return struct.pack("<H", scale) + payload[2:]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda payload: payload[:-1] + b"\x80", "code -128"),
        (lambda payload: _with_scale(payload, 0x7F80), "no encoder makes"),
        (lambda payload: _with_scale(payload, 0x7FC0), "no encoder makes"),
        (lambda payload: _with_scale(payload, 0xBF80), "no encoder makes"),
        (lambda payload: _with_scale(payload, 0x0001), "no encoder makes"),
        (lambda payload: _with_scale(payload, 0x7C01), "changes weights by up to"),
    ],
    ids=["code", "infinite", "not a number", "negative", "denormal", "too large"],
)
async def test_a_part_that_no_encoder_makes_is_refused_though_its_digest_holds(
    spoil: Callable[[bytes], bytes], why: str
) -> None:
    honest = payloads_of(a_vector(1))
    payloads = [honest[0], spoil(honest[1]), honest[2]]
    said = await refused(header_of(payloads), payloads)
    assert said.startswith("part 1: ")
    assert why in said


async def test_one_who_is_not_expected_is_refused_and_one_who_is_gets_through() -> None:
    asked: list[tuple[PeerId, int]] = []

    def expects(sender: PeerId, round_: int, promised: bytes) -> bool:
        asked.append((sender, round_))
        return sender == ANN

    async with network() as net:
        me, ann, eve = await join(net, ME, expects=expects), await join(net, ANN), await join(net, EVE)
        await ann.send(a_vector(1))
        with pytest.raises(bulk.PushRefused, match="not wanted in round 1"):
            await eve.send(a_vector(2))
        assert set(asked) == {(ANN, 1), (EVE, 1)}
        assert [sender for sender, _, _ in me.heard] == [ANN]
        assert await me.held(EVE, a_vector(2)) == []


# -- broken streams


def opening(header: bytes, sizes: Sequence[int]) -> bytes:
    """What an upload begins with."""
    lengths = struct.pack(f">I{len(sizes)}Q", len(sizes), *sizes)
    return b"\x06upload" + struct.pack(">I", len(header)) + header + lengths


WHOLE_BYTES = len(opening(changed(), SIZES)) + sum(SIZES)


async def test_an_upload_cut_off_at_any_byte_leaves_nothing_and_may_be_made_again() -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.exchange.contribute(a_vector(1))
        for end in range(WHOLE_BYTES):
            net.faults[ANN, ME] = Fault(cut_after=end)
            with pytest.raises(Unreachable):
                await ann.exchange.upload(ME, root(a_vector(1)), PARTS)
        assert me.heard == []
        assert await me.held(ANN, a_vector(1)) == []
        net.faults.clear()
        await ann.exchange.upload(ME, root(a_vector(1)), PARTS)
        assert await me.holds(ANN, a_vector(1))


async def test_no_byte_changed_on_the_way_makes_wrong_bytes_pass_for_what_was_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bulk, "SILENCE_S", SHORT_S)  # a length that is too large is waited for

    async def damage(at: int) -> None:
        async with network() as net:
            me, ann = await join(net, ME), await join(net, ANN)
            await ann.exchange.contribute(a_vector(1))
            net.faults[ANN, ME] = Fault(corrupt_at=at)
            try:
                await ann.exchange.upload(ME, root(a_vector(1)), PARTS)
            except TransportError:
                assert me.heard == []
            else:
                assert 1 <= at < 7, "only what the bytes are counted as may change"
                assert await me.holds(ANN, a_vector(1))

    async with asyncio.TaskGroup() as tasks:
        for at in range(WHOLE_BYTES):
            tasks.create_task(damage(at))


@pytest.mark.parametrize("at", [0, 3, 9, 40, WHOLE_BYTES - sum(SIZES), WHOLE_BYTES - 1])
async def test_an_upload_that_stands_still_ends_at_both_ends(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.exchange.contribute(a_vector(1))
        net.faults[ANN, ME] = Fault(stall_after=at)
        with monkeypatch.context() as impatient:
            for where in (bulk, module):
                impatient.setattr(where, "SILENCE_S", SHORT_S)
            with pytest.raises(TransportError):
                await ann.exchange.upload(ME, root(a_vector(1)), PARTS)
            await asyncio.sleep(SHORT_S)  # the owner may notice a little later
        assert me.heard == []
        net.faults.clear()
        await ann.exchange.upload(ME, root(a_vector(1)), PARTS)
        assert await me.holds(ANN, a_vector(1))


async def test_an_owner_that_says_nothing_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", SHORT_S)
    async with network() as net:
        await join(net, ME)
        ann = await join(net, ANN)
        net.faults[ME, ANN] = Fault(stall_after=0)
        await ann.exchange.contribute(a_vector(1))
        with pytest.raises(bulk.Stalled, match="no byte moved"):
            await ann.exchange.upload(ME, root(a_vector(1)), PARTS)


async def test_an_owner_that_is_not_there_is_a_transport_error() -> None:
    async with network() as net:
        ann = await join(net, ANN)
        await ann.exchange.contribute(a_vector(1))
        with pytest.raises(Unreachable):
            await ann.exchange.upload(ME, root(a_vector(1)), PARTS)


# -- rounds and seats


async def test_a_new_round_forgets_the_bytes_of_the_one_before() -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.send(a_vector(1))
        await me.exchange.contribute(a_vector(2))
        me.exchange.begin(2)
        assert await me.held(ANN, a_vector(1)) == []
        assert await me.held(ME, a_vector(2)) == []
        with pytest.raises(bulk.PushRefused, match="not wanted in round 1"):
            await ann.exchange.upload(ME, root(a_vector(1)), PARTS)
        ann.exchange.begin(2)
        await ann.send(a_vector(3))
        assert await me.holds(ANN, a_vector(3))


async def test_the_same_round_begun_again_changes_nothing() -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.send(a_vector(1))
        await me.exchange.contribute(a_vector(2))
        me.exchange.begin(1)
        ann.exchange.begin(1)
        assert await me.holds(ANN, a_vector(1))
        assert await me.holds(ME, a_vector(2))
        before = ann.transport.metered["sent", "upload"]
        await ann.exchange.upload(ME, root(a_vector(1)), PARTS)
        assert len(me.heard) == 1
        assert ann.transport.metered["sent", "upload"] - before < sum(SIZES), "what is there is not sent again"


async def test_a_changed_seat_sends_other_work_and_keeps_what_others_sent() -> None:
    async with network() as net:
        me, ann, bob = await join(net, ME), await join(net, ANN), await join(net, BOB)
        await ann.send(a_vector(1))
        await bob.send(a_vector(2))
        ann.exchange.begin(1)  # the plan of another view, with another seat for `ANN`
        me.exchange.begin(1)
        await ann.send(a_vector(3))
        assert me.heard[-1] == (ANN, root(a_vector(3)), tuple(PARTS))
        assert await me.holds(BOB, a_vector(2))
        assert await me.holds(ANN, a_vector(3))
        await me.exchange.contribute(a_vector(4))
        await me.exchange.contribute(a_vector(5))
        assert await me.holds(ME, a_vector(5))


async def test_an_upload_that_ends_after_its_round_is_not_kept() -> None:
    payloads = payloads_of(a_vector(1))
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        stream = await ann.transport.open(ME, CHANNEL, kind="upload")
        await stream.write(opening(header_of(payloads), SIZES))
        assert await stream.read_exactly(5) == bytes(5)
        me.exchange.begin(2)
        await stream.write(b"".join(payloads))
        await stream.read_exactly(5)
        assert me.heard == []
        assert await me.held(ANN, a_vector(1)) == []


# -- own work


async def test_own_work_is_held_without_an_upload_and_its_root_is_that_of_the_encoded_parts() -> None:
    async with network() as net:
        me = await join(net, ME)
        assert await me.exchange.contribute(a_vector(1)) == root(a_vector(1))
        assert await me.holds(ME, a_vector(1))
        assert me.heard == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 4 * MAX_CHANGE], ids=str)
async def test_work_that_owners_would_refuse_is_not_contributed(value: float) -> None:
    vector = a_vector(1)
    vector[200] = value
    async with network() as net:
        me = await join(net, ME)
        with pytest.raises(NonFinite):
            await me.exchange.contribute(vector)
        assert await me.exchange.contribute(a_vector(2)) == root(a_vector(2))


# -- the average


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 2**53 - 1)), min_size=1, max_size=4),
    st.permutations(PEERS),
    st.sets(st.sampled_from(PARTS), min_size=1).map(tuple),
)
async def test_the_average_is_the_token_weighted_mean_in_the_order_given_encoded_once(
    work: list[tuple[int, int]], order: list[PeerId], parts: tuple[int, ...]
) -> None:
    contributions = {
        peer: (a_vector(seed, scale=seed or 1), tokens) for peer, (seed, tokens) in zip(order, work, strict=False)
    }
    async with network() as net:
        me = await join(net, ME)
        for peer, (vector, _) in contributions.items():
            if peer == ME:
                await me.exchange.contribute(vector)
            else:
                await (await join(net, peer)).send(vector, parts)
        entries = [Weighed(peer, root(vector), tokens) for peer, (vector, tokens) in contributions.items()]
        folded = await me.folds(*entries, parts=parts)
        payloads = [payloads_of(vector) for vector, _ in contributions.values()]
        weights = [tokens for _, tokens in contributions.values()]
        assert folded == {part: average([whole[part] for whole in payloads], weights) for part in parts}
        assert list(folded) == list(parts)
        assert await me.folds(*entries, parts=parts) == folded


async def test_the_sum_is_taken_in_the_order_of_the_entries_and_in_no_other() -> None:
    large = np.full(LAYOUT.total_elements, 2.0**19, np.float32)
    tiny = np.full(LAYOUT.total_elements, 2.0**-12, np.float32)
    async with network() as net:
        me = await join(net, ME)
        entries: dict[PeerId, Weighed] = {}
        vectors = {ANN: large, BOB: tiny, EVE: -large}
        for peer, vector in vectors.items():
            await (await join(net, peer)).send(vector)
            entries[peer] = Weighed(peer, root(vector), 5)
        cancelled = await me.folds(entries[ANN], entries[EVE], entries[BOB])
        swallowed = await me.folds(entries[ANN], entries[BOB], entries[EVE])
        assert np.all(CODEC.decode(cancelled[0], 128) > 0)
        assert np.all(CODEC.decode(swallowed[0], 128) == 0)


@pytest.mark.parametrize("tokens", [1, 7, 2**53 - 1])
async def test_the_average_of_one_is_its_own_bytes(tokens: int) -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.send(a_vector(1))
        assert list((await me.folds(Weighed(ANN, root(a_vector(1)), tokens))).values()) == payloads_of(a_vector(1))


async def test_there_is_no_average_where_anything_of_the_set_is_missing() -> None:
    whole, partly = Weighed(ANN, root(a_vector(1)), 5), Weighed(BOB, root(a_vector(2)), 7)
    async with network() as net:
        me, ann, bob = await join(net, ME), await join(net, ANN), await join(net, BOB)
        await ann.send(a_vector(1))
        await bob.send(a_vector(2), (0, 2))
        assert set(await me.folds(whole, partly, parts=(0, 2))) == {0, 2}
        for missing in (
            partly,
            Weighed(EVE, root(a_vector(3)), 1),
            Weighed(ANN, root(a_vector(3)), 1),
            Weighed(ANN, partly.root, 1),
            Weighed(BOB, whole.root, 1),
        ):
            assert await me.folds(whole, missing) == {}
            assert await me.folds(missing, whole) == {}
        me.exchange.begin(2)
        assert await me.folds(whole, partly, parts=(0, 2)) == {}


async def test_what_is_forgotten_while_it_is_folded_does_not_change_the_average() -> None:
    entry = Weighed(ANN, root(a_vector(1)), 5)
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.send(a_vector(1))
        folding = asyncio.create_task(me.folds(entry))
        await asyncio.sleep(0)
        me.exchange.begin(2)
        assert list((await folding).values()) == payloads_of(a_vector(1))


async def test_a_whole_reduce_of_three_gives_everyone_the_average_that_the_codec_folds() -> None:
    owners, work = (ANN, ME, BOB), {ANN: 5, BOB: 3, ME: 11}
    vectors = {peer: a_vector(seed) for seed, peer in enumerate(work)}
    entries = tuple(Weighed(peer, root(vectors[peer]), tokens) for peer, tokens in work.items())
    averages: dict[int, bytes] = {}
    async with network() as net:
        peers = {peer: await join(net, peer) for peer in work}
        machines = {peer: Reducer(peer) for peer in work}
        pending: list[tuple[PeerId, Effect]] = []

        def perform(peer: PeerId, effects: Sequence[Effect]) -> None:
            pending.extend((peer, effect) for effect in effects)

        for peer, machine in machines.items():
            perform(peer, machine.plan(owners, tuple(work), now=0.0))
            perform(peer, machine.contribute(await peers[peer].exchange.contribute(vectors[peer]), now=0.0))
            perform(peer, machine.freeze(entries, now=0.0))
        while pending:
            peer, effect = pending.pop(0)
            match effect:
                case Upload(owner, promised, parts):
                    await peers[peer].exchange.upload(owner, promised, parts)
                    perform(peer, machines[peer].uploaded(owner, promised, parts, now=0.0))
                    perform(owner, machines[owner].received(*peers[owner].heard.pop(), now=0.0))
                case Fold(parts, frozen):
                    folded = await peers[peer].folds(*frozen, parts=parts)
                    averages |= folded
                    digests = {part: blake3(payload).digest() for part, payload in folded.items()}
                    perform(peer, machines[peer].folded(digests, now=0.0))
                case Deliver(_, parts):
                    assert parts == {part: blake3(averages[part]).digest() for part in parts}
    for part in PARTS:
        payloads = [payloads_of(vectors[entry.peer])[part] for entry in entries]
        expected = CODEC.fold(payloads, [entry.tokens for entry in entries], len(LAYOUT.parts[part]))
        assert averages[part] == bytes(expected) == average(payloads, [entry.tokens for entry in entries])


# -- what one sender can have us hold


async def test_what_the_machine_does_not_take_is_refused_before_it_travels_and_what_it_drops_is_forgotten() -> None:
    machine = Reducer(ME)
    machine.plan((ME,) * 3, PEERS, now=0.0)
    async with network() as net:
        me = await join(net, ME, expects=lambda sender, _, promised: machine.takes(sender, promised))
        ann, bob = await join(net, ANN), await join(net, BOB)
        for peer, seed in ((bob, 100), (ann, 1), (ann, 2)):
            await peer.send(a_vector(seed))
            machine.received(*me.heard[-1], now=0.0)
        await ann.exchange.contribute(a_vector(3))
        before = ann.transport.metered["sent", "upload"]
        with pytest.raises(bulk.PushRefused, match="not wanted"):
            await ann.exchange.upload(ME, root(a_vector(3)), PARTS)
        assert ann.transport.metered["sent", "upload"] - before < sum(SIZES)
        for effect in machine.plan((ME,) * 3, PEERS, now=1.0):
            if isinstance(effect, Drop):
                me.exchange.drop(effect.contributor, effect.root)
        assert [await me.held(ANN, a_vector(seed)) for seed in (1, 2)] == [[], list(PARTS)]
        await ann.exchange.upload(ME, root(a_vector(3)), PARTS)
        assert await me.holds(ANN, a_vector(3))
        assert await me.holds(BOB, a_vector(100))


async def test_own_work_that_is_dropped_is_not_sent_any_more() -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.exchange.contribute(a_vector(1))
        await ann.exchange.contribute(a_vector(2))
        ann.exchange.drop(ANN, root(a_vector(1)))
        with pytest.raises(TransportError, match="no longer wanted"):
            await ann.exchange.upload(ME, root(a_vector(1)), PARTS)
        await ann.exchange.upload(ME, root(a_vector(2)), PARTS)
        assert await me.holds(ANN, a_vector(2))


async def test_work_that_is_encoded_after_its_round_does_not_count_in_the_next() -> None:
    async with network() as net:
        ann = await join(net, ANN)
        encoding = asyncio.create_task(ann.exchange.contribute(a_vector(1)))
        await asyncio.sleep(0)
        ann.exchange.begin(2)
        assert await encoding == root(a_vector(1))
        assert await ann.held(ANN, a_vector(1)) == []


async def test_more_parts_of_a_vector_that_is_held_drop_nothing() -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.send(a_vector(1), (0,))
        await ann.send(a_vector(2), (0,))
        for part in (1, 2):
            await ann.exchange.upload(ME, root(a_vector(2)), (part,))
            await ann.push(header_of(payloads_of(a_vector(1)), (part,)), [payloads_of(a_vector(1))[part]])
        assert await me.holds(ANN, a_vector(1))
        assert await me.holds(ANN, a_vector(2))


async def test_a_vector_that_is_refused_drops_nothing() -> None:
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        await ann.send(a_vector(1))
        await ann.send(a_vector(2))
        for seed in range(3, 6):
            with pytest.raises(bulk.PushRefused):
                await ann.push(header_of(payloads_of(a_vector(seed))), payloads_of(a_vector(9)))
        assert await me.holds(ANN, a_vector(1))
        assert await me.holds(ANN, a_vector(2))


async def test_a_sender_that_is_not_done_yet_cannot_begin_another_upload() -> None:
    payloads = payloads_of(a_vector(1))
    async with network() as net:
        me, ann, bob = await join(net, ME), await join(net, ANN), await join(net, BOB)
        stream = await ann.transport.open(ME, CHANNEL, kind="upload")
        await stream.write(opening(header_of(payloads), SIZES))
        assert await stream.read_exactly(5) == bytes(5)
        with pytest.raises(bulk.PushRefused, match="one push at a time"):
            await ann.push(header_of(payloads), payloads)
        await bob.send(a_vector(2))
        await stream.write(b"".join(payloads))
        await stream.read_exactly(5)
        assert [sender for sender, _, _ in me.heard] == [BOB, ANN]


async def test_more_bytes_than_a_vector_has_are_refused_before_anything_is_allocated() -> None:
    """2^20 times the vector in one part, in many parts, in more parts than can be, and one part again and again."""
    honest = [header_of(payloads_of(a_vector(1)), parts) for parts in ([0], [0, 0], [0, 1, 2, 2])]
    openings = [
        opening(honest[0], [2**40]),
        opening(honest[0], [2**63] * 2),
        opening(honest[0], [1] * 8192),
        opening(honest[1], [SIZES[0]] * 100),
        opening(honest[2], [*SIZES, SIZES[2]]),
        opening(honest[0], [])[:-4] + struct.pack(">I", 2**32 - 1),
        b"\x06upload" + struct.pack(">I", 2**32 - 1),
    ]
    async with network() as net:
        me, ann = await join(net, ME), await join(net, ANN)
        tracemalloc.start()
        try:
            for said in openings:
                stream = await ann.transport.open(ME, CHANNEL, kind="upload")
                await stream.write(said)
                assert (await stream.read_exactly(1)) == b"\1"
                await stream.close()
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 4 * 2**20
        assert me.heard == []


async def test_a_stranger_that_sends_vector_after_vector_does_not_fill_memory() -> None:
    layout = Layout([("w", (64 * 1024,))], 64, 64 * 1024)
    total_bytes = CODEC.part_bytes(64 * 1024)
    async with network() as net:
        machine = Reducer(ME)

        def received(sender: PeerId, promised: bytes, parts: tuple[int, ...]) -> None:
            machine.received(sender, promised, parts, now=0.0)

        exchange = Exchange(
            net.join(ME), layout, expects=lambda who, _, root: machine.takes(who, root), received=received
        )
        await exchange.serve()
        ann = net.join(ANN)
        tracemalloc.start()
        try:
            for seed in range(20):
                payload = bytes(CODEC.encode(np.full(64 * 1024, seed, np.float32)))
                header = msgspec.msgpack.encode((0, (blake3(payload).digest(),), (0,)))
                with contextlib.suppress(bulk.PushRefused):
                    await bulk.push(ann, ME, CHANNEL, header, [payload], kind="upload", timeout_s=LONG_S)
            held_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held_bytes < 6 * total_bytes  # two that are held, and what the test and the network still have
