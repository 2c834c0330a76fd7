"""The real command in a process of its own, its ranks in theirs, with a tiny random model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import psutil
import pytest
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "twofold.cli.main"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers, and a tokenizer with one token for each character."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(tiny_config("llama", eos_token_id=None)).save_pretrained(folder)
    characters = [chr(code) for code in range(32, 32 + VOCAB_SIZE)]
    tokenizer = Tokenizer(models.WordLevel({char: token for token, char in enumerate(characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def twofold(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


def test_good_prompts_are_answered_beside_bad_ones(model: Path, tmp_path: Path) -> None:
    (tmp_path / "good").write_text("What a long prompt, of more than one chunk! " * 4)
    (tmp_path / "binary").write_bytes(b"abc\xff")
    (tmp_path / "long").write_text("x" * 256)
    (tmp_path / "empty").touch()
    names = ("good", "binary", "long", "empty", "good")
    files = [flag for name in names for flag in ("--prompt-file", tmp_path / name)]
    flags = ("-pcp", "2", "--dtype", "float32", "--json", "--max-tokens", "8")
    answer = twofold("generate", "--model", model, *files, *flags)
    assert answer.returncode == 1
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    good, again = lines[0], lines[4]
    assert good.keys() == {"prompt_token_ids", "token_ids", "text", "finish_reason", "metrics"}
    assert "".join(chr(32 + token) for token in good["prompt_token_ids"]) == (tmp_path / "good").read_text()
    assert len(good["token_ids"]) == 8
    assert good["finish_reason"] == "length"
    assert good["metrics"]["num_prompt_tokens"] == len(good["prompt_token_ids"]) == 176
    assert good["metrics"]["e2e"] >= good["metrics"]["ttft"] > 0
    assert again["token_ids"] == good["token_ids"]
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert [line["error"] for line in lines[1:4]] == [error.partition("): ")[2] for error in errors]
    assert errors[0] == f"error: prompt 2 ({tmp_path / 'binary'}): it is not UTF-8: byte 0xff at offset 3"
    assert errors[1].startswith(f"error: prompt 3 ({tmp_path / 'long'}): the prompt has 256 tokens, more than the 255 ")
    assert errors[2].startswith(f"error: prompt 4 ({tmp_path / 'empty'}): the prompt is empty (0 tokens)")
    assert "ready on 2 ranks" in answer.stderr
    assert "352/352" in answer.stderr  # prompt tokens computed
    assert "Traceback" not in answer.stderr


def test_broken_weights_are_one_line(model: Path, tmp_path: Path) -> None:
    broken = copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    answer = twofold("generate", "--model", broken, "--prompt", "Hi", "-pcp", "2", "-q")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith(f"error: model '{broken}' has a broken or incomplete model.safetensors")
    assert answer.stderr.count("\n") == 1


def test_explain_does_without_pytorch() -> None:
    code = (
        "import sys; from twofold.cli.main import main; code = main(['explain', '--lens', '8,5,1']); "
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys(); sys.exit(code)"
    )
    ascii_only = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    answer = subprocess.run([sys.executable, "-c", code], env=ascii_only, capture_output=True, timeout=60, check=False)
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert "├──0───┤├──1───┤" in answer.stdout.decode()


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """In the background of a shell script Ctrl-C is ignored, by all that is started from there, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("when", ["loading", "answering"])
def test_an_interrupt_leaves_no_process(model: Path, when: str) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "--model", str(model), "--prompt", "Hi", "-pcp", "2", "--max-tokens", "250"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    engine, ranks = psutil.Process(process.pid), list[psutil.Process]()
    while len(ranks) < 2:
        assert process.poll() is None
        ranks = engine.children(recursive=True)
        time.sleep(0.02)
    if when == "answering":
        assert "is ready on 2 ranks" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the ranks, too
    out, error = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT), error  # a shell says 130 to both
    assert out == ""
    assert error.splitlines()[-1] == "interrupted"
    assert "Traceback" not in error
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


def test_explain_measures_what_a_model_exchanges(model: Path) -> None:
    """4 layers × 2 heads × (16 + 16) numbers × 4 bytes; the rank with 3 tokens of 5 pads the other to 3."""
    answer = twofold("explain", "--lens", "5", "-pcp", "2", "--model", model)
    assert answer.returncode == 0
    said = f"a token of {model}: 1,024 bytes stored on every rank, 1,229 sent to each other rank (padding included)"
    assert answer.stdout.splitlines()[-1] == said
