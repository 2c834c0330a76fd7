"""Draw the rows of a benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = {"projections": "#4c78a8", "attention": "#f58518", "rest": "#bab0ac", "exposed_exchange": "#e45756"}


def draw_ttft(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws time against length, speed-up against ranks if these vary, and where the time goes if it was profiled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    lens = sorted({row["prompt_len"] for row in rows})
    sizes = sorted({row["pcp"] for row in rows})
    of = {(row["prompt_len"], row["pcp"]): row for row in rows}
    parted = [row for row in rows if "breakdown_ms" in row]
    compares = sizes[0] == 1 < sizes[-1]
    num_panels = 1 + compares + bool(parted)
    figure, [panels] = plt.subplots(
        1, num_panels, figsize=(max(5 * num_panels, 7), 4.5), squeeze=False, constrained_layout=True
    )
    figure.suptitle(title)
    left, *others = panels
    for size in sizes:
        known = [length for length in lens if (length, size) in of]
        times = [of[length, size]["median_ms"] for length in known]
        left.plot(known, times, marker="o", label=f"{size} rank{'s' * (size > 1)}")
    left.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="time to first token, ms")
    left.set_xticks(lens, [f"{length:,}" for length in lens], minor=False)
    left.xaxis.minorticks_off()
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
    left.set_title("Time to first token")
    left.legend()
    if compares:
        _draw_speed_up(others.pop(0), of, lens, sizes)
    if parted:
        _draw_parts(others.pop(0), parted)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_speed_up(panel: "Axes", of: dict[tuple[int, int], dict[str, Any]], lens: list[int], sizes: list[int]) -> None:
    for length in lens:
        known_sizes = [size for size in sizes if (length, size) in of]
        if 1 in known_sizes and len(known_sizes) > 1:
            speed_up = [of[length, 1]["median_ms"] / of[length, size]["median_ms"] for size in known_sizes]
            panel.plot(known_sizes, speed_up, "o-", label=length)
    panel.plot(sizes, sizes, color="#cccccc", linestyle="--", label="linear")
    panel.set(xlabel="ranks", ylabel="speed-up")
    panel.set_title("Speed-up")
    panel.legend(title="tokens")


def _draw_parts(panel: "Axes", parted: list[dict[str, Any]]) -> None:
    names = [f"{row['prompt_len']} / {row['pcp']}" for row in parted]
    bottom = [0.0] * len(parted)
    for part, color in PARTS.items():
        shares = [100 * row["breakdown_ms"][part] / row["breakdown_ms"]["busy"] for row in parted]
        panel.bar(names, shares, bottom=bottom, color=color, label=part.replace("_", " "))
        bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
    panel.set(xlabel="tokens / ranks", ylabel="% of busy time")
    panel.tick_params(axis="x", rotation=60)
    panel.set_title("Where the time goes")
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
