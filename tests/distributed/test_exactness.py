"""SmolLM2 in float32 answers as Transformers' `generate` does, token by token, however the work is split.

`benchmarks/exactness.py` tries all combinations of ranks, chunks and lengths, in ten minutes. Here every value is
tried, but not every combination.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from harness import ThreadExecutor, generate, make_engine, prompt_logprobs, reference_logprobs
from transformers import AutoTokenizer, PreTrainedModel

from twofold import LLM, SamplingParams
from twofold.executor.local import LocalExecutor
from twofold.outputs import RequestOutput

TEXT = Path(__file__).parents[2] / "examples" / "alice.txt"
PROMPT_LENS = (1, 2, 3, 7, 31, 500)
LONG = 4000
NUM_NEW_TOKENS = 64
Answers = list[tuple[list[int], list[int]]]  # prompt, Transformers' answer


@pytest.fixture(scope="module")
def text(demo_model_directory: Path) -> list[int]:
    """Token ids of English prose; it is repeated where it is not long enough."""
    ids: list[int] = AutoTokenizer.from_pretrained(demo_model_directory).encode(TEXT.read_text())
    return ids + ids


def answer_of(model: PreTrainedModel, prompt: list[int], num_tokens: int = NUM_NEW_TOKENS) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens, eos_token_id=2
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture(scope="module")
def answers(smollm2: PreTrainedModel, text: list[int]) -> Answers:
    """Prompts from different places, so that none is the beginning of another."""
    prompts = [text[100 * n : 100 * n + length] for n, length in enumerate(PROMPT_LENS)]
    return [(prompt, answer_of(smollm2, prompt)) for prompt in prompts]


def assert_answers(outputs: list[RequestOutput], answers: Answers, num_tokens: int = NUM_NEW_TOKENS) -> None:
    for output, (prompt, tokens) in zip(outputs, answers, strict=True):
        assert output.outputs[0].token_ids == tokens[:num_tokens], f"prompt of {len(prompt)} tokens"


EOS = frozenset({2})


@pytest.mark.parametrize(("num_ranks", "num_tokens"), [(1, 24), (2, NUM_NEW_TOKENS), (3, 24), (4, 24)])
def test_all_prompts_in_one_batch(smollm2: PreTrainedModel, answers: Answers, num_ranks: int, num_tokens: int) -> None:
    """Whole prompts, on threads; and the log-probabilities of every prompt token."""
    engine = make_engine(smollm2, num_ranks, max_model_len=1024, eos_token_ids=EOS)
    prompts = [prompt for prompt, _ in answers]
    params = SamplingParams(temperature=0, max_tokens=num_tokens)
    assert_answers(generate(engine, prompts, params), answers, num_tokens)
    for prompt, found in zip(prompts, prompt_logprobs(engine, prompts), strict=True):
        np.testing.assert_allclose(found, reference_logprobs(smollm2, prompt), rtol=0, atol=1e-4)
    engine.shutdown()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_chunks_and_cached_prefixes(smollm2: PreTrainedModel, answers: Answers, num_ranks: int) -> None:
    """Chunks of 64 tokens in steps with decodes; a second pass finds most of each prompt in the cache."""
    engine = make_engine(smollm2, num_ranks, max_model_len=1024, max_num_batched_tokens=64, eos_token_ids=EOS)
    params = SamplingParams(temperature=0, max_tokens=16)
    for num_cached in (0, 496):
        outputs = generate(engine, [prompt for prompt, _ in answers], params)
        assert_answers(outputs, answers, 16)
        assert outputs[-1].num_cached_tokens == num_cached
    engine.shutdown()


def test_preemption(smollm2: PreTrainedModel, answers: Answers) -> None:
    """A pool of 8 blocks, for prompts that need 3 or 5 each before they end."""
    engine = make_engine(smollm2, 2, max_model_len=120, num_blocks=9, max_num_batched_tokens=20, eos_token_ids=EOS)
    short = answers[-2::-1]  # the longest first: it grows at the cost of the others
    params = SamplingParams(temperature=0, max_tokens=40)
    assert_answers(generate(engine, [prompt for prompt, _ in short], params), short, 40)
    assert isinstance(engine.executor, ThreadExecutor)
    starts = Counter(new.number for step in engine.executor.steps for new in step.new)
    assert max(starts.values()) > 1
    engine.shutdown()


@pytest.mark.parametrize(("num_ranks", "number"), [(4, 2), (2, 4), (3, 3)])
def test_a_prompt_alone(smollm2: PreTrainedModel, answers: Answers, num_ranks: int, number: int) -> None:
    """Most ranks have nothing to do in every step but the first."""
    engine = make_engine(smollm2, num_ranks, max_model_len=256, eos_token_ids=EOS)
    prompt, tokens = answers[number]
    params = SamplingParams(temperature=0, max_tokens=24)
    assert_answers(generate(engine, [prompt], params), [(prompt, tokens)], 24)
    engine.shutdown()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", prefill_context_parallel_size=2, dtype="float32", max_num_batched_tokens=8192) as llm:
        yield llm


def test_processes_do_not_copy_the_weights(llm: LLM, smollm2: PreTrainedModel) -> None:
    """Half a gigabyte of weights once a machine: what a rank has for itself before its first step is less than that."""
    assert isinstance(llm.engine.executor, LocalExecutor)
    size = sum(parameter.nbytes for parameter in smollm2.parameters())
    memory = [psutil.Process(pid).memory_full_info() for pid in llm.engine.executor.pids]
    assert all(rank.uss < size < rank.rss for rank in memory)


def test_a_long_prompt_on_processes(llm: LLM, smollm2: PreTrainedModel, answers: Answers, text: list[int]) -> None:
    """4,000 tokens and all the short prompts in one batch of two processes; then again, out of the cache."""
    prompt = text[10 : 10 + LONG]
    num_tokens = 24
    everything = [(prompt, answer_of(smollm2, prompt, num_tokens)), *answers]
    for num_cached in (0, LONG - 16):
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in everything]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=num_tokens), use_tqdm=False)
        assert_answers(outputs, everything, num_tokens)
        assert outputs[0].num_cached_tokens == num_cached
    assert llm.engine.is_idle
