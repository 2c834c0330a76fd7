"""Whether a GPU's memory stays within `gpu_memory_utilization` when a step samples as many rows as it may.

    python benchmarks/gpu_memory.py --model configs/Llama-3.1-8B --utilization 0.8 --output-json F

256 prompts end in the same step, all sampled with top-p, a repetition penalty and 20 log-probabilities, and one of them
asks for those of its prompt; then all decode. Memory is read off the GPU every 2 ms meanwhile.
"""

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from twofold import LLM, SamplingParams
from twofold.bench.report import environment


class Peak:
    """Most bytes of each GPU in use by anyone, from `start` on."""

    def __init__(self) -> None:
        self.used = [0] * torch.cuda.device_count()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ends.is_set():
            for index in range(len(self.used)):
                free, total = torch.cuda.mem_get_info(index)
                self.used[index] = max(self.used[index], total - free)
            time.sleep(0.002)

    def stop(self) -> list[int]:
        self._ends.set()
        self._thread.join()
        return self.used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("-pcp", type=int, default=1)
    parser.add_argument("--utilization", type=float, default=0.8)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    peak = Peak()
    with LLM(
        args.model,
        prefill_context_parallel_size=args.pcp,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=8192,
        max_num_seqs=256,
        gpu_memory_utilization=args.utilization,
    ) as llm:
        vocab_size, capacity = llm.engine.vocab_size, llm.engine.kv_cache_capacity
        hard = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": 20, "ignore_eos": True}
        params = [SamplingParams(**hard, max_tokens=8, prompt_logprobs=20 if i == 0 else None) for i in range(256)]
        lens = [8000, *[100] * 255]
        for _ in range(2):
            prompts = [{"prompt_token_ids": rng.integers(0, vocab_size, length).tolist()} for length in lens]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
    used, total = peak.stop()[: args.pcp], torch.cuda.get_device_properties(0).total_memory
    shares = [round(one / total, 4) for one in used]
    print(f"asked for {args.utilization}, peak {shares} of {total / 2**30:.1f} GiB, cache of {capacity} tokens")
    if args.output_json:
        result = environment() | {"asked": args.utilization, "peak": shares, "cache_tokens": capacity}
        Path(args.output_json).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if max(shares) <= args.utilization else 1


if __name__ == "__main__":
    sys.exit(main())
