"""`twofold plan`: bytes are those of engines, more memory never holds less, times are those that were measured."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config, tiny_model
from transformers import LlamaConfig

from twofold import ConfigError, ModelError, runtime
from twofold.cli.main import main
from twofold.config import EngineConfig
from twofold.models.sizes import model_shape
from twofold.planning.processors import KNOWN, Link
from twofold.planning.room import Wish, choose, ranks_needed, room
from twofold.planning.shape import Divisible, LayerAttention, ModelShape
from twofold.planning.times import Setup, TimeModel, num_pairs, pipelined

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 1 << 30


def llama(num_layers: int = 8, hidden_size: int = 4096, num_kv_heads: int = 8) -> ModelShape:
    """Of Llama's kind, in two-byte numbers."""
    num_heads, inner = hidden_size // 128, 3 * hidden_size
    attention = LayerAttention(num_heads, num_kv_heads, 128, 128, 2 * num_kv_heads * 128)
    sizes = 2 * (hidden_size + 128 * num_kv_heads) * hidden_size * 2, 3 * hidden_size * inner * 2
    counts = (num_heads, num_kv_heads), (inner,)
    groups = [
        Divisible(layer, size, count) for layer in range(num_layers) for size, count in zip(sizes, counts, strict=True)
    ]
    return ModelShape(
        layers=num_layers * sum(sizes),
        largest_layer=sum(sizes),
        rest=2 * 128_000 * hidden_size * 2,
        head=128_000 * hidden_size * 2,
        itemsize=2,
        hidden_size=hidden_size,
        divisible=tuple(groups),
        attention=(attention,) * num_layers,
        inner_numbers=num_layers * inner,
    )


shapes = st.builds(llama, st.integers(1, 64), st.sampled_from([1024, 4096, 8192]), st.sampled_from([1, 2, 8]))
wishes = st.builds(
    Wish,
    max_model_len=st.integers(2, 1 << 20),
    weights=st.sampled_from(["auto", "replicated", "sharded"]),
    kv_cache=st.sampled_from(["auto", "replicated", "sharded"]),
    max_num_batched_tokens=st.one_of(st.none(), st.integers(64, 65536)),
)
num_ranks = st.sampled_from([1, 2, 4, 8])
memories = st.integers(8 * GIB, 200 * GIB)


@given(shapes, wishes, num_ranks, memories, st.integers(0, 100 * GIB))
def test_more_memory_never_holds_less(shape: ModelShape, wish: Wish, ranks: int, memory: int, more: int) -> None:
    """With the same holdings; and what fitted still fits, whatever is chosen."""
    for weights, cache in ((False, False), (ranks > 1, False), (ranks > 1, ranks > 1)):
        less = room(shape, memory, ranks, wish, weights=weights, cache=cache)
        assert room(shape, memory + more, ranks, wish, weights=weights, cache=cache).num_tokens >= less.num_tokens
        assert less.weights + less.buffers + less.workspace + less.beside + less.cache <= memory or not less.cache
    assert choose(shape, memory + more, ranks, wish).fits or not choose(shape, memory, ranks, wish).fits


@given(shapes, st.integers(2, 1 << 18), memories)
def test_more_gpus_never_hold_less(shape: ModelShape, max_model_len: int, memory: int) -> None:
    wish = Wish(max_model_len, weights="sharded", kv_cache="sharded", max_num_batched_tokens=8192)
    held = [room(shape, memory, ranks, wish, weights=True, cache=True).num_tokens for ranks in (2, 4, 8)]
    assert all(more >= fewer - wish.block_size for fewer, more in pairwise(held))


@given(shapes, wishes, memories)
def test_the_fewest_gpus_that_would_do_do(shape: ModelShape, wish: Wish, memory: int) -> None:
    found = ranks_needed(shape, memory, wish)
    if found is not None:
        assert choose(shape, memory, found.num_ranks, wish).fits
        if found.num_ranks > 1 and shape.divided(found.num_ranks - 1):
            assert not choose(shape, memory, found.num_ranks - 1, wish).fits


@given(shapes, st.sampled_from([2, 4, 8]))
def test_shares_are_shares(shape: ModelShape, ranks: int) -> None:
    """Sharded holdings never take more of a rank than whole ones, and together they have all of the model."""
    assert shape.kept(ranks) <= shape.whole
    assert ranks * (shape.whole - shape.kept(ranks)) == (ranks - 1) * shape.divided(ranks)
    assert shape.entry_on(ranks, True) * ranks == shape.entry


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=4), st.integers(1, 50))
def test_pairs_in_a_window(rows: list[tuple[int, int]], window: int) -> None:
    expected = sum(min(start + i + 1, window) for start, length in rows for i in range(length))
    start, length = np.array(rows).T
    assert num_pairs(start, length, window) == expected
    assert num_pairs(start, length) == num_pairs(start, length, 1000)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(2, 300_000), st.sampled_from(["tokens", "heads", "auto"]))
