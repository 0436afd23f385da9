# SPDX-License-Identifier: Apache-2.0
"""Measure what the package costs next to its rivals, in one run, and write the table.

python -m benchmarks.speed.run                             # all rows of the CPU
python -m benchmarks.speed.run --rows training inference   # some of them; the table keeps the others
python -m benchmarks.speed.run --report                    # only write RESULTS.md from results.json, and print it
bash benchmarks/speed/on_gpu.sh                            # the rows of a GPU
"""

# ruff: noqa: E402
import argparse
import gc
import itertools
import json
import os
import platform
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any


# Has to come before torch. Waiting threads that spin would take the other processes' time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import yaml

from ..markdown import markdown_table
from .measures import MEASURES, Run


HERE = Path(__file__).resolve().parent
FILE = yaml.safe_load((HERE / "rows.yaml").read_text())
HEADS = ("what", "median", "quartiles", "goal", "met")
PAGE = """# Speed

`python -m benchmarks.speed.run --report` writes this page from `results.json`; [README.md](README.md) says how it is
measured. ViT-B/16, r = 32, float32 and, on the CPU, batches of 2, where a row does not say otherwise. The median, and
between which quartiles it lies; a ratio is taken within each repetition.
"""
NO_GPU = (
    "\n## GPU\n\nNot measured: there was no GPU. "
    "`bash benchmarks/speed/on_gpu.sh` fills this table in 8 minutes.\n"
)


