"""Packing and the compiler's rewriting change no result of a layer."""

import copy
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

from twofold.models.heads import SummedLinear
from twofold.models.transforms import compile as compiling
from twofold.models.transforms.base import transform
from twofold.models.transforms.compile import RewriteLayers
from twofold.models.transforms.experts import divide_experts
from twofold.models.transforms.packing import PackProjections, Part
from twofold.parallel.sums import OneRank, summing

QKV, KV, GATE_UP = 2, 1, 1  # products fewer in a layer


@pytest.mark.parametrize(
    ("family", "num_ranks", "fewer"),
    [("llama", 1, QKV + GATE_UP), ("llama", 2, KV + GATE_UP), ("qwen2", 1, QKV + GATE_UP), ("phi3", 1, 0)],
)
@torch.inference_mode()
def test_packed_models_compute_the_same(family: str, num_ranks: int, fewer: int) -> None:
    """Qwen2's projections have biases; Phi-3's are packed by the family itself."""
    model = tiny_model(tiny_config(family))
    ids = torch.arange(7)[None] * 3
    expected = model(ids).logits
    weights = sum(p.numel() for p in model.parameters())
    packing = PackProjections(model, num_ranks)
    assert transform(packing, model.dtype) == (fewer > 0)
    assert sum(len(names) - 1 for _, names in packing.siblings) == fewer * model.config.num_hidden_layers
    assert sum(p.numel() for p in model.parameters()) == weights
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_packed_projections_that_compute_otherwise_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here each takes the part of another; the weights stay where they were packed."""
    model = tiny_model(tiny_config("qwen2"))
    ids = torch.arange(7)[None] * 3
    expected = model(ids).logits
    kinds = [type(module) for module in model.modules()]
    weights = sum(p.numel() for p in model.parameters())
    forward = Part.forward
    monkeypatch.setattr(Part, "forward", lambda part, x: forward(part, x).flip(-1))
    assert not transform(PackProjections(model, num_ranks=1), model.dtype)
    assert [type(module) for module in model.modules()] == kinds
    assert sum(p.numel() for p in model.parameters()) == weights
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_compiled_layer_runs_one_product_for_all_parts() -> None:
    """Each part asks for the whole product: left to the compiler alone, all of them ran."""
    apart: PreTrainedModel = tiny_model(tiny_config("llama"))
    packed = copy.deepcopy(apart)
    assert transform(PackProjections(packed, num_ranks=1), packed.dtype)
    products: Counter[str] = Counter()

    def count(graph: Any, _: Any) -> Any:
        RewriteLayers()(graph.graph)
        graph.recompile()
        products.update(str(node.target) for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default)
        return graph

    backend = aot_autograd(fw_compiler=count, decompositions=select_decomp_table())
    x = torch.randn(1, 5, apart.config.hidden_size)
    mlp = torch.compile(packed.model.layers[0].mlp, backend=backend, fullgraph=True)
    torch.testing.assert_close(mlp(x), apart.model.layers[0].mlp(x), atol=1e-5, rtol=1e-5)
    assert products == {"aten.mm.default": 2}


@torch.inference_mode()
def test_complex_rotations_become_real() -> None:
    """The compiler fuses nothing that is complex: DeepSeek-V2's rotations were eight kernels a layer."""
    torch.manual_seed(0)
    kinds: list[bool] = []

    def rewrite(graph: Any, _: Any) -> Any:
        kinds.append(any("complex" in str(node.target) for node in graph.graph.nodes))
        RewriteLayers()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        kinds.append(any("complex" in str(node.target) for node in graph.graph.nodes))
        return graph

    backend = aot_autograd(fw_compiler=rewrite, decompositions=select_decomp_table())
    compiled = torch.compile(apply_rotary_emb, backend=backend, fullgraph=True, dynamic=True)
    for length in (5, 9):
        query, key = torch.randn(1, 4, length, 16), torch.randn(1, 1, length, 16)
        angles = torch.polar(torch.ones(1, length, 8), torch.randn(1, length, 8))
        for turned, expected in zip(compiled(query, key, angles), apply_rotary_emb(query, key, angles), strict=True):
            torch.testing.assert_close(turned, expected)
    assert kinds == [True, False]


