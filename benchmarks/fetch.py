"""Time a layer's fetch between GPUs: how fast the parts come, and how much slower products beside it are.

    python benchmarks/fetch.py [--shape llama-8b|llama-70b|v2-lite] [--output-json F]

All ranks fetch at the same time. The weights of a layer are one column-wise and one row-wise matrix, or an expert's
stack of each, as many numbers as the model's layer has. A figure is the slowest rank's milliseconds, the median.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

from twofold.bench.report import environment, print_table
from twofold.parallel import fetch as fetch_module
from twofold.parallel.fetch import Fetch, PartCopy, dense_strides
from twofold.parallel.mesh import ProcessMesh
from twofold.parallel.peer_memory import Symmetric

# (shape, dim that is divided) of each weight of a layer
SHAPES: dict[str, list[tuple[tuple[int, ...], int]]] = {
    "llama-8b": [((6144, 4096), 0), ((4096, 4096), 1), ((28672, 4096), 0), ((4096, 14336), 1)],
    "llama-70b": [((10240, 8192), 0), ((8192, 8192), 1), ((57344, 8192), 0), ((8192, 28672), 1)],
    "v2-lite": [((3072, 2048), 0), ((2048, 2048), 1), ((64, 2, 1408, 2048), 2), ((64, 2048, 1408), 2)],
}
NUM_TOKENS = (512, 1024, 2048, 4096, 8192)
NUM_LAYERS, REPEATS = 16, 9


def make_layers(
    mesh: ProcessMesh, device: torch.device, shapes: list[tuple[tuple[int, ...], int]]
) -> tuple[list[list[PartCopy]], object]:
    """All layers come from the same parts, which are larger than the GPU's cache."""
    sizes = [torch.Size(shape).numel() * 2 for shape, _ in shapes]
    memory = Symmetric(mesh, device)
    everyones = memory.allocate(sum(sizes) // mesh.size)
    everyones[mesh.rank].zero_()
    layers = []
    for _ in range(2):
        copies, offset = [], 0
        for (shape, dim), size in zip(shapes, sizes, strict=True):
            whole = torch.zeros(shape, dtype=torch.bfloat16, device=device)
            for peer, place in enumerate(whole.chunk(mesh.size, dim=dim)):
                flat = everyones[peer][offset : offset + size // mesh.size].view(torch.bfloat16)
                part = flat.as_strided(place.shape, dense_strides(place), flat.storage_offset())
                copies.append(PartCopy(peer, part, place))
            offset += size // mesh.size
        layers.append(copies)
    return layers * (NUM_LAYERS // 2), memory


def run_rank(rank: int, size: int, folder: str, name: str) -> None:
    device = torch.device(f"cuda:{rank}")
    torch.cuda.set_device(device)
    mesh = ProcessMesh.join(rank, size, f"{folder}/store", device)
    layers, _memory = make_layers(mesh, device, SHAPES[name])
    num_bytes = sum(copy.part.nbytes for copy in layers[0] if copy.rank != rank)

    def time_layer(call: Callable[[], None]) -> float:
        """Milliseconds of a layer on the slowest rank."""
        times = []
        for _ in range(REPEATS + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flags = torch.zeros(size, device=device)
            mesh.all_gather(flags, flags[:1].clone())  # ranks begin together
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / NUM_LAYERS)
        mine = torch.tensor([statistics.median(times[2:])], device=device)
        everyones = mine.new_empty(size)
        mesh.all_gather(everyones, mine)
        return round(float(everyones.max()), 4)

    def step(fetch: Fetch | None, products: Callable[[], None]) -> None:
        for layer in range(NUM_LAYERS):
            if fetch is not None:
                fetch.begin(layer)
            products()
            if fetch is not None:
                fetch.end(layer)

    def only(kind: str) -> Fetch:
        chosen = [[c for c in copies if kind == "all" or (c.rank == rank) == (kind == "mine")] for copies in layers]
        return Fetch(chosen, mesh, device)

    rows = []
    with torch.inference_mode():
        for kind in ("all", "theirs", "mine"):
            fetch = only(kind)
            ms = time_layer(lambda fetch=fetch: step(fetch, lambda: None))  # type: ignore[misc]
            moved = num_bytes if kind != "mine" else sum(c.part.nbytes for c in layers[0] if c.rank == rank)
            rows.append({"what": f"fetch, {kind}", "tokens": 0, "ms": ms, "GB/s": round(moved / ms / 1e6)})
        found = fetch_module._copy_2d[:]
        fetch_module._copy_2d[:] = [None]
        fetch = only("theirs")
        ms = time_layer(lambda: step(fetch, lambda: None))
        speed = round(num_bytes / ms / 1e6)
        rows.append({"what": "fetch, theirs, rows by a kernel", "tokens": 0, "ms": ms, "GB/s": speed})
        fetch_module._copy_2d[:] = found
        rows[0]["rows by copy engines"] = str(found and found[0] is not None)
        dense = SHAPES["llama-8b" if name == "v2-lite" else name]  # products of experts depend on the routing
        weights = [torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02 for shape, _ in dense]
        for num_tokens in NUM_TOKENS:
            inputs = [torch.randn(num_tokens, w.shape[1], dtype=torch.bfloat16, device=device) for w in weights]

            def products(inputs: list[torch.Tensor] = inputs) -> None:
                for x, weight in zip(inputs, weights, strict=True):
                    torch.nn.functional.linear(x, weight)

            alone = time_layer(lambda products=products: step(None, products))  # type: ignore[misc]
            for kind in ("all", "theirs", "mine"):
                fetch = only(kind)
                beside = time_layer(lambda fetch=fetch, products=products: step(fetch, products))  # type: ignore[misc]
                rows.append(
                    {"what": f"products beside {kind}", "tokens": num_tokens, "ms": beside, "alone ms": alone,
                     "ratio": round(beside / alone, 3)}
                )  # fmt: skip
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    size = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (size, folder, args.shape), nprocs=size)
        rows = json.loads(Path(folder, "rows.json").read_text())
    columns = ["what", "tokens", "ms", "GB/s", "alone ms", "ratio", "rows by copy engines"]
    print_table(columns, [[str(row.get(column, "")) for column in columns] for row in rows])
    if args.output_json:
        result = environment() | {"shape": args.shape, "ranks": size, "rows": rows}
        args.output_json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
