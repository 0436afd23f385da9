# SPDX-License-Identifier: Apache-2.0
"""Sage's defaults against LIFT's recipe on small data sets, by `examples/finetune.py` itself.

    python -m benchmarks.small_data emoji --output-dir small-data
    python -m benchmarks.small_data digits --output-dir small-data
    python -m benchmarks.small_data drawings --styles FOLDER --output-dir small-data

`emoji` is the embedded demo; `digits` are the handwritten digits of scikit-learn, with a long tail; `drawings` are
those of Emoji-LT's test concepts by makers that no training image is of, rendered by
`examples/emoji_lt/build/build_dataset.py --styles`, predicted by the models of `emoji`.
LIFT's recipe (AdaptFormer, logit adjustment) gets the learning rate and the tau that are best on the validation split
with seed 0: of three learning rates at tau 1, then of three taus. Sage has nothing to choose. Finished runs are kept,
so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from scipy import stats

from peft_sage import SageClassifier
from peft_sage.report import Evaluation, RunResults

from .markdown import markdown_table


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "finetune.py"
SCORES = ("overall", "macro", "many", "medium", "few")
LIFT = ["--method", "adaptformer", "--loss", "la", "--choose-adapter-scale", "false"]
LEARNING_RATES = ("0.0005", "0.002", "0.005")
TAUS = ("0.75", "1", "1.25")
DIGITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
]


def write_digits(folder: Path) -> Path:
    """Write the digits of scikit-learn (UCI, 1,797 images) as parquet: half train, a quarter each the others."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=DIGITS)}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(
        ("train", "validation", "test"), np.split(order, [898, 1348]), strict=True
    ):
        images = [_png(255 - digits.images[row] * (255 / 16)) for row in rows]
        data = {
            "image": [{"bytes": image, "path": None} for image in images],
            "label": digits.target[rows].tolist(),
        }
        datasets.Dataset.from_dict(data, features).to_parquet(
            folder / f"{split}.parquet"
        )
    texts = {
        name: [f"the digit {name}", f"the number {i}"] for i, name in enumerate(DIGITS)
    }
    (folder / "descriptions.json").write_text(json.dumps(texts))
    return folder


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels.round().astype(np.uint8))
    image.resize((48, 48), Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


def output_folder(folder: Path, flags: list[str], seed: int) -> Path:
    """Where a run's results are kept."""
    return folder / "_".join([*(flag.lstrip("-") for flag in flags), f"seed_{seed}"])


def run(data: list[str], folder: Path, flags: list[str], seed: int) -> RunResults:
    """Return the results of a run of the example, after doing it if they are not there."""
    output = output_folder(folder, flags, seed)
    if not (output / "results.json").exists():
        command = [sys.executable, str(EXAMPLE), *data, *flags]
        command += ["--seed", str(seed), "--output-dir", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return RunResults.load(output)


def choose(data: list[str], folder: Path, pool: ThreadPoolExecutor) -> list[str]:
    """Return LIFT's recipe with the learning rate and the tau that are best on the validation split."""

    def best_macro(flags: list[str]) -> float:
        validation = run(data, folder, flags, 0).validation
        return max(scores["macro"] for scores in validation)

    chosen: list[str] = []
    for flag, values in (("--lr", LEARNING_RATES), ("--tau", TAUS)):
        tried = [[*LIFT, *chosen, flag, value] for value in values]
        scores = list(pool.map(best_macro, tried))
        chosen += [flag, values[int(np.argmax(scores))]]
        pairs = zip(values, scores, strict=True)
        message = ", ".join(f"{value}: {score:.1f}" for value, score in pairs)
        print(f"LIFT's recipe, validation macro by {flag}: {message}")
    return [*LIFT, *chosen]


@torch.no_grad()
def on_other_images(results: RunResults, folder: Path, parquet: Path) -> RunResults:
    """Return the results with the test accuracies on other images of the same classes."""
    table = datasets.load_dataset("parquet", data_files=str(parquet), split="train")
    names = results.class_names
    labels = list(table["label"])
    base = SageClassifier.from_texts(results.settings["model"], results.texts)
    evaluations = []
    for model in (base, SageClassifier.from_pretrained(folder)):
        answers = model.predict(table["image"], top_k=1, batch_size=256)
        predicted = torch.tensor([names.index(best["label"]) for best, *_ in answers])
        logits = torch.nn.functional.one_hot(predicted, len(names)).float()
        evaluations.append(Evaluation.from_logits(logits, labels, results.class_counts))
    return replace(results, zero_shot=evaluations[0], trained=evaluations[1])


def table(sage: list[RunResults], lift: list[RunResults]) -> str:
    """Return the accuracies, mean and standard error over seeds, and the paired differences."""
    # A group may have no class.
    names = [name for name in SCORES if getattr(sage[0].trained, name) is not None]

    def scores(evaluations: list[Evaluation]) -> np.ndarray:
        return np.array([[getattr(one, name) for name in names] for one in evaluations])

    zero_shot = scores([sage[0].zero_shot])
    theirs, ours = (scores([run.trained for run in runs]) for runs in (lift, sage))
    rows = [["zero-shot", *(f"{value:.1f}" for value in zero_shot[0])]]
    for title, values in (
        ("LIFT's recipe, at its best", theirs),
        ("**Sage, defaults**", ours),
    ):
        cells = zip(values.mean(0), stats.sem(values), strict=True)
        rows.append([title, *(f"{m:.1f} ± {e:.1f}" for m, e in cells)])
    for title, against in (
        ("Sage - LIFT's recipe", theirs),
        ("Sage - zero-shot", zero_shot),
    ):
        gap = ours - against
        p = stats.ttest_1samp(gap, 0).pvalue
        cells = zip(gap.mean(0), stats.sem(gap), p, strict=True)
        rows.append([title, *(f"{m:+.1f} ± {e:.1f} (p {p:.2g})" for m, e, p in cells)])
    return markdown_table([f"test accuracy, %, {len(sage)} seeds", *names], rows)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=["emoji", "digits", "drawings"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output-dir", type=Path, default=Path("small-data"))
    parser.add_argument(
        "--styles", type=Path, help="folder with unseen_styles.parquet (drawings)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="runs at the same time, one thread each"
    )
    args = parser.parse_args()
    data: list[str] = []
    if args.data == "digits":
        data = [
            "--dataset",
            str(write_digits(args.output_dir / "digits-data")),
            "--imbalance-ratio",
            "20",
        ]
    folder = args.output_dir / ("digits" if args.data == "digits" else "emoji")
    with ThreadPoolExecutor(args.workers) as pool:
        arms = [choose(data, folder, pool), []]
        runs = [
            list(pool.map(partial(run, data, folder, flags), range(args.seeds)))
            for flags in arms
        ]
    if args.data == "drawings":
        other = args.styles / "unseen_styles.parquet"
        runs = [
            [
                on_other_images(one, output_folder(folder, flags, seed), other)
                for seed, one in enumerate(arm)
            ]
            for flags, arm in zip(arms, runs, strict=True)
        ]
    lift, sage = runs
    print(f"text prior chosen: {[run.text_prior for run in sage]}\n")
    print(table(sage, lift))


if __name__ == "__main__":
    main()
