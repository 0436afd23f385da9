# SPDX-License-Identifier: Apache-2.0
"""Fourth step of the photograph test bed: tables of results, in Markdown.

python -m benchmarks.photos.tables results/methods.jsonl --baseline "Sage"

Of an arm in which something varies, the variant with the best macro accuracy on the validation split is shown, task by
task. Differences to the baseline are paired over seeds: mean, standard error, and p of a two-sided t test.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy import stats

from ..markdown import markdown_table
from .results import (
    Line,
    best_arm,
    by_factor,
    find,
    mean_score,
    of_arm,
    read_results,
    read_score,
)


COLUMNS = ("macro", "many", "medium", "few", "seen", "none")


def difference(
    lines: Sequence[Line],
    baseline: Sequence[Line],
    split: str,
    score: str,
) -> str:
    """The paired difference to a baseline over the seeds that both have."""
    ours, theirs = (
        {line["seed"]: read_score(line, split, score) for line in part}
        for part in (lines, baseline)
    )
    shared = sorted(ours.keys() & theirs.keys())
    gaps = np.array([ours[seed] - theirs[seed] for seed in shared])
    if not len(gaps) or np.isnan(gaps).any() or not gaps.any():
        return ""
    if len(gaps) < 2:
        return f"{gaps[0]:+.2f}"
    p = stats.ttest_1samp(gaps, 0).pvalue
    shown = f"{p:.3f}" if p >= 0.001 else "< 0.001"
    return f"{gaps.mean():+.2f} ± {stats.sem(gaps):.2f} (p {shown})"


def table(
    lines: Sequence[Line],
    baseline: str,
    split: str,
    every: bool,
) -> str:
    """The Markdown table of a task."""
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
    columns = [c for c in COLUMNS if not math.isnan(mean_score(lines, split, c))]
    group = ["seen", "none"] if "seen" in columns else ["few"]
    differences = ["macro", *(score for score in group if score in columns)]
    heads = [f"{split} accuracy, %", "seeds", *columns]
    heads += [f"{score} against {baseline}" for score in differences]
    rows = []
    for arm in arms:
        own = of_arm(lines, arm)
        means = [f"{mean_score(own, split, column):.2f}" for column in columns]
        gaps = [difference(own, against, split, score) for score in differences]
        rows.append([arm, str(len(own)), *means, *gaps])
    return markdown_table(heads, rows)


def main() -> None:
    """Print a table for each task and ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", type=find, nargs="+", help="files of the results")
    add("--baseline", required=True, help="arm that differences are taken to")
    add("--split", choices=("validation", "test"), default="test")
    add("--below-seed", type=int, default=10**9, help="only runs below this seed")
    add("--every", action="store_true", help="all variants, not the best on validation")
    add(
        "--factors",
        action="store_true",
        help="show Sage with its adapters' output whole, halved, off, or as validation chooses",
    )
    arguments = parser.parse_args()
    results = [line for file in arguments.results for line in read_results(file)]
    results = [line for line in results if line["seed"] < arguments.below_seed]
    if arguments.factors:
        results = by_factor(results)
    kinds = defaultdict(list)
    for line in results:
        kinds[line["task"], line.get("tower", "4x192"), line["ratio"]].append(line)
    for (task, tower, ratio), lines in kinds.items():
        print(f"\nTask {task}, tower {tower}, ratio {ratio:g}\n")
        print(table(lines, arguments.baseline, arguments.split, arguments.every))


if __name__ == "__main__":
    main()
