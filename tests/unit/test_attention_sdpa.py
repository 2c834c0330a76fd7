"""Attention as the op puts it together, with the SDPA backend, against attention written out in float64.

Every feature, every shape of row, blocks in any order.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from twofold.attention.backends.sdpa import MATMUL_KEYS, SDPABackend, attend_row
from twofold.attention.combine import apply_sinks, merge
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.op import ForwardContext, forward_context
from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.contract import NewRequest, ScheduledBatch, Step
from twofold.kv.cache import KVCache
from twofold.parallel.exchange import Exchange
from twofold.parallel.mesh import SingleRank
from twofold.parallel.plan import TokenLayout, plan_step
from twofold.parallel.transport import OneRank
from twofold.sampling_params import SamplingParams
from twofold.worker.input_batch import prepare
from twofold.worker.request_states import RequestStates

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
BLOCK_SIZE = 4


def make_spec(v_head_dim: int = HEAD_DIM, sinks: bool = False, **features: int | float | None) -> AttentionSpec:
    generator = torch.Generator().manual_seed(5)
    return AttentionSpec(
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        qk_head_dim=HEAD_DIM,
        v_head_dim=v_head_dim,
        scaling=0.3,
        sinks=torch.randn(NUM_HEADS, generator=generator) if sinks else None,
        **features,
    )


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last L of n tokens attend to all n. query [L, H, D], keys [n, Hk, D], values [n, Hk, Dv].

    Returns out [L, H, Dv], log-sum-exp [L, H], both with sinks, in float64.
    """
    length, seq_len = len(query), len(keys)
    groups = spec.num_heads // spec.num_kv_heads
    q = query.double().transpose(0, 1)
    k, v = (x.double().transpose(0, 1).repeat_interleave(groups, 0) for x in (keys, values))
    logits = q @ k.mT * spec.scaling  # [H, L, n]
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    distance = torch.arange(seq_len - length, seq_len)[:, None] - torch.arange(seq_len)
    visible = distance >= 0
    if spec.sliding_window is not None:
        visible &= distance < spec.sliding_window
    logits = logits.masked_fill(~visible, -torch.inf)
    if spec.sinks is not None:
        sinks = spec.sinks.double()[:, None, None].expand(-1, length, 1)
        logits = torch.cat([logits, sinks], dim=-1)
    return (logits.softmax(-1)[..., :seq_len] @ v).transpose(0, 1), logits.logsumexp(-1).T


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN if anything in `out` is."""
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("v_head_dim", [16, 8, 24])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 3, 600])
def test_a_row(window: int | None, softcap: float | None, sinks: bool, v_head_dim: int, dtype: torch.dtype) -> None:
    """Without a past and with one, of one token and of more than a block of queries.

    Guards: sinks and softcap once per row, not once per part that is merged; the window across the two parts.
    """
    spec = make_spec(v_head_dim, sinks, sliding_window=window, softcap=softcap)
    generator = torch.Generator().manual_seed(0)
    for length, seq_len in [(1, 1), (1, 7), (5, 5), (5, 9), (8, 1100), (600, 600), (530, 1200), (1, 1200)]:
        query = torch.randn(length, NUM_HEADS, HEAD_DIM, generator=generator).to(dtype)
        keys = torch.randn(seq_len, NUM_KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
        values = torch.randn(seq_len, NUM_KV_HEADS, v_head_dim, generator=generator).to(dtype)
        q = query.unflatten(1, (NUM_KV_HEADS, -1)).permute(1, 2, 0, 3)
        out, lse = attend_row(q, keys.transpose(0, 1), values.transpose(0, 1), spec)
        out, lse = out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        expected, expected_lse = reference(query, keys, values, replace(spec, sinks=None))
        assert error(out, expected) < TOLERANCE[dtype], (length, seq_len)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=TOLERANCE[dtype])
        if spec.sinks is not None:
            out = apply_sinks(out, lse, spec.sinks)
            assert out.dtype == dtype
            assert error(out, reference(query, keys, values, spec)[0]) < TOLERANCE[dtype], (length, seq_len)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_multi_query_grouped_and_multi_head(num_kv_heads: int) -> None:
    spec = AttentionSpec(NUM_HEADS, num_kv_heads, HEAD_DIM, HEAD_DIM, 0.25)
    query = torch.randn(9, NUM_HEADS, HEAD_DIM)
    keys, values = torch.randn(2, 20, num_kv_heads, HEAD_DIM)
    q = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    out, _ = attend_row(q, keys.transpose(0, 1), values.transpose(0, 1), spec)
    assert error(out.permute(2, 0, 1, 3).flatten(1, 2), reference(query, keys, values, spec)[0]) < 1e-5


def test_log_sum_exp_where_the_first_key_vanishes() -> None:
    """The explicit products read the log-sum-exp off one weight; a weight of 0 tells nothing."""
    spec = make_spec()
    query, keys = torch.randn(400, NUM_HEADS, HEAD_DIM), torch.randn(400, NUM_KV_HEADS, HEAD_DIM)
    query[..., 0], keys[0, :, 0] = 20, -60
    query, keys = query.bfloat16(), keys.bfloat16()
    q = query.unflatten(1, (NUM_KV_HEADS, -1)).permute(1, 2, 0, 3)
    assert len(query) in MATMUL_KEYS
    _, lse = attend_row(q, keys.transpose(0, 1), keys.transpose(0, 1), spec)
    _, expected = reference(query, keys, keys, spec)
    torch.testing.assert_close(lse.permute(2, 0, 1).flatten(1, 2).double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("split", [1, 13, 39])
def test_parts_merge_into_the_whole(split: int) -> None:
    """Also where one part's logits are so large that the other's vanish: no overflow, no 0 · inf."""
    spec = AttentionSpec(1, 1, HEAD_DIM, HEAD_DIM, 1.0)
    query = torch.randn(40, 1, HEAD_DIM)
    keys, values = torch.randn(2, 40, 1, HEAD_DIM)
    keys[:split] *= 30
    logits = (query[-1, 0].double() @ keys[:, 0].double().T)[None]
    outs, lses = [], []
    for part in (slice(0, split), slice(split, 40)):
        outs.append((logits[:, part].softmax(-1) @ values[part, 0].double()).float())
        lses.append(logits[:, part].logsumexp(-1).float())
    out, lse = merge(outs[0], lses[0], outs[1], lses[1])
    assert error(out[:, None], reference(query[-1:], keys, values, spec)[0]) < 1e-5
    torch.testing.assert_close(lse, logits.logsumexp(-1).float())


def test_merged_parts_get_their_sinks_once() -> None:
    """Parts of the keys, some of them empty, then sinks: the same as over all keys with sinks."""
    spec = make_spec(sinks=True)
    query = torch.randn(9, NUM_HEADS, HEAD_DIM)
    keys, values = torch.randn(2, 30, NUM_KV_HEADS, HEAD_DIM)
    backend, plain = SDPABackend(), replace(spec, sinks=None)
    out, lse = torch.zeros(9, NUM_HEADS, HEAD_DIM), torch.full((9, NUM_HEADS), -torch.inf)
    nothing = out.clone(), lse.clone()
    out, lse = merge(out, lse, *nothing)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
    for part in (slice(0, 7), slice(7, 21), slice(21, 30)):
        out, lse = merge(out, lse, *backend.attend_keys(query, keys[part], values[part], plain, causal=part.stop == 30))
        out, lse = merge(out, lse, *nothing)
    expected, expected_lse = reference(query, keys, values, plain)
    assert error(out, expected) < 1e-5
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)
    assert error(apply_sinks(out, lse, spec.sinks), reference(query, keys, values, spec)[0]) < 1e-5
    assert bool((apply_sinks(*nothing, spec.sinks) == 0).all()), "a row without keys"


# --- KV entries ------------------------------------------------------------------------------------------------------


def entry_specs() -> dict[str, tuple[AttentionSpec, tuple[int, int], tuple[int, int]]]:
    """What a module hands over as key and as value, [heads, dim] of a token."""
    latent = LatentSpec(4, 4, 24, 20, 1.0, kv_lora_rank=32, qk_rope_head_dim=8, weight=torch.randn(4 * (16 + 20), 32))
    return {
        "heads": (AttentionSpec(6, 2, 16, 16, 1.0), (2, 16), (2, 16)),
        "narrow values": (AttentionSpec(6, 3, 16, 8, 1.0), (3, 16), (3, 8)),
        "latent": (latent, (1, 32), (1, 8)),
        "expanded": (latent.expanded, (4, 24), (4, 20)),
    }


@pytest.mark.parametrize("name", entry_specs())
def test_entries_are_unpacked_as_they_were_packed(name: str) -> None:
    """Also as blocks, and without a copy: kernels read where the cache lies."""
    spec, key_shape, value_shape = entry_specs()[name]
    key, value = torch.randn(12, *key_shape), torch.randn(12, *value_shape)
    entries = spec.pack(key, value)
    assert entries.shape == (12, spec.entry_width)
    for shape in ((12,), (3, 4)):
        found = spec.unpack(entries.view(*shape, -1))
        for part, given in zip(found, (key, value), strict=True):
            assert torch.equal(part, given.view(*shape, *given.shape[1:]))
            assert part.untyped_storage().data_ptr() == entries.untyped_storage().data_ptr()


def test_absorbed_entries_hold_their_values_in_their_keys() -> None:
    spec, key_shape, value_shape = entry_specs()["latent"]
    latents, k_rope = torch.randn(12, *key_shape), torch.randn(12, *value_shape)
    entries = spec.pack(latents, k_rope)
    keys, values = spec.absorbed.unpack(entries)
    assert spec.absorbed.entry_width == spec.entry_width
    assert torch.equal(keys, torch.cat([latents, k_rope], dim=-1))
    assert torch.equal(values, latents)


# --- Rows in blocks---------------------------------------------------------------------------------------------------

# (tokens computed, tokens scheduled, blocks): a decode, a fresh prompt, a chunk with a past, a chunk of one token
ROWS = [(10, 1, 3), (0, 7, 2), (9, 8, 5), (4, 1, 2)]


def make_rows(block_tables: list[list[int]]) -> tuple[ScheduledBatch, AttentionMetadata]:
    """The rows of ROWS on a single rank, as the worker makes them."""
    states = RequestStates(8, 64, BLOCK_SIZE, torch.device("cpu"))
    batch = ScheduledBatch.of([computed for computed, *_ in ROWS], [scheduled for _, scheduled, _ in ROWS])
    new = tuple(
        NewRequest(i, i, np.arange(sum(row[:2]), dtype=np.int32), sum(row[:2]), table, SamplingParams(), 0)
        for i, (row, table) in enumerate(zip(ROWS, block_tables, strict=True))
    )
    states.apply(Step(step_id=0, removed=(), new=new, new_block_ids={}, batch=batch))
    return batch, prepare(batch, plan_step(batch, TokenLayout(1)), states, 0, BLOCK_SIZE).metadata


SCATTERED = [[7, 2, 11], [13, 5], [1, 12, 3, 10, 6], [9, 4]]
CONTIGUOUS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11, 12]]
# Runs that break off, that run backwards, and that begin and end as a run would.
PARTLY = [[12, 13, 1], [3, 2], [4, 6, 5, 7, 8], [10, 11]]
NUM_BLOCKS = 16


def attend(
    query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
) -> torch.Tensor:
    """Through the op, in a step of one layer."""
    cache = KVCache([spec.entry_width], 1, BLOCK_SIZE, query.dtype, query.device)
    cache.blocks = [kv_cache]
    exchange = Exchange(SingleRank(), OneRank())
    with forward_context(ForwardContext([spec], cache, exchange, SDPABackend(), metadata, layer=0)):
        return torch.ops.twofold.attend(query, query, query, spec.v_head_dim)


@pytest.mark.parametrize("tables", [SCATTERED, CONTIGUOUS, PARTLY], ids=["scattered", "contiguous", "partly"])
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"sliding_window": 3},
        {"softcap": 5.0},
        {"sinks": True},
        {"sliding_window": 3, "sinks": True},
        {"v_head_dim": 8},
    ],
    ids=str,
)
def test_rows_in_blocks(tables: list[list[int]], features: dict) -> None:
    """Keys are found through the block tables, wherever blocks lie; nothing outside a row's own slots matters.

    Guards: reads of uninitialised tails of blocks (0 · NaN is NaN), and of the null block, where padding is written.
    """
    spec = make_spec(**features)
    generator = torch.Generator().manual_seed(1)
    _, metadata = make_rows(tables)
    blocks = torch.full((NUM_BLOCKS, BLOCK_SIZE, spec.entry_width), torch.nan)  # blocks of no request
    blocks[0] = 1e30  # the null block
    slots = blocks.view(-1, spec.entry_width)
    expected = []
    query = torch.randn(sum(scheduled for _, scheduled, _ in ROWS), NUM_HEADS, HEAD_DIM, generator=generator)
    begin = 0
    for (computed, scheduled, _), table in zip(ROWS, tables, strict=True):
        seq_len = computed + scheduled
        for block in table:
            blocks[block] = -1e30  # unwritten tails hold what was there before: anything finite
        entries = torch.randn(seq_len, spec.entry_width, generator=generator)
        for position, entry in enumerate(entries):
            slots[table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE] = entry
        keys, values = spec.unpack(entries)
        expected.append(reference(query[begin : begin + scheduled], keys, values, spec)[0])
        begin += scheduled
    before = blocks.clone()
    out = attend(query, blocks, spec, metadata)
    assert error(out, torch.cat(expected)) < 1e-5
    torch.testing.assert_close(blocks, before, rtol=0, atol=0, equal_nan=True)  # attention writes no cache


@pytest.mark.usefixtures("poisoned_memory")
def test_padding_is_finite() -> None:
    """A rank may have fewer tokens than its tensors: what padding's queries give is read by the next layers."""
    spec = make_spec()
    _, metadata = make_rows(CONTIGUOUS)
    num_tokens = metadata.num_tokens
    blocks = torch.randn(NUM_BLOCKS, BLOCK_SIZE, spec.entry_width)
    query = torch.randn(num_tokens + 3, NUM_HEADS, HEAD_DIM)
    query[num_tokens:] = torch.nan
    out, lse = SDPABackend().attend(query, blocks, spec, metadata)
    assert out.isfinite().all()
    assert (lse[num_tokens:] == -torch.inf).all()
    found = SDPABackend().attend(query[:num_tokens], blocks, spec, metadata)
    torch.testing.assert_close((out[:num_tokens], lse[:num_tokens]), found)
    assert attend(query, blocks, make_spec(sinks=True), metadata).isfinite().all()
