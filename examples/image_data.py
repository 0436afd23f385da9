# SPDX-License-Identifier: Apache-2.0
"""Labelled images for the examples: any data set that `datasets` reads, as batches of normalised pixel values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm
from transformers import BaseImageProcessor


@dataclass
class LabelledImages:
    """One split: the images, still encoded, and a class index for each.

    Attributes:
        images: Data set whose column `image_column` decodes to PIL images.
        image_column: Name of that column.
        labels: (N,) class indices.
    """

    images: Dataset
    image_column: str
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> LabelledImages:
        return LabelledImages(self.images.select(indices), self.image_column, self.labels[indices])


def load_images(
    name: str, image_column: str, label_column: str, train: str, validation: str, test: str
) -> tuple[dict[str, LabelledImages], list[str]]:
    """Load the splits of a data set and the names of its classes.

    Args:
        name: A folder with images (`train/CLASS/*.png`, `test/CLASS/*.png`, ...) or with parquet files
            (`train.parquet`, `test-00000-of-00001.parquet`, ...), or the id of a data set on the Hub.
        image_column: Column with the images.
        label_column: Column with the classes: a `ClassLabel`, strings, or integers from 0.
        train: Name of the split to train on.
        validation: Name of the split that chooses the epoch; it may be missing.
        test: Name of the split that is reported.

    Returns:
        The splits, under the keys "train", "test" and, where it exists, "validation"; and the class names in the order
        of the class indices.

    Raises:
        ValueError: If there is no such data set, split or column, if an image is without a label, or if two splits
            number the classes differently.
    """
    if len({train, validation, test}) < 3:
        raise ValueError(
            f"Three different splits are needed, got train={train}, validation={validation}, test={test}."
        )
    data = _read(name, [train, validation, test])
    for split in (train, test):
        if split not in data:
            raise ValueError(
                f"Data set {name!r} has no split {split!r}, only {sorted(data)}. An image folder needs train/ "
                "and test/ with one folder a class; `--train-split` and `--test-split` name other splits."
            )
    splits = {
        key: data[split]
        for key, split in [("train", train), ("validation", validation), ("test", test)]
        if split in data
    }
    for key, split in splits.items():
        for flag, column in (("--image-column", image_column), ("--label-column", label_column)):
            if column not in split.column_names:
                raise ValueError(
                    f"Split {key!r} of data set {name!r} has no column {column!r}, only {split.column_names}; "
                    f"choose one with `{flag}`."
                )
        if not isinstance(split.features[image_column], Image):
            splits[key] = _as_images(split, image_column)
    labels, class_names = _class_indices({key: split.with_format(None) for key, split in splits.items()}, label_column)
    images = {key: LabelledImages(split, image_column, labels[key]) for key, split in splits.items()}
    for key, split in images.items():
        if len(split) == 0:
            raise ValueError(f"Split {key!r} of data set {name!r} is empty.")
        if split.labels.min() < 0:
            raise ValueError(
                f"Split {key!r} of data set {name!r} has {(split.labels < 0).sum()} images without a label."
            )
    return images, class_names


def _read(name: str, splits: Sequence[str]) -> DatasetDict:
    folder = Path(name)
    if folder.is_dir():
        parquet = {split: [str(file) for file in sorted(folder.glob(f"**/{split}[-.]*parquet"))] for split in splits}
        parquet = {split: files for split, files in parquet.items() if files}
        if parquet:
            return load_dataset("parquet", data_files=parquet)
        try:
            return load_dataset("imagefolder", data_dir=name, drop_labels=False)
        except Exception as error:
            raise ValueError(f"Folder {name!r} holds neither images nor parquet files named after splits.") from error
    if name.startswith((".", "/", "~")) or folder.is_file():
        raise ValueError(f"`--dataset` {name!r} is not a folder.")
    try:
        return load_dataset(name)
    except Exception as error:
        raise ValueError(
            f"`--dataset` {name!r} is neither a folder nor a data set that the Hub gives: {error}"
        ) from error


def _as_images(split: Dataset, column: str) -> Dataset:
    try:
        return split.cast_column(column, Image())
    except Exception as error:
        raise ValueError(f"Column {column!r} holds {split.features[column]}, which are no images.") from error


def _class_indices(splits: dict[str, Dataset], column: str) -> tuple[dict[str, np.ndarray], list[str]]:
    features = [split.features[column] for split in splits.values()]
    values = {key: split[column][:] for key, split in splits.items()}
    if isinstance(features[0], ClassLabel):
        if any(feature != features[0] for feature in features):
            raise ValueError(f"Column {column!r} has other classes in one split than in another.")
        names = features[0].names
    elif all(isinstance(feature, Value) and feature.dtype == "string" for feature in features):
        names = sorted(set().union(*values.values()))
        index = {name: i for i, name in enumerate(names)}
        values = {key: [index[name] for name in column_values] for key, column_values in values.items()}
    elif all(isinstance(feature, Value) and "int" in feature.dtype for feature in features):
        names = [str(i) for i in range(1 + max(max(column_values, default=0) for column_values in values.values()))]
    else:
        raise ValueError(f"Column {column!r} must hold class labels, strings or integers, got {features[0]}.")
    return {key: np.asarray(column_values, dtype=np.int64) for key, column_values in values.items()}, names


def long_tailed_subset(labels: np.ndarray, num_classes: int, imbalance_ratio: float, seed: int) -> np.ndarray:
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
        ValueError: If `imbalance_ratio` is below 1.
    """
    if not imbalance_ratio >= 1:
        raise ValueError(f"`imbalance_ratio` must be at least 1 (head over tail), got {imbalance_ratio}.")
    largest = np.bincount(labels, minlength=num_classes).max()
    # The published subsets of CIFAR-100-LT come from this older generator, class by class.
    generator = np.random.RandomState(seed)
    kept = []
    for label in range(num_classes):
        size = int(largest * (1 / imbalance_ratio) ** (label / max(1, num_classes - 1)))
        kept.append(generator.permutation(np.flatnonzero(labels == label))[: max(1, size)])
    return np.sort(np.concatenate(kept))


