# SPDX-License-Identifier: Apache-2.0
"""Run an experiment: every combination of its YAML file, in worker processes, as JSON lines; resumable.

python benchmarks/longtail/run.py benchmarks/longtail/experiments/methods.yaml --workers 2
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import yaml
from tqdm.auto import tqdm


HERE = Path(__file__).resolve().parent


def expand(experiment: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the specifications of an experiment.

    Args:
        experiment: `base` (fields of all runs), `grids` (a list of dictionaries whose lists are multiplied out;
            `each` takes whole dictionaries of fields instead) and `seeds` (a number).
    """
    specs = []
    for grid in experiment["grids"]:
        axes = [[{name: value} for value in values] for name, values in grid.items() if name != "each"]
        axes.append(grid.get("each", [{}]))
        for fields in itertools.product(*axes):
            for seed in range(experiment.get("seeds", 1)):
                spec = dict(experiment.get("base", {}))
                for field in fields:
                    spec.update(field)
                specs.append({**spec, "seed": seed})
    unique = {key_of(spec): spec for spec in specs}
    return list(unique.values())


def key_of(spec: dict[str, Any]) -> str:
    """Return a short name of a specification, the same for equal ones."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def worker(settings: dict[str, Any], tasks: Any, results: Any) -> None:
    """Run specifications from a queue until it gives `None`."""
    sys.path.insert(0, str(HERE))
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    from training import Bench, run

    bench = Bench(**settings)
    while (spec := tasks.get()) is not None:
        try:
            results.put((spec, run(spec, bench)))
        except Exception as error:  # one bad specification must not end the others
            results.put((spec, {"error": f"{type(error).__name__}: {error}"}))


def main() -> None:
    """Run what the output file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="YAML file")
    parser.add_argument("--output", type=Path, help="JSON lines; default: results/<experiment>.jsonl beside this file")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--styles", help="parquet file with the unseen drawing styles")
    parser.add_argument("--checkpoint", help="folder of a CLIP with a tokenizer; default: the demo's")
    parser.add_argument("--limit", type=int, help="run at most so many")
    args = parser.parse_args()
    output = args.output or HERE / "results" / f"{args.experiment.stem}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if output.exists():
        done = {key_of(json.loads(line)["spec"]) for line in output.read_text().splitlines()}
    specs = [spec for spec in expand(yaml.safe_load(args.experiment.read_text())) if key_of(spec) not in done]
    specs = specs[: args.limit]

    settings = {"device": args.device, "styles": args.styles, "checkpoint": args.checkpoint}
    context = mp.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for spec in specs:
        tasks.put(spec)
    processes = []
    for _ in range(min(args.workers, len(specs))):
        tasks.put(None)
        processes.append(context.Process(target=worker, args=(settings, tasks, results), daemon=True))
        processes[-1].start()
    failed = 0
    with output.open("a") as file:
        for _ in tqdm(specs, desc=args.experiment.stem):
            spec, figures = results.get()
            if "error" in figures:
                print(f"{spec}: {figures['error']}", file=sys.stderr)
                failed += 1
                continue
            file.write(json.dumps({"spec": spec, **figures}) + "\n")
            file.flush()
    for process in processes:
        process.join()
    if failed:
        sys.exit(f"{failed} of {len(specs)} runs failed.")


if __name__ == "__main__":
    main()
