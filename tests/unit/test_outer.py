import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dugnad.configs.recipe import OuterSettings
from dugnad.dht.manifest import CHUNK_BYTES, ManifestError, digests_of
from dugnad.optim import outer
from dugnad.optim.codec import CodecError, Int8Codec, NonFinite
from dugnad.optim.layout import Layout, LayoutError
from dugnad.optim.outer import SharedModel, manifest_bytes, outer_step, plain_step, wanted_blobs

LAYOUT = Layout([("embed", (40, 5)), ("bias", (7,)), ("scale", ())], 64, 128)
NESTEROV = OuterSettings(lr=0.7, momentum=0.9, plain_until_step=100)


def random_vector(seed: int, n: int = 100_000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n, dtype=np.float32)


def a_model(seed: int = 1) -> SharedModel:
    rng = np.random.default_rng(seed)
    vectors = [
        LAYOUT.flatten({name: rng.standard_normal(shape, dtype=np.float32) for name, shape in LAYOUT.tensors})
        for _ in range(2)
    ]
    return SharedModel(LAYOUT, *vectors)


def payloads_of(vector: np.ndarray) -> list[memoryview]:
    return [Int8Codec(64).encode(vector[part.start : part.stop]) for part in LAYOUT.parts]


def blobs_of(model: SharedModel) -> dict[bytes, bytes]:
    wanted = wanted_blobs(model.layout, model.manifest())
    return {digest: bytes(model.blob(digest) or b"") for digest in wanted}


def test_the_step_is_diloco_in_float64_up_to_rounding() -> None:
    theta, momentum, delta = (random_vector(seed).astype(np.float64) for seed in (1, 2, 3))
    expected_momentum = 0.9 * momentum + delta
    expected_theta = theta - 0.7 * (delta + 0.9 * expected_momentum)
    got_theta, got_momentum = outer_step(
        random_vector(1), random_vector(2), random_vector(3), lr=0.7, momentum_factor=0.9
    )
    np.testing.assert_allclose(got_momentum, expected_momentum, rtol=0, atol=2e-6)
    np.testing.assert_allclose(got_theta, expected_theta, rtol=0, atol=2e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 70_000), st.floats(0, 2), st.floats(0, 1))
def test_the_step_has_the_bits_of_separate_float32_operations_in_order(
    seed: int, n: int, lr: float, momentum_factor: float
) -> None:
    theta, momentum, delta = (random_vector(seed + i, n) for i in range(3))
    expected_momentum = np.float32(momentum_factor) * momentum + delta
    expected_theta = theta - np.float32(lr) * (delta + np.float32(momentum_factor) * expected_momentum)
    got_theta, got_momentum = outer_step(theta, momentum, delta, lr=lr, momentum_factor=momentum_factor)
    assert got_momentum.dtype == got_theta.dtype == np.float32
    assert got_momentum.tobytes() == expected_momentum.tobytes()
    assert got_theta.tobytes() == expected_theta.tobytes()


def test_a_fused_multiply_add_would_give_other_bits() -> None:
    # shows that the comparison above can fail at all
    momentum, delta = random_vector(2), random_vector(3)
    fused = (np.float64(np.float32(0.9)) * momentum.astype(np.float64) + delta.astype(np.float64)).astype(np.float32)
    _, separate = outer_step(random_vector(1), momentum, delta, lr=0.7, momentum_factor=0.9)
    assert (fused != separate).mean() > 0.05


def test_the_step_leaves_its_arguments_alone_and_returns_new_arrays() -> None:
    vectors = [random_vector(seed, 1000) for seed in (1, 2, 3)]
    for vector in vectors:
        vector.flags.writeable = False
    results = [*outer_step(*vectors, lr=0.7, momentum_factor=0.9), plain_step(vectors[0], vectors[2])]
    assert not any(np.shares_memory(result, vector) for result in results for vector in vectors)


def test_a_delta_of_zero_from_rest_moves_nothing() -> None:
    theta, zero = random_vector(1), np.zeros(100_000, np.float32)
    new_theta, new_momentum = outer_step(theta, zero, zero, lr=0.7, momentum_factor=0.9)
    assert np.array_equal(new_theta, theta)
    assert not new_momentum.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("at", [0, 99_999])