class ProcessorView:
    """An image as the model's own processor resizes and crops it, as uint8.

    Args:
        processor: The model's image processor, of which only the geometry is used here.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor

    def __call__(self, image: PIL.Image.Image, index: int) -> torch.Tensor:
        """Return (3, H, W)."""
        return self._process(image)

    def _process(self, image: PIL.Image.Image, **geometry: Any) -> torch.Tensor:
        processed = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt", **geometry)
        return processed["pixel_values"][0].to(torch.uint8)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of what the processor returns."""
        height, width = self._process(PIL.Image.new("RGB", (64, 64))).shape[-2:]
        return height, width


class FiveCropView(ProcessorView):
    """The centre and the corners of an image that is enlarged by 248 / 224, for test-time ensembling as in LIFT."""

    def __call__(self, image: PIL.Image.Image, index: int) -> torch.Tensor:
        """Return (5, 3, H, W)."""
        enlarged = {edge: round(length * 248 / 224) for edge, length in dict(self.processor.size).items()}
        pixels = self._process(image, size=enlarged, do_center_crop=False)
        height, width = self.size
        bottom, right = pixels.shape[-2] - height, pixels.shape[-1] - width
        corners = [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]
        return torch.stack([pixels[:, top : top + height, left : left + width] for top, left in corners])


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
        self.seed = seed
        self.epoch = 0

    def __call__(self, image: PIL.Image.Image, index: int) -> torch.Tensor:
        """Return (3, H, W)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)[0]))
            corners = self.crop.forward_parameters(torch.Size((1, 3, image.height, image.width)))["src"][0]
        (left, top), (right, bottom) = corners[0].tolist(), (corners[2] + 1).tolist()
        # By PIL rather than kornia, which does not smooth what it makes smaller.
        part = image.resize(self.size[::-1], PIL.Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        return torch.from_numpy(np.array(part)).permute(2, 0, 1)


class PixelDataset(TorchDataset):
    """Images in the geometry of the model, as uint8.

    Args:
        split: The images.
        view: Gives that geometry to an image.
    """

    def __init__(self, split: LabelledImages, view: ProcessorView) -> None:
        self.split = split
        self.view = view
        self.pixels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self._decode(index) if self.pixels is None else self.pixels[index]
        return {"pixel_values": pixels, "labels": self.split.labels[index]}

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next, to a view that is random."""
        if isinstance(self.view, RandomCropView):
            self.view.epoch = epoch

    def _decode(self, index: int) -> torch.Tensor:
        try:
            image = self.split.images[int(index)][self.split.image_column].convert("RGB")
        except OSError as error:
            raise ValueError(f"Image {index} cannot be read: {error}") from error
        return self.view(image, int(index))

    def cache_if_small(self, max_bytes: int, progress: bool) -> None:
        """Decode all images now, once, if they fit and are the same every epoch.

        Args:
            max_bytes: Largest size of the decoded split, in bytes.
            progress: Whether to show a progress bar.
        """
        if isinstance(self.view, RandomCropView):
            return
        first = self._decode(0)
        if first.numel() * len(self) <= max_bytes:
            indices = tqdm(range(len(self)), desc="decoding images", disable=not progress, leave=False)
            self.pixels = torch.stack([self._decode(index) for index in indices])


class PixelTransform(nn.Module):
    """Turns a uint8 batch into the model's input on the batch's own device; random crops and flips while training.

    Args:
        processor: The model's image processor, which knows the scale, mean and standard deviation.
        augmentation: "crop-flip"; "flip", where crops are made elsewhere; or "none".
        crop_scale: Smallest share of the image that a random crop keeps.
    """

    def __init__(self, processor: BaseImageProcessor, augmentation: str, crop_scale: float) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.crop_scale = crop_scale
        self.scale = processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
        normalises = getattr(processor, "do_normalize", True)
        mean, std = (processor.image_mean, processor.image_std) if normalises else ([0.0] * 3, [1.0] * 3)
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
            crop = K.RandomResizedCrop(images.shape[-2:], scale=(self.crop_scale, 1.0), cropping_mode="resample")
            images = crop(images)
        if self.training and self.augmentation != "none":
            images = K.RandomHorizontalFlip()(images)
        return (images - self.mean) / self.std
