"""What is settled before a rank starts: the device, the attention backend, the cores."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config

from twofold import ConfigError
from twofold.bench.report import environment
from twofold.config import EngineConfig
from twofold.machine import computes_bfloat16, usable_cores
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
    assert settled(folder, device="cpu").attention_backend == "native"


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


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("is_fast", [True, False])
def test_the_type_on_a_cpu_is_what_it_computes_fast(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stored: str, is_fast: bool
) -> None:
    monkeypatch.delenv("TWOFOLD_CPU_DTYPE")
    monkeypatch.setattr("twofold.runtime.computes_bfloat16", lambda: is_fast)
    config = tiny_config("llama")
    config.dtype = getattr(torch, stored)
    config.save_pretrained(folder)
    assert settled(folder, device="cpu").dtype == (torch.bfloat16 if is_fast else torch.float32)
    assert settled(folder, device="cpu", dtype="float16").dtype == torch.float16


def test_the_environment_says_the_type_on_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled(folder, device="cpu").dtype == torch.float32  # as for all tests
    monkeypatch.setenv("TWOFOLD_CPU_DTYPE", "int8")
    with pytest.raises(ConfigError, match="TWOFOLD_CPU_DTYPE must be one of float32, bfloat16, float16, got 'int8'"):
        settled(folder, device="cpu")


def test_processors_that_multiply_bfloat16(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert not computes_bfloat16(cpuinfo)
    for line, is_fast in (
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("model name\t: bf16", False),
    ):
        cpuinfo.write_text(f"processor\t: 0\n{line}\n")
        assert computes_bfloat16(cpuinfo) == is_fast


def test_ranks_are_started_before_pytorch_is_imported() -> None:
    """An import of LLM that brought PyTorch made everyone wait for it twice: here, and then in the ranks."""
    code = (
        "import sys; from twofold import LLM, AsyncLLM, LLMEngine; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
