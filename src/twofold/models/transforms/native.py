"""Run modules like Llama's by our kernels for CPUs (`native/kernels.cpp`): fewer operations, each over all threads.

    Linear       x W^T: each weight is read once, from where all ranks share it
    norm         one operation in place of eight
    MLP          gate and up are one product, then one operation for what follows it
    attention    q, k and v are one product, then one operation that turns them and packs KV entries
    layer        all of these in two operations, before attention and after it

A module is found by the names of its parts, and changed if it gives the same results.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch.nn import Linear
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from twofold.attention.op import ATTENTION_NAME
from twofold.models.probe import largest_change
from twofold.models.transforms.base import Transform, sample_input
from twofold.native.load import kernels
from twofold.parallel.sums import OneRank, summing

DTYPES = (torch.float32, torch.bfloat16)
NUM_TOKENS = 3  # of the input that modules are compared with
MANY_ROWS = 128  # of float32: products of more take less time by PyTorch's library


def is_served(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether our kernel multiplies x [..., K] by a weight [N, K]."""
    return (
        bool(kernels)
        and x.is_cpu
        and x.dtype in DTYPES
        and x.dtype == weight.dtype
        and weight.stride(1) == 1
        and weight.shape[1] * x.itemsize % 4 == 0  # numbers are multiplied in units of 4 bytes
        and x.numel() > 0
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] → [..., N]. Our kernel where it serves, else PyTorch's product."""
    if not is_served(x, weight) or _has_many_rows(x):
        return F.linear(x, weight, bias)
    product: torch.Tensor = torch.ops.twofold_cpu.linear(x.contiguous(), [weight], [] if bias is None else [bias])
    return product


