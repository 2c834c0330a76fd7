"""A sharded KV cache on GPUs: shares in symmetric memory, fetched by copy engines and by a kernel."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).parent))
from one_gpu import enough_gpus, share_gpu

from twofold import LLM, SamplingParams
from twofold.kv.sharded import LayerShare, ShardedKVCache, owner_of, place_of
from twofold.parallel import fetch_entries
from twofold.parallel.fetch_entries import EntryFetch, FetchPlan, Placement, Source
from twofold.parallel.mesh import ProcessMesh
from twofold.parallel.peer_memory import Symmetric

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NUM_BLOCKS, BLOCK_SIZE, NUM_FETCHED = 200, 16, 60
PROMPT_LENS = (1, 5, 300, 1500, 2900)


def value_of(block: int, layer: int, step: int) -> float:
    return float((block * 7 + layer * 31 + step * 3) % 251)


def run_rank(rank: int, size: int, folder: str) -> None:
    """Steps in which all ranks write their shares of all blocks, then fetch some, while one of them is slow."""
    if torch.cuda.device_count() < size:
        share_gpu()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}")
    torch.cuda.set_device(device)
    mesh = ProcessMesh.join(rank, size, f"{folder}/store", device)
    memory = Symmetric(mesh, device)
    shares = [LayerShare(256, by_heads, size, 8) for by_heads in (True, False, True, False, True)]
    cache = ShardedKVCache(shares, NUM_BLOCKS, BLOCK_SIZE, torch.bfloat16, rank, memory.allocate)
    fetch = EntryFetch(cache, NUM_FETCHED + 1, memory)
    layers, blocks = range(len(shares)), np.arange(NUM_BLOCKS)
    owners, places = owner_of(blocks, size), place_of(blocks, size)
    for step in range(8):
        fetch_entries.MAX_RUNS = 64 if step % 2 else 0  # by copies, or by the kernel
        fetch.begin(None, [])  # a step that fetches nothing: now the shares may be written
        if rank == step % size:
            torch.cuda._sleep(10**8)
        for layer, share in enumerate(shares):
            mine = blocks if share.by_heads else blocks[(owners == rank) & (blocks > 0)]
            values = torch.tensor([value_of(block, layer, step) for block in mine.tolist()], device=device)
            where = torch.from_numpy(mine if share.by_heads else places[mine]).to(device)
            # By heads a rank's columns also tell whose they are.
            values = values + (rank if share.by_heads else 0)
            cache.blocks[layer][where] = values.bfloat16()[:, None, None].expand(-1, BLOCK_SIZE, share.width)
        rng = np.random.default_rng(step)
        wanted = np.sort(rng.choice(np.arange(1, NUM_BLOCKS), NUM_FETCHED, replace=False))
        on_device, peers = torch.from_numpy(wanted).to(device), [peer for peer in range(size) if peer != rank]
        by_heads = [Source(peer, 1, wanted, on_device) for peer in peers]
        order = wanted[np.lexsort((wanted, owners[wanted]))]
        by_blocks, first = [], 1
        for owner in range(size):
            theirs = places[order[owners[order] == owner]]
            by_blocks.append(Source(owner, first, theirs, torch.from_numpy(theirs).to(device)))
            first += len(theirs)
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        tables = np.zeros((0, 0), np.int32)
        plan = FetchPlan(
            True,
            {
                (kind, None): Placement(NUM_FETCHED + 1, sources, tables, nothing.int(), nothing, nothing)
                for kind, sources in ((True, by_heads), (False, by_blocks))
            },
        )
        fetch.begin(plan, layers)
        for layer, share in enumerate(shares):
            ready = fetch.ready(layer)
            assert ready is not None
            torch.cuda.current_stream().wait_event(ready)
            found = fetch.caches(layer)
            if rank == (step + 1) % size:
                torch.cuda._sleep(10**7)
            if share.by_heads:
                for peer in peers:
                    right = torch.tensor([value_of(block, layer, step) + peer for block in wanted.tolist()])
                    check(found[peer], right)
            else:
                check(found[0], torch.tensor([value_of(block, layer, step) for block in order.tolist()]))
            fetch.finish(layer)
    torch.cuda.synchronize()
    mesh.close()


def check(found: torch.Tensor, right: torch.Tensor) -> None:
    expected = right.bfloat16()[:, None, None].expand(-1, *found.shape[1:])
    assert torch.equal(found[1 : 1 + NUM_FETCHED].cpu(), expected)


def test_every_rank_reads_what_was_written(tmp_path: Path) -> None:
    """Shares are written, fetched and written again, with ranks out of step, and two workspaces in turn."""
    size = max(2, min(torch.cuda.device_count(), 4))
    mp.spawn(run_rank, (size, str(tmp_path)), nprocs=size)


def llama() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=8192,
    )  # fmt: skip


def three_heads() -> PretrainedConfig:
    """KV heads that do not divide."""
    return LlamaConfig(
        vocab_size=4096, hidden_size=576, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
    )  # fmt: skip


def deepseek() -> PretrainedConfig:
    return DeepseekV3Config(
        vocab_size=4096, hidden_size=512, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, n_shared_experts=1, kv_lora_rank=512, q_lora_rank=None,
        qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, max_position_embeddings=8192,
    )  # fmt: skip


@pytest.mark.parametrize("make", [llama, three_heads, deepseek], ids=lambda make: make.__name__)
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_float32_tokens_are_those_of_transformers(make: object, enforce_eager: bool, tmp_path: Path) -> None:
    """Chunks of 1000 tokens fetch what was before them, answers run by heads from CUDA graphs, beside the prompts."""
    torch.manual_seed(0)
    assert callable(make)
    AutoModelForCausalLM.from_config(make()).float().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).cuda().eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 4096, length).tolist() for length in PROMPT_LENS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        answer = model.generate(ids, do_sample=False, max_new_tokens=16, eos_token_id=None)
        expected.append(answer[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with enough_gpus(2) as more:
        llm = LLM(
            str(tmp_path), prefill_context_parallel_size=2, skip_tokenizer_init=True, kv_cache="sharded",
            kv_cache_memory_bytes=1 << 28, max_num_seqs=16, max_model_len=4096, max_num_batched_tokens=1000,
            dtype="float32", enforce_eager=enforce_eager, **more,
        )  # fmt: skip
    with llm:
        assert llm.engine.is_sharded
        for _ in range(2):  # the second time from the prefix cache
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        assert llm.engine.is_idle
