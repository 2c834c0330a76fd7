"""draw which rank computes which tokens of a step

The drawing shows the partition that ranks compute from the step. Nothing is run without --model. Each request has
--lens tokens to compute, after --computed tokens that are in the cache. A token attends to itself and all tokens before
it. The cost of attention is the number of attended pairs; the cost of everything else is the number of tokens.
"""

import colorsys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from twofold import ConfigError
from twofold.contract import ScheduledBatch
from twofold.parallel.plan import POLICIES, HeadLayout, StepPlan, TokenLayout, plan_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

LAYOUTS = ("tokens", "heads")
MAX_TOKENS, MAX_RANKS = 10**9, 1024
ALL_RANKS = -1  # in place of a rank, where all compute the same tokens
CELLS_PER_TOKEN = 4  # at most
MAX_REQUESTS_DRAWN, MAX_ROWS_LISTED = 40, 6
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#999999")
COMPUTED_COLOUR = "#d9d9d9"


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--lens", required=True, metavar="N,N", help="tokens to compute of each request: 8,5,1")
    parser.add_argument("--computed", metavar="N,N", help="tokens of each request that are in the cache (default: 0)")
    parser.add_argument(
        "-pcp", "--prefill-context-parallel-size", type=int, default=2, metavar="N", help="ranks (default: 2)"
    )
    parser.add_argument(
        "--policy", "--partition-policy", default="dual_chunk_swap", metavar="S", help=f"one of {', '.join(POLICIES)}"
    )
    parser.add_argument(
        "--step-layout", default="tokens", metavar="S", choices=LAYOUTS, help=f"one of {', '.join(LAYOUTS)}"
    )
    parser.add_argument("--png", metavar="FILE", help="also draw a picture to this file")
    parser.add_argument(
        "--model",
        metavar="M",
        help="also run this model with random weights, and print the bytes that ranks store and exchange",
    )


def run(args: Namespace) -> int:
    num_ranks = args.prefill_context_parallel_size
    if not 1 <= num_ranks <= MAX_RANKS:
        raise ConfigError(
            f"prefill_context_parallel_size must be from 1 to {MAX_RANKS}, got {num_ranks}",
            field="prefill_context_parallel_size",
        )
    lens = _numbers("--lens", args.lens, 1)
    computed = [0] * len(lens) if args.computed is None else _numbers("--computed", args.computed, 0)
    if len(computed) != len(lens):
        raise ConfigError(
            f"--computed must have a number for each of the {len(lens)} requests, got {len(computed)}", field="computed"
        )
    batch = ScheduledBatch.of(computed, lens)
    layout = HeadLayout(num_ranks) if args.step_layout == "heads" else TokenLayout(num_ranks, args.policy)
    part = plan_step(batch, layout)
    draw(batch, part, args.policy, Console(highlight=False, soft_wrap=True))
    if args.png is not None:
        try:
            draw_picture(batch, part, args.policy, Path(args.png))
        except (OSError, ValueError) as error:  # matplotlib raises ValueError for an unknown suffix
            raise ConfigError(f"cannot write --png {args.png!r}: {error}", field="png") from None
    if args.model is not None:
        measure(args.model, lens, num_ranks, args.policy)
    return 0


def measure(model: str, lens: Sequence[int], num_ranks: int, policy: str) -> None:
    """Runs prompts of these lengths in one step. Prints the bytes per token that were stored and exchanged."""
    from twofold import LLM, SamplingParams
    from twofold.bench.report import bytes_per_token

    with LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        prefill_context_parallel_size=num_ranks,
        partition_policy=policy,
        max_num_batched_tokens=sum(lens),
        max_num_seqs=len(lens),
        enable_prefix_caching=False,
        enforce_eager=True,
    ) as llm:
        prompts = [{"prompt_token_ids": [0] * length} for length in lens]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        traffic = bytes_per_token(llm.engine)
    print(
        f"\na token of {model}: {traffic['stored']:,.0f} bytes stored on every rank, "
        f"{traffic['exchanged']:,.0f} sent to each other rank (padding included)"
    )


