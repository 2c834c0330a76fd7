"""The sampler against Transformers' logits processors, against its own distribution, and against batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from twofold.sampling_params import SamplingParams
from twofold.worker.sampler import SamplingBatch, compute_logprobs, gumbel, row_keys, sample

torch.set_num_threads(1)


def build(
    params: Sequence[SamplingParams],
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    forbidden: Sequence[tuple[int, ...]] | None = None,
) -> SamplingBatch:
    size = len(params)
    as_arrays = [[np.array(ids, np.int32) for ids in rows or [()] * size] for rows in (prompts, outputs)]
    return SamplingBatch.build(
        params, seeds or range(size), positions or [0] * size, *as_arrays, forbidden or [()] * size
    )


def frequencies(logits: torch.Tensor, params: SamplingParams, num_draws: int = 20_000, **rows: Any) -> np.ndarray:
    """Shares [V] of the tokens that `num_draws` seeds draw from `logits` [V]."""
    batch = build([params] * num_draws, **{name: [value] * num_draws for name, value in rows.items()})
    token_ids, _ = sample(logits.expand(num_draws, -1), batch)
    return np.bincount(token_ids.numpy(), minlength=len(logits)) / num_draws


def assert_drawn_from(shares: np.ndarray, expected: np.ndarray, num_draws: int = 20_000) -> None:
    """Nothing outside the support, and chi-square within 6 standard deviations of its mean."""
    support = expected > 0
    assert shares[~support].sum() == 0
    freedom = support.sum() - 1
    chi_square = (num_draws * (shares - expected)[support] ** 2 / expected[support]).sum()
    assert chi_square < freedom + 6 * np.sqrt(2 * freedom) + 1e-9


WARPED: list[tuple[dict[str, float], list[Any]]] = [
    ({}, []),
    ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    ({"top_k": 7}, [TopKLogitsWarper(7)]),
    ({"top_k": 1000}, []),
    ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    ({"top_p": 1e-9}, [TopKLogitsWarper(1)]),
    ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    (
        {"temperature": 1.7, "min_p": 0.02, "top_k": 20, "top_p": 0.8},
        [TemperatureLogitsWarper(1.7), MinPLogitsWarper(0.02), TopKLogitsWarper(20), TopPLogitsWarper(0.8)],
    ),
]


@pytest.mark.parametrize(("values", "warpers"), WARPED, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_the_distribution_is_that_of_transformers(values: dict[str, Any], warpers: list[Any]) -> None:
    """Guards the meaning and the order of the filters, by an independent implementation."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    expected = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits[None].clone()).softmax(-1)[0]
    assert_drawn_from(frequencies(logits, SamplingParams(**values)), expected.double().numpy())


def test_repetition_penalty_is_that_of_transformers() -> None:
    """Guards the penalty's two signs and its reach over prompt and output."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(2)) * 2
    prompt, output = [1, 2, 3, 3, 500_000], [4, 4, 29]
    seen = torch.tensor([[1, 2, 3, 3, 4, 4, 29]])
    expected = RepetitionPenaltyLogitsProcessor(1.8)(seen, logits[None].clone()).softmax(-1)[0].double().numpy()
    params = SamplingParams(repetition_penalty=1.8)
    assert_drawn_from(frequencies(logits, params, 4000, prompts=prompt, outputs=output), expected, 4000)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    """Guards the two penalties' formula, which the prompt must not enter."""
    logits = torch.zeros(4)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25)
    expected = torch.tensor([0.0, -0.5 + 0.25 * 3, -0.5 + 0.25, 0.0]).softmax(-1).double().numpy()
    shares = frequencies(logits, params, 4000, prompts=[3, 3, 0], outputs=[1, 2, 1, 1])
    assert_drawn_from(shares, expected, 4000)


def test_penalties_turn_greedy_rows_and_no_others() -> None:
    """Guards greedy rows with penalties in a batch with a row without; the caller's logits stay as they were."""
    logits = torch.tensor([[3.0, 2.0, 1.0]]).repeat(3, 1)
    before = logits.clone()
    penalised = SamplingParams(temperature=0, frequency_penalty=0.6)
    batch = build([penalised, SamplingParams(temperature=0), penalised], outputs=[[0, 0], [0, 0], []])
    assert sample(logits, batch)[0].tolist() == [1, 0, 0]
    assert torch.equal(logits, before)


