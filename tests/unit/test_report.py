"""What a benchmark reports with a figure: the command that repeats it."""

import pytest

from twofold.bench.report import environment


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/venv/bin/twofold", "bench", "ttft", "--lens", "8,16"], "twofold bench ttft --lens 8,16"),
        (["/site/twofold/cli/main.py", "bench", "latency"], "twofold bench latency"),
        (["benchmarks/exactness.py", "--engine", "--seed 1"], "python benchmarks/exactness.py --engine '--seed 1'"),
    ],
)
def test_the_command_can_be_run_again(argv: list[str], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's figures once came with `twofold` and the script's flags."""
    monkeypatch.setattr("sys.argv", argv)
    assert environment()["command"] == command
