"""Make command-line flags from the fields of a dataclass, so that the command line and Python have the same names."""

import json
import re
from argparse import (
    SUPPRESS,
    Action,
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
    _ActionsContainer,
)
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from decimal import Decimal
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from twofold.config import (
    ATTENTION_BACKENDS,
    DEVICES,
    DTYPES,
    EXCHANGES,
    EXECUTOR_BACKENDS,
    HOLDINGS,
    LOAD_FORMATS,
    PARTITION_POLICIES,
    STEP_LAYOUTS,
    TOKENIZER_MODES,
    EngineConfig,
)
from twofold.vllm_arguments import FOREIGN, SHORT_FOREIGN


def _one_of(choices: Any) -> str:
    return f"one of {', '.join(choices)}"


ENGINE_HELP = {
    "model": "directory, hub name, .gguf file, or demo (SmolLM2-135M-Instruct)",
    "prefill_context_parallel_size": "ranks that share the prefill of each prompt",
    "distributed_executor_backend": "where ranks run: processes of this machine, or places of a Ray cluster "
    f"(RAY_ADDRESS): {_one_of(EXECUTOR_BACKENDS)}",
    "placement_timeout": "seconds in which Ray must give all ranks a place, at the start and after a loss",
    "min_ranks": "ranks with which the engine goes on if Ray has no place for all so long after a loss (default: all)",
    "partition_policy": f"which rank computes which part of a prompt: {_one_of(PARTITION_POLICIES)}",
    "step_layout": "how ranks share a step: by tokens (context parallel), by heads (tensor parallel), or as costs "
    f"less: {_one_of(STEP_LAYOUTS)}",
    "step_costs": "JSON of an earlier run's log, by which auto chooses",
    "weights": "what each rank keeps of the weights: all, a part (the rest is fetched from the other ranks), or a part "
    f"only if all would leave no room: {_one_of(HOLDINGS)}",
    "dtype": f"type of weights and KV cache: {_one_of(DTYPES)}; also bf16, fp16, half, fp32, float",
    "device": _one_of(DEVICES),
    "max_model_len": "tokens of prompt and answer together",
    "max_num_batched_tokens": "tokens in a step, over all ranks",
    "max_num_seqs": "requests that run at the same time",
    "max_logprobs": "log-probabilities that a request may ask for at each token; -1 is no limit",
    "block_size": "tokens in a KV cache block",
    "kv_cache": "what each rank keeps of the KV cache: all of it (replicated), a share (sharded), or a share where one "
    f"request of max_model_len tokens would not fit otherwise: {_one_of(HOLDINGS)}",
    "kv_cache_memory_bytes": "memory for the KV cache on each rank: 8G",
    "gpu_memory_utilization": "share of a GPU's memory that may be used",
    "enable_prefix_caching": "reuse the KV entries of earlier prompts that begin with the same tokens",
    "tokenizer": "directory or hub name of another tokenizer than the model's",
    "tokenizer_mode": "who makes prompts of conversations: the chat template (auto, hf), or mistral-common: "
    + _one_of(TOKENIZER_MODES),
    "revision": "branch, tag or commit of a model on the hub",
    "tokenizer_revision": "the same for the tokenizer (default: that of --revision)",
    "download_dir": "where files of the hub are kept (default: the hub's cache)",
    "hf_overrides": "JSON: values in place of those in the model's configuration",
    "generation_config": "default sampling parameters: auto (the model's generation_config.json), vllm (none), or a "
    "directory with that file",
    "override_generation_config": "JSON: values in place of those in generation_config.json",
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
# What an argument that is None stands for.
CHOSEN_LATER = {
    "step_costs": "measured at the start",
    "max_model_len": "the positions that the model has",
    "max_num_batched_tokens": "2048 for each rank, 32768 for each GPU",
    "block_size": "16, on GPUs 128",
    "kv_cache_memory_bytes": "2G, or more for one request of max_model_len; on GPUs what is left",
    "tokenizer": "the model's",
}
SPELLINGS = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
UNITS = {unit: 1000**power for power, unit in enumerate("kmgt", 1)}
UNITS |= {unit.upper(): 1024**power for power, unit in enumerate("kmgt", 1)}


def whole_number(text: str) -> int:
    """Reads an integer, as vLLM does: 8G is 8 * 2**30, 8g is 8 * 10**9, 1.5k is 1500.

    Raises:
        ArgumentTypeError: it is none.
    """
    if match := re.fullmatch(r"([+-]?[0-9]+(?:\.[0-9]+)?)([kmgtKMGT]?)", text.replace("_", "").strip()):
        number = Decimal(match[1]) * UNITS.get(match[2], 1)
        if number == int(number):
            return int(number)
    raise ArgumentTypeError(f"must be an integer, such as 8192, 8k (8,000) or 8K (8,192), got {text!r}")


def _spelling(text: str) -> str:
    return SPELLINGS.get(text, text)


def add_engine_arguments(
    parser: ArgumentParser,
    *,
    positional_model: bool = False,
    required: bool = True,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Adds a flag for each field of EngineConfig but those to leave out. `EngineArgs.from_cli_args` reads them.

    vLLM's other flags are taken, too, and help does not show them. `required` is whether a model must be given.
    `defaults` are those that differ from EngineConfig's, as the help shall tell them.
    """
    help_of = {name: text for name, text in ENGINE_HELP.items() if name not in leave_out}
    if positional_model:
        parser.add_argument("model", metavar="MODEL", help=help_of.pop("model"))
    group = parser.add_argument_group("engine")
    add_fields(group, EngineConfig, help_of, CHOSEN_LATER | dict(defaults or {}), required=required)
    _add_foreign(group)


def _add_foreign(group: _ActionsContainer) -> None:
    for name, foreign in FOREIGN.items():
        flags = ["--" + name.replace("_", "-")]
        if flags[0] in group._option_string_actions:  # one of the server's own
            continue
        flags += [SHORT_FOREIGN[name]] if name in SHORT_FOREIGN else []
        how: dict[str, Any] = {"dest": name, "default": SUPPRESS, "help": SUPPRESS}
        if foreign.is_flag:
            group.add_argument(*flags, action=BooleanOptionalAction, **how)
        else:
            group.add_argument(*flags, type=_literal, **how)


def _literal(text: str) -> Any:
    """A value of any type: JSON, or else text."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "None" else text


def add_fields(
    group: _ActionsContainer,
    cls: type[Any],
    help_of: Mapping[str, str],
    defaults: Mapping[str, object] | None = None,
    *,
    required: bool = True,
) -> None:
    """Adds a flag for each field of the dataclass that `help_of` names. A flag that is not given sets no attribute.

    The help ends with the default: that of `defaults`, or else the field's own, unless it is None or a switch.
    """
    hints = get_type_hints(cls)
    field_of = {field.name: field for field in fields(cls)}
    for name, text in help_of.items():
        default = field_of[name].default
        is_needed = default is MISSING
        kind = next(kind for kind in get_args(hints[name]) or (hints[name],) if kind is not NoneType)
        told = (defaults or {}).get(name, None if is_needed or default is False else default)
        if told is not None:
            text += f" (default: {'on' if told is True else told})"
        flags = [*SHORT.get(name, []), "--" + name.replace("_", "-")]
        how: dict[str, Any] = {"dest": name, "default": SUPPRESS, "help": text.replace("%", "%%")}
        how["required"] = required and is_needed
        if kind is bool:
            action: type[Action] | str = BooleanOptionalAction if default else "store_true"
            group.add_argument(*flags, action=action, **how)
        elif kind in (int, float, str):
            read: dict[Any, Callable[[str], Any]] = {
                int: whole_number,
                float: float,
                str: _spelling if name == "dtype" else str,
            }
            group.add_argument(*flags, type=read[kind], metavar={int: "N", float: "X", str: "S"}[kind], **how)
        elif get_origin(kind) is dict:
            group.add_argument(*flags, type=json.loads, metavar="JSON", **how)
        else:  # a sequence
            group.add_argument(*flags, type=get_args(kind)[0], action="append", metavar="S", **how)


def chosen_engine_arguments(args: Namespace) -> dict[str, Any]:
    """The engine arguments that were given on the command line, vLLM's among them."""
    known = {*EngineConfig.__dataclass_fields__, *FOREIGN}
    return {name: value for name, value in vars(args).items() if name in known}


def chosen(args: Namespace, cls: type[Any]) -> dict[str, Any]:
    """The fields of the dataclass that were given on the command line, with their values."""
    return {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
