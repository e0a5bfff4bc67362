import logging
import os
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from dugnad.optim import codec as codec_module
from dugnad.optim.codec import CodecError, Int8Codec, NonFinite

BLOCK = 64
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
ZERO_BELOW = 2.0**-100

COMPILED = Int8Codec(BLOCK, "numba")
ORACLE = Int8Codec(BLOCK, "numpy")
both = pytest.mark.parametrize("codec", [COMPILED, ORACLE], ids=["numba", "numpy"])

any_float = st.floats(-LARGEST, LARGEST, width=32)
ordinary = st.floats(-8, 8, width=32)
blocks = st.sampled_from([1, 2, 5]).flatmap(
    lambda n: arrays(np.float32, n * BLOCK, elements=st.one_of(any_float, ordinary, st.just(-0.0)), fill=ordinary)
)
random_bits = st.binary(min_size=4 * BLOCK, max_size=4 * BLOCK).map(lambda data: np.frombuffer(data, np.float32))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compile before hypothesis starts its clock."""
    COMPILED.fold([COMPILED.encode(np.ones(BLOCK, np.float32))], [1], BLOCK)


def split(payload: bytes | memoryview) -> tuple[list[Fraction], np.ndarray]:
    """Scales, exact, and codes; written apart from the codec's own reading."""
    num_blocks = len(payload) // (BLOCK + 2)
    bits = [int.from_bytes(payload[2 * i : 2 * i + 2], "little") << 16 for i in range(num_blocks)]
    scales = [Fraction(float(np.array(b, np.uint32).view(np.float32))) for b in bits]
    return scales, np.frombuffer(payload[2 * num_blocks :], np.int8)


def one_block(*values: float) -> np.ndarray:
    x = np.zeros(BLOCK, np.float32)
    x[: len(values)] = values
    return x


