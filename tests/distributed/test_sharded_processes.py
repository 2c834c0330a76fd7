"""Sharded weights between processes: each reads its part of a checkpoint of several files, into memory that all map."""

import os
import signal
from pathlib import Path

import numpy as np
import torch
from harness import reference_continuation, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model

from twofold import LLM, SamplingParams
from twofold.executor.local import LocalExecutor


def test_answers_survive_a_lost_rank(tmp_path: Path) -> None:
    """Experts, stored one by one, with ranks that are killed and load their parts again."""
    model = tiny_model(tiny_config("mixtral"))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    prompt = np.random.default_rng(0).integers(3, VOCAB_SIZE, 40).tolist()
    params = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=0)
    with LLM(
        str(tmp_path), weights="sharded", prefill_context_parallel_size=2, skip_tokenizer_init=True, max_model_len=128
    ) as llm:
        layers = sum(p.nbytes for p in model.base_model.layers.parameters() if p.dim() > 1)
        routers = sum(p.nbytes for n, p in model.named_parameters() if n.endswith(("gate.weight", "router.weight")))
        whole = sum(p.nbytes for p in model.parameters())
        assert [report.weight_bytes for report in llm.engine.reports] == [whole - (layers - routers) // 2] * 2
        for _ in range(2):
            [output] = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
            assert output.outputs[0].token_ids == reference_continuation(model, prompt, 6)
            entries = (output.prompt_logprobs or [])[1:]
            found = torch.tensor([e[t].logprob for e, t in zip(entries, prompt[1:], strict=True) if e is not None])
            np.testing.assert_allclose(found, reference_logprobs(model, prompt), rtol=0, atol=1e-4)
            assert isinstance(llm.engine.executor, LocalExecutor)
            os.kill(llm.engine.executor.pids[1], signal.SIGKILL)
