"""What a volunteer does alone between two exchanges: some steps of AdamW, from the shared weights."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from time import perf_counter

import torch
from torch import Tensor, nn

from dugnad.configs.recipe import InnerSettings, Recipe
from dugnad.optim.diloco import load_weights, pseudo_gradient
from dugnad.optim.layout import Layout, Vector
from dugnad.peer.data import Corpus
from dugnad.peer.models import LanguageModel, loss_of, tensor_shapes


class NonFinite(Exception):
    """The training broke down: a loss or a gradient that is NaN or infinite; the message says at which step."""


class OptimizerError(Exception):
    """The recipe's inner optimizer does not run on this machine; the message says what to do."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step, as it is reported."""

    loss: float
    """Mean over the batch, nats per byte."""
    tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Interval:
    """What one training came to; the first `samples` indices of the ranges it was given are done."""

    pseudo_gradient: Vector
    """theta - theta_i, float32 (total_elements,); zero where no step was done."""
    steps: int
    samples: int
    tokens: int
    loss: float
    """Mean over the steps, nats per byte; NaN where no step was done."""
    compute_s: float
    """Seconds in the steps themselves."""


class Trainer:
    """Trains `model` on `corpus` as `recipe` says, on one torch device; for one thread at a time.

    Weights come and go with every call. AdamW's moments stay here, from one round to the next.
    """

    def __init__(self, recipe: Recipe, model: LanguageModel, corpus: Corpus, *, device: str = "cpu") -> None:
        self._recipe = recipe
        self._corpus = corpus
        self._device = torch.device(device)
        self._model = model.to(self._device)
        self._layout = Layout(tensor_shapes(recipe.model), recipe.codec.block_elements, recipe.codec.part_elements)
        self._own_steps = 0
        self._joined_at: int | None = None
        """Global step of the first training here."""

    def train(
        self,
        theta: Vector,
        *,
        ranges: Iterable[tuple[int, int]],
        steps: int,
        global_step: int,
        stop: Callable[[], bool],
        on_step: Callable[[StepResult], None],
    ) -> Interval:
        """Train for `steps` from `theta`, float32 (total_elements,), and return how far that went.

        ranges: half-open ranges of sample indices, used up in order, whole batches only; there are fewer steps if they
        end sooner, or once `stop()`, asked before each step, is true. global_step: number of the first step in the run.
        on_step: called after each step, in this thread. Raises NonFinite, OptimizerError, LayoutError, CorpusError.
        """
        if self._joined_at is None:
            self._joined_at = global_step
        load_weights(self._model, self._layout, theta)
        self._model.train()
        batch, context = self._recipe.inner.batch_sequences, self._recipe.model.context
        indices = chain.from_iterable(range(start, end) for start, end in ranges)
        losses: list[float] = []
        compute_s = 0.0
        while len(losses) < steps and not stop():
            samples = list(islice(indices, batch))
            if len(samples) < batch:
                break
            started = perf_counter()
            losses.append(self._step(samples, global_step + len(losses)))
            took_s = perf_counter() - started
            compute_s += took_s
            on_step(StepResult(losses[-1], batch * context, batch * context / took_s))
        delta = pseudo_gradient(theta, self._model, self._layout)
        loss = math.fsum(losses) / len(losses) if losses else math.nan
        done = len(losses) * batch
        return Interval(delta, len(losses), done, done * context, loss, compute_s)

    def evaluate(self, theta: Vector) -> float:
        """Return the mean loss, nats per byte, of `theta` on the recipe's validation sequences. Raises LayoutError."""
        load_weights(self._model, self._layout, theta)
        self._model.eval()
        context = self._recipe.model.context
        sequences_BS = torch.from_numpy(
            self._corpus.validation_batch(self._recipe.evaluation.sequences, context=context)
        )
        with torch.no_grad():
            losses = [
                loss_of(self._model, piece.to(self._device)).item() * len(piece)
                for piece in torch.split(sequences_BS, self._recipe.inner.batch_sequences)
            ]
        return math.fsum(losses) / len(sequences_BS)

    def _step(self, samples: Sequence[int], global_step: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr_at(global_step)
        self._optimizer.zero_grad(set_to_none=True)
        sequences_BS = torch.from_numpy(self._corpus.batch(samples, context=self._recipe.model.context))
        loss = loss_of(self._model, sequences_BS.to(self._device))
        value = _finite(loss, "loss", global_step)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._recipe.inner.clip_norm)
        # before the step: one NaN in AdamW's moments would stay there for all rounds to come
        _finite(norm, "gradient", global_step)
        self._optimizer.step()
        self._own_steps += 1
        return value

    def _lr_at(self, global_step: int) -> float:
        """The learning rate of everyone, less for the first steps of one who came into a run under way."""
        inner = self._recipe.inner
        lr = inner.lr_at(global_step)
        if self._joined_at and self._own_steps < inner.joiner_warmup_steps:
            lr *= (self._own_steps + 1) / inner.joiner_warmup_steps
        return lr

    @functools.cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        # made when it is first needed: who only evaluates needs no memory for moments, and no GPU for 8 bits
        return make_optimizer(self._recipe.inner, self._model, self._device)


def make_optimizer(inner: InnerSettings, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's inner optimizer; matrices decay, the rest does not. Raises OptimizerError where it can't run."""
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": inner.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (inner.beta1, inner.beta2)
    if inner.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=inner.lr, betas=betas, fused=True)
    advice = 'Run it where there is one, or take a recipe with inner.optimizer = "adamw".'
    if device.type != "cuda":
        raise OptimizerError(f'inner.optimizer = "adamw8bit" needs an NVIDIA GPU, this is {device.type}. {advice}')
    try:
        import bitsandbytes  # here: seconds to import, and nobody else needs it
    except ImportError as error:
        raise OptimizerError(f'inner.optimizer = "adamw8bit" needs the package bitsandbytes: {error}.') from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=inner.lr, betas=betas)
    return optimizer


def _finite(value: Tensor, what: str, global_step: int) -> float:
    number = value.item()
    if not math.isfinite(number):
        raise NonFinite(f"the {what} at step {global_step} is {number}; this interval is lost, the next starts afresh")
    return number
