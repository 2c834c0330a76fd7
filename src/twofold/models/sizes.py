"""How many bytes a model's weights and KV entries take, by its configuration alone: no memory is taken to know."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

IN_LAYER = re.compile(r"(.*?)\.(\d+)\.")  # the path of a list of modules, and a place in it


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Of one copy of a model's weights, and of what it keeps of a token."""

    layers: int  # of all decoder layers
    largest_layer: int
    rest: int  # embedding, head and what else is no layer's; tied tensors count once
    entry: int  # KV entries of one token, all layers

    @property
    def whole(self) -> int:
        return self.layers + self.rest

    def sharded(self, num_ranks: int) -> int:
        """Weights on one of the ranks: its part of the layers, the rest, and two layers that it fetches into."""
        return -(-self.layers // num_ranks) + self.rest + 2 * self.largest_layer


def model_bytes(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> ModelBytes:
    """The sizes of a model of this configuration, with weights and entries of `dtype`."""
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    lists: dict[str, dict[str, int]] = {}  # path of a list -> place in it -> bytes
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.nbytes
        if place := IN_LAYER.match(name):
            of_list = lists.setdefault(place[1], {})
            of_list[place[2]] = of_list.get(place[2], 0) + parameter.nbytes
    layers = max(lists.values(), key=lambda of_list: sum(of_list.values()), default={"0": 0})
    return ModelBytes(
        layers=sum(layers.values()),
        largest_layer=max(layers.values()),
        rest=total - sum(layers.values()),
        entry=_entry_numbers(config.get_text_config(), len(layers)) * dtype.itemsize,
    )


def _entry_numbers(config: Any, num_layers: int) -> int:
    """Numbers that a token's KV entries have, over all layers."""
    if latent := getattr(config, "kv_lora_rank", None):
        return int(num_layers * (latent + config.qk_rope_head_dim))
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return int(num_layers * 2 * (getattr(config, "num_key_value_heads", None) or num_heads) * head_dim)
