"""The CUDA attention kernels against attention written out in float64."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from twofold.attention import mla
from twofold.attention.combine import apply_sinks
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec, LatentSpec

pytest.importorskip("triton")
from twofold.attention.backends.flash_attn import FlashAttnBackend
from twofold.attention.backends.paged_decode import PagedDecode, Tuning
from twofold.models.transforms import expert_linear  # noqa: F401  (defines the op)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # other projects' compilers warn as they please
]

DEVICE = "cuda"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
LSE_TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 2e-5}  # a GPU's fast tanh is softcap's
POISON = 3e4  # in every slot that is no token of the row's: finite, and never to be seen in an answer

HEADS = {  # H, Hk, D, Dv
    "llama": (32, 8, 128, 128),
    "mha-64": (4, 4, 64, 64),
    "mqa-256": (8, 1, 256, 256),
    "phi-96": (12, 4, 96, 96),
    "qwen-7": (14, 2, 64, 64),
    "falcon": (71, 1, 64, 64),
    "expanded": (4, 4, 192, 128),
    "odd": (6, 2, 40, 24),
}
FEATURES = {
    "plain": {},
    "window": {"sliding_window": 100},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 129, "softcap": 20.0, "sinks": True},
}


@dataclass
class Case:
    """A step over random blocks."""

    spec: AttentionSpec
    query: torch.Tensor  # [T, H, D]
    blocks: torch.Tensor  # [num_blocks, block_size, entry_width]
    metadata: AttentionMetadata


def make_spec(
    heads: str, sliding_window: int | None = None, softcap: float | None = None, sinks: bool = False
) -> AttentionSpec:
    num_heads, num_kv_heads, dim, v_dim = HEADS[heads]
    logits = torch.randn(num_heads, device=DEVICE) if sinks else None
    return AttentionSpec(num_heads, num_kv_heads, dim, v_dim, dim**-0.5, sliding_window, softcap, logits)


def make_latent_spec() -> LatentSpec:
    """DeepSeek-V2-Lite's."""
    weight = torch.randn(16 * (128 + 128), 512, device=DEVICE).bfloat16() / 512**0.5
    return LatentSpec(16, 16, 192, 128, 192**-0.5, kv_lora_rank=512, qk_rope_head_dim=64, weight=weight)


