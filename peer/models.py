"""The networks that a recipe can name, and their first weights, which come out the same on every machine.

Axes in names: B sequences, T positions, S positions and one more, V byte values, C width, H heads, D width of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dugnad.configs.recipe import ModelSettings

NUM_BYTES = 256
"""Size of the vocabulary: every byte is a token."""

_SPREAD = 0.02  # standard deviation of the first weights, as in GPT-2
_DOMAIN = "dugnad/initial/1"
_UNIFORM_BITS = 24  # as many as float32 holds exactly


class LanguageModel(nn.Module):
    """A network from tokens_BT, integers below 256, to logits_BTV of each next byte; T is at most `context`."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context = context


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A tensor of a family, and its first values: `centre`, give or take a standard deviation of `spread`."""

    name: str
    shape: tuple[int, ...]
    centre: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class _Family:
    network: Callable[[ModelSettings], LanguageModel]
    parameters: Callable[[ModelSettings], list[_Parameter]]


def build(settings: ModelSettings) -> LanguageModel:
    """Return the network of `settings` on the CPU, with its first weights; torch's random state is not touched."""
    with torch.device("meta"):  # torch would draw random weights, only for them to be overwritten
        network = _FAMILIES[settings.family].network(settings)
    network.to_empty(device="cpu")
    weights = {name: torch.from_numpy(weight) for name, weight in initial_weights(settings).items()}
    network.load_state_dict(weights)
    return network


