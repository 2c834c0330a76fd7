"""A KV cache of which each rank keeps a share: same answers, P times the tokens, and only what is needed is fetched."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    ThreadExecutor,
    ThreadMemory,
    generate,
    make_engine,
    prompt_logprobs,
    reference_continuation,
    reference_logprobs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from transformers import PreTrainedModel

from twofold.attention.spec import AttentionSpec, split_heads
from twofold.contract import NewRequest, ScheduledBatch, Step
from twofold.engine.block_pool import BlockPool
from twofold.engine.engine import LLMEngine
from twofold.engine.request import Request
from twofold.engine.scheduler import FetchLimit, Scheduler
from twofold.errors import ConfigError
from twofold.kv.sharded import LayerShare, max_num_blocks, num_bytes, owner_of, place_of
from twofold.parallel.fetch_entries import workspace_bytes
from twofold.parallel.plan import HeadLayout, Layout, TokenLayout, plan_step
from twofold.sampling_params import SamplingParams
from twofold.worker.fetch_plan import plan_fetch, plan_own_blocks
from twofold.worker.input_batch import prepare
from twofold.worker.request_states import RequestStates

PROMPT_LENS = (1, 3, 37, 70)
GREEDY = SamplingParams(temperature=0, max_tokens=8)
BLOCK_SIZE = 8


def prompts_of(lens: tuple[int, ...] = PROMPT_LENS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB_SIZE, length).tolist() for length in lens]


def sharded_engine(model: PreTrainedModel, num_ranks: int, **arguments: Any) -> LLMEngine:
    arguments = {"max_num_batched_tokens": 40, "max_model_len": 96, "num_blocks": 13} | arguments
    return make_engine(model, num_ranks, block_size=BLOCK_SIZE, kv_cache="sharded", **arguments)


def executor_of(engine: LLMEngine) -> ThreadExecutor:
    assert isinstance(engine.executor, ThreadExecutor)
    return engine.executor


def assert_exact(engine: LLMEngine, model: PreTrainedModel, num_passes: int = 2) -> None:
    """Greedy tokens are Transformers', log-probabilities too; later passes find prefixes in the cache."""
    prompts = prompts_of()
    for found, prompt in zip(prompt_logprobs(engine, prompts), prompts, strict=True):
        np.testing.assert_allclose(found, reference_logprobs(model, prompt), rtol=0, atol=1e-4)
    expected = [reference_continuation(model, prompt, 8) for prompt in prompts]
    for _ in range(num_passes):
        for output, tokens in zip(generate(engine, prompts, GREEDY), expected, strict=True):
            assert output.outputs[0].token_ids[: len(tokens)] == tokens
    assert engine.is_idle


def heads(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "hidden_size": 16 * num_heads}


# Every value is here, but not every combination: benchmarks/families.py --kv-cache sharded has those.
CASES: list[tuple[str, dict[str, Any], int, str, dict[str, Any]]] = [
    ("llama", heads(4, 1), 2, "mixed", {}),
    ("llama", heads(4, 2), 2, "mixed", {"steps_in_flight": 2}),
    ("llama", heads(4, 2), 4, "tokens", {}),
    ("llama", heads(6, 3), 2, "mixed", {"steps_in_flight": 2}),
    ("llama", heads(6, 3), 3, "mixed", {}),
    ("llama", heads(8, 8), 4, "mixed", {"partition_policy": "contiguous"}),
    ("llama", heads(8, 8), 2, "heads", {}),
    ("deepseek_v3", {}, 2, "mixed", {"steps_in_flight": 2}),
    ("deepseek_v3", {}, 3, "tokens", {}),
    ("deepseek_v3", {}, 4, "heads", {}),
    ("qwen3_moe", {}, 2, "mixed", {}),
    ("gpt_oss", {}, 2, "tokens", {}),  # sliding windows and sinks
    ("gpt_oss", {}, 3, "mixed", {"steps_in_flight": 2}),
    ("gemma2", {}, 2, "mixed", {}),  # sliding windows and softcaps
    ("gpt2", {}, 2, "tokens", {"steps_in_flight": 2}),  # no step by heads
]


