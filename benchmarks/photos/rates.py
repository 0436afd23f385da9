# SPDX-License-Identifier: Apache-2.0
"""The picture of the learning rates, on the validation split.

python -m benchmarks.photos.rates benchmarks/photos/rates.png
"""

import sys

from matplotlib.figure import Figure

from .results import HERE, mean_score, read_results


TOWERS = ("4x192", "12x192", "4x384")
TICKS = (0.0002, 0.001, 0.005)
STYLES = {"Sage, deep": "C3", "LIFT, deep": "C0"}


def main() -> None:
    """Draw a panel for each task and tower."""
    files = (HERE / "results" / f"grid-{name}.jsonl" for name in ("deep", "wide"))
    lines = [line for file in files for line in read_results(file)]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    panels = [(task, tower) for task in "AB" for tower in TOWERS]
    for axis, (task, tower) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        here = [x for x in lines if (x["task"], x["tower"]) == (task, tower)]
        for group, color in STYLES.items():
            runs = [line for line in here if line["group"] == group]
            runs.sort(key=lambda line: line["settings"]["rates"])
            rates = [line["settings"]["rates"][0] for line in runs]
            for score, style in (("macro", "-"), ("few", ":")):
                values = [mean_score([line], score=score) for line in runs]
                label = f"{group.removesuffix(', deep')}, {score}"
                axis.plot(rates, values, style, marker="o", color=color, label=label)
        axis.set(xscale="log")
        axis.set_xticks(TICKS, TICKS)
        axis.set_xticks([], minor=True)
        axis.set(title=f"{task}, {tower}", xlabel="rate of the adapters")
    figure.axes[0].set_ylabel("validation accuracy, %")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
