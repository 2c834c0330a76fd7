"""What memory ranks take while they load a checkpoint, with whole and with sharded weights.

    python benchmarks/loading.py -pcp 2 --layers 12 --hidden 1024 --output-json F
    python benchmarks/loading.py -pcp 2 --model DIR

Without a model it writes one of random numbers, as several safetensors files and as a GGUF file (Q8_0). Of each rank,
looked at every few milliseconds: host memory of its own (anonymous), and shared with the other ranks. Pages of files
that are read are the kernel's to drop, so they are told apart. On GPUs also the most memory of each GPU that was in
use, of all programs; ranks share the only GPU of a machine that has one.
"""

import argparse
import json
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import torch
from shared_gpu import enough_gpus, in_use
from transformers import AutoModelForCausalLM, LlamaConfig

from twofold import LLM
from twofold.bench.report import environment, print_table

LOOK_SECONDS = 0.004
KINDS = {"RssAnon:": "own", "RssShmem:": "shared", "RssFile:": "files"}


class Watch(threading.Thread):
    """Notes the most memory that each child of this process took."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))  # pid -> kind -> bytes
        self.device: dict[int, int] = defaultdict(int)
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.wait(LOOK_SECONDS):
            for child in psutil.Process().children(recursive=True):
                try:
                    lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                except OSError:
                    continue
                for line in lines:
                    name, _, value = line.partition("\t")
                    if name in KINDS:
                        kinds = self.most[child.pid]
                        kinds[KINDS[name]] = max(kinds[KINDS[name]], int(value.split()[0]) << 10)
            for device, num_bytes in enumerate(in_use()):
                self.device[device] = max(self.device[device], num_bytes)

    def end(self) -> None:
        self._ends.set()
        self.join()


def config_of(num_layers: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=num_layers, head_dim=64,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, vocab_size=8192,
    )  # fmt: skip


def write_safetensors(folder: Path, config: LlamaConfig, max_shard_size: str) -> str:
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size=max_shard_size
    )
    return str(folder)


def write_gguf(folder: Path, config: LlamaConfig) -> str:
    """The same shape in blocks of 8 bits."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    of_layer = {
        "attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner), "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_embd", "output"), (config.vocab_size, hidden))
    shapes["output_norm"] = (hidden,)
    for layer in range(config.num_hidden_layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            numbers = rng.standard_normal(shape, np.float32) * 0.02
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def measure(model: str, weights: str, num_ranks: int, arguments: dict[str, Any]) -> dict[str, Any]:
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    with (
        enough_gpus(num_ranks) as more,
        LLM(
            model, weights=weights, prefill_context_parallel_size=num_ranks, skip_tokenizer_init=True,
            max_model_len=1024, step_layout="heads", kv_cache_memory_bytes=1 << 28, max_num_batched_tokens=2048,
            enforce_eager=True, **arguments, **more,
        ) as llm,
    ):  # fmt: skip
        seconds = time.perf_counter() - start
        executor: Any = llm.engine.executor
        pids, reports = executor.pids, llm.engine.reports
    watch.end()
    ranks = [{kind: round(size / 1e6) for kind, size in watch.most[pid].items()} for pid in pids]
    return {
        "weights": weights,
        "seconds": round(seconds, 1),
        "kept MB": [round(report.weight_bytes / 1e6) for report in reports],
        "host MB": ranks,
        "device MB": [round(size / 1e6) for size in watch.device.values()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("-pcp", "--prefill-context-parallel-size", type=int, default=2, dest="num_ranks")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--max-shard-size", default="80MB")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--output-json")
    args = parser.parse_args()
    checkpoints = []
    with tempfile.TemporaryDirectory() as folder:
        models, config = [args.model], config_of(args.layers, args.hidden)
        if args.model is None:
            models = [write_safetensors(Path(folder), config, args.max_shard_size), write_gguf(Path(folder), config)]
        for model in models:
            place = Path(model)
            files = [path.stat().st_size for path in ([place] if place.is_file() else place.glob("*.safetensors"))]
            rows = [
                measure(model, weights, args.num_ranks, {"load_format": args.load_format, "dtype": "bfloat16"})
                for weights in ("replicated", "sharded")
            ]
            about = {
                "format": place.suffix.removeprefix(".") or "safetensors",
                "files": len(files),
                "largest file MB": round(max(files, default=0) / 1e6),
                "MB": round(sum(files) / 1e6),
            }
            print(about)
            print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
            checkpoints.append({"checkpoint": about, "runs": rows})
    if args.output_json:
        result = {"checkpoints": checkpoints, "environment": environment()}
        Path(args.output_json).write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