def tensor_shapes(settings: ModelSettings) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of each parameter of `settings`, allocating none; a tied one is listed once."""
    return [(parameter.name, parameter.shape) for parameter in _FAMILIES[settings.family].parameters(settings)]


def initial_weights(settings: ModelSettings) -> dict[str, NDArray[np.float32]]:
    """Return the first weights of `settings` by name, the same bits on every machine.

    Each tensor is drawn by Philox under a key of its own, from (seed, name). The distribution is uniform: it takes
    nothing but exact arithmetic, where a normal one would take a logarithm that differs between machines.
    """
    parameters = _FAMILIES[settings.family].parameters(settings)
    return {parameter.name: _first_values(settings.seed, parameter) for parameter in parameters}


def loss_of(model: LanguageModel, sequences_BS: Tensor) -> Tensor:
    """Return the mean loss, in nats per byte, of predicting each byte after the first of `sequences_BS`, integers."""
    sequences_BS = sequences_BS.long()
    logits_BTV: Tensor = model(sequences_BS[:, :-1])
    return functional.cross_entropy(logits_BTV.flatten(0, 1), sequences_BS[:, 1:].flatten())


def generate(model: LanguageModel, prompt: bytes, length: int, *, temperature: float, top_k: int, seed: int) -> bytes:
    """Return the `length` bytes that `model` writes after `prompt`, chosen among the `top_k` likeliest each time.

    A temperature of 0 always takes the likeliest byte. The same seed gives the same bytes, on the same kind of machine.
    Raises ValueError for a negative temperature or length, or a top_k below 1.
    """
    if not (temperature >= 0 and length >= 0 and top_k >= 1):
        raise ValueError(f"cannot write with temperature {temperature}, length {length} and top_k {top_k}")
    rng = np.random.Generator(np.random.Philox(seed))
    device = next(model.parameters()).device
    text = bytearray(prompt or b"\n")  # from nothing at all no network can go on
    given = len(text)
    model.eval()
    with torch.inference_mode():
        for _ in range(length):
            tokens_BT = torch.tensor([list(text[-model.context :])], device=device)
            logits_V = model(tokens_BT)[0, -1].double().cpu().numpy()
            text.append(_choose(logits_V, temperature, top_k, rng))
    return bytes(text[given:])


def _choose(logits_V: NDArray[np.float64], temperature: float, top_k: int, rng: np.random.Generator) -> int:
    likeliest_K = np.argsort(-logits_V, kind="stable")[:top_k]
    if temperature == 0:
        return int(likeliest_K[0])
    # relative to the likeliest before the division, so that no temperature overflows the exponential
    weights_K = np.exp((logits_V[likeliest_K] - logits_V[likeliest_K[0]]) / temperature)
    heights_K = np.cumsum(weights_K)
    return int(likeliest_K[np.searchsorted(heights_K, rng.random() * heights_K[-1], side="right")])


def _first_values(seed: int, parameter: _Parameter) -> NDArray[np.float32]:
    if parameter.spread == 0:
        return np.full(parameter.shape, parameter.centre, np.float32)
    key = blake3(f"{_DOMAIN}/{seed}/{parameter.name}".encode()).digest(length=16)
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(math.prod(parameter.shape))
    # odd integers between -2^24 and 2^24: symmetric around zero, and exact in float32
    odd = (raw >> np.uint64(64 - _UNIFORM_BITS)).astype(np.int64) * 2 + (1 - 2**_UNIFORM_BITS)
    step = np.float32(parameter.spread * math.sqrt(3) / 2**_UNIFORM_BITS)
    values: NDArray[np.float32] = odd.astype(np.float32) * step + np.float32(parameter.centre)
    return values.reshape(parameter.shape)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        qkv_BT3HD = self.qkv(x_BTC).unflatten(-1, (3, self.heads, -1))
        q_BHTD, k_BHTD, v_BHTD = qkv_BT3HD.permute(2, 0, 3, 1, 4).unbind()
        mixed_BHTD = functional.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        mixed_BTC: Tensor = self.out(mixed_BHTD.transpose(1, 2).flatten(2))
        return mixed_BTC


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC))
        x_BTC = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return x_BTC


class _ByteGpt(LanguageModel):
    """GPT-2 on bytes: pre-norm blocks, learned positions, one matrix for the way in and the way out."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings.context)
        self.embedding = nn.Embedding(NUM_BYTES, settings.width)
        self.positions = nn.Embedding(settings.context, settings.width)
        self.blocks = nn.Sequential(*(_Block(settings.width, settings.heads) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embedding(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        return functional.linear(self.norm(self.blocks(x_BTC)), self.embedding.weight)


def _byte_gpt_parameters(settings: ModelSettings) -> list[_Parameter]:
    width, context = settings.width, settings.context
    # what every block adds to the stream is scaled down, so that its size does not grow with the number of blocks
    added = _SPREAD / math.sqrt(2 * settings.layers)
    parameters = [
        _Parameter("embedding.weight", (NUM_BYTES, width), spread=_SPREAD),
        _Parameter("positions.weight", (context, width), spread=_SPREAD),
        *_norm_parameters("norm", width),
    ]
    for layer in range(settings.layers):
        parameters += [
            *_norm_parameters(f"blocks.{layer}.attention_norm", width),
            *_linear_parameters(f"blocks.{layer}.attention.qkv", width, 3 * width, _SPREAD),
            *_linear_parameters(f"blocks.{layer}.attention.out", width, width, added),
            *_norm_parameters(f"blocks.{layer}.mlp_norm", width),
            *_linear_parameters(f"blocks.{layer}.mlp.0", width, 4 * width, _SPREAD),
            *_linear_parameters(f"blocks.{layer}.mlp.2", 4 * width, width, added),
        ]
    return parameters


def _linear_parameters(name: str, inputs: int, outputs: int, spread: float) -> list[_Parameter]:
    return [_Parameter(f"{name}.weight", (outputs, inputs), spread=spread), _Parameter(f"{name}.bias", (outputs,))]


def _norm_parameters(name: str, width: int) -> list[_Parameter]:
    return [_Parameter(f"{name}.weight", (width,), centre=1.0), _Parameter(f"{name}.bias", (width,))]


_FAMILIES = {"byte-gpt": _Family(_ByteGpt, _byte_gpt_parameters)}