def _numbers(flag: str, text: str, least: int) -> list[int]:
    rule = f"{flag} must be integers from {least} to {MAX_TOKENS:,} with commas between them"
    try:
        numbers = [int(piece) for piece in text.split(",")]
    except ValueError:
        raise ConfigError(f"{rule}, got {text!r}", field=flag.strip("-")) from None
    if wrong := [number for number in numbers if not least <= number <= MAX_TOKENS]:
        raise ConfigError(f"{rule}, got {wrong[0]}", field=flag.strip("-"))
    return numbers


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one request: a row of a rank, or tokens in the cache (rank None)."""

    rank: int | None
    start: int
    length: int


def runs_of(batch: ScheduledBatch, part: StepPlan) -> list[list[Run]]:
    """The runs of each request, in the order of tokens; by heads the same on every rank, so listed once."""
    ranks = np.repeat(np.arange(part.num_ranks), np.diff(part.row_ptr))
    if part.by_heads:
        ranks = np.full(part.row_ptr[1], ALL_RANKS)  # those of the first rank
    runs = [[Run(None, 0, computed)] if computed else [] for computed in batch.num_computed_tokens.tolist()]
    count = len(ranks)
    columns = (part.request_idx[:count], part.start[:count], part.length[:count], ranks)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for request, start, length, rank in sorted(rows):
        runs[request].append(Run(rank, start, length))
    return runs


def draw(batch: ScheduledBatch, part: StepPlan, policy: str, console: Console) -> None:
    """Draws with characters, and with colours if the console has them."""
    num_requests = len(batch)
    console.print(f"one step: {_title(batch, part, policy)}\n")
    names = [f"request {number}" for number in range(min(num_requests, MAX_REQUESTS_DRAWN))]
    margin = max(len(name) for name in names) + 2
    notes = [
        f"  {scheduled:,}" + (f" after {computed:,}" if computed else "") + f", rank {owner} samples"
        for scheduled, computed, owner in zip(
            batch.num_scheduled_tokens.tolist(), batch.num_computed_tokens.tolist(), part.owner.tolist(), strict=True
        )
    ][: len(names)]
    longest = int((batch.num_computed_tokens + batch.num_scheduled_tokens).max())
    width = max(console.width - margin - max(map(len, notes)), 20)
    tokens_per_cell = -(-longest // width)
    scale: float = min(width // longest, CELLS_PER_TOKEN) if tokens_per_cell == 1 else 1 / tokens_per_cell
    runs_drawn = runs_of(batch, part)[: len(names)]
    widths = [cell_widths([run.length for run in runs], scale, width) for runs in runs_drawn]
    crowded = any(0 in cells for cells in widths)
    stretched = any(run.length < tokens_per_cell for runs in runs_drawn for run in runs)
    bar_width = max(map(sum, widths))
    console.print(f"{'0':>{margin + 1}}{longest:>{bar_width - 1},}  tokens", style="dim")
    for name, runs, cells, note in zip(names, runs_drawn, widths, notes, strict=True):
        line = Text(name.ljust(margin))
        for run, num_cells in zip(runs, cells, strict=True):
            line.append_text(_bar(run.rank, num_cells, part.num_ranks, console))
        line.append(" " * (bar_width - sum(cells)) + note, style="dim")
        console.print(line)
    if num_requests > len(names):
        console.print(f"... and {_count(num_requests - len(names), 'request')} more", style="dim")
    if bool(batch.num_computed_tokens.any()):
        console.print(f"{'':{margin}}· is in the cache", style="dim")
    if tokens_per_cell > 1:
        shorter = "; shorter runs are " + ("left out" if crowded else "drawn as one") if stretched else ""
        console.print(f"{'':{margin}}a character is {tokens_per_cell:,} tokens{shorter}", style="dim")
    console.print()
    _draw_ranks(part, console)


def cell_widths(lengths: Sequence[int], scale: float, width: int) -> list[int]:
    """Number of characters for each run, `width` in all: its share, and at least 1 if there are enough."""
    edges = [0, *(round(end * scale) for end in accumulate(lengths))]
    if len(lengths) <= width:
        for i in range(1, len(edges)):
            edges[i] = max(edges[i], edges[i - 1] + 1)
        for i in range(len(edges) - 1, 0, -1):
            edges[i] = min(edges[i], width - (len(edges) - 1 - i))
    return [end - start for start, end in pairwise(edges)]


def _bar(rank: int | None, cells: int, num_ranks: int, console: Console) -> Text:
    if rank is None:
        return Text("·" * cells, style="dim")
    label = "all ranks" if rank == ALL_RANKS else str(rank)
    if console.color_system is not None:
        shown = label if len(label) <= cells else ""
        return Text(f"{shown:^{cells}}", style=f"bold black on {colour(rank, num_ranks)}")
    if cells >= len(label) + 2:
        return Text(f"├{label:─^{cells - 2}}┤")
    return Text(f"{label:─<{cells}}" if len(label) <= cells else "#" * cells)


def _draw_ranks(part: StepPlan, console: Console) -> None:
    tokens, pairs = part.num_tokens, part.num_pairs
    pair_share = pairs / max(pairs.sum(), 1)
    table = [("rank", "rows", "tokens", "attended pairs", "share")] + [
        (str(rank), str(rows), f"{tokens[rank]:,}", f"{pairs[rank]:,}", f"{pair_share[rank]:.1%}")
        for rank, rows in enumerate(np.diff(part.row_ptr).tolist())
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for rank, cells in enumerate(table, -1):
        line = Text("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
        if rank < 0:
            line.stylize("dim")
        else:
            length = round(16 * pair_share[rank] / max(pair_share.max(), 1e-9))
            line.append("  " + "█" * length, style=colour(rank, part.num_ranks))
        console.print(line)
    excess = [values.max() * part.num_ranks / max(values.sum(), 1) - 1 for values in (tokens, pairs)]
    console.print(f"\nbusiest rank over the mean: tokens +{excess[0]:.1%}, attended pairs +{excess[1]:.1%}\n")
    for rank in range(part.num_ranks):
        console.print(f"rank {rank:{len(str(part.num_ranks - 1))}} computes {_list_rows(part, rank)}", style="dim")


def _list_rows(part: StepPlan, rank: int) -> str:
    """The rows of a rank: request[first token..last token]."""
    rows = part.rows_of(rank)
    if rows.start == rows.stop:
        return "nothing"
    listed = [
        f"{request}[{start}]" if length == 1 else f"{request}[{start}..{start + length - 1}]"
        for request, start, length in zip(part.request_idx[rows], part.start[rows], part.length[rows], strict=True)
    ]
    more = [f"and {len(listed) - MAX_ROWS_LISTED} more"] if len(listed) > MAX_ROWS_LISTED else []
    return " ".join(listed[:MAX_ROWS_LISTED] + more)


def colour(rank: int, num_ranks: int) -> str:
    """The colour of a rank, in the terminal and in pictures."""
    if rank == ALL_RANKS:
        return COLOURS[-1]
    if num_ranks <= len(COLOURS):
        return COLOURS[rank]
    red, green, blue = colorsys.hls_to_rgb(rank / num_ranks, 0.6 + 0.15 * (rank % 2), 0.75)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _title(batch: ScheduledBatch, part: StepPlan, policy: str) -> str:
    tokens = _count(int(batch.num_scheduled_tokens.sum()), "token")
    how = f"by heads, each rank computes 1/{part.num_ranks} of the heads and columns" if part.by_heads else policy
    return f"{tokens} of {_count(len(batch), 'request')} on {_count(part.num_ranks, 'rank')}, {how}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def draw_picture(batch: ScheduledBatch, part: StepPlan, policy: str, path: Path) -> None:
    """Draws with matplotlib: the runs of each request, the attention of the longest one, and the load of each rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = runs_of(batch, part)
    num_drawn = min(len(runs), MAX_REQUESTS_DRAWN)
    figure = pyplot.figure(figsize=(11, max(4.2, 0.32 * num_drawn + 1.5)), layout="constrained")
    try:
        figure.suptitle(_title(batch, part, policy))
        grid = figure.add_gridspec(2, 2, width_ratios=(1.35, 1))
        _plot_runs(figure.add_subplot(grid[:, 0]), runs[:num_drawn], part.num_ranks)
        longest = int(batch.num_scheduled_tokens.argmax())
        _plot_attention(figure.add_subplot(grid[0, 1]), runs[longest], longest, part.num_ranks)
        _plot_load(figure.add_subplot(grid[1, 1]), part)
        figure.savefig(path, dpi=160)
    finally:
        pyplot.close(figure)