@pytest.mark.parametrize(
    ("model_type", "changes", "num_ranks", "layout", "arguments"),
    CASES,
    ids=[f"{case[0]}-{case[1].get('num_key_value_heads', '')}-{case[2]}-{case[3]}" for case in CASES],
)
def test_answers_are_those_of_transformers(
    model_type: str, changes: dict[str, Any], num_ranks: int, layout: str, arguments: dict[str, Any]
) -> None:
    """Prompts in chunks, in steps of both layouts, with prefixes from the cache."""
    model = tiny_model(tiny_config(model_type, **changes))
    engine = sharded_engine(model, num_ranks, step_layout=layout, **arguments)
    assert engine.is_sharded
    assert_exact(engine, model)
    calls = [mesh.calls for mesh in executor_of(engine).meshes]
    assert all(other == calls[0] for other in calls)
    engine.shutdown()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(tiny_config("llama"))


@pytest.fixture(scope="module")
def latents() -> PreTrainedModel:
    return tiny_model(tiny_config("deepseek_v3"))


@pytest.mark.parametrize("kind", ["model", "latents"])
def test_preempted_requests_continue(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    engine, prompts = sharded_engine(model, 2, max_model_len=48, num_blocks=5), prompts_of((22, 23, 24))
    outputs = generate(engine, prompts, SamplingParams(temperature=0, max_tokens=20))  # 9 blocks for 18
    for output, prompt in zip(outputs, prompts, strict=True):
        tokens = reference_continuation(model, prompt, 20)
        assert output.outputs[0].token_ids[: len(tokens)] == tokens
    assert engine.scheduler.num_preemptions > 0
    engine.shutdown()


def test_new_ranks_continue(model: PreTrainedModel) -> None:
    """What was fetched before is fetched again, from the shares of new ranks."""
    engine, prompts, finished = sharded_engine(model, 2), prompts_of(), {}
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, GREEDY)
    num_steps = 0
    while engine.has_unfinished_requests:
        num_steps += 1
        if num_steps in (2, 7):
            engine.recover()
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0].token_ids
    for number, prompt in enumerate(prompts):
        tokens = reference_continuation(model, prompt, 8)
        assert finished[str(number)][: len(tokens)] == tokens
    assert engine.is_sharded
    assert engine.is_idle
    engine.shutdown()


