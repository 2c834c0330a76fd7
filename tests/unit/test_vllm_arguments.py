"""vLLM's engine arguments: what asks for nothing is taken, the rest is refused, and docs/vllm.md says the same."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import torch

from twofold import AsyncEngineArgs, ConfigError, EngineArgs
from twofold.config import EngineConfig
from twofold.flags import ENGINE_HELP
from twofold.vllm_arguments import FOREIGN

DOCUMENT = Path(__file__).parents[2] / "docs" / "vllm.md"
TWOFOLDS = (  # that vLLM does not have
    "partition_policy", "step_layout", "step_costs", "exchange", "step_timeout", "kv_cache", "weights",
    "placement_timeout",
    "min_ranks",
)  # fmt: skip


def rows() -> list[str]:
    """The table of docs/vllm.md."""
    table = [f"| `{name}` | same |" for name in EngineConfig.__dataclass_fields__ if name not in TWOFOLDS]
    for name, foreign in FOREIGN.items():
        values = ", ".join(f"`{value!r}`" for value in (None, *foreign.neutral))
        rule = "any value is ignored" if foreign.any_value else f"{values} ignored, others refused"
        table.append(f"| `{name}` | {rule}: {foreign.reason} |")
    return sorted(table)


def test_the_document_has_the_table() -> None:
    """Guards the list that users look into; `"\\n".join(rows())` is what it should have."""
    assert "\n".join(rows()) in DOCUMENT.read_text()


def test_what_asks_for_nothing_is_taken() -> None:
    """A script of vLLM's with tensor_parallel_size=1 and swap_space=4 was refused."""
    args = EngineArgs(
        "demo", tensor_parallel_size=1, pipeline_parallel_size=1, swap_space=4, quantization=None, enable_lora=False,
        enable_chunked_prefill=True, disable_log_stats=False, tokenizer_mode="auto", kv_cache_dtype="auto",
    )  # fmt: skip
    assert vars(args) == vars(EngineConfig(model="demo"))
    assert AsyncEngineArgs is EngineArgs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported: use prefill_context_parallel_size=N"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size=True is not supported"),
        ({"quantization": "fp8"}, "quantization='fp8' is not supported: there is no quantized computation"),
        ({"enable_chunked_prefill": False}, "raise that to keep prompts whole"),
        ({"logits_processors": ["module.Class"]}, "use logit_bias, allowed_token_ids, bad_words or structured_outputs"),
        ({"rope_scaling": {"factor": 2.0}}, "hf_overrides={'rope_parameters': {...}}"),
        ({"enforce_eagre": True}, "unknown engine argument 'enforce_eagre'; did you mean enforce_eager"),
        ({"dtype": torch.int8}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"max_logprobs": -2}, "max_logprobs must be an integer of at least -1"),
        ({"hf_overrides": 1}, "hf_overrides must be a dict or None"),
    ],
)
def test_what_is_not_there_is_refused_with_the_way_out(given: dict[str, Any], message: str) -> None:
    """Guards against arguments that would silently have no effect."""
    with pytest.raises(ConfigError) as refusal:
        EngineArgs("demo", **given)
    assert message in str(refusal.value)
    assert refusal.value.field == next(iter(given))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "name"),
    [("half", "float16"), ("float", "float32"), ("bf16", "bfloat16"), (torch.float32, "float32"), ("auto", "auto")],
)
def test_types_have_vllms_names_and_pytorchs(given: Any, name: str) -> None:
    assert EngineArgs("demo", dtype=given).dtype == name


def test_no_seed_is_another_one_each_time() -> None:
    assert EngineArgs("demo", seed=None).seed != EngineArgs("demo", seed=None).seed


def test_a_command_line_takes_the_same() -> None:
    """Guards `twofold serve` and scripts with a parser of their own: one table is for all."""
    parser = EngineArgs.add_cli_args(ArgumentParser())
    line = "-tp 1 --swap-space 4 --enable-chunked-prefill --model demo --hf-overrides {} --quantization None"
    assert vars(EngineArgs.from_cli_args(parser.parse_args(line.split()))) == vars(EngineArgs("demo", hf_overrides={}))
    with pytest.raises(ConfigError, match="tensor_parallel_size=2 is not supported"):
        EngineArgs.from_cli_args(parser.parse_args(["--model", "demo", "-tp", "2"]))
    with pytest.raises(ConfigError, match="enable_lora=True is not supported"):
        EngineArgs.from_cli_args(parser.parse_args(["--model", "demo", "--enable-lora"]))
    assert not FOREIGN.keys() & ENGINE_HELP.keys()
