"""Nothing is imported from the working directory: it may hold a model that somebody has downloaded, with its code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_config, tiny_model

NAMES = ("transformers", "numpy", "logging", "random", "torch", "worker", "sitecustomize")
PROGRAM = """
import sys
from twofold import LLM, SamplingParams
with LLM(sys.argv[1], skip_tokenizer_init=True, prefill_context_parallel_size=2) as llm:
    [output] = llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=2, ignore_eos=True))
    print(len(output.outputs[0].token_ids))
"""
COMMAND = ("--prompt-token-ids", "5,6,7", "--max-tokens", "2", "--ignore-eos", "--skip-tokenizer-init", "--json")


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with modules that leave a file when they are imported."""
    folder = tmp_path_factory.mktemp("trap")
    tiny_model(tiny_config("llama")).save_pretrained(folder)
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(folder / f'{name}.was-run')!r}, 'w')\n")
    return folder


def test_ranks_import_nothing_from_the_working_directory(trap: Path, tmp_path: Path) -> None:
    """Ranks were started with `python -m`, which searches the working directory first: in a folder with a numpy.py, a
    transformers.py, a logging.py or a random.py, 4 of 4 ran, although trust_remote_code was off. "" and "."
    in the engine's own path mean the working directory, too, and a colon would make two such entries.
    """
    path = [entry for entry in sys.path if entry] + ["", ".", ":"]
    (tmp_path / "program.py").write_text(f"import sys\nsys.path[:] = {path}\n{PROGRAM}")
    assert _run([str(tmp_path / "program.py"), str(trap)], trap) == "2\n"


def test_the_command_imports_nothing_from_the_working_directory(trap: Path) -> None:
    """`python -m twofold.cli.main` took numpy.py from the folder that it was started in, as its ranks did."""
    out = _run(["-m", "twofold.cli.main", "generate", "--model", ".", "-pcp", "2", *COMMAND], trap)
    assert '"token_ids": [' in out


def _run(arguments: list[str], folder: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not [path.name for path in folder.glob("*.was-run")]
    return done.stdout
