"""What a benchmark reports with a figure: the command that repeats it, the machine, and no more than it knows."""

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from twofold.bench.draw import draw_ttft
from twofold.bench.report import environment, machine, print_table
from twofold.bench.ttft import HEADER, _cells


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


PARTS = {"busy": 9.0, "projections": 4.0, "attention": 3.0, "rest": 2.0, "exchange": 1.0, "exposed_exchange": 0.5}


def _row(prompt_len: int, pcp: int, profiled: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt_len": prompt_len, "pcp": pcp, "median_ms": 80.0 / pcp, "min_ms": 70.0 / pcp}
    return row | ({"breakdown_ms": PARTS} if profiled else {})


@pytest.mark.parametrize(
    ("sizes", "profiled", "columns", "panels"),
    [
        ([1], False, "prompt ranks median ms min ms", ["Time to first token"]),
        ([1, 2], False, "prompt ranks median ms min ms speed-up", ["Time to first token", "Speed-up"]),
        ([2, 4], False, "prompt ranks median ms min ms", ["Time to first token"]),
        (
            *([1, 2], True, "prompt ranks median ms min ms speed-up busy projections attention exchange exposed"),
            ["Time to first token", "Speed-up", "Where the time goes"],
        ),
    ],
)
def test_a_report_has_no_empty_column_and_no_empty_panel(
    sizes: list[int],
    profiled: bool,
    columns: str,
    panels: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU nothing is profiled: five columns and a panel were empty. The picture did not say what was measured."""
    rows = [_row(length, size, profiled) for size in sizes for length in (100, 1000)]
    print_table(HEADER, [_cells(row, rows) for row in rows])
    assert " ".join(capsys.readouterr().out.splitlines()[0].split()) == columns
    drawn: list[matplotlib.figure.Figure] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    draw_ttft(rows, f"demo, float32, on {machine()}", tmp_path / "picture.png")
    assert [axes.get_title() for axes in drawn[0].axes] == panels
    assert all(axes.has_data() for axes in drawn[0].axes)
    assert drawn[0].get_suptitle().startswith("demo, float32, on ")
    assert "cores of" in machine() or " x " in machine()