@given(blocks)
def test_each_value_is_within_half_a_scale_of_what_is_decoded_exactly(x: np.ndarray) -> None:
    payload = COMPILED.encode(x)
    scales, _ = split(payload)
    decoded = COMPILED.decode(payload, x.size)
    for i, (value, got) in enumerate(zip(x.tolist(), decoded.tolist(), strict=True)):
        scale = scales[i // BLOCK]
        if scale:
            assert abs(Fraction(value) - Fraction(got)) <= scale / 2
        else:
            assert got == 0
            assert abs(value) < ZERO_BELOW


@given(blocks)
def test_no_code_is_minus_128_and_the_largest_value_of_a_block_has_code_127(x: np.ndarray) -> None:
    scales, codes = split(COMPILED.encode(x))
    assert codes.min() >= -127
    for scale, block in zip(scales, codes.reshape(-1, BLOCK), strict=True):
        assert np.abs(block.astype(int)).max() == (127 if scale else 0)


@given(blocks)
def test_a_scale_is_the_bfloat16_nearest_to_a_127th_of_the_largest_magnitude(x: np.ndarray) -> None:
    scales, _ = split(COMPILED.encode(x))
    for scale, block in zip(scales, x.reshape(-1, BLOCK), strict=True):
        top = Fraction(float(np.abs(block).max()))
        if top < Fraction(ZERO_BELOW):
            assert scale == 0
        else:
            assert abs(scale - top / 127) <= top / 127 * Fraction(1, 256) * (1 + Fraction(1, 2**15))


@given(blocks)
def test_encoding_what_was_decoded_gives_the_same_bytes(x: np.ndarray) -> None:
    first = COMPILED.encode(x)
    decoded = COMPILED.decode(first, x.size)
    tops = np.abs(decoded).reshape(-1, BLOCK).max(axis=1)
    if ((tops == 0) | (tops >= ZERO_BELOW)).all():
        assert COMPILED.encode(decoded) == first


def test_a_block_a_hair_above_the_limit_becomes_zero_when_encoded_again() -> None:
    decoded = COMPILED.decode(COMPILED.encode(one_block(ZERO_BELOW)), BLOCK)
    assert 0 < decoded[0] < ZERO_BELOW
    assert not COMPILED.decode(COMPILED.encode(decoded), BLOCK).any()


@given(st.one_of(blocks, random_bits))
def test_the_compiled_encoder_gives_the_bits_of_the_oracle(x: np.ndarray) -> None:
    if np.isfinite(x).all():
        assert COMPILED.encode(x) == ORACLE.encode(x)
    else:
        for codec in (COMPILED, ORACLE):
            with pytest.raises(NonFinite, match="holds NaN or infinity"):
                codec.encode(x)


@given(blocks, st.integers(0, 2**32 - 1), st.floats(0, 1, width=32))
def test_the_compiled_accumulation_gives_the_bits_of_the_oracle(x: np.ndarray, seed: int, weight: float) -> None:
    payload = COMPILED.encode(x)
    start = np.random.default_rng(seed).standard_normal(x.size, dtype=np.float32)
    results = []
    for codec in (COMPILED, ORACLE):
        acc = start.copy()
        codec.accumulate(acc, payload, weight)
        results.append(acc.tobytes())
    assert results[0] == results[1]


def test_product_and_sum_are_rounded_apart() -> None:
    # a start just opposite the product leaves only what rounding the product lost: a fused multiply-add keeps it
    rng = np.random.default_rng(3)
    payload = ORACLE.encode(rng.standard_normal(BLOCK * 512, dtype=np.float32))
    x = ORACLE.decode(payload, BLOCK * 512)
    weight = np.float32(1 / 3)
    start = -(weight * x) + rng.choice([0, 1e-9], x.size).astype(np.float32)
    separate = start + weight * x
    fused = (start.astype(np.float64) + np.float64(weight) * x.astype(np.float64)).astype(np.float32)
    assert (fused != separate).mean() > 0.5
    for codec in (COMPILED, ORACLE):
        acc = start.copy()
        codec.accumulate(acc, payload, float(weight))
        assert acc.tobytes() == separate.tobytes()


_DIGEST_OF_A_FOLD = """
import numpy as np, blake3
from dugnad.optim.codec import Int8Codec
rng = np.random.default_rng(5)
codec = Int8Codec(64, "numba")
n = 64 * 2000
payloads = [codec.encode(rng.standard_normal(n, dtype=np.float32)) for _ in range(3)]
acc = rng.standard_normal(n, dtype=np.float32)
codec.accumulate(acc, payloads[0], 1 / 3)
print(blake3.blake3(acc.tobytes() + bytes(codec.fold(payloads, [3, 5, 7], n)) + bytes(payloads[0])).hexdigest())
"""


def test_a_machine_without_vector_instructions_gives_the_same_bits() -> None:
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    digests = [
        subprocess.run(
            [sys.executable, "-c", _DIGEST_OF_A_FOLD], env=os.environ | env, capture_output=True, text=True, check=True
        ).stdout
        for env in ({}, plain)
    ]
    assert digests[0] == digests[1] != ""


@both
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK * 700 + 5])
def test_values_that_are_not_finite_are_refused_and_their_block_named(codec: Int8Codec, bad: float, at: int) -> None:
    x = np.full(BLOCK * 800, LARGEST, np.float32)
    x[at] = bad
    with pytest.raises(NonFinite, match=f"block {at // BLOCK} "):
        codec.encode(x)


@both
def test_a_zero_block_does_not_divide_by_zero_and_its_neighbours_are_kept(codec: Int8Codec) -> None:
    x = np.concatenate([one_block(1.0, -2.0), one_block(), one_block(3.0)])
    decoded = codec.decode(codec.encode(x), x.size)
    assert not decoded[BLOCK : 2 * BLOCK].any()
    assert decoded[1] == pytest.approx(-2, rel=0.005)
    assert decoded[2 * BLOCK] == pytest.approx(3, rel=0.005)


@both
@pytest.mark.parametrize(
    ("top", "scale_bits"),
    [
        (0.0, 0x0000),
        (-0.0, 0x0000),
        (SMALLEST, 0x0000),
        (-1e-40, 0x0000),
        (float(np.nextafter(np.float32(ZERO_BELOW), np.float32(0))), 0x0000),
        (ZERO_BELOW, 0x0A01),
        (127.0, 0x3F80),
        (-127.0, 0x3F80),
        (127.0 * (1 + 2**-8), 0x3F80),  # half way to the next bfloat16: to even, below
        (127.0 * (1 + 3 * 2**-8), 0x3F82),  # half way: to even, above
        (LARGEST, 0x7C01),
        (-LARGEST, 0x7C01),
    ],
)
def test_scales_of_special_values(codec: Int8Codec, top: float, scale_bits: int) -> None:
    payload = codec.encode(one_block(top))
    assert int.from_bytes(payload[:2], "little") == scale_bits
    assert np.isfinite(codec.decode(payload, BLOCK)).all()
    codec.check_scales(payload)


@both
def test_ties_go_to_the_even_code(codec: Int8Codec) -> None:
    values = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 0.49999997, 0.50000006]
    codes = split(codec.encode(one_block(*values)))[1]
    assert codes[: len(values)].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126, 0, 1]


