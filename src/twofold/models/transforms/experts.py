"""Run the experts of few tokens with our own kernel on a GPU.

For more tokens Transformers' grouped products are faster. Models reach both through Transformers'
`ExpertsInterface`, as they reach attention: routing, gates and weights of experts stay theirs. Every rank holds all
experts and routes its own tokens, so nothing is exchanged.
"""

from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from twofold.models.probe import largest_change
from twofold.models.transforms.base import Transform, sample_input

EXPERTS_NAME = "twofold"
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
