"""Sharded weights: answers are those of Transformers, and a rank keeps its part only."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import ThreadExecutor, generate, make_engine, prompt_logprobs, reference_continuation, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from twofold import runtime
from twofold.config import EngineConfig, ModelSource
from twofold.engine.engine import LLMEngine
from twofold.errors import ModelError
from twofold.models import gguf
from twofold.models.loader import load_model, model_of_stand_ins, read_weights
from twofold.models.sizes import model_shape
from twofold.models.source import load_config
from twofold.models.transforms.packing import Part
from twofold.parallel.fetch import _blocks, dense_strides
from twofold.sampling_params import SamplingParams
from twofold.worker.worker import Rank

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=6)
LLAMA_3_1_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist()


def executor_of(engine: LLMEngine) -> ThreadExecutor:
    assert isinstance(engine.executor, ThreadExecutor)
    return engine.executor


def assert_answers(engine: LLMEngine, model: PreTrainedModel) -> None:
    """Of prompts that run in several chunks, with steps in layouts at random."""
    prompts = [prompt_of(40), prompt_of(7), prompt_of(23)]
    for prompt, found in zip(prompts, prompt_logprobs(engine, prompts), strict=True):
        np.testing.assert_allclose(found, reference_logprobs(model, prompt), rtol=0, atol=1e-4)
    for prompt, output in zip(prompts, generate(engine, prompts, GREEDY), strict=True):
        expected = reference_continuation(model, prompt, GREEDY.max_tokens)
        assert output.outputs[0].token_ids[: len(expected)] == expected


@pytest.mark.parametrize(
    ("model_type", "overrides", "num_ranks"),
    [
        ("llama", {"num_key_value_heads": 1}, 2),
        ("llama", {}, 2),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 96}, 3),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}, 4),
        ("llama", {"attention_bias": True, "mlp_bias": True}, 2),
        ("phi3", {}, 2),  # one projection for queries, keys and values
        ("gemma3_text", {}, 2),  # sliding windows
        ("deepseek_v2", {"num_key_value_heads": 4}, 4),  # latents; the first layer has no experts
        ("mixtral", {}, 2),
        ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": []}, 4),
        ("gpt_oss", {}, 2),  # sinks; experts transposed, gate and up by turns
    ],
)
def test_answers_are_those_of_transformers(model_type: str, overrides: dict[str, Any], num_ranks: int) -> None:
    model = tiny_model(tiny_config(model_type, **overrides))
    engine = make_engine(model, num_ranks, weights="sharded", max_num_batched_tokens=32)
    assert_answers(engine, model)
    assert {step.by_heads for step in executor_of(engine).steps} == {False, True}
    engine.shutdown()


@pytest.mark.parametrize("step_layout", ["tokens", "heads"])
def test_new_ranks_load_their_parts_again(step_layout: str) -> None:
    model = tiny_model(tiny_config("llama"))
    engine = make_engine(model, 2, weights="sharded", step_layout=step_layout)
    engine.recover()
    assert_answers(engine, model)
    engine.shutdown()


def test_packed_projections_are_filled_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs keys and values are one product, gate and up another, laid out rank after rank."""
    shard = Rank._shard

    def packed(self: Rank, *args: Any) -> str | None:
        self.model.optimize(self.axes.gpu.size, enforce_eager=False)
        return shard(self, *args)

    monkeypatch.setattr(Rank, "_shard", packed)
    for num_ranks, num_packed in ((2, 4), (4, 4)):  # in four ranks attention is whole, and packed in one part
        model = tiny_model(tiny_config("llama", attention_bias=True))
        engine = make_engine(model, num_ranks, weights="sharded")
        by_tokens = executor_of(engine).models[0].body
        assert sum(isinstance(module, Part) for module in by_tokens.modules()) == 4 * num_packed
        assert_answers(engine, model)
        engine.shutdown()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_keeps_its_part_only(num_ranks: int) -> None:
    """Nothing of a layer is whole but what does not divide; no tensor but the two buffers is larger than its part."""
    model = tiny_model(tiny_config("llama", num_key_value_heads=4, num_hidden_layers=8))
    engine = make_engine(model, num_ranks, weights="sharded")
    layers = [p for p in model.base_model.layers.parameters() if p.dim() > 1]
    divided = sum(p.nbytes for p in layers)
    rest = sum(p.nbytes for p in model.parameters()) - divided
    for rank, report in zip(executor_of(engine).ranks, engine.reports, strict=True):
        assert report.weight_bytes == divided // num_ranks + rest
        assert rank.holding is not None
        assert rank.holding.part_bytes == divided // num_ranks
        assert rank.holding.buffer_bytes == 2 * divided // 8
        assert rank.runner.by_heads is not None
        models = [rank.model, rank.runner.by_heads.model]
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for m in models for t in tensors_of(m)}
        assert sum(memory.values()) <= divided // num_ranks + rest + 2 * divided // 8 + 4096
    assert report.num_parameters == sum(p.numel() for p in model.base_model.parameters())
    engine.shutdown()


def tensors_of(model: Any) -> list[torch.Tensor]:
    return [*model.model.parameters(), *model.body.parameters()]


def test_a_model_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ModelError, match=r"weights cannot be sharded: no projection .*; use weights='replicated'"):
        make_engine(tiny_model(tiny_config("gpt2")), 2, weights="sharded")