@both
def test_subnormal_values_beside_an_ordinary_one_become_zero(codec: Int8Codec) -> None:
    decoded = codec.decode(codec.encode(one_block(1.0, SMALLEST, -SMALLEST)), BLOCK)
    assert decoded[1:].tolist() == [0.0] * (BLOCK - 1)


def test_a_payload_is_scales_little_endian_then_codes() -> None:
    payload = bytes(COMPILED.encode(np.concatenate([one_block(127.0, -1.0), one_block(254.0)])))
    assert payload[:4].hex() == "803f0040"
    assert payload[4 : 4 + BLOCK] == bytes([127, 255]) + bytes(BLOCK - 2)
    assert payload[4 + BLOCK :] == bytes([127]) + bytes(BLOCK - 1)


def test_the_caller_may_give_the_buffer_even_at_an_odd_address() -> None:
    x = np.random.default_rng(0).standard_normal(BLOCK * 3, dtype=np.float32)
    size = COMPILED.part_bytes(x.size)
    buffer = bytearray(size + 2)
    written = COMPILED.encode(x, memoryview(buffer)[1:-1])
    assert written == COMPILED.encode(x) == buffer[1:-1]
    assert buffer[0] == buffer[-1] == 0
    acc = np.zeros(x.size, np.float32)
    COMPILED.accumulate(acc, memoryview(bytes(buffer))[1:-1], 1.0)
    assert acc.tobytes() == ORACLE.decode(written, x.size).tobytes()


@both
@pytest.mark.parametrize("size", [0, 1, 3 * (BLOCK + 2) - 1, 3 * (BLOCK + 2) + 1, 4 * (BLOCK + 2)])
def test_payloads_of_a_wrong_size_are_refused(codec: Int8Codec, size: int) -> None:
    acc = np.ones(3 * BLOCK, np.float32)
    for use in (
        lambda: codec.decode(bytes(size), 3 * BLOCK),
        lambda: codec.accumulate(acc, bytes(size), 1.0),
        lambda: codec.fold([bytes(size)], [1], 3 * BLOCK),
        lambda: codec.encode(acc, bytearray(size)),
    ):
        with pytest.raises(CodecError, match=f"payload has {size} bytes, 192 values take 198"):
            use()
    assert (acc == 1).all()


@both
def test_vectors_that_are_not_whole_blocks_of_float32_are_refused(codec: Int8Codec) -> None:
    with pytest.raises(ValueError, match="not whole blocks"):
        codec.encode(np.zeros(BLOCK + 1, np.float32))
    vectors: list[NDArray[Any]] = [
        np.zeros(BLOCK, np.float64),
        np.zeros(2 * BLOCK, np.float32)[::2],
        np.zeros((1, BLOCK), np.float32),
    ]
    for wrong in vectors:
        with pytest.raises(ValueError, match="contiguous float32"):
            codec.encode(wrong)
        with pytest.raises(ValueError, match="contiguous float32"):
            codec.accumulate(wrong, bytes(BLOCK + 2), 1.0)
    with pytest.raises(ValueError, match="multiple of 64"):
        Int8Codec(96)


@pytest.mark.parametrize(
    "scale_bits",
    [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xBF80, 0x8000, 0x0001, 0x0A00, 0x7C02],
    ids=["inf", "-inf", "nan", "signalling nan", "-1", "-0", "subnormal", "too small", "too large"],
)
def test_scales_that_no_encoder_makes_are_refused_on_receipt(scale_bits: int) -> None:
    payload = bytearray(COMPILED.encode(np.ones(3 * BLOCK, np.float32)))
    COMPILED.check_scales(payload)
    payload[2:4] = scale_bits.to_bytes(2, "little")
    with pytest.raises(CodecError, match=f"block 1 has scale 0x{scale_bits:04x}"):
        COMPILED.check_scales(payload)


def test_a_code_of_minus_128_is_refused_on_receipt() -> None:
    payload = bytearray(COMPILED.encode(np.ones(BLOCK, np.float32)))
    payload[2 + 9] = 0x80
    with pytest.raises(CodecError, match="value 9 has code -128"):
        COMPILED.check_scales(payload)


def test_half_a_block_is_refused_on_receipt() -> None:
    with pytest.raises(CodecError, match="not whole blocks"):
        COMPILED.check_scales(bytes(BLOCK + 1))


