import math
from collections.abc import Callable
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec import Struct, inspect

from dugnad.coordinator.messages import ROUND_KINDS, SYNC_KINDS, Applied, Commits, Report, WelcomeRequest
from dugnad.dht.delegation import Delegation
from dugnad.dht.identity import Identity, PeerId, peer_id_of
from dugnad.dht.wire import ENVELOPE_BYTES, PROTOCOL, Codec, Kind, WireError, open_sealed, seal

KINDS = (*ROUND_KINDS, *SYNC_KINDS)
CODEC = Codec(KINDS)
RUN = bytes(range(32))
ME = Identity.from_seed(bytes(32))
OTHER = Identity.from_seed(bytes([7]) * 32)
SAID = Delegation(ME.peer_id, 3, 0, bytes(64))

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.tag)


# -- messages of every kind, built from what their types allow


def values_of(type_: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a message's field, often at the edges of what the type allows."""
    match type_:
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, *(values_of(field.type) for field in fields))
        case inspect.VarTupleType(item_type=item, min_length=least, max_length=most):
            longest = min(3 if most is None else most, 3)
            return st.lists(values_of(item), min_size=least or 0, max_size=longest).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(values_of, items))
        case inspect.UnionType(types=types):
            return st.one_of(*map(values_of, types))
        case inspect.StrType(min_length=least, max_length=most):
            return st.text(min_size=least or 0, max_size=min(most or 20, 20))
        case inspect.BytesType(min_length=least, max_length=most):
            size = {"min_size": least, "max_size": most} if least else {"max_size": 20}
            return st.binary(**size)
        case inspect.IntType(ge=least, lt=end, le=most):
            last = most if end is None else end - 1
            edges = (0, 1, 127, 128, 255, 256, 2**16, 2**32, 2**53 - 1)
            allowed = [edge for edge in edges if edge >= (least or 0) and (last is None or edge <= last)]
            return st.sampled_from(allowed) | st.integers(least, last)
        case inspect.FloatType(ge=least, le=most):
            return st.floats(least, most)
        case inspect.BoolType():
            return st.booleans()
        case inspect.EnumType(cls=cls):
            return st.sampled_from(cls)
        case inspect.NoneType():
            return st.none()
    raise AssertionError(f"no values for {type_}")


STRATEGIES = {kind.tag: values_of(inspect.type_info(kind.type)) for kind in KINDS}
messages = st.sampled_from(KINDS).flatmap(lambda kind: STRATEGIES[kind.tag])


def plain(value: Any) -> Any:
    """What `value` is on the wire, in lists and scalars, told without msgspec."""
    if isinstance(value, Struct):
        return [plain(getattr(value, name)) for name in value.__struct_fields__]
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def same(one: Any, other: Any) -> bool:
    """Equal, NaN included: all that was said is the same, to the bit."""
    return bool(msgpack.packb(plain(one)) == msgpack.packb(plain(other)))


def example_of(kind: Kind) -> Struct:
    """A message of `kind` in which no field is empty that could hold something."""
    example = _filled(inspect.type_info(kind.type))
    assert isinstance(example, Struct)
    return example


def _filled(type_: inspect.Type) -> Any:
    match type_:
        case inspect.StructType(cls=cls, fields=fields):
            return cls(*(_filled(field.type) for field in fields))
        case inspect.VarTupleType(item_type=item):
            return (_filled(item), _filled(item))
        case inspect.TupleType(item_types=items):
            return tuple(map(_filled, items))
        case inspect.UnionType(types=types):
            return _filled(next(one for one in types if not isinstance(one, inspect.NoneType)))
        case inspect.BytesType(min_length=least):
            return bytes(range(least or 5))
        case inspect.StrType():
            return "words"
        case inspect.IntType(le=most):
            return 70_000 if most is None else most
        case inspect.FloatType():
            return 1.25
        case inspect.BoolType():
            return True
        case inspect.EnumType(cls=cls):
            return next(iter(cls))
    raise AssertionError(f"no example of {type_}")