def combinations(
    group: dict[str, Any], args: argparse.Namespace
) -> Iterator[tuple[dict, dict]]:
    """Give the settings of the runs of a group by name, for every combination of `each`, which comes first."""
    each = group.get("each", {})
    for values in itertools.product(*each.values()):
        combination = dict(zip(each, values, strict=True))
        runs = {}
        for name, own in group["runs"].items():
            run = FILE["defaults"] | group | combination | own
            if args.small:
                run |= FILE["small"] | {"classes": run["classes"] // 100 + 3}
            sizes = FILE["towers"][run["tower"]]
            runs[name] = SimpleNamespace(**run, sizes=sizes, device=args.device)
        yield combination, runs


def interleaved(
    runs: Mapping[str, Run], device: str, repetitions: int
) -> dict[str, np.ndarray]:
    """Let runs take turns, so that whatever else the machine does falls on all of them alike.

    Returns:
        (repetitions,) seconds, on the CPU those of the processor, or what the run returned. Every other repetition
        goes through the runs backwards. One round comes before, and does not count, unless there is a single
        repetition.
    """

    def once(run: Run) -> float:
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
        # On a CPU others may have their turn meanwhile.
        clock = time.perf_counter if device == "cuda" else time.process_time
        start = clock()
        value = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start if value is None else value

    values: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(0 if repetitions == 1 else -1, repetitions):
        for name in list(runs)[:: -1 if repetition % 2 else 1]:
            value = once(runs[name])
            if repetition >= 0:
                values[name].append(value)
    return {name: np.array(taken) for name, taken in values.items()}


def table_row(
    row: dict[str, Any],
    values: dict[str, np.ndarray],
    combination: dict[str, Any],
    run: SimpleNamespace,
) -> dict[str, Any]:
    """Return a row of the table: title, quartiles, unit and goal."""
    result = values[row["of"]]
    if "over" in row:
        result = result / values[row["over"]]
    if "less" in row:
        result = result - values[row["less"]]
    result = result * row.get("times", 1)
    if "beside" in row:
        result = 1 + result / values[row["beside"]]
    if row.get("unit") == "of each":
        result = result / (4 * run.classes * (run.batch + run.sizes["embedding"]))
    if "rate" in row:
        result = getattr(run, row["rate"]) / values[row["of"]]
    names = {"classes": "C = {:,}", "batch": "B = {:,}", "tower": "{}", "dtype": "{}"}
    settings = [names[key].format(value) for key, value in combination.items()]
    goal = row.get("goal")
    goal = goal[combination["classes"]] if isinstance(goal, dict) else goal
    low, median, high = (
        float(f"{value:.4g}") for value in np.quantile(result, [0.25, 0.5, 0.75])
    )
    return {
        "what": ", ".join([row["what"], *settings]),
        "median": median,
        "low": low,
        "high": high,
        "unit": row.get("unit", "x"),
        "goal": goal,
    }


def measure(group: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a group."""
    rows = []
    for combination, settings in combinations(group, args):
        runs = {name: MEASURES[run.measure](run) for name, run in settings.items()}
        first = next(iter(settings.values()))
        values = interleaved(runs, args.device, first.repetitions)
        for row in group["rows"]:
            rows.append(table_row(row, values, combination, first))
            message = "  {what}: {median:g} ({low:g} to {high:g}) {unit}"
            print(message.format(**rows[-1]), flush=True)
        del runs
    return rows


def environment(args: argparse.Namespace) -> str:
    """Say where the numbers come from."""
    where = torch.cuda.get_device_name() if args.device == "cuda" else processor(args)
    where += f"; torch {torch.__version__}, Python {platform.python_version()}"
    return f"{where}, `--small`: the numbers mean nothing" if args.small else where


def processor(args: argparse.Namespace) -> str:
    """Name the processor, its cores and the threads that are used."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search("model name.*: (.+)", text)
    name = found[1] if found else platform.machine()
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    return f"{name}, {os.cpu_count()} cores, {threads}"


def write(results: dict[str, Any], folder: Path) -> None:
    """Write `results.json` and the page with the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*FILE["groups"], *FILE["gpu_groups"]]
    order = [key for name in names for key in (name, f"{name} (GPU)")]
    results = {key: results[key] for key in order if key in results}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "RESULTS.md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """Return the page in Markdown: a table for every machine, and what is still to be measured."""
    text = PAGE
    missing = [name for name in FILE["groups"] if name not in results]
    if missing:
        text += f"\nNot measured yet: `python -m benchmarks.speed.run --rows {' '.join(missing)}`.\n"
    places = defaultdict(list)
    for group in results.values():
        places[group["device"], group["environment"]] += map(_cells, group["rows"])
    for (device, place), rows in places.items():
        text += f"\n## {'GPU' if device == 'cuda' else 'CPU'}: {place}\n\n"
        text += markdown_table(HEADS, rows) + "\n"
    return text if any(device == "cuda" for device, _ in places) else text + NO_GPU


def _cells(row: dict[str, Any]) -> list[str]:
    unit = "" if row["unit"] in ("x", "") else f" {row['unit']}"
    median, low, high = (_digits(row[name]) for name in ("median", "low", "high"))
    goal = met = ""
    if row["goal"] is not None:
        met = "yes" if row["median"] <= row["goal"] else "**no**"
        goal = f"{row['goal']:g}{unit}"
    return [row["what"], f"{median}{unit}", f"{low} to {high}", goal, met]


def _digits(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"


def main(argv: list[str] | None = None) -> None:
    """Measure, and write after every group."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", help="groups of rows.yaml; default: `groups`")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    add("--small", action="store_true", help="sizes for a test")
    add("--output", type=Path, default=HERE, help="folder of results.json, RESULTS.md")
    add("--report", action="store_true", help="only write and print the page")
    args = parser.parse_args(argv)
    kept = args.output / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    if args.report:
        write(results, args.output)
        print(page(results))
        return
    torch.set_num_threads(args.threads)
    gc.freeze()  # or every collection looks through all that was imported
    warnings.filterwarnings("ignore", category=UserWarning)
    groups = FILE["groups"] | FILE["gpu_groups"]
    for name in args.rows or FILE["groups"]:
        print(name, flush=True)
        rows = measure(groups[name], args)
        on_cpu = args.device == "cpu" or name in FILE["gpu_groups"]
        where = {"device": args.device, "environment": environment(args)}
        results[name if on_cpu else f"{name} (GPU)"] = where | {"rows": rows}
        write(results, args.output)


if __name__ == "__main__":
    main()
