# SPDX-License-Identifier: Apache-2.0
"""Training steps and inference of the image tower, against its rivals and the arithmetic lower bound."""

from __future__ import annotations

import dataclasses

import numpy as np
from settings import Measurement, Point, Row, Settings
from timing import exponents, interleaved, row
from variants import POOLED, RUNS, images, make, methods, operations


TRAINING_GOALS = {100: 1.03, 1000: 1.05, 8142: 1.10, 21841: 1.20}
INFERENCE_GOALS = {1000: 1.02, 8142: 1.05}
RANKS = (8, 16, 32, 64, 128)
#: Methods of the curves over r.
SWEPT = ("base", "lora", "adaptformer", "sage")


def training(settings: Settings) -> Measurement:
    """Training step over AdaptFormer's and over LoRA's, and its growth with C."""
    seconds, points = _over_classes(settings, "training")
    rows = _against("adaptformer", "training step / AdaptFormer's", settings, "training", seconds, TRAINING_GOALS)
    middle = settings.middle
    ratio = seconds["sage", middle] / seconds["lora", middle]
    rows.append(row(f"training step / LoRA's (q, v, same r), C = {middle:,}", ratio, 1.0))
    growth = exponents(list(settings.classes), [seconds["sage", count] for count in settings.classes])
    rows.append(row("exponent of the training step in C, all sizes", growth, 1.0, unit=""))
    last = settings.classes[-2:]
    growth = exponents(list(last), [seconds["sage", count] for count in last])
    rows.append(row(f"exponent of the training step in C, from {last[0]:,} to {last[1]:,}", growth, 1.0, unit=""))
    return rows, points


def inference(settings: Settings) -> Measurement:
    """Inference over the frozen base's."""
    seconds, points = _over_classes(settings, "inference")
    return _against("base", "inference / base model", settings, "inference", seconds, INFERENCE_GOALS), points


def ranks(settings: Settings) -> Measurement:
    """The same over r, for the figure."""
    points = []
    for figure in RUNS:
        runs = {(method, r): _run(settings, figure, method, settings.middle, r) for r in RANKS for method in SWEPT}
        for (method, r), values in interleaved(runs, settings, settings.sweep_repetitions).items():
            points.append(Point(figure, "r", r, method, float(np.median(values))))
        base = operations(settings, figure, "base", settings.middle)
        for r in RANKS:
            bound = operations(settings, figure, "sage", settings.middle, r) / base
            points.append(Point(figure, "r", r, "lower bound", bound))
    return [], points


def tokens(settings: Settings) -> Measurement:
    """Growth of the training step with the number of tokens N, beside the base's."""
    rows, points, times = [], [], {}
    sizes = [settings.image_size // 2, settings.image_size, settings.image_size * 3 // 2]
    counts = [(size // 16) ** 2 + 1 for size in sizes]
    for size, count in zip(sizes, counts, strict=True):
        resized = dataclasses.replace(settings, image_size=size)
        runs = {method: _run(resized, "training", method, settings.middle) for method in ("base", "sage")}
        for method, values in interleaved(runs, resized, settings.sweep_repetitions).items():
            times.setdefault(method, []).append(values)
            points.append(Point("training", "N", count, method, float(np.median(values))))
    base, sage = (exponents(counts, times[method]) for method in ("base", "sage"))
    span = f"N = {counts[0]} to {counts[-1]}"
    rows.append(row(f"exponent of the base's step (head trained) in the number of tokens, {span}", base, unit=""))
    rows.append(
        row(f"exponent of the training step in the number of tokens, {span}", sage, float(np.median(base)), unit="")
    )
    return rows, points


def _over_classes(settings: Settings, figure: str) -> tuple[dict[tuple[str, int], np.ndarray], list[Point]]:
    runs = {
        (method, count): _run(settings, figure, method, count)
        for count in settings.classes
        for method in methods(count)
    }
    seconds = interleaved(runs, settings)
    points = [Point(figure, "C", count, method, float(np.median(v))) for (method, count), v in seconds.items()]
    for count in settings.classes:
        ratio = operations(settings, figure, "sage", count) / operations(settings, figure, "base", count)
        points.append(Point(figure, "C", count, "lower bound", ratio))
    return seconds, points


def _run(settings: Settings, figure: str, method: str, count: int, r: int | None = None) -> object:
    return RUNS[figure](make(settings, method, count, r), images(settings), count)


def _against(
    rival: str,
    what: str,
    settings: Settings,
    figure: str,
    seconds: dict[tuple[str, int], np.ndarray],
    goals: dict[int, float],
) -> list[Row]:
    """Return a row for each number of classes: the time over a rival's, with the ratio of operations beside it."""
    rows = []
    for method, count, title in in_table(settings):
        ratio = seconds[method, count] / seconds[rival, count]
        bound = operations(settings, figure, method, count) / operations(settings, figure, rival, count)
        rows.append(row(f"{what}, {title}", ratio, goals.get(count), note=f"operations: {bound:.3f}"))
    return rows


def in_table(settings: Settings) -> list[tuple[str, int, str]]:
    """Return method, number of classes and title of each row that compares Sage with a rival."""
    arms = [(method, count) for method in ("sage", "pooled") for count in settings.classes if method in methods(count)]
    return [(method, count, f"C = {count:,}" + POOLED * (method == "pooled")) for method, count in arms]
