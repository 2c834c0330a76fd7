"""`twofold bench serve` against a running server: vLLM's JSON fields, and figures that are those of the prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import Server

from twofold import LLM
from twofold.bench.load import Outcome
from twofold.bench.result import summarise
from twofold.cli.main import main

QUESTION, ANSWER = "The quick brown fox jumps over the lazy dog.", "A rank is lost, the others wait for it."
CONVERSATIONS = [
    *([("human", f"{QUESTION} {i}"), ("gpt", ANSWER * (i + 1)), ("human", "And then?")] for i in range(3)),
    [("human", QUESTION)],  # no answer
    [],
    [("human", "Hi"), ("gpt", ANSWER)],  # too short, and too long
    [("human", QUESTION), ("gpt", "No")],
    [("human", QUESTION * 100), ("gpt", ANSWER)],
    [("human", QUESTION), ("gpt", ANSWER * 200)],
]
FIELDS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "total_cached_tokens", "prefix_cache_hit_rate", "turns", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "max_concurrent_requests",
    *(f"{how}_{of}_ms" for how in ("mean", "median", "std", "p50", "p99") for of in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip


def bench(server: Server, model: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """Runs it; the JSON that it wrote."""
    arguments = ["--base-url", server.url, "--tokenizer", str(model), "--disable-tqdm", "--ignore-eos"]
    arguments += ["--metric-percentiles", "50,99", "--save-result", "--result-dir", str(folder)]
    assert main(["bench", "serve", *arguments, "--result-filename", "result.json", *flags]) == 0
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert result.keys() == FIELDS
    assert result["failed"] == 0
    assert 0 < result["mean_ttft_ms"] <= result["mean_e2el_ms"] <= result["p99_e2el_ms"]
    return result


def test_sharegpt(server: Server, tiny_model: Path, llm: LLM, tmp_path: Path) -> None:
    """Guards what is chosen of the data set, and lengths of answers as the data set has them."""
    path = tmp_path / "sharegpt.json"
    conversations = [[{"from": who, "value": what} for who, what in one] for one in CONVERSATIONS]
    path.write_text(json.dumps([{"id": str(i), "conversations": one} for i, one in enumerate(conversations)]))
    flags = ("--dataset-name", "sharegpt", "--dataset-path", str(path), "--num-prompts", "7", "--request-rate", "50")
    count = llm.engine.tokenizer.encode
    lengths = [(len(count(f"{QUESTION} {i}")), len(count(ANSWER * (i + 1)))) for i in range(3)]
    result = bench(server, tiny_model, tmp_path, *flags)
    assert result["completed"] == 7
    assert result["request_rate"] == 50
    twice_each = [2 * sum(one) for one in zip(*lengths, strict=True)]  # and the first of them once more
    more = (result["total_input_tokens"] - twice_each[0], result["total_output_tokens"] - twice_each[1])
    assert more in lengths
    fixed = bench(server, tiny_model, tmp_path, *flags, "--sharegpt-output-len", "5")
    assert fixed["total_output_tokens"] == 35


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_custom(server: Server, tiny_model: Path, tmp_path: Path, backend: str) -> None:
    """Guards prompts in JSON lines, bounded concurrency, and both endpoints."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{QUESTION} \u2028 {i}"}, ensure_ascii=False) + "\n" for i in range(9))
    )
    flags = ("--backend", backend, "--dataset-name", "custom", "--dataset-path", str(path), "--num-prompts", "9")
    result = bench(server, tiny_model, tmp_path, *flags, "--custom-output-len", "8", "--max-concurrency", "2")
    assert (result["completed"], result["total_output_tokens"], result["backend"]) == (9, 72, backend)
    assert result["max_concurrent_requests"] <= 2


def test_random(server: Server, tiny_model: Path, tmp_path: Path) -> None:
    """Guards lengths of random prompts, and goodput."""
    lengths = (
        "--num-prompts",
        "6",
        "--random-input-len",
        "40",
        "--random-output-len",
        "5",
        "--random-prefix-len",
        "10",
    )
    result = bench(server, tiny_model, tmp_path, *lengths, "--goodput", "ttft:60000", "e2el:0.001")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (300, 30)
    assert result["request_goodput"] == 0


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_conversations(
    server: Server, tiny_model: Path, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards turns that append to what was said, so that only new text is computed, and prefixes that are shared."""
    lengths = ("--shared-prefix-len", "128", "--prefix-len", "32", "--turn-len", "24", "--output-len", "12")
    flags = ("--backend", backend, "--dataset-name", "conversations", "--num-conversations", "3", "--num-turns", "3")
    seed = str(len(backend))  # other words than in the other case, so none is cached
    result = bench(server, tiny_model, tmp_path, *flags, *lengths, "--think-time", "0.01", "--seed", seed)
    assert (result["completed"], result["num_prompts"], result["total_output_tokens"]) == (9, 9, 108)
    first, second, third = result["turns"]
    assert [turn["completed"] for turn in result["turns"]] == [3, 3, 3]
    # The system prompt is computed once. From then on all is cached but the newest text, as far as blocks go.
    assert 0.3 < first["prefix_cache_hit_rate"] < 0.7
    assert second["prefix_cache_hit_rate"] > 0.6
    assert third["prefix_cache_hit_rate"] > 0.6
    assert 184 <= first["mean_input_tokens"] < second["mean_input_tokens"] - 24 < third["mean_input_tokens"] - 48
    assert result["prefix_cache_hit_rate"] == result["total_cached_tokens"] / result["total_input_tokens"]
    told = capsys.readouterr().out
    assert "Prefix cache hit rate (%)" in told
    assert "Time to First Token by Turn" in told


def test_a_server_that_does_not_tell_of_cached_tokens() -> None:
    """Other servers count no cached tokens; nothing is no rate of 0."""
    outcomes = [Outcome(10, success=True, ttft=0.1, latency=0.2, num_tokens=2)]
    assert summarise(outcomes, 1.0, [99], {})["prefix_cache_hit_rate"] is None
    outcomes.append(Outcome(30, turn=2, cached_len=15, success=True, ttft=0.1, latency=0.2, num_tokens=2))
    assert summarise(outcomes, 1.0, [99], {})["prefix_cache_hit_rate"] == 0.5


@pytest.mark.parametrize("content", ["", "[]", '[{"conversation": []}]', '{"a": 1}', "[3]"])
def test_a_file_without_prompts(
    server: Server, tmp_path: Path, tiny_model: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards a line that names the file, and exit code 2."""
    path = tmp_path / "broken.json"
    path.write_text(content)
    flags = ["--base-url", server.url, "--tokenizer", str(tiny_model), "--dataset-name", "sharegpt"]
    assert main(["bench", "serve", *flags, "--dataset-path", str(path)]) == 2
    assert capsys.readouterr().err.count("broken.json") == 1
