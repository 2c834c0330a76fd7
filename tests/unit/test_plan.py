"""Who computes which tokens: the invariants of the design, over thousands of random batches."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.contract import ScheduledBatch
from twofold.errors import ConfigError
from twofold.parallel.plan import POLICIES, Buckets, StepPlan, TokenLayout, contiguous, dual_chunk_swap, plan_step

MANY = settings(max_examples=400, deadline=None)  # of each property: thousands of batches in all


def make_batch(lens: list[int], computed: list[int] | None = None) -> ScheduledBatch:
    return ScheduledBatch.of(computed or [0] * len(lens), lens)


def partition(batch: ScheduledBatch, num_ranks: int, policy: str = "dual_chunk_swap") -> StepPlan:
    return plan_step(batch, TokenLayout(num_ranks, policy))


def rows_of(part: StepPlan, rank: int) -> list[tuple[int, int, int]]:
    """(request, start, length) of a rank's rows, in their order."""
    rows = part.rows_of(rank)
    columns = (part.request_idx[rows], part.start[rows], part.length[rows])
    return list(zip(*(column.tolist() for column in columns), strict=True))


@st.composite
def batches(draw: st.DrawFn, min_requests: int = 1) -> ScheduledBatch:
    """Decodes, short and long chunks, fresh and with a past, in any mixture."""
    scheduled = st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 5000))
    computed = st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 200_000))
    requests = draw(st.lists(st.tuples(computed, scheduled), min_size=min_requests, max_size=16))
    return make_batch([s for _, s in requests], [c for c, _ in requests])


RANKS = st.integers(1, 9)
POLICY = st.sampled_from(sorted(POLICIES))


@MANY
@given(batches(), RANKS, POLICY)
def test_every_token_is_computed_once(batch: ScheduledBatch, num_ranks: int, policy: str) -> None:
    """Invariant 1: a token in no row is never computed, one in two rows is written twice by ranks that may differ."""
    part = partition(batch, num_ranks, policy)
    assert (part.length > 0).all(), "a row without tokens: code that reads lengths would trip over it"
    assert part.row_ptr[0] == 0
    assert part.row_ptr[-1] == len(part.length) == len(part.start) == len(part.request_idx)
    order = np.lexsort((part.start, part.request_idx))
    request, start, end = part.request_idx[order], part.start[order], (part.start + part.length)[order]
    first = np.searchsorted(request, np.arange(len(batch)))
    last = np.searchsorted(request, np.arange(len(batch)), side="right") - 1
    assert (first <= last).all()
    np.testing.assert_array_equal(start[first], batch.num_computed_tokens)
    np.testing.assert_array_equal(end[last], batch.num_computed_tokens + batch.num_scheduled_tokens)
    inner = np.setdiff1d(np.arange(len(request)), first)
    np.testing.assert_array_equal(start[inner], end[inner - 1])  # no gap, no overlap


@MANY
@given(batches(), RANKS, POLICY)
def test_rows_of_a_rank_are_sorted(batch: ScheduledBatch, num_ranks: int, policy: str) -> None:
    """Invariant 1: rows of one request ascend, so that its keys are written and read in order."""
    part = partition(batch, num_ranks, policy)
    for rank in range(num_ranks):
        rows = rows_of(part, rank)
        assert rows == sorted(rows)


@MANY
@given(batches())
def test_one_rank_computes_the_batch_as_it_is(batch: ScheduledBatch) -> None:
    """Invariant 2: with one rank the partition is the identity, whatever the policy."""
    for policy in POLICIES:
        part = partition(batch, 1, policy)
        assert rows_of(part, 0) == list(
            zip(range(len(batch)), batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True)
        )
        assert part.owner.tolist() == [0] * len(batch)
        assert part.num_tokens.tolist() == [batch.num_scheduled_tokens.sum()]


@MANY
@given(batches(), RANKS, POLICY)
def test_ranks_agree_without_talking(batch: ScheduledBatch, num_ranks: int, policy: str) -> None:
    """Invariant 3: a pure function of the batch. Equal arrays elsewhere lead to equal rows, and none is changed."""
    columns = [getattr(batch, name) for name in ScheduledBatch.__dataclass_fields__]
    before = [column.copy() for column in columns]
    one = partition(batch, num_ranks, policy)
    two = partition(ScheduledBatch(*before), num_ranks, policy)
    for field in StepPlan.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
    for column, copied in zip(columns, before, strict=True):
        np.testing.assert_array_equal(column, copied)


@MANY
@given(batches(), RANKS)
def test_tokens_of_a_split_request_differ_by_one_at_most(batch: ScheduledBatch, num_ranks: int) -> None:
    """The issue's bound. Rounding up instead, as vLLM does, always loads the same ranks."""
    part = partition(batch, num_ranks)
    tokens = np.zeros((len(batch), num_ranks), np.int64)  # request, rank
    for rank in range(num_ranks):
        rows = part.rows_of(rank)
        np.add.at(tokens[:, rank], part.request_idx[rows], part.length[rows])
    split = batch.num_scheduled_tokens >= 2 * num_ranks
    assert (tokens[split].max(axis=1, initial=0) - tokens[split].min(axis=1, initial=1 << 60) <= 1).all()
    assert ((tokens[~split] > 0).sum(axis=1) == 1).all(), "a request of fewer than 2P tokens is one row of one rank"
    # Odd tokens of one request after the other go around the ranks, so they do not add up either.
    total = tokens[split].sum(axis=0)
    assert total.max() - total.min() <= 1


