"""Times products of few tokens with their experts' weights: ours as it is, and with other sizes of its programs.

    python benchmarks/expert_linear.py --output-json F           of one rank, and of one of two by heads
    python benchmarks/expert_linear.py --compile 3/12            only compiles every 12th, for the next run to find

The shapes are DeepSeek-V2-Lite's: 64 experts, 6 of them a token. "random" tokens choose by themselves, "same" ones all
choose alike. Calls are captured in a CUDA graph that goes round the weights of several layers.
"""

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import median_us

from twofold.bench.report import environment
from twofold.models.transforms import expert_linear

NUM_EXPERTS, TOP_K, HIDDEN, INNER = 64, 6, 2048, 1408
NUM_LAYERS, NUM_CALLS, NUM_REPLAYS = 4, 8, 7
TOKENS = {"1": (1, False), "8": (8, False), "32": (32, False), "32 same": (32, True)}
CONSTANTS = ("BLOCK_PAIRS", "BLOCK_N", "BLOCK_K", "NUM_WARPS", "NUM_STAGES", "FEW_STAGES")
TILES = [
    (32, 64, 2, 6), (32, 128, 2, 4), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 5), (64, 64, 4, 6), (64, 128, 4, 3),
    (64, 128, 4, 4), (64, 128, 8, 4), (128, 64, 4, 4),
]  # fmt: skip
Config = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of weights, of several layers, and tokens."""

    name: str
    weights: list[torch.Tensor]
    x: torch.Tensor
    expert_ids: list[torch.Tensor]  # of each layer

    def call(self, layer: int) -> torch.Tensor:
        return expert_linear._expert_linear(
            self.x, self.weights[layer], self.expert_ids[layer], NUM_EXPERTS, is_transposed=False
        )

    def num_bytes(self) -> float:
        """Of the weights of chosen experts, mean of the layers."""
        of_expert = self.weights[0][0].numel() * 2
        return statistics.mean(len(ids.unique()) * of_expert for ids in self.expert_ids)

    def check(self) -> None:
        """Against a product for each pair, in float32."""
        weight, ids = self.weights[0].flatten(1, -2), self.expert_ids[0]
        x = self.x.repeat_interleave(len(ids) // len(self.x), 0)
        right = torch.stack([weight[expert].float() @ row.float() for row, expert in zip(x, ids.tolist(), strict=True)])
        found = self.call(0).float()
        assert (found - right).norm() <= 4e-3 * right.norm(), self.name

    def time_us(self) -> float:
        for layer in range(NUM_LAYERS):
            self.call(layer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(NUM_CALLS):
                self.call(number % NUM_LAYERS)
        return median_us(graph.replay, NUM_REPLAYS) / NUM_CALLS


def cases() -> Iterator[Case]:
    make = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, shape[-1] ** -0.5, generator=make)

    ups = [random(NUM_EXPERTS, 2 * INNER, HIDDEN) for _ in range(NUM_LAYERS)]
    downs = [random(NUM_EXPERTS, HIDDEN, INNER) for _ in range(NUM_LAYERS)]
    weights = {
        "up": ups,
        "down": downs,
        "half of up": [up.unflatten(1, (2, -1)).chunk(2, dim=2)[0] for up in ups],
        "half of down": [down.chunk(2, dim=2)[0].unsqueeze(1) for down in downs],
    }
    for (name, of_layers), (tokens, (num_tokens, same)) in itertools.product(weights.items(), TOKENS.items()):
        ids = []
        for _ in range(NUM_LAYERS):
            chosen = torch.rand(num_tokens, NUM_EXPERTS, device="cuda", generator=make).argsort(1)[:, :TOP_K]
            ids.append((chosen[:1].expand(num_tokens, -1) if same else chosen).reshape(-1).contiguous())
        width = of_layers[0].shape[-1]
        num_rows = num_tokens if name.endswith("up") else num_tokens * TOP_K
        yield Case(f"{name}, {tokens}", of_layers, random(num_rows, width), ids)


def configurations() -> list[Config]:
    today = tuple(getattr(expert_linear, name) for name in CONSTANTS)
    return list(dict.fromkeys([today, *((16, *tile, tile[-1]) for tile in TILES)]))


def use(config: Config) -> None:
    for name, value in zip(CONSTANTS, config, strict=True):
        setattr(expert_linear, name, value)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", metavar="I/N")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    configs, every = configurations(), list(cases())
    if args.compile:
        index, number = map(int, args.compile.split("/"))
        for config in configs[index::number]:
            use(config)
            for case in every:
                try:
                    case.call(0)
                except Exception as error:
                    print(config, case.name, str(error).splitlines()[0])
        return
    rows: list[dict[str, Any]] = []
    slower: dict[Config, list[float]] = defaultdict(list)
    for case in every:
        us: dict[Config, float] = {}
        for config in configs:
            use(config)
            try:
                case.check()
                us[config] = case.time_us()
            except Exception as error:  # the others are still worth knowing
                print(case.name, config, type(error).__name__, str(error).splitlines()[:1], flush=True)
        best, num_bytes = min(us.values()), case.num_bytes()
        for config, value in us.items():
            slower[config].append(value / best)
        ranking = sorted(us, key=lambda config: us[config])[:5]
        rows.append(
            {"case": case.name, "bytes": num_bytes, "us": {str(config): round(t, 2) for config, t in us.items()}}
        )
        today = us.get(configs[0], float("nan"))
        print(f"{case.name:20} today {today:7.1f} us {num_bytes / today / 1e6:5.2f} TB/s | best", end=" ")
        print(", ".join(f"{config} {us[config]:.1f}" for config in ranking), flush=True)
    mean = {config: statistics.geometric_mean(values) for config, values in slower.items() if len(values) == len(rows)}
    print(CONSTANTS)
    for config in sorted(mean, key=lambda config: mean[config])[:10]:
        print(config, f"{mean[config]:.3f}", [f"{value:.2f}" for value in slower[config]])
    if args.output_json:
        args.output_json.write_text(json.dumps(environment() | {"constants": CONSTANTS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
