"""Experts of a decode step on a GPU; for more tokens Transformers' grouped products, which are hard to beat.

Models reach this through Transformers' `ExpertsInterface`, as they reach attention: routing, gates and weights of
experts stay theirs. On every rank the experts are whole, and each rank routes its own tokens: nothing is exchanged.
"""

from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

EXPERTS_NAME = "twofold"
MAX_PAIRS = 256  # of a token and an expert: more are worth sorting


def use_few_token_experts(body: torch.nn.Module) -> None:
    """Lets layers on a GPU take their experts' products from here, where they would take grouped ones."""
    from twofold.models.transforms import expert_linear  # noqa: F401  (Triton is on GPU machines only)

    for module in body.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(module, "down_proj") and getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = EXPERTS_NAME


def experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The function that `ExpertsInterface` knows as "twofold". hidden_states [T, H], the others [T, K] → [T, H]."""
    expert_ids, num_tokens = top_k_index.reshape(-1), len(hidden_states)
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
    weighted = x * top_k_weights.reshape(-1, 1)
    summed: torch.Tensor = weighted.view(num_tokens, -1, weighted.shape[-1]).sum(dim=1)
    return summed.to(hidden_states.dtype)


ExpertsInterface.register(EXPERTS_NAME, experts_forward)
