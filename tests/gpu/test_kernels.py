"""The CUDA attention kernels against attention written out in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from twofold.attention import mla
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
    """A step over random pages."""

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
    """Rows (start, length) of requests, whose block tables are `tables` [R, B]."""
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
    """Rows (request, start, length) over pages whose blocks are dealt at random; what is no key is poison."""
    rng = np.random.default_rng(seed)
    requests, starts, lengths = (list(column) for column in zip(*rows, strict=True))
    context = np.zeros(max(requests) + 1, np.int64)  # request -> its tokens in the cache
    for request, start, length in rows:
        context[request] = max(context[request], start + length)
    num_blocks = -(-context // block_size)
    total = int(num_blocks.sum())
    deal = rng.permutation(np.arange(1, total + 1)).astype(np.int32)
    tables = np.zeros((len(context), max(1, int(num_blocks.max()))), np.int32)
    pages = torch.full((total + 1, block_size, spec.entry_width), POISON, dtype=dtype, device=DEVICE)
    for request, bound in enumerate(np.cumsum(num_blocks).tolist()):
        mine = deal[bound - int(num_blocks[request]) : bound]
        tables[request, : len(mine)] = mine
        tokens = torch.randn(int(context[request]), spec.entry_width, device=DEVICE).to(dtype)
        blocks = torch.from_numpy(mine.astype(np.int64)).to(DEVICE)
        slots = blocks.repeat_interleave(block_size)[: len(tokens)] * block_size
        slots += torch.arange(len(tokens), device=DEVICE) % block_size
        pages.view(-1, spec.entry_width)[slots] = tokens
    metadata = make_metadata(starts, lengths, requests, tables, block_size)
    query = torch.randn(sum(lengths), spec.num_heads, spec.qk_head_dim, device=DEVICE).to(dtype)
    return Case(spec, query, pages, metadata)


def reference(case: Case) -> torch.Tensor:
    """[T, H, Dv] in float64."""
    spec, metadata = case.spec, case.metadata
    bounds = metadata.query_start.tolist()
    group = spec.num_heads // spec.num_kv_heads
    outs = []
    for row, seq_len in enumerate(metadata.seq_lens.tolist()):
        q = case.query[bounds[row] : bounds[row + 1]].double()
        slots = case.blocks[metadata.block_tables[row].long()].flatten(0, 1)[:seq_len]
        keys, values = (part.double().repeat_interleave(group, 1) for part in spec.unpack(slots))
        logits = torch.einsum("lhd,khd->hlk", q, keys) * spec.scaling
        if spec.softcap is not None:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        position = torch.arange(seq_len - len(q), seq_len, device=DEVICE)[:, None]
        distance = position - torch.arange(seq_len, device=DEVICE)
        visible = (distance >= 0) & (distance < (spec.sliding_window or seq_len + 1))
        logits = logits.masked_fill(~visible, -torch.inf)
        if spec.sinks is not None:
            logits = torch.cat([logits, spec.sinks.double()[:, None, None].expand(-1, len(q), 1)], -1)
        weights = logits.softmax(-1)[..., :seq_len] if seq_len else logits[..., :0]
        outs.append(torch.einsum("hlk,khv->lhv", weights, values))
    return torch.cat(outs)


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


def run_decode(case: Case, decode: PagedDecode | None = None) -> torch.Tensor:
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
        assert_close(run_decode(case), reference(case), torch.bfloat16)

    @pytest.mark.parametrize("features", FEATURES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
    def test_features(self, features: str, dtype: torch.dtype) -> None:
        spec = make_spec("llama", **FEATURES[features])
        case = make_case(spec, decode_rows([*self.LENGTHS]), 128, dtype)
        assert_close(run_decode(case), reference(case), dtype)

    @pytest.mark.parametrize("block_size", [1, 24, 48, 96])
    def test_any_block_size(self, block_size: int) -> None:
        spec = make_spec("mha-64", **FEATURES["all"])
        case = make_case(spec, decode_rows([*self.LENGTHS]), block_size, torch.float32)
        assert_close(run_decode(case), reference(case), torch.float32)

    @pytest.mark.parametrize("heads", ["mqa-256", "expanded", "falcon"])
    def test_float32(self, heads: str) -> None:
        case = make_case(make_spec(heads), decode_rows([1, 70, 700]), 16, torch.float32)
        assert_close(run_decode(case), reference(case), torch.float32)

    @pytest.mark.parametrize("num_rows", [1, 33, 300, 600])
    def test_rows_of_any_number(self, num_rows: int) -> None:
        """One long row among many short ones: runs of one row and of many."""
        lengths = np.random.default_rng(num_rows).integers(1, 200, num_rows).tolist()
        lengths[num_rows // 2] = 9000
        case = make_case(make_spec("mha-64"), decode_rows(lengths), 128, torch.bfloat16)
        assert_close(run_decode(case), reference(case), torch.bfloat16)

    @pytest.mark.parametrize("programs", [1, 7, 64, 4096])
    @pytest.mark.parametrize("block_n", [16, 32, 128])
    def test_tuning_changes_no_answer(self, programs: int, block_n: int) -> None:
        case = make_case(make_spec("mha-64", softcap=20.0, sinks=True), decode_rows([5, 500, 2000]), 128, torch.float32)
        decode = PagedDecode(Tuning(block_n=block_n, programs=programs, min_run=block_n))
        assert_close(run_decode(case, decode), reference(case), torch.float32)

    def test_rows_without_keys_are_zero(self) -> None:
        for features in FEATURES.values():
            case = make_case(make_spec("llama", **features), decode_rows([7, 400]), 16, torch.bfloat16)
            metadata = case.metadata
            query = torch.cat([case.query, torch.randn_like(case.query)])
            tables = torch.cat([metadata.block_tables, torch.zeros_like(metadata.block_tables)])
            seq_lens = torch.cat([metadata.seq_lens, torch.zeros_like(metadata.seq_lens)])
            out = PagedDecode()(query, case.blocks, case.spec, tables, seq_lens)
            assert_close(out[:2], reference(case), torch.bfloat16)
            assert bool((out[2:] == 0).all())

    def test_strided_query_and_given_output(self) -> None:
        case = make_case(make_spec("llama"), decode_rows([1000, 3]), 128, torch.bfloat16)
        expected = reference(case)
        wide = torch.randn(2, 32, 3, 128, device=DEVICE).bfloat16()
        wide[:, :, 1] = case.query
        out = torch.full((5, 32, 128), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        metadata = case.metadata
        PagedDecode()(wide[:, :, 1], case.blocks, case.spec, metadata.block_tables, metadata.seq_lens, out=out[1:3])
        assert_close(out[1:3], expected, torch.bfloat16)
        assert bool(out[[0, 3, 4]].isnan().all())

    @pytest.mark.parametrize("num_heads", [16, 128])
    @pytest.mark.parametrize("block_size", [16, 128])
    def test_values_in_keys(self, num_heads: int, block_size: int) -> None:
        """Absorbed latent attention: one key-value head, whose values are the keys' first 512 numbers."""
        pages_spec = AttentionSpec(num_heads, 1, 576, 0, 192**-0.5)
        case = make_case(pages_spec, decode_rows([1, 100, 3000]), block_size, torch.bfloat16)
        spec = AttentionSpec(num_heads, 1, 576, 512, 192**-0.5)
        metadata = case.metadata
        out = PagedDecode()(case.query, case.blocks, spec, metadata.block_tables, metadata.seq_lens)
        doubled = torch.cat([case.blocks, case.blocks[..., :512]], -1)
        assert_close(out, reference(Case(spec, case.query, doubled, metadata)), torch.bfloat16)

    def test_graph_holds_for_other_lengths_and_tables(self) -> None:
        spec, decode, num_rows, capacity = make_spec("llama", **FEATURES["sinks"]), PagedDecode(), 8, 4096
        cases = [
            make_case(spec, decode_rows(lengths), 128, torch.bfloat16, seed)
            for seed, lengths in enumerate([[4096] * 8, [1, 2, 3], [4000, 1, 700, 128, 129, 64, 65, 31], [2500]])
        ]
        query = torch.zeros(num_rows, 32, 128, dtype=torch.bfloat16, device=DEVICE)
        pages = torch.zeros(max(len(case.blocks) for case in cases), 128, spec.entry_width, device=DEVICE).bfloat16()
        tables = torch.zeros(num_rows, capacity // 128, dtype=torch.int32, device=DEVICE)
        seq_lens = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
        decode(query, pages, spec, tables, seq_lens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = decode(query, pages, spec, tables, seq_lens)
        for case in cases:
            count = len(case.query)
            for static, fresh in (
                (query, case.query),
                (pages, case.blocks),
                (tables, case.metadata.block_tables),
                (seq_lens, case.metadata.seq_lens),
            ):
                static.zero_()
                static[tuple(slice(n) for n in fresh.shape)].copy_(fresh)
            out.fill_(torch.nan)
            graph.replay()
            assert_close(out[:count], reference(case), torch.bfloat16)
            assert bool((out[count:] == 0).all())


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
            ("qwen-7", "plain", 128),
            ("phi-96", "plain", 128),
            ("expanded", "plain", 128),
            ("mqa-256", "all", 128),
            ("odd", "plain", 16),
        ],
    )
    def test_mixed_step(self, backend: FlashAttnBackend, heads: str, features: str, block_size: int) -> None:
        case = make_case(make_spec(heads, **FEATURES[features]), prefill_rows(), block_size, torch.bfloat16)
        out = backend.attend(case.query, case.blocks, case.spec, case.metadata)
        assert_close(out, reference(case), torch.bfloat16)

    @pytest.mark.parametrize("rows", [prefill_rows()[:2], prefill_rows()[2:], prefill_rows()[2:4]])
    def test_rows_of_one_kind(self, backend: FlashAttnBackend, rows: list[tuple[int, int, int]]) -> None:
        case = make_case(make_spec("llama"), rows, 128, torch.bfloat16)
        out = backend.attend(case.query, case.blocks, case.spec, case.metadata)
        assert_close(out, reference(case), torch.bfloat16)

    @pytest.mark.parametrize("features", FEATURES)
    def test_float32_falls_back(self, features: str, caplog: pytest.LogCaptureFixture) -> None:
        backend = FlashAttnBackend()
        case = make_case(make_spec("qwen-7", **FEATURES[features]), prefill_rows(), 128, torch.float32)
        for _ in range(2):
            out = backend.attend(case.query, case.blocks, case.spec, case.metadata)
        assert_close(out, reference(case), torch.float32)
        assert [record.levelname for record in caplog.records if record.name.startswith("twofold")] == ["WARNING"]

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_expanded_latents(self, backend: FlashAttnBackend, causal: bool, dtype: torch.dtype) -> None:
        spec = make_latent_spec()
        query, keys = (torch.randn(n, 16, 192, device=DEVICE).to(dtype) for n in (150, 400))
        values = torch.randn(400, 16, 256, device=DEVICE).to(dtype)[..., 128:]
        out, lse = backend.attend_expanded(query, keys, values, spec, causal)
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
        called = backend.attend_at_once(case.query, case.blocks, spec, case.metadata)
        assert (called is not None) == at_once
        out = mla.attend(case.query, case.blocks, spec, case.metadata, backend)
        keys, values = mla.expand(case.blocks, spec)
        pages = torch.cat([keys.flatten(2), values.flatten(2)], -1)
        expected = reference(Case(AttentionSpec(16, 16, 192, 128, spec.scaling), case.query, pages, case.metadata))
        assert_close(out, expected, torch.bfloat16)

    def test_absorbed_latents(self, backend: FlashAttnBackend) -> None:
        """Rows whose queries moved into the latents' space."""
        spec = make_latent_spec()
        case = make_case(AttentionSpec(16, 1, 576, 0, spec.scaling), decode_rows([1, 100, 3000]), 128, torch.bfloat16)
        out = backend.attend_absorbed(case.query, case.blocks, spec, case.metadata)
        doubled = torch.cat([case.blocks, case.blocks[..., :512]], -1)
        assert_close(out, reference(Case(spec.absorbed, case.query, doubled, case.metadata)), torch.bfloat16)

    def test_long_prompt(self, backend: FlashAttnBackend) -> None:
        """Rank 0's head and tail of 16k tokens over 4 ranks; the tail reads everyone's keys."""
        case = make_case(make_spec("llama"), [(0, 0, 2048), (0, 14336, 2048)], 128, torch.bfloat16)
        out = backend.attend(case.query, case.blocks, case.spec, case.metadata)
        picked = torch.tensor([0, 1, 127, 128, 2047, 2048, 2049, 3000, 4095], device=DEVICE)
        assert_close(out[picked], _reference_of(case, picked), torch.bfloat16)


def _reference_of(case: Case, tokens: torch.Tensor) -> torch.Tensor:
    """The reference of some tokens alone: each as a row of its own."""
    metadata = case.metadata
    bounds, seq_lens = metadata.query_start_np, metadata.seq_lens_np
    rows = np.searchsorted(bounds, tokens.cpu().numpy(), side="right") - 1
    ends = seq_lens[rows] - (bounds[rows + 1] - 1 - tokens.cpu().numpy())
    alone = make_metadata(
        (ends - 1).tolist(), [1] * len(ends), rows.tolist(), metadata.block_tables_np, case.blocks.shape[1]
    )
    return reference(Case(case.spec, case.query[tokens], case.blocks, alone))


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
