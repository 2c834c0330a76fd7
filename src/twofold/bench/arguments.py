"""What the benchmarks of an engine have in common: flags, engine arguments, and the JSON that they write."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twofold.bench.report import environment
from twofold.flags import add_engine_arguments, chosen_engine_arguments, whole_number

FIXED = {"skip_tokenizer_init": True}  # prompts are token ids


def add_lengths(
    parser: ArgumentParser,
    input_len: int,
    *,
    leave_out: tuple[str, ...] = (),
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Adds --input-len, --output-len and the flags of `add_common`. The names are vLLM's."""
    parser.add_argument(
        "--input-len",
        type=whole_number,
        default=input_len,
        metavar="N",
        help=f"tokens in each prompt (default: {input_len})",
    )
    parser.add_argument(
        "--output-len", type=whole_number, default=128, metavar="N", help="tokens in each answer (default: 128)"
    )
    add_common(parser, {"max_model_len": "both lengths + 1"} | dict(defaults or {}), leave_out=leave_out)


def add_common(
    parser: ArgumentParser,
    defaults: Mapping[str, object],
    *,
    several_sizes: bool = False,
    leave_out: tuple[str, ...] = (),
) -> None:
    """Adds --output-json and the engine's arguments but those to leave out, with defaults that differ from its own.

    With `several_sizes` -pcp takes a list: the text `args.sizes`.
    """
    parser.add_argument("--output-json", metavar="FILE", help="write all figures to this file")
    leave_out = ("tokenizer", "tokenizer_mode", "tokenizer_revision", *FIXED, *leave_out)
    if several_sizes:
        leave_out = (*leave_out, "prefill_context_parallel_size")
        parser.add_argument(
            *("-pcp", "--prefill-context-parallel-size"),
            dest="sizes",
            default="1",
            metavar="N,N",
            help="numbers of ranks, with commas between them (default: 1)",
        )
    add_engine_arguments(parser, leave_out=leave_out, defaults=defaults)


def engine_arguments(args: Namespace, max_model_len: int, **fixed: Any) -> dict[str, Any]:
    """Arguments for `LLM`: those of the command line, `fixed`, no tokenizer, and by default this `max_model_len`."""
    return {"max_model_len": max_model_len} | chosen_engine_arguments(args) | FIXED | fixed


def write_json(args: Namespace, result: dict[str, Any]) -> None:
    """Writes the figures, and what they belong to, to the file of --output-json if there is one."""
    if args.output_json:
        record = environment() | {"model": args.model} | result
        Path(args.output_json).write_text(json.dumps(record, indent=1))
