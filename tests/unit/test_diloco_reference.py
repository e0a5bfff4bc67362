"""DiLoCo as the runtime does it, against the algorithm written down in one place: the same values, bit for bit.

The reference below knows nothing of parts, owners, layouts or our codec and outer step: it works tensor by tensor with
plain numpy and `torch.optim.AdamW`, and follows the text of arXiv:2311.08105 and the recipe.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dugnad.configs.recipe import Recipe, load
from dugnad.optim.codec import Int8Codec
from dugnad.optim.layout import Layout
from dugnad.optim.outer import SharedModel
from dugnad.peer.data import Corpus
from dugnad.peer.models import build, initial_weights, loss_of, tensor_shapes
from dugnad.peer.trainer import Trainer

QUICK = Path(__file__).parents[1] / "e2e" / "quick.toml"
WORKERS = 3
ROUND_STEPS = (3, 3, 4, 4)
Tensors = dict[str, NDArray[np.float32]]


def a_recipe() -> Recipe:
    """Two rounds of plain averaging, then momentum."""
    recipe = load(QUICK)
    return replace(recipe, outer=replace(recipe.outer, plain_until_step=6))


def samples_of(recipe: Recipe, worker: int, round_: int) -> tuple[int, int]:
    """Disjoint data ranges; one worker does fewer steps than the others, so weights differ."""
    steps = ROUND_STEPS[round_] - (1 if worker == 2 else 0)
    size = recipe.inner.batch_sequences
    start = (round_ * WORKERS + worker) * 100
    return start, start + steps * size


def quantized(x: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """What is left of `x`, any shape, after int8 in blocks of `block` values, each with a bfloat16 scale."""
    flat = np.zeros(-(-x.size // block) * block, np.float32)
    flat[: x.size] = x.ravel()
    blocks = flat.reshape(-1, block)
    largest = np.abs(blocks).max(axis=1)
    scale = torch.from_numpy(largest / np.float32(127)).to(torch.bfloat16).float().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.clip(np.rint(blocks / scale[:, None]), -127, 127)
    codes[largest < 2.0**-100] = 0
    decoded: NDArray[np.float32] = (codes.astype(np.float32) * scale[:, None]).ravel()[: x.size].reshape(x.shape)
    return decoded


class ReferenceWorker:
    """One worker: its own AdamW on the weights that it is given."""

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        self.recipe, self.corpus = recipe, corpus
        self.model = build(recipe.model)
        inner = recipe.inner
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": inner.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            betas=(inner.beta1, inner.beta2),
            fused=True,
        )

    def train(self, theta: Tensors, samples: tuple[int, int], global_step: int) -> Tensors:
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.tensor(theta[name]))
        size, context = self.recipe.inner.batch_sequences, self.recipe.model.context
        for step, first in enumerate(range(*samples, size)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.inner.lr_at(global_step + step)
            self.optimizer.zero_grad(set_to_none=True)
            batch = torch.from_numpy(self.corpus.batch(range(first, first + size), context=context))
            loss_of(self.model, batch).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters.values(), self.recipe.inner.clip_norm)
            self.optimizer.step()
        return {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}


def reference(recipe: Recipe, corpus: Corpus) -> list[Tensors]:
    """The shared weights after each round, by the book."""
    theta = initial_weights(recipe.model)
    momentum = {name: np.zeros_like(tensor) for name, tensor in theta.items()}
    workers = [ReferenceWorker(recipe, corpus) for _ in range(WORKERS)]
    rate, factor = np.float32(recipe.outer.lr), np.float32(recipe.outer.momentum)
    after: list[Tensors] = []
    global_step = 0
    for round_, steps in enumerate(ROUND_STEPS):
        ranges = [samples_of(recipe, worker, round_) for worker in range(WORKERS)]
        local = [worker.train(theta, samples, global_step) for worker, samples in zip(workers, ranges, strict=True)]
        tokens = [(end - start) * recipe.model.context for start, end in ranges]
        for name in theta:
            mean = np.zeros_like(theta[name])
            for weights, count in zip(local, tokens, strict=True):
                sent = quantized(theta[name] - weights[name], recipe.codec.block_elements)
                mean = mean + np.float32(count / sum(tokens)) * sent
            mean = quantized(mean, recipe.codec.block_elements)
            if global_step < recipe.outer.plain_until_step:
                theta[name] = theta[name] - mean
            else:
                momentum[name] = factor * momentum[name] + mean
                theta[name] = theta[name] - rate * (mean + factor * momentum[name])  # type: ignore[assignment]
        after.append(dict(theta))
        global_step += steps
    return after


def as_the_runtime_does(recipe: Recipe, corpus: Corpus) -> list[Tensors]:
    """The same with the runtime's own parts: trainers, encoded parts, folds, the shared model."""
    layout = Layout(tensor_shapes(recipe.model), recipe.codec.block_elements, recipe.codec.part_elements)
    assert len(layout.parts) > 3, "several parts, or the test shows little"
    codec = Int8Codec(recipe.codec.block_elements)
    model = SharedModel.initial(layout, initial_weights(recipe.model))
    trainers = [Trainer(recipe, build(recipe.model), corpus) for _ in range(WORKERS)]
    after: list[Tensors] = []
    global_step = 0
    for round_, steps in enumerate(ROUND_STEPS):
        intervals = [
            trainer.train(
                model.weights,
                ranges=[samples_of(recipe, worker, round_)],
                steps=steps,
                global_step=global_step,
                stop=lambda: False,
                on_step=lambda _: None,
            )
            for worker, trainer in enumerate(trainers)
        ]
        tokens = [interval.tokens for interval in intervals]
        averages = []
        for part in layout.parts:
            sent = [codec.encode(interval.pseudo_gradient[part.start : part.stop]) for interval in intervals]
            averages.append(codec.fold(sent, tokens, len(part)))
        model = model.apply(averages, recipe.outer, global_step=global_step)
        after.append(layout.unflatten(model.weights))
        global_step += steps
    return after


@pytest.fixture
def one_thread() -> None:
    """Sums of floats depend on how they are split over threads."""
    torch.set_num_threads(1)


@pytest.mark.usefixtures("one_thread")
def test_the_runtime_computes_diloco_value_for_value() -> None:
    recipe = a_recipe()
    corpus = Corpus.load(recipe.data)
    ours, book = as_the_runtime_does(recipe, corpus), reference(recipe, corpus)
    for round_, (mine, theirs) in enumerate(zip(ours, book, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            np.testing.assert_array_equal(tensor, theirs[name], err_msg=f"{name} after round {round_ + 1}")
    assert any(not np.array_equal(tensor, ours[-1][name]) for name, tensor in ours[0].items())


@pytest.mark.usefixtures("one_thread")
def test_the_comparison_sees_a_difference_of_one_setting() -> None:
    recipe = a_recipe()
    corpus = Corpus.load(recipe.data)
    other = replace(recipe, outer=replace(recipe.outer, momentum=0.9001))
    ours, book = as_the_runtime_does(recipe, corpus), reference(other, corpus)
    assert all(np.array_equal(tensor, book[1][name]) for name, tensor in ours[1].items()), "momentum sets in later"
    assert any(not np.array_equal(tensor, book[3][name]) for name, tensor in ours[3].items())
