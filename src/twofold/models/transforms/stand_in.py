"""Stand in for a decoder layer in the list of a model's layers, and do more than it."""

from typing import Any

import torch


class StandIn(torch.nn.Module):
    """Has the attributes of its layer, which families read."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.training = layer, layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def bare(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer as its family wrote it."""
    while isinstance(layer, StandIn):
        layer = layer.layer
    return layer
