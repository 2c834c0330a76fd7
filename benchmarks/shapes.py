"""Configurations of models by their published numbers, for what needs no weights."""

import json
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128, "num_key_value_heads": 8,
    "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "Llama-3.1-70B": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "Llama-3.1-405B": LLAMA | {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
    },
    "DeepSeek-V2-Lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400, "max_position_embeddings": 163840,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    # SmolLM2-135M's size with heads that two ranks can divide
    "Llama-132M": LLAMA | {
        "hidden_size": 512, "intermediate_size": 1664, "num_hidden_layers": 32, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
    },
    "TinyLlama-1.1B": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def write_config(name: str, folder: Path) -> str:
    """→ a folder that `load_format="dummy"` takes for a model."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return str(folder)
