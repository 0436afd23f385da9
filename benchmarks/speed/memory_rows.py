# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from settings import Measurement, Point, Settings
from timing import row
from towers_rows import RANKS, SWEPT, in_table
from variants import TrainingStep, images, make, methods


REPETITIONS = 3
GOAL = 1.05


def memory(settings: Settings) -> Measurement:
    """Peak memory of a step over AdaptFormer's, and the curves over C and r."""
    peaks: dict[tuple[str, int], list[int]] = {}
    for count in settings.classes:
        # The row with a goal is repeated; the peaks are the same each time but for the allocator's whims.
        for _ in range(REPETITIONS if count == settings.large else 1):
            for method in methods(count):
                peaks.setdefault((method, count), []).append(_peak(settings, method, count, settings.r))
    rows = []
    for method, count, title in in_table(settings):
        ratio = np.array(peaks[method, count]) / np.array(peaks["adaptformer", count])
        goal = GOAL if count == settings.large else None
        rows.append(row(f"peak memory of a step / AdaptFormer's, {title}", ratio, goal))
    points = [Point("memory", "C", count, method, float(np.median(v))) for (method, count), v in peaks.items()]
    for r in RANKS:
        for method in SWEPT:
            points.append(Point("memory", "r", r, method, _peak(settings, method, settings.middle, r)))
    return rows, points


def _peak(settings: Settings, method: str, num_classes: int, r: int) -> int:
    """Return the bytes that weights, optimiser and two steps took at most."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_step_in_this_process, settings, method, num_classes, r).result()


def _step_in_this_process(settings: Settings, method: str, num_classes: int, r: int) -> int:
    torch.set_num_threads(settings.threads)
    before = _resident("VmRSS")
    step = TrainingStep(make(settings, method, num_classes, r), images(settings), num_classes)
    step()
    step()
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Return the resident memory of this process in bytes: `VmRSS` now, `VmHWM` at its highest.

    Not `getrusage`: on Linux its maximum is handed on from the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
