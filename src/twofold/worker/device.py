"""What a rank computes on, and how it learns that work enqueued there is done."""

from typing import Protocol

import torch


class Event(Protocol):
    """Work that was enqueued."""

    def query(self) -> bool:
        """Whether it is done."""

    def synchronize(self) -> None:
        """Waits until it is done."""


class Device(Protocol):
    torch_device: torch.device

    def record(self) -> Event:
        """An event of all work enqueued so far."""


class _Done:
    """A CPU computes at once, so all work is done."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CPU:
    torch_device = torch.device("cpu")

    def record(self) -> Event:
        return _Done()


class CUDA:
    """Each rank has a GPU of its own."""

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record()
        return event
