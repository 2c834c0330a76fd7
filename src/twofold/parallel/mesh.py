"""The ranks of one engine, and the collectives they share: `torch.distributed`, gloo on CPU and NCCL on CUDA."""

import os
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist


class Mesh(Protocol):
    """One axis of P ranks. Every rank calls the same collectives, in the same order, with the same shapes."""

    rank: int
    size: int

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        """Fills `gathered` [P * N, ...] with every rank's `mine` [N, ...], in the order of ranks."""

    def close(self) -> None: ...


class HandOver(Protocol):
    """A faster way for small tensors than a collective."""

    max_num_bytes: int  # of a rank's tensor

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every rank's x."""


class SingleRank:
    """A mesh of one: what it gathers is its own."""

    rank, size = 0, 1

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        if gathered.data_ptr() != mine.data_ptr():
            gathered.copy_(mine)

    def close(self) -> None:
        pass


class ProcessMesh:
    """Ranks that are processes. `store` is the path of a file that all of them can open."""

    def __init__(self, rank: int, size: int, store: str, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self.rendezvous: HandOver | None = None  # CPU ranks of one machine may have one
        if device.type == "cpu":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        else:
            # NVLink multicast shares state with every program on the host: never use it.
            os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
        dist.init_process_group(
            backend="gloo" if device.type == "cpu" else "nccl",
            store=torch._C._distributed_c10d.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(days=1),  # the engine watches the ranks, and ends them when one is lost
            device_id=None if device.type == "cpu" else device,
        )

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks, as PyTorch knows them."""
        group = dist.group.WORLD
        assert group is not None
        return group

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        if self.rendezvous is not None and mine.nbytes <= self.rendezvous.max_num_bytes:
            for part, place in zip(self.rendezvous(mine), gathered.view(self.size, *mine.shape), strict=True):
                place.copy_(part)
            return
        # The public name of this collective differs between versions of PyTorch.
        self.group._allgather_base(gathered, mine).wait()

    def close(self) -> None:
        dist.destroy_process_group()


def make_mesh(rank: int, size: int, store: str, device: torch.device) -> Mesh:
    return SingleRank() if size == 1 else ProcessMesh(rank, size, store, device)
