"""Latents in place of heads: the same answers as Transformers' own attention, from a smaller cache."""

import copy
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, apply_rotary_pos_emb_interleave

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import generate, make_engine, prompt_logprobs, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model

from twofold import SamplingParams
from twofold.attention import mla
from twofold.attention.backends.sdpa import SDPABackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.engine.engine import LLMEngine
from twofold.errors import ModelError
from twofold.models.decoder import DecoderModel

SMALL = {"num_hidden_layers": 2, "num_key_value_heads": 4, "v_head_dim": 12, "eos_token_id": None}
ENTRY_WIDTH = 16 + 8  # kv_lora_rank + qk_rope_head_dim of the tiny models; their expanded heads take 4 * (24 + 12)
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model_type, what differs from the tiny model
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2_lite": ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": YARN}),
    "deepseek_v3": ("deepseek_v3", {"n_routed_experts": 8, "n_group": 2, "rope_parameters": YARN}),  # and Kimi K2
    "deepseek_v3_halves": ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True}),
    "glm4_moe_lite": ("glm4_moe_lite", {}),
    "mistral4": ("mistral4", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}}),
    "minicpm3": ("minicpm3", {}),
    "youtu": ("youtu", {}),
    "longcat_flash": ("longcat_flash", {"num_layers": 1, "head_dim": 8}),  # two attentions in a layer
    "axk1": ("axk1", {}),
}
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def make_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    return tiny_model(tiny_config(model_type, **(SMALL | overrides)))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model_type, overrides = FAMILIES[request.param]
    return make_model(model_type, **overrides)


@pytest.fixture(scope="module")
def deepseek() -> PreTrainedModel:
    return make_model("deepseek_v2", q_lora_rank=None, rope_parameters=YARN)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB_SIZE, length).tolist() for length in lengths]


def specs_of(engine: LLMEngine) -> list[AttentionSpec]:
    return engine.executor.models[0].specs


