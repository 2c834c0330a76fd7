"""A tiny random model of any type that Transformers has a causal language model of: built from its own code."""

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 97
WINDOW = 8  # shorter than most test prompts: windows matter
MAX_POSITIONS = 256

# Families agree on these names. A name is set where a family's default has a value for it.
SMALL: dict[str, Any] = {
    # widths
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "head_dim": 16,
    "intermediate_size": 64, "n_inner": 64, "ffn_dim": 64, "ffn_hidden_size": 64, "mlp_hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    # depths and heads
    "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 2, "global_head_dim": 16,
    "num_kv_shared_layers": 0, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "swa_v_head_dim": 16,
    # tokens
    "vocab_size": VOCAB_SIZE, "vocab_size_per_layer_input": VOCAB_SIZE, "max_position_embeddings": MAX_POSITIONS,
    "n_positions": MAX_POSITIONS, "sliding_window": WINDOW, "local_attention": WINDOW,
    # experts
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_topk": 2, "zero_expert_num": 2,
    # latent attention: keys of 16 + 8, values of 16
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# Parts without which some version of Transformers makes no configuration, not even a default one.
MUSICGEN = {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"}
PARTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "musicgen": {part: {"model_type": model_type} for part, model_type in MUSICGEN.items()},
    "musicgen_melody": {
        part: {"model_type": model_type.replace("musicgen", "musicgen_melody")} for part, model_type in MUSICGEN.items()
    },
}
# Where a family's defaults fit no model, or would leave a feature of it untried.
PECULIAR: dict[str, dict[str, Any]] = {
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 50,
        **{
            f"{part}_config": {
                "hidden_size": 64, "hidden_size_global": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 64, "vocab_size": 260,
            }
            for part in ("patcher", "encoder", "decoder", "global")
        },
    },
    "cohere_compass_text": {
        "layer_types": LAYER_TYPES,
        "rope_parameters": {
            layer_type: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            for layer_type in LAYER_TYPES
        },
    },
    "codegen": {"rotary_dim": 8},
    "ctrl": {"dff": 64},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 2.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "layer_types": LAYER_TYPES},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gptj": {"rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24, "num_layers": 2, "num_hidden_layers": 4},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3_moe": {"use_sliding_window": True, "max_window_layers": 2},
}  # fmt: skip


def default_config(model_type: str) -> PretrainedConfig:
    """Derived from the type's name only."""
    return CONFIG_MAPPING[model_type](**copy.deepcopy(PARTS.get(model_type, {})))


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A configuration of a model of four layers that takes milliseconds to run."""
    defaults = default_config(model_type).to_dict()
    values = {name: value for name, value in SMALL.items() if name in defaults}
    if "qk_rope_head_dim" in defaults:  # latent attention: head_dim is something of its own, and all heads have keys
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(defaults.get(name), int) and defaults[name] >= VOCAB_SIZE:
            values[name] = {"p": 0, "b": 1, "e": 2}[name[0]]
    values |= PARTS.get(model_type, {}) | PECULIAR.get(model_type, {}) | overrides
    return CONFIG_MAPPING[model_type](**copy.deepcopy(values))


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Random weights, large enough that every part of the model shows in the logits; Transformers' eager attention."""
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters()
        size = sum(parameter.numel() for parameter in shapes)
    assert size < 3_000_000, f"{config.model_type}: {size} parameters are not tiny"
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model.eval().requires_grad_(False)
