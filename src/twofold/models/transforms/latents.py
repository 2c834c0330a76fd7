"""Which attention modules can hand over latents in place of heads, and how they are made to.

Families with multi-head latent attention project, scale and rotate each in its own way, but all of them give the
finished latent and the rotated part of the keys to a method `expand_kv`, and what that returns to the attention
interface. So this method alone is replaced, by one that returns what it was given: no family's forward is written
again, nothing is expanded that attention does not ask for, and a compiler sees latents flow into the attention op like
any keys and values.

Names prove nothing. A forward pass with latents must lead to the very queries, keys, values and hidden states that one
without them led to; otherwise the model keeps its heads, which is right for any model, only larger.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from twofold.attention.mla import expand
from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.errors import ModelError

TOLERANCE = 1e-2  # above what bfloat16 rounds; heads that are made in another way are off by about 1

Attention = Callable[..., tuple[torch.Tensor, None]]


def keep_latents(
    specs: Sequence[AttentionSpec], modules: Sequence[torch.nn.Module], run: Callable[[Attention], torch.Tensor]
) -> list[AttentionSpec]:
    """Replaces `expand_kv` of attention modules where that is sound; what each of them computes from now on.

    `run` makes a forward pass with the given function in the place of attention, and returns hidden states.
    """
    candidates = {
        module: spec
        for module, spec in zip(modules, specs, strict=True)
        if callable(getattr(module, "expand_kv", None)) and hasattr(module, "kv_b_proj")
    }
    if not candidates:
        return list(specs)
    heads = _Heads()
    hidden = run(heads)
    for module in candidates:
        module.expand_kv = _return_latents  # type: ignore[assignment]
    latents = _Latents(candidates, heads.calls)
    try:
        sound = _close(run(latents), hidden)
    except Exception:  # the family does more with its keys than to hand them over
        sound = False
    if not sound:
        for module in candidates:
            del module.expand_kv
        return list(specs)
    return [latents.specs.get(module, spec) for module, spec in zip(modules, specs, strict=True)]


def _return_latents(kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The new `expand_kv`: kv_nope [1, 1, T, L] and k_rot [1, 1, T, R] are handed on as key and value."""
    return kv_nope, k_rot


class _Heads:
    """Stands in for attention: passes each token its own value, and notes what it was called with."""

    def __init__(self) -> None:
        self.calls: dict[torch.nn.Module, tuple[torch.Tensor, ...]] = {}  # query, key, value

    def __call__(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        self.calls[module] = query, key, value
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None


class _Latents(_Heads):
    """The same for modules that hand over latents; they must expand to what `expected` has. It answers from there, so
    rounding does not add up from layer to layer."""

    def __init__(
        self,
        candidates: Mapping[torch.nn.Module, AttentionSpec],
        expected: Mapping[torch.nn.Module, tuple[torch.Tensor, ...]],
    ) -> None:
        super().__init__()
        self.candidates, self.expected = candidates, expected
        self.specs: dict[torch.nn.Module, LatentSpec] = {}

    def __call__(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        if module in self.candidates:
            spec = self.specs[module] = _latent_spec(
                self.candidates[module], module.get_parameter("kv_b_proj.weight"), key, value
            )
            entries = spec.pack(key[0].transpose(0, 1), value[0].transpose(0, 1))
            keys, values = spec.expanded.unpack(expand(entries, spec))
            key, value = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        expected = self.expected[module]
        for now, then in zip((query, key, value), expected, strict=True):
            if not _close(now, then):
                raise ModelError("latents do not expand to the heads")
        return super().__call__(module, *expected)


def _latent_spec(
    spec: AttentionSpec, weight: torch.nn.Parameter, latents: torch.Tensor, rotated: torch.Tensor
) -> LatentSpec:
    """What attention over `latents` [1, 1, T, L] and `rotated` [1, 1, T, R] computes, if over heads it is `spec`."""
    kv_lora_rank, qk_rope_head_dim = latents.shape[-1], rotated.shape[-1]
    num_rows = spec.num_heads * (spec.qk_head_dim - qk_rope_head_dim + spec.v_head_dim)
    if (
        weight.shape != (num_rows, kv_lora_rank)
        or not latents.shape[:2] == rotated.shape[:2] == (1, 1)
        or spec.num_kv_heads != spec.num_heads
        or any(extra is not None for extra in (spec.sliding_window, spec.softcap, spec.sinks))
    ):
        raise ModelError("its heads are not made of latents in the way known here")
    return LatentSpec(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        qk_head_dim=spec.qk_head_dim,
        v_head_dim=spec.v_head_dim,
        scaling=spec.scaling,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        weight=weight,
    )


def _close(now: torch.Tensor, then: torch.Tensor) -> bool:
    """False for NaN, too."""
    return now.shape == then.shape and bool((now.float() - then.float()).norm() <= TOLERANCE * then.float().norm())
