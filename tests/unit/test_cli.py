"""The command line without a process: what is refused, with which words and exit code, before a model is loaded."""

import json
import math
import re
from argparse import SUPPRESS, ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import ThreadExecutor, make_engine
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model

import twofold
from twofold import ConfigError, RankDiedError, SamplingParams
from twofold.cli import generate
from twofold.cli.main import main, make_parser
from twofold.config import EngineConfig
from twofold.contract import Step
from twofold.engine import engine as engine_module
from twofold.flags import ENGINE_HELP, add_engine_arguments, chosen
from twofold.server.config import ServerConfig

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line → exit code, stdout, stderr."""

    def command(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        return code, *capsys.readouterr()

    return command


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, f"twofold {twofold.__version__}\n", "")


def test_help_tells_of_every_command_and_of_exit_codes(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(word in out for word in ("generate", "explain", "models", "exit codes", "130"))
    for command in ("generate", "explain", "models"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "exit codes" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["answer"], "invalid choice: 'answer'"),
        (["serv", "demo"], "invalid choice: 'serv'"),
        (["serv", "demo"], "; did you mean serve in place of serv? (see twofold --help)"),
        (["bench", "tfft"], "; did you mean ttft in place of tfft? (see twofold bench --help)"),
        (
            ["generate", "--modle=demo", "--prompt", "Hi"],
            "required: --model; did you mean --model in place of --modle?",
        ),
        (["serve", "demo", "--max-waiting-request", "3"], "did you mean --max-waiting-requests in place of"),
        (["serve", "demo", "-pp", "2"], "pipeline_parallel_size=2 is not supported"),
        (["chat", "--jsn"], "unrecognized arguments: --jsn (see twofold chat --help)"),
        (["serve", "demo", "--max-model-len", "128x"], "such as 8192, 8k (8,000) or 8K (8,192), got '128x'"),
        (["serve", "demo", "--max-model-len", "1.0001k"], "must be an integer"),
        (["generate", "--prompt", "Hi"], "--model"),
        (["generate", "--model", "demo"], "no prompt; give --prompt"),
        (["generate", "--model", "demo", "--prompt"], "--prompt: expected one argument"),
        (["generate", "--model", "", "--prompt", "Hi"], "model must be a directory"),
        (["generate", "--model", "demo", "--prompt", "Hi", "--unknown"], "unrecognized arguments: --unknown"),
        (["generate", "--model", "demo", "--prompt", "Hi", "--max-tok", "3"], "unrecognized arguments: --max-tok"),
        (
            ["generate", "--model", "demo", "--prompt", "Hi", "-pcp", "two"],
            "must be an integer, such as 8192, 8k (8,000) or 8K (8,192), got 'two'",
        ),
        (
            ["generate", "--model", "demo", "--prompt", "Hi", "-pcp", "0"],
            "prefill_context_parallel_size must be an integer of at least 1, got 0",
        ),
        (
            ["generate", "--model", "demo", "--prompt", "Hi", "--dtype", "int8"],
            "dtype must be one of auto, float32, bfloat16, float16, got 'int8'",
        ),
        (["generate", "--model", "demo", "--prompt", "Hi", "--gpu-memory-utilization", "1.5"], "at most 1, got 1.5"),
        (["generate", "--model", "demo", "--prompt", "Hi", "--partition-policy", "x"], "dual_chunk_swap"),
        (
            ["generate", "--model", "demo", "--prompt", "Hi", "--temperature", "nan"],
            "temperature must be a finite number at least 0 and at most 1e+06, got nan",
        ),
        (["generate", "--model", "demo", "--prompt", "Hi", "--temperature", "-1"], "got -1.0"),
        (["generate", "--model", "demo", "--prompt", "Hi", "--top-p", "0"], "top_p must be"),
        (["generate", "--model", "demo", "--prompt", "Hi", "--max-tokens", "0"], "max_tokens must be"),
        (["generate", "--model", "demo", "--prompt", "Hi", "--min-tokens", "999"], "at most max_tokens, which is 256"),
        (["models", "no_such_type"], "'no_such_type' is neither a model type"),
        (["models", "/no/such/folder"], "there is no directory or file '/no/such/folder'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    code, out, error = run(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_model_that_cannot_be_served_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty, untrained, mute, recurrent = (tmp_path / name for name in ("empty", "untrained", "mute", "recurrent"))
    empty.mkdir()
    for folder in (untrained, mute):
        tiny_config("llama").save_pretrained(folder)
    (mute / "model.safetensors").touch()  # never read: the tokenizer is missed first
    tiny_config("mamba").save_pretrained(recurrent)
    dummy = ("--load-format", "dummy", "--skip-tokenizer-init")
    for model, flags, message in (
        ("no/such-model", (), "cannot read the configuration of model 'no/such-model'"),
        (tmp_path / "none", (), f"there is no directory or file '{tmp_path / 'none'}'"),
        (empty, (), "has no config.json"),
        (untrained, (), "has no *.safetensors"),
        (mute, (), f"cannot load a tokenizer from '{mute}'"),
        (recurrent, dummy, "(mamba) is not served: it is recurrent"),
        (mute, (*dummy, "-pcp", "999"), "prefill_context_parallel_size must be at most "),
        (mute, (*dummy, "--max-model-len", "257"), "max_model_len must be at most the model's 256 positions"),
    ):
        code, out, error = run("generate", "--model", str(model), "--prompt", "Hi", "-q", *flags)
        assert (code, out) == (2, "")
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


def test_prompts_that_cannot_be_read_are_refused_each_by_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    files = [str(tmp_path / "latin"), str(tmp_path / "none"), str(tmp_path)]
    flags = [flag for file in files for flag in ("--prompt-file", file)]
    flags += ["--prompt-token-ids", "1,b", "--prompt", "\udcff"]
    code, out, error = run("generate", "--model", "demo", *flags, "--json")
    assert code == 1
    assert error.splitlines() == [
        f"error: prompt 1 ({files[0]}): it is not UTF-8: byte 0xe9 at offset 0",
        f"error: prompt 2 ({files[1]}): it cannot be read: No such file or directory",
        f"error: prompt 3 ({files[2]}): it cannot be read: Is a directory",
        "error: prompt 4: token ids must be integers with commas between them, got '1,b'",
        "error: prompt 5: it is not UTF-8: byte 0xff at offset 0",
    ]
    assert [list(json.loads(line)) for line in out.splitlines()] == [["error"]] * 5


def test_every_engine_argument_is_a_flag() -> None:
    assert set(ENGINE_HELP) == {field.name for field in fields(EngineConfig)}
    parser = ArgumentParser()
    add_engine_arguments(parser)
    assert chosen(parser.parse_args(["--model", "m"]), EngineConfig) == {"model": "m"}
    given = parser.parse_args(
        ["--model", "m", "-pcp", "2", "--no-enable-prefix-caching", "--enforce-eager", "--gpu-memory-utilization", ".5"]
    )
    assert chosen(given, EngineConfig) == {
        "model": "m",
        "prefill_context_parallel_size": 2,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.5,
    }


def test_sizes_have_units_as_in_vllm() -> None:
    parser = ArgumentParser()
    add_engine_arguments(parser)
    given = parser.parse_args(
        [*("--kv-cache-memory-bytes", "8G", "--max-model-len", "128k", "--max-num-batched-tokens", "1.5K"),
         *("--model", "m", "--max-num-seqs", "1_000", "--seed", "12", "--dtype", "bf16")]
    )  # fmt: skip
    assert chosen(given, EngineConfig) == {
        "model": "m",
        "kv_cache_memory_bytes": 8 << 30,
        "max_model_len": 128_000,
        "max_num_batched_tokens": 1536,
        "max_num_seqs": 1000,
        "seed": 12,
        "dtype": "bfloat16",
    }


def _commands(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    """A command and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for command in action.choices.values():
                yield from _commands(command)


