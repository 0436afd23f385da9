# SPDX-License-Identifier: Apache-2.0
"""Data sets for the examples, checked and described before anything is computed, and as batches of pixel values."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import numpy as np
import PIL.Image
import torch
from flags import available_cores
from labels import unite
from reading import LabelledImages, Reader, Table
from splitting import split_by_object
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from peft_sage.pictures import decoding_side, read_image


#: Images that a thread decodes before they are made small: enough for speed, and few enough where they are large.
CHUNK = 8


@dataclass
class ImageData:
    """A data set as it was read.

    Attributes:
        splits: "train", "test" and, where there is one, "validation".
        class_names: Names of the classes, in the order of the class indices.
        skipped: What was left out: from the split ("data" if there was none) and the reason to the files or rows.
        notes: What else there is to say about it.
    """

    splits: dict[str, LabelledImages]
    class_names: list[str]
    skipped: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def class_counts(self, split: str = "train") -> np.ndarray:
        """Return (K,) numbers of images."""
        return np.bincount(self.splits[split].labels, minlength=len(self.class_names))

    def summary(self) -> str:
        """Return a small table: split, images, classes, images per class; below it what was skipped, and why."""
        lines = [f"{'split':<12}{'images':>10}{'classes':>10}   images per class"]
        for split, images in self.splits.items():
            counts = np.sort(self.class_counts(split))
            counts = counts[counts > 0]
            spread = f"{counts[0]:,} to {counts[-1]:,}, median {np.median(counts):,.0f}"
            lines.append(f"{split:<12}{len(images):>10,}{len(counts):>10,}   {spread}")
        for split, reasons in self.skipped.items():
            for reason, names in reasons.items():
                examples = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
                lines.append(
                    f"skipped in {split}: {len(names):,} {reason} ({examples})"
                )
        return "\n".join(lines + self.notes)

    def as_dict(self) -> dict[str, Any]:
        """Return the same for `results.json`, with all names."""
        splits = {}
        for split, images in self.splits.items():
            counts = self.class_counts(split)
            splits[split] = {
                "images": len(images),
                "classes": int((counts > 0).sum()),
                "images_per_class": dict(
                    zip(self.class_names, counts.tolist(), strict=True)
                ),
            }
        return {"splits": splits, "skipped": self.skipped, "notes": self.notes}


def load_images(
    name: str,
    image_column: str = "image",
    label_column: str = "label",
    train: str = "train",
    validation: str = "validation",
    test: str = "test",
    on_bad_image: str = "error",
    seed: int = 0,
    unreadable: Callable[[dict[str, Table]], dict[str, dict[int, str]]] | None = None,
) -> ImageData:
    """Load the splits of a data set, with every image checked.

    Args:
        name: A folder with images (`train/CLASS/*`, `test/CLASS/*`, or `CLASS/*`, which is split here), with parquet
            files or CSV files of file names called after the splits, or with one such table or `metadata.csv`; the
            table itself; or the id of a data set on the Hub.
        image_column: Column of tables with the images, or with the names of their files.
        label_column: Column of tables with the classes: names or whole numbers.
        train: Name of the split to train on.
        validation: Name of the split that chooses the epoch; it may be missing, and "none" ignores it.
        test: Name of the split that is reported.
        on_bad_image: "error", or "skip" to leave out and list what cannot be read or lies beside the class folders.
        seed: Draws the splits where there are none.
        unreadable: Finds the images that cannot be read. Default: [`find_unreadable`]; several processes would rather
            do that once and share the result.

    Raises:
        ValueError: If there is no such data set, split or column, if labels or images cannot be read, or if training
            and test have nothing in common. It names the file, row or column.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(
            f"`on_bad_image` must be 'error' or 'skip', got {on_bad_image!r}."
        )
    wanted = {"train": train, "test": test, "validation": validation}
    if train in (validation, test):
        raise ValueError(
            f"Three different splits are needed, got train={train}, validation={validation}, test={test}."
        )
    if validation in ("", "none", test):
        del wanted["validation"]
    reader = Reader(
        name, wanted, image_column, label_column, strict=on_bad_image != "skip"
    )
    tables = reader.read()
    if "" not in tables and "test" not in tables:
        raise ValueError(
            f"Data set {name!r} has no split {test!r}, only {[wanted[key] for key in tables]}. `--test-split` names "
            "another one; a folder of class folders without splits is split for you."
        )
    skipped = {
        key or "data": {r: n for r, n in part.skipped.items() if n}
        for key, part in tables.items()
    }
    for key, problems in (unreadable or find_unreadable)(tables).items():
        tables[key] = _without(tables[key], problems, on_bad_image)
        if problems:
            skipped[key or "data"]["unreadable"] = list(problems.values())
    if "" in tables:
        tables, note = split_by_object(tables[""], seed)
        reader.notes.append(note)
    _refuse_shared_files(tables)
    data = _with_common_classes(tables, label_column, skipped)
    return replace(data, notes=reader.notes + data.notes)