@given(st.binary(max_size=3 * (BLOCK + 2)))
def test_a_payload_that_passes_the_check_decodes_to_finite_values_and_any_other_is_named(payload: bytes) -> None:
    try:
        COMPILED.check_scales(payload)
    except CodecError:
        return
    n_elements = len(payload) // (BLOCK + 2) * BLOCK
    assert np.isfinite(COMPILED.decode(payload, n_elements)).all()


@given(blocks, st.integers(1, 2**60))
def test_a_mean_of_one_contributor_is_its_own_payload(x: np.ndarray, weight: int) -> None:
    payload = COMPILED.encode(x)
    tops = np.abs(COMPILED.decode(payload, x.size)).reshape(-1, BLOCK).max(axis=1)
    if ((tops == 0) | (tops >= ZERO_BELOW)).all():
        assert COMPILED.fold([payload], [weight], x.size) == payload


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.integers(1, 2**40))
def test_a_fold_is_the_float32_sum_of_shares_in_order_encoded_once(num: int, seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    n = BLOCK * 3
    weights = [int(weight) for weight in rng.integers(1, most + 1, num)]
    payloads = [ORACLE.encode(rng.standard_normal(n, dtype=np.float32)) for _ in range(num)]
    acc = np.zeros(n, np.float32)
    for payload, weight in zip(payloads, weights, strict=True):
        acc = acc + np.float32(weight / sum(weights)) * ORACLE.decode(payload, n)
    expected = ORACLE.encode(acc)
    assert COMPILED.fold(payloads, weights, n) == expected
    assert ORACLE.fold(payloads, weights, n) == expected
    exact = sum(
        weight * ORACLE.decode(payload, n).astype(np.float64) for payload, weight in zip(payloads, weights, strict=True)
    ) / sum(weights)
    np.testing.assert_allclose(acc, exact, atol=1e-5)


@both
def test_a_fold_longer_than_one_chunk_keeps_every_block_in_its_place(codec: Int8Codec) -> None:
    rng = np.random.default_rng(1)
    n = BLOCK * 1700  # three chunks and a bit
    payloads = [codec.encode(rng.standard_normal(n, dtype=np.float32)) for _ in range(2)]
    acc = np.zeros(n, np.float32)
    for payload in payloads:
        codec.accumulate(acc, payload, 0.5)
    assert codec.fold(payloads, [4, 4], n) == codec.encode(acc)


def test_a_fold_depends_on_the_order_so_the_order_must_be_the_same_everywhere() -> None:
    rng = np.random.default_rng(2)
    n = BLOCK * 4000
    x, y, z = (COMPILED.encode(rng.standard_normal(n, dtype=np.float32)) for _ in range(3))
    assert COMPILED.fold([x, y, z], [3, 5, 7], n) == COMPILED.fold([x, y, z], [3, 5, 7], n)
    assert COMPILED.fold([x, y, z], [3, 5, 7], n) != COMPILED.fold([z, y, x], [7, 5, 3], n)


@both
def test_a_fold_of_an_unchecked_payload_that_decodes_to_infinity_is_refused(codec: Int8Codec) -> None:
    huge = bytearray(codec.encode(one_block(LARGEST)))
    huge[:2] = (0x7F7F).to_bytes(2, "little")
    with pytest.raises(NonFinite):
        codec.fold([codec.encode(one_block(1.0)), huge], [1, 1], BLOCK)


@both
@pytest.mark.parametrize("num", [2, 3, 64])
def test_a_mean_of_the_largest_values_does_not_overflow(codec: Int8Codec, num: int) -> None:
    payload = codec.encode(one_block(LARGEST, -LARGEST))
    assert codec.fold([payload] * num, [1] * num, BLOCK) == payload


@both
@pytest.mark.parametrize("weights", [[], [1], [1, 0], [1, -1], [0, 0]])
def test_weights_that_are_not_positive_or_do_not_match_are_refused(codec: Int8Codec, weights: list[int]) -> None:
    payload = codec.encode(one_block(1.0))
    with pytest.raises(ValueError, match="cannot be folded"):
        codec.fold([payload, payload], weights, BLOCK)
    with pytest.raises(ValueError, match="cannot be folded"):
        codec.fold([], [], BLOCK)


def test_without_numba_the_codec_runs_in_numpy_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    codec_module._load_kernels.cache_clear()
    x = one_block(1.0, 2.0)
    with caplog.at_level(logging.WARNING):
        assert Int8Codec(BLOCK).encode(x) == ORACLE.encode(x)
    assert "numba cannot be imported" in caplog.text
    with pytest.raises(ImportError):
        Int8Codec(BLOCK, "numba").encode(x)
    codec_module._load_kernels.cache_clear()