def test_help_tells_one_default_of_a_flag() -> None:
    """`generate --help` once said of the temperature: (default: 0) (default: 1.0)."""
    told: dict[tuple[str, str], str] = {}
    for command in _commands(make_parser()):
        for action in command._actions:
            text = command._get_formatter()._expand_help(action) if action.help else ""
            assert text.count("(default") <= 1, (command.prog, action.dest, text)
            if match := re.search(r"\(default: (.*)\)$", text):
                told[command.prog, action.dest] = match[1]
            if action.default not in (None, SUPPRESS, False, [], math.inf) and action.type is not None:
                assert match is not None, (command.prog, action.dest, text)
                assert str(action.default).removesuffix(".0") == match[1].removesuffix(".0")
    assert told["twofold generate", "temperature"] == "0"
    assert told["twofold generate", "max_tokens"] == "256"
    assert told["twofold generate", "enable_prefix_caching"] == "on"
    assert told["twofold serve", "max_body_bytes"] == "33554432"
    # Benchmarks choose these by the lengths of their prompts.
    assert told["twofold bench latency", "max_num_seqs"] == "the batch size"
    assert told["twofold bench ttft", "max_model_len"] == "the longest prompt + 1"


def test_benchmarks_have_no_flag_that_they_would_overrule() -> None:
    """`bench ttft --enable-prefix-caching` was taken, and did nothing."""
    for command in _commands(make_parser()):
        if command.prog in ("twofold bench ttft", "twofold bench latency"):
            flags = command.format_usage()
            assert "--max-num-seqs" in flags
            assert not any(flag in flags for flag in ("prefix-caching", "--tokenizer", "--skip-tokenizer-init"))


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (partial(EngineConfig, model="m"), "prefill_context_parallel_size", 0),
        (partial(EngineConfig, model="m"), "dtype", "int8"),
        (partial(EngineConfig, model="m"), "gpu_memory_utilization", 1.5),
        (partial(EngineConfig, model="m"), "seed", -1),
        (ServerConfig, "port", 70_000),
        (ServerConfig, "max_waiting_tokens", 0),
        (ServerConfig, "drain_timeout", -1.0),
        (ServerConfig, "api_key", [""]),
    ],
)
def test_a_configuration_error_names_its_field(make: Callable[..., Any], name: str, value: Any) -> None:
    """Guards callers, who need not read the message to know which argument to change."""
    with pytest.raises(ConfigError, match=name) as refusal:
        make(**{name: value})
    assert refusal.value.field == name


