"""Projections of one input as one product: fewer kernels, and none too small to fill a GPU.

    q_proj(x), k_proj(x), v_proj(x)   ->   x @ [q | k | v], of which each takes its part

No family's forward is written again. Each projection asks for the whole product; a compiler sees the same product three
times and keeps one (`worker/compile.py`). So a model is packed only if its layers are compiled.
"""

import torch
from torch.nn import Linear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("w1", "w3"))


class Part(torch.nn.Module):
    """Stands in for a Linear whose weight became rows `start` to `start + out_features` of a larger one's."""

    def __init__(self, packed: Linear, start: int, out_features: int) -> None:
        super().__init__()
        self.packed, self.start = packed, start
        self.in_features, self.out_features = packed.in_features, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features], a view."""
        product: torch.Tensor = self.packed(x)
        return product.narrow(-1, self.start, self.out_features)


def pack_projections(model: torch.nn.Module, with_queries: bool) -> int:
    """Packs siblings in place; → how many products there are less."""
    saved = 0
    for module in list(model.modules()):
        children = dict(module.named_children())
        for siblings in SIBLINGS:
            names = [name for name in siblings if with_queries or not name.startswith("q")]
            # Only what is a Linear and nothing more: a subclass may compute something else.
            linears = {name: child for name in names if type(child := children.get(name)) is Linear}
            kinds = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in linears.values()}
            if len(linears) > 1 and len(kinds) == 1:
                _pack(module, linears)
                saved += len(linears) - 1
    return saved


def _pack(module: torch.nn.Module, linears: dict[str, Linear]) -> None:
    parts = list(linears.values())
    packed = Linear(
        parts[0].in_features, sum(p.out_features for p in parts), bias=parts[0].bias is not None, device="meta"
    )
    for field in dict(packed.named_parameters()):
        joined = torch.cat([part.get_parameter(field) for part in parts])
        setattr(packed, field, torch.nn.Parameter(joined, requires_grad=False))
    start = 0
    for name, part in linears.items():
        setattr(module, name, Part(packed, start, part.out_features))
        start += part.out_features