def test_forbidden_tokens_are_never_drawn() -> None:
    """Guards min_tokens: neither greedy nor random rows may end early. An id outside the vocabulary has no effect."""
    logits = torch.tensor([9.0, 1.0, 0.0])
    greedy = build([SamplingParams(temperature=0)] * 2, forbidden=[(0, 2**31 - 1), ()])
    assert sample(logits.expand(2, -1), greedy)[0].tolist() == [1, 0]
    expected = torch.tensor([-torch.inf, 1.0, 0.0]).softmax(-1).double().numpy()
    assert_drawn_from(frequencies(logits, SamplingParams(), 4000, forbidden=(0,)), expected, 4000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_equal_tokens(dtype: torch.dtype) -> None:
    """Guards ranks that must agree where bfloat16 makes logits equal."""
    logits = torch.zeros(2, 1000, dtype=dtype)
    logits[1, 700:] = 1
    params = [SamplingParams(temperature=0, top_k=5, top_p=0.5)] * 2
    assert sample(logits, build(params))[0].tolist() == [0, 700]


@pytest.mark.parametrize("other", [3, 999])
def test_equal_tokens_are_cut_from_the_highest_id(other: int) -> None:
    """Guards top-k with equal logits, also -0 and 0. Its fast way (all rows cut short) must equal the slow one."""
    logits = torch.zeros(64)
    logits[::2] = -0.0
    logits[40:] = -1
    rows, seeds = logits.expand(400, -1), [i // 2 for i in range(400)]
    drawn, _ = sample(rows, build([SamplingParams(top_k=3), SamplingParams(top_k=other)] * 200, seeds))
    assert set(drawn[::2].tolist()) == {0, 1, 2}
    assert torch.equal(drawn[::2], sample(rows[:200], build([SamplingParams(top_k=3)] * 200))[0])


def varied_params(size: int) -> list[SamplingParams]:
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.05, repetition_penalty=1.3),
        SamplingParams(temperature=1.3, presence_penalty=1.0, logprobs=2),
    ]
    return [kinds[i % len(kinds)] for i in range(size)]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_token_does_not_depend_on_its_batch(order: list[int], size: int) -> None:
    """Guards invariant 7: other rows of the batch, in any order, do not change a row's token."""
    logits = torch.randn(12, 200, generator=torch.Generator().manual_seed(3))
    params = varied_params(12)
    history = [[i, i + 1, i] for i in range(12)]

    def run(rows: list[int]) -> list[int]:
        batch = build(
            [params[i] for i in rows],
            seeds=[i * 7 for i in rows],
            positions=[i + 100 for i in rows],
            prompts=[history[i] for i in rows],
            outputs=[history[i] for i in rows],
        )
        return sample(logits[rows], batch)[0].tolist()

    chosen = order[:size]
    assert run(chosen) == [run([i])[0] for i in chosen]


def test_a_token_depends_on_seed_and_position_alone() -> None:
    """Guards the key: equal keys draw equally, and a change of seed or position draws afresh."""
    logits = torch.zeros(1, 1000)

    def draw(seed: int, position: int) -> int:
        return int(sample(logits, build([SamplingParams()], [seed], [position]))[0])

    assert draw(5, 9) == draw(5, 9)
    assert len({draw(5, position) for position in range(40)}) > 35
    assert len({draw(seed, 9) for seed in range(40)}) > 35
    assert draw(-1, 0) == draw(2**64 - 1, 0)


