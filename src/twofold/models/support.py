"""Which models are served, and why not those that are not.

Twofold leaves a model's code to Transformers and takes over one thing: attention. That is sound only if attention is
the one place where a token sees another. `refusal` says no by what a configuration declares; `probe` makes sure by
running the loaded model with attention cut off, its tokens in another order and in other company, and reads off what
each layer's attention computes.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from twofold.attention.op import ATTENTION_NAME
from twofold.attention.spec import AttentionSpec
from twofold.errors import ModelError
from twofold.models.transforms.latents import Attention, keep_latents

# A part of multimodal models that has a causal model of its own, which AutoModelForCausalLM does not know.
if "mistral4" in CONFIG_MAPPING_NAMES:
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("mistral4", "Mistral4ForCausalLM")

PROBE_NAME = "twofold_probe"
SERVED_LAYER_TYPES = {"full_attention", "sliding_attention", "attention", "global", "local", "sliding", "full"}
# What `probe` finds in every model of a type, so that it can be said before one is loaded.
FOUND_BY_PROBE = {
    "blt": "it attends to patches of bytes, in a way of its own",
    "doge": "which keys a token attends to depends on their values",
}
# What a layer may hand to attention beside q, k, v that does not change the result, or that we compute ourselves.
UNDERSTOOD = {"scaling", "sliding_window", "softcap", "s_aux", "is_causal", "dropout"}
HARMLESS = {
    "attention_mask", "position_ids", "position_embeddings", "cache_position", "past_key_values", "past_key_value",
    "use_cache", "output_attentions", "output_router_logits", "output_hidden_states", "return_dict", "logits_to_keep",
    "layer_type", "layer_idx", "attn_implementation", "shared_kv_states", "per_layer_input", "input_ids",
    "deterministic", "head_mask", "layer_head_mask",
}  # fmt: skip


def causal_model_types() -> list[str]:
    """Every type that Transformers has a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def causal_lm_class(model_type: str) -> type[PreTrainedModel] | None:
    """Transformers' class that AutoModelForCausalLM makes for this `model_type`."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if isinstance(name, tuple | list):
        name = name[0]
    return None if name is None else getattr(transformers, name, None)


def model_class(config: PretrainedConfig, trust_remote_code: bool = False) -> type[PreTrainedModel] | None:
    """The class that AutoModelForCausalLM makes of this configuration: the model's own code, where it is trusted.

    Raises:
        ModelError: that code cannot be run.
    """
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if reference is None or not trust_remote_code:
        return causal_lm_class(config.model_type)
    try:
        cls: type[PreTrainedModel] = get_class_from_dynamic_module(reference, config.name_or_path)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot run the code of model {config.name_or_path!r}: {line}", field="model") from error
    return cls


def refusal(config: PretrainedConfig, trust_remote_code: bool = False) -> str | None:
    """Why a model of this configuration is not served; None if nothing that it declares speaks against it."""
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoders are served"
    for part in ("vision_config", "audio_config", "text_config"):
        if getattr(config, part, None) is not None:
            return f"it is multimodal ({part}); only text decoders are served: load its text model by itself"
    cls = model_class(config, trust_remote_code)
    if cls is None:
        has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        way_out = "; set trust_remote_code=True to run the code that comes with it" if has_code else ""
        return f"Transformers has no causal language model of type {config.model_type!r}{way_out}"
    if reason := FOUND_BY_PROBE.get(config.model_type):
        return reason
    layer_types = set(getattr(config, "layer_types", None) or ())
    # Of families that mix attention with other layers some models have attention only.
    if getattr(cls, "_is_stateful", False) and not (layer_types and layer_types <= SERVED_LAYER_TYPES):
        return "it is recurrent or has linear attention: its tokens see each other outside attention"
    if other := sorted(str(t) for t in layer_types - SERVED_LAYER_TYPES):
        return f"it has layers of type {', '.join(other)}; full and sliding-window attention are served"
    if getattr(config, "is_decoder", True) is False and not _is_causal_by_nature(cls):
        return "it is an encoder (is_decoder is false)"
    if getattr(config, "alibi", False):
        return "it uses ALiBi position biases, which the attention interface does not carry"
    if "ALL_ATTENTION_FUNCTIONS" not in _source(cls):
        return "its attention does not go through Transformers' attention interface"
    return None


def _is_causal_by_nature(cls: type[PreTrainedModel]) -> bool:
    """Decoders inherit `is_decoder=False` from the base configuration; encoders are those that could see both ways."""
    return "create_bidirectional_mask" not in _source(cls)


def _source(cls: type[PreTrainedModel]) -> str:
    """The code of the module that `cls` is defined in; of a model's own module also what it takes from Transformers."""
    module = sys.modules[cls.__module__]
    names = {module.__name__}
    if not module.__name__.startswith("transformers."):
        taken = {str(getattr(value, "__module__", "")) for value in vars(module).values()}
        names |= {name for name in taken if name.startswith("transformers.models.")}
    return "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(names))


