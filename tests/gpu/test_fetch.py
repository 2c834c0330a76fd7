"""Fetched weights are whole when their layer reads them; an engine that fetches answers as Transformers does."""

import random
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
from one_gpu import MAX_NUM_BATCHED_TOKENS, enough_gpus, share_gpu
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from twofold import LLM, SamplingParams
from twofold.parallel.fetch import Fetch, PartCopy, dense_strides
from twofold.parallel.mesh import ProcessMesh
from twofold.parallel.peer_memory import Symmetric

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NUM_LAYERS, NUM_ROUNDS = 7, 30
SHAPES = [(512, 768), (768, 512), (8, 256, 128)]  # column-wise, row-wise, and row-wise of experts


def part_of(whole: torch.Tensor, kind: int, rank: int, size: int) -> torch.Tensor:
    """A view of the rank's part."""
    return whole.chunk(size, dim=(0, 1, 2)[kind])[rank]


def whole_weight(layer: int, kind: int) -> torch.Tensor:
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(10 * layer + kind)).bfloat16()


def run_rank(rank: int, size: int, folder: str) -> None:
    if torch.cuda.device_count() < size:
        share_gpu()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}")
    torch.cuda.set_device(device)
    mesh = ProcessMesh.join(rank, size, f"{folder}/store", device)
    kinds = range(len(SHAPES))
    right = [[whole_weight(layer, kind).to(device) for kind in kinds] for layer in range(NUM_LAYERS)]
    num_bytes = sum(weight.nbytes for layer in right for weight in layer) // size
    memory = Symmetric(mesh, device)
    everyones = memory.allocate(num_bytes)
    buffers = [[torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device) for shape in SHAPES] for _ in (0, 1)]
    layers, offset = [], 0
    for layer in range(NUM_LAYERS):
        copies = []
        for kind in kinds:
            whole = buffers[layer % 2][kind]
            for peer in range(size):
                place = part_of(whole, kind, peer, size)
                flat = everyones[peer][offset : offset + 2 * place.numel()].view(torch.bfloat16)
                part = flat.as_strided(place.shape, dense_strides(place), flat.storage_offset())
                copies.append(PartCopy(peer, part, place))
                if peer == rank:
                    part.copy_(part_of(right[layer][kind], kind, rank, size))
            offset += 2 * whole.numel() // size
        layers.append(copies)
    fetch = Fetch(layers, mesh, device)
    torch.cuda.synchronize()
    flags = torch.zeros(size, device=device)
    mesh.all_gather(flags, flags[:1].clone())
    torch.cuda.synchronize()
    wrong = torch.zeros(2, dtype=torch.long, device=device)

    def step(lag: int) -> None:
        """Reads each layer twice, some time apart: what comes too early or too late is seen."""
        for layer in range(NUM_LAYERS):
            fetch.begin(layer)
            for _ in (0, 1):
                for kind in kinds:
                    wrong[0] += (buffers[layer % 2][kind] != right[layer][kind]).sum()
                if lag:
                    torch.cuda._sleep(lag)
            fetch.end(layer)
        wrong[1] += 1

    with torch.inference_mode():
        for _ in range(2):
            step(0)
        torch.cuda.synchronize()
        graphs = []
        for lag in (0, 200_000):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], capture_error_mode="thread_local"):
                step(lag)
        chance = random.Random(rank)
        for _ in range(NUM_ROUNDS):
            kind = chance.randrange(4)
            if kind < 2:
                graphs[kind].replay()
            else:
                step(kind % 2 * 200_000)
    num_wrong, num_steps = wrong.tolist()
    assert num_steps == NUM_ROUNDS + 2
    assert num_wrong == 0
    mesh.close()


def test_every_layer_sees_whole_weights(tmp_path: Path) -> None:
    """Seven layers with two buffers, steps launched one by one and replayed from graphs, ranks out of step."""
    size = max(2, min(torch.cuda.device_count(), 4))
    mp.spawn(run_rank, (size, str(tmp_path)), nprocs=size)


LLAMA = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
    head_dim=64, vocab_size=32000, max_position_embeddings=8192,
)  # fmt: skip
MIXTRAL = MixtralConfig(
    hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
    head_dim=64, vocab_size=32000, max_position_embeddings=8192, num_local_experts=8, sliding_window=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "dtype", "enforce_eager"),
    [(LLAMA, "float32", True), (LLAMA, "float32", False), (LLAMA, "bfloat16", False), (MIXTRAL, "bfloat16", False)],
)
@pytest.mark.parametrize("step_layout", ["tokens", "heads"])
def test_answers_are_those_of_whole_weights(
    tmp_path: Path, config: PretrainedConfig, dtype: str, enforce_eager: bool, step_layout: str
) -> None:
    """In float32 the tokens of Transformers; in bfloat16 log-probabilities that differ by rounding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    prompts = [torch.randint(0, 32000, (length,)).tolist() for length in (5, 300, 2500)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    found = []
    for weights in ("replicated", "sharded"):
        with (
            enough_gpus(2) as more,
            LLM(
                str(tmp_path), weights=weights, prefill_context_parallel_size=2, skip_tokenizer_init=True, dtype=dtype,
                kv_cache_memory_bytes=1 << 30, max_num_seqs=8, enforce_eager=enforce_eager, step_layout=step_layout,
                max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS, **more,
            ) as llm,
        ):  # fmt: skip
            assert llm.engine.reports[0].only_by_tokens in (None, "step_layout is tokens")
            found.append((llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False), llm))
    (whole, _), (parts, llm) = found
    whole_size, size_of_layers = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers))
    kept = llm.engine.reports[0].weight_bytes / (4 if dtype == "float32" else 2)
    assert kept <= whole_size - 0.49 * size_of_layers  # norms are whole
    for prompt, right, output in zip(prompts, whole, parts, strict=True):
        ours, theirs = (
            torch.tensor([e[t].logprob for e, t in zip((o.prompt_logprobs or [])[1:], prompt[1:], strict=True) if e])
            for o in (output, right)
        )
        if dtype == "float32":
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
            ids = torch.tensor([prompt])
            answer = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None)
            assert output.outputs[0].token_ids == answer[0, len(prompt) :].tolist()
        else:
            assert (ours - theirs).norm() <= 0.05 * len(prompt) ** 0.5
