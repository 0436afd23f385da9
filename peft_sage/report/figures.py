# SPDX-License-Identifier: Apache-2.0
"""The figures of the page and of the model card. Each function draws on one pair of axes."""

import base64
import io
from collections.abc import Callable

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import uniform_filter1d
from sklearn.calibration import calibration_curve

from .results import RunResults
from .statistics import accuracy_by_coverage


#: Zero-shot and trained: colours that stand out on white and on black.
COLORS = ("#8b929c", "#3b82f6")
#: Up to this number of classes their names are written below the axis.
MAX_NAMES = 30


def draw_classes(axis: Axes, results: RunResults) -> None:
    """Draw the accuracies of the classes, most frequent first, over their numbers of training images."""
    counts = np.array(results.class_counts)
    order = np.argsort(-counts, kind="stable")
    axis.fill_between(
        range(len(counts)),
        np.maximum(counts[order], 0.5),
        0.5,
        step="mid",
        color="0.5",
        alpha=0.2,
    )
    axis.set(yscale="log", ylabel="training images")
    axis.set_ylim(bottom=0.5)
    accuracies = axis.twinx()
    for color, (run, evaluation) in zip(COLORS, results.runs.items(), strict=True):
        values = np.array(evaluation.per_class, dtype=float)[order]
        accuracies.plot(values, ".", alpha=0.4, color=color)
        known = np.flatnonzero(~np.isnan(values))
        mean = uniform_filter1d(values[known], max(1, len(known) // 10))
        accuracies.plot(known, mean, color=color, label=run)
    accuracies.set_ylim(0, 103)
    accuracies.set_ylabel("test accuracy, %")
    accuracies.legend()
    if len(counts) > MAX_NAMES:
        axis.set_xlabel("classes, most frequent first")
        return
    names = [results.class_names[k][:24] for k in order]
    axis.set_xticks(range(len(names)), names, parse_math=False, rotation=90)
    axis.tick_params(axis="x", labelsize=7)


def draw_reliability(axis: Axes, results: RunResults) -> None:
    """Draw the accuracy of the test images by confidence, over the share of images in each bin."""
    confidences, right = results.answers
    images = np.full(len(right), 1 / len(right))
    axis.hist(
        confidences,
        bins=15,
        range=(0, 1),
        weights=images,
        color="0.5",
        alpha=0.3,
        label="images",
    )
    axis.plot([0, 1], [0, 1], ":", color="0.5")
    accuracy, confidence = calibration_curve(right, confidences, n_bins=15)
    axis.plot(confidence, accuracy, ".-", color=COLORS[1], label=results.method)
    axis.set(xlabel="confidence", ylabel="test accuracy; share of images")
    axis.legend()


def draw_coverage(axis: Axes, results: RunResults) -> None:
    """Draw the accuracy over the share of test images that are answered, the most confident first."""
    _, share, accuracy = accuracy_by_coverage(*results.answers)
    axis.plot(
        100 * share,
        100 * accuracy,
        color=COLORS[1],
        label=results.method,
    )
    axis.axhline(95, color="0.5", linestyle=":", label="95%")
    if results.at_threshold:
        answered, right = results.at_threshold
        axis.plot(
            100 * answered,
            100 * right,
            "o",
            color=COLORS[1],
            label=f"confidence of at least {results.threshold:.2f}",
        )
    axis.set(xlabel="images answered, %", ylabel="accuracy of the answers, %")
    axis.set_ylim(top=103)
    axis.legend()


def draw_validation(axis: Axes, results: RunResults) -> None:
    """Draw the validation accuracies over the epochs."""
    epochs = [scores["epoch"] for scores in results.validation]
    for color, name in zip(COLORS, ("overall", "macro"), strict=True):
        values = [scores[name] for scores in results.validation]
        axis.plot(epochs, values, ".-", color=color, label=name)
    if results.kept_epoch is not None:
        axis.axvline(results.kept_epoch, color="0.5", linestyle=":", label="kept")
    axis.set(xlabel="epoch", ylabel="validation accuracy, %")
    axis.legend()


def plot_long_tail(results: RunResults) -> Figure:
    """Draw the classes, for the model card."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    draw_classes(figure.subplots(), results)
    return figure


def embed_figure(
    draw: Callable[[Axes, RunResults], None], results: RunResults
) -> dict[str, str]:
    """Return a figure as data URIs, for `light` and for `dark` pages."""
    sources = {}
    for name, look in (("light", "default"), ("dark", "dark_background")):
        with style.context([look, {"legend.fontsize": 8}]):
            figure = Figure(figsize=(5.2, 3.6), layout="constrained")
            draw(figure.subplots(), results)
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=150, transparent=True)
        sources[name] = _data_uri(file, "png")
    return sources


def embed_picture(image: Image.Image, side: int = 512) -> str:
    """Return a picture as the data URI of a JPEG with at most `side` pixels on its longer side."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return _data_uri(file, "jpeg")


def _data_uri(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
