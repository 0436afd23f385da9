# SPDX-License-Identifier: Apache-2.0
"""The lines that the runs of the photograph test bed leave."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_sage.adapter_scale import TOLERANCE


HERE = Path(__file__).parent
CLASSES = {"A": 100, "B": 100, "tiny": 200}

Line = dict[str, Any]


def find(name: str) -> Path:
    """A file by its path, or by its path in the folder of the test bed."""
    return Path(name) if Path(name).exists() else HERE / name


def read_results(file: Path) -> list[Line]:
    """The lines of a file; none if it does not exist."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_score(
    line: Line,
    split: str,
    score: str,
) -> float:
    """A score of a run, NaN where it has none; "seen" is the mean over the classes with training images."""
    scores = line[split]
    absent = line["settings"].get("without_images", 0)
    if score != "seen":
        return scores.get(score, np.nan)
    if not absent:
        return np.nan
    classes = CLASSES[line["task"]]
    missing = scores["none"] * absent
    return (scores["macro"] * classes - missing) / (classes - absent)


def mean_score(
    lines: Sequence[Line],
    split: str = "validation",
    score: str = "macro",
) -> float:
    """A score's mean over runs; NaN where a run lacks it."""
    return float(np.mean([read_score(line, split, score) for line in lines]))


def of_arm(lines: Sequence[Line], arm: str) -> list[Line]:
    """An arm's runs."""
    return [line for line in lines if line["arm"] == arm]


def best_arm(
    lines: Sequence[Line],
    task: str,
    group: str,
) -> Line:
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


def by_factor(lines: Sequence[Line]) -> list[Line]:
    """Sage with its adapters' output whole, halved, off, and as `choose_adapter_scale` chooses; others as they are."""
    variants = []
    for line in lines:
        if line["arm"] != "Sage" or "half" not in line:
            variants.append(line)
            continue
        scales = {"1": line, "0.5": line["half"], "0": line["off"]}
        whole, half = (scales[x]["validation"]["macro"] for x in ("1", "0.5"))
        loses = half < whole - 100 * TOLERANCE
        scales["chosen"] = scales["1" if loses else "0.5"]
        for name, scores in scales.items():
            splits = {split: scores[split] for split in ("validation", "test")}
            arm = f"Sage, factor {name}"
            variants.append({**line, **splits, "arm": arm, "group": arm})
    return variants