class _Recorder:
    """Stands in for attention: passes each token its own value, and notes what it was called with."""

    def __init__(self, max_position: int | None) -> None:
        self.modules: list[torch.nn.Module] = []
        self.specs: list[AttentionSpec] = []
        self._calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # query, key, value
        self._max_position = max_position  # None where masks are not looked at
        self._mask_functions: dict[int, Callable[..., torch.Tensor]] = {}  # id of a mask -> what it was made from
        self._masks: list[torch.Tensor] = []  # kept, so that no id comes twice

    def make_mask(
        self, batch_size: int, q_length: int, kv_length: int, *, mask_function: Callable[..., torch.Tensor], **_: Any
    ) -> torch.Tensor:
        """What Transformers calls to make a mask of [1, 1, q_length, kv_length] from a function of positions."""
        mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)
        self._mask_functions[id(mask)] = mask_function
        self._masks.append(mask)
        return mask

    def _window(self, mask: torch.Tensor, declared: int | None, last: int) -> int | None:
        """The sliding window that a layer's mask amounts to; it must be causal and nothing else beside."""
        if (visible := self._mask_functions.get(id(mask))) is None:
            raise ModelError("it masks attention in a way of its own")
        zero = torch.zeros(1, dtype=torch.long)

        def keys_of(query: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
            keys = torch.arange(last + 1)
            seen = visible(zero, zero, torch.full_like(keys, query), keys)
            return seen.expand(last + 1), (keys <= query) & (keys > query - (window or last + 1))

        count = int(keys_of(last, None)[0].sum())
        window = count if count <= last else None
        for query in {0, min(5, last), last // 3, last // 2, last - 1, last}:
            seen, expected = keys_of(query, window)
            if not torch.equal(seen, expected):
                raise ModelError("its attention is neither causal nor causal within a sliding window")
        if declared is not None and window is not None and declared != window:
            raise ModelError(f"a layer's mask has a window of {window}, its attention one of {declared}")
        return window if window is not None else declared

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        window = kwargs.get("sliding_window")
        if attention_mask is not None and self._max_position is not None:
            window = self._window(attention_mask, window, self._max_position)
        if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise ModelError("its attention is not causal")
        for name, given in kwargs.items():
            if given is not None and name not in UNDERSTOOD | HARMLESS:
                raise ModelError(f"its attention takes {name!r}, which is not known here")
        scaling = kwargs.get("scaling")
        self.modules.append(module)
        self.specs.append(
            AttentionSpec(
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                qk_head_dim=query.shape[-1],
                v_head_dim=value.shape[-1],
                scaling=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
                sliding_window=window,
                softcap=kwargs.get("softcap"),
                sinks=kwargs.get("s_aux"),
            )
        )
        self._calls.append((query, key, value))
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None

    def tokens(self) -> list[torch.Tensor]:
        """What each layer made of each token: its queries, keys and values, each [T, X]."""
        return [part[0].transpose(0, 1).flatten(1) for call in self._calls for part in call]


@torch.inference_mode()
def probe(model: PreTrainedModel) -> list[AttentionSpec]:
    """Each layer's attention, in the order of the forward pass.

    Those that can hand over latents in place of heads do so from now on (`models/latents.py`).

    With attention passing each token its own value, all that becomes of a token must follow from its id and position:
    the same tokens are run in another order, among others, and compared.

    Raises:
        ModelError: the model's tokens see each other outside attention, or its attention does what we do not know.
    """
    name = type(model).__name__
    device = next(model.parameters()).device
    vocab_size = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(8, device=device) * 5 + 5) % vocab_size
    positions = torch.arange(8, device=device)
    shuffled = torch.tensor([5, 0, 3, 7, 1, 2, 6, 4], device=device)  # place in the second run -> position
    kept = torch.tensor([2, 3, 5], device=device)  # positions of the tokens that are the same in both runs
    others = torch.where(torch.isin(positions, kept), ids, (ids + 3) % vocab_size)
    max_position = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 8192
    first, second = _Recorder(max_position), _Recorder(None)
    try:
        # Without positions, as the family numbers them itself; then with those that a rank gives.
        hidden = _run(model, first, first.make_mask, input_ids=ids[None])
        mixed = _run(model, second, first.make_mask, input_ids=others[shuffled][None], position_ids=shuffled[None])
    except ModelError as error:
        raise ModelError(f"{name} is not served: {error}") from None
    except Exception as error:
        raise ModelError(f"{name} is not served: its forward pass failed on token ids ({error})") from error
    specs = first.specs
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    # Some families run a layer more than once, some attend more than once in a layer.
    num_attending = len(set(first.modules))
    if not specs or (num_layers is not None and num_layers not in (len(specs), num_attending)):
        raise ModelError(
            f"{name} is not served: {num_attending} of its {num_layers} layers attend through the attention interface"
        )
    places = shuffled.argsort()[kept]
    change = largest_change(
        [part[places] for part in (*second.tokens(), mixed)], [part[kept] for part in (*first.tokens(), hidden)]
    )
    if not change < (1e-3 if hidden.dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{name} is not served: its tokens see each other outside attention, or are numbered in a way of its own "
            f"(change {change:.1e})"
        )
    layer_types = getattr(model.config, "layer_types", None)
    for layer, (module, spec) in enumerate(zip(first.modules, specs, strict=True)):
        declared = layer_types[layer] if layer_types and len(layer_types) == len(specs) else None
        if declared == "sliding_attention" and spec.sliding_window is None:
            raise ModelError(f"{name} is not served: layer {layer} hides its sliding window from the interface")
        module.twofold_v_head_dim = spec.v_head_dim  # type: ignore[assignment]

    def run(attention: Attention) -> torch.Tensor:
        return _run(model, attention, first.make_mask, input_ids=ids[None], position_ids=positions[None])

    specs = keep_latents(specs, first.modules, run)
    _use_attention(model, ATTENTION_NAME)
    return specs


def _run(
    model: PreTrainedModel, attention: Attention, make_mask: Callable[..., torch.Tensor], **inputs: torch.Tensor
) -> torch.Tensor:
    """Hidden states [T, hidden_size] with these functions in the place of attention and its masks."""
    AttentionInterface.register(PROBE_NAME, attention)
    AttentionMaskInterface.register(PROBE_NAME, make_mask)
    _use_attention(model, PROBE_NAME)
    hidden_states: torch.Tensor = model.base_model(**inputs, use_cache=False)[0][0]
    return hidden_states


def largest_change(now: Sequence[torch.Tensor], then: Sequence[torch.Tensor]) -> float:
    """Of each tensor relative to what it was; NaN if any is, which `max` would pass over."""
    changes = [
        float((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-30))
        for x, y in zip(now, then, strict=True)
    ]
    return float(np.max(changes))


def _use_attention(model: PreTrainedModel, name: str) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._attn_implementation = name
