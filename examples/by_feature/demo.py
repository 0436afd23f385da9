# SPDX-License-Identifier: Apache-2.0
"""What the scripts in this folder share: flags, data, and a small training loop."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from peft_sage import (
    LongTailAccuracy,
    SageClassifier,
    SageLoss,
    parameter_groups,
    read_class_descriptions,
)


sys.path.insert(0, str(Path(__file__).parents[1]))

from image_data import ImageData, LabelledImages, load_images  # noqa: E402


DEMO = Path(__file__).parents[1] / "emoji_lt"


class Images(Dataset):
    """Items of the kind that Trainer and `DataLoader` take: `pixel_values` (3, H, W) and a class index in `labels`."""

    def __init__(
        self,
        images: LabelledImages,
        processor: BaseImageProcessor,
        most: int | None = None,
    ) -> None:
        self.chosen = torch.randperm(
            len(images), generator=torch.Generator().manual_seed(0)
        )[:most]
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(self.chosen[index])
        pixels = self.processor(images=self.images.read(place), return_tensors="pt")[
            "pixel_values"
        ][0]
        return {"pixel_values": pixels, "labels": int(self.images.labels[place])}


def parse(description: str) -> argparse.Namespace:
    """Parse the flags that every script has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=str(DEMO / "tiny-clip"),
        help="Hub id or folder of a CLIP-like model",
    )
    parser.add_argument(
        "--dataset",
        default=str(DEMO),
        help="image folder, folder of parquet files, or Hub id",
    )
    parser.add_argument(
        "--max-images",
        type=int,
        help="at most this many images of a split, for a quick look",
    )
    parser.add_argument("--output-dir", default=Path(sys.argv[0]).stem)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.002)
    return parser.parse_args()


def load(
    args: argparse.Namespace,
) -> tuple[SageClassifier, dict[str, Images], ImageData]:
    """Load the model, with a head from the class texts, and the data."""
    torch.manual_seed(0)
    data = load_images(args.dataset)
    texts = Path(args.dataset, "descriptions.json")
    classes = read_class_descriptions(
        texts if texts.is_file() else data.class_names, data.class_names
    )
    classifier = SageClassifier.from_texts(args.model, classes)
    splits = {
        name: Images(part, classifier.image_processor, args.max_images)
        for name, part in data.splits.items()
    }
    return classifier, splits, data


def train(
    model: nn.Module, images: Images, loss_function: SageLoss, args: argparse.Namespace
) -> None:
    """Train the parameters that require a gradient, in plain PyTorch."""
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr))
    loader = DataLoader(images, args.batch_size, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, args.epochs * len(loader)
    )
    model.train()
    for epoch in range(args.epochs):
        for batch in tqdm(loader, desc=f"epoch {epoch + 1} of {args.epochs}"):
            loss = loss_function(
                model(pixel_values=batch["pixel_values"]), batch["labels"]
            )
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: Images, class_counts: torch.Tensor
) -> dict[str, Any]:
    """Return the accuracies of [`LongTailAccuracy`]."""
    accuracy = LongTailAccuracy(class_counts)
    model.eval()
    for batch in DataLoader(images, batch_size=256):
        accuracy.update(
            model(pixel_values=batch["pixel_values"]).logits, batch["labels"]
        )
    return accuracy.compute()


def report(title: str, scores: dict[str, Any]) -> None:
    """Print one line of accuracies in percent."""
    names = [
        name
        for name in ("macro", "many", "medium", "few")
        if scores[name] == scores[name]
    ]
    print(
        f"{title}: "
        + ", ".join(f"{name} {100 * float(scores[name]):.1f} %" for name in names)
    )
