"""The engine on GPUs against Transformers: heads and latents, eager and compiled, with graphs, on one rank and more."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
from one_gpu import MAX_NUM_BATCHED_TOKENS, enough_gpus

from twofold import LLM, SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPT_LENS = (1, 2, 3, 4, 7, 8, 31, 500, 2500)
RANKS = [1, 2] + [4] * (torch.cuda.device_count() > 3)


def smollm2() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        head_dim=64,
        tie_word_embeddings=True,
    )


def deepseek() -> DeepseekV2Config:
    """Heads and latents as wide as DeepSeek-V2's, the rest small; without queries' latents, as in V2-Lite."""
    return DeepseekV2Config(
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        vocab_size=49152,
        max_position_embeddings=8192,
    )


@pytest.fixture(scope="module", params=[smollm2, deepseek], ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded random model."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(request.param()).float().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 49152, length).tolist() for length in PROMPT_LENS]


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()


def engine(folder: Path, num_ranks: int, **arguments: object) -> LLM:
    with enough_gpus(num_ranks) as more:
        return LLM(
            str(folder),
            prefill_context_parallel_size=num_ranks,
            skip_tokenizer_init=True,
            kv_cache_memory_bytes=1 << 30,  # others use the GPU at the same time
            max_num_seqs=32,
            **{"max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS} | arguments,
            **more,
        )


@torch.inference_mode()
def logprobs_of(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """[T, vocab_size], on the CPU."""
    return model(torch.tensor([prompt], device="cuda"), use_cache=False).logits[0].float().log_softmax(-1).cpu()


def assert_as_close(ours: torch.Tensor, theirs: torch.Tensor, right: torch.Tensor) -> None:
    assert (ours - right).norm() <= 1.5 * (theirs - right).norm() + 1e-3 * right.norm() ** 0.5, len(right)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_float32_tokens_are_those_of_transformers(
    folder: Path, prompts: list[list[int]], num_ranks: int, enforce_eager: bool
) -> None:
    """Compiled layers, graphs and exchange change no token; chunks of 1000 tokens mix prefills with decodes."""
    model = load(folder, torch.float32)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        answer = model.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=None)
        expected.append(answer[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with engine(folder, num_ranks, dtype="float32", enforce_eager=enforce_eager, max_num_batched_tokens=1000) as llm:
        for _ in range(2):  # the second time from the prefix cache
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        # Alone, 2·P tokens are a step of rows of one token, which is no step of decodes.
        [(prompt, answer)] = [pair for pair in zip(prompts, expected, strict=True) if len(pair[0]) == 2 * num_ranks]
        llm.engine.block_pool.reset_prefix_cache()
        [output] = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        assert output.outputs[0].token_ids == answer
        assert llm.engine.is_idle


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_answers_that_share_a_prefix(folder: Path, num_ranks: int, enforce_eager: bool) -> None:
    """Seven answers read their prompt once in each step, also where another request is in the step."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 49152, length).tolist() for length in (6000, 300)]
    model, expected = load(folder, torch.float32), []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        answer = model.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=None)
        expected.append(answer[0, len(prompt) :].tolist())
    params = [SamplingParams(top_k=1, max_tokens=24, ignore_eos=True, n=n) for n in (7, 1)]
    with engine(folder, num_ranks, dtype="float32", enforce_eager=enforce_eager) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for output, tokens in zip(outputs, expected, strict=True):
        assert [answer.token_ids for answer in output.outputs] == [tokens] * len(output.outputs)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_bfloat16_is_as_close_to_float32_as_transformers(
    folder: Path, prompts: list[list[int]], num_ranks: int
) -> None:
    """FlashAttention-4 over blocks, graphs of padded prefills: answers differ by rounding only.

    Steps with prompt log-probabilities use no graph, so those of the next token are compared separately.
    """
    prompts = [prompt for prompt in prompts if len(prompt) > 2]
    exact = [logprobs_of(load(folder, torch.float32), prompt) for prompt in prompts]
    theirs = [logprobs_of(load(folder, torch.bfloat16), prompt) for prompt in prompts]
    of_prompts = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    of_next = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    with engine(folder, num_ranks, dtype="bfloat16", enable_prefix_caching=False) as llm:
        given = [{"prompt_token_ids": p} for p in prompts]
        outputs = llm.generate(given, of_prompts, use_tqdm=False)
        together = llm.generate(given, of_next, use_tqdm=False)
        alone = [llm.generate(prompt, of_next, use_tqdm=False)[0] for prompt in given]
    for prompt, output, right, other in zip(prompts, outputs, exact, theirs, strict=True):
        entries = output.prompt_logprobs or []
        ours = torch.tensor([e[t].logprob for e, t in zip(entries[1:], prompt[1:], strict=True) if e is not None])
        ids = torch.tensor(prompt[1:])[:, None]
        assert len(ours) == len(ids)
        assert_as_close(ours, *(x[:-1].gather(-1, ids)[:, 0] for x in (other, right)))
    for answers in (together, alone):
        entries = [output.outputs[0].logprobs[0] for output in answers if output.outputs[0].logprobs]
        ours = torch.tensor([entry.logprob for e in entries for entry in e.values()])
        assert len(ours) >= 20 * len(prompts)
        assert_as_close(
            ours,
            *(torch.cat([x[-1][list(e)] for x, e in zip(xs, entries, strict=True)]) for xs in (theirs, exact)),
        )
