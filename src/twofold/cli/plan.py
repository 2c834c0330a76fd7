"""say what a model would take on some GPUs: memory, tokens that fit, times, links

Nothing is loaded, and no GPU is needed: the model's configuration gives bytes, and a model of time gives milliseconds.
Its figures come from measurements of Twofold on H100s and H200s, or else from a GPU's published figures; the answer
says which. With --measure it also runs the model here, with random weights, and compares.
"""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from twofold import ConfigError, ModelError
from twofold.config import EngineConfig
from twofold.flags import add_engine_arguments, whole_number
from twofold.planning.answer import Machines, Table, answer
from twofold.planning.processors import KNOWN, Link, Processor
from twofold.planning.room import Wish

LENS, CONTEXT = (1024, 8192, 32768, 131072), 8192  # of which those that max_model_len allows are said
BATCHES = (1, 8, 32)
CPU_LENS, CPU_CONTEXT = (64, 256), 64
CPU_CACHE_BYTES, CPU_BLOCK_SIZE, CPU_BATCHED_TOKENS = 2 << 30, 16, 2048  # of a rank, as an engine has them
USED = (
    "model", "revision", "download_dir", "hf_overrides", "trust_remote_code", "dtype", "max_model_len",
    "max_num_batched_tokens", "max_num_seqs", "block_size", "weights", "kv_cache", "kv_cache_memory_bytes",
    "gpu_memory_utilization", "step_layout", "partition_policy",
)  # fmt: skip
LIKENESS = 0.05  # of --memory and a known GPU's: then times are that GPU's