def _without(table: Table, problems: dict[int, str], on_bad_image: str) -> Table:
    if problems and on_bad_image != "skip":
        raise ValueError(
            f"{len(problems)} images cannot be read; `--on-bad-image skip` leaves them out.\n"
            + "\n".join(list(problems.values())[:5])
        )
    return (
        table.select(np.setdiff1d(np.arange(len(table.images)), list(problems)))
        if problems
        else table
    )


def _refuse_shared_files(tables: dict[str, Table]) -> None:
    """Raise if one file is in two splits or of two classes."""
    folders: dict[str, str] = {}
    uses: dict[str, tuple[str, str]] = {}
    for table in tables.values():
        for index, path in enumerate([] if table.paths is None else table.paths):
            folder, name = os.path.split(path)
            real = os.path.realpath(path) if os.path.islink(path) else None
            real = real or os.path.join(
                folders.setdefault(folder, os.path.realpath(folder)), name
            )
            use = (table.images.split, table.classes.names[table.images.labels[index]])
            if uses.setdefault(real, use) != use:
                raise ValueError(
                    f"Image {path!r} is in split {uses[real][0]!r} as {uses[real][1]!r} and in split {use[0]!r} as "
                    f"{use[1]!r}; every image has one split and one class."
                )


def _with_common_classes(
    tables: dict[str, Table],
    label_column: str,
    skipped: dict[str, dict[str, list[str]]],
) -> ImageData:
    """Number the classes alike in all splits; what is not trained is not evaluated."""
    named = {
        table.images.split: (table.images.labels, table.classes)
        for table in tables.values()
    }
    labels, classes = unite(named, label_column)
    counts = np.bincount(
        np.concatenate(list(labels.values())), minlength=len(classes.names)
    )
    kept = (counts > 0) | classes.stated
    names, numbers = (
        [n for n, k in zip(classes.names, kept, strict=True) if k],
        np.cumsum(kept) - 1,
    )
    splits = {
        key: replace(
            tables[key].images, labels=numbers[labels[tables[key].images.split]]
        )
        for key in ("train", "validation", "test")
        if key in tables
    }
    trained = np.bincount(splits["train"].labels, minlength=len(names)) > 0
    if trained.sum() < 2:
        raise ValueError(
            f"The training split needs two classes at least, got {[names[k] for k in np.flatnonzero(trained)]}."
        )
    for key in [key for key in ("validation", "test") if key in splits]:
        images = splits[key]
        known = trained[images.labels]
        lacking = sorted({names[label] for label in images.labels[~known]})
        if not known.any():
            if not len(images) and key == "test":
                raise ValueError(f"Split {images.split!r} has no images.")
            if lacking:
                raise ValueError(
                    f"Split {images.split!r} has no image of a class of the training split, but of {lacking}."
                )
            del splits[key]
            continue
        if lacking:
            warnings.warn(
                f"Split {images.split!r} has {(~known).sum()} images of classes without training images, which count "
                f"nowhere: {lacking[:10]}.",
                stacklevel=3,
            )
            places = [images.name(int(index)) for index in np.flatnonzero(~known)]
            skipped.setdefault(key, {})["of classes without training images"] = places
            splits[key] = images.select(np.flatnonzero(known))
    data = ImageData(
        splits, names, {split: reasons for split, reasons in skipped.items() if reasons}
    )
    untested = [
        name
        for name, count in zip(names, data.class_counts("test"), strict=True)
        if not count
    ]
    if untested:
        data.notes.append(
            f"Without test images, so that they count in no mean: {len(untested)} classes: {untested[:10]}."
        )
    return data


def find_unreadable(
    tables: dict[str, Table], progress: bool = True
) -> dict[str, dict[int, str]]:
    """Return the images of each split that cannot be decoded, and why; a JPEG is decoded at an eighth of its size."""

    def problem(images: LabelledImages, index: int) -> str | None:
        try:
            source = images.source(index)
            data = (
                source["bytes"]
                if source["bytes"] is not None
                else Path(source["path"]).read_bytes()
            )
            if data.startswith(b"\x89PNG"):
                # Its checksums tell, forty times faster than decoding.
                PIL.Image.open(io.BytesIO(data)).verify()
            else:
                read_image(data, min_side=1)
        except Exception:
            # Rare, so the reason may take its time.
            try:
                images.read(index)
            except ValueError as error:
                return str(error)
        return None

    found: dict[str, dict[int, str]] = {}
    total = sum(len(table.images) for table in tables.values())
    with (
        ThreadPoolExecutor(available_cores()) as pool,
        tqdm(
            total=total, desc="checking images", disable=not progress, leave=False
        ) as bar,
    ):
        for split, table in tables.items():
            found[split] = {}
            for start in range(0, len(table.images), 1024):
                indices = range(start, min(start + 1024, len(table.images)))
                reasons = pool.map(partial(problem, table.images), indices)
                found[split] |= {
                    index: reason
                    for index, reason in zip(indices, reasons, strict=True)
                    if reason
                }
                bar.update(len(indices))
    return found


