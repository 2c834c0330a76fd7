"""Steps by heads: who computes what, which layout a step has, and that ranks never differ by a bit."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import ThreadExecutor, generate, make_engine, reference_continuation
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from transformers import PreTrainedModel

from twofold.contract import ScheduledBatch
from twofold.engine.engine import LLMEngine
from twofold.errors import ConfigError, ModelError
from twofold.models.decoder import DecoderModel
from twofold.models.holding import _tensors_of as tensors_of
from twofold.parallel.costs import StepCosts
from twofold.parallel.plan import HeadLayout, plan_step
from twofold.sampling_params import SamplingParams

COSTS = StepCosts(decode=((1, 4.0, 2.0), (9, 4.0, 6.0)), prefill=((16, 4.0, 2.0), (48, 4.0, 6.0)))
GREEDY = SamplingParams(temperature=0, max_tokens=6)


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist()


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Where they lie -> bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(tiny_config("llama"))


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[LLMEngine]:
    engine = make_engine(model, 2, step_layout="heads")
    yield engine
    engine.shutdown()


batches = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99)), min_size=1, max_size=9).map(
    lambda requests: ScheduledBatch.of(*zip(*requests, strict=True))
)


@given(batches, st.integers(1, 5))
def test_every_rank_computes_every_token(batch: ScheduledBatch, num_ranks: int) -> None:
    """And each request is sampled once, by one of the ranks, each of which has about as many."""
    plan = plan_step(batch, HeadLayout(num_ranks))
    total = int(batch.num_scheduled_tokens.sum())
    assert plan.num_tokens.tolist() == [total] * num_ranks
    for rank in range(num_ranks):
        rows = plan.rows_of(rank)
        np.testing.assert_array_equal(plan.request_idx[rows], np.arange(len(batch)))
        np.testing.assert_array_equal(plan.length[rows], batch.num_scheduled_tokens)
        np.testing.assert_array_equal(plan.start[rows], batch.num_computed_tokens)
    assert plan.defer_exchange
    sampled = plan.sampled_row[plan.sampled_row >= 0]
    assert sorted(plan.request_idx[sampled]) == list(range(len(batch)))
    assert np.ptp(np.bincount(plan.owner, minlength=num_ranks)) <= 1
    np.testing.assert_array_equal(plan.gathered_idx(), np.arange(num_ranks * total))


@pytest.mark.parametrize(
    ("computed", "scheduled", "by_heads"),
    [
        ([9], [1], True),
        ([9] * 4, [1] * 4, True),
        ([9] * 6, [1] * 6, False),  # costs are interpolated: they are equal at 5 decodes
        ([9] * 99, [1] * 99, False),
        ([0], [10], True),
        ([0], [31], True),
        ([0, 5], [20, 20], False),
        ([0], [49], False),  # longer than any that was measured
        ([0, 9], [5, 1], False),  # a chunk beside an answer
    ],
)
def test_a_step_runs_in_the_layout_that_costs_less(computed: list[int], scheduled: list[int], by_heads: bool) -> None:
    assert COSTS.by_heads(ScheduledBatch.of(computed, scheduled)) == by_heads


@pytest.mark.parametrize(("num_nodes", "by_heads"), [(1, False), (2, True)])
def test_by_heads_nodes_share_the_requests_of_a_step(num_nodes: int, by_heads: bool) -> None:
    """Four prompts of 12 tokens are too many for one node; two nodes have 24 tokens each."""
    assert replace(COSTS, num_nodes=num_nodes).by_heads(ScheduledBatch.of([0] * 4, [12] * 4)) == by_heads


def test_costs_are_read_as_they_are_told() -> None:
    assert StepCosts.from_json(COSTS.to_json()) == COSTS
    assert StepCosts.from_json(replace(COSTS, num_nodes=2).to_json()).num_nodes == 2


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"decode": [[1, 2]], "prefill": [[1, 2, 3]]}', '{"decode": [], "prefill": [[1, 2, 3]]}']
)
def test_other_costs_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="step_costs must be what an engine's log says"):
        StepCosts.from_json(text)


def test_costs_are_measured_once(model: PreTrainedModel) -> None:
    """New ranks for lost ones keep them, so an engine chooses alike as long as it lives."""
    engine = make_engine(model, 2, step_layout="auto")
    measured = engine.step_costs
    assert measured is not None
    assert all(ms > 0 for kind in (measured.decode, measured.prefill) for _, *costs in kind for ms in costs)
    engine.recover()
    assert engine.step_costs == measured
    engine.shutdown()


def test_the_second_layout_takes_no_memory_for_weights(engine: LLMEngine) -> None:
    """Its weights are views, and what else its modules keep is less than 2 % of them."""
    for runner in executor_of(engine).runners:
        assert runner.by_heads is not None
        whole, part = runner.by_tokens.model, runner.by_heads.model
        weights = storages([*whole.model.parameters(), *whole.body.parameters()])
        assert storages([*part.model.parameters(), *part.body.parameters()]).keys() <= weights.keys()
        first, second = (storages(t for half in (m.model, m.body) for t in tensors_of(half)) for m in (whole, part))
        more = sum(second[place] for place in second.keys() - first.keys())
        assert more <= 0.02 * sum(weights.values())
        assert sum(tensor.numel() for tensor in part.body.parameters()) < sum(
            tensor.numel() for tensor in whole.body.parameters()
        )


def test_hidden_states_are_the_same_bits_on_all_ranks(model: PreTrainedModel, engine: LLMEngine) -> None:
    """Else ranks would disagree about a token, now and then."""
    seen: list[list[torch.Tensor]] = []
    for runner in executor_of(engine).runners:
        states: list[torch.Tensor] = []
        seen.append(states)
        forward = runner._forward_eager

        def keep(*args: object, forward=forward, states=states) -> torch.Tensor:  # type: ignore[no-untyped-def]
            states.append(forward(*args).clone())
            return states[-1]

        runner._forward_eager = keep
    outputs = generate(engine, [prompt_of(40), prompt_of(3)], GREEDY)
    assert outputs[0].outputs[0].token_ids == reference_continuation(model, prompt_of(40), 6)
    assert len(seen[0]) == len(seen[1]) >= 6
    for mine, others in zip(*seen, strict=True):
        assert torch.equal(mine, others)


def test_entries_travel_once_a_step_and_words_are_chosen_from_candidates(engine: LLMEngine) -> None:
    generate(engine, [prompt_of(40), prompt_of(3)], GREEDY)
    executor = executor_of(engine)
    sums = 2 * 4  # of each of four layers
    width = 2 * 2 * 16 // 2  # of half an entry: keys and values of one of two heads
    mesh = executor.meshes[0]
    assert mesh.calls == executor.meshes[1].calls
    calls = mesh.calls[-(sums + 2) :]  # of the last decode
    assert calls[sums] == (4 * 2, width)  # both requests, all layers
    assert calls[sums + 1] == (2, 2, 1)  # scores and ids of two rows
    assert all(len(shape) == 1 for shape in calls[:sums])


def test_what_does_not_divide_is_computed_whole(model: PreTrainedModel) -> None:
    """Two KV heads on four ranks: attention is whole on each, and its entries need not travel."""
    engine = make_engine(model, 4, step_layout="heads")
    generate(engine, [prompt_of(20)], GREEDY)
    executor = executor_of(engine)
    assert executor.runners[0].by_heads is not None
    assert [spec.num_heads for spec in executor.runners[0].by_heads.model.specs] == [4] * 4
    assert not any(shape[-1:] == (64,) for shape in executor.meshes[0].calls if len(shape) == 2)
    engine.shutdown()


def test_a_model_without_a_plan_says_so() -> None:
    model = tiny_model(tiny_config("gpt2"))
    engine = make_engine(model, 2, step_layout="auto")
    assert engine.reports[0].only_by_tokens == "no projection of it is known to divide"
    engine.shutdown()
    with pytest.raises(ModelError, match=r"steps cannot run by heads: no projection .*; use step_layout='auto'"):
        make_engine(model, 2, step_layout="heads")


def test_a_wrong_plan_is_found(model: PreTrainedModel) -> None:
    """Names prove nothing: here a plan would divide what must be whole."""
    wrong = copy.deepcopy(model)
    wrong.base_model._tp_plan = dict(wrong.base_model._tp_plan) | {"layers.*.mlp.up_proj": "colwise_gather_output"}
    del wrong.base_model._tp_plan["layers.*.mlp.gate_proj"]
    wrong.base_model._tp_plan["layers.*.mlp.up_proj"] = "colwise"
    engine = make_engine(wrong, 2, step_layout="auto")
    assert "it fails by heads" in str(engine.reports[0].only_by_tokens)
    engine.shutdown()
    assert DecoderModel(copy.deepcopy(wrong)).sum is None


def executor_of(engine: LLMEngine) -> ThreadExecutor:
    assert isinstance(engine.executor, ThreadExecutor)
    return engine.executor
