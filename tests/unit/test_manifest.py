"""What a model is by its content: one encoding of one manifest, and nothing of a stranger's that is none."""

import math
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dugnad.dht.manifest import (
    CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    Manifest,
    ManifestError,
    TensorEntry,
    chunks_of,
    digests_of,
    parse_manifest,
)

ONE, TWO, THREE = (bytes([k]) * 32 for k in (1, 2, 3))
QUARTER = CHUNK_BYTES // 4
"""Elements of a chunk."""
MANIFEST = Manifest.of(
    (
        TensorEntry("a", "float32", (2, QUARTER), (ONE, TWO)),
        TensorEntry("b/c", "float32", (), (THREE,)),
        TensorEntry("d", "float32", (QUARTER + 1,), (ONE, THREE)),
    )
)


def test_a_manifest_is_read_as_what_was_written_and_says_so_in_plain_msgpack() -> None:
    raw = MANIFEST.encode()
    assert parse_manifest(raw) == MANIFEST
    assert msgpack.unpackb(raw) == [
        "dugnad/model/2",
        [
            ["a", "float32", [2, QUARTER], [ONE, TWO]],
            ["b/c", "float32", [], [THREE]],
            ["d", "float32", [QUARTER + 1], [ONE, THREE]],
        ],
    ]


def test_sizes_are_those_of_the_chunks_and_equal_chunks_are_one() -> None:
    same = TensorEntry("a", "float32", (3 * QUARTER + 5,), (ONE, ONE, ONE, TWO))
    assert list(same.sizes()) == [(ONE, CHUNK_BYTES)] * 3 + [(TWO, 20)]
    assert Manifest.of((same,)).sizes() == {ONE: CHUNK_BYTES, TWO: 20}
    assert same.size_bytes == 3 * CHUNK_BYTES + 20


@pytest.mark.parametrize("shape", [(), (1,), (QUARTER,), (QUARTER + 1,), (3, QUARTER), (7, 11, 13)])
def test_a_blank_entry_is_as_long_as_a_real_one(shape: tuple[int, ...]) -> None:
    data = memoryview(bytes(range(4)) * math.prod(shape))
    real = TensorEntry("a", "float32", shape, digests_of(data))
    blank = TensorEntry.blank("a", "float32", shape)
    assert len(Manifest.of((blank,)).encode()) == len(Manifest.of((real,)).encode())
    assert parse_manifest(Manifest.of((real,)).encode()).entries == (real,)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_chunks_are_the_bytes_cut_and_their_digests_are_their_hashes(size: int) -> None:
    data = memoryview((bytes(range(251)) * (size // 251 + 1))[:size])
    chunks = list(chunks_of(data))
    assert b"".join(chunks) == data
    assert all(len(chunk) == CHUNK_BYTES for chunk in chunks[:-1])
    assert digests_of(data) == tuple(blake3(chunk).digest() for chunk in chunks)


def changed(edit: Callable[[list[Any]], object]) -> bytes:
    plain = msgpack.unpackb(MANIFEST.encode())
    edit(plain)
    packed: bytes = msgpack.packb(plain)
    return packed


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "cannot be read"),
        (MANIFEST.encode()[:-1], "cannot be read"),
        (MANIFEST.encode() + b"\0", "cannot be read"),
        (b"\x91" * 100_000, "cannot be read"),
        (bytes(MAX_MANIFEST_BYTES + 1), f"a manifest of {MAX_MANIFEST_BYTES + 1} bytes"),
        (changed(lambda m: m.__setitem__(0, "dugnad/model/1")), "is of kind 'dugnad/model/1'"),
        (changed(lambda m: m.append(1)), "cannot be read"),
        (changed(lambda m: m[1].reverse()), "not in name order"),
        (changed(lambda m: m[1].append(m[1][-1])), "or one stands twice"),
        (changed(lambda m: m[1][0].__setitem__(0, "")), "cannot be read"),
        (changed(lambda m: m[1][0].__setitem__(0, "a" * 513)), "cannot be read"),
        (changed(lambda m: m[1][0].__setitem__(1, "float64")), "'a' is 'float64'"),
        (changed(lambda m: m[1][0].__setitem__(2, [0])), "cannot be read"),
        (changed(lambda m: m[1][0].__setitem__(2, [-1])), "cannot be read"),
        (changed(lambda m: m[1][0].__setitem__(2, [2**40])), "cannot be read"),
        (changed(lambda m: m[1][0].__setitem__(2, [2**39] * 16)), "has 2 chunks"),
        (changed(lambda m: m[1][0].__setitem__(2, [1] * 17)), "cannot be read"),
        (changed(lambda m: m[1][0][3].pop()), "'a' of 2097152 bytes has 1 chunks"),
        (changed(lambda m: m[1][0][3].append(ONE)), "'a' of 2097152 bytes has 3 chunks"),
        (changed(lambda m: m[1][0][3].__setitem__(0, bytes(31))), "cannot be read"),
        (changed(lambda m: m[1][0][3].__setitem__(0, "a" * 32)), "cannot be read"),
    ],
)
def test_what_is_no_manifest_is_refused_with_the_reason(raw: bytes, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        parse_manifest(raw)


def test_another_encoding_of_the_same_meaning_is_refused() -> None:
    raw = MANIFEST.encode()
    longer = raw.replace(b"\xa1a\xa7float32", b"\xd9\x01a\xa7float32")
    assert msgpack.unpackb(longer) == msgpack.unpackb(raw)
    with pytest.raises(ManifestError, match="canonical"):
        parse_manifest(longer)


@given(st.integers(0, 400), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_another_manifest(at: int, mask: int) -> None:
    raw = bytearray(MANIFEST.encode())
    raw[at % len(raw)] ^= mask
    try:
        parsed = parse_manifest(bytes(raw))
    except ManifestError:
        return
    assert parsed != MANIFEST
    assert parsed.encode() == raw


@given(st.binary(max_size=300))
def test_random_bytes_are_never_a_manifest(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(raw)