@pytest.mark.parametrize(("kind", "num_ranks"), [("model", 2), ("model", 3), ("latents", 2)])
def test_shares_together_are_the_cache(kind: str, num_ranks: int, request: pytest.FixtureRequest) -> None:
    """By heads each rank has its columns of every entry, by blocks every P-th block, and nobody has more."""
    model, [prompt] = request.getfixturevalue(kind), prompts_of((70,))
    arguments: dict[str, Any] = {"step_layout": "tokens", "max_num_batched_tokens": 40, "max_model_len": 96}
    whole = make_engine(model, 1, block_size=BLOCK_SIZE, **arguments)
    parts = sharded_engine(model, num_ranks, **arguments)
    for engine in (whole, parts):
        generate(engine, [prompt], SamplingParams(temperature=0, max_tokens=1))
    blocks = np.arange(1, 10)  # of the prompt
    for layer, right in enumerate(executor_of(whole).runners[0].cache.blocks):
        caches = [runner.cache for runner in executor_of(parts).runners]
        mine = [cache.blocks[layer] for cache in caches]
        if mine[0].shape[-1] < right.shape[-1]:
            found = torch.cat(mine, dim=-1)[blocks]
            assert (kind, num_ranks) == ("model", 2)
        else:
            assert max(map(len, mine)) <= -(-(parts.block_pool.num_blocks - 1) // num_ranks) + 1
            pairs = zip(owner_of(blocks, num_ranks), place_of(blocks, num_ranks), strict=True)
            found = torch.stack([mine[owner][place] for owner, place in pairs])
        torch.testing.assert_close(found.flatten(0, 1)[:70], right[blocks].flatten(0, 1)[:70], rtol=0, atol=1e-5)
    for engine in (whole, parts):
        engine.shutdown()


def test_steps_of_decodes_fetch_nothing(model: PreTrainedModel) -> None:
    """Where all layers divide, an answer reads what its rank has; a chunk of a prompt fetches what was before it."""
    engine = sharded_engine(model, 2, step_layout="auto", step_costs='{"decode": [[1, 1, 2]], "prefill": [[1, 1, 2]]}')
    generate(engine, prompts_of((70,)), GREEDY)
    executor = executor_of(engine)
    assert [step.by_heads for step in executor.steps] == [False, False] + [True] * 7
    entry = 4 * 2 * 2 * 16 * 4  # of all layers, in bytes
    received = [[result.exchange_bytes for result in results] for results in executor.results]
    assert received[0] == [entry * 20] * 2  # the other rank's new entries
    # And of the other rank's heads five blocks of eight tokens.
    assert received[1] == [entry * 15 + 5 * 8 * entry // 2] * 2
    assert not np.array(received[2:]).any()
    engine.shutdown()


def test_ranks_wait_for_each_other_where_one_reads_another(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fetches, and the one after it, which may overwrite what is read, begin with a barrier; no other."""
    waits: list[int] = []  # rank of each
    wait = ThreadMemory.barrier

    def barrier(memory: ThreadMemory) -> None:
        waits.append(memory._mesh.rank)
        wait(memory)

    monkeypatch.setattr(ThreadMemory, "barrier", barrier)
    engine = sharded_engine(model, 2, step_layout="auto", step_costs='{"decode": [[1, 1, 2]], "prefill": [[1, 1, 2]]}')
    generate(engine, prompts_of((30, 25)), GREEDY)  # 30 and 10 tokens, 2 decodes, 15 tokens, then decodes
    layouts = [step.by_heads for step in executor_of(engine).steps]
    assert layouts[:4] == [False, True, False, True]
    assert sorted(waits) == [0] * 2 + [1] * 2
    engine.shutdown()


@pytest.mark.parametrize("layout", ["tokens", "heads"])
def test_decodes_over_divided_blocks_fetch_nothing(latents: PreTrainedModel, layout: str) -> None:
    """Queries travel, and results: of entries only the new ones, and by heads none."""
    engine = sharded_engine(latents, 2, step_layout=layout, max_num_batched_tokens=128)
    generate(engine, prompts_of(), GREEDY)
    received = [[result.exchange_bytes for result in results] for results in executor_of(engine).results[1:]]
    num_layers, width = 4, 16 + 8
    most = 0 if layout == "heads" else 2 * num_layers * width * 4  # two rows of the other rank
    assert len(received) == 7
    assert np.max(received) == most
    assert engine.scheduler.fetch_limit == FetchLimit(128 // BLOCK_SIZE + 64, decodes_too=False)
    engine.shutdown()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(2, 4), st.booleans(), st.integers(0, 99))
def test_every_token_is_attended_to_by_one_rank(computed: list[int], num_ranks: int, by_heads: bool, seed: int) -> None:
    """Decodes: a row's own tokens on all ranks, one after the other, are its tokens; padding has none."""
    batch, rng = ScheduledBatch.of(computed, [1] * len(computed)), np.random.default_rng(seed)
    states, ids = states_of(computed, [1] * len(computed), rng)
    layout: Layout = HeadLayout(num_ranks) if by_heads else TokenLayout(num_ranks)
    plan = plan_step(batch, layout)
    found: dict[int, list[int]] = {request: [] for request in range(len(computed))}
    for rank in range(num_ranks):
        rows = plan_own_blocks(batch, prepare(batch, plan, states, rank, 4), states, rank, 4).rows
        requests = plan.request_idx[plan.rows_of(rank)] if by_heads else plan.request_idx
        places = np.arange(len(requests)) if by_heads else plan.gathered_idx()
        assert rows.seq_lens_np.sum() == rows.seq_lens_np[places].sum()
        for request, place in zip(requests.tolist(), places.tolist(), strict=True):
            for i in range(int(rows.seq_lens_np[place])):
                mine = int(rows.block_tables_np[place, i // 4])
                [column] = [
                    column
                    for column, block in enumerate(ids[request])
                    if owner_of(block, num_ranks) == rank and place_of(block, num_ranks) == mine
                ]
                found[request].append(4 * column + i % 4)
    for request, length in enumerate(computed):
        assert sorted(found[request]) == list(range(length + 1))


def test_only_rows_of_a_rank_are_fetched_for() -> None:
    """Three answers by tokens: the longest on rank 0, two on rank 1. Each rank fetches half of their entries."""
    model = tiny_model(tiny_config("gpt2"))
    engine = sharded_engine(model, 2, step_layout="tokens", max_num_batched_tokens=64)
    generate(engine, prompts_of((8, 16, 40)), SamplingParams(temperature=0, max_tokens=2))
    width = executor_of(engine).runners[0].cache.blocks[0].shape[-1]
    num_layers = len(executor_of(engine).runners[0].cache.blocks)
    last = [result.exchange_bytes for result in executor_of(engine).results[-1]]
    entries = [bytes_ // (4 * num_layers * width) for bytes_ in last]  # in halves of entries
    num_new = 2 * 2  # two tokens of the other rank, padding included
    assert entries == [40 + num_new, 8 + 16 + num_new]
    engine.shutdown()


SHAPES = {
    "Llama-3.1-8B": [(2048, True)] * 32,
    "DeepSeek-V2-Lite": [(576, False)] * 27,
    "two widths": [(2048, True), (768, False)] * 12,
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_shares_hold_as_many_times_the_tokens_as_there_are_ranks(name: str, num_ranks: int) -> None:
    """With the same memory. What is fetched takes memory beside it, which is told apart."""
    dtype, block_size, memory = torch.bfloat16, 128, 8 << 30
    shares = [LayerShare(width, by_heads, num_ranks, 32) for width, by_heads in SHAPES[name]]
    replicated = memory // (sum(width for width, _ in SHAPES[name]) * block_size * dtype.itemsize)
    blocks = max_num_blocks(shares, memory, block_size, dtype)
    assert num_bytes(shares, blocks, block_size, dtype) <= memory
    assert blocks >= 0.975 * num_ranks * replicated
    if name == "Llama-3.1-8B" and num_ranks == 2:  # a million tokens: of the peer's heads 2 KiB each, twice
        assert workspace_bytes(shares, 10**6 // block_size, block_size, dtype) == 4 * 1024 * (10**6 // block_size) * 128


def test_a_cache_is_sharded_where_a_request_would_not_fit(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    """`auto`: 96 tokens take 12 blocks and the null block."""
    caplog.set_level("INFO")
    for num_blocks, is_sharded, told in ((13, False, "all"), (12, True, "a share"), (7, True, "a share")):
        engine = make_engine(model, 2, max_model_len=96, block_size=BLOCK_SIZE, num_blocks=num_blocks, kv_cache="auto")
        assert engine.is_sharded == is_sharded
        assert engine.kv_cache_capacity == ((1 + is_sharded) * num_blocks - 1) * BLOCK_SIZE
        assert any(f"and {told} of the KV cache" in line for line in caplog.messages)
        caplog.clear()
        engine.shutdown()
    with pytest.raises(ConfigError, match="the cache holds 88 tokens, fewer than max_model_len=96") as caught:
        make_engine(model, 2, max_model_len=96, block_size=BLOCK_SIZE, num_blocks=6, kv_cache="auto")
    assert caught.value.field == "max_model_len"


def test_one_rank_keeps_everything(model: PreTrainedModel) -> None:
    engine = make_engine(model, 1, kv_cache="sharded")
    assert not engine.is_sharded
    engine.shutdown()


# --- What a step may fetch -------------------------------------------------------------------------------------------


def make_scheduler(limit: FetchLimit, *prompt_lens: int) -> Scheduler:
    scheduler = Scheduler(BlockPool(200, 4), 8, 64, 400)
    scheduler.fetch_limit = limit
    for number, length in enumerate(prompt_lens):
        scheduler.add(Request(np.arange(length) + 1000 * number, SamplingParams(max_tokens=9), seed=0))
    return scheduler


def run_step(scheduler: Scheduler) -> list[tuple[int, int]]:
    """Number and scheduled tokens of each request of the next step."""
    step = scheduler.schedule()
    assert step is not None
    numbers = step.batch.numbers.tolist()
    for request in scheduler.complete(step.step_id, numbers):
        scheduler.append(request, 1)
    return list(zip(numbers, step.batch.num_scheduled_tokens.tolist(), strict=True))


def test_decodes_and_prompts_take_turns() -> None:
    """A step of both would fetch the contexts of all answers for the sake of a token each."""
    scheduler = make_scheduler(FetchLimit(100, decodes_too=False), 8, 150)
    assert run_step(scheduler) == [(0, 8), (1, 56)]
    assert run_step(scheduler) == [(0, 1)]
    assert run_step(scheduler) == [(1, 64)]
    assert run_step(scheduler) == [(0, 1)]
    assert run_step(scheduler) == [(1, 30)]
    assert run_step(scheduler) == [(0, 1), (1, 1)]


def test_a_step_has_no_more_blocks_than_a_workspace() -> None:
    """The first request of a step runs in any case: a workspace has room for the longest one."""
    scheduler = make_scheduler(FetchLimit(20, decodes_too=True), 80, 16, 16)
    assert run_step(scheduler) == [
        (0, 64),
    ]  # 16 blocks; no budget is left
    assert run_step(scheduler) == [
        (0, 16),
    ]  # 20 blocks
    assert run_step(scheduler) == [(0, 1)]
    assert run_step(scheduler) == [(1, 16), (2, 16)]
    assert run_step(scheduler) == [(0, 1)]
    scheduler = make_scheduler(FetchLimit(20, decodes_too=False), 80, 16)
    assert [run_step(scheduler) for _ in range(4)][-1] == [(1, 16)]
    assert run_step(scheduler) == [(0, 1), (1, 1)]


def states_of(
    computed: Sequence[int], scheduled: Sequence[int], rng: np.random.Generator
) -> tuple[RequestStates, list[np.ndarray]]:
    """Requests with blocks of 4 tokens in any order, and these blocks."""
    totals = [c + s for c, s in zip(computed, scheduled, strict=True)]
    counts = [-(-total // 4) for total in totals]
    ids = np.split(1 + rng.permutation(sum(counts) + 5)[: sum(counts)], np.cumsum(counts)[:-1])
    states = RequestStates(8, 128, 4, torch.device("cpu"))
    new = [
        NewRequest(i, i, np.zeros(total, np.int32), total, ids[i].tolist(), GREEDY, 0) for i, total in enumerate(totals)
    ]
    states.apply(Step(0, (), tuple(new), {}, ScheduledBatch.of(computed, scheduled)))
    return states, ids


requests = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(2, 4), st.booleans(), st.booleans(), st.sampled_from([None, 1, 6]), st.integers(0, 99))
def test_every_row_finds_its_tokens(
    lens: list[tuple[int, int]], num_ranks: int, by_heads: bool, steps_by_heads: bool, window: int | None, seed: int
) -> None:
    """After fetching and exchanging, a row's table leads to all of its tokens, of this step and of earlier ones."""
    computed, scheduled = zip(*lens, strict=True)
    batch, rng = ScheduledBatch.of(computed, scheduled), np.random.default_rng(seed)
    states, ids = states_of(computed, scheduled, rng)
    layout: Layout = HeadLayout(num_ranks) if steps_by_heads else TokenLayout(num_ranks)
    plan, num_blocks = plan_step(batch, layout), sum(map(len, ids)) + 6
    # What stands for an entry: its request and position.
    before = np.full((num_blocks, 4), -1)
    for request, blocks in enumerate(ids):
        for position in range(computed[request]):
            before[blocks[position // 4], position % 4] = 1000 * request + position
    gathered = np.full(num_ranks * plan.num_padded_tokens, -1)
    gathered[plan.gathered_idx()] = 1000 * plan.request_idx[plan.token_row()] + plan.token_position()
    for rank in range(num_ranks):
        inputs = prepare(batch, plan, states, rank, 4)
        share = LayerShare(8, by_heads, num_ranks, 4, window)
        [placement] = plan_fetch(batch, inputs, rank, 4, num_blocks, [share]).placements.values()
        owners, places = owner_of(np.arange(num_blocks), num_ranks), place_of(np.arange(num_blocks), num_ranks)
        peer = (rank + 1) % num_ranks
        workspace = np.full((placement.num_blocks, 4), -1)
        for source in placement.sources:
            if by_heads and source.rank != peer:
                continue
            for place, first, count in source.runs:
                for i in range(count):
                    if by_heads:
                        block = place + i
                    else:
                        [block] = np.flatnonzero((owners == source.rank) & (places == place + i) & (places > 0))
                    workspace[first + i] = before[block]
        slots = placement.slots.numpy()
        workspace.reshape(-1)[slots[slots > 0]] = gathered[slots > 0]
        rows = plan.rows_of(rank)
        for row, request in enumerate(plan.request_idx[rows]):
            end = int(inputs.metadata.seq_lens_np[row])
            found = workspace[placement.block_tables_np[row]].reshape(-1)[:end]
            low = 0 if window is None else max(0, int(plan.start[rows][row]) + 1 - window)
            np.testing.assert_array_equal(found[low:], 1000 * request + np.arange(low, end))


def test_heads_are_split_with_their_sinks() -> None:
    spec = AttentionSpec(8, 4, 16, 16, 1.0, sinks=torch.arange(8.0))
    parts = split_heads(spec, 2)
    assert [(part.num_heads, part.num_kv_heads) for part in parts] == [(4, 2)] * 2
    assert torch.equal(torch.cat([part.sinks for part in parts if part.sinks is not None]), torch.arange(8.0))
