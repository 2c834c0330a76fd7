"""Which models are served, and why others are not.

Twofold runs Transformers' code of a model and replaces attention only. That is correct only if tokens affect each
other in attention and nowhere else. `refusal` checks what a configuration declares, `models/probe.py` the loaded model.
"""

import inspect
import sys

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from twofold.errors import ModelError

# The text part of some multimodal models is a causal model that AutoModelForCausalLM does not know.
if "mistral4" in CONFIG_MAPPING_NAMES:
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("mistral4", "Mistral4ForCausalLM")

SERVED_LAYER_TYPES = {"full_attention", "sliding_attention", "attention", "global", "local", "sliding", "full"}
# Types that `probe` refuses always: they are refused before a model is loaded.
FOUND_BY_PROBE = {
    "blt": "it attends to patches of bytes, in a way of its own",
    "doge": "which keys a token attends to depends on their values",
}
# Served types whose steps run by tokens only, as loading a model of them finds out, too.
_NOTHING, _AT_ONCE = "no projection of it is known to divide", "it computes with all heads at once"
ONLY_BY_TOKENS = {
    **dict.fromkeys(["ctrl", "gpt2", "gpt_bigcode", "jetmoe", "modernbert-decoder", "persimmon"], _NOTHING),
    **dict.fromkeys(["beam", "bitnet", "dbrx", "diffllama", "dory", "hrm_text", "moshi"], _AT_ONCE),
}


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
    """The class that AutoModelForCausalLM makes of this configuration; from the model's own code, if that is trusted.

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
    """Why a model of this configuration is not served; None if the configuration gives no reason."""
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
    # Some models of families that mix attention with other layers have attention only.
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
    """Decoders too inherit `is_decoder=False` from the base configuration; only encoders make bidirectional masks."""
    return "create_bidirectional_mask" not in _source(cls)


def _source(cls: type[PreTrainedModel]) -> str:
    """The source of the module that defines `cls`; for a model's own code also of what it imports from Transformers."""
    module = sys.modules[cls.__module__]
    names = {module.__name__}
    if not module.__name__.startswith("transformers."):
        taken = {str(getattr(value, "__module__", "")) for value in vars(module).values()}
        names |= {name for name in taken if name.startswith("transformers.models.")}
    return "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(names))
