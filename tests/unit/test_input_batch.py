"""The inputs that a rank prepares, where all ranks must prepare the same."""

import numpy as np
import pytest
import torch

from twofold import SamplingParams
from twofold.contract import NewRequest, ScheduledBatch, Step
from twofold.parallel.plan import TokenLayout, plan_step
from twofold.worker.input_batch import InputBatch, prepare
from twofold.worker.request_states import RequestStates

BLOCK_SIZE = 16


def prepare_all(num_ranks: int, *requests: tuple[int, int]) -> list[InputBatch]:
    """Every rank's part of a step of requests (computed, scheduled)."""
    states = RequestStates(8, 256, BLOCK_SIZE, torch.device("cpu"))
    new = tuple(
        NewRequest(i, i, np.arange(sum(one), dtype=np.int32), sum(one), list(range(16)), SamplingParams(), 0)
        for i, one in enumerate(requests)
    )
    batch = ScheduledBatch.of(*zip(*requests, strict=True))
    states.apply(Step(0, (), new, {}, batch))
    plan = plan_step(batch, TokenLayout(num_ranks))
    return [prepare(batch, plan, states, rank, BLOCK_SIZE) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("requests", "is_decode", "max_decode_len"),
    [
        ([(40, 1), (7, 1), (0, 1)], True, 41),
        ([(40, 1), (9, 3)], False, 41),
        ([(30, 1), (0, 100)], False, 31),
    ],
)
def test_a_step_is_the_same_on_all_ranks(
    num_ranks: int, requests: list[tuple[int, int]], is_decode: bool, max_decode_len: int
) -> None:
    for batch in prepare_all(num_ranks, *requests):
        assert batch.plan.is_decode == batch.exchange.defer_exchange == is_decode
        assert batch.plan.max_decode_len == max_decode_len


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_prompt_of_one_token_a_chunk_is_no_decode(num_ranks: int) -> None:
    """2·P tokens are 2·P rows of one token, which attend to each other across ranks. KV entries must travel in every
    layer, so no graph of decodes may be used: there they travel at the end.
    """
    for batch in prepare_all(num_ranks, (0, 2 * num_ranks)):
        assert (batch.plan.length == 1).all()
        assert not batch.plan.is_decode
        assert not batch.exchange.defer_exchange