def long_tailed_subset(
    labels: np.ndarray, num_classes: int, imbalance_ratio: float, seed: int
) -> np.ndarray:
    """Thin a training set to an exponential long tail.

    Class i of C keeps at most n_i = int(n_max * imb^(i / (C - 1))) images, drawn with the seed, where
    imb = 1 / imbalance_ratio and n_max is the size of the largest class; at least one, where it has any. It is the
    rule of CIFAR-100-LT (Cao et al. 2019, arXiv 1906.07413), with the classes in their own order; seed 0 draws its
    images.

    Args:
        labels: (N,) class indices.
        num_classes: C.
        imbalance_ratio: Images of the first class over images of the last, at least 1.
        seed: Decides which images stay.

    Returns:
        The sorted indices of the images that stay.

    Raises:
        ValueError: If `imbalance_ratio` is below 1, or beyond the images of the largest class.
    """
    if not imbalance_ratio >= 1:
        raise ValueError(
            f"`imbalance_ratio` must be at least 1 (head over tail), got {imbalance_ratio}."
        )
    largest = np.bincount(labels, minlength=num_classes).max()
    if imbalance_ratio > largest:
        raise ValueError(
            f"`imbalance_ratio` must be at most {largest}, the images of the largest class, got {imbalance_ratio}: "
            "the smallest class would have less than one image."
        )
    # The published subsets of CIFAR-100-LT come from this older generator, class by class.
    generator = np.random.RandomState(seed)
    kept = []
    for label in range(num_classes):
        size = int(largest * (1 / imbalance_ratio) ** (label / max(1, num_classes - 1)))
        kept.append(
            generator.permutation(np.flatnonzero(labels == label))[: max(1, size)]
        )
    return np.sort(np.concatenate(kept))


class ProcessorView:
    """An image as the model's own processor resizes and crops it, as uint8.

    Args:
        processor: The model's image processor, of which only the geometry is used here.

    Attributes:
        size: Height and width of what the processor returns.

    Raises:
        ValueError: If the processor cuts images into patches, as NaFlex does.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor
        self.min_side = decoding_side(processor)
        shape = self._process([PIL.Image.new("RGB", (64, 64))]).shape
        if len(shape) != 4:
            raise ValueError(
                f"`--model` must take images as pixels, its {type(processor).__name__} cuts them into patches, as "
                "NaFlex does: train it with Trainer (docs/own_model.md)."
            )
        self.size: tuple[int, int] = (shape[-2], shape[-1])

    def __call__(self, image: PIL.Image.Image, index: int) -> torch.Tensor:
        """Return (3, H, W)."""
        return self._process([image])[0]

    def batch(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        """Return (B, 3, H, W): a processor takes many images in half the time that it takes for each alone."""
        return self._process(images)

    def _process(self, images: list[PIL.Image.Image], **geometry: Any) -> torch.Tensor:
        processed = self.processor(
            images=images,
            do_rescale=False,
            do_normalize=False,
            return_tensors="pt",
            **geometry,
        )
        return processed["pixel_values"].to(torch.uint8)


class FiveCropView(ProcessorView):
    """The centre and the corners of an image that is enlarged by 248 / 224, for test-time ensembling as in LIFT."""

    def __call__(self, image: PIL.Image.Image, index: int) -> torch.Tensor:
        """Return (5, 3, H, W)."""
        enlarged = {
            edge: round(length * 248 / 224)
            for edge, length in dict(self.processor.size).items()
        }
        pixels = self._process([image], size=enlarged, do_center_crop=False)[0]
        height, width = self.size
        bottom, right = pixels.shape[-2] - height, pixels.shape[-1] - width
        corners = [
            (bottom // 2, right // 2),
            (0, 0),
            (0, right),
            (bottom, 0),
            (bottom, right),
        ]
        return torch.stack(
            [
                pixels[:, top : top + height, left : left + width]
                for top, left in corners
            ]
        )

    def batch(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        """Return (B, 5, 3, H, W); enlarged images may differ in shape."""
        return torch.stack([self(image, index) for index, image in enumerate(images)])


class RandomCropView(ProcessorView):
    """A random part of the whole image, resized to the model's size; another one for each image and epoch.

    Args:
        processor: The model's image processor.
        scale: Smallest share of the image's area that a crop keeps.
        seed: With the epoch and the index of the image, decides which part.
    """

    def __init__(self, processor: BaseImageProcessor, scale: float, seed: int) -> None:
        super().__init__(processor)
        self.crop = K.RandomResizedCrop(self.size, scale=(scale, 1.0))
        # The smallest crop is to be as sharp as the whole image would be.
        self.min_side = (
            math.ceil(self.min_side / math.sqrt(scale)) if self.min_side else None
        )
        self.seed = seed
        self.epoch = 0

    def __call__(self, image: PIL.Image.Image, index: int) -> torch.Tensor:
        """Return (3, H, W)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                int(
                    np.random.SeedSequence(
                        [self.seed, self.epoch, index]
                    ).generate_state(1)[0]
                )
            )
            corners = self.crop.forward_parameters(
                torch.Size((1, 3, image.height, image.width))
            )["src"][0]
        (left, top), (right, bottom) = corners[0].tolist(), (corners[2] + 1).tolist()
        # By PIL rather than kornia, which does not smooth what it makes smaller.
        part = image.resize(
            self.size[::-1],
            PIL.Image.Resampling.BILINEAR,
            box=(left, top, right, bottom),
        )
        return torch.from_numpy(np.array(part)).permute(2, 0, 1)


