"""TTFT and decode of one engine, to compare two source trees in turns on one machine.

    PYTHONPATH=old/src python benchmarks/before_after.py before configs/Llama-3.1-8B 2 2048,8192 before.json
    PYTHONPATH=src     python benchmarks/before_after.py after  configs/Llama-3.1-8B 2 2048,8192 after.json

It uses only what every version has: `LLM.generate`. Weights and prompts are random, prefix caching is off. TTFT is the
time of one token. A decode step is a 128th of what 128 more tokens take, after prompts of 1,024 tokens. Each figure is
[median, least].
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from twofold import LLM, SamplingParams
from twofold.bench.report import environment


def main() -> None:
    label, model, size, lens, path = sys.argv[1:]
    prompt_lens, rng = [int(part) for part in lens.split(",")], np.random.default_rng(0)
    start = time.perf_counter()
    with LLM(
        model,
        prefill_context_parallel_size=int(size),
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=max(*prompt_lens, 1024) + 200,
        max_num_seqs=32,
    ) as llm:
        ready = time.perf_counter() - start

        def milliseconds(length: int, batch_size: int, num_tokens: int) -> float:
            ids = rng.integers(0, llm.engine.vocab_size, (batch_size, length)).tolist()
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            begin = time.perf_counter()
            llm.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
            return (time.perf_counter() - begin) * 1e3

        ttft, decode = {}, {}
        for length in prompt_lens:
            milliseconds(length, 1, 1)
            ttft[length] = _summary([milliseconds(length, 1, 1) for _ in range(7 if length <= 8192 else 4)])
        for batch_size in (1, 32):
            milliseconds(1024, batch_size, 3)
            pairs = [(milliseconds(1024, batch_size, 1), milliseconds(1024, batch_size, 129)) for _ in range(4)]
            decode[batch_size] = _summary([(many - one) / 128 for one, many in pairs])
    figures = {"label": label, "model": Path(model).name, "pcp": int(size), "ready_s": round(ready, 1)}
    result = environment() | figures | {"ttft_ms": ttft, "decode_ms_per_step": decode}
    print(json.dumps(figures | {"ttft_ms": ttft, "decode_ms_per_step": decode}))
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def _summary(values: list[float]) -> list[float]:
    return [round(statistics.median(values), 2), round(min(values), 2)]


if __name__ == "__main__":
    main()
