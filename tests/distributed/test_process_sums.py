"""Every way to sum between processes gives the same bits on every rank."""

import errno
import os
import platform
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))
from sum_steps import MAX_NUM_ROWS, WIDTH, assert_right, take_sums

from twofold.parallel.mesh import ProcessMesh
from twofold.parallel.shared_memory import YIELD_SECONDS
from twofold.parallel.sums import GatherSum, SharedMemorySum, make_sum

CPU = torch.device("cpu")
WAYS = ("gather", "made", "without_room")


def run_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    mesh, max_num_bytes = ProcessMesh.join(rank, size, f"{folder}/store", CPU), MAX_NUM_ROWS * WIDTH * 4
    file = os.open(f"{folder}/sums", os.O_RDWR | os.O_CREAT)
    with patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        without_room = make_sum(mesh, CPU, max_num_bytes, file)
    ways = {
        "gather": GatherSum(mesh), "made": make_sum(mesh, CPU, max_num_bytes, file), "without_room": without_room,
    }  # fmt: skip
    if platform.machine() == "x86_64":
        assert isinstance(ways["made"], SharedMemorySum)
    assert isinstance(without_room, GatherSum)
    # Short lags, and ones so long that the others sleep.
    lags = [0.0, 1e-4, 1e-3, 2 * YIELD_SECONDS] * 1000
    for name, way in ways.items():
        torch.save(take_sums(way, rank, CPU, lambda: time.sleep(lags.pop())), f"{folder}/{name}-{rank}")
    mesh.close()


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_the_same_sums(tmp_path: Path, size: int) -> None:
    """Ranks out of step, sums of changing sizes one right after the other, some larger than the buffer. Where the first
    rank finds no room for shared memory, none uses it.
    """
    mp.spawn(run_rank, (size, str(tmp_path)), nprocs=size)
    for name in WAYS:
        for rank in range(size):
            assert_right(torch.load(tmp_path / f"{name}-{rank}"), size, (name, rank))
