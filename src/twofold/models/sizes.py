"""A model's shape by its configuration alone: the bytes of weights and KV entries, and what divides over ranks.

The model is built of Transformers' modules on the meta device, so no memory is taken to know.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from twofold.models.heads import divisible_groups
from twofold.models.support import ONLY_BY_TOKENS
from twofold.planning.shape import Divisible, Experts, LayerAttention, ModelShape

IN_LAYER = re.compile(r"(.*?)\.(\d+)\.")  # the path of a list of modules, and a place in it
EXPERT = re.compile(r"\.experts\.\d+\.")  # where each expert is a module
NUM_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


def model_shape(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a model of this configuration, with weights and entries of `dtype`."""
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    path, layers = _main_list(model)
    text = config.get_text_config()
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers]
    total = sum(parameter.nbytes for parameter in model.parameters())
    head = model.get_output_embeddings()
    num_chosen = next((int(chosen) for name in NUM_CHOSEN if (chosen := getattr(text, name, None))), 0)
    experts = _experts(layers, num_chosen)
    attention = tuple(_attention(text, number, layer) for number, layer in enumerate(layers))
    only_by_tokens = config.model_type in ONLY_BY_TOKENS
    return ModelShape(
        layers=sum(sizes),
        largest_layer=max(sizes, default=0),
        rest=total - sum(sizes),
        head=0 if head is None else sum(parameter.nbytes for parameter in head.parameters()),
        itemsize=dtype.itemsize,
        hidden_size=text.hidden_size,
        divisible=() if only_by_tokens else tuple(_divisible(model, path, layers, attention)),
        attention=attention,
        experts=experts,
        inner_numbers=_inner_numbers(layers, num_chosen, text.hidden_size),
    )


def _main_list(model: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The list of modules with most of the weights, and its path."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    path, layers = max(
        lists, key=lambda item: sum(p.numel() for p in item[1].parameters()), default=("", nn.ModuleList())
    )
    return path, list(layers)


def _attention(config: Any, number: int, layer: nn.Module) -> LayerAttention:
    num_heads = int(config.num_attention_heads)
    layer_types = getattr(config, "layer_types", None) or ()
    is_windowed = number < len(layer_types) and "sliding" in layer_types[number]
    window = getattr(config, "sliding_window", None) if is_windowed else None
    if latent := getattr(config, "kv_lora_rank", None):
        rope = config.qk_rope_head_dim
        dims = config.qk_nope_head_dim + rope, config.v_head_dim
        return LayerAttention(num_heads, num_heads, *dims, latent + rope, window, latent)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    numbers = 2 * num_kv_heads * head_dim
    # Some families' layers differ: their projections tell.
    rows = {name.rpartition(".")[2]: m.out_features for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    if {"k_proj", "v_proj"} <= set(rows):
        numbers = rows["k_proj"] + rows["v_proj"]
    return LayerAttention(num_heads, num_kv_heads, head_dim, head_dim, numbers, window)


def _experts(layers: Sequence[nn.Module], num_chosen: int) -> Experts | None:
    sizes, num_experts = [], 1
    for layer in layers:
        parameters = dict(_expert_parameters(layer))
        if parameters:
            sizes.append(sum(parameter.nbytes for parameter in parameters.values()))
            stacked = [len(p) for p in parameters.values() if p.dim() == 3]
            alone = {EXPERT.search(name)[0] for name in parameters if EXPERT.search(name)}  # type: ignore[index]
            num_experts = stacked[0] if stacked else len(alone)
    if not sizes:
        return None
    return Experts(len(sizes), num_experts, min(num_chosen or num_experts, num_experts), sum(sizes))


def _expert_parameters(layer: nn.Module) -> Mapping[str, nn.Parameter]:
    named = layer.named_parameters()
    return {name: parameter for name, parameter in named if ".experts." in name and "shared" not in name}


def _inner_numbers(layers: Sequence[nn.Module], num_chosen: int, hidden_size: int) -> int:
    """The inputs of the second halves of all MLPs: of a sparse one those of the experts that a token chooses."""
    total = 0
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if re.search(r"(down_proj|fc2|w2)(\.weight)?$", name) and not EXPERT.search(name):
                total += (
                    parameter[0].numel() // hidden_size * num_chosen if parameter.dim() == 3 else parameter.shape[1]
                )
    return total


def _divisible(
    model: Any, path: str, layers: Sequence[nn.Module], attention: Sequence[LayerAttention]
) -> Sequence[Divisible]:
    prefix = f"{model.base_model_prefix}."
    found = []
    for name, parent_attention, num_bytes, counts in divisible_groups(model.base_model):
        place = IN_LAYER.match(f"{prefix}{name}.")
        if place is not None and place[1] == path:
            number = int(place[2])
            heads = (attention[number].num_heads, attention[number].num_kv_heads) if parent_attention else ()
            found.append(Divisible(number, num_bytes, (*counts, *heads)))
    return found
