import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from dugnad.configs.recipe import Recipe, load
from dugnad.optim.layout import Layout, LayoutError, Vector
from dugnad.peer.data import Corpus
from dugnad.peer.models import build, initial_weights, loss_of, tensor_shapes
from dugnad.peer.trainer import Interval, NonFinite, OptimizerError, StepResult, Trainer

TINY_BOOKS = load("tiny-books")
RECIPE = replace(
    TINY_BOOKS,
    model=replace(TINY_BOOKS.model, layers=1, width=32, heads=2, context=16),
    inner=replace(TINY_BOOKS.inner, batch_sequences=4, warmup_steps=0, decay_steps=100, joiner_warmup_steps=10),
    codec=replace(TINY_BOOKS.codec, block_elements=64, part_elements=4096),
    evaluation=replace(TINY_BOOKS.evaluation, sequences=10),
)
LAYOUT = Layout(tensor_shapes(RECIPE.model), RECIPE.codec.block_elements, RECIPE.codec.part_elements)
BOOKS = Corpus.load(RECIPE.data)
THETA = LAYOUT.flatten(initial_weights(RECIPE.model))
BATCH, CONTEXT = RECIPE.inner.batch_sequences, RECIPE.model.context


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of floats depend on how they are split over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorded(Corpus):
    """A corpus that remembers which samples were asked for."""

    asked: list[list[int]]

    def batch(self, samples: Sequence[int], *, context: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        self.asked.append(list(samples))
        return super().batch(samples, context=context)


def recorded() -> Recorded:
    corpus = Recorded(BOOKS.train, BOOKS.validation, BOOKS.seed)
    object.__setattr__(corpus, "asked", [])
    return corpus


def trainer(recipe: Recipe = RECIPE, corpus: Corpus = BOOKS) -> Trainer:
    return Trainer(recipe, build(recipe.model), corpus)


def train(
    which: Trainer,
    theta: Vector = THETA,
    *,
    steps: int = 3,
    ranges: Sequence[tuple[int, int]] = ((0, 1000),),
    global_step: int = 0,
    stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[StepResult], None] = lambda _: None,
) -> Interval:
    return which.train(theta, ranges=ranges, steps=steps, global_step=global_step, stop=stop, on_step=on_step)


def moved(recipe: Recipe, global_step: int) -> Vector:
    """How far one step of a new trainer goes."""
    return train(trainer(recipe), steps=1, global_step=global_step).pseudo_gradient


def test_a_small_network_learns_more_than_the_frequencies_of_bytes_in_300_steps() -> None:
    recipe = replace(
        RECIPE,
        model=replace(RECIPE.model, width=64, context=32),
        inner=replace(TINY_BOOKS.inner, batch_sequences=16, warmup_steps=20),
    )
    layout = Layout(tensor_shapes(recipe.model), recipe.codec.block_elements, recipe.codec.part_elements)
    theta, it = layout.flatten(initial_weights(recipe.model)), trainer(recipe)
    before = it.evaluate(theta)
    interval = train(it, theta, steps=300, ranges=[(0, 300 * 16)])
    assert before == pytest.approx(math.log(256), rel=0.02)
    assert it.evaluate(theta - interval.pseudo_gradient) < 2.9  # frequencies alone: 3.33


def test_an_interval_counts_what_was_done() -> None:
    steps: list[StepResult] = []
    interval = train(trainer(), steps=3, on_step=steps.append)
    assert (interval.steps, interval.samples, interval.tokens) == (3, 3 * BATCH, 3 * BATCH * CONTEXT)
    assert interval.loss == pytest.approx(sum(step.loss for step in steps) / 3)
    assert [step.tokens for step in steps] == [BATCH * CONTEXT] * 3
    assert interval.compute_s == pytest.approx(sum(step.tokens / step.tokens_per_s for step in steps))
    assert interval.pseudo_gradient.shape == THETA.shape
    assert interval.pseudo_gradient.dtype == np.float32


def test_the_first_loss_is_that_of_the_weights_given_on_the_first_batch() -> None:
    steps: list[StepResult] = []
    train(trainer(), steps=1, ranges=[(30, 40)], on_step=steps.append)
    sequences_BS = torch.from_numpy(BOOKS.batch(range(30, 34), context=CONTEXT))
    assert steps[0].loss == pytest.approx(loss_of(build(RECIPE.model), sequences_BS).item(), rel=1e-6)


def test_samples_are_used_up_in_order_across_ranges() -> None:
    corpus = recorded()
    train(trainer(corpus=corpus), steps=3, ranges=[(50, 55), (7, 8), (90, 200)])
    assert corpus.asked == [[50, 51, 52, 53], [54, 7, 90, 91], [92, 93, 94, 95]]


