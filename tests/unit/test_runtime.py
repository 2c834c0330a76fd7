"""What is settled before a rank starts: the device, the attention backend, the cores."""

import os
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config

from twofold import ConfigError
from twofold.bench.report import environment
from twofold.config import EngineConfig
from twofold.machine import usable_cores
from twofold.runtime import RANKS_PER_CORE, settle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_config("llama").save_pretrained(tmp_path)
    return tmp_path


def settled(folder: Path, **arguments: Any) -> Any:
    config = EngineConfig(model=str(folder), load_format="dummy", skip_tokenizer_init=True, **arguments)
    return settle(config)[0]


def test_flash_attention_needs_cuda(folder: Path) -> None:
    """It failed in the rank, with a trace: the library is for GPUs only."""
    with pytest.raises(
        ConfigError, match=r"attention_backend 'flash_attn' runs on CUDA only, and .* cpu; use"
    ) as caught:
        settled(folder, device="cpu", attention_backend="flash_attn")
    assert caught.value.field == "attention_backend"
    assert settled(folder, device="cpu").attention_backend == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"max_model_len": 257}, "max_model_len"),
        ({"device": "cpu", "prefill_context_parallel_size": 10_000}, "prefill_context_parallel_size"),
    ],
)
def test_errors_name_their_field(folder: Path, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settled(folder, **arguments)
    assert caught.value.field == field


def test_a_machine_without_affinities_has_cores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no `os.sched_getaffinity`; nothing started there."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert settled(folder, device="cpu", prefill_context_parallel_size=2).num_threads == 3
    assert environment()["hardware"]["cores"] == 6
    with pytest.raises(ConfigError, match=rf"at most {6 * RANKS_PER_CORE} on this machine \(6 cores\), got 25"):
        settled(folder, device="cpu", prefill_context_parallel_size=25)
