"""Memory of each rank that its peers read: of the KV cache and of weights, where each rank keeps a part of them."""

from typing import Protocol

import torch

from twofold.parallel.mesh import Mesh, ProcessMesh
from twofold.parallel.shared_memory import share


class PeerMemory(Protocol):
    """Memory of all ranks, and the point that all of them must have reached before one reads another's."""

    def allocate(self, num_bytes: int) -> list[torch.Tensor]:
        """Takes as much memory on every rank → everyone's, zeros, each [num_bytes] bytes. All ranks call it, once.

        Raises:
            OSError: there is no room. Every rank raises it.
        """

    def barrier(self) -> None:
        """Work enqueued from now on comes after all that any rank has enqueued before."""


class SharedFile:
    """Ranks of one machine map one file. For CPUs."""

    def __init__(self, mesh: Mesh, file: int) -> None:
        """`file` is a descriptor of the same new file on every rank."""
        self._mesh, self._file = mesh, file
        self._flag, self._flags = torch.zeros(1), torch.zeros(mesh.size)

    def allocate(self, num_bytes: int) -> list[torch.Tensor]:
        return list(share(self._mesh, self._file, self._mesh.size * num_bytes).chunk(self._mesh.size))

    def barrier(self) -> None:
        self._mesh.all_gather(self._flags, self._flag)


class Symmetric:
    """GPUs that reach each other's memory."""

    def __init__(self, mesh: ProcessMesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device

    def allocate(self, num_bytes: int) -> list[torch.Tensor]:
        import torch.distributed._symmetric_memory as symmetric_memory

        torch.cuda.empty_cache()  # what PyTorch holds back is not there for other allocators
        self._mine = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._mine.zero_()
        self._handle = symmetric_memory.rendezvous(self._mine, self._mesh.group)
        return [self._handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(self._mesh.size)]

    def barrier(self) -> None:
        self._handle.barrier(channel=0)


def make_peer_memory(exchange: str, mesh: Mesh, device: torch.device, file: int) -> PeerMemory | None:
    """None for one rank, and for GPUs that do not reach each other's memory; "push", the exchange, says that they do.

    `file` is a new one, the same on all ranks; each `PeerMemory` needs its own.
    """
    if not isinstance(mesh, ProcessMesh):
        return None
    if device.type == "cpu":
        return SharedFile(mesh, file)
    peers = (peer for peer in range(mesh.size) if peer != device.index)
    reach = exchange == "push" or all(torch.cuda.can_device_access_peer(device, peer) for peer in peers)
    return Symmetric(mesh, device) if reach else None
