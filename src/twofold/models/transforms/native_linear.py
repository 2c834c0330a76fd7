"""Products with weights on a CPU by our kernel: each weight is read once, from where all ranks share it.

PyTorch's product of few rows reaches half of the memory's speed there.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch.nn import Linear

from twofold.models.probe import largest_change
from twofold.models.transforms.base import Transform, sample_input
from twofold.native import kernels

DTYPES = (torch.float32, torch.bfloat16)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] → [..., N]. Our kernel where it serves, else PyTorch's product."""
    is_served = (
        kernels
        and x.is_cpu
        and x.dtype in DTYPES
        and x.dtype == weight.dtype
        and weight.stride(1) == 1
        and weight.shape[1] * x.itemsize % 4 == 0
        and x.numel() > 0
    )
    if not is_served:
        return F.linear(x, weight, bias)
    product: torch.Tensor = torch.ops.twofold_cpu.linear(x.contiguous(), weight, bias)
    return product


class NativeLinears(Transform):
    """Each Linear must give the same result."""

    name = "products by our kernel"

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def find(self) -> str | None:
        # Only what is a Linear and nothing more: a subclass may compute something else.
        self.linears = [module for module in self.model.modules() if type(module) is Linear and module.weight.is_cpu]
        if not self.linears:
            return "it has no Linear on a CPU"
        self._expected = self._products()
        return None

    def apply(self) -> None:
        for module in self.linears:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]

    def verify(self) -> float:
        return largest_change(self._products(), self._expected)

    def undo(self) -> None:
        for module in self.linears:
            module.__dict__.pop("forward", None)

    def _products(self) -> list[torch.Tensor]:
        return [module(sample_input(2, module.in_features, like=module.weight)) for module in self.linears]


def _forward(module: Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)
