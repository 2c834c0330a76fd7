"""Mixtures of experts: each rank routes its own tokens to its own experts, each token as Transformers does."""

import copy
import importlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import make_engine, prompt_logprobs, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model

from twofold.models.transforms.base import transform
from twofold.models.transforms.experts import FewTokenExperts

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "gpt_oss": {},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2},
}


class Choices:
    """Notes which experts each token of a model goes to."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.of: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)  # layer, position -> experts
        self._positions: list[int] = []
        experts = [module for module in model.modules() if "down_proj" in dict(module.named_parameters(recurse=False))]
        self._hooks = [model.register_forward_pre_hook(self._note_positions, with_kwargs=True)] + [
            module.register_forward_pre_hook(lambda _, args, layer=layer: self._note_choice(layer, args[1]))
            for layer, module in enumerate(experts)
        ]
        self.num_layers = len(experts)

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note_positions(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        position_ids = kwargs.get("position_ids")
        count = kwargs["input_ids"].shape[1]
        self._positions = list(range(count)) if position_ids is None else position_ids[0].tolist()

    def _note_choice(self, layer: int, top_k_index: torch.Tensor) -> None:
        for position, experts in zip(self._positions, top_k_index.tolist(), strict=True):
            self.of[layer, position].append(tuple(sorted(experts)))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.set_num_threads(1)
    return tiny_model(tiny_config(request.param, num_hidden_layers=2, **FAMILIES[request.param]))


def test_experts_are_grouped(model: PreTrainedModel) -> None:
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("length", [3, 50])  # fewer tokens than ranks: the last rank runs padding only
def test_tokens_go_to_the_same_experts(model: PreTrainedModel, length: int) -> None:
    prompt = np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist()
    num_ranks = 4
    engine = make_engine(model, num_ranks, step_layout="tokens")
    ranks = [Choices(decoder.body) for decoder in engine.executor.models]
    [found] = prompt_logprobs(engine, [prompt])
    whole = Choices(model.base_model)
    expected = reference_logprobs(model, prompt)
    whole.end()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert whole.num_layers > 0
    assert len(whole.of) == whole.num_layers * length
    for (layer, position), [experts] in whole.of.items():
        found_by = [rank.of[layer, position] for rank in ranks if (layer, position) in rank.of]
        assert any(experts in choices for choices in found_by), f"layer {layer}, position {position}"
        if position:  # padding has position 0
            assert found_by == [[experts]]
    engine.shutdown()


@pytest.fixture(scope="module")
def kernel() -> Iterator[dict[str, float]]:
    """The op of our kernel on a CPU, where there is no Triton; it is off by the factor `scale`."""
    settings = {"scale": 1.0, "calls": 0}

    def expert_linear(
        x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor, num_experts: int, is_transposed: bool
    ) -> torch.Tensor:
        settings["calls"] += 1
        weight = weight if is_transposed else weight.mT
        pairs = x.repeat_interleave(len(expert_ids) // len(x), dim=0)
        return settings["scale"] * (pairs[:, None] @ weight[expert_ids])[:, 0]

    name = "twofold.models.transforms.expert_linear"
    if importlib.util.find_spec("triton"):
        library = torch.library.Library("twofold", "FRAGMENT")
        importlib.import_module(name)
    else:
        library = torch.library.Library("twofold", "FRAGMENT")
        library.define("expert_linear(Tensor x, Tensor weight, Tensor ids, int num_experts, bool transposed) -> Tensor")
    library.impl("expert_linear", expert_linear, "CPU")
    with patch.dict(sys.modules, {name: sys.modules.get(name, ModuleType(name))}):
        yield settings
    library._destroy()


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_experts_of_few_tokens_must_come_out_the_same(
    model: PreTrainedModel, kernel: dict[str, float], scale: float
) -> None:
    """A kernel that computes otherwise is not used, whatever the reason."""
    body = copy.deepcopy(model).base_model
    kernel |= {"scale": scale, "calls": 0}
    assert transform(FewTokenExperts(body), torch.float32) == (scale == 1)
    assert kernel["calls"] > 0
    assert body.config._experts_implementation == ("twofold" if scale == 1 else "grouped_mm")
