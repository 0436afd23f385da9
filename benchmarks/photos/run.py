# SPDX-License-Identifier: Apache-2.0
"""Third step of the photograph test bed: the runs of an experiment.

python run.py WORK experiments/methods.yaml --jobs 2

WORK is where `prepare.py` and `pretrain.py` have been. Each run adds a line to `results/EXPERIMENT.jsonl`. A run whose
line exists is not done again, so the command can be stopped and given again; a run of another experiment with the same
settings is copied. Arms with `vary` are a grid; `choose: GRID` takes the settings with the best macro accuracy on the
validation split from a grid of an experiment whose name starts with "grid".
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rivals
import torch
import yaml
from bed import keep_memory
from methods import (
    Settings,
    accuracies,
    load_data,
    prior_strength,
    train_head,
    train_tower,
)
from tables import best_arm, read_results


HERE = Path(__file__).parent
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

    @property
    def key(self) -> str:
        """What tells runs apart, whatever they are called."""
        text = json.dumps([self.task, self.ratio, self.seed, asdict(self.settings)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(self, work: Path) -> dict[str, Any]:
        """Do it and return its line."""
        data = load_data(work, self.task, self.ratio, self.seed)
        prior = (
            prior_strength(self.settings.text_prior, data)
            if self.settings.method in ("adapter", "head")
            else 0
        )
        began = time.perf_counter()
        if self.settings.method in FROZEN:
            logits = FROZEN[self.settings.method](self.settings, data, self.seed)
        else:
            logits = train_tower(self.settings, data, work, self.task, self.seed)
        seconds = round(time.perf_counter() - began, 1)
        scores = {
            name: accuracies(rows, getattr(data.task, name), data.counts)
            for name, rows in logits.items()
        }
        return {
            **asdict(self),
            "key": self.key,
            "strength": prior,
            **scores,
            "seconds": seconds,
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
    for task, ratio, seed in itertools.product(
        experiment["tasks"], experiment["ratios"], experiment["seeds"]
    ):
        for group, arm in experiment["arms"].items():
            arm = dict(arm or {})
            if "choose" in arm:
                lines = [
                    line
                    for file in results.glob("grid*.jsonl")
                    for line in read_results(file)
                ]
                grid = [line for line in lines if line["ratio"] == ratio]
                arm = best_arm(grid, task, arm.pop("choose"))["settings"] | arm
            for name, settings in variants(group, arm):
                settings = {
                    key: tuple(value) if key == "rates" else value
                    for key, value in settings.items()
                }
                yield Run(group, name, task, ratio, seed, Settings(**settings))


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
    parser.add_argument("experiment", type=Path, help="YAML file of the runs")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder of the results"
    )
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=int,
        help="only these ratios of the largest to the smallest class",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    experiment = yaml.safe_load(arguments.experiment.read_text())
    experiment |= {
        name: getattr(arguments, name)
        for name in ("tasks", "ratios")
        if getattr(arguments, name)
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / f"{arguments.experiment.stem}.jsonl"
    runs = list(plan(experiment, arguments.results))
    own = {(line["key"], line["arm"]) for line in read_results(file)}
    missing = [run for run in runs if (run.key, run.arm) not in own]
    known = {
        line["key"]: line
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
            told = [line[name] for name in ("task", "ratio", "seed", "arm", "seconds")]
            print(*told, line["validation"]["macro"], flush=True)


if __name__ == "__main__":
    main()