def _has_many_rows(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() > MANY_ROWS * x.shape[-1]


def _linears(x: torch.Tensor, modules: list[Any]) -> torch.Tensor:
    """The products of one input x [..., K] side by side."""
    if _has_many_rows(x):
        widths = [module.out_features for module in modules]
        product = x.new_empty(*x.shape[:-1], sum(widths))
        for module, part in zip(modules, product.flatten(0, -2).split(widths, 1), strict=True):
            torch.mm(x.flatten(0, -2), module.weight.t(), out=part)
            if module.bias is not None:
                part += module.bias
        return product
    biases = [] if modules[0].bias is None else [module.bias for module in modules]
    weights = [module.weight for module in modules]
    return cast(torch.Tensor, torch.ops.twofold_cpu.linear(x.contiguous(), weights, biases))


class _Change(Transform):
    """Gives modules another forward method. One of each kind must give the same result."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def find(self) -> str | None:
        self._modules = [module for module in self.model.modules() if self.fits(module)]
        if not self._modules:
            return "no module is of this kind"
        self._expected = self._results()
        return None

    def apply(self) -> None:
        for module in self._modules:
            module.forward = MethodType(type(self).forward, module)

    def verify(self) -> float:
        return largest_change(self._results(), self._expected)

    def undo(self) -> None:
        for module in self._modules:
            module.__dict__.pop("forward", None)

    @torch.inference_mode()
    def _results(self) -> list[torch.Tensor]:
        kinds = {_kind(module): module for module in reversed(self._modules)}
        with summing(OneRank()):  # a comparison is this rank's own
            return [result for module in kinds.values() for result in self.run(module)]

    def fits(self, module: Any) -> bool:
        raise NotImplementedError

    def run(self, module: Any) -> list[torch.Tensor]:
        """What a module gives for an example."""
        raise NotImplementedError

    forward: Callable[..., Any]


class Linears(_Change):
    name = "products by our kernel"

    def fits(self, module: Any) -> bool:
        # Only what is a Linear and nothing more: a subclass may compute something else.
        return type(module) is Linear and is_served(module.weight, module.weight)

    def run(self, module: Any) -> list[torch.Tensor]:
        return [module(sample_input(NUM_TOKENS, module.in_features, like=module.weight))]

    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: N805 (it becomes the module's method)
        return linear(x, module.weight, module.bias)


class Norms(_Change):
    name = "norms by our kernel"

    def fits(self, module: Any) -> bool:
        weight = getattr(module, "weight", None)
        return (
            hasattr(module, "variance_epsilon")
            and isinstance(weight, torch.Tensor)
            and weight.dim() == 1
            and weight.dtype in DTYPES
            and weight.is_cpu
            and len(list(module.parameters())) == 1
        )

    def run(self, module: Any) -> list[torch.Tensor]:
        return [module(sample_input(NUM_TOKENS, len(module.weight), like=module.weight) * 7)]

    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: N805
        if x.dtype != module.weight.dtype:
            result: torch.Tensor = type(module).forward(module, x)
        else:
            result = torch.ops.twofold_cpu.rms_norm(x.contiguous(), module.weight, module.variance_epsilon)
        return result


class GatedMLPs(_Change):
    name = "MLPs by our kernel"

    def fits(self, module: Any) -> bool:
        gate, up = getattr(module, "gate_proj", None), getattr(module, "up_proj", None)
        return _are_alike([gate, up]) and hasattr(module, "down_proj") and hasattr(module, "act_fn")

    def run(self, module: Any) -> list[torch.Tensor]:
        return [module(sample_input(NUM_TOKENS, module.gate_proj.in_features, like=module.gate_proj.weight))]

    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: N805
        both = _linears(x, [module.gate_proj, module.up_proj])
        result: torch.Tensor = module.down_proj(torch.ops.twofold_cpu.silu_mul(both))
        return result


class Attentions(_Change):
    name = "attention modules by our kernel"

    def fits(self, module: Any) -> bool:
        projections = [getattr(module, f"{name}_proj", None) for name in "qkv"]
        if not _are_alike(projections) or not hasattr(module, "o_proj"):
            return False
        of_keys, of_values = (projection.out_features for projection in projections[1:])
        head_dim: int = getattr(module, "head_dim", 0)
        return of_keys == of_values and 0 < head_dim == getattr(module, "twofold_v_head_dim", None)

    def run(self, module: Any) -> list[torch.Tensor]:
        """Queries, keys, values and the output, for angles that differ in all numbers."""
        x = sample_input(NUM_TOKENS, module.q_proj.in_features, like=module.q_proj.weight)[None]
        given, example = _example(module, x)
        with example as angles:
            out = module(hidden_states=x, position_embeddings=angles, attention_mask=None)[0]
        return [*given, out]

    def forward(
        module: Any,  # noqa: N805
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        dim = module.head_dim
        qkv = _linears(hidden_states[0], [module.q_proj, module.k_proj, module.v_proj])
        heads, kv_heads = module.q_proj.out_features // dim, module.k_proj.out_features // dim
        cos, sin = (x.contiguous() for x in position_embeddings)
        query, entries = torch.ops.twofold_cpu.rotate(qkv, cos, sin, heads, kv_heads)
        return module.o_proj(_attend(module, query, entries, kv_heads)[None]), None


def _attend(module: Any, query: torch.Tensor, entries: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """query [T, H, D], entries [T, Hk * 2 * D] → [T, H * D], by whatever attends for the module now."""
    dim, implementation = query.shape[2], module.config._attn_implementation
    if implementation == ATTENTION_NAME:
        published = torch.ops.twofold.publish(entries)
        out: torch.Tensor = torch.ops.twofold.attend(query, entries, published, dim)
    else:
        keys, values = entries.unflatten(1, (kv_heads, 2, dim)).permute(2, 1, 0, 3)[:, None].unbind()
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
        out = attend(module, query.transpose(0, 1)[None], keys, values, None, scaling=module.scaling)[0][0]
    return out.flatten(1)


class Layers(_Change):
    """Two operations a layer, besides its attention. Only where none of its results are summed over ranks."""

    name = "layers by our kernel"

    def fits(self, module: Any) -> bool:
        children: dict[str, Any] = dict(module.named_children())
        names = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        if set(names) != set(children):
            return False
        attention, mlp, before, after = (children[name] for name in names)
        if not (Attentions.fits(self, attention) and GatedMLPs.fits(self, mlp)):  # type: ignore[arg-type]
            return False
        if not (Norms.fits(self, before) and Norms.fits(self, after)):  # type: ignore[arg-type]
            return False
        last = [attention.o_proj, mlp.down_proj]
        return all(type(x) is Linear and x.bias is None and is_served(x.weight, x.weight) for x in last)

    def run(self, module: Any) -> list[torch.Tensor]:
        attention = module.self_attn
        x = sample_input(NUM_TOKENS, attention.q_proj.in_features, like=attention.q_proj.weight)[None]
        given, example = _example(attention, x)
        with example as angles:
            out = module(x, position_embeddings=angles, attention_mask=None)
        return [*given, out]

    def forward(module: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # noqa: N805
        attention, mlp, dim = module.self_attn, module.mlp, module.self_attn.head_dim
        before, after = module.input_layernorm, module.post_attention_layernorm
        x = hidden_states[0]
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        biases = [] if projections[0].bias is None else [projection.bias for projection in projections]
        weights = [projection.weight for projection in projections]
        heads, kv_heads = len(weights[0]) // dim, len(weights[1]) // dim
        cos, sin = (x.contiguous() for x in kwargs["position_embeddings"])
        if _has_many_rows(x):
            qkv = _linears(before(x), projections)
            query, entries = torch.ops.twofold_cpu.rotate(qkv, cos, sin, heads, kv_heads)
            attended = _attend(attention, query, entries, kv_heads)
            x = torch.addmm(x, attended, attention.o_proj.weight.t())
            gated = torch.ops.twofold_cpu.silu_mul(_linears(after(x), [mlp.gate_proj, mlp.up_proj]))
            return x.addmm_(gated, mlp.down_proj.weight.t())[None]
        query, entries = torch.ops.twofold_cpu.before_attention(
            x, before.weight, before.variance_epsilon, weights, biases, cos, sin, heads, kv_heads
        )
        attended = _attend(attention, query, entries, kv_heads)
        weights = [attention.o_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
        out: torch.Tensor = torch.ops.twofold_cpu.after_attention(
            x, attended, after.weight, after.variance_epsilon, weights
        )
        return out[None]


CHANGES: tuple[type[_Change], ...] = (Linears, Norms, GatedMLPs, Attentions, Layers)

EXAMPLE_NAME = "twofold_example"


def _kind(module: torch.nn.Module) -> Any:
    """Modules of the same class and shapes."""
    return type(module), tuple((name, tensor.shape) for name, tensor in module.named_parameters())


def _example(
    module: Any, x: torch.Tensor
) -> tuple[list[torch.Tensor], AbstractContextManager[tuple[torch.Tensor, ...]]]:
    """For an attention module and its input x [1, T, K]: the queries, keys and values that it will have made, and a
    context in which it makes them, of the angles given by the context.
    """
    given: list[torch.Tensor] = []

    def attend(_: Any, query: torch.Tensor, *others: Any, **__: Any) -> tuple[torch.Tensor, None]:
        given.extend([query, *others[:2]])
        return query.transpose(1, 2), None

    @contextmanager
    def attending() -> Iterator[tuple[torch.Tensor, ...]]:
        before = module.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register(EXAMPLE_NAME, attend)
        module.config._attn_implementation = EXAMPLE_NAME
        angles = sample_input(NUM_TOKENS, module.head_dim, like=x).float()[None] * 3
        try:
            yield angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        finally:
            module.config._attn_implementation = before

    return given, attending()


def _are_alike(modules: list[Any]) -> TypeGuard[list[Linear]]:
    """Are they Linears of one input, all with a bias or none?"""
    if not all(type(module) is Linear and is_served(module.weight, module.weight) for module in modules):
        return False
    return len({(module.in_features, module.weight.dtype, module.bias is None) for module in modules}) == 1