def refused(raw: bytes, *, run: bytes = RUN, codec: Codec = CODEC) -> str:
    """Why `raw` is refused."""
    with pytest.raises(WireError) as caught:
        open_sealed(raw, run, codec)
    return caught.value.reason


def envelope(**changed: Any) -> bytes:
    """`SAID`, sealed by hand with some fields changed and a signature that holds for what it then says."""
    body = CODEC.encode(SAID)
    fields: dict[str, Any] = {
        "version": PROTOCOL,
        "run": RUN,
        "tag": "delegation",
        "sender": ME.public_key,
        "body": body,
    } | changed
    tag = fields["tag"]
    signed = b"dugnad/message/1" + fields["run"] + bytes([len(tag)]) + tag.encode() + fields["body"]
    head = b"\x96" + b"".join(msgpack.packb(fields[name]) for name in ("version", "run", "tag", "sender"))
    raw: bytes = head + fields["body"] + msgpack.packb(fields.get("signature", ME.sign(signed)))
    return raw


# -- what is honest comes through


@each_kind
@given(data=st.data())
def test_every_kind_comes_back_as_it_was_said_with_the_name_of_who_said_it(kind: Kind, data: st.DataObject) -> None:
    message = data.draw(STRATEGIES[kind.tag])
    sender, opened = open_sealed(seal(ME, RUN, CODEC, message), RUN, CODEC)
    assert sender == ME.peer_id
    assert type(opened) is kind.type
    assert same(opened, message)


@each_kind
@given(data=st.data())
def test_a_second_implementation_of_msgpack_writes_and_reads_the_same_bytes(kind: Kind, data: st.DataObject) -> None:
    message = data.draw(STRATEGIES[kind.tag])
    body = CODEC.encode(message)
    assert msgpack.packb(plain(message)) == body
    assert msgpack.packb(msgpack.unpackb(body)) == body
    sealed = seal(ME, RUN, CODEC, message)
    version, run, tag, sender, inner, signature = msgpack.unpackb(sealed)
    assert (version, run, tag, sender) == (PROTOCOL, RUN, kind.tag, ME.public_key)
    assert msgpack.packb(inner) == body
    assert len(signature) == 64
    assert len(sealed) - len(body) <= ENVELOPE_BYTES


def test_the_hand_made_envelope_of_these_tests_is_the_one_that_seal_makes() -> None:
    assert envelope() == seal(ME, RUN, CODEC, SAID)


def test_a_body_may_be_read_from_a_view_without_a_copy() -> None:
    assert CODEC.decode("delegation", memoryview(CODEC.encode(SAID))) == SAID


def test_tags_and_types_of_all_kinds_are_distinct_and_tags_fit_the_envelope() -> None:
    assert len({kind.tag for kind in KINDS}) == len({kind.type for kind in KINDS}) == len(KINDS)
    assert all(0 < len(kind.tag.encode()) <= 32 for kind in KINDS)


# -- damaged bytes


@each_kind
def test_a_message_cut_off_at_any_byte_is_refused(kind: Kind) -> None:
    raw = seal(ME, RUN, CODEC, example_of(kind))
    for end in range(len(raw)):
        assert refused(raw[:end]) == "malformed"
    body = CODEC.encode(example_of(kind))
    for end in range(len(body)):
        with pytest.raises(WireError):
            CODEC.decode(kind.tag, body[:end])


@each_kind
def test_a_message_with_any_one_byte_changed_is_refused(kind: Kind) -> None:
    raw = seal(ME, RUN, CODEC, example_of(kind))
    for position in range(len(raw)):
        for mask in (0x01, 0x80, 0xFF):
            refused(raw[:position] + bytes([raw[position] ^ mask]) + raw[position + 1 :])