def _plot_runs(axes: "Axes", runs: Sequence[Sequence[Run]], num_ranks: int) -> None:
    longest = max(run.start + run.length for request in runs for run in request)
    for y, request in enumerate(runs):
        for run in request:
            shade = COMPUTED_COLOUR if run.rank is None else colour(run.rank, num_ranks)
            edge = shade if run.length < 0.01 * longest else "white"  # a white edge would hide a short run
            axes.barh(y, run.length, left=run.start, height=0.7, color=shade, edgecolor=edge, linewidth=1)
            if run.length > 0.04 * longest:
                label = {None: "in the cache", ALL_RANKS: "all ranks"}.get(run.rank, str(run.rank))
                if run.rank is not None or run.length > 0.25 * longest:
                    axes.text(run.start + run.length / 2, y, label, ha="center", va="center", fontsize=10)
    axes.set_yticks(range(len(runs)), [f"request {number}" for number in range(len(runs))])
    axes.invert_yaxis()
    axes.set_xlim(0, longest)
    _count_tokens(axes.xaxis)
    axes.set_xlabel("token")
    axes.set_title("who computes which tokens", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_attention(axes: "Axes", request: Sequence[Run], number: int, num_ranks: int) -> None:
    """Queries downwards, keys to the right: the area in a rank's colour is its number of attended pairs."""
    end = request[-1].start + request[-1].length
    first = next(run.start for run in request if run.rank is not None)
    for run in request:
        if run.rank is not None:
            last = run.start + run.length
            corners = [0, run.start, last, 0], [run.start, run.start, last, last]
            axes.fill(*corners, facecolor=colour(run.rank, num_ranks), edgecolor="white", linewidth=1)
    axes.set_xlim(0, end)
    axes.set_ylim(end, first)
    axes.set_xlabel("attends to token")
    axes.set_ylabel("token")
    _count_tokens(axes.xaxis)
    _count_tokens(axes.yaxis)
    axes.set_title(f"what the tokens of request {number} attend to", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _count_tokens(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_major_formatter("{x:,.0f}")


def _plot_load(axes: "Axes", part: StepPlan) -> None:
    """Each rank's share of tokens and of attended pairs. Dotted lines show even shares."""
    shares = [values / max(values.sum(), 1) for values in (part.num_tokens, part.num_pairs)]
    left = np.zeros(2)
    for rank in range(part.num_ranks):
        share = np.array([values[rank] for values in shares])
        axes.barh([0, 1], share, left=left, height=0.6, color=colour(rank, part.num_ranks), edgecolor="white")
        if part.num_ranks <= 8:
            for y in range(2):
                axes.text(left[y] + share[y] / 2, y, f"{share[y]:.0%}", ha="center", va="center", fontsize=9)
        left += share
    for rank in range(1, part.num_ranks):
        axes.axvline(rank / part.num_ranks, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks([0, 1], ["tokens", "attended\npairs"])
    axes.set_ylim(1.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.set_title("each rank's share (dotted: even)", fontsize=11)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
