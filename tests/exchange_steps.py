"""Steps that any exchange must get through, and what must be in every rank's caches after them."""

from collections.abc import Callable, Sequence

import torch

from twofold.kv.cache import KVCache
from twofold.parallel.exchange import Exchange, ExchangePlan

NUM_SLOTS, BLOCK_SIZE = 4096, 16
WIDTHS = [1024, 512, 1024, 1024, 512]  # of the rows of each layer: two stacks; an odd number of layers
STEPS = [  # entries of each rank; whether those of all layers travel together
    (1, False), (100, False), (3, True), (512, False), (3, False), (16, True), (800, False), (1, True), (400, True),
    (64, True),
]  # fmt: skip
NUMS_OF_ROWS = [num_rows for num_rows, _ in STEPS]
MAX_NUM_ROWS = 1500  # of the widest that a buffer has room for; the longest steps, or one of their stacks, have more


def slots_of(step: int, num_rows: int) -> torch.Tensor:
    """Where the rows of all ranks go; the last is padding."""
    everyone = torch.Generator().manual_seed(step)
    slots = 1 + torch.randperm(NUM_SLOTS - 1, generator=everyone)[:num_rows]
    slots[-1] = 0
    return slots


def rows_of(step: int, rank: int, layer: int, num_rows: int) -> torch.Tensor:
    mine = torch.Generator().manual_seed(1000 * step + 10 * rank + layer)
    return torch.randn(num_rows, WIDTHS[layer], generator=mine).bfloat16()


def make_cache(device: torch.device) -> KVCache:
    return KVCache(WIDTHS, NUM_SLOTS // BLOCK_SIZE, BLOCK_SIZE, torch.bfloat16, device)


def take_steps(
    exchange: Exchange, rank: int, size: int, device: torch.device, lag: Callable[[], None]
) -> list[torch.Tensor]:
    """One rank's part of all steps; `lag` makes it slow. → its caches."""
    cache = make_cache(device)
    for step, (num_rows, defer_exchange) in enumerate(STEPS):
        exchange.begin(ExchangePlan(slots_of(step, size * num_rows).to(device), defer_exchange))
        for layer, slots in enumerate(cache.slots):
            exchange.publish(rows_of(step, rank, layer, num_rows).to(device), slots)
            if rank == step % size:  # ranks are not equally fast
                lag()
            exchange.complete()
        exchange.end(cache.stacks)
    return [slots.cpu() for slots in cache.slots]


def expected_caches(size: int, nums_of_rows: Sequence[int]) -> list[torch.Tensor]:
    """What steps of so many rows on each rank must leave, whichever way they travel."""
    caches = [torch.zeros(NUM_SLOTS, width, dtype=torch.bfloat16) for width in WIDTHS]
    for step, num_rows in enumerate(nums_of_rows):
        slots = slots_of(step, size * num_rows)
        for layer, cache in enumerate(caches):
            cache[slots] = torch.cat([rows_of(step, rank, layer, num_rows) for rank in range(size)])
    return caches


def assert_equal(caches: list[torch.Tensor], expected: list[torch.Tensor], whose: object) -> None:
    """The same bytes in every slot but those of the null block, which padding of all ranks is written to."""
    for layer, (cache, right) in enumerate(zip(caches, expected, strict=True)):
        assert torch.equal(cache[1:].view(torch.int16), right[1:].view(torch.int16)), (whose, layer)