def make_metadata(
    starts: list[int], lengths: list[int], requests: list[int], tables: np.ndarray, block_size: int
) -> AttentionMetadata:
    """Rows (start, length) of requests with block tables `tables` [R, B]."""
    seq_lens = np.array(starts, np.int64) + np.array(lengths, np.int64)
    query_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    used = np.zeros((len(starts), -(-int(seq_lens.max()) // block_size)), np.int32)
    for row, (request, seq_len) in enumerate(zip(requests, seq_lens.tolist(), strict=True)):
        num_blocks = -(-seq_len // block_size)
        used[row, :num_blocks] = tables[request, :num_blocks]
    longer = np.flatnonzero(np.array(lengths) > 1)
    num_decode_rows = int(longer[0]) if len(longer) else len(lengths)
    return AttentionMetadata(
        num_tokens=int(query_start[-1]),
        query_start_np=query_start,
        seq_lens_np=seq_lens,
        block_tables_np=used,
        query_start=torch.from_numpy(query_start.astype(np.int32)).to(DEVICE),
        seq_lens=torch.from_numpy(seq_lens.astype(np.int32)).to(DEVICE),
        block_tables=torch.from_numpy(used).to(DEVICE),
        max_query_len=max(lengths),
        max_seq_len=int(seq_lens.max()),
        num_row_blocks=int((-(-seq_lens[num_decode_rows:] // block_size)).sum()),
        num_decode_rows=num_decode_rows,
    )


def make_case(
    spec: AttentionSpec, rows: list[tuple[int, int, int]], block_size: int, dtype: torch.dtype, seed: int = 0
) -> Case:
    """Rows (request, start, length) over blocks in random order; all other memory is poison."""
    rng = np.random.default_rng(seed)
    requests, starts, lengths = (list(column) for column in zip(*rows, strict=True))
    context = np.zeros(max(requests) + 1, np.int64)  # request -> its tokens in the cache
    for request, start, length in rows:
        context[request] = max(context[request], start + length)
    num_blocks = -(-context // block_size)
    total = int(num_blocks.sum())
    deal = rng.permutation(np.arange(1, total + 1)).astype(np.int32)
    tables = np.zeros((len(context), max(1, int(num_blocks.max()))), np.int32)
    kv_cache = torch.full((total + 1, block_size, spec.entry_width), POISON, dtype=dtype, device=DEVICE)
    for request, bound in enumerate(np.cumsum(num_blocks).tolist()):
        mine = deal[bound - int(num_blocks[request]) : bound]
        tables[request, : len(mine)] = mine
        tokens = torch.randn(int(context[request]), spec.entry_width, device=DEVICE).to(dtype)
        blocks = torch.from_numpy(mine.astype(np.int64)).to(DEVICE)
        slots = blocks.repeat_interleave(block_size)[: len(tokens)] * block_size
        slots += torch.arange(len(tokens), device=DEVICE) % block_size
        kv_cache.view(-1, spec.entry_width)[slots] = tokens
    metadata = make_metadata(starts, lengths, requests, tables, block_size)
    query = torch.randn(sum(lengths), spec.num_heads, spec.qk_head_dim, device=DEVICE).to(dtype)
    return Case(spec, query, kv_cache, metadata)


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H, Dv] with sinks and log-sum-exp [T, H] without them, in float64."""
    spec, metadata = case.spec, case.metadata
    bounds = metadata.query_start.tolist()
    group = spec.num_heads // spec.num_kv_heads
    outs, lses = [], []
    for row, seq_len in enumerate(metadata.seq_lens.tolist()):
        q = case.query[bounds[row] : bounds[row + 1]].double()
        entries = case.blocks[metadata.block_tables[row].long()].flatten(0, 1)[:seq_len]
        keys, values = (part.double().repeat_interleave(group, 1) for part in spec.unpack(entries))
        logits = torch.einsum("lhd,khd->hlk", q, keys) * spec.scaling
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        position = torch.arange(seq_len - len(q), seq_len, device=DEVICE)[:, None]
        distance = position - torch.arange(seq_len, device=DEVICE)
        visible = (distance >= 0) & (distance < (spec.sliding_window or seq_len + 1))
        logits = logits.masked_fill(~visible, -torch.inf)
        lses.append(logits.logsumexp(-1).T)
        if spec.sinks is not None:
            logits = torch.cat([logits, spec.sinks.double()[:, None, None].expand(-1, len(q), 1)], -1)
        weights = logits.softmax(-1)[..., :seq_len]
        outs.append(torch.einsum("hlk,khv->lhv", weights, values))
    return torch.cat(outs), torch.cat(lses)


def assert_right(case: Case, out: torch.Tensor, lse: torch.Tensor) -> None:
    """A backend's output and log-sum-exp, with sinks applied."""
    expected, expected_lse = reference(case)
    dtype = case.query.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, atol=LSE_TOLERANCE[dtype], rtol=1e-5)
    assert_close(out if case.spec.sinks is None else apply_sinks(out, lse, case.spec.sinks), expected, dtype)


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Every token's output, relative to its own size."""
    assert out.dtype == dtype
    assert out.shape == expected.shape
    assert bool(out.isfinite().all())
    errors = (out.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1e-30)
    assert float(errors.max()) < TOLERANCE[dtype], f"token {int(errors.argmax())}: {float(errors.max()):.2e}"


def decode_rows(seq_lens: list[int]) -> list[tuple[int, int, int]]:
    """Requests with one token to compute each."""
    return [(request, seq_len - 1, 1) for request, seq_len in enumerate(seq_lens)]


def run_decode(case: Case, decode: PagedDecode | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    metadata = case.metadata
    return (decode or PagedDecode())(case.query, case.blocks, case.spec, metadata.block_tables, metadata.seq_lens)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TestPagedDecode:
    LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 300, 1000, 2500)

    @pytest.mark.parametrize("heads", HEADS)
    @pytest.mark.parametrize("block_size", [16, 128])
    def test_heads(self, heads: str, block_size: int) -> None:
        case = make_case(make_spec(heads), decode_rows([*self.LENGTHS]), block_size, torch.bfloat16)
        assert_right(case, *run_decode(case))

    @pytest.mark.parametrize("features", FEATURES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
    def test_features(self, features: str, dtype: torch.dtype) -> None:
        spec = make_spec("llama", **FEATURES[features])
        case = make_case(spec, decode_rows([*self.LENGTHS]), 128, dtype)
        assert_right(case, *run_decode(case))

    @pytest.mark.parametrize("block_size", [1, 24, 48, 96])
    def test_any_block_size(self, block_size: int) -> None:
        spec = make_spec("mha-64", **FEATURES["all"])
        case = make_case(spec, decode_rows([*self.LENGTHS]), block_size, torch.float32)
        assert_right(case, *run_decode(case))

    @pytest.mark.parametrize("heads", ["mqa-256", "expanded", "falcon"])
    def test_float32(self, heads: str) -> None:
        case = make_case(make_spec(heads), decode_rows([1, 70, 700]), 16, torch.float32)
        assert_right(case, *run_decode(case))

    @pytest.mark.parametrize("num_rows", [1, 33, 300, 600])
    def test_rows_of_any_number(self, num_rows: int) -> None:
        """One long row and many short ones: runs of one row and of many."""
        lengths = np.random.default_rng(num_rows).integers(1, 200, num_rows).tolist()
        lengths[num_rows // 2] = 9000
        case = make_case(make_spec("mha-64"), decode_rows(lengths), 128, torch.bfloat16)
        assert_right(case, *run_decode(case))

    @pytest.mark.parametrize("programs", [1, 7, 64, 4096])
    @pytest.mark.parametrize("block_n", [16, 32, 128])
    def test_tuning_changes_no_answer(self, programs: int, block_n: int) -> None:
        case = make_case(make_spec("mha-64", softcap=20.0, sinks=True), decode_rows([5, 500, 2000]), 128, torch.float32)
        decode = PagedDecode(Tuning(block_n=block_n, programs=programs, min_run=block_n))
        assert_right(case, *run_decode(case, decode))

    def test_rows_without_keys_are_zero(self) -> None:
        for features in FEATURES.values():
            case = make_case(make_spec("llama", **features), decode_rows([7, 400]), 16, torch.bfloat16)
            metadata = case.metadata
            query = torch.cat([case.query, torch.randn_like(case.query)])
            tables = torch.cat([metadata.block_tables, torch.zeros_like(metadata.block_tables)])
            seq_lens = torch.cat([metadata.seq_lens, torch.zeros_like(metadata.seq_lens)])
            out, lse = PagedDecode()(query, case.blocks, case.spec, tables, seq_lens)
            assert bool((out[2:] == 0).all())
            assert bool((lse[2:] == -torch.inf).all())
            if case.spec.sinks is not None:
                assert bool((apply_sinks(out[2:].clone(), lse[2:], case.spec.sinks) == 0).all())
            assert_right(case, out[:2], lse[:2])

    def test_strided_query_and_given_output(self) -> None:
        case = make_case(make_spec("llama"), decode_rows([1000, 3]), 128, torch.bfloat16)
        wide = torch.randn(2, 32, 3, 128, device=DEVICE).bfloat16()
        wide[:, :, 1] = case.query
        out = torch.full((5, 32, 128), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        lse = torch.full((32, 5), torch.nan, device=DEVICE).T
        tables, seq_lens = case.metadata.block_tables, case.metadata.seq_lens
        PagedDecode()(wide[:, :, 1], case.blocks, case.spec, tables, seq_lens, out=out[1:3], lse=lse[1:3])
        assert_right(case, out[1:3], lse[1:3])
        assert bool(out[[0, 3, 4]].isnan().all())
        assert bool(lse[[0, 3, 4]].isnan().all())

    @pytest.mark.parametrize("num_heads", [16, 128])
    @pytest.mark.parametrize("block_size", [16, 128])
    def test_values_in_keys(self, num_heads: int, block_size: int) -> None:
        """Absorbed latent attention: one key-value head; its values are the first 512 numbers of its keys."""
        spec = AttentionSpec(num_heads, 1, 576, 512, 192**-0.5, values_in_keys=True)
        case = make_case(spec, decode_rows([1, 100, 3000]), block_size, torch.bfloat16)
        assert_right(case, *run_decode(case))

    def test_graph_holds_for_other_lengths_and_tables(self) -> None:
        spec, decode, num_rows, capacity = make_spec("llama", **FEATURES["sinks"]), PagedDecode(), 8, 4096
        cases = [
            make_case(spec, decode_rows(lengths), 128, torch.bfloat16, seed)
            for seed, lengths in enumerate([[4096] * 8, [1, 2, 3], [4000, 1, 700, 128, 129, 64, 65, 31], [2500]])
        ]
        query = torch.zeros(num_rows, 32, 128, dtype=torch.bfloat16, device=DEVICE)
        kv_cache = torch.zeros(max(len(case.blocks) for case in cases), 128, spec.entry_width, device=DEVICE).bfloat16()
        tables = torch.zeros(num_rows, capacity // 128, dtype=torch.int32, device=DEVICE)
        seq_lens = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
        decode(query, kv_cache, spec, tables, seq_lens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = decode(query, kv_cache, spec, tables, seq_lens)
        for case in cases:
            count = len(case.query)
            for static, fresh in (
                (query, case.query),
                (kv_cache, case.blocks),
                (tables, case.metadata.block_tables),
                (seq_lens, case.metadata.seq_lens),
            ):
                static.zero_()
                static[tuple(slice(n) for n in fresh.shape)].copy_(fresh)
            out.fill_(torch.nan)
            lse.fill_(torch.nan)
            graph.replay()
            assert bool((out[count:] == 0).all())
            assert bool((lse[count:] == -torch.inf).all())
            assert_right(case, out[:count], lse[:count])


def prefill_rows() -> list[tuple[int, int, int]]:
    """A step of rank 0 of 4: two decodes, head and tail of a prompt, a chunk after a cached prefix, a last token."""
    return [(0, 700, 1), (1, 0, 1), (2, 0, 150), (2, 1050, 150), (3, 333, 40), (4, 60, 2), (5, 128, 1)]


@pytest.fixture(scope="module")
def backend() -> FlashAttnBackend:
    return FlashAttnBackend()


class TestFlashAttnBackend:
    @pytest.mark.parametrize(
        ("heads", "features", "block_size"),
        [
            ("llama", "plain", 128),
            ("llama", "plain", 16),
            ("llama", "window", 128),
            ("mha-64", "sinks", 128),
            ("llama", "softcap", 128),
            ("qwen-7", "plain", 128),
            ("phi-96", "plain", 128),
            ("expanded", "plain", 128),
            ("mqa-256", "all", 128),
            ("odd", "plain", 16),
        ],
    )
    def test_mixed_step(self, backend: FlashAttnBackend, heads: str, features: str, block_size: int) -> None:
        case = make_case(make_spec(heads, **FEATURES[features]), prefill_rows(), block_size, torch.bfloat16)
        assert_right(case, *backend.attend(case.query, case.blocks, case.spec, case.metadata))

    @pytest.mark.parametrize("rows", [prefill_rows()[:2], prefill_rows()[2:], prefill_rows()[2:4]])
    def test_rows_of_one_kind(self, backend: FlashAttnBackend, rows: list[tuple[int, int, int]]) -> None:
        case = make_case(make_spec("llama"), rows, 128, torch.bfloat16)
        assert_right(case, *backend.attend(case.query, case.blocks, case.spec, case.metadata))

    @pytest.mark.parametrize("features", FEATURES)
    def test_float32_falls_back(self, features: str, caplog: pytest.LogCaptureFixture) -> None:
        backend = FlashAttnBackend()
        case = make_case(make_spec("qwen-7", **FEATURES[features]), prefill_rows(), 128, torch.float32)
        for _ in range(2):
            out, lse = backend.attend(case.query, case.blocks, case.spec, case.metadata)
        assert_right(case, out, lse)
        assert [record.levelname for record in caplog.records if record.name.startswith("twofold")] == ["WARNING"]

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_expanded_latents(self, backend: FlashAttnBackend, causal: bool, dtype: torch.dtype) -> None:
        spec = make_latent_spec()
        query, keys = (torch.randn(n, 16, 192, device=DEVICE).to(dtype) for n in (150, 400))
        values = torch.randn(400, 16, 256, device=DEVICE).to(dtype)[..., 128:]
        out, lse = backend.attend_keys(query, keys, values, spec.expanded, causal)
        logits = torch.einsum("lhd,khd->hlk", query.double(), keys.double()) * spec.scaling
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits[0]).triu(400 - 150 + 1).bool(), -torch.inf)
        assert_close(out, torch.einsum("hlk,khv->lhv", logits.softmax(-1), values.double()), dtype)
        torch.testing.assert_close(lse, logits.logsumexp(-1).T.float(), atol=1e-3, rtol=1e-4)

    @pytest.mark.parametrize("block_size", [128, 16])
    @pytest.mark.parametrize("at_once", [True, False])
    def test_latents_of_a_mixed_step(
        self, backend: FlashAttnBackend, at_once: bool, block_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All rows expanded at once, and in pieces; the rows of one token absorbed."""
        spec = make_latent_spec()
        case = make_case(spec, prefill_rows(), block_size, torch.bfloat16)
        if not at_once:
            monkeypatch.setattr(mla, "PIECE_BYTES", 200 * 16 * 320 * 2)
        out, copied = mla.attend(case.query, case.blocks, spec, case.metadata, backend, None)
        assert (copied is not None) == at_once
        expanded = mla.expand(case.blocks, spec)
        assert_close(out, reference(Case(spec.expanded, case.query, expanded, case.metadata))[0], torch.bfloat16)
        if at_once:  # another layer of the same step
            other, again = mla.attend(case.query, case.blocks.flip(-2), spec, case.metadata, backend, copied)
            assert again is copied
            fresh, _ = mla.attend(case.query, case.blocks.flip(-2), spec, case.metadata, backend, None)
            assert torch.equal(other, fresh)

    def test_latents_at_once_in_a_graph(self, backend: FlashAttnBackend) -> None:
        """Captured for some rows, replayed for others with fewer blocks: nothing that was prepared is left over."""
        spec = make_latent_spec()
        cases = [
            make_case(spec, rows, 128, torch.bfloat16, seed)
            for seed, rows in enumerate([[(0, 0, 300), (1, 600, 212)], [(0, 500, 200), (1, 100, 312)]])
        ]
        num_blocks = max(len(case.blocks) for case in cases)
        kv_cache = torch.zeros(num_blocks, 128, spec.entry_width, dtype=torch.bfloat16, device=DEVICE)
        static = replace(
            cases[0].metadata,
            query_start=torch.zeros(3, dtype=torch.int32, device=DEVICE),
            seq_lens=torch.zeros(2, dtype=torch.int32, device=DEVICE),
            block_tables=torch.zeros(2, 8, dtype=torch.int32, device=DEVICE),
            num_row_blocks=12,
        )
        query = torch.zeros_like(cases[0].query)

        def fill(case: Case) -> None:
            kv_cache[: len(case.blocks)] = case.blocks
            query.copy_(case.query)
            given = case.metadata.block_tables
            static.block_tables.zero_()
            static.block_tables[:, : given.shape[1]] = given
            static.seq_lens.copy_(case.metadata.seq_lens)
            static.query_start.copy_(case.metadata.query_start)

        fill(cases[0])
        mla.attend(query, kv_cache, spec, static, backend, None)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = mla.attend(query, kv_cache, spec, static, backend, None)
        for case in reversed(cases):
            fill(case)
            graph.replay()
            expanded = mla.expand(case.blocks, spec)
            assert_close(out, reference(Case(spec.expanded, case.query, expanded, case.metadata))[0], torch.bfloat16)

    def test_absorbed_latents(self, backend: FlashAttnBackend) -> None:
        """Rows with queries projected into the space of the latents."""
        case = make_case(make_latent_spec().absorbed, decode_rows([1, 100, 3000]), 128, torch.bfloat16)
        assert_right(case, *backend.attend(case.query, case.blocks, case.spec, case.metadata))

    def test_long_prompt(self, backend: FlashAttnBackend) -> None:
        """Rank 0's head and tail of 16k tokens over 4 ranks; the tail reads everyone's keys."""
        case = make_case(make_spec("llama"), [(0, 0, 2048), (0, 14336, 2048)], 128, torch.bfloat16)
        out, lse = backend.attend(case.query, case.blocks, case.spec, case.metadata)
        picked = torch.tensor([0, 1, 127, 128, 2047, 2048, 2049, 3000, 4095], device=DEVICE)
        assert_right(_alone(case, picked), out[picked], lse[picked])


def _alone(case: Case, tokens: torch.Tensor) -> Case:
    """Some of the tokens, each as a row of its own."""
    metadata = case.metadata
    bounds, seq_lens = metadata.query_start_np, metadata.seq_lens_np
    rows = np.searchsorted(bounds, tokens.cpu().numpy(), side="right") - 1
    ends = seq_lens[rows] - (bounds[rows + 1] - 1 - tokens.cpu().numpy())
    alone = make_metadata(
        (ends - 1).tolist(), [1] * len(ends), rows.tolist(), metadata.block_tables_np, case.blocks.shape[1]
    )
    return Case(case.spec, case.query[tokens], case.blocks, alone)


class TestExpertLinear:
    @pytest.mark.parametrize("is_transposed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 6), (3, 2), (32, 8), (256, 1)])
    def test_every_pair_meets_its_expert(
        self, num_tokens: int, top_k: int, dtype: torch.dtype, is_transposed: bool
    ) -> None:
        """Few pairs and more than experts; some experts have all tokens, some have none; odd widths."""
        x = torch.randn(num_tokens, 200, device=DEVICE).to(dtype)
        weight = torch.randn(16, 90, 200, device=DEVICE).to(dtype)
        likely = torch.linspace(0, 6, 16, device=DEVICE).expand(num_tokens, -1)
        experts = (likely + 0.5 * torch.randn_like(likely)).topk(top_k, dim=-1).indices.flatten()
        given = weight.transpose(1, 2).contiguous() if is_transposed else weight
        out = torch.ops.twofold.expert_linear(x, given, experts, 16, is_transposed)
        expected = (weight[experts].double() @ x.repeat_interleave(top_k, 0).double()[..., None])[..., 0]
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype] * 60, rtol=1e-2)

    @pytest.mark.parametrize("num_tokens", [1, 32])
    def test_a_share_of_gate_and_up_is_one_product(self, num_tokens: int) -> None:
        """By heads a rank has some rows of each, which lie apart."""
        x = torch.randn(num_tokens, 200, device=DEVICE).bfloat16()
        share = torch.randn(16, 2, 180, 200, device=DEVICE).bfloat16()[:, :, 90:]
        experts = torch.randint(16, (num_tokens * 4,), device=DEVICE)
        out = torch.ops.twofold.expert_linear(x, share, experts, 16, False)
        apart = [torch.ops.twofold.expert_linear(x, part, experts, 16, False) for part in share.unbind(1)]
        assert torch.equal(out, torch.cat(apart, dim=-1))