@given(st.data())
def test_any_change_of_any_byte_is_refused(data: st.DataObject) -> None:
    raw = bytearray(seal(ME, RUN, CODEC, data.draw(messages)))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= data.draw(st.integers(1, 255))
    refused(bytes(raw))


@each_kind
@given(tail=st.binary(min_size=1, max_size=40))
def test_bytes_after_the_message_are_refused(kind: Kind, tail: bytes) -> None:
    message = example_of(kind)
    assert refused(seal(ME, RUN, CODEC, message) + tail) in ("malformed", "too large")
    with pytest.raises(WireError):
        CODEC.decode(kind.tag, CODEC.encode(message) + tail)


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_wire_errors(raw: bytes) -> None:
    refused(raw)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
    | st.binary(max_size=70) | st.sampled_from([bytes(32), bytes(64), "words", 0, 1]),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner),
    max_leaves=20,
)  # fmt: skip


@each_kind
@given(value=anything)
def test_any_well_formed_msgpack_is_one_valid_body_or_a_wire_error(kind: Kind, value: object) -> None:
    raw = msgpack.packb(value)
    try:
        message = CODEC.decode(kind.tag, raw)
    except WireError:
        return
    assert CODEC.encode(message) == raw


@given(st.data())
def test_a_body_with_one_field_replaced_by_anything_is_valid_or_a_wire_error(data: st.DataObject) -> None:
    message = data.draw(messages)
    fields = plain(message)
    assume(fields)
    fields[data.draw(st.integers(0, len(fields) - 1))] = data.draw(anything)
    try:
        opened = CODEC.decode(CODEC.tag_of(message), msgpack.packb(fields))
    except WireError:
        return
    assert same(fields, plain(opened))


@given(st.binary(max_size=300))
def test_random_bytes_in_place_of_a_body_raise_nothing_but_wire_errors(body: bytes) -> None:
    raw = envelope(body=body)
    try:
        _, message = open_sealed(raw, RUN, CODEC)
    except WireError:
        return
    assert CODEC.encode(message) == body


# -- caps


def test_a_message_above_every_cap_is_refused_before_a_byte_of_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object) -> None:
        raise AssertionError("an oversized message was parsed")

    monkeypatch.setattr("dugnad.dht.wire.strictly", parse)
    assert refused(bytes(CODEC.cap_bytes + 1)) == "too large"
    for kind in KINDS:
        with pytest.raises(WireError, match="too large"):
            CODEC.decode(kind.tag, bytes(kind.cap_bytes + 1))


def test_a_small_kind_cannot_be_as_long_as_a_large_one() -> None:
    codec = Codec([Kind("delegation", Delegation, 150), Kind("report", Report, 8192)])
    body = msgspec.msgpack.encode(Delegation(PeerId("é" * 80), 1, 0, bytes(64)))
    assert 150 < len(body) < codec.cap_bytes
    assert refused(envelope(body=body), codec=codec) == "too large"


def test_a_body_of_exactly_its_cap_passes_and_one_byte_more_is_our_own_fault() -> None:
    size = len(msgspec.msgpack.encode(SAID))
    exact, small = (Codec([Kind("delegation", Delegation, cap)]) for cap in (size, size - 1))
    assert open_sealed(seal(ME, RUN, exact, SAID), RUN, exact) == (ME.peer_id, SAID)
    with pytest.raises(AssertionError, match="above its cap"):
        small.encode(SAID)


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x00\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x92\x00" * 100_000,
        b"\x81\xa0" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
    ids=["array", "inner array", "deep", "deep field", "deep map", "map", "bytes", "text", "extension"],
)
def test_a_body_that_claims_to_be_huge_or_deep_is_refused_at_once(body: bytes) -> None:
    for kind in KINDS:
        with pytest.raises(WireError):
            CODEC.decode(kind.tag, body)
    assert refused(envelope(body=body)) in ("malformed", "too large")


