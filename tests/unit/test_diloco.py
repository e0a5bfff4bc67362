from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dugnad.configs.recipe import OuterSettings
from dugnad.optim.codec import Int8Codec
from dugnad.optim.diloco import load_weights, pseudo_gradient, weights_of
from dugnad.optim.layout import Layout, LayoutError, Vector
from dugnad.optim.outer import SharedModel

BLOCK = 64
SHAPES: list[tuple[str, tuple[int, ...]]] = [("out.bias", (20,)), ("into.weight", (20, 9)), ("scale", ())]
LAYOUT = Layout(SHAPES, BLOCK, 2 * BLOCK)


class Tied(nn.Module):
    """One matrix at two places, a scalar, and a buffer that counts."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Embedding(20, 9)
        self.out = nn.Linear(9, 20)
        self.out.weight = self.into.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.tensor(7))


def random_vector(seed: int, layout: Layout = LAYOUT) -> Vector:
    vector = np.random.default_rng(seed).standard_normal(layout.total_elements, np.float32)
    layout.clear_padding(vector)
    return vector


def test_weights_come_out_as_they_went_in() -> None:
    model, theta = Tied(), random_vector(1)
    load_weights(model, LAYOUT, theta)
    np.testing.assert_array_equal(weights_of(model, LAYOUT), theta)
    np.testing.assert_array_equal(model.into.weight.detach().numpy(), LAYOUT.unflatten(theta)["into.weight"])
    assert model.out.weight is model.into.weight


def test_the_shared_vector_may_be_read_only_and_training_does_not_reach_it() -> None:
    theta = random_vector(1)
    theta.flags.writeable = False
    model, before = Tied(), theta.copy()
    load_weights(model, LAYOUT, theta)
    with torch.no_grad():
        model.into.weight.add_(1)
    np.testing.assert_array_equal(theta, before)


def test_what_was_taken_out_does_not_change_with_further_training() -> None:
    model = Tied()
    load_weights(model, LAYOUT, random_vector(1))
    taken = weights_of(model, LAYOUT)
    before = taken.copy()
    with torch.no_grad():
        model.into.weight.add_(1)
    np.testing.assert_array_equal(taken, before)


def test_the_pseudo_gradient_is_where_it_began_minus_where_it_is() -> None:
    model, theta, now = Tied(), random_vector(1), random_vector(2)
    load_weights(model, LAYOUT, now)
    before = theta.copy()
    np.testing.assert_array_equal(pseudo_gradient(theta, model, LAYOUT), before - now)
    np.testing.assert_array_equal(theta, before)


def test_a_model_that_has_not_moved_has_pseudo_gradient_zero() -> None:
    model, theta = Tied(), random_vector(1)
    load_weights(model, LAYOUT, theta)
    assert not pseudo_gradient(theta, model, LAYOUT).any()


def test_integer_buffers_are_left_alone() -> None:
    model = Tied()
    load_weights(model, LAYOUT, random_vector(1))
    assert int(model.seen) == 7


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_float_buffers_are_refused_by_name(dtype: torch.dtype, name: str) -> None:
    model = Tied()
    model.out.register_buffer("running_mean", torch.zeros(3, dtype=dtype))
    for use in (
        lambda: load_weights(model, LAYOUT, random_vector(1)),
        lambda: weights_of(model, LAYOUT),
        lambda: pseudo_gradient(random_vector(1), model, LAYOUT),
    ):
        with pytest.raises(LayoutError, match=rf"buffer 'out\.running_mean' is {name}"):
            use()


def replaced(name: str, shape: Sequence[int]) -> Layout:
    return Layout([(name, shape) if known == name else (known, size) for known, size in SHAPES], BLOCK, 2 * BLOCK)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout([*SHAPES, ("more", (2,))], BLOCK, 2 * BLOCK), r"missing \['more'\], not in it \[\]"),
        (Layout(SHAPES[1:], BLOCK, 2 * BLOCK), r"missing \[\], not in it \['out\.bias'\]"),
        (replaced("out.bias", (1,)), r"'out\.bias' is float32 \(20,\), the layout has float32 \(1,\)"),
        (replaced("into.weight", (9, 20)), r"'into\.weight' is float32 \(20, 9\), the layout has float32 \(9, 20\)"),
    ],
)
def test_a_model_that_does_not_fit_the_layout_is_refused_and_stays_as_it_is(layout: Layout, message: str) -> None:
    model = Tied()
    load_weights(model, LAYOUT, random_vector(1))
    with pytest.raises(LayoutError, match=message):
        load_weights(model, layout, random_vector(2, layout))
    with pytest.raises(LayoutError, match=message):
        weights_of(model, layout)
    np.testing.assert_array_equal(weights_of(model, LAYOUT), random_vector(1))


def test_parameters_of_another_dtype_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"'scale' is float64 \(\), the layout has float32"):
        weights_of(Tied().double(), LAYOUT)


@pytest.mark.parametrize("vector", [random_vector(1)[:-1], random_vector(1).astype(np.float64)])
def test_a_vector_that_does_not_fit_is_refused(vector: Vector) -> None:
    with pytest.raises(LayoutError, match="vector is"):
        load_weights(Tied(), LAYOUT, vector)
    with pytest.raises(LayoutError, match="vector is"):
        pseudo_gradient(vector, Tied(), LAYOUT)


def through_int8(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of `x` after int8 in blocks, in the plainest numpy; no block of it may be zero."""
    flat = np.zeros(-(-x.size // BLOCK) * BLOCK, np.float32)
    flat[: x.size] = x.reshape(-1)
    out = np.empty_like(flat)
    for at in range(0, flat.size, BLOCK):
        block = flat[at : at + BLOCK]
        ratio = float(np.abs(block).max() / np.float32(127))
        exponent = int(np.floor(np.log2(ratio)))
        # a bfloat16 has 8 significant bits; Python rounds half to even, as the codec must
        scale = np.float32(round(ratio * 2.0 ** (7 - exponent)) * 2.0 ** (exponent - 7))
        out[at : at + BLOCK] = np.clip(np.rint(block / scale), -127, 127) * scale
    return out[: x.size].reshape(x.shape)


def test_three_workers_with_tied_weights_come_to_what_the_formula_says_bit_for_bit() -> None:
    outer = OuterSettings(lr=0.7, momentum=0.9, plain_until_step=10)
    codec, tokens = Int8Codec(BLOCK), [300, 300, 100]
    models = [Tied() for _ in tokens]
    shared = SharedModel(LAYOUT, random_vector(0), np.zeros(LAYOUT.total_elements, np.float32))
    theta = {name: tensor.copy() for name, tensor in LAYOUT.unflatten(random_vector(0)).items()}
    momentum = {name: np.zeros_like(tensor) for name, tensor in theta.items()}

    for round_, global_step in enumerate([0, 10, 20, 30]):
        # where each worker's training leads does not matter here: somewhere else each time
        ends = [LAYOUT.unflatten(shared.weights + random_vector(10 * round_ + i + 1)) for i in range(3)]
        for model, end in zip(models, ends, strict=True):
            load_weights(model, LAYOUT, shared.weights)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.tensor(end[name]))
        deltas = [pseudo_gradient(shared.weights, model, LAYOUT) for model in models]
        folded = [
            codec.fold([codec.encode(delta[part.start : part.stop]) for delta in deltas], tokens, len(part))
            for part in LAYOUT.parts
        ]
        shared = shared.apply(folded, outer, global_step=global_step)

        for name in theta:
            mean = np.zeros_like(theta[name])
            for end, count in zip(ends, tokens, strict=True):
                mean = mean + np.float32(count / 700) * through_int8(theta[name] - end[name])
            mean = through_int8(mean)
            if global_step < 10:
                theta[name] = theta[name] - mean
            else:
                momentum[name] = np.float32(0.9) * momentum[name] + mean
                step = np.float32(0.7) * (mean + np.float32(0.9) * momentum[name])
                theta[name] = np.subtract(theta[name], step, dtype=np.float32)
            np.testing.assert_array_equal(LAYOUT.unflatten(shared.weights)[name], theta[name], err_msg=name)
            np.testing.assert_array_equal(LAYOUT.unflatten(shared.momentum)[name], momentum[name], err_msg=name)
