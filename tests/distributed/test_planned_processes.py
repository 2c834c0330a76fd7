"""Plans beside engines that really start."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config

from twofold import LLM, runtime
from twofold.cli.main import main
from twofold.models.sizes import model_shape
from twofold.planning.room import Wish, choose


def test_tokens_that_fit_are_those_of_an_engine(tmp_path: Path) -> None:
    """Of a real start: the shares that ranks make of so much memory."""
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    memory = 1 << 20
    wish = Wish(128, kv_cache="sharded", block_size=16, kv_cache_memory_bytes=memory, max_num_batched_tokens=256)
    shape = model_shape(config, torch.float32)
    planned = choose(shape, 10 << 30, 2, wish)
    with LLM(
        str(tmp_path), load_format="dummy", skip_tokenizer_init=True, prefill_context_parallel_size=2, device="cpu",
        max_model_len=128, max_num_batched_tokens=256, kv_cache="sharded", kv_cache_memory_bytes=memory,
        dtype="float32",
    ) as llm:  # fmt: skip
        held, report = llm.engine.kv_cache_capacity, llm.engine.reports[0]
    assert report.weight_bytes == shape.whole
    assert 0 <= held - planned.num_tokens <= 6 * 16  # of a share, some blocks are kept back for what is rounded
    assert planned.fits


def test_ranks_keep_whole_weights_where_parts_turn_out_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What only a rank can tell: weights="auto" starts once more, and says why."""
    tiny_config("gpt2").save_pretrained(tmp_path)
    monkeypatch.setattr(
        runtime, "_weights", lambda config, *rest: "sharded" if config.weights == "auto" else "replicated"
    )
    with (
        caplog.at_level("INFO", "twofold"),
        LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, prefill_context_parallel_size=2) as llm,
    ):
        assert llm.engine.runtime.weights == "replicated"
    assert "weights cannot be sharded: no projection of it is known to divide" in caplog.text
    (line,) = [record.getMessage() for record in caplog.records if "tokens fit" in record.getMessage()]
    assert line.startswith("each of 2 ranks keeps all weights (")
    assert "requests of max_model_len=256; 100,000 more take" in line


def test_a_plan_compares_itself_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    arguments = ["--gpus", "2", "--max-model-len", "128", "--batches", "1", "--context", "16", "--lens", "64"]
    assert main(["plan", str(tmp_path), *arguments, "--kv-cache-memory-bytes", "1M", "--measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = found["measured"]
    assert measured["weight bytes"] == found["bytes of each rank"]["weights"]
    assert measured["tokens that fit"] == found["tokens that fit"]
    assert measured["time to first token"][0]["ms"] > 0
    assert "measured here" in found["sources"]["times"]
