"""Draw the rows of a benchmark."""

from pathlib import Path
from typing import Any

PARTS = {"projections": "#4c78a8", "attention": "#f58518", "rest": "#bab0ac", "exposed_exchange": "#e45756"}


def draw_ttft(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws time against length, speed-up against ranks if these vary, and where the time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lens = sorted({row["prompt_len"] for row in rows})
    sizes = sorted({row["pcp"] for row in rows})
    of = {(row["prompt_len"], row["pcp"]): row for row in rows}
    num_panels = 3 if len(sizes) > 1 else 2
    figure, panels = plt.subplots(1, num_panels, figsize=(5 * num_panels, 4.5), constrained_layout=True)
    left, *middle, right = panels
    for size in sizes:
        known = [length for length in lens if (length, size) in of]
        times = [of[length, size]["median_ms"] for length in known]
        left.plot(known, times, marker="o", label=f"{size} rank{'s' * (size > 1)}")
    left.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="time to first token, ms")
    left.set_title("Time to first token")
    left.legend()
    for panel in middle:
        for length in lens:
            known_sizes = [size for size in sizes if (length, size) in of]
            if 1 in known_sizes and len(known_sizes) > 1:
                speed_up = [of[length, 1]["median_ms"] / of[length, size]["median_ms"] for size in known_sizes]
                panel.plot(known_sizes, speed_up, "o-", label=length)
        panel.plot(sizes, sizes, color="#cccccc", linestyle="--", label="linear")
        panel.set(xlabel="ranks", ylabel="speed-up")
        panel.set_title("Speed-up")
        panel.legend(title="tokens")
    parted = [row for row in rows if "breakdown_ms" in row]
    names = [f"{row['prompt_len']} / {row['pcp']}" for row in parted]
    bottom = [0.0] * len(parted)
    for part, color in PARTS.items():
        shares = [100 * row["breakdown_ms"][part] / row["breakdown_ms"]["busy"] for row in parted]
        right.bar(names, shares, bottom=bottom, color=color, label=part.replace("_", " "))
        bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
    right.set(xlabel="tokens / ranks", ylabel="% of busy time")
    right.tick_params(axis="x", rotation=60)
    right.set_title("Where the time goes")
    if parted:
        right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
