# SPDX-License-Identifier: Apache-2.0
"""Last step of the photograph test bed: the picture of the README, accuracy over class frequency.

python -m benchmarks.photos.picture WORK docs/photos.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from .bed import keep_memory
from .data import LARGEST, load_data
from .methods import Settings, train_tower
from .results import HERE, best_arm, read_results
from .rivals import zero_shot


SHAPE = "4x192"
TITLES = {
    "A": "A: classes that the model hardly knows by name",
    "B": "B: classes that it knows by name",
}


def by_frequency(
    work: Path,
    task: str,
    settings: Settings,
    seeds: range,
) -> np.ndarray:
    """Test accuracy (K,) of the classes from the most to the least frequent, mean over seeds."""
    curves = []
    for seed in seeds:
        data = load_data(work, task, SHAPE, 100, seed, 0)
        if settings.method == "zero-shot":
            logits = zero_shot(settings, data, seed)["test"]
        else:
            logits = train_tower(settings, data, seed)["test"]
        labels = torch.as_tensor(data.task.test.labels)
        right = (logits.argmax(dim=1) == labels).double()
        accuracy = torch.bincount(labels, right) / torch.bincount(labels)
        curves.append(
            accuracy[data.counts.argsort(descending=True, stable=True)].numpy()
        )
    return 100 * np.mean(curves, axis=0)


def main() -> None:
    """Run the three methods and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    grid = [
        line
        for file in HERE.glob("results/grid-tau*.jsonl")
        for line in read_results(file)
    ]
    grid = [line for line in grid if line["ratio"] == 100]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, (task, title) in zip(figure.subplots(1, 2), TITLES.items(), strict=True):
        lift = best_arm(grid, task, "LIFT")["settings"]
        methods = {"zero-shot": Settings(method="zero-shot"), "Sage": Settings()}
        methods["LIFT's recipe"] = Settings(**lift | {"rates": tuple(lift["rates"])})
        for (name, settings), style in zip(
            methods.items(), ("0.6", "C3", "C0"), strict=True
        ):
            curve = by_frequency(args.work, task, settings, range(args.seeds))
            images = LARGEST[task] * 0.01 ** (np.arange(len(curve)) / (len(curve) - 1))
            smooth = np.convolve(
                np.pad(curve, 10, mode="edge"), np.full(21, 1 / 21), mode="valid"
            )
            axis.plot(images.clip(min=1), smooth, color=style, label=name)
        axis.set(
            xscale="log",
            title=title,
            xlabel="training images of the class",
            ylabel="test accuracy, %",
        )
        axis.invert_xaxis()
        axis.legend()
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