def test_a_broken_number_is_found() -> None:
    """By each rank in its own part."""
    broken = tiny_model(tiny_config("llama"))
    broken.base_model.layers[2].mlp.down_proj.weight[0] = torch.nan
    with pytest.raises(ModelError, match=r"NaN in the tensor model\.layers\.2\.mlp\.down_proj\.weight"):
        make_engine(broken, 2, weights="sharded")


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_all_weights_are_handed_over_once(tmp_path: Path, model_type: str, load_format: str) -> None:
    """From several files, with the names and numbers that a whole model has; experts stacked, tied ones once."""
    model = tiny_model(tiny_config(model_type, tie_word_embeddings=model_type == "llama"))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config = EngineConfig(model=str(tmp_path), load_format=load_format)
    arguments = (config, ModelSource(str(tmp_path)), model.config, torch.float32, CPU)
    expected = load_model(*arguments, 64)
    found: dict[str, torch.Tensor] = {}
    num_bytes: list[int] = []

    def take(name: str, tensor: torch.Tensor) -> None:
        assert name not in found
        found[name] = tensor.clone()
        num_bytes.append(tensor.nbytes)

    read_weights(*arguments, take)
    known = dict(expected.state_dict())
    assert {name for name, _ in expected.named_parameters()} <= set(found) <= set(known)
    for name, tensor in found.items():
        assert torch.equal(tensor, known[name]), name


def test_tensors_of_a_gguf_file_are_made_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's tensor is taken before the next is made; all are the same bits as Transformers' own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loading

    path = loading.write_gguf(tmp_path, loading.config_of(num_layers=2, hidden=128))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16).state_dict()
    in_order, found = [], {}
    make = gguf._make

    def make_and_note(tensor: Any, processor: Any) -> torch.Tensor:
        in_order.append("make")
        return make(tensor, processor)

    def take(name: str, tensor: torch.Tensor) -> None:
        in_order.append("take")
        found[name] = tensor.clone()

    monkeypatch.setattr(gguf, "_make", make_and_note)
    config, source = EngineConfig(model=path), ModelSource(str(tmp_path), "model.gguf")
    read_weights(config, source, load_config(source, False, {}), torch.bfloat16, CPU, take)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert " ".join(in_order).count("make take") == 2 * 9 + 1


def test_stand_ins_take_the_memory_of_one_layer() -> None:
    """And tied weights stay tied."""
    config = tiny_config("llama", num_hidden_layers=12, tie_word_embeddings=True)
    model = model_of_stand_ins(EngineConfig(model="tiny"), ModelSource("tiny"), config, torch.float32, CPU, 64)
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    sizes = model_shape(config, torch.float32)
    assert sum(memory.values()) == sizes.largest_layer + sizes.rest
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_sizes_are_known_without_memory() -> None:
    sizes = model_shape(LLAMA_3_1_8B, torch.bfloat16)
    assert sizes.whole == 2 * 8_030_261_248
    assert sizes.largest_layer * 32 == sizes.layers
    assert sizes.entry == 2 * 2 * 32 * 8 * 128
    latents = tiny_config("deepseek_v2")
    assert model_shape(latents, torch.float32).entry == 4 * 4 * (16 + 8)


@pytest.mark.parametrize(
    ("arguments", "max_model_len", "expected"),
    [
        ({}, 131072, "replicated"),  # 16 GB of weights, a request of 17 GB
        ({}, 131072 * 4, "replicated"),  # one request of 69 GB: its cache is sharded
        ({"kv_cache": "replicated"}, 432_000, "sharded"),
        ({"kv_cache_memory_bytes": 60 << 30}, 131072, "sharded"),
        ({"gpu_memory_utilization": 0.3}, 131072, "sharded"),
        ({"weights": "sharded"}, 8192, "sharded"),
        ({"weights": "replicated"}, 131072 * 4, "replicated"),
        ({"weights": "sharded", "prefill_context_parallel_size": 1}, 8192, "replicated"),
    ],
)
def test_auto_shards_where_one_request_has_no_room_otherwise(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], max_model_len: int, expected: str
) -> None:
    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    config = EngineConfig(model="llama", **{"prefill_context_parallel_size": 2} | arguments)
    assert runtime._weights(config, LLAMA_3_1_8B, "cuda", torch.bfloat16, max_model_len) == expected
    on_cpu = runtime._weights(config, PretrainedConfig(), "cpu", torch.bfloat16, max_model_len)
    asked = config.weights == "sharded" and config.prefill_context_parallel_size > 1
    assert on_cpu == ("sharded" if asked else "replicated")


@pytest.mark.parametrize(
    ("shape", "view", "num_blocks"),
    [
        ((8, 6), lambda w: w[4:], 1),  # column-wise
        ((8, 6), lambda w: w[:, 3:], 1),  # row-wise
        ((4, 2, 6, 5), lambda w: w[:, :, 3:], 1),  # gate and up of experts
        ((4, 6, 8), lambda w: w.mT.unflatten(1, (1, -1)).chunk(2, dim=2)[1], 1),  # the same, transposed
        ((4, 6, 8), lambda w: w[:, 2:4, 4:], 4),
        ((1, 6), lambda w: w[:, :3], 1),
    ],
)
def test_a_part_is_copied_in_rows(shape: tuple[int, ...], view: Any, num_blocks: int) -> None:
    """As few pairs of [rows, columns] as the part has; copy engines know no other shapes."""
    whole, expected = torch.zeros(shape), torch.zeros(shape)
    place = view(whole)
    part = torch.empty_strided(place.shape, dense_strides(place))
    assert part.numel() == part.untyped_storage().nbytes() // 4
    part.copy_(torch.arange(part.numel()).reshape(part.shape))
    view(expected).copy_(part)
    blocks = list(_blocks(part, place))
    assert len(blocks) == num_blocks
    for source, target in blocks:
        assert source.is_contiguous()
        assert target.dim() == 2
        assert target.stride(1) == 1 or target.shape[1] == 1
        target.copy_(source)
    assert torch.equal(whole, expected)
