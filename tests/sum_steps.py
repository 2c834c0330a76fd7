"""Sums that any way must get right, and what they must be."""

import random
from collections.abc import Callable

import torch

from twofold.parallel.sums import Sum, summing

WIDTH = 64
MAX_NUM_ROWS = 96  # that a buffer has room for, in float32
NUM_SUMS = 400
ROWS = [1, 3, 1, 32, 2, MAX_NUM_ROWS, 200, 1, 7]  # of one sum after the other
DTYPES = [torch.float32, torch.bfloat16]


def part_of(number: int, rank: int) -> torch.Tensor:
    """A rank's x [rows, WIDTH] of sum `number`; every third one is not contiguous."""
    mine = torch.Generator().manual_seed(1000 * number + rank)
    rows, dtype = ROWS[number % len(ROWS)], DTYPES[number // len(ROWS) % 2]
    if number % 3 == 0:
        return torch.randn(WIDTH, rows, generator=mine).to(dtype).t()
    return torch.randn(rows, WIDTH, generator=mine).to(dtype)


def expected_sum(number: int, size: int) -> torch.Tensor:
    """In float32, in the order of ranks, rounded once."""
    total = part_of(number, 0).float()
    for rank in range(1, size):
        total = total + part_of(number, rank).float()
    return total.to(part_of(number, 0).dtype)


def take_sums(way: Sum, rank: int, device: torch.device, lag: Callable[[], None]) -> list[torch.Tensor]:
    """One rank's results of all sums; at random `lag` makes it slow. A result must stay what it is later."""
    lags, results = random.Random(rank), []
    with summing(way):
        for number in range(NUM_SUMS):
            if lags.random() < 0.2:
                lag()
            with torch.inference_mode(number // 50 % 2 == 0):
                results.append(torch.ops.twofold.sum_over_ranks(part_of(number, rank).to(device)))
    return [result.cpu() for result in results]


def assert_right(results: list[torch.Tensor], size: int, what: object) -> None:
    """Compares the bits of all sums."""
    for number, result in enumerate(results):
        expected = expected_sum(number, size)
        assert result.dtype == expected.dtype, (what, number)
        assert torch.equal(result, expected), (what, number)
