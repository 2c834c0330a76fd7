"""A prefix that rows share is read once, and nothing else changes: by itself, and through the engine."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from harness import generate, make_engine, reference_continuation
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model

from twofold.attention import shared_prefix
from twofold.attention.backends.sdpa import SDPABackend
from twofold.attention.combine import apply_sinks
from twofold.attention.metadata import AttentionMetadata, SharedPrefix
from twofold.attention.shared_prefix import largest_shared_prefix
from twofold.attention.spec import AttentionSpec
from twofold.contract import NewRequest, ScheduledBatch, Step
from twofold.parallel.plan import HeadLayout, TokenLayout, plan_step
from twofold.sampling_params import SamplingParams
from twofold.worker.input_batch import find_shared_prefix, prepare
from twofold.worker.request_states import RequestStates

BLOCK_SIZE = 4
SPECS = {
    "grouped": AttentionSpec(6, 2, 16, 16, 0.3),
    "multi-head": AttentionSpec(4, 4, 16, 8, 0.3),
    "latents": AttentionSpec(4, 1, 40, 32, 0.2, values_in_keys=True),
    "sinks": AttentionSpec(6, 2, 16, 16, 0.3, sinks=torch.linspace(-2, 3, 6)),
    "softcap": AttentionSpec(6, 2, 16, 16, 0.3, softcap=5.0),
}


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prefixes are shared, too."""
    monkeypatch.setattr(shared_prefix, "MIN_SAVED_TOKENS", 1)


def make_tables(chains: list[list[int]]) -> np.ndarray:
    tables = np.zeros((len(chains), max(map(len, chains))), np.int32)
    for row, blocks in enumerate(chains):
        tables[row, : len(blocks)] = blocks
    return tables


def make_decodes(tables: np.ndarray, seq_lens: np.ndarray, num_padding: int = 0) -> AttentionMetadata:
    """Rows of one token, as the worker makes them."""
    num_rows = len(tables) + num_padding
    return AttentionMetadata(
        num_tokens=len(tables),
        query_start_np=np.arange(len(tables) + 1),
        seq_lens_np=seq_lens,
        block_tables_np=tables,
        query_start=torch.arange(num_rows + 1, dtype=torch.int32),
        seq_lens=torch.from_numpy(np.pad(seq_lens, (0, num_padding)).astype(np.int32)),
        block_tables=torch.from_numpy(np.pad(tables, ((0, num_padding), (0, 0)))),
        max_query_len=1,
        max_seq_len=int(seq_lens.max()),
        num_row_blocks=0,
        num_decode_rows=num_rows,
    )


def find(metadata: AttentionMetadata) -> SharedPrefix | None:
    """On the only rank."""
    decodes = ScheduledBatch.of(metadata.seq_lens_np - 1, np.ones_like(metadata.seq_lens_np))
    plan = plan_step(decodes, TokenLayout(1))
    return find_shared_prefix(metadata, plan, metadata.block_tables_np, 0, BLOCK_SIZE)


# --- Which rows, and how much ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chains", "seq_lens", "expected"),
    [
        ([[1, 2, 3]], [12], ([], 0)),
        ([[1, 2, 3], [4, 5, 6]], [12, 12], ([], 0)),
        ([[1, 2, 3], [1, 2, 4]], [12, 9], ([0, 1], 2)),
        # The block of the last token is no prefix, not even a full one.
        ([[1, 2], [1, 2, 4]], [8, 12], ([0, 1], 1)),
        ([[1], [1]], [4, 3], ([], 0)),
        # What a table has beyond a row's own blocks was another request's.
        ([[1, 9, 3, 4], [1, 9, 3, 4], [1, 8]], [5, 16, 8], ([0, 1, 2], 1)),
        # Blocks that are the same after one that is not.
        ([[1, 2, 3, 4], [5, 2, 3, 6]], [16, 16], ([], 0)),
        # A system prompt of all, and a longer prefix of fewer: what saves more.
        ([[1, 7, 8, 2], [1, 3, 4, 5], [6, 6], [1, 7, 8, 9]], [16, 16, 5, 16], ([0, 3], 3)),
        ([[1, 7, 2], [1, 3, 5], [1, 4, 6], [1, 7, 9]], [12, 12, 12, 12], ([0, 1, 2, 3], 1)),
    ],
)
def test_what_saves_most(chains: list[list[int]], seq_lens: list[int], expected: tuple[list[int], int]) -> None:
    rows, num_blocks = largest_shared_prefix(make_tables(chains), np.array(seq_lens), BLOCK_SIZE)
    assert (rows.tolist(), num_blocks) == expected


