# SPDX-License-Identifier: Apache-2.0
"""Times taken side by side."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from settings import Row, Settings, synchronise


def interleaved(
    runs: Mapping[Any, Callable[[], object]], settings: Settings, repetitions: int | None = None
) -> dict[Any, np.ndarray]:
    """Time several runs in turn, so that whatever else the machine does falls on all of them alike.

    Args:
        runs: What is timed. Each is run once beforehand, untimed.
        settings: Says the device and how often.
        repetitions: How often, if not as in `settings`.

    Returns:
        Seconds (repetitions,) of each run. Entry i of two runs lie next to each other in time. Every other repetition
        goes through the runs backwards.
    """
    for run in runs.values():
        run()
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions or settings.repetitions):
        names = list(runs)
        for name in names if repetition % 2 == 0 else reversed(names):
            gc.collect()
            synchronise(settings)
            start = time.perf_counter()
            runs[name]()
            synchronise(settings)
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def row(what: str, values: np.ndarray, goal: float | None = None, **kwargs: Any) -> Row:
    """Return the row of the table for values (repetitions,), such as the ratios of two runs' times."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Row(what, low, median, high, goal, **kwargs)


def exponents(x: list[int], seconds: list[np.ndarray]) -> np.ndarray:
    """Return p of `seconds ~ x^p`, fitted by least squares in logarithms, for each repetition.

    Args:
        x: Sizes, at least two.
        seconds: Times (repetitions,) for each size.
    """
    return np.polyfit(np.log(x), np.log(np.stack(seconds)), deg=1)[0]