@MANY
@given(batches(), RANKS)
def test_a_split_request_is_a_head_and_a_tail_on_every_rank(batch: ScheduledBatch, num_ranks: int) -> None:
    """Chunks differ by one token at most, and rank r has chunks r and 2P-1-r: late ones cost more than early ones."""
    part = partition(batch, num_ranks)
    for request in np.flatnonzero((batch.num_scheduled_tokens >= 2 * num_ranks) & (num_ranks > 1)):
        chunks = sorted(
            (start, length, rank)
            for rank in range(num_ranks)
            for row_request, start, length in rows_of(part, rank)
            if row_request == request
        )
        assert [rank for *_, rank in chunks] == [*range(num_ranks), *reversed(range(num_ranks))]
        lengths = [length for _, length, _ in chunks]
        assert max(lengths) - min(lengths) <= 1


@MANY
@given(batches(), RANKS, POLICY)
def test_the_owner_has_the_last_token(batch: ScheduledBatch, num_ranks: int, policy: str) -> None:
    """Only the owner has the hidden state to sample from; any other rank would sample from some other row."""
    part = partition(batch, num_ranks, policy)
    ends = batch.num_computed_tokens + batch.num_scheduled_tokens
    for rank in range(num_ranks):
        rows = part.rows_of(rank)
        last = part.start[rows] + part.length[rows] == ends[part.request_idx[rows]]
        assert sorted(part.request_idx[rows][last].tolist()) == np.flatnonzero(part.owner == rank).tolist()


@MANY
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=64), RANKS, POLICY)
def test_decodes_are_dealt_out_evenly(computed: list[int], num_ranks: int, policy: str) -> None:
    """In number and, within the longest context, in what they attend to. All on rank 0 would be one GPU's speed."""
    part = partition(make_batch([1] * len(computed), computed), num_ranks, policy)
    assert part.num_tokens.max() - part.num_tokens.min() <= 1
    assert part.num_pairs.max() - part.num_pairs.min() <= max(computed) + 1


@MANY
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=6), st.integers(1, 5), POLICY)
def test_pairs_are_those_of_the_causal_mask(requests: list[tuple[int, int]], num_ranks: int, policy: str) -> None:
    """Counted one by one: the token at position t attends to t + 1 keys."""
    part = partition(make_batch([s for _, s in requests], [c for c, _ in requests]), num_ranks, policy)
    for rank in range(num_ranks):
        rows = rows_of(part, rank)
        assert part.num_tokens[rank] == sum(length for *_, length in rows)
        assert part.num_pairs[rank] == sum(t + 1 for _, start, length in rows for t in range(start, start + length))
    assert part.num_tokens.sum() == sum(s for _, s in requests)


def test_pairs_of_a_very_long_prompt_are_exact() -> None:
    """More pairs than a float64 counts exactly (2**53)."""
    part = partition(make_batch([200_000_001]), 2)
    assert part.num_pairs.sum() == 200_000_001 * 200_000_002 // 2


def test_the_design_s_example() -> None:
    """A prompt of 8 tokens on 2 ranks, as drawn in the design and in the README."""
    part = partition(make_batch([8]), 2)
    assert rows_of(part, 0) == [(0, 0, 2), (0, 6, 2)]
    assert rows_of(part, 1) == [(0, 2, 2), (0, 4, 2)]
    assert part.owner.tolist() == [0]
    assert part.num_tokens.tolist() == [4, 4]
    assert part.num_pairs.tolist() == [18, 18]


def test_the_last_chunk_of_a_prompt_is_not_a_decode() -> None:
    """A token of a prompt left over after its other chunks: a whole row at its position, like a decode in the step."""
    part = partition(make_batch([1, 1], [64, 7]), 2)
    assert rows_of(part, 0) == [(0, 64, 1)]
    assert rows_of(part, 1) == [(1, 7, 1)]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_prompts_of_up_to_twice_the_ranks(num_ranks: int) -> None:
    """2P - 1 tokens are a whole row, with the other ranks empty; 2P are one token a chunk."""
    for length in range(1, 2 * num_ranks):
        part = partition(make_batch([length]), num_ranks)
        assert part.num_tokens.tolist() == [length] + [0] * (num_ranks - 1)
        assert [rows_of(part, rank) for rank in range(1, num_ranks)] == [[]] * (num_ranks - 1)
    part = partition(make_batch([2 * num_ranks]), num_ranks)
    assert part.num_tokens.tolist() == [2] * num_ranks
    assert part.length.tolist() == [1] * (2 * num_ranks)


