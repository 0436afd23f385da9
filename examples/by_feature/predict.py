# SPDX-License-Identifier: Apache-2.0
"""Predict what is in images, with a trained model from a folder or the Hub.

    python predict.py finetuned photos_new --top-k 3 --output answers.csv

Folders are searched recursively, and images that cannot be read are listed at the end. The output (.csv, .json or
.parquet) has the columns path, label, score, runner_up_label and runner_up_score.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from peft_sage import SageClassifier, find_images


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="folder or Hub id")
    add("images", nargs="+", help="files, or folders of them")
    add("--top-k", type=int, default=1, help="classes to print per image (default: 1)")
    add("--output", type=Path, help="table of the answers: .csv, .json or .parquet")
    add("--batch-size", type=int, default=32, help="images per step (default: 32)")
    args = parser.parse_args()
    if args.output and args.output.suffix not in (".csv", ".json", ".parquet"):
        parser.error(f"--output must end in .csv, .json or .parquet, got {args.output}")
    return args


def write_table(path: Path, table: pd.DataFrame) -> None:
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".json":
        table.to_json(path, orient="records", indent=1)
    else:
        table.to_parquet(path, index=False)


def predict(args: argparse.Namespace) -> None:
    paths = find_images(args.images, recursive=True)
    classifier = SageClassifier.from_pretrained(args.model)
    answers = classifier.predict(
        paths,
        top_k=max(args.top_k, 2),
        batch_size=args.batch_size,
        on_error="skip",
    )
    rows = []
    for path, answer in zip(paths, answers, strict=True):
        row = {"path": str(path)}
        rows.append(row)
        if answer is None:
            continue
        names = [
            f"{name['label']} {100 * name['score']:.1f}%"
            for name in answer[: args.top_k]
        ]
        print(f"{path}: {', '.join(names)}")
        for name, prefix in zip(answer[:2], ("", "runner_up_"), strict=False):
            row[prefix + "label"] = name["label"]
            row[prefix + "score"] = name["score"]
    if args.output:
        write_table(args.output, pd.DataFrame(rows))


if __name__ == "__main__":
    try:
        predict(parse_args())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
