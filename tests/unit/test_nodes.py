"""Ranks on several nodes: the answer does not depend on it, and an entry crosses between two nodes once."""

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    ThreadExecutor,
    generate,
    make_engine,
    prompt_logprobs,
    reference_continuation,
    reference_logprobs,
)
from hypothesis import given
from hypothesis import strategies as st
from test_plan import MANY, batches, make_batch
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from transformers import PreTrainedModel

from twofold.contract import ScheduledBatch
from twofold.engine.engine import LLMEngine
from twofold.errors import ConfigError
from twofold.parallel.plan import Buckets, HeadLayout, Layout, TokenLayout, plan_step
from twofold.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4)
NODES = [(2, 1), (2, 2), (3, 1), (4, 1), (2, 3)]  # number of nodes, ranks on each
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8},
    "mistral": {},  # windows, and heads that three ranks do not divide: there attention is whole on each
    "mixtral": {},
    "deepseek_v2": {"num_key_value_heads": 4, "moe_intermediate_size": 96},  # latents and experts
}
CASES = [("llama", *counts) for counts in NODES] + [(family, 2, 2) for family in FAMILIES if family != "llama"]
CASES += [("mistral", 2, 3), ("deepseek_v2", 3, 1)]


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist()


PROMPTS = [prompt_of(length) for length in (1, 2, 5, 16, 61)]


@cache
def model_of(family: str) -> PreTrainedModel:
    return tiny_model(tiny_config(family, num_hidden_layers=2, intermediate_size=96, **FAMILIES[family]))


