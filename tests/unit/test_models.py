import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from blake3 import blake3

from dugnad.configs.recipe import ModelSettings, load
from dugnad.peer.models import LanguageModel, build, generate, initial_weights, loss_of, tensor_shapes

TINY_BOOKS = load("tiny-books").model
SMALL = replace(TINY_BOOKS, layers=2, width=32, heads=2, context=16)
OTHERS = [
    SMALL,
    replace(SMALL, layers=1, heads=1),
    replace(SMALL, width=48, heads=3, context=5),
    replace(SMALL, width=7, heads=7, context=1),
]


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    """A network with an opinion: ten times its first weights, which hardly tell one prompt from another."""
    model = build(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model


def digest_of(settings: ModelSettings) -> str:
    hasher = blake3()
    for name, weight in sorted(initial_weights(settings).items()):
        hasher.update(name.encode() + weight.astype("<f4").tobytes())
    return hasher.hexdigest()


@pytest.mark.parametrize("settings", OTHERS)
def test_the_listed_tensors_are_the_parameters_of_the_network(settings: ModelSettings) -> None:
    built = {name: tuple(parameter.shape) for name, parameter in build(settings).named_parameters()}
    listed = tensor_shapes(settings)
    assert dict(listed) == built
    assert len(listed) == len(built)
    assert {name: weight.shape for name, weight in initial_weights(settings).items()} == built


def test_tensors_of_a_model_that_no_machine_could_hold_are_listed() -> None:
    huge = replace(TINY_BOOKS, layers=256, width=16384, heads=128, context=65536)
    assert sum(math.prod(shape) for _, shape in tensor_shapes(huge)) > 8e11


def test_the_tiny_model_has_0_84_million_parameters_and_one_matrix_for_both_ways() -> None:
    shapes = dict(tensor_shapes(TINY_BOOKS))
    assert sum(math.prod(shape) for shape in shapes.values()) == 842_496
    assert [name for name, shape in shapes.items() if 256 in shape] == ["embedding.weight"]


def test_the_gradient_of_the_embedding_has_both_ways_in_it(small: LanguageModel) -> None:
    small.zero_grad()
    loss_of(small, torch.zeros(1, 9, dtype=torch.uint8)).backward()  # type: ignore[no-untyped-call]
    gradient_VC = small.get_parameter("embedding.weight").grad
    assert gradient_VC is not None
    # the way in touches byte 0 alone, the way out all 256
    assert int((gradient_VC.abs().sum(dim=1) > 0).sum()) == 256


def test_the_first_weights_are_these_on_every_machine() -> None:
    assert digest_of(TINY_BOOKS) == "8769f1220b4b73b46cac91301b1c6da68fc99977b6c75349d2d52a64e4b83093"
    assert digest_of(replace(TINY_BOOKS, seed=2)) != digest_of(TINY_BOOKS)


def test_a_tensor_is_drawn_by_its_name_so_more_layers_leave_it_as_it_is() -> None:
    few, many = initial_weights(SMALL), initial_weights(replace(SMALL, layers=3))
    np.testing.assert_array_equal(few["embedding.weight"], many["embedding.weight"])
    np.testing.assert_array_equal(few["blocks.0.mlp.0.weight"], many["blocks.0.mlp.0.weight"])
    assert not np.array_equal(few["blocks.0.mlp.0.weight"], few["blocks.1.mlp.0.weight"])


def test_the_first_weights_have_the_spread_of_gpt_2() -> None:
    weights = initial_weights(TINY_BOOKS)
    assert weights["embedding.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert weights["embedding.weight"].mean() == pytest.approx(0, abs=5e-4)
    assert weights["blocks.3.attention.out.weight"].std() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert np.all(weights["norm.weight"] == 1)
    assert np.all(weights["blocks.0.mlp.2.bias"] == 0)
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}


def test_building_gives_the_first_weights_and_leaves_the_random_state_of_torch_alone() -> None:
    before = torch.random.get_rng_state()
    model = build(SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, weight in initial_weights(SMALL).items():
        np.testing.assert_array_equal(model.get_parameter(name).detach().numpy(), weight)


def test_an_untrained_model_knows_nothing() -> None:
    sequences_BS = torch.arange(4 * 17).reshape(4, 17).to(torch.uint8)
    assert loss_of(build(SMALL), sequences_BS).item() == pytest.approx(math.log(256), rel=0.02)


def test_no_position_sees_what_comes_after_it(small: LanguageModel) -> None:
    tokens_BT = torch.arange(16)[None]
    changed_BT = tokens_BT.clone()
    changed_BT[0, 9] = 200
    with torch.no_grad():
        difference_T = (small(tokens_BT) - small(changed_BT)).abs().amax(dim=2)[0]
    assert torch.all(difference_T[:9] == 0)
    assert torch.all(difference_T[9:] > 0)


def test_the_order_of_earlier_bytes_matters(small: LanguageModel) -> None:
    with torch.no_grad():
        one, other = small(torch.tensor([[1, 2, 3]]))[0, -1], small(torch.tensor([[2, 1, 3]]))[0, -1]
    assert not torch.allclose(one, other, atol=1e-6)


def test_the_loss_is_that_of_each_next_byte(small: LanguageModel) -> None:
    sequences_BS = torch.tensor([[5, 6, 7], [250, 251, 252]], dtype=torch.uint8)
    with torch.no_grad():
        logits_BTV = small(sequences_BS[:, :-1].long()).double()
        expected = [
            torch.logsumexp(logits_BTV[b, t], 0) - logits_BTV[b, t, int(sequences_BS[b, t + 1])]
            for b in range(2)
            for t in range(2)
        ]
        assert loss_of(small, sequences_BS).item() == pytest.approx(float(sum(expected)) / 4, rel=1e-6)


def write(
    model: LanguageModel,
    prompt: bytes = b"ab",
    length: int = 40,
    *,
    temperature: float = 1.0,
    top_k: int = 256,
    seed: int = 3,
) -> bytes:
    return generate(model, prompt, length, temperature=temperature, top_k=top_k, seed=seed)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(small: LanguageModel) -> None:
    assert write(small) == write(small)
    assert write(small) != write(small, seed=4)
    assert len(write(small)) == 40


def test_one_candidate_or_temperature_zero_is_the_likeliest_byte(small: LanguageModel) -> None:
    with torch.no_grad():
        likeliest = int(small(torch.tensor([list(b"ab")]))[0, -1].argmax())
    assert write(small, length=1, top_k=1)[0] == likeliest
    assert write(small, temperature=0) == write(small, top_k=1) == write(small, temperature=1e-12)


def test_bytes_beyond_the_likeliest_few_are_never_written(small: LanguageModel) -> None:
    with torch.no_grad():
        likeliest = set(small(torch.tensor([list(b"ab")]))[0, -1].topk(3).indices.tolist())
    assert {write(small, length=1, top_k=3, seed=seed)[0] for seed in range(40)} == likeliest


def test_of_a_prompt_longer_than_the_context_the_end_counts_and_all_of_it(small: LanguageModel) -> None:
    def first_bytes(prompt: bytes) -> list[bytes]:
        return [write(small, prompt, 1, seed=seed) for seed in range(300)]

    end = b"the last sixteen"
    assert len(end) == SMALL.context
    assert first_bytes(b"something before " + end) == first_bytes(end)
    assert first_bytes(b"x" + end[1:]) != first_bytes(end)


def test_without_a_prompt_it_begins_as_after_a_line_end(small: LanguageModel) -> None:
    assert write(small, b"") == write(small, b"\n")
    assert write(small, length=0) == b""


@pytest.mark.parametrize(
    ("temperature", "top_k", "length"), [(-1.0, 1, 1), (math.nan, 1, 1), (1.0, 0, 1), (1.0, 1, -1)]
)
def test_settings_that_mean_nothing_are_refused(
    small: LanguageModel, temperature: float, top_k: int, length: int
) -> None:
    with pytest.raises(ValueError, match="cannot write with"):
        write(small, length=length, temperature=temperature, top_k=top_k)