def test_contiguous_cuts_into_as_many_chunks_as_ranks() -> None:
    """The baseline: equal tokens, and the last rank attends to most of the pairs."""
    part = partition(make_batch([12], [4]), 3, "contiguous")
    assert [rows_of(part, rank) for rank in range(3)] == [[(0, 4, 4)], [(0, 8, 4)], [(0, 12, 4)]]
    assert part.owner.tolist() == [2]
    assert part.num_pairs.tolist() == [26, 42, 58]


@MANY
@given(st.integers(200, 100_000), st.integers(2, 8))
def test_the_zigzag_balances_pairs(length: int, num_ranks: int) -> None:
    """A rank attends to its share of the pairs, but for what one odd token costs; contiguous ranks do not."""
    part = partition(make_batch([length]), num_ranks)
    share = length * (length + 1) / 2 / num_ranks
    assert np.abs(part.num_pairs - share).max() <= 2 * length
    uneven = partition(make_batch([length]), num_ranks, "contiguous")
    assert uneven.num_pairs.argmax() == num_ranks - 1
    assert uneven.num_pairs.max() > 1.4 * share


def test_policies_cover_every_rank_alike() -> None:
    for num_ranks in range(1, 10):
        assert np.bincount(dual_chunk_swap(num_ranks)).tolist() == [2] * num_ranks
        assert np.bincount(contiguous(num_ranks)).tolist() == [1] * num_ranks


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match=r"must be one of dual_chunk_swap, contiguous, got 'zigzag'"):
        partition(make_batch([8]), 2, "zigzag")


# --- Where entries and sampled tokens go ------------------------------------------------------------------------------


@MANY
@given(batches(), RANKS, POLICY)
def test_every_entry_has_a_place_of_its_own(batch: ScheduledBatch, num_ranks: int, policy: str) -> None:
    """In its rank's part, in the order of rows; two tokens in one place would overwrite each other in every cache."""
    plan = plan_step(batch, TokenLayout(num_ranks, policy), Buckets(prefill=(64, 4096)))
    places, rows = plan.gathered_idx(), plan.token_row()
    assert len(np.unique(places)) == len(places) == batch.num_scheduled_tokens.sum()
    rank_of_row = np.searchsorted(plan.row_ptr, np.arange(len(plan.length)), side="right") - 1
    np.testing.assert_array_equal(places // plan.num_padded_tokens, rank_of_row[rows])
    np.testing.assert_array_equal(
        plan.token_position(), plan.start[rows] + np.concatenate([np.arange(n) for n in plan.length])
    )


@MANY
@given(batches(), RANKS, POLICY)
def test_a_request_is_sampled_once_by_its_owner(batch: ScheduledBatch, num_ranks: int, policy: str) -> None:
    """The sampled rows of a rank end their requests, and are those that the rank owns."""
    wanted = np.arange(len(batch)) % 3 > 0
    batch = replace(batch, num_sampled_tokens=wanted.astype(np.int64))
    plan = plan_step(batch, TokenLayout(num_ranks, policy))
    end = batch.num_computed_tokens + batch.num_scheduled_tokens
    sampled = []
    for rank, rows in enumerate(plan.sampled_row):
        rows = rows[rows >= 0]
        requests = plan.request_idx[rows]
        assert (plan.owner[requests] == rank).all()
        np.testing.assert_array_equal(plan.start[rows] + plan.length[rows], end[requests])
        sampled += requests.tolist()
    assert sorted(sampled) == np.flatnonzero(wanted).tolist()


@MANY
@given(st.integers(1, 6), POLICY, st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.integers(1, 64))
def test_the_bound_on_keys_holds(num_ranks: int, policy: str, lens: list[int], block_size: int) -> None:
    """A CUDA graph sets room aside by `max_keys`: of prompts that begin in the step no rank may need more."""
    lens = [max(n, 2 * num_ranks) for n in lens]
    layout = TokenLayout(num_ranks, policy)
    plan = plan_step(make_batch(lens), layout)
    blocks = -(-layout.max_keys(int(plan.num_tokens.max())) // block_size)
    # Each row may have one block more that is not full, and odd tokens shift where chunks end.
    slack = plan.max_num_rows * (1 + 2 * num_ranks // block_size)
    assert plan.max_row_blocks(block_size) <= blocks + slack


def test_the_example_of_the_module() -> None:
    """The picture in the docstring is what the code does."""
    plan = plan_step(make_batch([8, 1], [0, 4]), TokenLayout(2))
    assert plan.row_ptr.tolist() == [0, 3, 5]
    assert plan.num_padded_tokens == 5
    assert list(zip(plan.request_idx.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True)) == [
        (0, 0, 2), (0, 6, 2), (1, 4, 1), (0, 2, 2), (0, 4, 2)
    ]  # fmt: skip
    assert plan.gathered_idx().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert plan.sampled_row.tolist() == [[1, 2], [-1, -1]]
    assert plan.owner.tolist() == [0, 0]
