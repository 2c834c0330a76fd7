"""Ranks as processes on pretended nodes: they share memory within a node only, and answer as ever."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from harness import generate, prompt_logprobs, reference_continuation, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from transformers import PreTrainedModel

from twofold.config import EngineConfig
from twofold.engine.engine import LLMEngine
from twofold.executor.local import LocalExecutor
from twofold.runtime import settle
from twofold.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=5)
PROMPTS = [np.random.default_rng(n).integers(3, VOCAB_SIZE, n).tolist() for n in (1, 3, 20, 150)]
CASES = {"llama": (4, 2), "deepseek_v2": (2, 2)}  # number of ranks and of nodes


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(tiny_config(request.param, num_hidden_layers=2))


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLMEngine]:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    num_ranks, num_nodes = CASES[model.config.model_type]
    config = EngineConfig(
        model=str(folder),
        prefill_context_parallel_size=num_ranks,
        dtype="float32",
        skip_tokenizer_init=True,
        block_size=8,
    )
    runtime = replace(settle(config)[0], num_nodes=num_nodes)
    engine = LLMEngine(runtime, None, partial(LocalExecutor, runtime))
    yield engine
    engine.shutdown()


def test_answers_are_those_of_transformers(engine: LLMEngine, model: PreTrainedModel) -> None:
    """In both layouts; at the second time prompts begin with cached blocks."""
    assert engine.reports[0].only_by_tokens is None
    for layout in engine.in_each_layout():
        for prompt, found in zip(PROMPTS, prompt_logprobs(engine, PROMPTS), strict=True):
            np.testing.assert_allclose(found, reference_logprobs(model, prompt), rtol=0, atol=1e-4, err_msg=layout)
        for prompt, output in zip(PROMPTS, generate(engine, PROMPTS, GREEDY), strict=True):
            tokens = reference_continuation(model, prompt, 5)
            assert output.outputs[0].token_ids[: len(tokens)] == tokens, layout


def test_a_prompt_crosses_the_link_once(engine: LLMEngine) -> None:
    """KV entry x layers bytes for each of its tokens, within 5 %, whatever the number of ranks on a node."""
    prompt = np.random.default_rng(7).integers(3, VOCAB_SIZE, 201).tolist()
    entries = engine.reports[0].bytes_per_block // engine.runtime.block_size * len(prompt)
    for layout in engine.in_each_layout():
        if layout == "tokens":
            before = engine.stats.node_bytes
            generate(engine, [prompt], SamplingParams(temperature=0, max_tokens=1))
            assert entries <= engine.stats.node_bytes - before <= 1.05 * entries


def test_ranks_of_a_node_share_its_weights(engine: LLMEngine) -> None:
    """In a file of the node, not of all ranks: other machines could not map it."""
    assert isinstance(engine.executor, LocalExecutor)
    files = [weight_file(pid) for pid in engine.executor.pids]
    size = engine.runtime.ranks_per_node
    of_nodes = [set(files[first : first + size]) for first in range(0, len(files), size)]
    if size == 1:
        assert files == [None, None]  # alone on its node, a rank has weights of its own
    else:
        assert all(len(some) == 1 for some in of_nodes)
        assert of_nodes[0] != of_nodes[1]


def weight_file(pid: int) -> str | None:
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "twofold-weights" in line]
    return f"{lines[0][3]} {lines[0][4]}" if lines else None
