"""Compare every served family with Transformers, on one to four ranks, in each layout of steps and with both mixed.

    python benchmarks/families.py --output-json benchmarks/results/cpu-families.json [TYPE ...]
    python benchmarks/families.py --kv-cache sharded --output-json benchmarks/results/cpu-families-sharded.json

Tiny random models in float32, ranks as threads. Prompts come in chunks, a second pass finds their prefixes in the
cache, and the cache is so small that requests are preempted. Prints the largest error of a prompt token's
log-probability, and whether greedy tokens are those of Transformers' own forward.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from harness import generate, make_engine, prompt_logprobs, reference_continuation, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model

from twofold.bench.report import environment
from twofold.errors import ModelError
from twofold.models.support import ONLY_BY_TOKENS, causal_model_types, refusal
from twofold.sampling_params import SamplingParams

PROMPT_LENS = (1, 3, 37, 70)
WAYS = [(1, "tokens"), (2, "heads"), (2, "mixed"), (3, "mixed"), (4, "heads"), (4, "mixed")]
NUM_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--kv-cache", choices=("replicated", "sharded"), default="replicated")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    for model_type in args.types or causal_model_types():
        try:
            model = tiny_model(tiny_config(model_type))
            if refusal(model.config) is None:
                rows += compare(model_type, model, args.kv_cache)
        except ModelError:
            continue
        except Exception as error:
            if args.types:
                raise
            print(model_type, "cannot be made:", str(error)[:100], file=sys.stderr)
    worst = max(row["max_error"] for row in rows)
    exact = sum(row["same_tokens"] for row in rows)
    num_types = len({row["type"] for row in rows})
    print(f"{len(rows)} runs of {num_types} types: {exact} with the same tokens, error {worst:.1e}")
    if args.output_json:
        result = {"environment": environment(), "largest_error": worst, "num_exact": exact, "runs": rows}
        args.output_json.write_text(json.dumps(result, indent=1) + "\n")


def compare(model_type: str, model: PreTrainedModel, kv_cache: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB_SIZE, length).tolist() for length in PROMPT_LENS]
    expected = [reference_logprobs(model, prompt) for prompt in prompts]
    continuations = [reference_continuation(model, prompt, NUM_TOKENS) for prompt in prompts]
    rows = []
    for num_ranks, layout in WAYS:
        if layout == "heads" and model_type in ONLY_BY_TOKENS:
            continue
        start = time.perf_counter()
        try:
            engine = make_engine(
                model, num_ranks, step_layout=layout, max_num_batched_tokens=40, max_model_len=96,
                num_blocks=13 if kv_cache == "replicated" else 13 // num_ranks + 1, block_size=8, kv_cache=kv_cache,
            )  # fmt: skip
        except ModelError:
            if num_ranks == 2:
                raise
            continue  # nothing divides by so many ranks
        by_heads = engine.reports[0].only_by_tokens is None
        found = prompt_logprobs(engine, prompts)
        same = True
        for _ in range(2):  # the second pass finds prefixes in the cache
            outputs = generate(engine, prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
            for output, tokens in zip(outputs, continuations, strict=True):
                same = same and output.outputs[0].token_ids[: len(tokens)] == tokens
        engine.shutdown()
        error = max(float(np.abs(mine - theirs).max(initial=0)) for mine, theirs in zip(found, expected, strict=True))
        rows.append(
            {"type": model_type, "ranks": num_ranks, "layout": layout if by_heads else "tokens",
             "kv_cache": "sharded" if engine.is_sharded else "replicated", "max_error": error,
             "same_tokens": same, "seconds": round(time.perf_counter() - start, 1)}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
