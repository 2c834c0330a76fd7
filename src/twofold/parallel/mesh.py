"""The ranks of one engine, and the collectives they share: `torch.distributed`, gloo on CPU and NCCL on CUDA.

P ranks are on N nodes (machines), G on each: rank r is at place r % G of node r // G. They have two *axes*, as in
torchtitan's meshes. Ranks on the gpu axis share memory; ranks on the node axis share a network only.

    N=2, G=3 example     node 0 | 0  1  2 |        gpu axis: 0 1 2 and 3 4 5
                         node 1 | 3  4  5 |        node axis: 0 3, 1 4 and 2 5
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from twofold.contract import StoreAddress

TIMEOUT = timedelta(days=1)  # the engine watches the ranks, and ends them when one is lost


class Mesh(Protocol):
    """P ranks: all of them, or those on one axis.

    Every rank calls the same collectives, in the same order, with the same shapes.
    """

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


def gather(mesh: Mesh, mine: torch.Tensor) -> torch.Tensor:
    """[n, ...] of every rank → [P, n, ...]."""
    gathered = mine.new_empty(mesh.size * len(mine), *mine.shape[1:])
    mesh.all_gather(gathered, mine.contiguous())
    return gathered.view(mesh.size, *mine.shape)


class ProcessMesh:
    """Ranks that are processes, as PyTorch's process `group` knows them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.rendezvous: HandOver | None = None  # CPU ranks of one machine may have one

    @classmethod
    def join(cls, rank: int, size: int, store: str | StoreAddress, device: torch.device) -> Self:
        """All ranks. `store`: the path of a file that all of them can open, or an address."""
        if device.type == "cpu":
            if isinstance(store, str):  # else who starts ranks says which interface leads to the others
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        else:
            # NVLink multicast shares state with every program on the host: never use it.
            os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
        dist.init_process_group(
            backend="gloo" if device.type == "cpu" else "nccl",
            store=_open(store, size),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=None if device.type == "cpu" else device,
        )
        assert dist.group.WORLD is not None
        return cls(dist.group.WORLD)

    def all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> None:
        if self.rendezvous is not None and mine.nbytes <= self.rendezvous.max_num_bytes:
            for part, place in zip(self.rendezvous(mine), gathered.view(self.size, *mine.shape), strict=True):
                place.copy_(part)
            return
        # The public name of this collective differs between versions of PyTorch.
        self.group._allgather_base(gathered, mine).wait()

    def close(self) -> None:
        dist.destroy_process_group(self.group)


def _open(store: str | StoreAddress, size: int) -> Any:
    if isinstance(store, str):
        return c10d.FileStore(store, size)
    return c10d.TCPStore(
        store.host,
        store.port,
        size,
        is_master=store.listener is not None,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=store.listener,
    )


@dataclass(frozen=True, slots=True)
class Axes:
    """One rank's meshes."""

    world: Mesh  # all ranks
    gpu: Mesh  # the ranks of my node
    node: Mesh  # the ranks at my place of every node

    @classmethod
    def of_one_node(cls, mesh: Mesh) -> Self:
        return cls(mesh, mesh, SingleRank())


def make_axes(rank: int, size: int, num_nodes: int, store: str | StoreAddress, device: torch.device) -> Axes:
    """All ranks call it together; see `ProcessMesh.join`."""
    if size == 1:
        return Axes.of_one_node(SingleRank())
    world = ProcessMesh.join(rank, size, store, device)
    if num_nodes == 1:
        return Axes.of_one_node(world)
    nodes = torch.arange(size).view(num_nodes, -1)
    return Axes(world, _axis(rank, nodes.tolist()), _axis(rank, nodes.T.tolist()))


def _axis(rank: int, groups: Sequence[Sequence[int]]) -> Mesh:
    """The mesh of that one of the groups that has the rank. All ranks call it with the same groups."""
    if len(groups[0]) == 1:
        return SingleRank()
    made = [dist.new_group(list(group), timeout=TIMEOUT) for group in groups]
    mine = next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)
    return ProcessMesh(mine)
