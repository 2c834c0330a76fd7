"""A rank that fails when a test wants it to: run in place of `twofold.worker`.

Before each step it looks for files in $TWOFOLD_FAULTS. `oom-RANK` makes it raise as CUDA does when memory runs out and
`hang-RANK` never return, once. As long as they are there, `poison` holds a token id, and a new request with a
prompt that begins with it kills the rank; `slow` holds the seconds that are added to each step.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from twofold.contract import Step
from twofold.worker import worker
from twofold.worker.model_runner import LaunchedStep, ModelRunner

FOLDER = Path(os.environ["TWOFOLD_FAULTS"])
launch = ModelRunner.launch


def launch_or_fail(self: ModelRunner, step: Step, *args: Any) -> LaunchedStep:
    rank = self.axes.world.rank
    if _take(f"oom-{rank}"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of ...")
    if _take(f"hang-{rank}"):
        time.sleep(1e6)
    slow = FOLDER / "slow"
    if slow.exists():
        time.sleep(float(slow.read_text()))
    poison = FOLDER / "poison"
    if poison.exists() and int(poison.read_text()) in [new.token_ids[0] for new in step.new]:
        os.kill(os.getpid(), signal.SIGKILL)
    return launch(self, step, *args)


def _take(name: str) -> bool:
    try:
        (FOLDER / name).unlink()
    except FileNotFoundError:
        return False
    return True


ModelRunner.launch = launch_or_fail  # type: ignore[method-assign]

if __name__ == "__main__":
    worker.main()
