"""What of this machine processes may use. No PyTorch needed."""

import os
from contextlib import suppress
from pathlib import Path

BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # what Linux calls such instructions of x86 and of ARM


def usable_cores() -> int:
    """The number of cores that this process may use; on systems that do not tell (macOS), of the whole machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_of_rank(num_ranks: int) -> int:
    """CPU threads of each of so many ranks: OMP_NUM_THREADS, or an equal part of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, usable_cores() // num_ranks)


def memory_of_process() -> int | None:
    """Bytes that this process takes; of pages that it shares, its part (PSS). None if the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None


def computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has instructions that multiply bfloat16."""
    with suppress(OSError):
        lines = cpuinfo.read_text().splitlines()
        return any(BFLOAT16 & set(line.split()) for line in lines if line.startswith(("flags", "Features")))
    return False