def test_ranges_that_end_sooner_end_the_interval_with_whole_batches() -> None:
    corpus = recorded()
    interval = train(trainer(corpus=corpus), steps=3, ranges=[(0, 4), (10, 13), (20, 20)])
    assert corpus.asked == [[0, 1, 2, 3]]
    assert (interval.steps, interval.samples) == (1, 4)


def test_ranges_of_any_length_are_not_listed_in_memory() -> None:
    assert train(trainer(), steps=1, ranges=[(2**62, 2**63 - 1)]).steps == 1


def test_stopped_between_two_steps_it_keeps_what_is_done() -> None:
    stop = threading.Event()
    done: list[StepResult] = []

    def on_step(step: StepResult) -> None:
        done.append(step)
        if len(done) == 2:
            stop.set()

    stopped = train(trainer(), steps=9, stop=stop.is_set, on_step=on_step)
    assert (stopped.steps, stopped.samples, len(done)) == (2, 2 * BATCH, 2)
    np.testing.assert_array_equal(stopped.pseudo_gradient, train(trainer(), steps=2).pseudo_gradient)


def test_an_interval_without_steps_is_zero_and_has_no_loss() -> None:
    for interval in (train(trainer(), stop=lambda: True), train(trainer(), steps=0), train(trainer(), ranges=[])):
        assert not interval.pseudo_gradient.any()
        assert (interval.steps, interval.samples, interval.tokens, interval.compute_s) == (0, 0, 0, 0.0)
        assert math.isnan(interval.loss)


def test_two_machines_with_the_same_work_come_to_the_same_bits() -> None:
    np.testing.assert_array_equal(train(trainer()).pseudo_gradient, train(trainer()).pseudo_gradient)


def test_padding_stays_zero_and_the_weights_given_stay_as_they_are() -> None:
    theta = THETA.copy()
    theta.flags.writeable = False
    delta = train(trainer(), theta).pseudo_gradient
    np.testing.assert_array_equal(theta, THETA)
    assert delta.any()
    for slot in LAYOUT.slots:
        assert not delta[slot.stop : slot.end].any()


def test_the_moments_of_adamw_stay_from_one_round_to_the_next() -> None:
    whole = train(trainer(), steps=4).pseudo_gradient
    it = trainer()
    first = train(it, steps=2, ranges=[(0, 2 * BATCH)])
    second = train(it, THETA - first.pseudo_gradient, steps=2, ranges=[(2 * BATCH, 4 * BATCH)], global_step=2)
    fresh = train(trainer(), THETA - first.pseudo_gradient, steps=2, ranges=[(2 * BATCH, 4 * BATCH)], global_step=2)
    # not bit for bit: the weights between the rounds are rounded once more
    np.testing.assert_allclose(first.pseudo_gradient + second.pseudo_gradient, whole, atol=1e-5)
    assert np.abs(first.pseudo_gradient + fresh.pseudo_gradient - whole).max() > 1e-4


def test_the_learning_rate_follows_the_global_step_not_the_round() -> None:
    # the first step of AdamW goes as far as the learning rate says, whatever the gradient
    recipe = replace(RECIPE, inner=replace(RECIPE.inner, joiner_warmup_steps=0, weight_decay=0.0))
    start, late = np.abs(moved(recipe, 0)).max(), np.abs(moved(recipe, 60)).max()
    assert start == pytest.approx(recipe.inner.lr_at(0), rel=1e-3)
    assert late == pytest.approx(recipe.inner.lr_at(60), rel=1e-3)
    assert late < 0.6 * start


def test_within_an_interval_the_learning_rate_goes_on_step_by_step() -> None:
    # a schedule that falls to nothing after the first step: the others change nothing
    cut = replace(RECIPE.inner, decay_steps=1, lr_floor=0.0, weight_decay=0.0)
    recipe = replace(RECIPE, inner=cut)
    one, four = train(trainer(recipe), steps=1), train(trainer(recipe), steps=4)
    np.testing.assert_array_equal(one.pseudo_gradient, four.pseudo_gradient)


def test_a_joiner_begins_gently_and_whoever_was_there_from_the_start_does_not() -> None:
    warm = replace(RECIPE, inner=replace(RECIPE.inner, weight_decay=0.0))
    assert np.abs(moved(warm, 60)).max() == pytest.approx(warm.inner.lr_at(60) / 10, rel=1e-3)
    assert np.abs(moved(warm, 0)).max() == pytest.approx(warm.inner.lr_at(0), rel=1e-3)


def test_a_joiner_warms_up_over_its_own_steps_across_rounds_and_only_once() -> None:
    # with betas zero every step of AdamW goes as far as the learning rate says
    inner = replace(RECIPE.inner, beta1=0.0, beta2=0.0, weight_decay=0.0, joiner_warmup_steps=4, lr_floor=1.0)
    it = trainer(replace(RECIPE, inner=inner))
    far = [np.abs(train(it, steps=1, global_step=20 + round_).pseudo_gradient).max() for round_ in range(6)]
    assert far == pytest.approx([inner.lr * share for share in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)], rel=1e-2)