@cache
def expected_of(family: str) -> list[tuple[np.ndarray, list[int]]]:
    """Of each prompt the log-probabilities of its tokens, and those that follow."""
    model = model_of(family)
    return [(reference_logprobs(model, prompt), reference_continuation(model, prompt, 4)) for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model(tiny_config("llama"))


def executor_of(engine: LLMEngine) -> ThreadExecutor:
    assert isinstance(engine.executor, ThreadExecutor)
    return engine.executor


# --- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_layout", ["tokens", "heads", "mixed"])
@pytest.mark.parametrize(("family", "num_nodes", "num_places"), CASES)
def test_answers_are_those_of_transformers(family: str, num_nodes: int, num_places: int, step_layout: str) -> None:
    """Prompts in one step or, in mixed layouts, in chunks together; and all ranks' caches are the same bytes."""
    chunks = {"max_num_batched_tokens": 24, "steps_in_flight": 2} if step_layout == "mixed" else {}
    engine = make_engine(
        model_of(family), num_nodes * num_places, num_nodes=num_nodes, step_layout=step_layout, **chunks
    )
    expected = expected_of(family)
    for found, (logprobs, _) in zip(prompt_logprobs(engine, PROMPTS), expected, strict=True):
        np.testing.assert_allclose(found, logprobs, rtol=0, atol=1e-4)
    for output, (_, tokens) in zip(generate(engine, PROMPTS, GREEDY), expected, strict=True):
        assert output.outputs[0].token_ids[: len(tokens)] == tokens
    assert_same_caches(engine)
    layouts = {step.by_heads for step in executor_of(engine).steps}
    assert layouts == {"tokens": {False}, "heads": {True}, "mixed": {False, True}}[step_layout]
    engine.shutdown()


def assert_same_caches(engine: LLMEngine) -> None:
    first, *others = executor_of(engine).runners
    for other in others:
        for mine, theirs in zip(first.cache.blocks, other.cache.blocks, strict=True):
            assert torch.equal(mine[1:], theirs[1:])  # but for the null block


@pytest.mark.parametrize("step_layout", ["tokens", "heads", "mixed"])
@pytest.mark.parametrize(("num_nodes", "num_places"), [(2, 1), (2, 2)])
def test_all_ways_to_sample(llama: PreTrainedModel, num_nodes: int, num_places: int, step_layout: str) -> None:
    """Requests of one node may be chosen from candidates while those of another need all logits."""
    params = [
        SamplingParams(temperature=0, max_tokens=5),
        SamplingParams(temperature=1.0, seed=1, max_tokens=7, logprobs=2),
        SamplingParams(temperature=0.9, top_p=0.8, seed=2, max_tokens=6),
        SamplingParams(temperature=1.2, top_k=5, seed=3, max_tokens=5),
        SamplingParams(
            temperature=0.8, seed=4, repetition_penalty=1.2, max_tokens=9, allowed_token_ids=[*range(5, 50)]
        ),
    ]
    one_rank = make_engine(llama, 1)
    wanted = [output.outputs[0] for output in generate(one_rank, PROMPTS, params)]
    one_rank.shutdown()
    engine = make_engine(llama, num_nodes * num_places, num_nodes=num_nodes, step_layout=step_layout)
    for _ in range(2):  # the second time with cached prefixes
        for output, one in zip(generate(engine, PROMPTS, params), wanted, strict=True):
            assert output.outputs[0].token_ids == one.token_ids
            if one.logprobs is not None:
                pairs = zip(output.outputs[0].logprobs or [], one.logprobs, strict=True)
                assert all(list(mine) == list(theirs) for mine, theirs in pairs)
    engine.shutdown()


@pytest.mark.parametrize("step_layout", ["tokens", "mixed"])
def test_ranks_of_a_node_keep_parts_of_the_weights(llama: PreTrainedModel, step_layout: str) -> None:
    """And fetch the rest from each other; each node has all parts."""
    engine = make_engine(llama, 4, num_nodes=2, weights="sharded", step_layout=step_layout)
    for prompt, output in zip(PROMPTS, generate(engine, PROMPTS, GREEDY), strict=True):
        tokens = reference_continuation(llama, prompt, 4)
        assert output.outputs[0].token_ids[: len(tokens)] == tokens
    whole = make_engine(llama, 1)
    assert engine.reports[0].weight_bytes < 0.7 * whole.reports[0].weight_bytes
    whole.shutdown()
    engine.shutdown()


def test_a_cache_is_not_shared_between_nodes(llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"nor ranks on several machines; use kv_cache='replicated'"):
        make_engine(llama, 4, num_nodes=2, kv_cache="sharded")


# --- What travels ----------------------------------------------------------------------------------------------------


def traffic(engine: LLMEngine) -> tuple[int, int]:
    """Bytes that came from other nodes, and from ranks of the same node, since the start."""
    stats = engine.stats
    return stats.node_bytes, stats.exchange_bytes - stats.node_bytes


@pytest.mark.parametrize(("num_nodes", "num_places"), NODES)
def test_an_entry_crosses_to_each_node_once(llama: PreTrainedModel, num_nodes: int, num_places: int) -> None:
    """Not once for each rank there: the link between nodes is the slow one."""
    num_ranks, num_tokens = num_nodes * num_places, 48
    engine = make_engine(llama, num_ranks, num_nodes=num_nodes, step_layout="tokens", num_blocks=9, max_model_len=128)
    generate(engine, [prompt_of(num_tokens)], SamplingParams(temperature=0, max_tokens=1))
    entries = num_tokens * engine.reports[0].bytes_per_block // engine.runtime.block_size
    assert traffic(engine) == (entries * (num_nodes - 1), entries * num_nodes * (num_places - 1))
    engine.shutdown()


# --- Plans -----------------------------------------------------------------------------------------------------------

COUNTS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@MANY
@given(batches(), COUNTS)
def test_by_heads_a_request_is_on_one_node(batch: ScheduledBatch, counts: tuple[int, int]) -> None:
    """Whole, on every rank there, and sampled by one of them; on no rank elsewhere."""
    num_nodes, num_places = counts
    plan = plan_step(batch, HeadLayout(num_nodes * num_places, num_nodes))
    seen: list[list[int]] = []
    for node in range(num_nodes):
        ranks = range(node * num_places, (node + 1) * num_places)
        requests = [plan.request_idx[plan.rows_of(rank)].tolist() for rank in ranks]
        assert all(some == requests[0] == sorted(set(requests[0])) for some in requests)
        assert set(plan.owner[requests[0]].tolist()) <= set(ranks)
        owned = np.bincount(plan.owner[requests[0]] - ranks[0], minlength=num_places)
        assert owned.max() - owned.min() <= 1
        seen += requests[:1]
    assert sorted(chain.from_iterable(seen)) == list(range(len(batch)))
    np.testing.assert_array_equal(plan.start, batch.num_computed_tokens[plan.request_idx])
    np.testing.assert_array_equal(plan.length, batch.num_scheduled_tokens[plan.request_idx])
    sampled = plan.sampled_row[plan.sampled_row >= 0]
    assert sorted(plan.request_idx[sampled].tolist()) == list(range(len(batch)))
    assert max(map(len, seen)) <= HeadLayout(num_nodes * num_places, num_nodes).max_decodes(len(batch))


@MANY
@given(batches(), COUNTS, st.booleans())
def test_entries_come_by_place_then_by_node(batch: ScheduledBatch, counts: tuple[int, int], by_heads: bool) -> None:
    """The order in which `AcrossNodes` brings them: all ranks write an entry to the slot of its token."""
    num_nodes, num_places = counts
    num_ranks = num_nodes * num_places
    layouts: tuple[Layout, ...] = (TokenLayout(num_ranks, num_nodes=num_nodes), HeadLayout(num_ranks, num_nodes))
    plan = plan_step(batch, layouts[by_heads], Buckets(prefill=(64, 4096)))
    places = plan.gathered_idx()
    assert len(np.unique(places)) == len(places)
    part, _ = np.divmod(places, plan.num_padded_tokens)
    rank = np.repeat(np.arange(num_ranks), plan.num_tokens)
    np.testing.assert_array_equal(part, rank % num_places * num_nodes + rank // num_places)


@MANY
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=64), COUNTS)
def test_by_heads_decodes_are_dealt_out_evenly(computed: list[int], counts: tuple[int, int]) -> None:
    """To the nodes, in number and, within the longest context, in what they attend to."""
    num_nodes, num_places = counts
    plan = plan_step(make_batch([1] * len(computed), computed), HeadLayout(num_nodes * num_places, num_nodes))
    assert np.ptp(plan.num_tokens) <= 1
    assert np.ptp(plan.num_pairs) <= max(computed) + 1


def test_the_example_of_two_nodes() -> None:
    """The picture in the docstring of `plan.py` is what the code does."""
    plan = plan_step(make_batch([8, 1], [0, 4]), HeadLayout(4, 2))
    assert plan.row_ptr.tolist() == [0, 1, 2, 3, 4]
    assert plan.request_idx.tolist() == [0, 0, 1, 1]
    assert plan.num_padded_tokens == 8
    assert parts_of(plan.gathered_idx(), plan.num_tokens) == [0, 2, 1, 3]
    assert plan.sampled_row.tolist() == [[0], [-1], [2], [-1]]
    assert plan.owner.tolist() == [0, 2]


def parts_of(places: np.ndarray, num_tokens: Sequence[int]) -> list[int]:
    """Rank -> its part of the gathered entries, of 8 places each."""
    first = np.cumsum([0, *num_tokens])[:-1]
    return (places[first] // 8).tolist()