class PixelDataset(TorchDataset):
    """Images in the geometry of the model, as uint8.

    Args:
        split: The images.
        view: Gives that geometry to an image.

    Attributes:
        pixels: (N, ...) all images, if they are decoded already.
        base_image_embeds: (N, e) embeddings of them by the frozen tower, which go with the images if they are there.
    """

    def __init__(self, split: LabelledImages, view: ProcessorView) -> None:
        self.split = split
        self.view = view
        self.pixels: torch.Tensor | None = None
        self.base_image_embeds: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._decode(index) if self.pixels is None else self.pixels[index]
        item = {"pixel_values": pixels, "labels": self.split.labels[index]}
        if self.base_image_embeds is not None:
            item["base_image_embeds"] = self.base_image_embeds[index]
        return item

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next, to a view that is random."""
        if isinstance(self.view, RandomCropView):
            self.view.epoch = epoch

    def _decode(self, index: int) -> torch.Tensor:
        return self.view(self.split.read(index, self.view.min_side), int(index))

    def cache_if_small(self, max_bytes: int, progress: bool) -> None:
        """Decode all images now, once, if they fit and are the same every epoch.

        Args:
            max_bytes: Largest size of the decoded split, in bytes.
            progress: Whether to show a progress bar.
        """
        if isinstance(self.view, RandomCropView):
            return
        first = self._decode(0)
        if first.numel() * len(self) > max_bytes:
            return
        pixels = first.new_empty(len(self), *first.shape)

        def decode(start: int) -> int:
            indices = range(start, min(start + CHUNK, len(self)))
            images = [self.split.read(index, self.view.min_side) for index in indices]
            pixels[start : indices.stop] = self.view.batch(images)
            return len(indices)

        with (
            ThreadPoolExecutor(available_cores()) as pool,
            tqdm(
                total=len(self),
                desc="decoding images",
                unit="image",
                disable=not progress,
                leave=False,
            ) as bar,
        ):
            for done in pool.map(decode, range(0, len(self), CHUNK)):
                bar.update(done)
        self.pixels = pixels


class PixelTransform(nn.Module):
    """Turns a uint8 batch into the model's input on the batch's own device; random crops and flips while training.

    Args:
        processor: The model's image processor, which knows the scale, mean and standard deviation.
        augmentation: "crop-flip"; "flip", where crops are made elsewhere; or "none".
        crop_scale: Smallest share of the image that a random crop keeps.
    """

    def __init__(
        self, processor: BaseImageProcessor, augmentation: str, crop_scale: float
    ) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.crop_scale = crop_scale
        self.scale = (
            processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
        )
        normalises = getattr(processor, "do_normalize", True)
        mean, std = (
            (processor.image_mean, processor.image_std)
            if normalises
            else ([0.0] * 3, [1.0] * 3)
        )
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Transform a batch.

        Args:
            pixels: (B, 3, H, W) uint8.

        Returns:
            (B, 3, H, W) float32.
        """
        images = pixels.float() * self.scale
        if self.training and self.augmentation == "crop-flip":
            crop = K.RandomResizedCrop(
                images.shape[-2:],
                scale=(self.crop_scale, 1.0),
                cropping_mode="resample",
            )
            images = crop(images)
        if self.training and self.augmentation != "none":
            images = K.RandomHorizontalFlip()(images)
        return (images - self.mean) / self.std
