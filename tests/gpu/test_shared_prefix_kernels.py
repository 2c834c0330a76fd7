"""A prefix that rows share is read once by the CUDA kernels, eagerly and in the workers' graphs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from twofold.attention import shared_prefix
from twofold.attention.backends.base import AttentionBackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec
from twofold.contract import NewRequest, ScheduledBatch, Step
from twofold.parallel.exchange import Exchange
from twofold.parallel.mesh import SingleRank
from twofold.parallel.plan import Buckets, TokenLayout, plan_step
from twofold.parallel.transport import OneRank
from twofold.sampling_params import SamplingParams
from twofold.worker.cuda_graphs import CaptureLimits, CUDAGraphs
from twofold.worker.input_batch import InputBatch, prepare
from twofold.worker.request_states import RequestStates

pytest.importorskip("triton")
from twofold.attention.backends.flash_attn import FlashAttnBackend

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # other projects' compilers warn as they please
]

DEVICE = torch.device("cuda")
BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS = 128, 8192, 40
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
SPECS = {
    "llama": AttentionSpec(32, 8, 128, 128, 128**-0.5),
    "half of llama": AttentionSpec(16, 4, 128, 128, 128**-0.5),
    "wide": AttentionSpec(8, 1, 256, 256, 1 / 16, softcap=30.0),
    "odd": AttentionSpec(14, 2, 40, 24, 0.2),
    "latents": AttentionSpec(16, 1, 576, 512, 192**-0.5, values_in_keys=True),
}


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "MIN_SAVED_TOKENS", 1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def backend() -> AttentionBackend:
    return FlashAttnBackend()


class Decodes:
    """Steps of decodes over one cache, of which some rows share a prefix."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype) -> None:
        self.spec = spec
        self.states = RequestStates(MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE, DEVICE)
        num_blocks = 1 + MAX_NUM_SEQS * 4 + MAX_MODEL_LEN // BLOCK_SIZE
        self.deal = np.random.default_rng(0).permutation(np.arange(1, num_blocks)).tolist()
        self.kv_cache = torch.randn(num_blocks, BLOCK_SIZE, spec.entry_width, device=DEVICE).to(dtype)
        self.queries = torch.randn(100, spec.num_heads, spec.qk_head_dim, device=DEVICE).to(dtype)  # of token ids

    def step(self, num_shared_blocks: int, num_sharing: int, num_others: int, buckets: Buckets) -> InputBatch:
        """Rows that share blocks among rows that do not."""
        deal = iter(self.deal)
        shares = np.random.default_rng(num_sharing).permutation(np.arange(num_sharing + num_others) < num_sharing)
        prefix = [next(deal) for _ in range(num_shared_blocks)]
        new = []
        for i, is_sharing in enumerate(shares):
            begin = prefix if is_sharing else []
            length = len(begin) * BLOCK_SIZE + 1 + 37 * i % 400
            chain = begin + [next(deal) for _ in range(-(-length // BLOCK_SIZE) - len(begin))]
            tokens = np.random.default_rng(i).integers(0, len(self.queries), length).astype(np.int32)
            new.append(NewRequest(i, i, tokens, length, chain, SamplingParams(), 0))
        lengths = np.array([len(one.token_ids) for one in new])
        batch = ScheduledBatch.of(lengths - 1, np.ones_like(lengths))
        self.states.apply(Step(0, (), tuple(new), {}, batch))
        plan = plan_step(batch, TokenLayout(1), buckets)
        return prepare(batch, plan, self.states, 0, BLOCK_SIZE)

    def attend(self, input_ids: torch.Tensor, metadata: AttentionMetadata, backend: AttentionBackend) -> torch.Tensor:
        """[N, H * (Dv + 1)]: output and log-sum-exp."""
        out, lse = shared_prefix.attend(self.queries[input_ids], self.kv_cache, self.spec, metadata, backend)
        return torch.cat([out.flatten(1).float(), lse], dim=1)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert bool(found.isfinite().all())
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("num_sharing", "num_others"), [(2, 0), (3, 3), (8, 0), (6, 2), (32, 0)])
def test_eagerly(name: str, num_sharing: int, num_others: int, dtype: torch.dtype, backend: AttentionBackend) -> None:
    """For all numbers of heads in a program: what it keeps must fit into shared memory."""
    case = Decodes(SPECS[name], dtype)
    batch = case.step(20, num_sharing, num_others, Buckets())
    shared = batch.metadata.shared_prefix
    assert shared is not None
    assert len(shared.rows.unique()) == num_sharing
    found = case.attend(batch.input_ids, batch.metadata, backend)
    assert_close(found, case.attend(batch.input_ids, replace(batch.metadata, shared_prefix=None), backend), dtype)


@pytest.mark.parametrize("name", ["llama", "latents"])
def test_in_a_graph(name: str, backend: AttentionBackend) -> None:
    """One graph for any rows and any prefix: what earlier steps left in its inputs does no harm."""
    case = Decodes(SPECS[name], torch.bfloat16)
    limits = CaptureLimits(TokenLayout(1), 0, 16, MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE, None)

    def forward(
        input_ids: torch.Tensor, position_ids: torch.Tensor, metadata: AttentionMetadata, *_: object
    ) -> torch.Tensor:
        return case.attend(input_ids, metadata, backend)

    def finish(hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden_states[:, :1], None

    pool = torch.cuda.graph_pool_handle()
    graphs = CUDAGraphs(forward, finish, limits, Exchange(SingleRank(), OneRank()), DEVICE, pool)
    graphs.capture(8, True, shares_prefix=True)  # the only one, so it is the one that is replayed
    for num_shared_blocks, num_sharing, num_others in ((50, 8, 0), (3, 3, 2), (30, 2, 6), (1, 5, 0)):
        batch = case.step(num_shared_blocks, num_sharing, num_others, graphs.buckets)
        count = num_sharing + num_others
        assert len(batch.input_ids) == 8
        outputs = graphs.replay(batch)
        assert outputs is not None
        found = outputs.hidden_states
        plain = case.attend(batch.input_ids, replace(batch.metadata, shared_prefix=None), backend)
        assert_close(found[:count], plain[:count], torch.bfloat16)
        assert bool((found[count:, : -case.spec.num_heads] == 0).all()), "rows of padding"
    assert graphs.replay(case.step(0, 4, 4, graphs.buckets)) is None