def test_a_step_to_values_that_are_not_finite_is_refused(bad: float, at: int) -> None:
    theta, momentum, delta = (random_vector(seed) for seed in (1, 2, 3))
    delta[at] = bad
    theta[at] = -3e38
    with pytest.raises(NonFinite):
        outer_step(theta, momentum, delta, lr=0.7, momentum_factor=0.9)
    with pytest.raises(NonFinite):
        plain_step(theta, delta)


def test_vectors_of_different_lengths_or_types_are_refused() -> None:
    x = random_vector(1, 10)
    vectors: list[NDArray[Any]] = [x[:9], x.astype(np.float64), x.reshape(2, 5)]
    for wrong in vectors:
        with pytest.raises(ValueError, match="float32 vectors of one length"):
            outer_step(x, x, wrong, lr=0.7, momentum_factor=0.9)
        with pytest.raises(ValueError, match="float32 vectors of one length"):
            plain_step(x, wrong)


def test_applying_parts_is_the_outer_step_along_what_they_decode_to() -> None:
    model = a_model()
    payloads = payloads_of(random_vector(5, LAYOUT.total_elements))
    delta = np.concatenate(
        [Int8Codec(64).decode(payload, len(part)) for payload, part in zip(payloads, LAYOUT.parts, strict=True)]
    )
    LAYOUT.clear_padding(delta)
    after = model.apply(payloads, NESTEROV, global_step=100)
    theta, momentum = outer_step(model.weights, model.momentum, delta, lr=0.7, momentum_factor=0.9)
    assert after.weights.tobytes() == theta.tobytes()
    assert after.momentum.tobytes() == momentum.tobytes()


def test_before_momentum_sets_in_the_weights_become_their_plain_mean() -> None:
    model = a_model()
    payloads = payloads_of(LAYOUT.flatten(LAYOUT.unflatten(random_vector(5, LAYOUT.total_elements))))
    after = model.apply(payloads, NESTEROV, global_step=99)
    delta = np.concatenate(
        [Int8Codec(64).decode(payload, len(part)) for payload, part in zip(payloads, LAYOUT.parts, strict=True)]
    )
    assert after.weights.tobytes() == (model.weights - delta).tobytes()
    assert after.momentum.tobytes() == model.momentum.tobytes()


def test_values_sent_in_the_padding_do_not_stay_in_the_model() -> None:
    after = a_model().apply(payloads_of(np.ones(LAYOUT.total_elements, np.float32)), NESTEROV, global_step=100)
    for vector in (after.weights, after.momentum):
        assert sum(np.count_nonzero(vector[slot.stop : slot.end]) for slot in LAYOUT.slots) == 0


def test_a_model_that_was_applied_to_is_unchanged() -> None:
    model = a_model()
    before = model.weights.tobytes() + model.momentum.tobytes()
    digest = model.digest()
    model.apply(payloads_of(np.ones(LAYOUT.total_elements, np.float32)), NESTEROV, global_step=100)
    assert model.weights.tobytes() + model.momentum.tobytes() == before
    assert a_model().digest() == digest
    with pytest.raises(ValueError, match="read-only"):
        model.weights[0] = 1


def test_parts_that_do_not_fit_are_refused() -> None:
    model = a_model()
    payloads = payloads_of(np.ones(LAYOUT.total_elements, np.float32))
    with pytest.raises(ValueError, match="2 parts given, the layout has 3"):
        model.apply(payloads[:2], NESTEROV, global_step=0)
    with pytest.raises(CodecError):
        model.apply([*payloads[:2], payloads[2][:-1]], NESTEROV, global_step=0)
    with pytest.raises(LayoutError):
        SharedModel(LAYOUT, model.weights[:-1], model.momentum)
    with pytest.raises(LayoutError):
        SharedModel(LAYOUT, model.weights, model.momentum.astype(np.float64))


