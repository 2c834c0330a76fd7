"""Transforms for GPUs pass their own comparison there: otherwise they would be undone silently."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_config, tiny_model

from twofold.models.decoder import DecoderModel
from twofold.models.transforms.experts import EXPERTS_NAME
from twofold.models.transforms.packing import Part

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["deepseek_v2", "gpt_oss", "mixtral", "qwen3_moe"])
def test_experts_are_ours_and_projections_are_packed(model_type: str, dtype: torch.dtype) -> None:
    decoder = DecoderModel(tiny_model(tiny_config(model_type)).to("cuda", dtype))
    assert decoder.last_layer is not None
    decoder.optimize(num_ranks=2, enforce_eager=False)
    assert decoder.model.config._experts_implementation == EXPERTS_NAME
    assert any(isinstance(module, Part) for module in decoder.body.modules())
