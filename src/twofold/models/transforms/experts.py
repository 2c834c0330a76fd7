"""Run the experts of few tokens with our own kernel on a GPU, and a share of every expert in steps by heads.

For more tokens Transformers' grouped products are faster. Models reach all of them through Transformers'
`ExpertsInterface`, as they reach attention: routing, gates and weights of experts stay theirs. By tokens every rank
holds all experts and routes its own tokens, so nothing is exchanged. By heads every rank routes all tokens, and has
some columns of every expert, so that no rank waits for another one's experts; outputs are summed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from twofold.models.probe import largest_change
from twofold.models.transforms.base import Transform, sample_input
from twofold.parallel.mesh import Mesh

EXPERTS_NAME = "twofold"
DIVIDED_EXPERTS_NAME = "twofold_divided"
GROUPED_NAME = "grouped_mm"
MAX_PAIRS = 256  # of a token and an expert; for more, sorting is faster
TOP_K = 2  # experts of a token in the comparison
NUM_TOKENS = (4, MAX_PAIRS // TOP_K)  # of the inputs compared: fewer pairs than experts, and the most that are served


class FewTokenExperts(Transform):
    """Each module of experts must give the output of grouped products."""

    name = "experts of few tokens"

    def __init__(self, body: torch.nn.Module) -> None:
        self.body = body

    def find(self) -> str | None:
        self.experts: list[Any] = [
            module
            for module in self.body.modules()
            if isinstance(getattr(module, "down_proj", None), torch.nn.Parameter)
            and getattr(getattr(module, "config", None), "_experts_implementation", None) == GROUPED_NAME
        ]
        if not self.experts:
            return "no experts run as grouped products"
        from twofold.models.transforms import expert_linear  # noqa: F401  (Triton is on GPU machines only)

        self._expected = self._outputs()
        return None

    def apply(self) -> None:
        self._use(EXPERTS_NAME)

    def verify(self) -> float:
        return largest_change(self._outputs(), self._expected)

    def undo(self) -> None:
        self._use(GROUPED_NAME)

    def _use(self, name: str) -> None:
        for module in self.experts:
            module.config._experts_implementation = name

    def _outputs(self) -> list[torch.Tensor]:
        outputs = []
        for module in self.experts:
            num_experts, width = len(module.down_proj), module.down_proj.shape[2 if module.is_transposed else 1]
            for num_tokens in NUM_TOKENS:
                x = sample_input(num_tokens, width, like=module.down_proj)
                chosen = torch.arange(num_tokens * TOP_K, device=x.device).view(-1, TOP_K) % num_experts
                outputs.append(module(x, chosen, x.new_full(chosen.shape, 1 / TOP_K)))
        return outputs


def experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function that `ExpertsInterface` knows as "twofold". hidden_states [T, H], the others [T, K] → [T, H]."""
    expert_ids = top_k_index.reshape(-1)
    if len(expert_ids) > MAX_PAIRS:
        out: torch.Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return out

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(self, name)
        product: torch.Tensor = torch.ops.twofold.expert_linear(x, weight, expert_ids, len(weight), self.is_transposed)
        return product + getattr(self, f"{name}_bias")[expert_ids] if self.has_bias else product

    if self.has_gate:
        x = self._apply_gate(linear(hidden_states, "gate_up_proj"))  # type: ignore[operator]
    else:
        x = self.act_fn(linear(hidden_states, "up_proj"))  # type: ignore[operator]
    x = linear(x, "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)  # type: ignore[operator]
    return _weigh(x, top_k_weights).to(hidden_states.dtype)


def _weigh(x: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """x [T * K, H] of each token and each of its experts, top_k_weights [T, K] → [T, H]."""
    weighted = x * top_k_weights.reshape(-1, 1)
    summed: torch.Tensor = weighted.view(*top_k_weights.shape, -1).sum(dim=1)
    return summed


ExpertsInterface.register(EXPERTS_NAME, experts_forward)


def divide_experts(body: torch.nn.Module, mesh: Mesh) -> int:
    """Gives each module of experts its rank's share of every expert, as views → how many modules have one.

    All of them do or none, because they have one configuration.
    """
    experts: list[Any] = [module for module in body.modules() if hasattr(module, "is_concatenated")]
    if not all(_divides(module, mesh.size) for module in experts):
        return 0
    for module in experts:
        module.twofold_shares = _shares(module, mesh)
        module.config._experts_implementation = DIVIDED_EXPERTS_NAME
    return len(experts)


def _divides(module: Any, num_ranks: int) -> bool:
    down = module.down_proj
    if down.is_cuda and down.dtype != torch.bfloat16:  # of other types the compiler knows no grouped products
        return False
    return expert_width(module) % num_ranks == 0 and not getattr(module, "has_post_expert_norm", False)


def expert_width(module: Any) -> int:
    """Numbers between the two halves of each expert."""
    return int(module.down_proj.shape[1 if module.is_transposed else 2])


def _shares(module: Any, mesh: Mesh) -> dict[str, Any]:
    """A rank's views: `up` [E, 2, f, H] (gate and up) or [E, 1, f, H], and `down` [E, 1, H, f]; their biases."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    num_parts = 2 if module.has_gate and module.is_concatenated else 1  # else gate and up take turns

    def mine(tensor: torch.Tensor) -> torch.Tensor:
        """tensor [E, num_parts * F, ...] → [E, num_parts, f, ...]"""
        share: torch.Tensor = tensor.unflatten(1, (num_parts, -1)).chunk(mesh.size, dim=2)[mesh.rank]
        return share

    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.mT, down.mT
    down = down.chunk(mesh.size, dim=2)[mesh.rank].unsqueeze(1)
    shares = {"up": mine(up), "down": down, "up_bias": None, "down_bias": None}
    if module.has_bias:
        shares["up_bias"] = mine(getattr(module, f"{name}_bias")).flatten(1)
        shares["down_bias"] = module.down_proj_bias if mesh.rank == 0 else None  # summed, so added once
    return shares


def divided_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function that `ExpertsInterface` knows as "twofold_divided"; arguments as of `experts_forward`."""
    shares = self.twofold_shares
    expert_ids, top_k = top_k_index.reshape(-1), top_k_index.shape[1]
    few = hidden_states.is_cuda and len(expert_ids) <= MAX_PAIRS
    if few:
        x, order = hidden_states, None
    else:
        expert_ids, order = expert_ids.sort()
        counts = torch.zeros(len(shares["down"]), dtype=torch.int32, device=expert_ids.device)
        ends = counts.index_add(0, expert_ids, counts.new_ones(len(expert_ids))).cumsum(0, dtype=torch.int32)
        x = hidden_states[order // top_k]

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if few:
            product: torch.Tensor = torch.ops.twofold.expert_linear(x, weight, expert_ids, len(weight), False)
            return product
        products = [F.grouped_mm(x, part.mT, offs=ends) for part in weight.unbind(1)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    x = linear(x, shares["up"])
    if shares["up_bias"] is not None:
        x = x + shares["up_bias"][expert_ids]
    x = linear(self._apply_gate(x) if self.has_gate else self.act_fn(x), shares["down"])
    if shares["down_bias"] is not None:
        x = x + shares["down_bias"][expert_ids]
    if order is not None:
        x = torch.empty_like(x).index_copy_(0, order, x)
    mine = _weigh(x, top_k_weights).to(hidden_states.dtype)
    total: torch.Tensor = torch.ops.twofold.sum_over_ranks(mine)
    return total


ExpertsInterface.register(DIVIDED_EXPERTS_NAME, divided_experts_forward)
