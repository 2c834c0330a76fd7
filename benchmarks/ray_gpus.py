"""Two Ray nodes of one GPU each whose NCCL has sockets only: tokens against Transformers', TTFT against one GPU's.

    python benchmarks/ray_gpus.py --lens 2048 8192 32768 --output-json F

The nodes are namespaces with a link between them, or addresses of loopback where namespaces cannot be made. If there is
one GPU, both nodes have it: each is told that it is another host (NCCL_HOSTID), and the ranks take turns. Tokens are
those of a small model in float32, times those of random weights in bfloat16. Without a GPU ranks are CPUs and use gloo.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from shapes import CONFIGS, write_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from two_machines import greedy, prompts, two_machines, write

from clusters import Machines  # isort: skip  # which two_machines finds

from twofold import LLM
from twofold.bench.report import bytes_per_token, environment
from twofold.executor.ray import RayExecutor

SOCKETS_ONLY = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket"}
SMALL, LENS, NUM_TOKENS = "Llama-132M", (1, 3, 31, 500, 2500), 24


def start(model: str, backend: str, **arguments: Any) -> LLM:
    """One rank, or one on each node of Ray's."""
    return LLM(
        model,
        prefill_context_parallel_size=2 if backend == "ray" else 1,
        distributed_executor_backend=backend,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=8 << 30 if torch.cuda.is_available() else 1 << 30,
        **arguments,
    )


def compare_tokens(folder: Path, **arguments: Any) -> dict[str, int]:
    config, device = dict(CONFIGS[SMALL]), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    made = CONFIG_MAPPING[config.pop("model_type")](**config)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).to(device).eval()
    model.save_pretrained(folder)
    asked = [prompt for length in LENS for prompt in prompts(1, length)]
    expected = []
    for prompt in asked:
        ids = torch.tensor([prompt["prompt_token_ids"]], device=device)
        answer = model.generate(ids, do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=None)
        expected.append(answer[0, ids.shape[1] :].tolist())
    del model
    equal = {"answers": len(asked)}
    for backend in ("mp", "ray"):
        with start(
            str(folder), backend, dtype="float32", max_model_len=4096, max_num_batched_tokens=1000, **arguments
        ) as llm:
            found = [o.outputs[0].token_ids for o in llm.generate(asked, greedy(NUM_TOKENS), use_tqdm=False)]
        name = "one rank" if backend == "mp" else "two nodes"
        equal[f"equal to Transformers', {name}"] = sum(map(list.__eq__, found, expected))
    return equal


def ttft(model: str, lens: list[int], repeats: int, machines: Machines, **arguments: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"prompt tokens": length} for length in lens]
    for name, backend in (("one rank", "mp"), ("two nodes", "ray")):
        with start(model, backend, max_model_len=max(lens) + 1, load_format="dummy", **arguments) as llm:
            for row in rows:
                times, before = [], 0
                for index, prompt in enumerate(prompts(repeats + 1, row["prompt tokens"])):
                    begin, before = time.perf_counter(), num_bytes(machines)
                    llm.generate([prompt], greedy(1), use_tqdm=False)
                    if index:
                        times.append(1e3 * (time.perf_counter() - begin))
                row[f"{name} ms"] = round(median(times), 1)
                if isinstance(llm.engine.executor, RayExecutor):
                    assert llm.engine.executor.runtime.num_nodes == 2
                    entries = row["prompt tokens"] * bytes_per_token(llm.engine)["stored"]
                    row["bytes on the link to KV entries"] = round((num_bytes(machines) - before) / entries, 3)
                print(name, row, flush=True)
    return rows


def num_bytes(machines: Machines) -> int:
    """That went over the link, or over loopback."""
    return machines.num_link_bytes() if machines.has_link else psutil.net_io_counters(pernic=True)["lo"].bytes_recv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="Llama-3.1-8B")
    parser.add_argument("--lens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--enforce-eager", action="store_true", help="starts sooner")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    own = [SOCKETS_ONLY | {"NCCL_HOSTID": f"node-{node}"} for node in range(2)]
    if num_gpus:
        own = [one | {"CUDA_VISIBLE_DEVICES": str(node % num_gpus)} for node, one in enumerate(own)]
    flags = [f"--num-gpus={min(1, num_gpus)}", "--num-cpus=1"]
    with (
        two_machines(f"tf{os.getpid() % 10000}g", flags=flags, own=own) as machines,
        tempfile.TemporaryDirectory() as folder,
    ):
        os.environ.update(machines.environment | {"RAY_ADDRESS": machines.ray_address})
        with machines.inside():
            result: dict[str, Any] = {"GPUs": num_gpus, "of nodes": {"link": machines.has_link} | SOCKETS_ONLY}
            (Path(folder) / "small").mkdir()
            result["tokens"] = compare_tokens(Path(folder) / "small", enforce_eager=True)
            print(result, flush=True)
            model = write_config(args.model, Path(folder))
            arguments = {"dtype": "bfloat16", "enforce_eager": args.enforce_eager}
            result["ttft"] = ttft(model, args.lens, args.repeats, machines, **arguments)
    write(args, result | {"model": args.model, "environment": environment()})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
