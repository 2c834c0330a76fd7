"""Steps that any exchange must get through, and what must be in every rank's caches after them."""

from collections.abc import Callable, Sequence

import torch

from twofold.kv.cache import KVCache
from twofold.parallel.exchange import Exchange, ExchangePlan

NUM_SLOTS, BLOCK_SIZE = 4096, 16
WIDTHS = [1024, 512, 1024, 1024, 512]  # of each layer's KV entries: two stacks; an odd number of layers
STEPS = [  # entries of each rank; whether those of all layers travel together
    (1, False), (100, False), (3, True), (512, False), (3, False), (16, True), (800, False), (1, True), (400, True),
    (64, True),
]  # fmt: skip
NUMS_OF_ENTRIES = [num_entries for num_entries, _ in STEPS]
MAX_NUM_ENTRIES = 1500  # of the widest that a buffer has room for; the longest steps, or one of their stacks, have more


def slots_of(step: int, num_entries: int) -> torch.Tensor:
    """Slots of all ranks' entries; the last is padding."""
    everyone = torch.Generator().manual_seed(step)
    slots = 1 + torch.randperm(NUM_SLOTS - 1, generator=everyone)[:num_entries]
    slots[-1] = 0
    return slots


def entries_of(step: int, rank: int, layer: int, num_entries: int) -> torch.Tensor:
    mine = torch.Generator().manual_seed(1000 * step + 10 * rank + layer)
    return torch.randn(num_entries, WIDTHS[layer], generator=mine).bfloat16()


def make_cache(device: torch.device) -> KVCache:
    return KVCache(WIDTHS, NUM_SLOTS // BLOCK_SIZE, BLOCK_SIZE, torch.bfloat16, device)


def take_steps(
    exchange: Exchange, rank: int, size: int, device: torch.device, lag: Callable[[], None]
) -> list[torch.Tensor]:
    """One rank's part of all steps; `lag` makes it slow. → its caches."""
    cache = make_cache(device)
    for step, (num_entries, defer_exchange) in enumerate(STEPS):
        exchange.begin(ExchangePlan(slots_of(step, size * num_entries).to(device), defer_exchange, False))
        for layer, slots in enumerate(cache.slots):
            exchange.publish(entries_of(step, rank, layer, num_entries).to(device), slots)
            if rank == step % size:  # ranks are not equally fast
                lag()
            exchange.complete()
        exchange.end(cache.stacks)
    return [slots.cpu() for slots in cache.slots]


def expected_caches(size: int, nums_of_entries: Sequence[int]) -> list[torch.Tensor]:
    """The caches after steps of so many entries on each rank, with any transport."""
    caches = [torch.zeros(NUM_SLOTS, width, dtype=torch.bfloat16) for width in WIDTHS]
    for step, num_entries in enumerate(nums_of_entries):
        slots = slots_of(step, size * num_entries)
        for layer, cache in enumerate(caches):
            cache[slots] = torch.cat([entries_of(step, rank, layer, num_entries) for rank in range(size)])
    return caches


def assert_equal(caches: list[torch.Tensor], expected: list[torch.Tensor], what: object) -> None:
    """Compares the bytes of all slots but slot 0, which the padding of all ranks is written to."""
    for layer, (cache, right) in enumerate(zip(caches, expected, strict=True)):
        assert torch.equal(cache[1:].view(torch.int16), right[1:].view(torch.int16)), (what, layer)