def test_every_sampling_flag_is_a_parameter() -> None:
    assert set(generate.SAMPLING_HELP) <= {field.name for field in fields(SamplingParams)}


@pytest.fixture
def tiny_engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`twofold generate` answers with a tiny model on two threads, whatever --model says; it has no tokenizer."""
    engine = make_engine(tiny_model(tiny_config("llama")), 2)

    @contextmanager
    def load(config: EngineConfig, quiet: bool) -> Any:
        yield SimpleNamespace(engine=engine)

    monkeypatch.setattr(generate, "_load", load)
    yield engine
    engine.shutdown()


def test_answers_are_printed_in_the_order_of_prompts(run: Run, tiny_engine: Any) -> None:
    prompts = [flag for ids in ("5,6,7,8,9", "999", "5") for flag in ("--prompt-token-ids", ids)] + ["--prompt", "Hi"]
    code, out, error = run("generate", "--model", "tiny", *prompts, "--json", "-q", "--max-tokens", "4")
    assert code == 1
    assert error.splitlines() == [
        f"error: prompt 2: token id 999 is out of range; the model has ids 0 to {VOCAB_SIZE - 1}",
        "error: prompt 4: the prompt is text, but skip_tokenizer_init is set; give prompt_token_ids",
    ]
    first, second, third, fourth = map(json.loads, out.splitlines())
    assert list(first) == ["prompt_token_ids", "token_ids", "text", "finish_reason", "metrics"]
    assert first["prompt_token_ids"] == [5, 6, 7, 8, 9]
    assert len(first["token_ids"]) == 4
    assert first["finish_reason"] == "length"
    assert first["metrics"].keys() == {"ttft", "e2e", "num_prompt_tokens", "num_cached_tokens"}
    assert 0 < first["metrics"]["ttft"] <= first["metrics"]["e2e"]
    assert third["prompt_token_ids"] == [5]
    assert list(second) == list(fourth) == ["error"]


def test_progress_is_on_stderr(run: Run, tiny_engine: Any) -> None:
    code, out, error = run("generate", "--model", "tiny", "--prompt-token-ids", "5,6,7", "--max-tokens", "2")
    assert (code, out) == (0, "\n")  # no tokenizer: the answer has no text
    assert "3/3" in error
    assert "answers 1/1, 2 tokens" in error
    assert "prompt 1: 3 tokens (0 cached), first token after " in error


def test_an_engine_that_fails_is_one_line_and_exit_code_1(
    run: Run, tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: object) -> None:
        raise RankDiedError("rank 1 was killed by signal 9")

    monkeypatch.setattr(tiny_engine.executor, "collect", die)
    monkeypatch.setattr(tiny_engine, "_make_executor", die)
    monkeypatch.setattr(engine_module, "RESTART_DELAYS", (0.0, 0.0))
    code, out, error = run("generate", "--model", "tiny", "--prompt-token-ids", "5,6,7", "-q")
    assert (code, out, error) == (1, "", "error: the ranks did not start in 2 tries\n")


class LosingExecutor(ThreadExecutor):
    """Loses its ranks with each step that has the first prompt."""

    def submit(self, step: Step) -> None:
        if 5 in [new.token_ids[0] for new in step.new]:
            raise RankDiedError("rank 1 was killed by signal 9")
        super().submit(step)


def test_a_prompt_that_is_given_up_is_a_line_and_exit_code_1(run: Run, tiny_engine: Any) -> None:
    model, num_blocks = tiny_model(tiny_config("llama")), tiny_engine.block_pool.num_blocks
    tiny_engine._make_executor = lambda start_timeout: LosingExecutor(model, tiny_engine.runtime, num_blocks)
    tiny_engine.recover()
    prompts = ("--prompt-token-ids", "5,6,7", "--prompt-token-ids", "8,9")
    code, out, error = run("generate", "--model", "tiny", *prompts, "--json", "-q", "--max-tokens", "2")
    first, second = map(json.loads, out.splitlines())
    assert code == 1
    assert list(first) == ["error"]
    assert len(second["token_ids"]) == 2
    assert "error: prompt 1: this request made the engine fail again and again and was given up" in error


def test_an_interrupt_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_load", interrupt)
    assert run("generate", "--model", "demo", "--prompt", "Hi") == (130, "", "interrupted\n")


def test_models_lists_what_is_served_and_why_not_the_others(run: Run) -> None:
    code, out, _ = run("models", "--json")
    assert code == 0
    verdicts = {line["model_type"]: line for line in map(json.loads, out.splitlines())}
    assert len(verdicts) > 150
    served = (
        *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt_oss"),
        *("starcoder2", "gpt_neox", "gpt2", "olmo2", "granite", "cohere", "smollm3", "glm4", "stablelm"),
    )
    for model_type in served:
        by_tokens = "no projection of it is known to divide" if model_type == "gpt2" else None
        assert verdicts[model_type] == {
            "model_type": model_type, "served": True, "reason": None, "only_by_tokens": by_tokens,
        }  # fmt: skip
    for model_type, reason in {
        "mamba": "recurrent",
        "bert": "encoder",
        "bart": "encoder-decoder",
        "gemma3": "multimodal",
        "bloom": "attention interface",
        "llama4_text": "chunked_attention",
    }.items():
        assert verdicts[model_type]["served"] is False
        assert reason in verdicts[model_type]["reason"]
    assert all((verdict["reason"] is None) == (verdict["served"] is True) for verdict in verdicts.values())


def test_models_tells_of_one(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("models", "llama")
    assert code == 0
    assert out.startswith("served  llama\n")
    assert "checked once more when a model of it is loaded" in out
    assert run("models", "mamba")[0] == 1

    tiny_config("qwen3").save_pretrained(tmp_path)  # a directory without weights is enough
    code, out, _ = run("models", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (
        0,
        {"model_type": "qwen3", "served": True, "reason": None, "only_by_tokens": None},
    )
