"""Speed and error of the int8 codec against the alternatives, in the same run: python tests/bench/bench_codec.py

Ratios are of medians over interleaved repetitions; absolute times of a shared machine mean little.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from numpy.typing import NDArray

from dugnad.optim.codec import Int8Codec

BLOCK = 1024


def torch_ops(x: torch.Tensor) -> torch.Tensor:
    """The same codec in torch operations, on the whole tensor."""
    blocks = x.view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    return ((blocks / scale).round().clamp(-127, 127).to(torch.int8) * scale).view(-1)


def main() -> None:
    """Print one line per way of coding, with its ratio to ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=2**24)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = np.random.default_rng(0).standard_normal(options.elements, dtype=np.float32)
    tensor = torch.from_numpy(x)
    ours = Int8Codec(BLOCK)

    def bitsandbytes_blockwise() -> np.ndarray:
        codes, state = quantize_blockwise(tensor, blocksize=BLOCK)
        decoded: NDArray[np.float32] = dequantize_blockwise(codes, state).numpy()
        return decoded

    ways: dict[str, Callable[[], np.ndarray]] = {
        "dugnad int8": lambda: ours.decode(ours.encode(x), x.size),
        "torch ops": lambda: torch_ops(tensor).numpy(),
        "bitsandbytes blockwise": bitsandbytes_blockwise,
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    error: dict[str, float] = {}
    for turn in range(options.repeat + 1):
        for name, code in ways.items():
            since = time.perf_counter()
            decoded = code()
            if turn:  # the first turn compiles and warms up
                took[name].append(time.perf_counter() - since)
            error[name] = float(np.linalg.norm(decoded - x) / np.linalg.norm(x))
    base = statistics.median(took["dugnad int8"])
    print(
        f"encode and decode {options.elements / 1e6:.0f}M float32, one thread, {options.repeat} interleaved repetitions"
    )
    for name, seconds in took.items():
        median, spread = statistics.median(seconds), max(seconds) - min(seconds)
        print(
            f"{name:<24} {median / base:6.2f} x the time of ours   {4e-9 * options.elements / median:5.2f} GB/s"
            f" (spread {100 * spread / median:.0f} %)   relative error {100 * error[name]:.2f} %"
        )


if __name__ == "__main__":
    main()
