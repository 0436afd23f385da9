# SPDX-License-Identifier: Apache-2.0
"""Sage's defaults against LIFT's recipe on small data sets, by `examples/finetune.py` itself.

    python -m benchmarks.small_data emoji --output-dir small-data
    python -m benchmarks.small_data digits --output-dir small-data
    python -m benchmarks.small_data drawings --styles FOLDER --output-dir small-data

`emoji` is the embedded demo; `digits` are the handwritten digits of scikit-learn, with a long tail; `drawings` are
Emoji-LT with test images by makers that no training image is of, rendered by
`examples/emoji_lt/build/build_dataset.py --styles`.
LIFT's recipe (AdaptFormer, logit adjustment) gets the learning rate and the tau that are best on the validation split
with seed 0: of three learning rates at tau 1, then of three taus. Sage has nothing to choose. All is in float32.
Finished runs are kept, so the command can be stopped and given again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import Resampling, fromarray
from scipy import stats
from sklearn.datasets import load_digits

from peft_sage.report import Evaluation, RunResults

from .markdown import markdown_table


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCORES = ("overall", "macro", "many", "medium", "few")
LIFT = ["--method", "adaptformer", "--loss", "la", "--choose-adapter-scale", "false"]
TRIED = {"--lr": ("0.0005", "0.002", "0.005"), "--tau": ("0.75", "1", "1.25")}
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


def write_digits(folder: Path) -> None:
    """Write the digits of scikit-learn (UCI, 1,797 images) as parquet: half train, a quarter each the others."""
    digits = load_digits()
    images = [
        fromarray(pixels).resize((48, 48), Resampling.BICUBIC)
        for pixels in (255 - digits.images * (255 / 16)).round().astype(np.uint8)
    ]
    features = Features(image=Image(), label=ClassLabel(names=DIGITS))
    data = Dataset.from_dict({"image": images, "label": digits.target}, features)
    order = np.random.default_rng(0).permutation(len(data))
    folder.mkdir(parents=True, exist_ok=True)
    train, validation, test = np.split(order, [898, 1348])
    for split, rows in (("train", train), ("validation", validation), ("test", test)):
        data.select(rows).to_parquet(folder / f"{split}.parquet")
    texts = {
        name: [f"the digit {name}", f"the number {i}"] for i, name in enumerate(DIGITS)
    }
    (folder / "descriptions.json").write_text(json.dumps(texts))


def write_drawings(folder: Path, styles: Path) -> None:
    """Write the demo with drawings by other makers as its test images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.parquet", "validation.parquet", "descriptions.json"):
        shutil.copy(EXAMPLES / "emoji_lt" / name, folder)
    shutil.copy(styles / "unseen_styles.parquet", folder / "test.parquet")


def run(
    data: list[str],
    folder: Path,
    flags: list[str],
    seed: int,
) -> RunResults:
    """Return the results of a run of the example, after doing it if they are not there."""
    name = "_".join([*(flag.lstrip("-") for flag in flags), f"seed_{seed}"])
    output = folder / name
    if not (output / "results.json").exists():
        command = [sys.executable, str(EXAMPLES / "finetune.py"), *data, *flags]
        command += ["--bf16", "false", "--seed", str(seed), "--output-dir", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return RunResults.load(output)


def choose(
    data: list[str],
    folder: Path,
    pool: ThreadPoolExecutor,
) -> list[str]:
    """Return LIFT's recipe with the learning rate and the tau that are best on the validation split."""

    def best_macro(flags: list[str]) -> float:
        validation = run(data, folder, flags, 0).validation
        return max(scores["macro"] for scores in validation)

    flags = LIFT
    for flag, values in TRIED.items():
        scores = list(pool.map(best_macro, [[*flags, flag, x] for x in values]))
        flags = [*flags, flag, values[int(np.argmax(scores))]]
        pairs = zip(values, scores, strict=True)
        message = ", ".join(f"{value}: {score:.1f}" for value, score in pairs)
        print(f"LIFT's recipe, validation macro by {flag}: {message}")
    return flags


def table(sage: list[RunResults], lift: list[RunResults]) -> str:
    """Return the accuracies, mean and standard error over seeds, and the paired differences."""
    # A group may have no class.
    names = [name for name in SCORES if getattr(sage[0].trained, name) is not None]

    def scores(evaluations: list[Evaluation]) -> np.ndarray:
        return np.array([[getattr(one, name) for name in names] for one in evaluations])

    zero_shot = scores([sage[0].zero_shot])
    theirs, ours = (scores([run.trained for run in runs]) for runs in (lift, sage))
    rows = [["zero-shot", *(f"{value:.1f}" for value in zero_shot[0])]]
    mean = "{:.1f} ± {:.1f}"
    gap = "{:+.1f} ± {:.1f} (p {:.2g})"
    for title, values, cell in (
        ("LIFT's recipe, at its best", theirs, mean),
        ("**Sage, defaults**", ours, mean),
        ("Sage - LIFT's recipe", ours - theirs, gap),
        ("Sage - zero-shot", ours - zero_shot, gap),
    ):
        p_values = stats.ttest_1samp(values, 0).pvalue
        columns = zip(values.mean(0), stats.sem(values), p_values, strict=True)
        rows.append([title, *(cell.format(*numbers) for numbers in columns)])
    return markdown_table([f"test accuracy, %, {len(sage)} seeds", *names], rows)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", choices=["emoji", "digits", "drawings"])
    add("--seeds", type=int, default=5)
    add("--output-dir", type=Path, default=Path("small-data"))
    add("--styles", type=Path, help="folder with unseen_styles.parquet (drawings)")
    add("--workers", type=int, default=2, help="runs at once, one thread each")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of each run
    folder = args.output_dir / args.data
    written = args.output_dir / f"{args.data}-data"
    data = ["--dataset", str(written)]
    if args.data == "digits":
        write_digits(written)
        data += ["--imbalance-ratio", "20"]
    elif args.data == "drawings":
        write_drawings(written, args.styles)
    else:
        data = []
    with ThreadPoolExecutor(args.workers) as pool:
        lift, sage = (
            list(pool.map(partial(run, data, folder, flags), range(args.seeds)))
            for flags in (choose(data, folder, pool), [])
        )
    print(f"text prior chosen: {[run.text_prior for run in sage]}\n")
    print(table(sage, lift))


if __name__ == "__main__":
    main()
