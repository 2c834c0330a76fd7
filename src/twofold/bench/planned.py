"""What `twofold plan` needs of a machine: what its processor reaches, and a run to compare a plan with."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from twofold.bench.latency import time_batch
from twofold.bench.report import machine
from twofold.machine import usable_cores
from twofold.planning.answer import Table
from twofold.planning.processors import KNOWN, Processor, Reach

NUM_TIMES = 3  # of each thing that is timed
NUM_TOKENS = 12  # of an answer whose steps are timed
CALLS_OF_LAYER = 40  # of small operations in a layer's code: norms, RoPE, reshaping


def this_processor(dtype: torch.dtype, num_ranks: int, width: int) -> Processor:
    """A GPU of this machine that is known; or what one of `num_ranks` ranks on its CPU reaches, timed in a second
    with products of `width` columns."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        for known in KNOWN.values():
            if known.name.split()[0] in name and abs(_gpu_memory() / known.memory - 1) < 0.1:
                return known
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, usable_cores() // num_ranks))
    try:
        return _this_cpu(dtype, width)
    finally:
        torch.set_num_threads(threads)


def _gpu_memory() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)


def _this_cpu(dtype: torch.dtype, width: int) -> Processor:
    """By products as wide as the model's: with few rows they take the time to read their weights."""
    small = torch.nn.Linear(64, 64, dtype=dtype, bias=False)
    one, row = torch.ones(1, 64, dtype=dtype), torch.ones(1, width, dtype=dtype)
    rows, whole = torch.ones(128, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    weights = torch.ones(max(2, (1 << 28) // whole.nbytes), width, width, dtype=dtype)  # more than caches hold
    heads, copied = torch.ones(1, 8, 512, 64, dtype=dtype), torch.empty_like(weights)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        flops = 2 * rows.numel() * width / _seconds(lambda: rows @ whole)
        bandwidth = weights.nbytes / _seconds(lambda: [row @ weight for weight in weights])
        link = weights.nbytes / _seconds(lambda: copied.copy_(weights))
        attention = 2 * 8 * 512 * 512 / 2 * 128 / _seconds(lambda: attend(heads, heads, heads, is_causal=True))
        call = _seconds(lambda: small(one)) * 1e6
    layer = CALLS_OF_LAYER * call
    reach = Reach(
        source="the same second; overheads by the time of a small product", products=1.0, sustained=1.0,
        expert_products=1.0, divided_expert_products=1.0, attention={128: attention / flops}, attention_ramp=0.0,
        memory=1.0, activations=1.0, peer=1.0, fetch=1.0, sums=1.0, decode_layer=layer, decode_sparse_layer=layer,
        prefill_layer=layer, prefill_sparse_layer=layer, exchange=10 * call, sum=10 * call, long_context=0.0,
        request=10 * call, prompt=100 * call, prompt_token=0.0,
    )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Processor(machine(), memory, flops, bandwidth, link, reach, "measured here in a second")


def _seconds(run: Callable[[], object]) -> float:
    """The least of a few times, each of at least a hundredth of a second."""
    run()
    start = time.perf_counter()
    run()
    repeats = max(1, int(0.01 / max(time.perf_counter() - start, 1e-7)))
    times = []
    for _ in range(NUM_TIMES):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        times.append((time.perf_counter() - start) / repeats)
    return min(times)


def measure(arguments: dict[str, Any], table: Table) -> dict[str, Any]:
    """Runs an engine with random weights → what a plan says, as it is: bytes, tokens that fit, milliseconds."""
    from twofold import LLM, SamplingParams

    with LLM(**arguments, skip_tokenizer_init=True, enable_prefix_caching=False) as llm:
        engine, report = llm.engine, llm.engine.reports[0]
        rng = np.random.default_rng(0)

        def ttft(length: int) -> float:
            prompt = {"prompt_token_ids": rng.integers(0, engine.vocab_size, length).tolist()}
            start = time.perf_counter()
            llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
            return (time.perf_counter() - start) * 1e3

        prompts = [
            {"prompt": length, "ms": round(statistics.median([ttft(length) for _ in range(1 + NUM_TIMES)][1:]), 3)}
            for length in table.lens
        ]
        tokens = []
        for batch in table.batches:
            _, steps = time_batch(engine, batch, table.context, NUM_TOKENS, seed=batch)
            if steps:
                tokens.append({"batch": batch, "context": table.context, "ms": round(statistics.median(steps), 3)})
        return {
            "machine": machine(),
            "weights": engine.runtime.weights,
            "kv_cache": "sharded" if engine.is_sharded else "replicated",
            "weight bytes": report.weight_bytes,
            "tokens that fit": engine.kv_cache_capacity,
            "time to first token": prompts,
            "from token to token": tokens,
        }
