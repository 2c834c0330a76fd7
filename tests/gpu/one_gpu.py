"""Several ranks on the only GPU there is: they take turns and are slow, but the code is that of several GPUs.

NCCL refuses two ranks of one host on one GPU, so each rank claims to be another host. Symmetric memory has a switch to
allow it. Run in place of `twofold.worker`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from twofold.executor.local import LocalExecutor
from twofold.worker import worker
from twofold.worker.device import CUDA
from twofold.worker.trial import TrialSteps

MAX_NUM_BATCHED_TOKENS = 8192  # of engines that share it with other tests: the largest step takes memory of all


def share_gpu() -> None:
    """To be called by a rank before it joins the others."""
    os.environ |= {
        "NCCL_HOSTID": f"rank-{os.getpid()}",
        "NCCL_SOCKET_IFNAME": "lo",
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    }


@contextmanager
def enough_gpus(num_ranks: int) -> Iterator[dict[str, str]]:
    """Lets an engine start that many ranks, sharing a GPU if they must; → the engine arguments that this takes."""
    if num_ranks <= torch.cuda.device_count():
        yield {}
        return
    command = (sys.executable, __file__)
    with patch.object(LocalExecutor, "command", command), pretend(num_ranks):
        yield {"exchange": "push"}


@contextmanager
def pretend(num_gpus: int) -> Iterator[None]:
    """Makes this process take its GPU for several like it."""
    like = torch.cuda.get_device_properties(0)
    with (
        patch("torch.cuda.device_count", return_value=num_gpus),
        patch("torch.cuda.get_device_properties", return_value=like),
    ):
        yield


if __name__ == "__main__":
    share_gpu()
    worker.make_device = lambda rank, runtime: CUDA(0)
    # Read off the GPU, it counts what other programs take meanwhile, once for each graph.
    TrialSteps._measure_graphs = lambda self: 0
    worker.main()