@pytest.mark.parametrize("inner", ["position", "token"])
def test_randomness_is_uniform_and_independent(inner: str) -> None:
    """Guards both hashes: even spread, no correlation between neighbouring seeds and positions, or seeds and tokens."""
    if inner == "position":
        seeds, positions = (grid.ravel() for grid in np.meshgrid(np.arange(500, dtype=np.uint64), np.arange(400)))
        u = (row_keys(seeds, positions.astype(np.int64)) >> np.uint64(11)) * 2.0**-53
    else:
        noise = gumbel(row_keys(np.arange(400, dtype=np.uint64), np.zeros(400, np.int64)), torch.arange(500))
        u = np.exp(-np.exp(-noise.double().numpy())).ravel()
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, 256, (0, 1))[0]
    chi_square = ((counts - u.size / 256) ** 2 / (u.size / 256)).sum()
    assert abs(chi_square - 255) < 6 * np.sqrt(2 * 255)
    grid = u.reshape(400, 500)  # [position, seed]
    for one, other in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, 1:], grid[:-1, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 6 / np.sqrt(one.size)
        pairs = np.histogram2d(one.ravel(), other.ravel(), 16, ((0, 1), (0, 1)))[0]
        chi_square = ((pairs - one.size / 256) ** 2 / (one.size / 256)).sum()
        assert abs(chi_square - 255) < 6 * np.sqrt(2 * 255)
    assert len(np.unique(u)) > 0.9 * u.size


def test_rounding_hardly_ever_changes_a_draw() -> None:
    """Guards recovery, preemption and batching with a seed: logits that differ by rounding draw the same token."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(500, 5000, generator=generator) * 3
    other = logits + torch.randn(logits.shape, generator=generator) * 1e-5
    for params in (SamplingParams(), SamplingParams(top_p=0.95)):
        batch = build([params] * 500)
        assert (sample(logits, batch)[0] != sample(other, batch)[0]).sum() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    """Guards log-probabilities and ranks by log_softmax and a stable sort, untouched by temperature and penalties."""
    logits = (torch.randn(4, 300, generator=torch.Generator().manual_seed(4)) * 3).to(dtype)
    params = SamplingParams(temperature=2, logprobs=5, frequency_penalty=2)
    token_ids, tensors = sample(logits, build([params, *[SamplingParams()] * 3], outputs=[[1, 2]] * 4))
    assert tensors is not None
    logprobs = tensors.to_numpy()
    expected = logits.float().log_softmax(-1)
    order = expected.sort(dim=-1, descending=True, stable=True).indices
    assert logprobs.token_ids.shape == (4, 6)
    assert (logprobs.token_ids.dtype, logprobs.ranks.dtype) == (np.int32, np.int32)
    assert logprobs.token_ids[:, 0].tolist() == token_ids.tolist()
    assert logprobs.token_ids[:, 1:].tolist() == order[:, :5].tolist()
    np.testing.assert_allclose(
        logprobs.logprobs, expected.gather(-1, torch.from_numpy(logprobs.token_ids).long()), rtol=1e-5, atol=1e-5
    )
    assert logprobs.ranks.tolist() == [order[i].tolist().index(t) + 1 for i, t in enumerate(token_ids.tolist())]


def test_logprobs_with_nothing_to_rank() -> None:
    """Guards K = 0, K beyond the vocabulary, and no rows."""
    logits = torch.tensor([[0.0, 1.0]])
    assert compute_logprobs(logits, torch.tensor([0]), 0).to_numpy().ranks.tolist() == [2]
    assert compute_logprobs(logits, torch.tensor([0]), 20).token_ids.tolist() == [[0, 1, 0]]
    assert compute_logprobs(logits[:0], torch.tensor([], dtype=torch.int64), 3).logprobs.shape == (0, 3)


def test_no_rows() -> None:
    """Guards a rank that owns no sampled row: it samples like any other."""
    token_ids, logprobs = sample(torch.empty(0, 10), build([]))
    assert token_ids.shape == (0,)
    assert token_ids.dtype == torch.int64
    assert logprobs is None


def test_a_greedy_batch_only_takes_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the common case's cost: no copy, no sort, no probabilities."""
    logits = torch.randn(3, 50)
    for name in ("float", "sort", "topk", "exp", "softmax", "clone", "to"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("more than argmax"))
    token_ids, _ = sample(logits, build([SamplingParams(temperature=0)] * 3))
    monkeypatch.undo()
    assert torch.equal(token_ids, logits.argmax(-1))


@pytest.mark.parametrize("broken", [torch.nan, -torch.inf, torch.inf])
def test_broken_logits_still_give_a_token(broken: float) -> None:
    """Guards the vocabulary's bounds: NaN logits must not become an id that the next step's lookup trips over.

    With min-p and top-p together, a row without a most likely token kept none, and the index of the last kept one was
    -1. That was an error in the rank, not a bad token in one answer.
    """
    logits = torch.full((5, 20), broken)
    filters = [{}, {"top_k": 4, "top_p": 0.5}, {"min_p": 0.1, "top_p": 0.5}, {"min_p": 0.1, "top_k": 4, "top_p": 0.5}]
    params = [SamplingParams(temperature=0), *(SamplingParams(**values) for values in filters)]
    for rows in (slice(0, 5), slice(3, 4), slice(4, 5)):
        token_ids, _ = sample(logits[rows], build(params[rows]))
        assert ((token_ids >= 0) & (token_ids < 20)).all()
