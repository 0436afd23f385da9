# SPDX-License-Identifier: Apache-2.0
"""Draws the adapter's place in a block: `python docs/draw_adapter.py` writes docs/adapter.svg."""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


FROZEN, TRAINED, DATA = "#dfe5ec", "#ffd9a8", "#cfe8cf"


def draw(path: str) -> None:
    """Write the picture as SVG, the same bytes each time."""
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "peft_sage",
            "font.family": "sans-serif",
        }
    )
    figure = Figure(figsize=(8.2, 4.6))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 82), ylim=(0, 46))
    axis.set_axis_off()

    def box(x, y, text, colour, width=13, height=5):
        patch = FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            "round,pad=0.3",
            fc=colour,
            ec="0.35",
        )
        axis.add_patch(patch)
        axis.text(x, y, text, ha="center", va="center", fontsize=10)

    def arrow(*points):
        for start, end in zip(points, points[1:], strict=False):
            style = "-|>" if end == points[-1] else "-"
            line = FancyArrowPatch(
                start,
                end,
                arrowstyle=style,
                mutation_scale=12,
                shrinkA=0,
                shrinkB=0,
                color="0.25",
            )
            axis.add_patch(line)

    axis.text(4, 41, "a block of the vision tower", fontsize=11, weight="bold")
    axis.text(5, 8.3, "x, one token", fontsize=10, ha="center")
    box(22, 32, "MLP", FROZEN)
    box(20, 11, "LN, down (r)", TRAINED)
    box(36, 11, "attention", TRAINED, width=9)
    box(53, 11, "GELU, up", TRAINED, width=11)
    box(66, 11, "scale", TRAINED, width=7)
    box(36, 23, "keys, values", TRAINED, width=9)
    box(54, 23, "guidance, one row a class", DATA, width=19)
    box(54, 35, "class descriptions, encoded by the text tower", DATA, width=33)
    axis.text(75, 32, "+", fontsize=16, ha="center", va="center")
    arrow((2, 11), (12.9, 11))
    arrow((9, 11), (9, 32), (14.9, 32))
    arrow((26.9, 11), (31, 11))
    arrow((28.5, 11), (28.5, 5), (44, 5), (44, 10.8))
    arrow((40.9, 11), (47, 11))
    arrow((58.9, 11), (62, 11))
    arrow((69.9, 11), (75, 11), (75, 30.4))
    arrow((28.9, 32), (31, 32), (31, 43), (75, 43), (75, 33.6))
    arrow((76.5, 32), (81, 32))
    arrow((54, 32.1), (54, 25.9))
    arrow((44.1, 23), (41, 23))
    arrow((36, 20.1), (36, 13.9))
    for x, (text, colour) in zip(
        (8, 26, 44),
        (("frozen", FROZEN), ("trained", TRAINED), ("data", DATA)),
        strict=True,
    ):
        axis.add_patch(
            FancyBboxPatch((x, 1), 2, 1.4, "round,pad=0.2", fc=colour, ec="0.35")
        )
        axis.text(x + 3, 1.7, text, fontsize=9, va="center")
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(
        sys.argv[1]
        if len(sys.argv) > 1
        else str(Path(__file__).with_name("adapter.svg"))
    )