@settings(max_examples=50)
def test_longer_prompts_and_larger_batches_never_take_less(ranks: int, length: int, layout: str) -> None:
    model = TimeModel(llama(), KNOWN["h100"], Setup(ranks, step_layout=layout))
    assert model.ttft(2 * length) >= model.ttft(length)
    assert model.ttft(length + 1000, 1000) >= model.ttft(length)
    assert model.token(8, length) >= model.token(1, length)
    assert model.token(1, 2 * length) >= model.token(1, length)
    parts = model.prefill(0, min(length, 32768))
    assert min(parts.products, parts.attention, parts.rest, parts.traffic, parts.overhead) >= 0


@given(st.floats(1e-6, 1.0), st.integers(2, 128), st.floats(1, 1e9), st.floats(1, 3200))
def test_a_link_hides_behind_attention_as_far_as_it_is_fast_enough(
    attention: float, num_nodes: int, piece: float, gbps: float
) -> None:
    link = Link(gbps, latency=0.0)
    seconds = pipelined(attention, piece, num_nodes, link)
    travel = link.seconds((num_nodes - 1) * piece)
    assert max(attention, travel) <= seconds * (1 + 1e-9)
    assert seconds <= attention + travel + 1e-12
    if travel <= attention * (num_nodes - 1) / num_nodes:  # each piece is there when its turn comes
        assert seconds == pytest.approx(attention, rel=0.1 + 1 / num_nodes)


def test_a_faster_link_never_takes_longer() -> None:
    def ttft(gbps: float, overlaps: bool) -> float:
        setup = Setup(16, num_nodes=2, link=Link(gbps), overlaps_link=overlaps)
        return TimeModel(llama(32), KNOWN["h100"], setup).ttft(32768)

    for overlaps in (False, True):
        times = [ttft(gbps, overlaps) for gbps in (10, 25, 100, 400, 3200)]
        assert times == sorted(times, reverse=True)
    assert ttft(100, True) <= ttft(100, False)
    one_node = TimeModel(llama(32), KNOWN["h100"], Setup(8)).ttft(32768)
    assert one_node / 2 < ttft(3200, True) < one_node


# --- Bytes of engines ------------------------------------------------------------------------------------------------

FAMILIES = [
    ("llama", {}, 2),
    ("llama", {"num_key_value_heads": 1}, 2),  # only MLPs divide
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, 4),
    ("phi3", {}, 2),  # one projection for queries, keys and values
    ("gemma3_text", {}, 2),
    ("deepseek_v2", {"num_key_value_heads": 4}, 2),
    ("mixtral", {}, 2),
    ("gpt_oss", {}, 2),
]


@pytest.mark.parametrize(("model_type", "overrides", "ranks"), FAMILIES)
@pytest.mark.parametrize("kv_cache", ["replicated", "sharded"])
def test_bytes_are_those_of_an_engine(model_type: str, overrides: dict[str, Any], ranks: int, kv_cache: str) -> None:
    """Weights that a rank keeps, a block of its cache, and the tokens that fit, by the configuration alone."""
    config = tiny_config(model_type, **overrides)
    shape = model_shape(config, torch.float32)
    engine = make_engine(tiny_model(config), ranks, weights="sharded", kv_cache=kv_cache, step_layout="tokens")
    report = engine.reports[0]
    assert report.weight_bytes == shape.kept(ranks)
    assert report.bytes_per_block == shape.entry * 16
    if kv_cache == "sharded":
        assert report.sharded is not None
        assert report.sharded.bytes_per_block == pytest.approx(shape.entry_on(ranks, True) * 16, abs=1)
    engine.shutdown()


# --- Before a rank starts --------------------------------------------------------------------------------------------

LLAMA_3_1_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip
LLAMA_3_1_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 79 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)


def weights(config: Any, max_model_len: int = 8192, **arguments: Any) -> str:
    return runtime._weights(EngineConfig(model="m", **arguments), config, "cuda", torch.bfloat16, max_model_len)


@pytest.mark.usefixtures("gpus")
def test_what_does_not_fit_is_refused_with_the_number_of_gpus_that_would_do() -> None:
    """A rank found out after minutes of loading."""
    with pytest.raises(ModelError, match=r"does not fit on 1 GPU: each may use 76\.3 GB .* 4 such GPUs would do") as it:
        weights(LLAMA_3_1_70B)
    assert "\n" not in str(it.value)
    assert weights(LLAMA_3_1_70B, prefill_context_parallel_size=4) == "sharded"
    with pytest.raises(ModelError, match=r"3 such GPUs would do .*; here max_model_len may be at most \d+"):
        weights(LLAMA_3_1_8B, 1_000_000, prefill_context_parallel_size=2)
    assert weights(LLAMA_3_1_8B) == "replicated"


