# SPDX-License-Identifier: Apache-2.0
"""Make RESULTS.md from the JSON lines of the experiments.

    STYLES=unseen_styles.parquet python benchmarks/longtail/report.py

Each experiment's table shows what its runs differ in, the mean and standard deviation over seeds, and the paired
difference to the experiment's `baseline` with its 95 % bootstrap interval over seeds and held-out concepts.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import figures
import numpy as np
import yaml
from data import Split, Task, load_task, long_tail
from training import DEFAULTS

from peft_sage import mismatch_from_counts


HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "RESULTS.md"
GROUPS = ("overall", "macro", "many", "medium", "few")
RESAMPLES = 1000
FIGURES = HERE / "figures"
STYLES = os.environ.get("STYLES")  # parquet file of the unseen styles, for their experiment
Arm = dict[int, dict[str, Any]]  # results by seed


class Bootstrap:
    """Paired bootstrap over seeds and held-out concepts, of the accuracy over images and of means over classes.

    Args:
        task: The task, on the CPU.
        split: The evaluated split.
        ratio: Imbalance ratio of the training split, which tells the groups of the classes.
    """

    def __init__(self, task: Task, split: str, ratio: float | None) -> None:
        held_out: Split = task.splits[split]
        num_classes = len(task.names)
        counts = long_tail(task.splits["train"], num_classes, ratio).counts(num_classes).numpy()
        labels = held_out.labels.numpy()
        concepts, inverse = np.unique(held_out.groups.numpy(), return_inverse=True)
        self.onehot = np.eye(num_classes, dtype=np.float32)[labels]
        self.member = np.eye(len(concepts), dtype=np.float32)[inverse].T
        self.groups = [counts >= 0, counts > 100, (counts >= 20) & (counts <= 100), counts < 20]

    def accuracy(self, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return percent for each of `GROUPS`, from scores (N,) and weights (N,) of the images."""
        total = weights @ self.onehot
        with np.errstate(invalid="ignore"):
            per_class = (right * weights) @ self.onehot / total
        groups = [np.nanmean(per_class[group]) if group.any() else np.nan for group in self.groups]
        return 100 * np.array([right @ weights / weights.sum(), *groups])

    def difference(self, arm: Arm, baseline: Arm) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the mean paired difference and the ends of its 95 % interval, for each of `GROUPS`."""
        seeds = sorted(arm.keys() & baseline.keys())
        gap = _right(arm, seeds) - _right(baseline, seeds)
        rng, draws = np.random.default_rng(0), []
        for _ in range(RESAMPLES):
            drawn = rng.integers(len(self.member), size=len(self.member))
            times = np.bincount(drawn, minlength=len(self.member)).astype(np.float32)
            draws.append(self.accuracy(gap[rng.integers(len(gap), size=len(gap))].mean(0), times @ self.member))
        low, high = np.nanpercentile(np.array(draws), [2.5, 97.5], axis=0)
        return self.accuracy(gap.mean(0), np.ones(gap.shape[1], dtype=np.float32)), low, high


@cache
def _bootstrap(task: str, split: str, ratio: float | None) -> Bootstrap:
    return Bootstrap(_task(task), split, ratio)


@cache
def _task(name: str) -> Task:
    return load_task(name, STYLES)


def _right(arm: Arm, seeds: list[int]) -> np.ndarray:
    return np.array([[int(bit) for bit in bin(int(arm[seed]["right"], 16))[3:]] for seed in seeds], dtype=np.float32)


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return an experiment, its runs and their full specifications; no runs if there are none yet."""
    results = HERE / "results" / f"{path.stem}.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    runs = [json.loads(line) for line in lines]
    return yaml.safe_load(path.read_text()), runs, [{**DEFAULTS, **run["spec"]} for run in runs]


def comparisons(path: Path) -> list[str]:
    """Return a row for each comparison that an experiment asks for (`compare`), paired by seed."""
    experiment, runs, specs = read(path)
    rows = []
    for asked in experiment.get("compare", []) if runs else []:
        arms: list[Arm] = []
        for fields in (asked["arm"], asked["against"]):
            wanted = {**DEFAULTS, **experiment.get("base", {}), **fields}
            chosen = [i for i, spec in enumerate(specs) if all(spec[k] == v for k, v in wanted.items() if k != "seed")]
            arms.append({specs[i]["seed"]: runs[i] for i in chosen})
        if all(arms):
            spec = specs[0]
            gap = _bootstrap(spec["task"], spec["split"], spec["ratio"]).difference(*arms)
            cells = ["{:+.1f} ({:+.1f} to {:+.1f})".format(*(part[GROUPS.index(g)] for part in gap)) for g in GROUPS]
            seeds = len(arms[0].keys() & arms[1].keys())
            rows.append(f"| {asked['title']} | {path.stem}, {spec['split']} | {seeds} | {' | '.join(cells)} |")
    return rows


