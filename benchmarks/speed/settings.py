# SPDX-License-Identifier: Apache-2.0
"""What every row of the table shares: how large the model is, and what a row is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement.

    Attributes:
        device: "cpu" or "cuda".
        threads: Threads of PyTorch.
        repetitions: Interleaved repetitions of each row.
        sweep_repetitions: The same for the curves over r and N, which are no rows of the table.
        batch_size: Images a step, B.
        blocks: Blocks of the image tower and of the text tower; 12 in ViT-B/16.
        width: Width of the image tower, d; 768 in ViT-B/16.
        image_size: Side of the images in pixels.
        r: Width of the bottleneck and rank of LoRA.
        classes: Numbers of classes C, ascending.
        text_classes: Classes that `encode_class_descriptions` is measured with, 7 texts each.
        loss_shape: Batch and classes (B, C) of the loss.
        features: Images (N, d) and classes of `estimate_mismatch`.
    """

    device: str = "cpu"
    threads: int = 2
    repetitions: int = 15
    sweep_repetitions: int = 5
    batch_size: int = 8
    blocks: int = 12
    width: int = 768
    image_size: int = 224
    r: int = 32
    classes: tuple[int, ...] = (10, 100, 1000, 8142, 21841)
    text_classes: int = 128
    loss_shape: tuple[int, int] = (256, 21841)
    features: tuple[int, int, int] = (1_000_000, 512, 8142)

    @property
    def middle(self) -> int:
        """The number of classes that rows with a single one take: 1,000, or the nearest there is."""
        return min(self.classes, key=lambda count: abs(count - 1000))

    @property
    def large(self) -> int:
        """8,142 classes, or the nearest there is."""
        return min(self.classes, key=lambda count: abs(count - 8142))


@dataclass
class Row:
    """A row of the table: median and quartiles of a ratio, or of a time.

    Attributes:
        what: What is measured, over what.
        low: First quartile.
        median: Median.
        high: Third quartile.
        goal: What it should be at most; `None` for rows that inform.
        unit: "x" for ratios, else the unit.
        note: What the reader has to know beside it.
    """

    what: str
    low: float
    median: float
    high: float
    goal: float | None = None
    unit: str = "x"
    note: str = ""


@dataclass
class Point:
    """A point of a curve.

    Attributes:
        figure: "training", "inference" or "memory".
        axis: "C", "r" or "N".
        x: Where on that axis.
        method: A method of `variants.METHODS`, or "lower bound".
        value: Seconds, bytes, or floating-point operations of the lower bound relative to the frozen base.
    """

    figure: str
    axis: str
    x: int
    method: str
    value: float


Measurement = tuple[list[Row], list[Point]]


def synchronise(settings: Settings) -> None:
    """Wait until the device has done what it was told."""
    if settings.device == "cuda":
        torch.cuda.synchronize()