@st.composite
def forks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Rows that take blocks from each other up to some place. The block of a row's last token is its own.

    Those after it, which it does not have yet, may be anyone's.
    """
    num_rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    tables = 1 + np.arange(num_rows * width, dtype=np.int32).reshape(num_rows, width)
    for row in range(1, num_rows):
        until = draw(st.integers(0, width))
        tables[row, :until] = tables[draw(st.integers(0, row - 1)), :until]
    seq_lens = np.array(draw(st.lists(st.integers(1, width * BLOCK_SIZE), min_size=num_rows, max_size=num_rows)))
    tables[np.arange(num_rows), (seq_lens - 1) // BLOCK_SIZE] = tables.max() + 1 + np.arange(num_rows)
    names = np.array(draw(st.permutations(range(tables.max() + 1))), np.int32) * 257  # all bytes matter
    return names[tables], seq_lens


@given(forks())
def test_no_other_rows_save_more(case: tuple[np.ndarray, np.ndarray]) -> None:
    tables, seq_lens = case
    limits = (seq_lens - 1) // BLOCK_SIZE

    def saved(rows: tuple[int, ...]) -> int:
        same = (tables[list(rows)] == tables[rows[0]]).all(0)
        return (len(rows) - 1) * min(int(np.cumprod(same).sum()), int(limits[list(rows)].min()))

    everything = [rows for size in range(2, len(tables) + 1) for rows in combinations(range(len(tables)), size)]
    rows, num_blocks = largest_shared_prefix(tables, seq_lens, BLOCK_SIZE)
    most = max(map(saved, everything), default=0)
    assert (len(rows) - 1) * num_blocks == most
    assert not most or saved(tuple(rows.tolist())) == most


# --- Attention -------------------------------------------------------------------------------------------------------


def attend(
    query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = shared_prefix.attend(query, kv_cache, spec, metadata, SDPABackend())
    return (out if spec.sinks is None else apply_sinks(out, lse, spec.sinks)), lse


def make_family(num_rows: int, num_shared: int, others: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows that share blocks, their suffixes from 1 token on, between `others` that share nothing."""
    deal = iter(np.random.default_rng(num_rows).permutation(np.arange(1, 200)).tolist())
    prefix = [next(deal) for _ in range(num_shared)]
    seq_lens = [num_shared * BLOCK_SIZE + 1 + 3 * row for row in range(num_rows)]
    chains = [prefix + [next(deal) for _ in range(-(-n // BLOCK_SIZE) - num_shared)] for n in seq_lens]
    for number in range(others):
        chains.insert(2 * number, [next(deal) for _ in range(number + 1)])
        seq_lens.insert(2 * number, number * BLOCK_SIZE + 1)
    return make_tables(chains), np.array(seq_lens)


class Counted(SDPABackend):
    """Counts the KV entries that it reads."""

    num_keys = 0

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_keys += int(metadata.seq_lens_np.sum())
        return super().attend(query, kv_cache, spec, metadata)


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("others", [0, 3])
def test_the_same_as_unshared(name: str, others: int) -> None:
    torch.manual_seed(0)
    spec = SPECS[name]
    kv_cache = torch.randn(200, BLOCK_SIZE, spec.entry_width)
    for num_rows in range(1, 10):
        for num_shared in (0, 1, 2, 5):
            tables, seq_lens = make_family(num_rows, num_shared, others)
            metadata = make_decodes(tables, seq_lens, num_padding=2)
            shared = find(metadata)
            assert (shared is not None) == (num_rows > 1 and num_shared > 0)
            query = torch.randn(len(tables) + 2, spec.num_heads, spec.qk_head_dim)
            expected = attend(query, kv_cache, spec, metadata)
            found = attend(query, kv_cache, spec, replace(metadata, shared_prefix=shared))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_always")
def test_a_prefix_is_read_once() -> None:
    tables, seq_lens = make_family(8, 5, others=2)
    metadata = make_decodes(tables, seq_lens)
    shared = find(metadata)
    spec, counted = SPECS["grouped"], Counted()
    kv_cache, query = torch.randn(200, BLOCK_SIZE, spec.entry_width), torch.randn(10, 6, 16)
    metadata = replace(metadata, shared_prefix=shared)
    shared_prefix.attend(query, kv_cache, spec, metadata, counted)
    assert counted.num_keys == int(seq_lens.sum()) - 7 * 5 * BLOCK_SIZE
    counted.num_keys = 0
    shared_prefix.attend(query, kv_cache, replace(spec, sliding_window=9), metadata, counted)
    assert counted.num_keys == int(seq_lens.sum()), "a window moves with its query"


@pytest.mark.usefixtures("_always")
def test_repeats_of_the_first_row_change_nothing() -> None:
    """A graph is captured for a number of rows, and fewer may share a prefix."""
    tables, seq_lens = make_family(5, 3, others=2)
    metadata = make_decodes(tables, seq_lens)
    shared = find(metadata)
    assert isinstance(shared, SharedPrefix)
    spec = SPECS["grouped"]
    kv_cache, query = torch.randn(200, BLOCK_SIZE, spec.entry_width), torch.randn(7, 6, 16)
    padded = replace(shared, rows=torch.cat([shared.rows, shared.rows[:1].expand(3)]))
    found = attend(query, kv_cache, spec, replace(metadata, shared_prefix=padded))
    torch.testing.assert_close(found, attend(query, kv_cache, spec, metadata), rtol=0, atol=1e-5)


def test_short_prefixes_are_not_worth_it() -> None:
    tables, seq_lens = make_family(8, 5)
    assert find(make_decodes(tables, seq_lens)) is None


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 12])
def test_all_ranks_share_if_one_does(num_ranks: int) -> None:
    """They replay the same CUDA graph: its collectives may be tied to memory of the peers' graph.

    Twelve ranks have a row each or none: nothing to share.
    """
    tables, seq_lens = make_family(5, 3, others=3)
    states = RequestStates(8, 256, BLOCK_SIZE, torch.device("cpu"))
    new = tuple(
        NewRequest(i, i, np.zeros(n, np.int32), int(n), blocks.tolist(), SamplingParams(), 0)
        for i, (n, blocks) in enumerate(zip(seq_lens, tables, strict=True))
    )
    batch = ScheduledBatch.of(seq_lens - 1, np.ones_like(seq_lens))
    states.apply(Step(0, (), new, {}, batch))
    plan = plan_step(batch, TokenLayout(num_ranks))
    torch.manual_seed(0)
    spec = SPECS["grouped"]
    kv_cache = torch.randn(200, BLOCK_SIZE, spec.entry_width)
    shared_rows = 0
    for rank in range(num_ranks):
        metadata = prepare(batch, plan, states, rank, BLOCK_SIZE).metadata
        assert (metadata.shared_prefix is None) == (num_ranks == 12)
        if metadata.shared_prefix is not None and metadata.shared_prefix.prefix.max_seq_len:
            shared_rows += len(metadata.shared_prefix.rows)
        query = torch.randn(len(metadata.seq_lens), spec.num_heads, spec.qk_head_dim)
        expected = attend(query, kv_cache, spec, replace(metadata, shared_prefix=None))
        torch.testing.assert_close(attend(query, kv_cache, spec, metadata), expected, rtol=0, atol=1e-5)
    assert shared_rows == (0 if num_ranks == 12 else 5)


@pytest.mark.usefixtures("_always")
def test_by_heads_a_row_shares_nothing_with_itself() -> None:
    """All ranks have all rows then. A long request on two ranks once looked like two rows that share all it has, and
    those that really share a shorter prefix did not share it.
    """
    tables, seq_lens = make_family(3, 3, others=0)
    lens = [*seq_lens.tolist(), 30 * BLOCK_SIZE]
    blocks = [*(row.tolist() for row in tables), list(range(150, 180))]
    states = RequestStates(8, 31 * BLOCK_SIZE, BLOCK_SIZE, torch.device("cpu"))
    new = tuple(
        NewRequest(i, i, np.zeros(n, np.int32), n, some, SamplingParams(), 0)
        for i, (n, some) in enumerate(zip(lens, blocks, strict=True))
    )
    batch = ScheduledBatch.of(np.array(lens) - 1, np.ones(4, np.int64))
    states.apply(Step(0, (), new, {}, batch))
    plan = plan_step(batch, HeadLayout(2))
    for rank in range(2):
        shared = prepare(batch, plan, states, rank, BLOCK_SIZE).metadata.shared_prefix
        assert shared is not None
        assert shared.rows.tolist() == [0, 1, 2]
        assert shared.prefix.max_seq_len == 3 * BLOCK_SIZE


# --- The engine ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_answers_to_one_prompt(model_type: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight answers, and another request beside them: greedy tokens are Transformers' own."""
    num_shared: list[int] = []  # of each layer's attention: rows that share a prefix
    merge_rows = shared_prefix.merge_rows

    def noted(out: torch.Tensor, lse: torch.Tensor, rows: torch.Tensor, *other: torch.Tensor) -> None:
        num_shared.append(len(rows))
        merge_rows(out, lse, rows, *other)

    monkeypatch.setattr(shared_prefix, "merge_rows", noted)
    model = tiny_model(tiny_config(model_type))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB_SIZE, length).tolist() for length in (100, 20)]
    engine = make_engine(model, num_ranks, num_blocks=40, step_layout="tokens")
    params = [SamplingParams(top_k=1, max_tokens=12, ignore_eos=True, n=n) for n in (8, 1)]
    outputs = generate(engine, prompts, params)
    engine.shutdown()
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference_continuation(model, prompt, 12)
        for completion in output.outputs:
            assert completion.token_ids[: len(expected)] == expected
        assert len(expected) > 2
    assert max(num_shared) == 8 // num_ranks