@cache
def _reference_tokens(model: PreTrainedModel, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def reference_tokens(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """64 tokens of Transformers' own generate."""
    return _reference_tokens(model, tuple(prompt))


def assert_logprobs(engine: LLMEngine, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    for prompt, found in zip(prompts, prompt_logprobs(engine, prompts), strict=True):
        np.testing.assert_allclose(found, reference_logprobs(model, prompt), rtol=0, atol=1e-4)


def test_prompt_logprobs(model: PreTrainedModel) -> None:
    """Prompts of 1 to 2·P tokens and longer ones, whole and in chunks that end anywhere."""
    for num_ranks in (1, 2, 3, 4):
        prompts = random_prompts(*range(1, 2 * num_ranks + 1), 50, 37)
        for max_num_batched_tokens in (4096, 23):
            engine = make_engine(model, num_ranks, max_num_batched_tokens=max_num_batched_tokens)
            assert all(isinstance(spec, LatentSpec) for spec in specs_of(engine))
            assert len(specs_of(engine)) == 2
            assert_logprobs(engine, model, prompts)
            engine.shutdown()


def test_greedy_tokens(model: PreTrainedModel) -> None:
    """Absorbed decode over 64 steps, against Transformers' own expanded one."""
    prompts = random_prompts(5, 45)
    expected = [reference_tokens(model, prompt) for prompt in prompts]
    for num_ranks in (1, 3):
        engine = make_engine(model, num_ranks)
        outputs = generate(engine, prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        engine.shutdown()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_chunks_prefix_hits_and_preemption(deepseek: PreTrainedModel, num_ranks: int) -> None:
    """All at once, in a cache too small for all: nothing of it shows in the tokens."""
    shared, *rest = random_prompts(40, 30, 9, 2 * num_ranks, 21)
    prompts = [shared + rest[0], shared + rest[1], shared, *rest]
    expected = [reference_tokens(deepseek, prompt) for prompt in prompts]
    engine = make_engine(
        deepseek, num_ranks, max_num_batched_tokens=32, num_blocks=36, block_size=8, max_model_len=160,
        enable_prefix_caching=True,
    )  # fmt: skip
    for _ in range(2):  # the second time the cached prompt is found
        outputs = generate(engine, prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
    steps = engine.executor.steps
    times_new = [new.number for step in steps for new in step.new]
    assert len(times_new) > 2 * len(prompts), "no request was preempted"
    hits = [
        step.batch.num_computed_tokens[step.batch.numbers.tolist().index(new.number)]
        for step in steps
        for new in step.new
    ]
    assert max(hits) >= 40 // 8 * 8, "no prefix was found"
    assert any(
        (step.batch.num_scheduled_tokens > 1).any() and not step.batch.num_sampled_tokens.all() for step in steps
    )
    engine.shutdown()


def set_piece_tokens(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(mla, "piece_tokens", lambda spec, itemsize: tokens)


@pytest.mark.parametrize("piece_tokens", [1, 7, 16, 64])
def test_pieces(deepseek: PreTrainedModel, piece_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys expanded a few at a time, whether or not the pieces end with rows, chunks or blocks."""
    set_piece_tokens(monkeypatch, piece_tokens)
    prompts = random_prompts(2, 16, 33, 64)
    for num_ranks in (1, 2, 3):
        for max_num_batched_tokens in (4096, 23):
            engine = make_engine(deepseek, num_ranks, max_num_batched_tokens=max_num_batched_tokens)
            assert_logprobs(engine, deepseek, prompts)
            engine.shutdown()


def test_only_latents_are_stored_and_sent(deepseek: PreTrainedModel) -> None:
    """(kv_lora_rank + qk_rope_head_dim) numbers of each token and layer, measured on the buffers; the same on all."""
    num_ranks, num_tokens, block_size, num_blocks = 4, 64, 16, 9
    [prompt] = random_prompts(num_tokens)
    engine = make_engine(deepseek, num_ranks, block_size=block_size, num_blocks=num_blocks, max_model_len=128)
    generate(engine, [prompt], SamplingParams(temperature=0, max_tokens=1))
    runners = engine.executor.runners
    for runner in runners:
        stored = sum(stack.untyped_storage().nbytes() for stack in runner.cache.stacks)
        assert stored / (num_blocks * block_size) / len(runner.cache.blocks) == ENTRY_WIDTH * 4
        assert runner.exchange.transport.num_bytes == 2 * (num_tokens - num_tokens // num_ranks) * ENTRY_WIDTH * 4
        sent = [shape for shape in runner.axes.world.calls if len(shape) == 2]
        assert sent == [(num_tokens // num_ranks, ENTRY_WIDTH)] * 2
    assert engine.executor.reports[0].bytes_per_block == 2 * block_size * ENTRY_WIDTH * 4
    [new] = [new for step in engine.executor.steps for new in step.new]
    for layer in range(2):
        mine = [runner.cache.blocks[layer][new.block_ids] for runner in runners]
        assert mine[0].abs().sum(-1).min() > 0, "a slot was not written"
        assert all(torch.equal(blocks, mine[0]) for blocks in mine[1:])
    engine.shutdown()


def test_latents_hold_what_transformers_caches(deepseek: PreTrainedModel) -> None:
    """A KV entry is the latent and the RoPE part that Transformers itself would cache."""
    [prompt] = random_prompts(32)
    engine = make_engine(deepseek, 2)
    generate(engine, [prompt], SamplingParams(temperature=0, max_tokens=1))
    with torch.no_grad():
        cache = deepseek(torch.tensor([prompt]), use_cache=True).past_key_values
    [new] = [new for step in engine.executor.steps for new in step.new]
    for layer in range(2):
        entries = engine.executor.runners[1].cache.blocks[layer][new.block_ids].flatten(0, 1)[:32]
        expected = torch.cat([cache.layers[layer].keys[0, 0], cache.layers[layer].values[0, 0]], dim=-1)
        torch.testing.assert_close(entries, expected, rtol=0, atol=1e-5)
    engine.shutdown()


# Models that look like it.


class ScaledKeys(DeepseekV3Attention):
    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().expand_kv(kv_nope, k_rot)
        return keys * 1.5, values


class NormedKeys(DeepseekV3Attention):
    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().expand_kv(kv_nope, k_rot)
        return F.normalize(keys, dim=-1) * 4, values


class ValuesFirst(DeepseekV3Attention):
    """As many numbers in the same matrix, in another order."""

    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self.kv_b_proj(kv_nope).unflatten(-1, (self.num_heads, -1))[:, 0].transpose(1, 2)
        values, k_nope = heads.split([self.v_head_dim, self.qk_nope_head_dim], dim=-1)
        return torch.cat([k_nope, k_rot.expand(-1, self.num_heads, -1, -1)], dim=-1), values


class RopeFirst(DeepseekV3Attention):
    def expand_kv(self, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().expand_kv(kv_nope, k_rot)
        return keys.roll(self.qk_rope_head_dim, dims=-1), values


class UsesItsKeys(DeepseekV3Attention):
    """Does more between `expand_kv` and attention, whatever the shapes are; here, the same to latents."""

    doubles_query = False

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        shape = hidden_states.shape[:-1]
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states))).view(*shape, -1, self.qk_head_dim)
        q_nope, q_rope = query.transpose(1, 2).split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states)[:, None].split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        q_rope, k_rot = apply_rotary_pos_emb_interleave(q_rope, k_rot, *position_embeddings)
        keys, values = self.expand_kv(self.kv_a_layernorm(latent), k_rot)
        if self.doubles_query:
            q_nope = q_nope * (1 + keys.shape[1] / self.num_heads)
        else:
            values = values.tanh()
        attend = AttentionInterface()[self.config._attn_implementation]
        out, _ = attend(self, torch.cat([q_nope, q_rope], dim=-1), keys, values, attention_mask, scaling=self.scaling)
        return self.o_proj(out.reshape(*shape, -1)), None


class UsesTheirNumber(UsesItsKeys):
    doubles_query = True


class OwnBias(DeepseekV3Attention):
    """A bias is linear, too, but not in the latent."""


@pytest.mark.parametrize(
    "look_alike", [ScaledKeys, NormedKeys, ValuesFirst, RopeFirst, UsesItsKeys, UsesTheirNumber, OwnBias]
)
def test_look_alike_keeps_its_heads(look_alike: type[DeepseekV3Attention]) -> None:
    """The names of the family and another computation: served as any model is, and rightly."""
    model = make_model("deepseek_v3", v_head_dim=16)
    for layer in model.model.layers:
        layer.self_attn.__class__ = look_alike
        if look_alike is OwnBias:
            layer.self_attn.kv_b_proj.bias = torch.nn.Parameter(torch.randn(4 * 32), requires_grad=False)
    if issubclass(look_alike, UsesItsKeys):
        model.set_attn_implementation("sdpa")  # the eager function is no entry of the interface
    engine = make_engine(model, 2)
    assert [type(spec) for spec in specs_of(engine)] == [AttentionSpec] * 2
    assert all("expand_kv" not in vars(module) for module in engine.executor.models[0].body.modules())
    assert_logprobs(engine, model, random_prompts(3, 40))
    engine.shutdown()


def test_sparse_attention_over_latents_is_refused() -> None:
    """DeepSeek-V3.2 has all the names, and attends to the keys that an indexer picked."""
    config = tiny_config("deepseek_v32", **SMALL, index_topk=16, index_head_dim=16, index_n_heads=2, q_lora_rank=24)
    with pytest.raises(ModelError, match="not served"):
        DecoderModel(tiny_model(config))


# The functions by themselves.


def latent_spec(num_heads: int = 4) -> LatentSpec:
    """L = 32, R = 8, D = 24, Dv = 20."""
    weight = torch.randn(num_heads * (16 + 20), 32) / 32**0.5
    return LatentSpec(num_heads, num_heads, 24, 20, 24**-0.5, kv_lora_rank=32, qk_rope_head_dim=8, weight=weight)


def make_metadata(
    starts: list[int], lengths: list[int], tables: list[list[int]], num_decode_rows: int
) -> AttentionMetadata:
    query_start = np.concatenate([[0], np.cumsum(lengths)])
    seq_lens = np.array(starts) + np.array(lengths)
    table = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, blocks in enumerate(tables):
        table[row, : len(blocks)] = blocks
    return AttentionMetadata(
        num_tokens=int(query_start[-1]),
        query_start_np=query_start,
        seq_lens_np=seq_lens,
        block_tables_np=table,
        query_start=torch.from_numpy(query_start.astype(np.int32)),
        seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
        block_tables=torch.from_numpy(table),
        max_query_len=max(lengths),
        max_seq_len=int(seq_lens.max()),
        num_row_blocks=sum(len(blocks) for blocks in tables[num_decode_rows:]),
        num_decode_rows=num_decode_rows,
    )


def attend_plainly(
    query: torch.Tensor, kv_cache: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata
) -> torch.Tensor:
    """By the definition, in float64, one head and one token at a time."""
    out = []
    weight = spec.weight.double().view(spec.num_heads, -1, spec.kv_lora_rank)
    for row, seq_len in enumerate(metadata.seq_lens_np):
        slots = kv_cache[torch.from_numpy(metadata.block_tables_np[row]).long()].flatten(0, 1).double()
        begin, end = metadata.query_start_np[row : row + 2]
        for token in range(begin, end):
            entries = slots[: seq_len - end + token + 1]
            for head in range(spec.num_heads):
                k_nope, values = (entries[:, :32] @ weight[head].T).split([16, 20], dim=-1)
                keys = torch.cat([k_nope, entries[:, 32:]], dim=-1)
                out.append((keys @ query[token, head].double() * spec.scaling).softmax(0) @ values)
    return torch.stack(out).view(-1, spec.num_heads, 20)


def attend(query: torch.Tensor, kv_cache: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata) -> torch.Tensor:
    return mla.attend(query, kv_cache, spec, metadata, SDPABackend(), None)[0]


def test_absorbed_and_expanded_agree() -> None:
    torch.manual_seed(0)
    spec, kv_cache = latent_spec(), torch.randn(12, 8, 40)
    starts, tables = [0, 7, 20, 39], [[3], [4], [6, 9, 2], [1, 5, 7, 8, 10]]
    query = torch.randn(4, 4, 24)
    expected = attend_plainly(query, kv_cache, spec, make_metadata(starts, [1] * 4, tables, 0))
    for num_decode_rows in (0, 2, 4):
        metadata = make_metadata(starts, [1] * 4, tables, num_decode_rows)
        out = attend(query, kv_cache, spec, metadata)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_graphs_know_no_rows_on_the_host() -> None:
    """Graphs of decodes could not be captured: what only longer rows need was asserted of all steps."""
    torch.manual_seed(0)
    spec, kv_cache = latent_spec(), torch.randn(12, 8, 40)
    known = make_metadata([0, 7, 20, 39], [1] * 4, [[3], [4], [6, 9, 2], [1, 5, 7, 8, 10]], 4)
    query, nothing = torch.randn(4, 4, 24), np.empty(0, np.int64)
    metadata = replace(known, query_start_np=nothing, seq_lens_np=nothing, block_tables_np=nothing.astype(np.int32))

    class Kernels(SDPABackend):
        def attend(
            self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return super().attend(query, kv_cache, spec, known)

    out, _ = mla.attend(query, kv_cache, spec, metadata, Kernels(), None)
    torch.testing.assert_close(out.double(), attend_plainly(query, kv_cache, spec, known), rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="a graph knows no rows"):
        mla.attend(query, kv_cache, spec, replace(metadata, num_decode_rows=3), Kernels(), None)


def test_rows_of_one_prompt_expand_their_keys_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and tail of a prompt read the same blocks; another prompt that shares only the first of them does not."""
    torch.manual_seed(0)
    spec, kv_cache = latent_spec(), torch.randn(12, 8, 40)
    long, other = [1, 2, 3, 9, 5], [1, 2, 7, 8]
    metadata = make_metadata([30, 4, 28, 16, 3], [1, 8, 9, 7, 5], [[6, 4, 3, 2], long[:2], long, other[:3], [11]], 1)
    assert list(mla.shared_prefixes(metadata, 1, 8)) == [[1, 2], [3], [4]]
    expanded: list[int] = []
    expand = mla.expand

    def counted(entries: torch.Tensor, spec: LatentSpec) -> torch.Tensor:
        expanded.append(len(entries))
        return expand(entries, spec)

    monkeypatch.setattr(mla, "expand", counted)
    query = torch.randn(metadata.num_tokens, 4, 24)
    out = attend(query, kv_cache, spec, metadata)
    assert expanded == [37, 23, 8]
    torch.testing.assert_close(out.double(), attend_plainly(query, kv_cache, spec, metadata), rtol=0, atol=1e-5)
    expanded.clear()
    set_piece_tokens(monkeypatch, 10)
    torch.testing.assert_close(attend(query, kv_cache, spec, metadata), out, rtol=0, atol=1e-5)
    assert expanded == [10, 10, 10, 7, 10, 10, 3, 8]


class ReadsTheDevice(SDPABackend):
    """Finds rows by the block tables on the device, as kernels of a GPU do."""

    calls = 0

    def can_capture(self, spec: AttentionSpec, dtype: torch.dtype, is_decode: bool) -> bool:
        return True

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return super().attend(query, kv_cache, spec, replace(metadata, block_tables_np=metadata.block_tables.numpy()))

    def attend_keys(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("in pieces")


@pytest.mark.parametrize("num_decode_rows", [0, 2])
@pytest.mark.parametrize("spare", [0, 5])
def test_rows_at_once_from_a_copy_of_their_blocks(spare: int, num_decode_rows: int) -> None:
    """Layers have separate caches, and share the copied block tables; a graph has room for more blocks."""
    torch.manual_seed(0)
    spec, backend = latent_spec(), ReadsTheDevice()
    known = make_metadata(
        [30, 9, 4, 28, 16], [1, 1, 8, 9, 7], [[6, 4, 3, 2], [11, 10], [1, 2], [1, 2, 3, 9, 5], [1, 7, 8]],
        num_decode_rows,
    )  # fmt: skip
    metadata = replace(known, num_row_blocks=known.num_row_blocks + spare)
    query, copied = torch.randn(known.num_tokens, 4, 24), None
    for layer in range(3):
        kv_cache, before = torch.randn(12, 8, 40), copied
        out, copied = mla.attend(query, kv_cache, spec, metadata, backend, copied)
        torch.testing.assert_close(out.double(), attend_plainly(query, kv_cache, spec, known), rtol=0, atol=1e-5)
        assert copied is not None
        assert layer == 0 or copied is before
        assert copied.sources[len(copied.sources) - spare :].tolist() == [-1] * spare
    assert backend.calls == 3 * (2 if num_decode_rows else 1)
    other = replace(metadata, num_decode_rows=0, num_row_blocks=20)
    assert mla.attend(query, kv_cache, spec, other, backend, copied)[1] is not copied, "rows of another step"


def test_longer_rows_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once only with so many queries in a row, and so many keys, that the memory set aside is enough."""
    torch.manual_seed(0)
    spec, kv_cache = latent_spec(), torch.randn(12, 8, 40)
    metadata = make_metadata([4, 20], [3, 6], [[1], [2, 3, 4, 5]], 0)
    query = torch.randn(9, 4, 24)
    mla.attend(query, kv_cache, spec, metadata, ReadsTheDevice(), None)
    for name, most in (("MAX_QUERIES_AT_ONCE", 5), ("PIECE_BYTES", 39 * 4 * 44 * 4)):
        with monkeypatch.context() as patch:
            patch.setattr(mla, name, most)
            with pytest.raises(AssertionError, match="in pieces"):
                mla.attend(query, kv_cache, spec, metadata, ReadsTheDevice(), None)


def test_attention_module_compiles_whole(deepseek: PreTrainedModel) -> None:
    """Replacing `expand_kv` breaks no graph, and no matrix is multiplied to expand."""
    model = DecoderModel(copy.deepcopy(deepseek))
    module = model.body.layers[0].self_attn
    products: list[int] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        products.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        assert any("twofold" in str(node.target) for node in graph.graph.nodes)
        return graph.forward

    hidden_states, position_ids = torch.randn(1, 5, 64), torch.arange(5)[None]
    position_embeddings = model.body.rotary_emb(hidden_states, position_ids)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    with torch.inference_mode(), pytest.raises(AttributeError):  # it was traced; to run it needs a forward context
        compiled(hidden_states, position_embeddings=position_embeddings)
    assert products == [3]  # queries, latents, output