@pytest.mark.parametrize(
    "message",
    [
        msgspec.structs.replace(SAID, signature=bytes(63)),
        msgspec.structs.replace(SAID, term=2**53),
        msgspec.structs.replace(SAID, term=-1),
        msgspec.structs.replace(SAID, coordinator=PeerId("")),
        msgspec.structs.replace(SAID, coordinator=PeerId("p" * 81)),
        Applied(1, bytes(32), bytes(32), bytes(64), math.nan, 0.0, ()),
        Applied(1, bytes(32), bytes(32), bytes(64), 0.0, math.inf, ()),
        Applied(1, bytes(32), bytes(32), bytes(64), -1.0, 0.0, ()),
        Applied(1, bytes(32), bytes(32), bytes(64), 0.0, 0.0, (("upload", -1),)),
        Applied(1, bytes(32), bytes(32), bytes(64), 0.0, 0.0, (("k" * 17, 1),)),
        Applied(1, bytes(32), bytes(32), bytes(64), 0.0, 0.0, tuple((f"kind {k}", k) for k in range(17))),
    ],
    ids=lambda message: type(message).__name__,
)
def test_values_outside_what_their_type_allows_are_refused(message: Struct) -> None:
    assert refused(seal(ME, RUN, CODEC, message)) == "malformed"


# -- one message, one encoding


@pytest.mark.parametrize(
    "body",
    [
        CODEC.encode(SAID).replace(b"\x03\x00\xc4", b"\xcc\x03\x00\xc4"),
        CODEC.encode(SAID).replace(b"\x03\x00\xc4", b"\xd3" + bytes(7) + b"\x03\x00\xc4"),
        CODEC.encode(SAID).replace(b"\x03\x00\xc4\x40", b"\x03\x00\xc5\x00\x40"),
        b"\xdc\x00\x04" + CODEC.encode(SAID)[1:],
        b"\x95" + CODEC.encode(SAID)[1:] + b"\xc0",
        b"\x93" + CODEC.encode(SAID)[1:-66],
        msgpack.packb({"coordinator": ME.peer_id, "term": 3, "until": 0, "signature": bytes(64)}),
        msgpack.packb([ME.peer_id, 3.0, 0, bytes(64)]),
        msgpack.packb([ME.peer_id.encode(), 3, 0, bytes(64)]),
        msgpack.packb([ME.peer_id, 3, 0, "s" * 64]),
    ],
    ids=[
        "integer in two bytes", "integer in nine bytes", "long length", "long array", "field too many",
        "field too few", "map", "float", "bytes for text", "text for bytes",
    ],
)  # fmt: skip
def test_the_same_words_in_another_encoding_are_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="malformed"):
        CODEC.decode("delegation", body)
    assert refused(envelope(body=body)) == "malformed"


def test_text_that_is_not_utf_8_is_refused() -> None:
    body = CODEC.encode(SAID).replace(ME.peer_id.encode(), b"\xff" * len(ME.peer_id))
    with pytest.raises(WireError, match="malformed"):
        CODEC.decode("delegation", body)


def test_a_float_in_four_bytes_or_an_integer_for_a_float_is_refused() -> None:
    said = Applied(1, bytes(32), bytes(32), bytes(64), 2.0, 0.0, ())
    body, double = CODEC.encode(said), b"\xcb\x40" + bytes(7)
    assert double in body
    for other in (b"\xca\x40\x00\x00\x00", b"\x02"):
        with pytest.raises(WireError, match="canonical"):
            CODEC.decode("applied", body.replace(double, other))


