"""One request of very many tokens: time to its first token, then milliseconds a token, against what arithmetic allows.

    python benchmarks/long_context.py -pcp 2 --len 1000000 --flops 600e12 --bandwidth 3.9e12 --output-json F
    python benchmarks/long_context.py -pcp 2 --capacity 8 --output-json F

Without --model, of Llama-3.1-8B's shape with random weights, its RoPE scaled for so many positions. --flops and
--bandwidth are what one GPU reaches: products a second, and bytes a second of its memory. With --capacity (GiB of KV
cache a rank) no request runs: it tells the tokens that fit when each rank keeps all of the cache, and a share.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from twofold import LLM
from twofold.bench.latency import start_drive
from twofold.bench.report import bytes_per_token, describe, environment
from twofold.config import EngineConfig
from twofold.engine.engine import LLMEngine
from twofold.flags import add_engine_arguments, chosen
from twofold.sampling_params import SamplingParams

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
TRAINED_LEN = 8192  # before its RoPE was scaled
NUM_STEPS = 32  # decodes, of which the median is taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser, leave_out=("model",))
    parser.add_argument("--model", help="directory or hub name (default: Llama-3.1-8B's shape)")
    parser.add_argument("--len", type=int, default=1_000_000, help="tokens of the prompt")
    parser.add_argument("--flops", type=float, default=600e12)
    parser.add_argument("--bandwidth", type=float, default=2.3e12)
    parser.add_argument("--capacity", type=float, help="GiB of KV cache on each rank: only count tokens")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    arguments = chosen(args, EngineConfig) | {"skip_tokenizer_init": True, "load_format": "dummy"}
    arguments.setdefault("step_timeout", 900.0)
    arguments.setdefault("max_num_seqs", 8)
    with tempfile.TemporaryDirectory() as folder:
        arguments["model"] = args.model or write_config(Path(folder), args.len + NUM_STEPS + 16)
        result = capacity(args.capacity, arguments) if args.capacity else one_request(args, arguments)
    print(json.dumps(result, indent=1))
    if args.output_json:
        args.output_json.write_text(json.dumps(result | {"environment": environment()}, indent=1) + "\n")


def write_config(folder: Path, num_positions: int) -> str:
    scaling = {
        "rope_type": "llama3", "factor": float(max(8, -(-num_positions // TRAINED_LEN))), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": TRAINED_LEN,
    }  # fmt: skip
    config = LLAMA_8B | {"max_position_embeddings": num_positions, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def capacity(gib: float, arguments: dict[str, Any]) -> dict[str, Any]:
    """Tokens that fit into so much memory of each rank, with either holding."""
    arguments = arguments | {"kv_cache_memory_bytes": int(gib * 2**30), "enforce_eager": True}
    arguments.setdefault("max_model_len", 8192)
    found: dict[str, Any] = {}
    for holding in ("replicated", "sharded"):
        with LLM(**arguments, kv_cache=holding) as llm:
            room = llm.engine.reports[0].sharded
            found[f"{holding} tokens"] = llm.engine.kv_cache_capacity
            if holding == "sharded" and room is not None:
                found["workspace GiB beside it"] = round(room.workspace_bytes / 2**30, 3)
    found["max_model_len"] = arguments["max_model_len"]
    return found | {"ratio": round(found["sharded tokens"] / found["replicated tokens"], 4)}


def one_request(args: argparse.Namespace, arguments: dict[str, Any]) -> dict[str, Any]:
    arguments.setdefault("max_model_len", args.len + NUM_STEPS + 16)
    start = time.perf_counter()
    with LLM(**arguments) as llm:
        engine = llm.engine
        print(f"ready after {time.perf_counter() - start:.0f} s; {engine.kv_cache_capacity} tokens fit", flush=True)
        time_request(engine, min(args.len, 2 * engine.runtime.max_num_batched_tokens))  # compiles, and warms up
        ttft, step_ms = time_request(engine, args.len)
        floors = least_times(engine, args.len, args.flops, args.bandwidth)
        room = engine.reports[0].sharded
        told = {"workspace GiB": round(room.workspace_bytes / 2**30, 2)} if room and engine.is_sharded else {}
        settings = describe(engine) | {"bytes_per_token": bytes_per_token(engine)} | told
        settings["tokens that fit"] = engine.kv_cache_capacity
    return {
        "prompt": args.len, "ttft_s": round(ttft, 3), "least_ttft_s": round(floors[0], 3),
        "decode_ms": round(step_ms, 3), "least_decode_ms": round(floors[1], 3),
        "ttft / least": round(ttft / floors[0], 3), "decode / least": round(step_ms / floors[1], 3),
        "flops": args.flops, "bandwidth": args.bandwidth,
    } | settings  # fmt: skip


def time_request(engine: LLMEngine, length: int) -> tuple[float, float]:
    """Seconds to the first token, and median milliseconds from one token to the next."""
    engine.reset_prefix_cache()
    ids = np.random.default_rng(length).integers(0, engine.vocab_size, length).tolist()
    ends, start = [], time.perf_counter()
    with start_drive(engine) as drive:
        drive.add("prompt", ids, SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True))
        for outputs in drive:
            if outputs:
                ends.append(time.perf_counter())
    return ends[0] - start, float(np.median(np.diff(ends)[3:-2])) * 1e3


def least_times(engine: LLMEngine, length: int, flops: float, bandwidth: float) -> tuple[float, float]:
    """Seconds of a prefill of so many tokens, and milliseconds of a decode after it, if all ranks only computed, and
    only read weights and cache, at these rates."""
    config, num_ranks = engine.runtime.model_config.get_text_config(), engine.runtime.num_ranks
    num_weights, num_layers = engine.reports[0].num_parameters, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = config.vocab_size * config.hidden_size  # looked up; after the last token the head is as large
    products = 2 * (num_weights - embedding) * length
    products += 2 * num_layers * config.num_attention_heads * head_dim * length**2  # half of all pairs, twice
    entries = engine.reports[0].bytes_per_block / engine.runtime.block_size * length
    read = num_weights * engine.runtime.dtype.itemsize + entries
    return products / (num_ranks * flops), read / (num_ranks * bandwidth) * 1e3


if __name__ == "__main__":
    main()
