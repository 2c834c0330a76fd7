"""What is done to a backend's output and log-sum-exp: merging over disjoint keys, scaling by sinks.

out = Σ exp(logit) · value / Σ exp(logit)        lse = log Σ exp(logit), -inf where there is no key, and out is 0
"""

import torch


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys. out [..., Dv], lse [...]; both sets may be empty."""
    share = torch.sigmoid((other_lse - lse).nan_to_num())[..., None]  # of two empty sets the difference is NaN
    return torch.lerp(out.float(), other.float(), share).to(out.dtype), torch.logaddexp(lse, other_lse)


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Applies sinks [H] to `out` [N, H, Dv] with log-sum-exp [N, H], in place, and returns it.

    A sink adds exp(sink) to the softmax's sum, so the output is scaled by exp(lse) / (exp(lse) + exp(sink)).
    """
    return out.mul_(torch.sigmoid(lse - sinks).unsqueeze(-1))
