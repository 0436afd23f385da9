# SPDX-License-Identifier: Apache-2.0
"""The demo of two checkouts of this project, side by side: time and accuracy.

    python -m benchmarks.demo OLD NEW --seeds 0 1 2

`examples/finetune.py` runs in each in turn, without arguments but the seed. Core seconds are those of the processor:
other programs do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import stats

from .markdown import markdown_table


SCORES = ("overall", "macro", "many", "medium", "few")
COLUMNS = (*SCORES, "core seconds", "wall seconds")


def run(checkout: Path, seed: int) -> list[float]:
    """Run the demo; return its test accuracies and what it took."""
    example = checkout / "examples" / "finetune.py"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(example), "--seed", str(seed)]
        command += ["--output-dir", folder]
        start = time.perf_counter()
        before = os.times()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        after = os.times()
        trained = json.loads(Path(folder, "results.json").read_text())["trained"]
    core = after.children_user - before.children_user
    core += after.children_system - before.children_system
    return [*(trained[name] for name in SCORES), core, wall]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    values: dict[str, list[list[float]]] = {"old": [], "new": []}
    for seed in args.seeds:
        for name in values:
            values[name].append(run(getattr(args, name).resolve(), seed))
            print(seed, name, values[name][-1], flush=True)
    old = np.array(values["old"])
    new = np.array(values["new"])
    errors = stats.sem(new - old) if len(old) > 1 else np.full(len(COLUMNS), np.nan)
    gaps = zip((new - old).mean(axis=0), errors, strict=True)
    rows = [
        ["old", *(f"{mean:.2f}" for mean in old.mean(axis=0))],
        ["new", *(f"{mean:.2f}" for mean in new.mean(axis=0))],
        ["new - old", *(f"{gap:+.2f} ± {error:.2f}" for gap, error in gaps)],
    ]
    print(markdown_table([f"{len(args.seeds)} seeds", *COLUMNS], rows))


if __name__ == "__main__":
    main()
