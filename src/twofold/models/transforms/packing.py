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
    """Stands in for a Linear. Its weight is part of a larger one, whose outputs are laid out rank after rank:

        | q of rank 0 | k of rank 0 | v of rank 0 | q of rank 1 | ... |

    So both layouts need one product: by tokens the whole weight's, by heads that of a rank's rows.
    """

    def __init__(self, packed: Linear, start: int, size: int, num_parts: int) -> None:
        """Outputs `start` to `start + size` in each of `num_parts` parts of the packed ones."""
        super().__init__()
        self.packed, self.start, self.size, self.num_parts = packed, start, size, num_parts
        self.in_features, self.out_features = packed.in_features, size * num_parts
        self._num_outputs = packed.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features]; a view if there is one part."""
        product: torch.Tensor = self.packed(x)
        parts: torch.Tensor = product.unflatten(-1, (self.num_parts, -1))
        return parts.narrow(-1, self.start, self.size).flatten(-2)

    def keep_rank(self, rank: int) -> None:
        """Computes what a rank does by heads: its part alone. The weight becomes a view, once for all that share it."""
        size = self._num_outputs // self.num_parts
        if self.packed.out_features == self._num_outputs:  # no sibling has done it
            for field, whole in self.packed.named_parameters():
                view = whole.narrow(0, rank * size, size)
                setattr(self.packed, field, torch.nn.Parameter(view, requires_grad=False))
            self.packed.out_features = size
        self.num_parts, self.out_features, self._num_outputs = 1, self.size, size


class PackProjections(Transform):
    """Each projection of one input must give the same result."""

    name = "packed projections"

    def __init__(self, model: torch.nn.Module, num_ranks: int) -> None:
        """With several ranks queries are projected separately, while keys and values travel."""
        self.model, self.num_ranks, self.with_queries = model, num_ranks, num_ranks == 1

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
        # Layers whose weights are in the same memory (`holding.py`) share packed ones, too.
        packed: dict[tuple[int, ...], torch.Tensor] = {}
        for module, names in self.siblings:
            _pack(module, names, self.num_ranks, packed)

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


def _pack(
    module: torch.nn.Module, names: list[str], num_ranks: int, known: dict[tuple[int, ...], torch.Tensor]
) -> None:
    """`known`: addresses of weights -> those weights packed."""
    linears: list[Linear] = [module.get_submodule(name) for name in names]  # type: ignore[misc]
    out_features = sum(linear.out_features for linear in linears)
    divides = all(linear.out_features % num_ranks == 0 for linear in linears)
    num_parts = num_ranks if divides else 1
    packed = Linear(linears[0].in_features, out_features, bias=linears[0].bias is not None, device="meta")
    for field in dict(packed.named_parameters()):
        parameters = [linear.get_parameter(field) for linear in linears]
        addresses = tuple(parameter.data_ptr() for parameter in parameters)
        if addresses not in known:
            # [rank, outputs of the rank, ...] of each, side by side
            parts = [parameter.unflatten(0, (num_parts, -1)) for parameter in parameters]
            known[addresses] = torch.cat(parts, dim=1).flatten(0, 1)
        setattr(packed, field, torch.nn.Parameter(known[addresses], requires_grad=False))
    start = 0
    for name, linear in zip(names, linears, strict=True):
        size = linear.out_features // num_parts
        setattr(module, name, Part(packed, start, size, num_parts))
        start += size


def _unpacked(part: Part) -> Linear:
    """A separate Linear again."""
    linear = Linear(part.in_features, part.out_features, bias=part.packed.bias is not None, device="meta")
    for field, packed in part.packed.named_parameters():
        own = packed.unflatten(0, (part.num_parts, -1)).narrow(1, part.start, part.size).flatten(0, 1)
        setattr(linear, field, torch.nn.Parameter(own, requires_grad=False))
    return linear
