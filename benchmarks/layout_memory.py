"""What memory the second layout of steps takes: `step_layout="auto"` against steps by tokens only.

    python benchmarks/layout_memory.py --shape Llama-132M TinyLlama-1.1B --output-json F
    python benchmarks/layout_memory.py --shape Llama-3.1-8B --runs 1 --output-json F        on GPUs, or on one

Engines of both kinds take turns, and serve the same prompts and answers. Then memory of each rank is read: on a CPU its
own with its part of what ranks share (PSS), on GPUs all that is in use there, graphs and contexts included, so nothing
else may use them. Two ranks share the only GPU of a machine that has one (`tests/gpu/one_gpu.py`). Memory for sums over
ranks is there in either case, so it is added to what "auto" takes more: all of it, though a page that no sum has used
takes none.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from shapes import CONFIGS, write_config
from shared_gpu import NUM_GPUS, enough_gpus, in_use

from twofold import LLM, SamplingParams
from twofold.bench.report import environment, print_table
from twofold.worker.cuda_graphs import HEADS_PREFILL

LENGTHS = (16, 64, 300, 900)  # of prompts
NUM_RANKS = 2
LIMIT = 0.02  # of the weights
PUSHED_BYTES = 2 * NUM_RANKS << 20  # on GPUs beside other memory for sums: two buffers with a part for each rank


def pss(pid: int) -> int:
    """Bytes of a process, its share of what it shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def rank_bytes(folder: str, layout: str, arguments: dict[str, Any]) -> tuple[list[int], int]:
    """→ bytes of each rank after some work, and of a whole copy of the weights."""
    with (
        enough_gpus(NUM_RANKS) as more,
        LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, prefill_context_parallel_size=NUM_RANKS,
            step_layout=layout, max_model_len=1024, kv_cache_memory_bytes=1 << 28, **arguments, **more,
        ) as llm,
    ):  # fmt: skip
        rng = np.random.default_rng(0)
        prompts = [{"prompt_token_ids": rng.integers(3, llm.engine.vocab_size, n).tolist()} for n in LENGTHS]
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        for prompt in prompts:
            llm.generate(prompt, params, use_tqdm=False)
        llm.generate(prompts, params, use_tqdm=False)
        executor: Any = llm.engine.executor
        on_gpus = in_use()
        each = on_gpus[:NUM_RANKS] if len(on_gpus) > 1 else [used // NUM_RANKS for used in on_gpus]
        return each or [pss(pid) for pid in executor.pids], llm.engine.reports[0].weight_bytes


def measure(name: str, dtype: str, num_runs: int) -> dict[str, Any]:
    runs: dict[str, list[float]] = {"tokens": [], "auto": []}
    with tempfile.TemporaryDirectory() as folder:
        write_config(name, Path(folder))
        for _ in range(num_runs):
            for layout, found in runs.items():
                each, weights = rank_bytes(folder, layout, {"dtype": dtype})
                found.append(statistics.mean(each))
    more = statistics.median(runs["auto"]) - statistics.median(runs["tokens"])
    sums = 2 * HEADS_PREFILL[-1] * CONFIGS[name]["hidden_size"] * {"float32": 4, "bfloat16": 2}[dtype]
    sums += PUSHED_BYTES * (NUM_GPUS > 0)
    return {
        "shape": name,
        "dtype": dtype,
        "weights MB": round(weights / 1e6, 1),
        **{f"{layout} MB": [round(size / 1e6, 1) for size in found] for layout, found in runs.items()},
        "more MB": round(more / 1e6, 2),
        "sums MB": round(sums / 1e6, 2),
        "of the weights": round((more + sums) / weights, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["Llama-132M", "TinyLlama-1.1B"], choices=list(CONFIGS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    rows = [measure(name, dtype, args.runs) for name in args.shape for dtype in args.dtype]
    print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    if args.output_json:
        result = {"ranks": NUM_RANKS, "limit": LIMIT, "rows": rows} | environment()
        args.output_json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["of the weights"] > LIMIT for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