def test_matrices_decay_and_vectors_do_not() -> None:
    def after(weight_decay: float) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        delta = moved(replace(RECIPE, inner=replace(RECIPE.inner, weight_decay=weight_decay)), 0)
        return LAYOUT.unflatten(delta)

    some, none, theta = after(0.5), after(0.0), LAYOUT.unflatten(THETA)
    for name, shape in LAYOUT.tensors:
        decay = RECIPE.inner.lr * 0.5 * theta[name] if len(shape) > 1 else np.zeros(shape)
        np.testing.assert_allclose(some[name] - none[name], decay, atol=1e-7)


def test_a_long_gradient_is_cut_before_it_gets_into_the_moments() -> None:
    # AdamW divides the length out, down to its epsilon of 1e-8: only a gradient cut shorter than that moves less
    def farthest(clip_norm: float) -> float:
        inner = replace(RECIPE.inner, clip_norm=clip_norm, weight_decay=0.0)
        return float(np.abs(moved(replace(RECIPE, inner=inner), 0)).max())

    assert farthest(1e6) == pytest.approx(RECIPE.inner.lr, rel=1e-3)
    assert farthest(1e-9) < 0.1 * RECIPE.inner.lr


def test_weights_that_are_not_finite_end_the_interval_and_do_not_spoil_the_next() -> None:
    it, broken = trainer(), THETA.copy()
    broken[LAYOUT.slots[0].start] = np.nan
    with pytest.raises(NonFinite, match=r"the loss at step 40 is nan"):
        train(it, broken, global_step=40)
    assert np.isfinite(train(it).pseudo_gradient).all()


def test_a_gradient_that_is_not_finite_does_not_reach_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    it = trainer()
    with monkeypatch.context() as patch:
        patch.setattr("dugnad.peer.trainer.loss_of", lambda model, _: _finite_with_infinite_slope(model))
        with pytest.raises(NonFinite, match="the gradient at step 0 is"):
            train(it)
    np.testing.assert_array_equal(train(it).pseudo_gradient, train(trainer()).pseudo_gradient)


def _finite_with_infinite_slope(model: torch.nn.Module) -> torch.Tensor:
    bias = model.get_parameter("norm.bias")
    return torch.sqrt((bias * 0).sum()) + bias.sum()


def test_evaluation_is_the_mean_over_all_validation_sequences_whatever_the_batch() -> None:
    sequences_BS = torch.from_numpy(BOOKS.validation_batch(10, context=CONTEXT))
    expected = loss_of(build(RECIPE.model), sequences_BS).item()
    for batch in (1, 4, 10, 64):  # 4 leaves a shorter batch at the end
        recipe = replace(RECIPE, inner=replace(RECIPE.inner, batch_sequences=batch))
        assert trainer(recipe).evaluate(THETA) == pytest.approx(expected, rel=1e-6)


def test_evaluation_between_rounds_gives_the_same_each_time_and_leaves_training_alone() -> None:
    it, alone = trainer(), trainer()
    assert it.evaluate(THETA) == it.evaluate(THETA)
    first = train(it).pseudo_gradient
    assert it.evaluate(THETA - first) != it.evaluate(THETA)
    np.testing.assert_array_equal(first, train(alone).pseudo_gradient)
    np.testing.assert_array_equal(train(it).pseudo_gradient, train(alone).pseudo_gradient)


def test_weights_of_another_layout_are_refused() -> None:
    with pytest.raises(LayoutError, match="vector is"):
        train(trainer(), THETA[:-64])
    with pytest.raises(LayoutError, match="vector is"):
        trainer().evaluate(THETA[:-64])


def test_eight_bits_without_a_gpu_is_an_error_that_says_what_to_do_but_evaluation_works() -> None:
    it = trainer(replace(RECIPE, inner=replace(RECIPE.inner, optimizer="adamw8bit")))
    assert math.isfinite(it.evaluate(THETA))
    with pytest.raises(OptimizerError, match=r'"adamw8bit" needs an NVIDIA GPU, this is cpu.*"adamw"'):
        train(it)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_on_a_gpu_it_learns_as_on_a_cpu(optimizer: Literal["adamw", "adamw8bit"]) -> None:
    steps, samples = 60, [(0, 60 * BATCH)]
    here = train(trainer(), ranges=samples, steps=steps)
    recipe = replace(RECIPE, inner=replace(RECIPE.inner, optimizer=optimizer))
    there = train(Trainer(recipe, build(recipe.model), BOOKS, device="cuda"), ranges=samples, steps=steps)
    apart = np.linalg.norm(there.pseudo_gradient - here.pseudo_gradient) / np.linalg.norm(here.pseudo_gradient)
    assert apart < (0.02 if optimizer == "adamw" else 0.3), "8-bit moments, and sums in another order: no more"
    assert math.isclose(there.loss, here.loss, rel_tol=0.01)
