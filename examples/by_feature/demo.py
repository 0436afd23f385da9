# SPDX-License-Identifier: Apache-2.0
"""What the scripts in this folder share: their flags, the data, the model, and a small training loop."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, BaseImageProcessor

from peft_sage import LongTailAccuracy, SageClassifier, encode_class_descriptions, read_class_descriptions


sys.path.insert(0, str(Path(__file__).parents[1]))

from image_data import LabelledImages, load_images  # noqa: E402


DEMO = Path(__file__).parents[1] / "emoji_lt"


class Images(Dataset):
    """Items of the kind that Trainer and `DataLoader` take: `pixel_values` (3, H, W) and a class index in `labels`."""

    def __init__(self, images: LabelledImages, processor: BaseImageProcessor) -> None:
        self.images = images
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, index: int) -> Any:
        """Return the image as PIL has it."""
        return self.images.read(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.processor(images=self.picture(index), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": int(self.images.labels[index])}


@dataclass
class Demo:
    """The data set and the pieces of the model.

    Attributes:
        clip: The base model.
        tokenizer: Its tokenizer.
        processor: Its image processor.
        splits: `train` and `test`, and `validation` where there is one.
        descriptions: Class names, or a dictionary from class name to texts.
        class_names: Names of the classes, in the order of their indices.
        class_counts: (K,) numbers of training images.
    """

    clip: nn.Module
    tokenizer: Any
    processor: BaseImageProcessor
    splits: dict[str, Images]
    descriptions: list[str] | dict[str, list[str]]
    class_names: list[str]
    class_counts: torch.Tensor

    def classifier(self) -> SageClassifier:
        """Return the image tower with a head made from the class descriptions."""
        return SageClassifier(self.clip, encode_class_descriptions(self.clip, self.tokenizer, self.descriptions))


def parse(description: str, **defaults: Any) -> argparse.Namespace:
    """Parse the flags that every script has, and those named in `defaults`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "tiny-clip"), help="Hub id or folder of a CLIP-like model")
    parser.add_argument("--dataset", default=str(DEMO), help="image folder, folder of parquet files, or Hub id")
    parser.add_argument("--max-images", type=int, help="only so many images a split, for a quick look")
    parser.add_argument("--output-dir", default=Path(sys.argv[0]).stem)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    for name, value in defaults.items():
        kind = {"type": type(value), "default": value} if value is not None else {}
        if isinstance(value, bool):
            kind = {"action": "store_true"}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind)
    return parser.parse_args()


def load(args: argparse.Namespace) -> Demo:
    """Load data and model."""
    torch.manual_seed(0)
    data = load_images(args.dataset)
    images, names = data.splits, data.class_names
    if args.max_images is not None:
        generator = np.random.default_rng(0)
        images = {
            split: part.select(np.sort(generator.permutation(len(part))[: args.max_images]))
            for split, part in images.items()
        }
    texts = Path(args.dataset, "descriptions.json")
    processor = AutoImageProcessor.from_pretrained(args.model)
    return Demo(
        clip=AutoModel.from_pretrained(args.model, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        processor=processor,
        splits={split: Images(part, processor) for split, part in images.items()},
        descriptions=read_class_descriptions(texts if texts.is_file() else names, names),
        class_names=names,
        class_counts=torch.bincount(torch.as_tensor(images["train"].labels), minlength=len(names)),
    )


def train(model: nn.Module, data: Images, loss_function: nn.Module, args: argparse.Namespace) -> None:
    """Train the parameters that require a gradient, in plain PyTorch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    loader = DataLoader(data, args.batch_size, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    model.train()
    with tqdm(total=args.epochs * len(loader), desc="training") as bar:
        for _ in range(args.epochs):
            for batch in loader:
                loss = loss_function(model(pixel_values=batch["pixel_values"]), batch["labels"])
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
    model.eval()


@torch.inference_mode()
def evaluate(model: nn.Module, data: Images, class_counts: torch.Tensor) -> dict[str, Any]:
    """Return the accuracies of [`LongTailAccuracy`]."""
    accuracy = LongTailAccuracy(class_counts)
    model.eval()
    for batch in DataLoader(data, batch_size=256):
        accuracy.update(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
    return accuracy.compute()


def report(title: str, scores: dict[str, Any]) -> None:
    """Print one line of accuracies in percent."""
    names = [name for name in ("macro", "many", "medium", "few") if scores[name] == scores[name]]
    print(f"{title}: " + ", ".join(f"{name} {100 * float(scores[name]):.1f} %" for name in names))