class Tally(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message with a map in it, for which no kind of the protocol has a use."""

    by_kind: dict[str, int]


@pytest.mark.parametrize("keys", ["ab", "ba", "aa"], ids=["sorted", "unsorted", "doubled"])
def test_a_map_is_read_only_when_its_keys_are_sorted_and_distinct(keys: str) -> None:
    codec = Codec([Kind("tally", Tally, 100)])
    body = b"\x91\x82" + b"".join(msgpack.packb(key) + b"\x01" for key in keys)
    if keys == "ab":
        assert codec.decode("tally", body) == Tally({"b": 1, "a": 1})
        assert codec.encode(Tally({"b": 1, "a": 1})) == body
    else:
        with pytest.raises(WireError, match="canonical"):
            codec.decode("tally", body)


def test_the_envelope_too_has_one_encoding() -> None:
    raw = seal(ME, RUN, CODEC, SAID)
    assert refused(b"\xdc\x00\x06" + raw[1:]) == "malformed"
    assert refused(b"\x97" + raw[1:] + b"\xc0") == "malformed"
    assert refused(raw[:1] + b"\xcc" + raw[1:]) == "malformed"


# -- lies


def test_a_message_of_another_run_is_refused_whether_or_not_its_run_is_rewritten() -> None:
    foreign = bytes(reversed(RUN))
    raw = seal(ME, foreign, CODEC, SAID)
    assert refused(raw) == "foreign run"
    assert refused(raw.replace(foreign, RUN)) == "bad signature"


def test_a_message_that_claims_another_sender_is_refused() -> None:
    raw = seal(ME, RUN, CODEC, SAID)
    assert refused(raw.replace(ME.public_key, OTHER.public_key)) == "bad signature"


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=64, max_size=64))
def test_no_made_up_sender_or_signature_passes(sender: bytes, signature: bytes) -> None:
    assume(sender != ME.public_key)
    assert refused(envelope(sender=sender, signature=signature)) == "bad signature"
    assert refused(envelope(sender=sender)) == "bad signature"


def test_a_signature_for_one_kind_does_not_pass_for_another_of_the_same_shape() -> None:
    raw = seal(ME, RUN, CODEC, WelcomeRequest())
    assert refused(raw.replace(msgpack.packb("welcome?"), msgpack.packb("state?"))) == "bad signature"


def test_a_signature_for_one_body_does_not_pass_for_another() -> None:
    other = CODEC.encode(msgspec.structs.replace(SAID, term=4))
    assert refused(envelope(body=other, signature=ME.sign(b"something else"))) == "bad signature"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"version": 2}, "version"),
        ({"version": 0}, "version"),
        ({"version": 2**64 - 1}, "version"),
        ({"tag": "rumour"}, "unknown kind"),
        ({"tag": ""}, "unknown kind"),
        ({"tag": "t" * 33}, "malformed"),
        ({"run": RUN[:31]}, "malformed"),
        ({"sender": ME.public_key[:31]}, "malformed"),
        ({"signature": bytes(63)}, "malformed"),
        ({"signature": bytes(64)}, "bad signature"),
    ],
)
def test_an_envelope_with_a_wrong_field_is_refused_for_that(changed: dict[str, Any], reason: str) -> None:
    assert refused(envelope(**changed)) == reason


def test_a_round_codec_does_not_know_the_words_of_the_sync() -> None:
    rounds, sync = Codec(ROUND_KINDS), Codec(SYNC_KINDS)
    assert refused(seal(ME, RUN, sync, Commits(0, 0, ())), codec=rounds) == "unknown kind"
    assert refused(seal(ME, RUN, rounds, SAID), codec=sync) == "unknown kind"


@pytest.mark.parametrize("answer", [True, False])
def test_the_signature_is_checked_by_the_verifier_that_is_given(answer: bool) -> None:
    asked: list[tuple[PeerId, bytes]] = []

    def verify(peer: PeerId, payload: bytes, signature: bytes) -> bool:
        asked.append((peer, payload))
        return answer

    opens: Callable[[], object] = lambda: open_sealed(envelope(), RUN, CODEC, verify=verify)  # noqa: E731
    if answer:
        assert opens() == (ME.peer_id, SAID)
    else:
        with pytest.raises(WireError, match="bad signature"):
            opens()
    assert [peer for peer, _ in asked] == [peer_id_of(ME.public_key)]
    assert asked[0][1].endswith(CODEC.encode(SAID))
