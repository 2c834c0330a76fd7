"""Multiply few rows by weights: one kernel reads each weight once, and weights that share their input share a launch.

    torch.ops.twofold.few_row_linear(x, [q, kv])   ->   [x @ q^T, x @ kv^T]

Such products take as long as their weights take to read. Libraries cut the inputs of a small product in parts, to fill
the GPU, and add the parts up with a second kernel. Here the programs are small instead, and each adds up its own. More
rows than `MAX_ROWS` go to the library.
"""

from dataclasses import dataclass
from typing import Any

import torch

MAX_ROWS = 32
MAX_WEIGHTS = 3  # of a launch
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How one program works; `block_n` of a weight's rows are its own."""

    block_n: int
    block_k: int  # inputs at once
    num_warps: int
    num_stages: int = 1  # blocks of a weight on their way at once, through shared memory; 1: through registers
    by_dot: bool = False  # on tensor cores, as 16 rows or more; else multiplied and added one by one


# (most rows of x, most outputs in all, how; None is the library): the first that fits, by
# `benchmarks/few_row_linear.py`.
TUNINGS = (
    (1, None, Tuning(block_n=2, block_k=2048, num_warps=8)),
    (2, None, Tuning(block_n=2, block_k=1024, num_warps=4)),
    (MAX_ROWS, 8192, Tuning(block_n=32, block_k=256, num_warps=4, num_stages=4, by_dot=True)),
    (MAX_ROWS, None, None),
)


def choose(num_rows: int, num_outputs: int) -> Tuning | None:
    return next(
        tuning
        for max_rows, max_outputs, tuning in TUNINGS
        if num_rows <= max_rows and (max_outputs is None or num_outputs <= max_outputs)
    )


def multiply(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """x [T, K], weights [N, K] each → [T, N] each."""
    return [torch.mm(x, weight.t()) for weight in weights]


def is_served(x: torch.Tensor, weights: list[torch.Tensor]) -> bool:
    """By our kernel."""
    fits = 0 < len(x) <= MAX_ROWS and x.dtype in DTYPES and len(weights) <= MAX_WEIGHTS
    return fits and all(weight.stride(1) == 1 for weight in weights)


def _few_row_linear(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """As `multiply`. A weight's rows may lie any distance apart."""
    tuning = choose(len(x), sum(map(len, weights))) if is_served(x, weights) else None
    if tuning is None:
        return multiply(x, weights)
    from twofold.models.transforms.few_row_kernels import launch  # Triton is on GPU machines only

    return launch(x, weights, tuning)


_library = torch.library.Library("twofold", "FRAGMENT")
_library.define("few_row_linear(Tensor x, Tensor[] weights) -> Tensor[]")
_library.impl("few_row_linear", _few_row_linear, "CUDA")
_library.impl("few_row_linear", multiply, "CPU")


def _fake(x: torch.Tensor, weights: list[torch.Tensor]) -> list[Any]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


torch.library.register_fake("twofold::few_row_linear", _fake, lib=_library)
