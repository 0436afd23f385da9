# SPDX-License-Identifier: Apache-2.0
"""The figures of RESULTS.md, from the JSON lines of the experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def bars(arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw many / medium / few accuracies of several methods.

    Args:
        arms: Results of the seeds of each method, by its title.
        path: Of the picture.
    """
    groups = ("macro", "many", "medium", "few")
    figure, axes = plt.subplots(figsize=(12, 4))
    width = 0.8 / len(arms)
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for number, (title, runs) in enumerate(sorted(arms.items(), reverse=True)):
        values = np.array([[run[group] for group in groups] for run in runs])
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
        at = np.arange(len(groups)) + number * width
        axes.bar(at, values.mean(axis=0), width, yerr=spread, label=title, error_kw={"linewidth": 0.8})
    axes.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, groups)
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    _save(figure, path)


def bias(counts: np.ndarray, runs: list[dict[str, Any]], estimates: dict[str, np.ndarray], path: Path) -> list[str]:
    """Draw estimates of the mismatch against the bias that was found.

    Args:
        counts: Training images of each class (K,).
        runs: With `gap`, the mean right logit of training images minus that of held-out ones (K,).
        estimates: Estimated mismatch (K,), by title.
        path: Of the picture.

    Returns:
        A sentence for each estimate, with its rank correlation.
    """
    gap = np.mean([run["gap"] for run in runs], axis=0)
    known = np.isfinite(gap)  # classes without held-out images have none
    gap, counts = gap[known], counts[known]
    figure, axes = plt.subplots(1, len(estimates), figsize=(4.2 * len(estimates), 3.6), squeeze=False)
    sentences = []
    for axis, (title, delta) in zip(axes[0], estimates.items(), strict=True):
        delta = delta[known]
        points = axis.scatter(delta, gap, c=np.log10(counts), s=14)
        axis.set_xlabel(f"{title}, nats")
        slope, intercept = np.polyfit(delta, gap, 1)
        span = np.array([delta.min(), delta.max()])
        axis.plot(span, slope * span + intercept, color="gray", linewidth=1)
        correlation = np.corrcoef(delta.argsort().argsort(), gap.argsort().argsort())[0, 1]
        sentences.append(f"{title}: rank correlation {correlation:.2f}, slope {slope:.2f}.")
    axes[0][0].set_ylabel("right logit, training minus held-out, nats")
    figure.colorbar(points, ax=axes[0].tolist(), label="log10 of training images")
    _save(figure, path)
    return sentences


def sweep(lines: dict[str, list[tuple[float, list[dict[str, Any]]]]], path: Path) -> None:
    """Draw few-shot against many-shot accuracy, a line for each family of losses, a point for each strength."""
    figure, axes = plt.subplots(figsize=(6, 5))
    for title, points in lines.items():
        few = [np.mean([run["few"] for run in runs]) for _, runs in points]
        macro = [np.mean([run["macro"] for run in runs]) for _, runs in points]
        axes.plot(few, macro, marker="o", markersize=4, label=title)
        for (strength, _), x, y in zip(points, few, macro, strict=True):
            axes.annotate(f"{strength:g}", (x, y), fontsize=6, xytext=(2, 2), textcoords="offset points")
    axes.set_xlabel("few-shot accuracy, %")
    axes.set_ylabel("macro accuracy, %")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
