# SPDX-License-Identifier: Apache-2.0
"""Run the demo with several methods and seeds, and print the README's table.

    python benchmarks/demo.py --output-dir demo-runs

Finished runs are kept, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "finetune.py"
SCORES = ("overall", "macro", "many", "medium", "few")
#: The best settings of the head alone on the validation split (its tau below too); the script's own are the adapters'.
HEAD = ["--method", "head", "--lr", "0.01", "--epochs", "8"]
#: Title in the table, and the flags of the example.
RUNS = {
    "head alone, logit adjustment, tau 0.75": [*HEAD, "--loss", "la", "--tau", "0.75"],
    "head alone, Sage loss, tau 0.9": [*HEAD, "--loss", "sage", "--tau", "0.9"],
    "head alone, Sage loss, tau 1.2": [*HEAD, "--loss", "sage", "--tau", "1.2"],
    "AdaptFormer + head, logit adjustment (LIFT's recipe)": ["--method", "adaptformer", "--loss", "la", "--tau", "1"],
    "**Sage**: guided adapter + head, Sage loss, tau 1.2": ["--method", "sage", "--loss", "sage", "--tau", "1.2"],
}


def folder_name(flags: list[str]) -> str:
    """Return a name that changes with the settings, so that a finished run is not taken for one with others."""
    return "_".join(flag.lstrip("-") for flag in flags)


def result(flags: list[str], seed: int, folder: Path) -> dict:
    """Return the results of a run, and do it first if it was not done."""
    if not (folder / "results.json").exists():
        command = [sys.executable, str(EXAMPLE), *flags, "--seed", str(seed), "--output-dir", str(folder)]
        subprocess.run([*command, "--cpu-threads", "1"], check=True)
    return json.loads((folder / "results.json").read_text())


def row(title: str, runs: list[dict]) -> str:
    """Return a row of the table: means over runs, with the standard deviation where there are several."""
    values = np.array([[run[name] for name in SCORES] for run in runs])
    spread = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(SCORES))
    cells = [
        f"{m:.1f}" + (f" ± {s:.1f}" if len(runs) > 1 else "") for m, s in zip(values.mean(axis=0), spread, strict=True)
    ]
    return f"| {title} | {' | '.join(cells)} |"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, default=Path("demo-runs"))
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.workers) as pool:
        started = {
            title: [
                pool.submit(result, flags, seed, args.output_dir / f"{folder_name(flags)}_seed_{seed}")
                for seed in range(args.seeds)
            ]
            for title, flags in RUNS.items()
        }
    results = {title: [future.result() for future in futures] for title, futures in started.items()}
    first = next(iter(results.values()))[0]
    print(f"| test accuracy, %, {args.seeds} seeds | {' | '.join(SCORES)} |")
    print("|---|" + "---|" * len(SCORES))
    print(row("zero-shot", [first["zero_shot"]]))
    for title, runs in results.items():
        print(row(title, [run["trained"] for run in runs]))


if __name__ == "__main__":
    main()
