"""Play prompts on 2 to 128 nodes of 8 GPUs, by the model of time and a link: efficiency, and which link suffices.

    python benchmarks/clusters.py --output-json benchmarks/results/simulated-clusters.json \
        --png benchmarks/results/simulated-clusters.png

A simulation, with figures of H100s (`planning/processors.py`). A step is cut over all ranks; each node sends its KV
entries once to every other node, layer by layer. *waits* is what the engine does: a layer's attention begins when all
entries are there. *overlaps*: it begins with the node's own entries, and takes the others as they come. Efficiency is
the TTFT on one node over (nodes x TTFT on all of them).

The published run that it is compared with: Llama-3-405B, 1M tokens, 128 H100s on 16 nodes, 77 s, 93 % parallelization
efficiency, 63 % of the peak ("Context Parallelism for Scalable Million-Token Inference", arXiv 2411.01783).
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import CONFIGS
from transformers import CONFIG_MAPPING

from twofold.bench.report import environment, print_table
from twofold.models.sizes import model_shape
from twofold.planning.processors import KNOWN, Link
from twofold.planning.shape import ModelShape
from twofold.planning.times import Setup, TimeModel, with_reach

GPU, PER_NODE = KNOWN["h100"], 8
MODELS = ("Llama-3.1-8B", "Llama-3.1-70B", "DeepSeek-V2-Lite")
LENS = (8192, 32768, 131072, 1_000_000)
LINKS = (10.0, 25.0, 100.0, 400.0, 3200.0)  # Gbit/s of a node
NODES = (2, 8, 32, 128)
PUBLISHED = {
    "model": "Llama-3.1-405B",
    "prompt": 1_000_000,
    "gpus": 128,
    "nodes": 16,
    "ttft_s": 77.0,
    "efficiency": 0.93,
}
ASSUMED_LINKS = {"400 Gbit/s a GPU": 3200.0, "100 Gbit/s a GPU": 800.0}


def shape_of(name: str) -> ModelShape:
    config = dict(CONFIGS[name])
    return model_shape(CONFIG_MAPPING[config.pop("model_type")](**config), torch.bfloat16)


def ttft(shape: ModelShape, length: int, num_nodes: int, gbps: float, overlaps: bool) -> float:
    """Seconds; weights are shared within a node where they are large."""
    num_ranks = PER_NODE * num_nodes
    setup = Setup(
        num_ranks,
        num_nodes=num_nodes,
        link=Link(gbps) if num_nodes > 1 else None,
        overlaps_link=overlaps,
        shards_weights=shape.whole > GPU.memory / 2,
        max_num_batched_tokens=32768 * num_ranks,
    )
    return TimeModel(shape, GPU, setup).ttft(length)


def play(shape: ModelShape, name: str) -> list[dict[str, Any]]:
    rows = []
    for length in LENS:
        alone = ttft(shape, length, 1, LINKS[-1], False)
        for num_nodes in NODES:
            for gbps in LINKS:
                row: dict[str, Any] = {"model": name, "prompt": length, "nodes": num_nodes, "gbps": gbps}
                row["one node s"] = round(alone, 4)
                for how, overlaps in (("waits", False), ("overlaps", True)):
                    seconds = ttft(shape, length, num_nodes, gbps, overlaps)
                    row[f"{how} s"] = round(seconds, 4)
                    row[f"{how} efficiency"] = round(alone / (num_nodes * seconds), 4)
                rows.append(row)
    return rows


def compare_with_published() -> list[dict[str, Any]]:
    """Llama-3-405B as it was published.

    Its kernels are given the speed that the published figures say they have alone: (FLOPs / 77 s / 128 GPUs) / 93 %. So
    what is compared is the rest, 5.4 s: sums, links, overheads. Its layers ran by heads within a node, so a layer has
    two sums of a node's tokens. It sent entries around a ring, behind attention. The links' rates are assumed.
    """
    shape, published = shape_of(PUBLISHED["model"]), PUBLISHED
    length, num_gpus, num_nodes = published["prompt"], published["gpus"], published["nodes"]
    flops = 2 * shape.layers / shape.itemsize * length
    flops += sum(layer.pair_flops for layer in shape.attention) * length**2 / 2
    reached = flops / published["ttft_s"] / num_gpus
    share = reached / published["efficiency"] / GPU.flops
    gpu = with_reach(GPU, products=share, sustained=share, attention={256: share})
    rows = []
    for name, gbps in ASSUMED_LINKS.items():
        for how, overlaps in (("waits", False), ("overlaps", True)):
            setup = Setup(num_gpus, num_nodes, Link(gbps), overlaps, max_num_batched_tokens=length)
            # By heads a node's GPUs see only the entries of their heads: no exchange within a node, but sums.
            parts = TimeModel(shape, gpu, setup).prefill(0, length)
            within = TimeModel(shape, gpu, replace(setup, num_nodes=1, link=None)).prefill(0, length).traffic
            sums = TimeModel(shape, gpu, Setup(PER_NODE)).sums(length // num_nodes)
            seconds = parts.total - within + sums
            kernels = flops / num_gpus / (share * gpu.flops)
            rows.append({
                "link": name, "gbps of a node": gbps, "how": how, "simulated s": round(seconds, 2),
                "published s": published["ttft_s"], "ratio": round(seconds / published["ttft_s"], 3),
                "simulated efficiency": round(kernels / seconds, 3), "published efficiency": published["efficiency"],
                "simulated rest s": round(seconds - kernels, 2),
                "published rest s": round(published["ttft_s"] * (1 - published["efficiency"]), 2),
                "kernels TFLOP/s": round(share * gpu.flops / 1e12, 1),
            })  # fmt: skip
    return rows


def which_link(rows: list[dict[str, Any]], how: str) -> list[list[str]]:
    """For two nodes: model and prompt, then efficiency for each link."""
    table = []
    for name in MODELS:
        for length in LENS:
            of = {r["gbps"]: r for r in rows if (r["model"], r["prompt"], r["nodes"]) == (name, length, 2)}
            cells = [f"{of[gbps][f'{how} efficiency']:.0%}" for gbps in LINKS]
            table.append([name, f"{length:,}", f"{of[LINKS[0]]['one node s'] * 1e3:,.0f}", *cells])
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Efficiency against nodes for each link: as it waits (lines), and if it overlapped (dashes)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    lens = LENS[1:]
    figure, axes = plt.subplots(
        len(MODELS), len(lens), figsize=(11, 8), sharex=True, sharey=True, constrained_layout=True
    )
    for name, line in zip(MODELS, axes, strict=True):
        for length, panel in zip(lens, line, strict=True):
            for number, gbps in enumerate(LINKS):
                chosen = [r for r in rows if (r["model"], r["prompt"], r["gbps"]) == (name, length, gbps)]
                for how, style in (("waits", "-"), ("overlaps", "--")):
                    values = [100 * r[f"{how} efficiency"] for r in chosen]
                    label = f"{gbps:,.0f} Gbit/s" if how == "waits" else None
                    panel.plot(NODES, values, style, marker=".", color=f"C{number}", label=label)
            panel.set_title(f"{name}, {length:,} tokens", fontsize=9)
            panel.set(xscale="log", ylim=(0, 105))
            panel.set_xticks(NODES, [str(n) for n in NODES])
            panel.xaxis.minorticks_off()
    axes[0, 0].legend(fontsize=7, title="link of a node", title_fontsize=7)
    figure.supxlabel("nodes of 8 H100s")
    figure.supylabel("efficiency against one node, %")
    figure.suptitle("Simulated: lines wait for entries, dashes overlap them with attention")
    figure.savefig(path, dpi=80)
    plt.close(figure)
    Image.open(path).quantize(32).save(path, optimize=True)  # a quarter of the size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    rows = [row for name in MODELS for row in play(shape_of(name), name)]
    published = compare_with_published()
    header = ["model", "prompt", "one node, ms", *(f"{gbps:,.0f} Gbit/s" for gbps in LINKS)]
    for how in ("waits", "overlaps"):
        print(f"\n2 nodes of {PER_NODE}, {how}")
        print_table(header, which_link(rows, how))
    print()
    print_table(list(published[0]), [[str(value) for value in row.values()] for row in published])
    if args.output_json:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        record = json.dumps({"published": PUBLISHED, "compared": published} | environment(), indent=1)
        args.output_json.write_text(record[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
