# SPDX-License-Identifier: Apache-2.0
"""The example's way from image files to the model, against the model alone."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from settings import Measurement, Settings
from timing import interleaved, row
from transformers import CLIPImageProcessor
from variants import TrainingStep, images, make


sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from finetune import available_cores, make_loaders, parse_args  # noqa: E402
from image_data import LabelledImages, PixelTransform  # noqa: E402


GOAL = 1.05
STEPS = 3
PHOTO = (500, 375)


def data(settings: Settings) -> Measurement:
    """Training steps fed by the example's loader over the same number of steps on a batch that lies ready."""
    step = TrainingStep(make(settings, "sage", settings.classes[0]), images(settings), settings.classes[0])
    side = {"height": settings.image_size, "width": settings.image_size}
    processor = CLIPImageProcessor(size={"shortest_edge": settings.image_size}, crop_size=side)
    transform = PixelTransform(processor, "crop-flip", 0.5).to(settings.device).train()
    accelerator = Accelerator(cpu=settings.device == "cpu")
    train = _photos(settings.batch_size * STEPS)
    feeds = {}
    for name, gib in (("decoded once and kept", 2.0), ("decoded anew by worker processes", 0.0)):
        workers = min(8, available_cores())
        flags = {"--cache-gib": gib, "--batch-size": settings.batch_size, "--num-workers": workers}
        args = parse_args([str(part) for flag in flags.items() for part in flag])
        splits = {"train": train, "test": train.select(np.arange(1))}
        feeds[name] = make_loaders(args, accelerator, splits, processor)["train"]

    def ready() -> None:
        for _ in range(STEPS):
            step()

    def fed(name: str) -> None:
        for batch in feeds[name]:
            step(transform(batch["pixel_values"]))

    runs = {name: lambda name=name: fed(name) for name in feeds}
    seconds = interleaved({"ready": ready, **runs}, settings)
    rows = []
    for name in feeds:
        rate = settings.batch_size * STEPS / float(np.median(seconds[name]))
        what = f"the example's training, images {name} / the model alone"
        rows.append(row(what, seconds[name] / seconds["ready"], GOAL, note=f"{rate:.1f} images/s"))
    return rows, []


def _photos(count: int) -> LabelledImages:
    """Return smooth random images as JPEG files of a photograph's usual small size."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize(PHOTO, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append({"bytes": buffer.getvalue(), "path": None})
    photos = Dataset.from_dict({"image": files}).cast_column("image", ImageFeature())
    return LabelledImages(photos, "image", np.zeros(count, dtype=np.int64))
