"""Projections that were packed, in steps by heads: still one product, of a rank's own rows."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from harness import ThreadMesh
from tiny_models import tiny_config, tiny_model

from twofold.models.decoder import DecoderModel
from twofold.models.heads import divide
from twofold.models.transforms.base import transform
from twofold.models.transforms.packing import PackProjections, Part
from twofold.parallel.sums import GatherSum


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v2", "mixtral"])
def test_siblings_share_one_product(model_type: str) -> None:
    """Each of gate and up once had a copy of its own of the rank's rows: a GPU computed both products twice, which
    doubled the time of the largest ones. Results were right, so only the figure showed it.
    """
    model = tiny_model(tiny_config(model_type))
    weights = {id(tensor): tensor for tensor in model.parameters()}
    parts: list[Any] = [None] * 2
    barrier = threading.Barrier(2, timeout=60)

    def of_rank(rank: int) -> DecoderModel:
        mesh = ThreadMesh(rank, parts, barrier)
        whole = DecoderModel(copy.deepcopy(model, memo=dict(weights)))
        assert whole.layers is not None
        assert transform(PackProjections(whole.layers, 2), torch.float32)
        return divide(whole, mesh, GatherSum(mesh))  # it compares the results

    with ThreadPoolExecutor(2) as threads:
        for model_by_heads in threads.map(of_rank, range(2)):
            packed = [module for module in model_by_heads.body.modules() if isinstance(module, Part)]
            assert packed
            of_product: dict[int, list[Part]] = {}
            for part in packed:
                of_product.setdefault(id(part.packed), []).append(part)
            for siblings in of_product.values():
                assert len(siblings) == 2
                assert sum(part.size for part in siblings) == siblings[0].packed.out_features
                assert siblings[0].num_parts == 1
