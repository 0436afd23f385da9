# SPDX-License-Identifier: Apache-2.0
"""Loading a saved adapter and head into a base model that is there already."""

from __future__ import annotations

import gc
import tempfile
import time

import numpy as np
from peft import PeftModel
from settings import Measurement, Settings, synchronise
from timing import row
from variants import make


GOAL = 50.0


def loading(settings: Settings) -> Measurement:
    """Milliseconds of `PeftModel.from_pretrained`."""
    milliseconds = []
    with tempfile.TemporaryDirectory() as folder:
        make(settings, "sage", settings.middle).save_pretrained(folder)
        for _ in range(settings.repetitions + 1):
            classifier = make(settings, "base", settings.middle)
            gc.collect()
            synchronise(settings)
            start = time.perf_counter()
            PeftModel.from_pretrained(classifier, folder)
            synchronise(settings)
            milliseconds.append(1000 * (time.perf_counter() - start))
    what = f"load time of adapter and head, r = {settings.r}, C = {settings.middle:,}"
    return [row(what, np.array(milliseconds[1:]), GOAL, unit="ms")], []