def configure(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("machines")
    group.add_argument("--gpus", "-pcp", type=whole_number, default=1, metavar="N", help="of each node (default: 1)")
    group.add_argument("--gpu", choices=sorted(KNOWN), help="kind of GPU (default: the known one with --memory)")
    group.add_argument(
        "--memory",
        type=whole_number,
        metavar="N",
        help="memory of a GPU: 80G (default: that of --gpu, or of this machine)",
    )
    group.add_argument("--nodes", type=whole_number, default=1, metavar="N", help="machines (default: 1)")
    group.add_argument("--link-gbps", type=float, metavar="X", help="of each node's link to the others, one way: 100")
    group.add_argument(
        "--link-latency-us", type=float, default=50.0, metavar="X", help="of that link, in microseconds (default: 50)"
    )
    group = parser.add_argument_group("times")
    group.add_argument(
        "--lens", type=_numbers, metavar="N,N", help="prompt lengths (default: those that fit of 1024,8192,…)"
    )
    group.add_argument(
        "--batches", type=_numbers, metavar="N,N", help="requests that get tokens together (default: 1,8,32)"
    )
    group.add_argument("--context", type=whole_number, metavar="N", help="tokens before each answer (default: 8192)")
    parser.add_argument("--measure", action="store_true", help="also run the model on this machine, and compare")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    unused = [name for name in EngineConfig.__dataclass_fields__ if name not in USED]
    add_engine_arguments(parser, positional_model=True, leave_out=unused)


def _numbers(text: str) -> list[int]:
    numbers = [whole_number(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ArgumentTypeError(f"must be integers of at least 1, got {text!r}")
    return numbers


def run(args: Namespace) -> int:
    from twofold.engine_args import EngineArgs

    for name in ("gpus", "nodes"):
        if not 1 <= getattr(args, name) <= 1024:
            raise ConfigError(f"{name} must be from 1 to 1024, got {getattr(args, name)}", field=name)
    if (args.nodes > 1) != (args.link_gbps is not None):
        raise ConfigError(
            "nodes above 1 and link_gbps go together: the link is what joins the nodes", field="link_gbps"
        )
    if args.measure and args.nodes > 1:
        raise ConfigError("measure runs on this machine only; leave out nodes", field="measure")
    config = EngineArgs(**{name: value for name, value in vars(args).items() if name in USED})
    found = plan(config, args)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found, Console(highlight=False, soft_wrap=True))
    return 0 if found["fits"] else 1


def plan(config: EngineConfig, args: Namespace) -> dict[str, Any]:
    from transformers import logging

    from twofold.bench.planned import measure, this_processor
    from twofold.models.sizes import model_shape
    from twofold.models.source import load_config, resolve
    from twofold.models.support import refusal
    from twofold.runtime import GPU_BLOCK_SIZE, choose_dtype, choose_max_model_len, device_of_machine

    logging.set_verbosity_error()
    # A directory without weights will do.
    source = resolve(EngineConfig(**_given(config) | {"load_format": "dummy"}))
    model_config = load_config(source, config.trust_remote_code, dict(config.hf_overrides or {}))
    if reason := refusal(model_config, config.trust_remote_code):
        raise ModelError(f"model {config.model!r} ({model_config.model_type}) is not served: {reason}", field="model")
    on_cpu = args.measure and device_of_machine() == "cpu"
    dtype = choose_dtype(config, model_config, "cpu" if on_cpu else "cuda")
    shape = model_shape(model_config, dtype, config.trust_remote_code)
    max_model_len = choose_max_model_len(config, model_config)
    processor = this_processor(dtype, args.gpus, shape.hidden_size) if args.measure else _known(args)
    memory = args.memory or (processor.memory if processor is not None else None)
    if memory is None:
        raise ConfigError("memory of a GPU is needed: --memory 80G, or --gpu", field="memory")
    wish = Wish(
        max_model_len=max_model_len,
        weights="replicated" if on_cpu and config.weights == "auto" else config.weights,
        kv_cache=config.kv_cache,
        max_num_batched_tokens=config.max_num_batched_tokens or (CPU_BATCHED_TOKENS * args.gpus if on_cpu else None),
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size or (CPU_BLOCK_SIZE if on_cpu else GPU_BLOCK_SIZE),
        kv_cache_memory_bytes=config.kv_cache_memory_bytes or (CPU_CACHE_BYTES if on_cpu else None),
    )
    table = _table(args, max_model_len, on_cpu)
    link = None if args.link_gbps is None else Link(args.link_gbps, args.link_latency_us * 1e-6)
    machines = Machines(memory, args.gpus, args.nodes, link, config.gpu_memory_utilization, processor)
    settings = {
        "model": config.model, "dtype": str(dtype).removeprefix("torch."), "max_model_len": max_model_len,
        "nodes": args.nodes, "gpus of a node": args.gpus, "memory of a GPU": memory,
        "gpu": None if processor is None else processor.name, "device": "cpu" if on_cpu else "cuda",
    }  # fmt: skip
    found = settings | answer(shape, machines, wish, table, config.step_layout, config.partition_policy)
    if args.measure:
        arguments = _given(config) | {
            "load_format": "dummy", "prefill_context_parallel_size": args.gpus, "max_model_len": max_model_len,
        }  # fmt: skip
        if on_cpu:
            arguments["kv_cache_memory_bytes"] = wish.kv_cache_memory_bytes
        found["measured"] = measure(arguments, table)
    return found


def _given(config: EngineConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in USED}


def _known(args: Namespace) -> Processor | None:
    """The GPU that times are of; None if it was not named, and none that was measured has such memory."""
    if args.gpu is not None:
        return KNOWN[args.gpu]
    measured = [KNOWN[name] for name in ("h100", "h200")]
    like = [gpu for gpu in measured if args.memory and abs(gpu.memory / args.memory - 1) <= LIKENESS]
    return like[0] if like else None


def _table(args: Namespace, max_model_len: int, on_cpu: bool) -> Table:
    """Lengths that were asked for, or else those that have room for an answer."""
    usual = CPU_LENS if on_cpu else (*LENS, max_model_len)
    lens = args.lens or [length for length in dict.fromkeys(usual) if length <= max_model_len]
    longest = max_model_len - 1
    context = args.context or min(CPU_CONTEXT if on_cpu else CONTEXT, longest)
    if wrong := [length for length in (*(args.lens or ()), context) if length > max_model_len]:
        raise ConfigError(
            f"lens and context must be at most max_model_len={max_model_len}, got {wrong[0]}", field="lens"
        )
    return Table([min(length, longest) for length in lens], context, args.batches or BATCHES)


def _show(found: dict[str, Any], console: Console) -> None:
    sizes = found["bytes of each rank"]
    number, memory = found["gpus of a node"], f"{found['memory of a GPU'] / 1e9:.1f} GB"
    of_node = f"{number} GPU{'s' * (number > 1)} of {memory}"
    if found["device"] == "cpu":
        of_node = f"{number} rank{'s' * (number > 1)} on {found['gpu']} with {memory}"
    nodes = "" if found["nodes"] == 1 else f" on each of {found['nodes']} nodes"
    console.print(
        f"{found['model']}, {found['dtype']}, on {of_node}{nodes}, max_model_len {found['max_model_len']:,}\n"
    )
    holding = {"replicated": "all of it on each", "sharded": "a part on each"}
    console.print(f"weights   {holding[found['weights']]}: {sizes['weights'] / 1e9:.2f} GB")
    console.print(f"KV cache  {holding[found['kv_cache']]}: {sizes['KV cache'] / 1e9:.2f} GB")
    beside = [(name, sizes[name]) for name in ("fetched layers", "fetched KV entries", "computing") if sizes[name]]
    console.print("beside    " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in beside))
    if found["fits"]:
        console.print(
            f"fits      {found['tokens that fit']:,} tokens, {found['requests of max_model_len']:.1f} requests of "
            f"{found['max_model_len']:,}"
        )
    else:
        enough = found["GPUs that would do"]
        way_out = f"{enough} such GPUs would do" if enough else "no number of such GPUs would do"
        console.print(f"fits      not: one request of {found['max_model_len']:,} tokens has no room; {way_out}")
    most, twice = found["longest context"], found["GPUs for twice as many tokens"]
    longer = f"{found['bytes of each rank for 1000 tokens'] / 1e6:.1f} MB on each for 1,000 tokens"
    if most is not None:
        longer += f"; at most {most['tokens']:,} here (weights {most['weights']}, KV cache {most['kv_cache']})"
    console.print(f"longer    {longer}" + (f"; twice as many as fit: {twice} GPUs" if twice else ""))
    _show_times(found, console)
    console.print("\nwhere the figures come from", style="dim")
    for what, source in found["sources"].items():
        console.print(f"  {what}: {source}", style="dim")


def _show_times(found: dict[str, Any], console: Console) -> None:
    if found["gpu"] is None:
        console.print("\ntimes     not known: name the GPU by --gpu")
        return
    measured = found.get("measured")
    kinds: Sequence[tuple[str, str]] = [("time to first token", "prompt"), ("from token to token", "batch")]
    for kind, key in kinds:
        console.print(f"\n{kind}, ms" + (f", context {found[kind][0]['context']:,}" if key == "batch" else ""))
        actual = {row[key]: row["ms"] for row in measured[kind]} if measured else {}
        for row in found[kind]:
            line = f"  {key} {row[key]:>9,}  {row['ms']:>12,.1f}"
            if "efficiency" in row:
                line += f"  efficiency {row['efficiency']:.1%}"
            if row[key] in actual:
                line += f"  measured {actual[row[key]]:,.1f}, planned / measured {row['ms'] / actual[row[key]]:.2f}"
            console.print(line)
    if measured:
        console.print(
            f"\nmeasured  {measured['weight bytes'] / 1e9:.2f} GB of weights, {measured['tokens that fit']:,} tokens "
            f"fit, on {measured['machine']}"
        )