def section(path: Path) -> list[str]:
    """Return the lines about one experiment, none if it was not run."""
    experiment, runs, specs = read(path)
    if not runs:
        return []
    fields = [name for name in DEFAULTS if name != "seed" and len({json.dumps(spec[name]) for spec in specs}) > 1]
    arms: dict[str, Arm] = defaultdict(dict)
    spec_of = {}
    for run, spec in zip(runs, specs, strict=True):
        key = json.dumps([spec[name] for name in fields])
        arms[key][spec["seed"]] = run
        spec_of[key] = spec
    wanted = {**DEFAULTS, **experiment.get("base", {}), **experiment["baseline"]}
    baseline = arms.get(json.dumps([wanted[name] for name in fields]))
    differs = any("logit_difference" in run for run in runs)
    columns = [*fields, "seeds", *GROUPS, "ECE", *(["largest difference of a logit"] if differs else [])]
    lines = [
        f"## {experiment['title']}",
        "",
        f"{experiment['about'].strip()}",
        "",
        f"`python benchmarks/longtail/run.py benchmarks/longtail/experiments/{path.name}`; "
        f"split: {specs[0]['split']}; baseline: {experiment['baseline']}. Mean ± standard deviation over seeds; "
        "in brackets the paired difference to the baseline with its 95 % interval.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for key, arm in sorted(arms.items(), key=lambda item: -np.mean([run["macro"] for run in item[1].values()])):
        spec = spec_of[key]
        cells = [json.dumps(spec[name]).strip('"') for name in fields] + [str(len(arm))]
        gap = None
        if baseline is not None and arm is not baseline and spec["train_classes"] is None:
            gap = _bootstrap(spec["task"], spec["split"], spec["ratio"]).difference(arm, baseline)
        for column, group in enumerate(GROUPS):
            cells.append(_mean([run[group] for run in arm.values()]))
            if gap is not None:
                cells[-1] += " ({:+.1f}; {:+.1f} to {:+.1f})".format(*(part[column] for part in gap))
        cells.append(_mean([run["ece"] for run in arm.values()]))
        if differs:
            cells.append(_mean([run.get("logit_difference", 0.0) for run in arm.values()]))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_figure(experiment.get("figure"), path.stem, arms, spec_of)]
    return [*lines, ""]


def _figure(kind: str | None, name: str, arms: dict[str, Arm], spec_of: dict[str, dict[str, Any]]) -> list[str]:
    """Draw what an experiment asks for, and return the lines that show it."""
    if kind is None:
        return []
    path = FIGURES / f"{name}.png"
    sentences = []
    runs = {key: [arm[seed] for seed in sorted(arm)] for key, arm in arms.items()}
    if kind == "bars":
        figures.bars({_title(spec_of[key]): found for key, found in runs.items()}, path)
    elif kind == "sweep":
        lines: dict[str, list] = defaultdict(list)
        for key, found in runs.items():
            family, strength = _strength(spec_of[key])
            lines[family].append((strength, found))
        figures.sweep({family: sorted(points, key=lambda point: point[0]) for family, points in lines.items()}, path)
    elif kind == "bias":
        key = next(key for key, found in runs.items() if "gap" in found[0])
        spec, task = spec_of[key], _task(spec_of[key]["task"])
        counts = long_tail(task.splits["train"], len(task.names), spec["ratio"]).counts(len(task.names))
        estimates = {
            "from counts": mismatch_from_counts(counts, spec["effective_dim"]).numpy(),
            "leaving out an image": np.mean([run["from_images"] for run in runs[key]], axis=0),
            "leaving out a concept": np.mean([run["from_concepts"] for run in runs[key]], axis=0),
        }
        sentences = figures.bias(counts.numpy(), runs[key], estimates, path)
    return [f"![{name}]({path.relative_to(RESULTS.parent)})", "", *sentences]


def _title(spec: dict[str, Any]) -> str:
    if spec["method"] == "zero_shot":
        return "zero_shot"
    more = [f"{name} {spec[name]:g}" for name in ("r", "tau") if spec[name] != DEFAULTS[name] and spec["loss"] != "ce"]
    return ", ".join([spec["method"], spec["loss"], *more])


def _strength(spec: dict[str, Any]) -> tuple[str, float]:
    """Return the family that a loss belongs to, and its strength within."""
    if spec["loss"] == "sage" and spec["tau"] != DEFAULTS["tau"]:
        return "Sage loss (tau)", spec["tau"]
    if spec["loss"] == "sage":
        where = f"base {spec['base_mismatch']:g}" if spec["form"] == "target" else "all classes"
        width = f", d_eff {spec['effective_dim']:g}" if spec["mismatch"] == "counts" else ""
        return f"compensation, {where} and {spec['mismatch']}{width} (lambda)", spec["compensation"]
    return f"logit adjustment, {spec['epochs']} epochs (tau)", 0.0 if spec["loss"] == "ce" else spec["tau"]


def _mean(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def main() -> None:
    """Write RESULTS.md."""
    paths = sorted((HERE / "experiments").glob("*.yaml"))
    lines = ["# Results", "", "Made by `python benchmarks/longtail/report.py`; do not edit.", ""]
    lines += [
        "## In short",
        "",
        "Differences in accuracy, points, with 95 % intervals over held-out concepts and seeds.",
        "",
        "| comparison | experiment, split | seeds | " + " | ".join(GROUPS) + " |",
        "|---|---|---|" + "---|" * len(GROUPS),
    ]
    lines += [row for path in paths for row in comparisons(path)]
    lines.append("")
    for path in paths:
        lines += section(path)
    RESULTS.write_text("\n".join(lines))
    print(f"Wrote {RESULTS}")


if __name__ == "__main__":
    main()
