"""`twofold explain`: the drawing is what `partition` says, for any lengths."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from twofold.cli.explain import cell_widths, colour, draw, runs_of
from twofold.cli.main import main
from twofold.contract import ScheduledBatch
from twofold.parallel.plan import TokenLayout, plan_step

GOLDEN = """\
one step: 14 tokens of 3 requests on 2 ranks, dual_chunk_swap

           0                              8  tokens
request 0  ├──0───┤├──1───┤├──1───┤├──0───┤  8, rank 0 samples
request 1  ├──0───┤├1─┤├1─┤├0─┤              5, rank 0 samples
request 2  ····························├0─┤  1 after 7, rank 0 samples
           · is in the cache

rank  rows  tokens  attended pairs  share
   0     5       8              34  57.6%  ████████████████
   1     4       6              25  42.4%  ████████████

busiest rank over the mean: tokens +14.3%, attended pairs +15.3%

rank 0 computes 0[0..1] 0[6..7] 1[0..1] 1[4] 2[7]
rank 1 computes 0[2..3] 0[4..5] 1[2] 1[3]
"""


def drawn(lens: list[int], computed: list[int], num_ranks: int, policy: str, width: int = 80) -> str:
    batch = ScheduledBatch.of(computed, lens)
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, color_system=None)
    draw(batch, plan_step(batch, TokenLayout(num_ranks, policy)), policy, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_example_of_the_readme() -> None:
    assert drawn([8, 5, 1], [0, 0, 7], 2, "dual_chunk_swap") == GOLDEN


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    png = tmp_path / "picture.png"
    assert main(["explain", "--lens", "8,5,1", "--computed", "0,0,7", "-pcp", "2", "--png", str(png)]) == 0
    assert capsys.readouterr().out == GOLDEN
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lens", "8,0"], "--lens must be integers from 1 to 1,000,000,000 with commas between them, got 0"),
        (["--lens", "8,x"], "--lens must be integers from 1 to 1,000,000,000 with commas between them, got '8,x'"),
        (["--lens", "2000000000"], "got 2000000000"),
        (["--lens", "8", "--computed", "-1"], "--computed must be integers from 0"),
        (["--lens", "8,5", "--computed", "1"], "--computed must have a number for each of the 2 requests, got 1"),
        (["--lens", "8", "-pcp", "0"], "prefill_context_parallel_size must be from 1 to 1024, got 0"),
        (["--lens", "8", "--policy", "none"], "must be one of dual_chunk_swap, contiguous, got 'none'"),
        (["--lens", "8", "--png", "no/such/folder/x.png"], "cannot write --png 'no/such/folder/x.png'"),
        (["--lens", "8", "--png", "picture.what"], "cannot write --png 'picture.what'"),
        ([], "--lens"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["explain", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 300_000), st.integers(0, 300_000)), min_size=1, max_size=6),
    num_ranks=st.integers(1, 40),
    policy=st.sampled_from(["dual_chunk_swap", "contiguous"]),
    width=st.integers(40, 200),
)
def test_whatever_is_drawn_is_true(requests: list[tuple[int, int]], num_ranks: int, policy: str, width: int) -> None:
    lens, computed = [list(column) for column in zip(*requests, strict=True)]
    batch = ScheduledBatch.of(computed, lens)
    part = plan_step(batch, TokenLayout(num_ranks, policy))
    tokens = np.zeros(num_ranks, int)
    for request, (length, start) in zip(runs_of(batch, part), requests, strict=True):
        end = 0
        for run in request:  # each token once, in order
            assert run.start == end
            end += run.length
            if run.rank is None:
                assert run.length == start
            else:
                tokens[run.rank] += run.length
        assert end == start + length
    assert tokens.tolist() == part.num_tokens.tolist()

    text = drawn(lens, computed, num_ranks, policy, width)
    bars = [line[len("request 0  ") :] for line in text.splitlines() if line.startswith("request ")]
    assert len(bars) == len(requests)
    if num_ranks <= 9:  # room for every run, labels of one character: ranks in the order of their tokens
        for bar, request in zip(bars, runs_of(batch, part), strict=True):
            labels = [char for char in bar.split("  ")[0] if char.isdigit()]
            expected = [str(run.rank) for run in request if run.rank is not None]
            assert labels == expected
    for values in (part.num_tokens, part.num_pairs):
        assert all(f" {value:,} " in text for value in values.tolist())


@given(
    lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=60),
    cells_per_token=st.floats(1e-6, 4),
    spare=st.integers(0, 10),
)
def test_every_run_has_a_cell_where_there_are_enough(lengths: list[int], cells_per_token: float, spare: int) -> None:
    width = round(sum(lengths) * cells_per_token) + spare
    widths = cell_widths(lengths, cells_per_token, width)
    assert len(widths) == len(lengths)
    assert min(widths) >= 0
    assert sum(widths) <= width
    if len(lengths) <= width:
        assert min(widths) >= 1


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 9, 64])
def test_ranks_have_colours_of_their_own(num_ranks: int) -> None:
    assert len({colour(rank, num_ranks) for rank in range(num_ranks)}) == num_ranks


def test_a_step_by_heads_is_one_run_of_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--lens", "8,1", "--computed", "0,4", "--step-layout", "heads"]) == 0
    out = capsys.readouterr().out
    assert "9 tokens of 2 requests on 2 ranks, by heads, each rank computes 1/2 of the heads and columns" in out
    assert out.count("all ranks") == 1  # the decode is too short for it
    assert "rank 0 computes 0[0..7] 1[4]" in out
    assert "rank 1 computes 0[0..7] 1[4]" in out
