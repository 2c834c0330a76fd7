"""Keep latents in place of heads (multi-head latent attention; DeepSeek-V2, https://arxiv.org/abs/2405.04434).

Families with latent attention project, scale and apply RoPE each in its own way. But all of them give the finished
latent and the RoPE part of the keys to a method `expand_kv`, and what that returns to the attention interface. So only
this method is replaced, by one that returns its arguments. Attention then decides what to expand, and for a compiler
latents enter the attention op like any keys and values.
"""

import torch
from transformers import PreTrainedModel

from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.models.probe import Recorder, example_ids, largest_change, run
from twofold.models.transforms.base import Transform

NUM_TOKENS = 8  # of the forward passes that are compared


class KeepLatents(Transform):
    """With latents, queries, keys, values and hidden states must be the same as before."""

    name = "latents"

    def __init__(self, model: PreTrainedModel, modules: list[torch.nn.Module], specs: list[AttentionSpec]) -> None:
        """`modules` and `specs` of each layer's attention; the specs of those that keep latents are replaced."""
        self.model, self.modules, self.specs = model, modules, specs

    def find(self) -> str | None:
        self._heads = list(self.specs)
        self._latents: dict[int, LatentSpec] = {}  # layer -> its spec with latents
        for layer, (module, spec) in enumerate(zip(self.modules, self.specs, strict=True)):
            if callable(getattr(module, "expand_kv", None)) and hasattr(module, "kv_b_proj"):
                latents = _latent_spec(spec, module.get_parameter("kv_b_proj.weight"))
                if latents is None:
                    return f"the heads of layer {layer} are not computed from latents in a known way"
                self._latents[layer] = latents
        if not self._latents:
            return "no layer has latents"
        self._before, self._hidden_before = self._record(None)
        return None

    def apply(self) -> None:
        for layer, spec in self._latents.items():
            self.modules[layer].expand_kv = _return_latents  # type: ignore[assignment]
            self.specs[layer] = spec

    def verify(self) -> float:
        now, hidden = self._record(self._before)
        return largest_change([*now.tokens, hidden], [*self._before.tokens, self._hidden_before])

    def undo(self) -> None:
        self.specs[:] = self._heads
        for layer in self._latents:
            vars(self.modules[layer]).pop("expand_kv", None)

    def _record(self, before: Recorder | None) -> tuple[Recorder, torch.Tensor]:
        recorder = Recorder(self.specs, answers=None if before is None else before.values)
        ids = example_ids(self.model.base_model, NUM_TOKENS)
        return recorder, run(self.model.base_model, recorder, ids, torch.arange(NUM_TOKENS, device=ids.device))


def _return_latents(kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The new `expand_kv`: returns kv_nope [1, 1, T, L] and k_rot [1, 1, T, R] as key and value."""
    return kv_nope, k_rot


def _latent_spec(spec: AttentionSpec, weight: torch.nn.Parameter) -> LatentSpec | None:
    """The spec over latents of a layer with `spec` over heads; None if it has a window, sinks or other extras.

    weight [H * (D - R + Dv), L] expands a latent: R, the width of the RoPE part, follows from its shape.
    """
    num_expanded, rest = divmod(len(weight), spec.num_heads)  # D - R + Dv
    qk_rope_head_dim = spec.qk_head_dim + spec.v_head_dim - num_expanded
    if (
        rest
        or not 0 < qk_rope_head_dim < spec.qk_head_dim
        or spec.num_kv_heads != spec.num_heads
        or any(extra is not None for extra in (spec.sliding_window, spec.softcap, spec.sinks))
    ):
        return None
    return LatentSpec(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        qk_head_dim=spec.qk_head_dim,
        v_head_dim=spec.v_head_dim,
        scaling=spec.scaling,
        kv_lora_rank=weight.shape[1],
        qk_rope_head_dim=qk_rope_head_dim,
        weight=weight,
    )
