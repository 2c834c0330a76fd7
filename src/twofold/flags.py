"""Make command-line flags from the fields of a dataclass, so that the command line and Python have the same names."""

from argparse import SUPPRESS, Action, ArgumentParser, BooleanOptionalAction, Namespace, _ActionsContainer
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from twofold.config import (
    ATTENTION_BACKENDS,
    DEVICES,
    DTYPES,
    EXCHANGES,
    LOAD_FORMATS,
    PARTITION_POLICIES,
    STEP_LAYOUTS,
    WEIGHTS,
    EngineConfig,
)


def _one_of(choices: Any) -> str:
    return f"one of {', '.join(choices)}"


ENGINE_HELP = {
    "model": "directory, hub name, .gguf file, or demo (SmolLM2-135M-Instruct)",
    "prefill_context_parallel_size": "ranks that share the prefill of each prompt",
    "partition_policy": f"which rank computes which part of a prompt: {_one_of(PARTITION_POLICIES)}",
    "step_layout": "how ranks share a step: by tokens (context parallel), by heads (tensor parallel), or as costs "
    f"less: {_one_of(STEP_LAYOUTS)}",
    "step_costs": "JSON of an earlier run's log, by which auto chooses (default: measured at the start)",
    "weights": "what each rank keeps of the weights: all, a part (the rest is fetched from the other ranks), or a part "
    f"only if all would leave no room: {_one_of(WEIGHTS)}",
    "dtype": f"type of weights and KV cache: {_one_of(DTYPES)}",
    "device": _one_of(DEVICES),
    "max_model_len": "tokens of prompt and answer together (default: the positions that the model has)",
    "max_num_batched_tokens": "tokens in a step, over all ranks",
    "max_num_seqs": "requests that run at the same time",
    "block_size": "tokens in a KV cache block",
    "kv_cache_memory_bytes": "memory for the KV cache on each rank",
    "gpu_memory_utilization": "share of a GPU's memory that may be used",
    "enable_prefix_caching": "reuse the KV entries of earlier prompts that begin with the same tokens",
    "tokenizer": "directory or hub name of another tokenizer than the model's",
    "skip_tokenizer_init": "load no tokenizer: prompts are token ids and answers have no text",
    "trust_remote_code": "run Python code that comes with the model",
    "load_format": f"format of the weights: {_one_of(LOAD_FORMATS)}",
    "attention_backend": "attention kernels: " + _one_of(ATTENTION_BACKENDS),
    "exchange": f"how KV entries are sent to the other ranks: {_one_of(EXCHANGES)}",
    "enforce_eager": "no compiled layers, no CUDA graphs",
    "step_timeout": "seconds that a step may take beyond what its tokens need; then its ranks count as hung",
    "seed": "for sampling, and for the random weights of --load-format dummy",
}
SHORT = {"prefill_context_parallel_size": ["-pcp"]}


def add_engine_arguments(
    parser: ArgumentParser, *, positional_model: bool = False, leave_out: Collection[str] = ()
) -> None:
    """Adds a flag for each field of EngineConfig but those to leave out. `chosen(args, EngineConfig)` reads them."""
    help_of = {name: text for name, text in ENGINE_HELP.items() if name not in leave_out}
    if positional_model:
        parser.add_argument("model", metavar="MODEL", help=help_of.pop("model"))
    add_fields(parser.add_argument_group("engine"), EngineConfig, help_of)


def add_fields(group: _ActionsContainer, cls: type[Any], help_of: Mapping[str, str]) -> None:
    """Adds a flag for each field of the dataclass that `help_of` names. A flag that is not given sets no attribute."""
    hints = get_type_hints(cls)
    field_of = {field.name: field for field in fields(cls)}
    for name, text in help_of.items():
        default = field_of[name].default
        required = default is MISSING
        if not required and default is not None:
            text += f" (default: {default})"
        flags = [*SHORT.get(name, []), "--" + name.replace("_", "-")]
        how: dict[str, Any] = {"dest": name, "default": SUPPRESS, "required": required, "help": text.replace("%", "%%")}
        kind = next(kind for kind in get_args(hints[name]) or (hints[name],) if kind is not NoneType)
        if kind is bool:
            action: type[Action] | str = BooleanOptionalAction if default else "store_true"
            group.add_argument(*flags, action=action, **how)
        elif kind in (int, float, str):
            group.add_argument(*flags, type=kind, metavar={int: "N", float: "X", str: "S"}[kind], **how)
        else:  # a sequence
            group.add_argument(*flags, type=get_args(kind)[0], action="append", metavar="S", **how)


def chosen(args: Namespace, cls: type[Any]) -> dict[str, Any]:
    """The fields of the dataclass that were given on the command line, with their values."""
    return {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