def test_the_digest_is_the_hash_of_the_manifest_which_lists_every_tensor_by_name() -> None:
    model = a_model()
    domain, entries = msgspec.msgpack.decode(model.manifest())
    assert domain == "dugnad/model/2"
    tensors = LAYOUT.unflatten(model.momentum), LAYOUT.unflatten(model.weights)
    assert entries == [
        [f"{group}/{name}", "float32", list(tensor.shape), [blake3(tensor.tobytes()).digest()]]
        for group, named in zip(("momentum", "weights"), tensors, strict=True)
        for name, tensor in sorted(named.items())
    ]
    assert model.digest() == blake3(model.manifest()).digest()
    assert [name for name, *_ in entries] == sorted(model.tensors())


def test_large_tensors_travel_in_chunks_of_a_mebibyte_that_are_views_of_the_model() -> None:
    elements = 5 * CHUNK_BYTES // 8  # two and a half chunks
    layout = Layout([("large", (2, elements // 2)), ("small", (3,))], 64, 64 * 1024)
    values = {"large": random_vector(1, elements).reshape(2, -1), "small": random_vector(2, 3)}
    model = SharedModel.initial(layout, values)
    wanted = wanted_blobs(layout, model.manifest())
    half = CHUNK_BYTES // 2
    # momentum is zero: its first two chunks are the same bytes
    assert sorted(wanted.values()) == [12, 12, half, half, CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES]
    raw = values["large"].tobytes()
    for start in range(0, len(raw), CHUNK_BYTES):
        chunk = raw[start : start + CHUNK_BYTES]
        given = model.blob(blake3(chunk).digest())
        assert given is not None
        assert given == chunk
        assert given.readonly
        assert np.shares_memory(np.frombuffer(given, np.float32), model.weights)
    received = SharedModel.from_manifest(layout, model.manifest(), blobs_of(model).get)
    assert received.weights.tobytes() == model.weights.tobytes()


def test_the_manifest_itself_is_a_blob_under_the_models_digest() -> None:
    model = a_model()
    assert bytes(model.blob(model.digest()) or b"") == model.manifest()
    assert len(model.manifest()) == manifest_bytes(LAYOUT)


def test_a_model_is_hashed_once_and_one_that_was_verified_not_at_all() -> None:
    model = a_model()
    with patch.object(outer, "digests_of", wraps=digests_of) as hashing:
        for _ in range(2):
            digest = model.digest()
            blobs = blobs_of(model)
        assert hashing.call_count == 2 * len(LAYOUT.tensors)
        received = SharedModel.from_manifest(LAYOUT, model.manifest(), blobs.get)
        assert received.digest() == digest
        assert blobs_of(received) == blobs
        assert hashing.call_count == 2 * len(LAYOUT.tensors)
    fresh = SharedModel(LAYOUT, received.weights, received.momentum)
    assert fresh.manifest() == received.manifest()


def test_one_bit_of_weights_or_momentum_changes_the_digest_and_one_blob() -> None:
    model = a_model()
    for which in ("weights", "momentum"):
        vectors = {"weights": model.weights.copy(), "momentum": model.momentum.copy()}
        vectors[which].view(np.uint32)[0] ^= 1
        other = SharedModel(LAYOUT, vectors["weights"], vectors["momentum"])
        assert other.digest() != model.digest()
        assert len(wanted_blobs(LAYOUT, other.manifest()).keys() - blobs_of(model).keys()) == 1


def test_a_model_travels_as_its_manifest_and_blobs() -> None:
    model = a_model()
    blobs = blobs_of(model)
    assert wanted_blobs(LAYOUT, model.manifest()) == {digest: len(blob) for digest, blob in blobs.items()}
    received = SharedModel.from_manifest(LAYOUT, model.manifest(), blobs.get)
    assert received.digest() == model.digest()
    assert received.weights.tobytes() == model.weights.tobytes()
    assert received.momentum.tobytes() == model.momentum.tobytes()
    assert model.blob(bytes(32)) is None


def test_an_initial_model_has_no_momentum() -> None:
    model = SharedModel.initial(LAYOUT, LAYOUT.unflatten(a_model().weights))
    assert model.weights.tobytes() == a_model().weights.tobytes()
    assert not model.momentum.any()
    assert SharedModel.from_manifest(LAYOUT, model.manifest(), blobs_of(model).get).digest() == model.digest()


def test_missing_short_and_corrupt_blobs_are_named_by_their_tensor() -> None:
    model = a_model()
    digest = blake3(model.tensors()["weights/bias"].tobytes()).digest()
    good = blobs_of(model)
    cases = [
        ({d: b for d, b in good.items() if d != digest}, "'weights/bias' is missing"),
        (good | {digest: good[digest][:-1]}, "'weights/bias' has a chunk of 27 bytes, not 28"),
        (good | {digest: bytes(28)}, "'weights/bias' is corrupt"),
    ]
    for blobs, said in cases:
        with pytest.raises(ManifestError, match=said):
            SharedModel.from_manifest(LAYOUT, model.manifest(), blobs.get)


def changed(edit: Callable[[list[Any]], object]) -> bytes:
    parsed = msgspec.msgpack.decode(a_model().manifest())
    edit(parsed)
    return msgspec.msgpack.encode(parsed)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"", "manifest has 0 bytes"),
        (a_model().manifest()[:-1], "manifest has"),
        (a_model().manifest() + b"\0", "manifest has"),
        (b"\xc1" * len(a_model().manifest()), "cannot be read"),
        (b"\x91" * len(a_model().manifest()), "cannot be read"),
        (changed(lambda m: m.__setitem__(0, "dugnad/model/1")), "is of kind 'dugnad/model/1'"),
        (changed(lambda m: m[1][0].__setitem__(0, "momentum/bian")), "lists 'momentum/bian'"),
        (changed(lambda m: m[1][0].__setitem__(1, "float64")), "'momentum/bias' is 'float64'"),
        (changed(lambda m: m[1][0].__setitem__(2, [8])), r"lists 'momentum/bias' float32 \(8,\)"),
        (changed(lambda m: m[1][0].__setitem__(2, [7, 1])), "manifest has"),
        (changed(lambda m: m[1].reverse()), "not in name order"),
        (changed(lambda m: m[1][0].__setitem__(0, "momentum/aias")), "lists 'momentum/aias'"),
        (changed(lambda m: (m[1].pop(), m[1][0].__setitem__(0, "momentum/bias" + "x" * 58))), "lists 5 tensors"),
        (changed(lambda m: (m[1][0][3].__setitem__(0, bytes(31)), m[1][1][3].__setitem__(0, bytes(33)))), "be read"),
    ],
)
def test_manifests_that_do_not_fit_the_layout_are_refused(manifest: bytes, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        SharedModel.from_manifest(LAYOUT, manifest, lambda digest: None)
    with pytest.raises(ManifestError, match=said):
        wanted_blobs(LAYOUT, manifest)


@given(st.integers(0, 2000), st.integers(0, 255))
def test_a_manifest_with_any_byte_changed_is_refused_or_lists_another_digest(at: int, value: int) -> None:
    manifest = bytearray(a_model().manifest())
    manifest[at % len(manifest)] = value
    if bytes(manifest) != a_model().manifest():
        try:
            wanted = wanted_blobs(LAYOUT, bytes(manifest))
        except ManifestError:
            return
        assert wanted.keys() != blobs_of(a_model()).keys()


@given(st.binary(max_size=700))
def test_random_bytes_are_never_a_manifest(data: bytes) -> None:
    size = len(a_model().manifest())
    for manifest in (data, data.ljust(size, b"\x90")[:size]):
        with pytest.raises(ManifestError):
            wanted_blobs(LAYOUT, manifest)


def test_a_manifest_in_another_encoding_of_the_same_meaning_is_refused() -> None:
    # the list's length as 32 bits, the room for it taken from a name: only the layout's own bytes are its manifest
    layout = Layout([("a" * 32, (1,))], 64, 64)
    model = SharedModel.initial(layout, {"a" * 32: np.ones(1, np.float32)})
    name = b"momentum/" + b"a" * 32
    canonical = model.manifest()
    assert canonical.count(b"\xd9" + bytes([len(name)]) + name) == 1
    other = canonical.replace(b"\xd9" + bytes([len(name)]) + name, b"\xda\0" + bytes([len(name)]) + name)
    assert msgspec.msgpack.decode(other) == msgspec.msgpack.decode(canonical)
    with pytest.raises(ManifestError):
        wanted_blobs(layout, other)
    assert math.prod(model.weights.shape) == 64
