"""Ranks that share the only GPU of a machine: for what memory takes and what comes out, not for times."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1] / "tests" / "gpu"
NUM_GPUS = torch.cuda.device_count()  # of this machine, whatever ranks are told


@contextmanager
def enough_gpus(num_ranks: int) -> Iterator[dict[str, str]]:
    """→ the engine arguments with which that many ranks find places here, also on a CPU."""
    if not NUM_GPUS:
        yield {}
        return
    with _one_gpu().enough_gpus(num_ranks) as more:
        yield more


@contextmanager
def pretend(num_gpus: int) -> Iterator[None]:
    """Makes this process take its GPU for several, and leaves a CPU as it is."""
    with _one_gpu().pretend(num_gpus) if NUM_GPUS else nullcontext():
        yield


def _one_gpu() -> Any:
    """What tests do for ranks on one GPU."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return import_module("one_gpu")


def in_use() -> list[int]:
    """Bytes in use on each GPU, by all programs."""
    free_and_total = [torch.cuda.mem_get_info(device) for device in range(NUM_GPUS)]
    return [total - free for free, total in free_and_total]
