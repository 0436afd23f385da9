# SPDX-License-Identifier: Apache-2.0
"""Prints the zero-shot accuracy of a CLIP model on a split of Emoji-LT.

    python evaluate_zero_shot.py --split test

The interval redraws concepts within classes, since drawings of one concept are not independent.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import load_dataset

from peft_sage import LongTailAccuracy, SageClassifier


EMOJI_LT = Path(__file__).resolve().parents[1]
ROUNDS = 2000


def macro_interval(table: pd.DataFrame, seed: int = 0) -> tuple[float, float]:
    """Return the bootstrapped 95% interval of macro accuracy, concepts redrawn within each class.

    Args:
        table: Columns `label`, `concept` and `hit`, one row per image.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    accuracies = []
    for _, rows in table.groupby("label"):
        concepts = rows.groupby("concept")["hit"].agg(["sum", "count"]).to_numpy()
        drawn = rng.integers(len(concepts), size=(ROUNDS, len(concepts)))
        hits, images = concepts[drawn].sum(axis=1).T
        accuracies.append(hits / images)
    low, high = np.percentile(np.mean(accuracies, axis=0), (2.5, 97.5))
    return float(low), float(high)


def main() -> None:
    """Evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(EMOJI_LT / "tiny-clip"), help="folder or Hub id")
    add("--split", default="validation", help="name of a split, or a parquet file")
    args = parser.parse_args()

    emoji = load_dataset(str(EMOJI_LT))
    if args.split.endswith(".parquet"):
        images = load_dataset("parquet", data_files=args.split, split="train")
    else:
        images = emoji[args.split]
    texts = json.loads((EMOJI_LT / "descriptions.json").read_text(encoding="utf-8"))
    classifier = SageClassifier.from_texts(args.model, texts, templates=["{}"])
    logits = classifier.embed(images) @ classifier.text_embeds.T

    labels = torch.tensor(images["label"][:])
    accuracy = LongTailAccuracy(torch.tensor(emoji["train"]["label"][:]).bincount())
    accuracy.update(logits, labels)
    scores = accuracy.compute()
    hit = (logits.argmax(-1) == labels).numpy()
    table = {
        "label": labels.numpy(),
        "concept": images["concept"][:],
        "hit": hit,
    }
    low, high = macro_interval(pd.DataFrame(table))
    columns = ("macro", "many", "medium", "few", "overall")
    shown = [f"{100 * float(scores[name]):.1f}" for name in columns]
    print("| macro | 95% interval | many | medium | few | overall |")
    print("|---|---|---|---|---|---|")
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    print(f"| {' | '.join([shown[0], interval, *shown[1:]])} |")


if __name__ == "__main__":
    main()
