# SPDX-License-Identifier: Apache-2.0
"""The tasks: images as tensors on the device, composed and augmented in batches."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image


EMOJI_LT = Path(__file__).resolve().parents[2] / "examples" / "emoji_lt"
SIZE = 48


@dataclass
class Split:
    """Images of one split.

    Args:
        images: RGBA (N, 4, H, W), uint8, with the colours already laid on white, as Emoji-LT stores them.
        labels: Class indices (N,).
        groups: What is resampled together by the bootstrap (concept, or image), (N,) integers.
        rows: Where the images stood in the whole split (N,). Default: this is the whole split.
    """

    images: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    rows: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = torch.arange(len(self.labels), device=self.labels.device)

    def __getitem__(self, index: torch.Tensor) -> Split:
        return Split(self.images[index], self.labels[index], self.groups[index], self.rows[index])

    def to(self, device: torch.device | str) -> Split:
        return Split(*(t.to(device) for t in (self.images, self.labels, self.groups, self.rows)))

    def counts(self, num_classes: int) -> torch.Tensor:
        """Images of each class (K,)."""
        return torch.bincount(self.labels, minlength=num_classes)


@dataclass
class Task:
    """Class names and descriptions, and the splits that exist."""

    names: list[str]
    descriptions: list[list[str]]
    splits: dict[str, Split]
    distractors: dict[str, torch.Tensor]


def load_task(name: str, styles: str | None = None) -> Task:
    """Load a task.

    `concepts` are unseen concepts; `scenes` have the same drawings, shown in clutter; `styles` are unseen drawing
    styles; `digits` are handwritten.

    Args:
        name: The task.
        styles: For `styles`, the parquet file that `examples/emoji_lt/build_dataset.py` renders at request.
    """
    if name == "digits":
        return _digits()
    described = json.loads((EMOJI_LT / "descriptions.json").read_text())
    names = list(described)
    texts = [[entry] if isinstance(entry, str) else entry for entry in described.values()]
    splits = {split: _read(EMOJI_LT / f"{split}.parquet") for split in ("train", "validation", "test")}
    if name == "styles":
        splits["test"] = _read(Path(styles))
    distractors = {}
    if name == "scenes":
        table = pq.read_table(EMOJI_LT / "distractors.parquet").to_pandas()
        for split in ("train", "test"):
            chosen = table[table["split"] == split]
            distractors[split] = torch.stack([_decode(row["bytes"]) for row in chosen["image"]])
    return Task(names, texts, splits, distractors)


def long_tail(split: Split, num_classes: int, ratio: float | None, seed: int = 0) -> Split:
    """Thin a split to an imbalance ratio.

    n_i = n_max ratio^(-i / (C - 1)) with the classes in the order of their own counts, and n_max at most `ratio` times
    the smallest class; a class that has fewer keeps what it has.

    Args:
        split: The split.
        num_classes: C.
        ratio: Largest over smallest class; `None` leaves the split as it is.
        seed: Of the choice.
    """
    if ratio is None:
        return split
    counts = split.counts(num_classes)
    largest = min(counts.max().item(), ratio * max(1, counts.min().item()))
    order = counts.argsort(descending=True, stable=True).tolist()
    generator = torch.Generator().manual_seed(seed)
    keep = []
    for rank, label in enumerate(order):
        wanted = max(1, round(largest * ratio ** (-rank / (num_classes - 1))))
        index = (split.labels == label).nonzero().flatten()
        keep.append(index[torch.randperm(len(index), generator=generator)[:wanted]])
    return split[torch.cat(keep).sort().values]


def premultiplied(images: torch.Tensor) -> torch.Tensor:
    """Turn stored images (uint8) into floats in [0, 1] with colours times alpha, which compose by adding."""
    images = images.float() / 255
    return torch.cat([images[:, :3] + images[:, 3:] - 1, images[:, 3:]], dim=1).clamp(min=0)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crop (scale 0.6 to 1), flip, shift and tint premultiplied images (B, 4, H, W)."""
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator, device=device) * (high - low) + low

    size = uniform(0.6, 1.0).sqrt()
    theta = torch.zeros(count, 2, 3, device=device)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta[:, 0, 0], theta[:, 1, 1] = size * flip, size * uniform(0.9, 1.1)
    theta[:, :, 2] = uniform(-1, 1, 2) * (1 - size)[:, None]
    images = F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)
    colour = (images[:, :3] * uniform(0.8, 1.2, 3, 1, 1)).minimum(images[:, 3:])
    return torch.cat([colour, images[:, 3:]], dim=1)


def on_white(images: torch.Tensor) -> torch.Tensor:
    """Compose premultiplied images (B, 4, H, W) on white, to RGB (B, 3, H, W)."""
    return images[:, :3] + 1 - images[:, 3:]


def in_scenes(
    images: torch.Tensor, distractors: torch.Tensor, generator: torch.Generator, count: int = 4
) -> torch.Tensor:
    """Compose objects into scenes: smaller and anywhere, before distractors on a textured background.

    Args:
        images: Premultiplied objects (B, 4, H, W).
        distractors: Images to choose from (D, 4, H, W), uint8.
        generator: Randomness, on the device of the images.
        count: Distractors a scene.

    Returns:
        RGB scenes (B, 3, H, W).
    """
    batch, _, height, width = images.shape
    device = images.device

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    coarse = F.interpolate(rand(batch, 3, 5, 5), size=(height, width), mode="bicubic", align_corners=False)
    fine = F.interpolate(rand(batch, 3, height // 3, width // 3), size=(height, width))
    scene = (0.25 + 0.4 * coarse + 0.15 * fine).clamp(0, 1)
    for layer in range(count + 1):
        last = layer == count
        chosen = torch.randint(len(distractors), (batch,), generator=generator, device=device)
        objects = images if last else premultiplied(distractors[chosen])
        scale = (0.45 + 0.25 * rand(batch)) if last else (0.25 + 0.25 * rand(batch))
        theta = torch.zeros(batch, 2, 3, device=device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
        theta[:, :, 2] = (2 * rand(batch, 2) - 1) * ((1 - scale) / scale)[:, None]
        grid = F.affine_grid(theta, objects.shape, align_corners=False)
        pasted = F.grid_sample(objects, grid, align_corners=False)
        scene = pasted[:, :3] + scene * (1 - pasted[:, 3:])
    return scene


def _read(path: Path) -> Split:
    table = pq.read_table(path).to_pandas()
    images = torch.stack([_decode(image["bytes"]) for image in table["image"]])
    groups = torch.from_numpy(table["concept"].astype("category").cat.codes.to_numpy().astype(np.int64))
    return Split(images, torch.from_numpy(table["label"].to_numpy().astype(np.int64)), groups)


def _decode(content: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _digits() -> Task:
    """Handwritten digits of scikit-learn (UCI, 1,797 images, 8 x 8 pixels); half train, a quarter each the others."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = 255 - torch.from_numpy(digits.images).float() * (255 / 16)
    gray = F.interpolate(gray[:, None], size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 255)
    images = torch.cat([gray.expand(-1, 3, -1, -1), torch.full_like(gray, 255)], dim=1).to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cuts = order.tensor_split([len(order) // 2, len(order) * 3 // 4])
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    parts = zip(("train", "validation", "test"), cuts, strict=True)
    splits = {name: Split(images[index], labels[index], index) for name, index in parts}
    return Task(names, [[f"the digit {name}", f"the number {i}"] for i, name in enumerate(names)], splits, {})