class Attention(torch.nn.Module):
    """Projections as those of a layer: one has a bias, the last one's weight is some columns of a wider one."""

    def __init__(self, dtype: torch.dtype, by_heads: bool) -> None:
        super().__init__()
        self.by_heads = by_heads
        self.q, self.kv, self.o = (torch.nn.Linear(64, 64, bias=i == 1, dtype=dtype) for i in range(3))
        self.o.weight = torch.nn.Parameter(torch.randn(64, 128, dtype=dtype)[:, 64:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.o(torch.relu(self.q(x) * self.kv(x)))
        return torch.ops.twofold.sum_over_ranks(out) if self.by_heads else out  # type: ignore[no-any-return]


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize(
    ("dtype", "by_heads", "calls"),
    [(torch.bfloat16, True, [2, 1]), (torch.bfloat16, False, [1, 1, 1]), (torch.float32, True, [])],
)
@torch.inference_mode()
def test_products_of_few_rows_are_ours(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, by_heads: bool, calls: list[int], num_tokens: int
) -> None:
    """By heads those of the same x share a call. By tokens queries must be able to wait. Float32 is the library's."""
    monkeypatch.setattr(compiling, "FEW_ROW_DEVICE", "cpu")
    torch.manual_seed(0)
    module = Attention(dtype, by_heads)
    found: list[int] = []
    products: Counter[Any] = Counter()

    def rewrite(graph: Any, _: Any) -> Any:
        RewriteLayers()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        op = torch.ops.twofold.few_row_linear.default
        found.extend(len(node.args[1]) for node in graph.graph.nodes if node.target is op)
        products.update(node.target for node in graph.graph.nodes)
        return graph

    backend = aot_autograd(fw_compiler=rewrite, decompositions=select_decomp_table())
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    x = torch.randn(1, num_tokens, 64, dtype=dtype)
    with summing(OneRank()):
        torch.testing.assert_close(compiled(x), module(x), atol=5e-2, rtol=5e-2)
    assert found == calls
    aten = torch.ops.aten
    assert products[aten.mm.default] + products[aten.addmm.default] == (0 if calls else 3)
    assert not calls or not products[aten.permute.default]


NORM = {
    "sum_add_norm": 1,
    "sum_add": 1,
}  # of a layer: the residual and the norm after attention, the residual at its end


@pytest.mark.parametrize(
    ("family", "dtype", "calls"),
    [
        ("llama", torch.float32, NORM),
        ("llama", torch.bfloat16, NORM),
        ("qwen2", torch.float32, NORM),
        ("mixtral", torch.bfloat16, NORM),
        ("gemma", torch.bfloat16, {"sum_add": 2}),  # adds 1 to the weight of its norm
        ("cohere", torch.float32, {"sum_add": 2}),  # has another norm, and adds attention and MLP to one residual
        ("olmo2", torch.float32, {"sum_over_ranks": 2}),  # norms come before residuals
    ],
)
@torch.inference_mode()
def test_sums_take_along_residuals_and_norms(family: str, dtype: torch.dtype, calls: dict[str, int]) -> None:
    """Whatever follows a sum, a layer computes the same; of Llama's kind of layers no sum is left alone."""
    torch._dynamo.reset()
    model = tiny_model(tiny_config(family)).to(dtype)
    divide_experts(model.base_model, SimpleNamespace(rank=0, size=2))  # type: ignore[arg-type]
    for parent in list(model.base_model.modules()):
        for name in ("o_proj", "down_proj"):
            if isinstance(linear := getattr(parent, name, None), torch.nn.Linear):
                setattr(parent, name, SummedLinear(linear.weight, linear.bias))
    AttentionInterface.register("values", values_alone)
    model.config._attn_implementation = "values"
    steps = [torch.arange(num_tokens)[None] * 3 for num_tokens in (5, 9, 1)]
    counts: list[Counter[str]] = []

    def rewrite(graph: Any, _: Any) -> Any:
        RewriteLayers()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        targets = [str(node.target).split(".") for node in graph.graph.nodes]
        counts.append(Counter(target[1] for target in targets if target[0] == "twofold"))
        return graph

    with summing(lambda x: 3 * x):
        expected = [model(ids).logits for ids in steps]
        backend = aot_autograd(fw_compiler=rewrite, decompositions=select_decomp_table())
        layer = model.base_model.layers[1]
        layer.compile(backend=backend, dynamic=True, fullgraph=True)
        for ids, logits in zip(steps, expected, strict=True):
            torch.testing.assert_close(model(ids).logits, logits)
    assert counts
    assert all(count == calls for count in counts), counts


def values_alone(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Stands in for attention: each token sees itself."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None
