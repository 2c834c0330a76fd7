"""Our kernels for CPUs, against attention written out in float64 and PyTorch's products."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attention_sdpa import TOLERANCE, error, reference

from twofold.attention.backends.native import NativeBackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec
from twofold.models.transforms.base import transform
from twofold.models.transforms.native import Linears, linear
from twofold.native import build, load

BLOCK_SIZE = 4


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    if not build.library().exists() and not build.build():
        pytest.skip("no C++ compiler")
    assert load.kernels


def rows_of(lens: list[tuple[int, int]], num_columns: int) -> AttentionMetadata:
    """Rows of (length, seq_len), whose blocks lie in any order."""
    starts = torch.tensor([0, *(length for length, _ in lens)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor([seq_len for _, seq_len in lens], dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    tables = 1 + torch.randperm(len(lens) * num_columns, generator=generator).view(len(lens), -1).int()
    return AttentionMetadata(
        num_tokens=int(starts[-1]), query_start_np=starts.numpy(), seq_lens_np=seq_lens.numpy(),
        block_tables_np=tables.numpy(), query_start=starts, seq_lens=seq_lens, block_tables=tables,
        max_query_len=0, max_seq_len=0, num_row_blocks=0, num_decode_rows=0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "v_dim"), [(6, 2, 16, 16), (9, 3, 64, 64), (4, 4, 20, 10)])
@pytest.mark.parametrize("features", [{}, {"sliding_window": 7}, {"softcap": 5.0}], ids=str)
def test_rows_of_a_step(
    features: dict[str, float], heads: int, kv_heads: int, dim: int, v_dim: int, dtype: torch.dtype
) -> None:
    """Decodes, prefills with and without a past, more keys than a block of the kernel; padding is zeros."""
    spec = AttentionSpec(heads, kv_heads, dim, v_dim, 0.3, **features)  # type: ignore[arg-type]
    lens = [(1, 1), (1, 1100), (1, 30), (5, 5), (5, 300), (70, 70), (33, 290)]
    metadata = rows_of(lens, 1100 // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(len(lens) * 275 + 1, BLOCK_SIZE, spec.entry_width + 8, generator=generator).to(dtype)
    cache = cache[..., 8:]  # as by heads: a part of wider entries
    query = torch.randn(metadata.num_tokens + 3, heads, dim, generator=generator).to(dtype)
    out, lse = NativeBackend().attend(query, cache, spec, metadata)
    assert bool((out[-3:] == 0).all())
    starts = metadata.query_start_np
    for row, (_, seq_len) in enumerate(lens):
        entries = cache[metadata.block_tables[row].long()].flatten(0, 1)[:seq_len]
        mine = slice(starts[row], starts[row + 1])
        expected, expected_lse = reference(query[mine], *spec.unpack(entries), spec)
        assert error(out[mine], expected) < TOLERANCE[dtype], lens[row]
        # Powers of 2 are as exact as bfloat16 needs them.
        atol = 1e-5 if dtype == torch.float32 else 1e-4
        torch.testing.assert_close(lse[mine].double(), expected_lse, rtol=0, atol=atol)


@pytest.mark.parametrize("causal", [True, False])
def test_given_keys(causal: bool) -> None:
    spec = AttentionSpec(4, 2, 24, 20, 0.3)
    query, keys = torch.randn(9, 4, 24), torch.randn(300, 2, 24)
    values = torch.randn(300, 2, 30)[..., 5:25]
    out, lse = NativeBackend().attend_keys(query, keys, values, spec, causal)
    for i in range(9):
        seen = 292 + i if causal else 300
        expected, expected_lse = reference(query[i : i + 1], keys[:seen], values[:seen], spec)
        assert error(out[i : i + 1], expected) < 1e-5
        torch.testing.assert_close(lse[i : i + 1].double(), expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_that_grow(dtype: torch.dtype) -> None:
    """Each key outweighs those before, so that what was computed with them must shrink again and again."""
    spec = AttentionSpec(2, 1, 64, 64, 0.125)
    metadata = rows_of([(40, 1300)], 1300 // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(1300 // BLOCK_SIZE + 1, BLOCK_SIZE, spec.entry_width, generator=generator).to(dtype)
    query = torch.randn(40, 2, 64, generator=generator).to(dtype)
    entries = cache[metadata.block_tables[0].long()].flatten(0, 1)
    keys, values = spec.unpack(entries)
    keys[:, 0] = (torch.linspace(-80, 80, 1300)[:, None] * query.float().mean((0, 1)) + keys[:, 0].float() / 4).to(
        dtype
    )
    cache[metadata.block_tables[0].long()] = entries.view(-1, BLOCK_SIZE, spec.entry_width)
    out, lse = NativeBackend().attend(query, cache, spec, metadata)
    expected, expected_lse = reference(query, keys, values, spec)
    assert float(expected_lse.max()) > 20
    assert error(out, expected) < TOLERANCE[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


def test_errors_are_not_above_the_fused_kernels() -> None:
    query, keys, values = torch.randn(3, 500, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    spec = AttentionSpec(4, 4, 64, 64, 0.125)
    expected, _ = reference(query, keys, values, spec)
    fused = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, keys, values)), is_causal=True
    )[0].transpose(0, 1)
    out, _ = NativeBackend().attend_keys(query, keys, values, spec, causal=True)
    # Theirs has no rounding error in the largest weight, which is 1.
    assert error(out, expected) <= 1.04 * error(fused, expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_products(bias: bool, dtype: torch.dtype) -> None:
    """Of few rows and of many; widths that fill no vector; weights that are columns of wider ones."""
    for rows in (1, 2, 3, 4, 5, 8, 9, 17, 33, 60):
        for width, count in ((576, 70), (30, 5), (64, 96)):
            x, weight = torch.randn(2, rows, width).to(dtype), torch.randn(count, width + 6).to(dtype)[:, 4:-2]
            added = torch.randn(count).to(dtype) if bias else None
            expected = x.double() @ weight.double().T + (added.double() if added is not None else 0)
            assert error(linear(x, weight, added), expected) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_a_models_linears_are_changed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 8, bias=False)).requires_grad_(False)
    x = torch.randn(5, 32)
    expected = model(x)
    assert transform(Linears(model), torch.float32)
    assert "forward" in vars(model[0])
    torch.testing.assert_close(model(x), expected)


def test_without_a_compiler_pytorch_serves(tmp_path: Path) -> None:
    code = (
        "import torch; from twofold.native import build, load; from twofold.models.transforms.native import linear\n"
        "assert not build.build() and not load.kernels\n"
        "linear(torch.ones(1, 4), torch.ones(2, 4))"
    )
    environment = os.environ | {"CXX": "/nowhere/g++", "PATH": str(tmp_path), "TWOFOLD_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
