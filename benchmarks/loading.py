"""What memory ranks take while they load a checkpoint of several files, with whole and with sharded weights.

    python benchmarks/loading.py -pcp 2 --layers 12 --hidden 1024 --output-json F
    python benchmarks/loading.py -pcp 2 --model DIR

Without a model it writes one of random numbers. Of each rank, looked at every few milliseconds: host memory of its own
(anonymous), and shared with the other ranks. Pages of files that are read are the kernel's to drop, so they are told
apart. On GPUs also the most memory of each GPU that was in use, of all programs.
"""

import argparse
import json
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
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
            for device in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(device)
                self.device[device] = max(self.device[device], total - free)

    def end(self) -> None:
        self._ends.set()
        self.join()


def write_model(folder: Path, num_layers: int, hidden: int, max_shard_size: str) -> None:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=num_layers, head_dim=64,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, vocab_size=8192,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size=max_shard_size
    )


def measure(model: str, weights: str, num_ranks: int, arguments: dict[str, Any]) -> dict[str, Any]:
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    with LLM(
        model, weights=weights, prefill_context_parallel_size=num_ranks, skip_tokenizer_init=True, max_model_len=1024,
        step_layout="heads", kv_cache_memory_bytes=1 << 28, **arguments,
    ) as llm:  # fmt: skip
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
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or folder
        if args.model is None:
            write_model(Path(folder), args.layers, args.hidden, args.max_shard_size)
        files = [path.stat().st_size for path in Path(model).glob("*.safetensors")]
        rows = [
            measure(model, weights, args.num_ranks, {"load_format": args.load_format})
            for weights in ("replicated", "sharded")
        ]
    about = {"files": len(files), "largest file MB": round(max(files, default=0) / 1e6), "MB": round(sum(files) / 1e6)}
    print(about)
    print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    if args.output_json:
        result = {"checkpoint": about, "runs": rows, "environment": environment()}
        Path(args.output_json).write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
