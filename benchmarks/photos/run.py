# SPDX-License-Identifier: Apache-2.0
"""Third step of the photograph test bed: the runs of an experiment.

python -m benchmarks.photos.run WORK experiments/methods.yaml --jobs 2

WORK is where `prepare` and `pretrain` have been. Each run adds a line to `results/EXPERIMENT.jsonl`. A run whose line
exists is not repeated, so the command can be stopped and given again; a run of another experiment with the same
settings is copied. Arms with `vary` are a grid; `choose: GRID` takes the settings with the best macro accuracy on the
validation split from a grid of an experiment whose name starts with "grid".
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from . import rivals
from .bed import keep_memory
from .data import load_data
from .methods import (
    Settings,
    absent_count,
    accuracies,
    prior_strength,
    train_head,
    train_tower,
)
from .results import HERE, best_arm, find, read_results


FROZEN = {
    "zero-shot": rivals.zero_shot,
    "head": train_head,
    "clap": rivals.clap,
    "tip-adapter": rivals.tip_adapter,
    "gda": rivals.gda,
}


@dataclass(frozen=True)
class Run:
    """One line of the results to be."""

    group: str  # The arm as the experiment names it,
    arm: str  # and with what varies in it.
    task: str
    ratio: int
    seed: int
    settings: Settings
    tower: str = "4x192"  # Its depth and width.

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Run:
        """The run that a line of the results tells of."""
        names = ("group", "arm", "task", "ratio", "seed")
        settings = Settings(
            **line["settings"] | {"rates": (*line["settings"]["rates"],)}
        )
        tower = line.get("tower", cls.tower)
        return cls(*(line[name] for name in names), settings, tower)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells runs apart, whatever they are called."""
        return self.task, self.tower, self.ratio, self.seed, self.settings

    def __call__(self, work: Path) -> dict[str, Any]:
        """Do it and return its line."""
        settings = self.settings
        data = load_data(
            work, self.task, self.tower, self.ratio, self.seed, settings.without_images
        )
        learns = settings.method in ("adapter", "head")
        prior = prior_strength(settings, data) if learns else 0
        began = time.perf_counter()
        if settings.method in FROZEN:
            logits = FROZEN[settings.method](settings, data, self.seed)
        else:
            logits = train_tower(settings, data, self.seed)
        seconds = round(time.perf_counter() - began, 1)
        return {
            **asdict(self),
            "strength": prior,
            "absent": absent_count(settings.absent, data),
            **scores(logits, data),
            "seconds": seconds,
        }


def scores(logits: dict[str, Any], data: Any) -> dict[str, Any]:
    """Accuracies in per cent where logits stand; what is nested stays nested."""
    return {
        name: scores(rows, data)
        if isinstance(rows, dict)
        else accuracies(rows, getattr(data.task, name), data.counts)
        for name, rows in logits.items()
    }


def variants(group: str, arm: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and settings of an arm: several if something varies in it."""
    varied = arm.pop("vary", {})
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        yield (
            ", ".join([group, *(f"{name} {value}" for name, value in chosen.items())]),
            arm | chosen,
        )


def plan(experiment: dict[str, Any], results: Path) -> Iterator[Run]:
    """The runs of an experiment, seed by seed, so that what has been done at any time is paired."""
    grids = [
        line for file in results.glob("grid*.jsonl") for line in read_results(file)
    ]
    towers = experiment.get("towers", [Run.tower])
    for seed, task, tower, ratio in itertools.product(
        experiment["seeds"], experiment["tasks"], towers, experiment["ratios"]
    ):
        for group, arm in experiment["arms"].items():
            arm = dict(arm or {})
            if "choose" in arm:
                grid = [
                    line
                    for line in grids
                    if line["ratio"] == ratio and line.get("tower", Run.tower) == tower
                ]
                arm = best_arm(grid, task, arm.pop("choose"))["settings"] | arm
            for name, settings in variants(group, arm):
                if "rates" in settings:
                    settings["rates"] = tuple(settings["rates"])
                yield Run(group, name, task, ratio, seed, Settings(**settings), tower)


def do(job: tuple[Run, Path]) -> dict[str, Any]:
    """Do a run in another process."""
    run, work = job
    return run(work)


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` by this process or by several others."""
    if jobs == 1:
        prepare_process()
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(jobs, prepare_process) as pool:
        yield pool.imap_unordered


def prepare_process() -> None:
    """One thread a process: threads that wait for each other are slow where others use the cores too."""
    torch.set_num_threads(1)
    keep_memory()


def main() -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the towers and tasks")
    parser.add_argument("experiment", type=find, help="YAML file of the runs")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder of the results"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--towers", nargs="+", help="only these towers, as 12x192")
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=int,
        help="only these ratios of the largest to the smallest class",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    experiment = yaml.safe_load(arguments.experiment.read_text())
    for name in ("seeds", "tasks", "towers", "ratios"):
        experiment[name] = getattr(arguments, name) or experiment.get(name, [Run.tower])
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / f"{arguments.experiment.stem}.jsonl"
    finished = {(Run.from_line(line).key, line["arm"]) for line in read_results(file)}
    runs = plan(experiment, arguments.results)
    missing = [run for run in runs if (run.key, run.arm) not in finished]
    known = {
        Run.from_line(line).key: line
        for path in arguments.results.glob("*.jsonl")
        for line in read_results(path)
    }
    with file.open("a") as lines, workers(arguments.jobs) as map_runs:
        copied = [
            known[run.key] | {"group": run.group, "arm": run.arm}
            for run in missing
            if run.key in known
        ]
        new = [(run, arguments.work) for run in missing if run.key not in known]
        for line in itertools.chain(copied, map_runs(do, new)):
            print(json.dumps(line), file=lines, flush=True)
            shown = ("task", "tower", "ratio", "seed", "arm", "seconds")
            accuracy = line["validation"]["macro"]
            print(*(line.get(name) for name in shown), accuracy, flush=True)


if __name__ == "__main__":
    main()
