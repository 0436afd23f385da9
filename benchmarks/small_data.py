# SPDX-License-Identifier: Apache-2.0
"""Sage's defaults against LIFT's recipe on small data sets, by `examples/finetune.py` itself.

    python benchmarks/small_data.py emoji --output-dir small-data
    python benchmarks/small_data.py digits --output-dir small-data
    python benchmarks/small_data.py drawings --styles FOLDER --output-dir small-data

`emoji` is the embedded demo; `digits` are the handwritten digits of scikit-learn, with a long tail; `drawings` are
those of Emoji-LT's test concepts by makers that no training image is of, rendered by
`examples/emoji_lt/build/build_dataset.py --styles`, predicted by the models of `emoji`.
LIFT's recipe (AdaptFormer, logit adjustment) gets the learning
rate and the tau that are best on the validation split with seed 0: of three learning rates at tau 1, then of three
taus. Sage has nothing to choose. Finished runs are kept, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from scipy import stats

from peft_sage import LongTailAccuracy, SageClassifier


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "finetune.py"
SCORES = ("overall", "macro", "many", "medium", "few")
LIFT = ["--method", "adaptformer", "--loss", "la"]
LEARNING_RATES, TAUS = ("0.0005", "0.002", "0.005"), ("0.75", "1", "1.25")


def write_digits(folder: Path) -> Path:
    """Write the digits of scikit-learn (UCI, 1,797 images) as parquet: half train, a quarter each the others."""
    from sklearn.datasets import load_digits

    digits, names = (
        load_digits(),
        [
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
        ],
    )
    order = np.random.default_rng(0).permutation(len(digits.target))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
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
    (folder / "descriptions.json").write_text(
        json.dumps(
            {
                name: [f"the digit {name}", f"the number {i}"]
                for i, name in enumerate(names)
            }
        )
    )
    return folder


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).resize(
        (48, 48), Image.Resampling.BICUBIC
    ).save(file, "png")
    return file.getvalue()


def run(data: list[str], folder: Path, flags: list[str], seed: int) -> dict:
    """Return the results of a run of the example, and do it first if it was not done."""
    output = folder / "_".join([*(flag.lstrip("-") for flag in flags), f"seed_{seed}"])
    if not (output / "results.json").exists():
        command = [
            sys.executable,
            str(EXAMPLE),
            *data,
            *flags,
            "--seed",
            str(seed),
            "--output-dir",
            str(output),
        ]
        subprocess.run(
            [*command, "--cpu-threads", "1"], check=True, stdout=subprocess.DEVNULL
        )
    return json.loads((output / "results.json").read_text()) | {"folder": output}


def validation_macro(results: dict) -> float:
    """The best one."""
    return max(scores["macro"] for scores in results["validation"])


def choose(data: list[str], folder: Path, pool: ThreadPoolExecutor) -> list[str]:
    """Return LIFT's recipe with the learning rate and the tau that are best on the validation split."""
    chosen: list[str] = []
    for flag, values in (("--lr", LEARNING_RATES), ("--tau", TAUS)):
        tried = [[*LIFT, *chosen, flag, value] for value in values]
        scores = list(
            pool.map(lambda flags: validation_macro(run(data, folder, flags, 0)), tried)
        )
        chosen += [flag, values[int(np.argmax(scores))]]
        told = ", ".join(
            f"{value}: {score:.1f}" for value, score in zip(values, scores, strict=True)
        )
        print(f"LIFT's recipe, validation macro by {flag}: {told}")
    return [*LIFT, *chosen]


@torch.no_grad()
def on_other_images(results: dict, parquet: Path) -> dict:
    """Return the results with the test accuracies on other images of the same classes."""
    table = datasets.load_dataset("parquet", data_files=str(parquet), split="train")
    scores = {}
    texts = dict(
        zip(results["class_names"], results["class_descriptions"], strict=True)
    )
    base = SageClassifier.from_texts(results["settings"]["model"], texts)
    for key, model in (
        ("zero_shot", base),
        ("trained", SageClassifier.from_pretrained(results["folder"])),
    ):
        answers = model.predict(table["image"], batch_size=256)
        predicted = torch.tensor(
            [results["class_names"].index(answer[0]["label"]) for answer in answers]
        )
        accuracy = LongTailAccuracy(results["class_counts"])
        accuracy.update(predicted, torch.tensor(table["label"]))
        scores[key] = {name: 100 * accuracy.compute()[name].item() for name in SCORES}
    return results | scores


def table(sage: list[dict], lift: list[dict]) -> str:
    """Return the accuracies, mean and standard error over seeds, and the paired differences."""
    names = [
        name for name in SCORES if sage[0]["trained"][name] is not None
    ]  # a group may have no class
    zero_shot, *arms = (
        np.array([[r[key][name] for name in names] for r in runs])
        for key, runs in (("zero_shot", sage[:1]), ("trained", lift), ("trained", sage))
    )
    rows = {"zero-shot": [f"{value:.1f}" for value in zero_shot[0]]}
    for title, scores in zip(
        ("LIFT's recipe, at its best", "**Sage, defaults**"), arms, strict=True
    ):
        rows[title] = [
            f"{m:.1f} ± {e:.1f}"
            for m, e in zip(scores.mean(0), stats.sem(scores), strict=True)
        ]
    for title, against in (
        ("Sage - LIFT's recipe", arms[0]),
        ("Sage - zero-shot", zero_shot),
    ):
        difference = arms[1] - against
        p = stats.ttest_1samp(difference, 0).pvalue
        values = zip(difference.mean(0), stats.sem(difference), p, strict=True)
        rows[title] = [f"{m:+.1f} ± {e:.1f} (p {p:.2g})" for m, e, p in values]
    lines = [
        f"| test accuracy, %, {len(sage)} seeds | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    return "\n".join(
        lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()]
    )


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
        runs = [[on_other_images(results, other) for results in arm] for arm in runs]
    lift, sage = runs
    print(f"text prior chosen: {[r['text_prior'] for r in sage]}\n")
    print(table(sage, lift))


if __name__ == "__main__":
    main()
