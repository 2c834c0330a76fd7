"""How many tokens fit where each rank keeps a share of the KV cache, by the arithmetic of ranks and engine; no GPU.

    python benchmarks/capacity.py -pcp 2 --output-json benchmarks/results/capacity.json

Of each model in bfloat16, sharded over replicated holdings: in the same bytes of cache on each rank
(`kv_cache_memory_bytes`), and on whole GPUs, where workspaces and buffers of sharded holdings are taken off and weights
that a rank no longer keeps make room. There "cache" has whole weights, "both" has parts of them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from shapes import CONFIGS
from transformers import CONFIG_MAPPING

from twofold.bench.report import environment, print_table
from twofold.engine.block_pool import BlockPool
from twofold.kv.cache import bytes_per_block
from twofold.kv.sharded import LayerShare, max_num_blocks
from twofold.models.sizes import model_shape
from twofold.planning.processors import KNOWN
from twofold.planning.room import Wish, room
from twofold.planning.shape import ModelShape
from twofold.runtime import GPU_BLOCK_SIZE

MODELS = ("Llama-3.1-8B", "DeepSeek-V2-Lite")
CACHE_BYTES = 16 << 30  # of each rank
UTILIZATION = 0.9
DTYPE = torch.bfloat16


def shape_of(name: str) -> ModelShape:
    config = dict(CONFIGS[name])
    return model_shape(CONFIG_MAPPING[config.pop("model_type")](**config), DTYPE)


def shares_of(shape: ModelShape, num_ranks: int) -> list[LayerShare]:
    """How a rank divides each layer's entries."""
    return [
        LayerShare(layer.entry_numbers, layer.has_divided_entries(num_ranks), num_ranks, layer.num_heads, layer.window)
        for layer in shape.attention
    ]


def in_bytes(shape: ModelShape, num_ranks: int, num_bytes: int = CACHE_BYTES) -> dict[str, int]:
    """Tokens in `num_bytes` of each rank, as ranks report blocks and the engine's pool counts tokens."""
    widths, shares = [layer.entry_numbers for layer in shape.attention], shares_of(shape, num_ranks)
    blocks = {
        "replicated": num_bytes // bytes_per_block(widths, GPU_BLOCK_SIZE, DTYPE),
        "cache": max_num_blocks(shares, num_bytes, GPU_BLOCK_SIZE, DTYPE),
    }
    return {holding: BlockPool(number, GPU_BLOCK_SIZE).capacity_tokens for holding, number in blocks.items()}


def on_gpus(shape: ModelShape, num_ranks: int, gpu: str, max_model_len: int) -> dict[str, int]:
    """Tokens on so many GPUs."""
    usable, wish = int(KNOWN[gpu].memory * UTILIZATION), Wish(max_model_len)
    holdings = {"replicated": (False, False), "cache": (False, True), "both": (True, True)}
    return {
        name: room(shape, usable, num_ranks, wish, weights=weights, cache=cache).num_tokens
        for name, (weights, cache) in holdings.items()
    }


def measure(num_ranks: int) -> list[dict[str, Any]]:
    found = []
    for name in MODELS:
        shape, longest = shape_of(name), CONFIGS[name]["max_position_embeddings"]
        rows = {f"{CACHE_BYTES >> 30} GiB of cache": in_bytes(shape, num_ranks)}
        rows |= {KNOWN[gpu].name: on_gpus(shape, num_ranks, gpu, longest) for gpu in ("h100", "h200")}
        for where, tokens in rows.items():
            for holding in list(tokens)[1:]:
                found.append(
                    {
                        "model": name,
                        "ranks": num_ranks,
                        "each rank has": where,
                        "sharded": holding,
                        "replicated tokens": tokens["replicated"],
                        "sharded tokens": tokens[holding],
                        "ratio": round(tokens[holding] / tokens["replicated"], 4),
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-pcp", "--prefill-context-parallel-size", type=int, default=2, dest="num_ranks")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    rows = measure(args.num_ranks)
    print_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])
    if args.output_json:
        args.output_json.write_text(json.dumps({"rows": rows} | environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
