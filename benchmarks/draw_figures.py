"""Draw the first table of docs/figures.md: docs/figures.png.

python benchmarks/draw_figures.py
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
STYLES = {"Twofold": ("#d55e00", "o"), "vLLM TP2": ("#0072b2", "s"), "vLLM PCP2": ("#56b4e9", "^")}


def main() -> None:
    rows = re.findall(r"^\| (.*) \|$", (DOCS / "figures.md").read_text(), re.MULTILINE)
    header, _, *lines = (row.replace("*", "").split(" | ") for row in rows)
    lens = [int(cell.removesuffix("k")) for cell in header[1:]]
    curves = [(*name.split(": "), [float(cell) for cell in cells]) for name, *cells in lines[:5]]
    models = list(dict.fromkeys(model for model, _, _ in curves))
    figure, panels = plt.subplots(1, len(models), figsize=(9, 3.6), constrained_layout=True)
    for panel, model in zip(panels, models, strict=True):
        for other, engine, times in curves:
            if other == model:
                colour, marker = STYLES[engine]
                panel.plot(lens, times, color=colour, marker=marker, label=engine)
        panel.set(xscale="log", yscale="log", xlabel="prompt, thousands of tokens", title=model)
        panel.set_xticks(lens, map(str, lens))
        panel.minorticks_off()
        panel.legend()
    panels[0].set_ylabel("time to first token, ms")
    figure.suptitle("Time to first token on 2 x H100, bfloat16: lower is better")
    figure.savefig(DOCS / "figures.png", dpi=110)


if __name__ == "__main__":
    main()
