"""What a benchmark reports with its figures: commit, command, versions, hardware, and bytes per token."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twofold.engine.engine import LLMEngine


def environment() -> dict[str, Any]:
    """The commit, command, versions and hardware that figures belong to."""
    import torch

    from twofold.machine import usable_cores

    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "flash-attn-4"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    hardware: dict[str, Any] = {"cpu": _cpu_name(), "cores": usable_cores()}
    if torch.cuda.is_available():
        hardware["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {
        "commit": _commit(),
        "command": shlex.join([*_program(sys.argv[0]), *sys.argv[1:]]),
        "versions": versions,
        "hardware": hardware,
    }


def machine() -> str:
    """The GPUs if there are any, or else the processor and the cores that this process may use."""
    hardware = environment()["hardware"]
    return str(hardware.get("gpu") or f"{hardware['cores']} cores of {hardware['cpu']}")


def _program(path: str) -> list[str]:
    is_script = path.endswith(".py") and Path(path).stem not in ("main", "__main__")  # these are `python -m twofold...`
    return ["python", path] if is_script else ["twofold"]


def _commit() -> str:
    if given := os.environ.get("TWOFOLD_COMMIT"):  # for a copy of the tree without its history
        return given
    folder = Path(__file__).parent
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def bytes_per_token(engine: "LLMEngine") -> dict[str, float]:
    """Bytes of a token's KV entries over all layers, measured at the buffers that were allocated and sent.

    `stored` is what each rank keeps. `exchanged` is what a token's rank sends to each other rank, padding and what they
    fetch later included: the mean over all tokens computed so far.
    """
    report, size, stats = engine.reports[0], engine.runtime.num_ranks, engine.stats
    exchanged = stats.exchange_bytes / max(1, (size - 1) * stats.num_tokens)
    room = report.sharded if engine.is_sharded and report.sharded is not None else report
    return {"stored": room.bytes_per_block / engine.runtime.block_size, "exchanged": round(exchanged, 1)}


def describe(engine: "LLMEngine") -> dict[str, Any]:
    """The settings that a figure belongs to."""
    costs = engine.step_costs
    return {
        "dtype": str(engine.runtime.dtype).removeprefix("torch."),
        "pcp": engine.runtime.num_ranks,
        "kv_cache": "sharded" if engine.is_sharded else "replicated",
        "step_layout": engine.runtime.engine.step_layout,
        "step_costs": None if costs is None else costs.to_json(),
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints right-aligned columns, but those that are empty in all rows."""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
