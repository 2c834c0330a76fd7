"""Sums over ranks: every rank has a partial result, and every rank gets the sum of all, the same bits on each.

    x of rank 0 [..., W] ──┐
    x of rank 1 [..., W] ──┴─► sum [..., W] on every rank

A model calls the opaque op `torch.ops.twofold.sum_over_ranks`; `summing` says which `Sum` it uses. A sum that one rank
makes in another order than the others would let ranks disagree about a token.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from twofold.parallel.mesh import Mesh


class Sum(Protocol):
    """One way to add up what ranks have. All ranks call it in the same order with the same shapes."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., W] of this rank, contiguous or not → a new tensor [..., W], the sum over all ranks."""


class OneRank:
    """For one rank, whose part is the sum."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class GatherSum:
    """An all-gather, then a sum in float32 in the order of ranks, rounded once: the reference for every other one."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty(self.mesh.size, x.numel())
        self.mesh.all_gather(gathered.flatten(), x.flatten())
        return add_in_order(gathered.unbind()).view(x.shape)


def add_in_order(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum of one part a rank, at least two; in float32, rounded once to the parts' type."""
    if len(parts) == 2:
        return parts[0] + parts[1]  # kernels add in float32 and round their result
    total = parts[0].float() + parts[1]
    for part in parts[2:]:
        total += part
    return total.to(parts[0].dtype)


def make_sum(mesh: Mesh, device: torch.device, max_num_bytes: int, file: int) -> Sum:
    """The fastest sum for these ranks.

    `max_num_bytes` of a rank's x have room in memory that ranks share; larger ones go through a collective. `file` is a
    new file that all ranks have a descriptor of.
    """
    return OneRank() if mesh.size == 1 else GatherSum(mesh)


_current = threading.local()


@contextmanager
def summing(sum: Sum | None) -> Iterator[None]:
    """Makes `sum` the one that a model's modules use, in this thread. By tokens there is none."""
    _current.sum = sum
    try:
        yield
    finally:
        del _current.sum


def _sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """x [..., W] of this rank → the sum over all ranks [..., W]."""
    result: torch.Tensor = _current.sum(x)
    return result


_library = torch.library.Library("twofold", "FRAGMENT")
_library.define("sum_over_ranks(Tensor x) -> Tensor")
_library.impl("sum_over_ranks", _sum_over_ranks, "CompositeExplicitAutograd")
torch.library.register_fake("twofold::sum_over_ranks", lambda x: x.new_empty(x.shape), lib=_library)
