"""Run projections of one input as one product: fewer kernels, and none too small to fill a GPU.

    q_proj(x), k_proj(x), v_proj(x)   ->   x @ [q | k | v]; each takes its part

Each projection asks for the whole product. A compiler sees the same product three times and keeps one (`compile.py`).
So a model is packed only if its layers are compiled.
"""

import torch
from torch.nn import Linear

from twofold.models.probe import largest_change
from twofold.models.transforms.base import Transform, sample_input

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("w1", "w3"))
NUM_TOKENS = 2  # of the input that each projection is compared with


class Part(torch.nn.Module):
    """Stands in for a Linear. Its weight is part of a larger one: outputs `start` to `start + out_features`."""

    def __init__(self, packed: Linear, start: int, out_features: int) -> None:
        super().__init__()
        self.packed, self.start = packed, start
        self.in_features, self.out_features = packed.in_features, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features], a view."""
        product: torch.Tensor = self.packed(x)
        return product.narrow(-1, self.start, self.out_features)


class PackProjections(Transform):
    """Each projection of one input must give the same result."""

    name = "packed projections"

    def __init__(self, model: torch.nn.Module, with_queries: bool) -> None:
        self.model, self.with_queries = model, with_queries

    def find(self) -> str | None:
        self.siblings: list[tuple[torch.nn.Module, list[str]]] = []  # module, the names of its projections of one input
        for module in self.model.modules():
            children = dict(module.named_children())
            for names in SIBLINGS:
                wanted = [name for name in names if self.with_queries or not name.startswith("q")]
                # Only what is a Linear and nothing more: a subclass may compute something else.
                linears = {name: child for name in wanted if type(child := children.get(name)) is Linear}
                kinds = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in linears.values()}
                if len(linears) > 1 and len(kinds) == 1:
                    self.siblings.append((module, list(linears)))
        if not self.siblings:
            return "no two projections have the same input"
        self._expected = self._products()
        return None

    def apply(self) -> None:
        for module, names in self.siblings:
            _pack(module, names)

    def verify(self) -> float:
        return largest_change(self._products(), self._expected)

    def undo(self) -> None:
        for module, names in self.siblings:
            for name in names:
                if isinstance(part := module.get_submodule(name), Part):
                    setattr(module, name, _unpacked(part))

    def _products(self) -> list[torch.Tensor]:
        projections = [module.get_submodule(name) for module, names in self.siblings for name in names]
        return [
            projection(sample_input(NUM_TOKENS, projection.in_features, like=next(projection.parameters())))  # type: ignore[arg-type]
            for projection in projections
        ]


def _pack(module: torch.nn.Module, names: list[str]) -> None:
    parts: list[Linear] = [module.get_submodule(name) for name in names]  # type: ignore[misc]
    out_features = sum(part.out_features for part in parts)
    packed = Linear(parts[0].in_features, out_features, bias=parts[0].bias is not None, device="meta")
    for field in dict(packed.named_parameters()):
        joined = torch.cat([part.get_parameter(field) for part in parts])
        setattr(packed, field, torch.nn.Parameter(joined, requires_grad=False))
    start = 0
    for name, part in zip(names, parts, strict=True):
        setattr(module, name, Part(packed, start, part.out_features))
        start += part.out_features


def _unpacked(part: Part) -> Linear:
    """A separate Linear again; its weight is a view of the packed one."""
    linear = Linear(part.in_features, part.out_features, bias=part.packed.bias is not None, device="meta")
    for field, packed in part.packed.named_parameters():
        view = packed.narrow(0, part.start, part.out_features)
        setattr(linear, field, torch.nn.Parameter(view, requires_grad=False))
    return linear
