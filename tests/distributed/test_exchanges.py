"""Every transport between processes leaves the same bytes in every rank's caches."""

import errno
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))
from exchange_steps import MAX_NUM_ENTRIES, NUMS_OF_ENTRIES, WIDTHS, assert_equal, expected_caches, take_steps

from twofold.parallel.exchange import Exchange
from twofold.parallel.mesh import Axes, ProcessMesh
from twofold.parallel.transport import AllGather, SharedMemory, make_transport

CPU = torch.device("cpu")


def run_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    mesh, max_num_bytes = ProcessMesh.join(rank, size, f"{folder}/store", CPU), MAX_NUM_ENTRIES * max(WIDTHS) * 2
    file = os.open(f"{folder}/entries", os.O_RDWR | os.O_CREAT)
    with patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        without_room = make_transport("auto", Axes.of_one_node(mesh), CPU, max_num_bytes, file)
    transports = {
        "all_gather": AllGather(mesh, CPU),
        "shared_memory": make_transport("auto", Axes.of_one_node(mesh), CPU, max_num_bytes, file),
        "without_room": without_room,
    }
    assert isinstance(transports["shared_memory"], SharedMemory)
    assert not isinstance(without_room, SharedMemory)
    for name, transport in transports.items():
        torch.save(
            take_steps(Exchange(mesh, transport), rank, size, CPU, lambda: time.sleep(0.002)), f"{folder}/{name}-{rank}"
        )
    mesh.close()


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_all_rows(tmp_path: Path, size: int) -> None:
    """Invariant 4, with ranks out of step, steps longer than the buffers, layers of two widths, and steps in which the
    KV entries of all layers travel together. Where the first rank finds no room for shared memory, none uses it.
    """
    mp.spawn(run_rank, (size, str(tmp_path)), nprocs=size)
    expected = expected_caches(size, NUMS_OF_ENTRIES)
    for name in ("all_gather", "shared_memory", "without_room"):
        for rank in range(size):
            assert_equal(torch.load(tmp_path / f"{name}-{rank}"), expected, (name, rank))
