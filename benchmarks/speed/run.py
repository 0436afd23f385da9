# SPDX-License-Identifier: Apache-2.0
"""Measure what the adapter, the loss and their tools cost, as ratios taken side by side in one run.

    python benchmarks/speed/run.py
    python benchmarks/speed/run.py --rows training inference --blocks 2      # a quick look
    python benchmarks/speed/run.py --device cuda --batch-size 64

Results go to a JSON file, row by row; rows that are not asked for keep what the file has. Then the page with the table
and the figures is written from it (`results_page.py` does that alone).
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


# Has to come before torch. Waiting threads that spin would take the other processes' time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from attention_rows import attention
from loading_rows import loading
from loss_rows import loss, mismatch
from memory_rows import memory
from results_page import write_page
from settings import Measurement, Settings
from text_rows import text
from towers_rows import inference, ranks, tokens, training


HERE = Path(__file__).resolve().parent


def data(settings: Settings) -> Measurement:
    """Import on demand: the example's requirements are needed for this row only."""
    from data_rows import data

    return data(settings)


ROWS: dict[str, Callable[[Settings], Measurement]] = {
    "training": training,
    "inference": inference,
    "memory": memory,
    "attention": attention,
    "loading": loading,
    "text": text,
    "loss": loss,
    "mismatch": mismatch,
    "data": data,
    "tokens": tokens,
    "ranks": ranks,
}


def environment(settings: Settings) -> dict[str, Any]:
    """Say where the numbers come from."""
    device = torch.cuda.get_device_name() if settings.device == "cuda" else _processor()
    return {"device": device, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """Parse the command line. Every attribute of the settings is a flag."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--json", type=Path, help="default: results.json beside the page")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md", help="the page; figures go beside it")
    for field in dataclasses.fields(Settings):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, tuple):
            parser.add_argument(flag, type=int, nargs="+", default=default)
        else:
            parser.add_argument(flag, type=type(default), default=default)
    args = parser.parse_args(argv)
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    args.json = args.json or args.output.with_name("results.json")
    return args, settings


def main(argv: list[str] | None = None) -> None:
    """Measure, and write after every row."""
    args, settings = parse_args(argv)
    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.rows:
        print(f"{name} ...", flush=True)
        rows, points = ROWS[name](settings)
        results[name] = {
            "environment": environment(settings),
            "settings": dataclasses.asdict(settings),
            "rows": [dataclasses.asdict(row) for row in rows],
            "points": [dataclasses.asdict(point) for point in points],
        }
        for row in rows:
            print(f"  {row.what}: {row.median:.3f} ({row.low:.3f} to {row.high:.3f}) {row.note}", flush=True)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    write_page(args.json, args.output)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
