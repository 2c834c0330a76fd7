"""The sampler over a divided vocabulary: candidates of parts must give the tokens of all logits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twofold.sampling_params import SamplingParams
from twofold.worker.sampler import MAX_CANDIDATES, SamplingBatch, best_of_part, choose, needs_all_logits, sample

torch.set_num_threads(1)

GREEDY = SamplingParams(temperature=0)


def build(params: list[SamplingParams], seed: int = 0, **history: list[Any]) -> SamplingBatch:
    """A batch with `history` of prompts, outputs and forbidden ids; without, there are none."""
    size = len(params)
    prompts, outputs = (
        [np.array(ids, np.int32) for ids in history.get(name, [()] * size)] for name in ("prompts", "outputs")
    )
    forbidden = history.get("forbidden", [()] * size)
    masks = history.get("masks", [None] * size)  # row -> ids that may come
    words = [pack(ids) for ids in masks if ids is not None]
    mask_idx = np.array([i for i, ids in enumerate(masks) if ids is not None])
    row_mask = np.full(size, -1)
    row_mask[mask_idx.astype(int)] = np.arange(len(words))
    return SamplingBatch.build(
        params,
        range(seed, seed + size),
        range(7, 7 + size),
        prompts,
        outputs,
        forbidden,
        mask_idx=row_mask,
        masks=torch.from_numpy(np.stack(words)) if words else None,
    )


def pack(token_ids: Any) -> np.ndarray:
    """A mask of two words, 64 tokens."""
    mask = np.zeros(2, np.uint32)
    for i in token_ids:
        mask[i // 32] |= np.uint32(1 << i % 32)
    return mask.view(np.int32)


def sample_parts(logits: torch.Tensor, batch: SamplingBatch, num_ranks: int) -> torch.Tensor:
    """Tokens [S] as ranks choose them that have a part each of `logits` [S, V]."""
    part_size = math.ceil(logits.shape[-1] / num_ranks)
    parts = [best_of_part(part, rank * part_size, batch) for rank, part in enumerate(logits.split(part_size, dim=-1))]
    assert len(parts) == num_ranks
    return choose(torch.stack(parts), batch)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, SamplingBatch, int]:
    """Logits with many equal values, a batch that candidates suffice for, and a number of ranks."""
    num_rows, vocab_size, num_ranks = draw(st.integers(0, 5)), draw(st.integers(12, 50)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    num_levels = draw(st.sampled_from([1, 3, 30]))
    logits = torch.randint(num_levels, (num_rows, vocab_size), generator=generator) - num_levels / 2
    logits *= torch.where(torch.rand(logits.shape, generator=generator) < 0.5, 1, -1)  # 0 and -0 are equal
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    penalty = st.sampled_from([0.0, 0.0, -1.5, 0.5])
    token_id = st.integers(0, vocab_size + 2)
    ids = st.lists(token_id, max_size=20)
    filters = st.one_of(
        st.just({}),
        st.fixed_dictionaries(
            {
                "top_k": st.integers(1, 60),
                "top_p": st.sampled_from([1.0, 1.0, 0.9, 0.3]),
                "min_p": st.sampled_from([0.0, 0.0, 0.2]),
            }
        ),
    )
    params = [
        SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1e6])),
            presence_penalty=draw(penalty),
            frequency_penalty=draw(penalty),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
            logit_bias=draw(st.dictionaries(token_id, st.sampled_from([-100.0, 3.0]), max_size=3)),
            **draw(filters),
        )
        for _ in range(num_rows)
    ]
    # A range may cover whole parts.
    spans = st.tuples(token_id, token_id).map(lambda ends: tuple(range(*ends)))
    batch = build(
        params,
        seed=draw(st.integers(0, 2**40)),
        prompts=[draw(ids) for _ in params],
        outputs=[draw(ids) for _ in params],
        forbidden=[draw(st.one_of(st.just(()), spans, ids.map(tuple))) for _ in params],
        masks=[draw(st.one_of(st.none(), spans, st.sets(token_id))) for _ in params],
    )
    return logits.to(dtype), batch, num_ranks


@settings(max_examples=400, deadline=None)
@given(cases())
def test_parts_give_the_tokens_of_all_logits(case: tuple[torch.Tensor, SamplingBatch, int]) -> None:
    """Guards steps by heads, where each rank has logits of a part of the vocabulary: no token may differ."""
    logits, batch, num_ranks = case
    before = logits.clone()
    expected, _ = sample(logits, batch)
    tokens = sample_parts(logits, batch, num_ranks)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected.tolist()
    assert torch.equal(logits, before)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
@example(0, 4)
def test_parts_of_a_large_vocabulary(seed: int, num_ranks: int) -> None:
    """Guards noise of ids beyond a few, and the most candidates that a rank may send."""
    logits = torch.randn(4, 5003, generator=torch.Generator().manual_seed(seed)).bfloat16()
    params = [GREEDY, SamplingParams(), SamplingParams(top_k=MAX_CANDIDATES, top_p=0.95), SamplingParams(top_k=20)]
    batch = build(params, seed)
    assert sample_parts(logits, batch, num_ranks).tolist() == sample(logits, batch)[0].tolist()


@pytest.mark.parametrize(
    ("params", "needed"),
    [
        (SamplingParams(temperature=0, top_k=1000, top_p=0.5, min_p=0.5), False),
        (SamplingParams(frequency_penalty=1, min_tokens=5), False),
        (SamplingParams(top_k=MAX_CANDIDATES, top_p=0.5, min_p=0.5), False),
        (SamplingParams(top_k=MAX_CANDIDATES + 1), True),
        (SamplingParams(top_p=0.9), True),
        (SamplingParams(min_p=0.1), True),
        (SamplingParams(logprobs=0), True),
        (SamplingParams(temperature=0, logprobs=3), True),
    ],
)
def test_what_needs_all_logits(params: SamplingParams, needed: bool) -> None:
    """Guards which batches ranks gather logits for; one row is enough."""
    assert needs_all_logits(build([GREEDY, params, SamplingParams()])) == needed


def test_no_row_needs_all_logits() -> None:
    """Guards ranks without a sampled row."""
    batch = build([])
    assert not needs_all_logits(batch)
    assert sample_parts(torch.empty(0, 12), batch, 3).shape == (0,)


def test_a_part_without_allowed_tokens_loses() -> None:
    """Guards min_tokens where all ids of a rank would end the answer, and rows where no token at all is allowed."""
    logits = torch.zeros(3, 12)
    logits[:, :4] = 9
    params = [GREEDY, SamplingParams(), SamplingParams(top_k=6, top_p=0.5)]
    for forbidden in (range(4), range(12)):
        batch = build(params, forbidden=[tuple(forbidden)] * 3)
        assert sample_parts(logits, batch, 3).tolist() == sample(logits, batch)[0].tolist()


def test_masks_reach_as_far_as_their_words() -> None:
    """Guards vocabularies that are padded: ids beyond the last word of a mask may not come, whatever their logits."""
    logits = torch.arange(100.0).expand(3, -1)
    batch = build([GREEDY, SamplingParams(), GREEDY], masks=[[3, 31, 32, 63], [9], None])
    for num_ranks in (1, 3, 4):
        assert sample_parts(logits, batch, num_ranks).tolist() == [63, 9, 99]


@pytest.mark.parametrize("broken", [torch.nan, -torch.nan])
def test_broken_parts_still_give_a_token(broken: float) -> None:
    """Guards the vocabulary's bounds: NaN logits must not become an id that the next step's lookup trips over."""
    logits = torch.full((3, 13), broken)
    params = [GREEDY, SamplingParams(), SamplingParams(top_k=9, top_p=0.5)]
    tokens = sample_parts(logits, build(params), 4)
    assert ((tokens >= 0) & (tokens < 13)).all()


def test_a_greedy_batch_only_takes_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the common case's cost: no copy, no sort, no probabilities."""
    logits = torch.randn(3, 48)
    batch = build([GREEDY] * 3)
    for name in ("float", "sort", "topk", "exp", "softmax", "clone", "to"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("more than a maximum"))
    tokens = sample_parts(logits, batch, 4)
    monkeypatch.undo()
    assert torch.equal(tokens, logits.argmax(-1))
