# SPDX-License-Identifier: Apache-2.0
"""Fourth step of the photograph test bed: tables of results, in Markdown.

python tables.py results/methods.jsonl --baseline "Sage"

Of an arm in which something varies, the variant with the best macro accuracy on the validation split is shown, task by
task. Differences to the baseline are paired over seeds: mean, standard error, and p of a two-sided t test.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


COLUMNS = ("macro", "many", "medium", "few")

Line = dict[str, Any]


def read_results(file: Path) -> list[Line]:
    """The lines of a file; none if it does not exist."""
    return (
        [json.loads(line) for line in file.read_text().splitlines()]
        if file.exists()
        else []
    )


def mean_score(
    lines: Sequence[Line], split: str = "validation", score: str = "macro"
) -> float:
    """A score's mean over runs."""
    return float(np.mean([line[split][score] for line in lines]))


def of_arm(lines: Sequence[Line], arm: str) -> list[Line]:
    """An arm's runs."""
    return [line for line in lines if line["arm"] == arm]


def best_arm(lines: Sequence[Line], task: str, group: str) -> Line:
    """A run of the variant that is best on the validation split, on the seeds that all variants were run with."""
    lines = [line for line in lines if line["task"] == task and line["group"] == group]
    if not lines:
        raise ValueError(
            f"There are no runs of {group!r} on task {task!r} to choose from."
        )
    arms = dict.fromkeys(line["arm"] for line in lines)
    shared = set.intersection(
        *({line["seed"] for line in of_arm(lines, arm)} for arm in arms)
    )
    lines = [line for line in lines if line["seed"] in shared]
    best = max(arms, key=lambda arm: mean_score(of_arm(lines, arm)))
    return of_arm(lines, best)[0]


def p_value(t: float, degrees: int) -> float:
    """Two-sided p of Student's t, by integration over the angle whose tangent is t over the root of the degrees."""
    angle = np.linspace(0, math.atan(abs(t) / math.sqrt(degrees)), 100_001)
    factor = (
        math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi)
    )
    return max(
        0.0, 1 - 2 * factor * float(np.trapezoid(np.cos(angle) ** (degrees - 1), angle))
    )


def difference(
    lines: Sequence[Line], baseline: Sequence[Line], split: str, score: str
) -> str:
    """The paired difference to a baseline over the seeds that both have."""
    ours, theirs = (
        {line["seed"]: line[split][score] for line in part}
        for part in (lines, baseline)
    )
    gaps = np.array([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()])
    if len(gaps) < 2 or np.isnan(gaps).any() or not gaps.std():
        return ""
    error = gaps.std(ddof=1) / math.sqrt(len(gaps))
    p = p_value(gaps.mean() / error, len(gaps) - 1)
    return f"{gaps.mean():+.2f} ± {error:.2f} (p {f'{p:.3f}' if p >= 0.001 else '< 0.001'})"


def table(lines: Sequence[Line], baseline: str, split: str, every: bool) -> list[str]:
    """The Markdown lines of a task's table."""
    task = lines[0]["task"]
    groups = dict.fromkeys(line["group"] for line in lines)
    arms = (
        dict.fromkeys(line["arm"] for line in lines)
        if every
        else {best_arm(lines, task, group)["arm"]: None for group in groups}
    )
    against = [
        line
        for line in lines
        if baseline in (line["group"], line["arm"]) and line["arm"] in arms
    ]
    heads = [
        f"{split} accuracy, %",
        "seeds",
        *COLUMNS,
        *(f"{score} against {baseline}" for score in ("macro", "few")),
    ]
    rows = [heads, ["---"] * len(heads)]
    for arm in arms:
        own = of_arm(lines, arm)
        means = [
            "" if math.isnan(mean) else f"{mean:.2f}"
            for mean in (mean_score(own, split, c) for c in COLUMNS)
        ]
        gaps = [difference(own, against, split, score) for score in ("macro", "few")]
        rows.append([arm, str(len(own)), *means, *gaps])
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    """Print a table for each task and ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files of the results")
    parser.add_argument(
        "--baseline", required=True, help="arm that differences are taken to"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument(
        "--below-seed", type=int, default=10**9, help="only runs with a seed below this"
    )
    parser.add_argument(
        "--every",
        action="store_true",
        help="show all variants, not the best on validation",
    )
    arguments = parser.parse_args()
    results = [line for file in arguments.results for line in read_results(file)]
    results = [line for line in results if line["seed"] < arguments.below_seed]
    for task, ratio in dict.fromkeys((line["task"], line["ratio"]) for line in results):
        lines = [
            line for line in results if (line["task"], line["ratio"]) == (task, ratio)
        ]
        print(f"\nTask {task}, ratio {ratio:g}\n")
        print(
            "\n".join(
                table(lines, arguments.baseline, arguments.split, arguments.every)
            )
        )


if __name__ == "__main__":
    main()
