"""Layers like Llama's by our kernels for CPUs, against the same written out, and against Transformers' own forward."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_attention_sdpa import error
from tiny_models import tiny_config, tiny_model
from transformers import PreTrainedModel

from twofold.attention.backends.native import NativeBackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.op import ForwardContext
from twofold.kv.cache import KVCache
from twofold.models.decoder import DecoderModel
from twofold.models.transforms import native, native_stack
from twofold.native import build, load
from twofold.parallel.exchange import Exchange, ExchangePlan
from twofold.parallel.mesh import SingleRank
from twofold.parallel.transport import OneRank

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
EPSILON = 1e-5


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    if not build.library().exists() and not build.build():
        pytest.skip("no C++ compiler")
    assert load.kernels


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.double() * x.double() * (x.double().pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (6, 2, 64), (3, 3, 20)])
@pytest.mark.parametrize("num_tokens", [1, 20, 33, 320])
def test_a_layer(num_tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Before and after its attention, of few tokens and of many; sizes that fill tiles and others."""
    generator = torch.Generator().manual_seed(num_tokens)

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    width, inner = heads * dim, 96
    weights = {"q": numbers(width, width), "k": numbers(kv_heads * dim, width), "v": numbers(kv_heads * dim, width)}
    x, norm = numbers(num_tokens, width) * 20, numbers(width).abs() + 1
    biases = [numbers(len(weight)) for weight in weights.values()]
    angles = numbers(num_tokens, dim) * 9
    cos, sin = angles.cos(), angles.sin()
    query, entries = torch.ops.twofold_cpu.before_attention(
        x, norm, EPSILON, list(weights.values()), biases, cos[None], sin[None], heads, kv_heads
    )
    products = [
        (normed(x, norm) @ weight.double().T + bias.double()).unflatten(1, (-1, dim))
        for weight, bias in zip(weights.values(), biases, strict=True)
    ]
    turned = [
        part * cos.double()[:, None] + torch.cat([-part[..., dim // 2 :], part[..., : dim // 2]], -1) * sin[:, None]
        for part in products[:2]
    ]
    assert error(query, turned[0]) < TOLERANCE[dtype]
    assert (
        error(entries.view(num_tokens, kv_heads, 2, dim), torch.stack([turned[1], products[2]], 2)) < TOLERANCE[dtype]
    )

    attended = numbers(num_tokens, width) * 20
    o, gate, up, down = numbers(width, width), numbers(inner, width), numbers(inner, width), numbers(width, inner)
    out = torch.ops.twofold_cpu.after_attention(x, attended, norm, EPSILON, [o, gate, up, down])
    hidden = x.double() + attended.double() @ o.double().T
    between = normed(hidden, norm)
    gated = F.silu(between @ gate.double().T) * (between @ up.double().T)
    assert error(out, hidden + gated @ down.double().T) < TOLERANCE[dtype]


def forwards_and_decoder(
    model: PreTrainedModel, forward: Callable[[], torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, DecoderModel]:
    """→ what `forward` gives in float32 and in `dtype`, and the model in `dtype` with our kernels."""
    exact = forward()
    model.to(dtype)
    expected = forward()
    model.set_attn_implementation("twofold")
    decoder = DecoderModel(model)
    decoder.optimize_for_cpu()
    return exact, expected, decoder


def context_of(
    decoder: DecoderModel, cache: KVCache, metadata: AttentionMetadata, slots: torch.Tensor
) -> ForwardContext:
    exchange = Exchange(SingleRank(), OneRank())
    exchange.begin(ExchangePlan(slots, defer_exchange=False, by_heads=False))
    return ForwardContext(decoder.specs, cache, exchange, NativeBackend(), metadata)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_all_layers_at_once(family: str, dtype: torch.dtype) -> None:
    """A prompt of 7 tokens and one token after it, beside a prompt of 4 of another request."""
    model = tiny_model(tiny_config(family))
    ids = torch.arange(12) * 3 % model.config.vocab_size

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        return torch.cat([model.base_model(input_ids=part[None])[0][0] for part in (ids[:8], ids[8:])])

    exact, expected, decoder = forwards_and_decoder(model, forward, dtype)
    assert decoder.stack is not None
    cache = KVCache(
        [spec.entry_width for spec in decoder.specs], 4, native_stack.BLOCK_SIZE, dtype, torch.device("cpu")
    )
    outputs = []
    for rows, tokens in (([(0, 7)], ids[:7]), ([(7, 1), (0, 4)], ids[7:])):
        metadata, positions, slots = native_stack.rows_in_blocks(rows)
        context = context_of(decoder, cache, metadata, slots)
        assert decoder.stack.serves(len(tokens), context)
        assert not decoder.stack.serves(native_stack.MAX_TOKENS + 1, context)
        with torch.inference_mode():
            outputs.append(decoder.stack.run(tokens, positions, context))
    assert error(torch.cat(outputs), exact) < 1.3 * error(expected, exact) + 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_prompt_of_many_tokens(family: str, dtype: torch.dtype) -> None:
    """In float32 its products are PyTorch's."""
    model = tiny_model(tiny_config(family))
    ids = torch.arange(native.MANY_ROWS + 20) * 3 % model.config.vocab_size

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        hidden: torch.Tensor = model.base_model(input_ids=ids[None])[0][0]
        return hidden

    exact, expected, decoder = forwards_and_decoder(model, forward, dtype)
    cache = KVCache([spec.entry_width for spec in decoder.specs], 12, 16, dtype, torch.device("cpu"))
    metadata, positions, slots = native_stack.rows_in_blocks([(0, len(ids))])
    metadata = replace(metadata, block_tables=torch.arange(1, 11, dtype=torch.int32)[None])
    context = context_of(decoder, cache, metadata, slots)
    with torch.inference_mode():
        out = decoder.hidden_states(ids, positions, context, needs_all=True)
    assert error(out, exact) < 1.3 * error(expected, exact) + 1e-5


def test_other_families_keep_their_layers() -> None:
    decoder = DecoderModel(tiny_model(tiny_config("gemma2")))
    decoder.optimize_for_cpu()
    assert decoder.stack is None
