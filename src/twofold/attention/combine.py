"""What becomes of a backend's output and log-sum-exp: merged with those over other keys, scaled by sinks.

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
    """Changes `out` [N, H, Dv] of log-sum-exp [N, H] to what it is with sinks [H], and returns it.

    A sink adds exp(sink) to the softmax's sum: exp(lse) / (exp(lse) + exp(sink)) of the output is left.
    """
    return out.mul_(torch.sigmoid(lse - sinks).unsqueeze(-1))
