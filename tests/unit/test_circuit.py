"""The two messages of circuit relay v2, held against protobuf's own encoder, and against nonsense."""

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht.circuit import RESERVE, RelayRefused, Reservation, decode_status, read_delimited
from dugnad.dht.wire import WireError

RECORDED = (
    "08021acd0108c1d0a4d8061ac4010a2408011220567a76f9ef5ed2a01f65e733f67fb26316c0c7e76a9e42c6a0411a5faa12b0ba120203021a"
    "560a26002408011220567a76f9ef5ed2a01f65e733f67fb26316c0c7e76a9e42c6a0411a5faa12b0ba122600240801122073fb960c07a49e17"
    "26b81e33298e5cc508125c01fcd2ce46dd7af3d9568b912118c1d0a4d8062a40f206614522009b0f019f140bf5527ebe6d2966e500000c6531"
    "8871e925216c30dd2ac0233e510ddd3987a3b85b22fc6fa03037fdda591aae42a32a20027aa90422060878108080082864"
)
"""By go-libp2p 0.32.1, with the limits that it has by default."""
RESERVATION = bytes.fromhex("1a060880bca7ab06")
"""Field 3, a reservation that has an expiry and no more."""


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def status(
    code: int, *, data: int | None = None, duration: int | None = None, reservation: bytes = RESERVATION
) -> bytes:
    limit = b"".join(
        bytes([field << 3]) + varint(value) for field, value in ((1, duration), (2, data)) if value is not None
    )
    limits = b"\x22" + varint(len(limit)) + limit if limit else b""
    return b"\x08\x02" + reservation + limits + b"\x28" + varint(code)


def test_what_a_relay_grants_is_read() -> None:
    assert decode_status(status(100, data=2**32, duration=1800)) == Reservation(2**32, 1800)
    assert decode_status(status(100)) == Reservation(0, 0)


def test_the_answer_of_a_real_relay_is_read() -> None:
    assert decode_status(bytes.fromhex(RECORDED)) == Reservation(data_bytes=2**17, duration_s=120)


@pytest.mark.parametrize(
    ("place", "small"),
    [
        (Reservation(2**17, 120), True),
        (Reservation(2**32, 120), True),
        (Reservation(2**32, 1800), False),
        (Reservation(0, 0), False),
    ],
)
def test_libp2ps_default_is_small_and_ours_is_not(place: Reservation, small: bool) -> None:
    assert place.is_small == small


def test_a_refusal_is_told_in_words() -> None:
    with pytest.raises(RelayRefused, match="it is full"):
        decode_status(status(200, reservation=b""))
    with pytest.raises(RelayRefused, match="status 999"):
        decode_status(status(999, reservation=b""))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x08\x00",  # RESERVE, not STATUS
        status(100, reservation=b""),
        status(100, data=1)[:-3],
        b"\x08\x02\x1a\xff\x01",  # a field that is longer than the message
        b"\x0d\x00\x00\x00\x00",  # a fixed32
        b"\x08" + b"\xff" * 10 + b"\x01",
        b"\x02\x00",  # a field of number 0
        b"\x08\x02" + RESERVATION + b"\x22\x03\x12\x01\x00" + b"\x28\x64",  # a limit that is no number
    ],
)
def test_what_is_no_answer_is_nonsense(message: bytes) -> None:
    with pytest.raises((WireError, RelayRefused)):
        decode_status(message)


@given(st.binary(max_size=200))
def test_no_bytes_of_a_relay_raise_anything_else(message: bytes) -> None:
    with contextlib.suppress(WireError, RelayRefused):
        decode_status(message)


def reader_of(raw: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    return reader


async def test_a_message_is_read_up_to_its_length_and_no_longer_than_allowed() -> None:
    assert await read_delimited(reader_of(RESERVE + b"more")) == b"\x08\x00"
    long = bytes(300)
    assert await read_delimited(reader_of(varint(300) + long)) == long
    for nonsense in (varint(8193) + bytes(8193), b"\xff\xff\xff\xff\xff"):
        with pytest.raises(WireError, match="too large"):
            await read_delimited(reader_of(nonsense))
    with pytest.raises(EOFError):
        await read_delimited(reader_of(varint(300) + long[:-1]))