@pytest.mark.usefixtures("gpus")
def test_auto_keeps_whole_weights_of_a_model_that_does_not_divide() -> None:
    """It asked for sharded ones where a request had no room, and a rank refused them after loading."""
    odd = LlamaConfig(
        hidden_size=4032, intermediate_size=10001, num_hidden_layers=60, num_attention_heads=63,
        num_key_value_heads=21, head_dim=64, vocab_size=128000,
    )  # fmt: skip
    two = {"prefill_context_parallel_size": 2}
    assert weights(odd, 200_000, **two) == "replicated"  # its cache is sharded
    with pytest.raises(ModelError, match=r"does not fit on 2 GPUs.*\(none of its projections divides .* GPUs would do"):
        weights(odd, 1_000_000, **two)
    with pytest.raises(
        ConfigError, match=r"weights='sharded' cannot be had .* on 2 ranks: none .*; use weights='auto'"
    ):
        weights(odd, **two, weights="sharded")
    assert weights(odd, **{"prefill_context_parallel_size": 3}, weights="sharded") == "sharded"
    with pytest.raises(ConfigError, match="no projection of it is known to divide"):
        weights(tiny_config("gpt2"), 64, **two, weights="sharded")


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    LLAMA_3_1_8B.save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_command_says_all(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", folder, "--gpus", "2", "--memory", "80G", "--dtype", "bfloat16"]
    assert main([*arguments, "--max-model-len", "131072", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["gpu"] == "H100 80GB"
    assert found["bytes of each rank"]["weights"] == 2 * 8_030_261_248
    assert [row["prompt"] for row in found["time to first token"]] == [1024, 8192, 32768, 131071]
    assert [row["batch"] for row in found["from token to token"]] == [1, 8, 32]
    assert found["sources"]["shares and overheads"].startswith("fitted to benchmarks/results/")
    assert main([*arguments, "--max-model-len", "131072"]) == 0
    assert "tokens, 3.1 requests of 131,072" in capsys.readouterr().out


def test_times_are_never_a_silent_guess(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU that was not measured is planned by published figures, and the answer says so; an unknown one has none."""
    assert main(["plan", folder, "--memory", "48G", "--max-model-len", "8192"]) == 0
    assert "not known: name the GPU by --gpu" in capsys.readouterr().out
    assert main(["plan", folder, "--gpu", "l40s", "--max-model-len", "8192"]) == 0
    assert "not measured" in capsys.readouterr().out


def test_what_does_not_fit(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, "--memory", "16G", "--max-model-len", "8192"]) == 1
    assert "GPUs would do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "memory of a GPU is needed: --memory 80G, or --gpu"),
        (["--gpu", "h100", "--nodes", "2"], "nodes above 1 and link_gbps go together"),
        (["--gpu", "h100", "--nodes", "2", "--link-gbps", "0"], "link_gbps must be above 0"),
        (["--gpu", "h100", "--lens", "999999"], "at most max_model_len=131072, got 999999"),
    ],
)
def test_wrong_arguments(folder: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, *arguments]) == 2
    assert message in capsys.readouterr().err


# --- Tokens that fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Llama-3.1-8B", "DeepSeek-V2-Lite"])
def test_two_ranks_hold_twice_as_many_tokens(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 1.95 times, of entries by heads and of latents by blocks; on whole GPUs less their workspaces, too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import capacity

    shape = capacity.shape_of(model)
    tokens = capacity.in_bytes(shape, 2)
    assert 1.95 <= tokens["cache"] / tokens["replicated"] <= 2
    for gpu in ("h100", "h200"):
        on_gpus = capacity.on_gpus(shape, 2, gpu, max_model_len=131072)
        assert on_gpus["both"] > on_gpus["cache"] >= 1.95 * on_gpus["replicated"]


# --- Times that were measured ----------------------------------------------------------------------------------------

# Planned too fast by 11 to 14 %: a step of few tokens on H100s, and the copies of a sharded cache in a short prompt.
KNOWN_OFF = {
    ("h200-x2-llama-3.1-8b-sharded-cache.json", "TTFT 1024", "auto"),
    ("h100-x2-llama-3.1-8b-layouts.json", "TTFT 256", "heads"),
    ("h100-x2-deepseek-v2-lite-layouts.json", "TTFT 16", "tokens"),
}


def test_times_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 10 % of each committed run that no figure was fitted to, but for three that are named here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "plan", raising=False)
    import plan

    judged = [row for row in plan.check() if row["role"] == "judge"]
    off = {(row["source"], row["what"], row["layout"]) for row in judged if abs(row["ratio"] - 1) > plan.LIMIT}
    assert len(judged) > 45
    assert off <= KNOWN_OFF
    assert np.median([abs(row["ratio"] - 1) for row in judged]) < 0.05
