# SPDX-License-Identifier: Apache-2.0
"""Batches of pixels from pictures: the same way for training, evaluation, embedding and prediction."""

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .pictures import available_cores, decoding_side, read_image


#: What the processors of vision towers return.
INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class ImageCollator:
    """Collate pictures and labels into what a vision tower takes.

    Without augmentation the pixels are those of the image processor, of each picture as [`read_image`] reads it.

    Args:
        image_processor: One of transformers, or a torchvision `Compose` (open_clip, timm).
        augment: Augmentation while training. "crop-flip": random crops and flips of the resized pixels, the batch at
            once, by kornia; or a function from a PIL image to a PIL image.
        image_column: Key of an item's picture, which is anything that [`read_image`] takes.
        label_column: Key of its label, unless that is "labels".
        crop_scale: Smallest share of a picture's area that a random crop keeps.

    Raises:
        ValueError: An argument is wrong, or the processor cuts images into patches (NaFlex), where neither crops nor
            flips are possible.
        ImportError: Kornia is needed and not installed.
    """

    def __init__(
        self,
        image_processor: Any,
        augment: str | Callable[[PIL.Image.Image], PIL.Image.Image] | None = None,
        *,
        image_column: str = "image",
        label_column: str = "label",
        crop_scale: float = 0.5,
    ) -> None:
        if not (augment in (None, "crop-flip") or callable(augment)):
            raise ValueError(
                f'`augment` must be None, "crop-flip" or a function, got {augment!r}.'
            )
        if not 0 < crop_scale <= 1:
            raise ValueError(f"`crop_scale` must lie in (0, 1], got {crop_scale!r}.")
        self.image_processor = image_processor
        self.augment = augment
        self.image_column = image_column
        self.label_column = label_column
        self.crop_scale = crop_scale
        self.training = augment is not None
        if augment == "crop-flip":
            _import_kornia()
            self.size  # noqa: B018 - is refused here and not in the first batch

    def train(self) -> "ImageCollator":
        """Switch the augmentation on, if there is any."""
        self.training = self.augment is not None
        return self

    def eval(self) -> "ImageCollator":
        """Switch the augmentation off."""
        self.training = False
        return self

    @property
    def makes_pixels(self) -> bool:
        """Whether pictures can become pixels first: not before a function augments, nor where patches are made."""
        if self.training and callable(self.augment):
            return False
        try:
            return bool(self.size)
        except ValueError:
            return False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels that the processor makes."""
        return self._geometry.size

    def __call__(self, items: Iterable[Any]) -> dict[str, Tensor]:
        """Collate items.

        Args:
            items: Pictures; or dictionaries with a picture or with `pixel_values`. A label, and whatever begins with
                `base_`, are handed on.

        Returns:
            `pixel_values` (B, 3, H, W) float32, or what the processor returns; `labels` (B,) and the rest.
        """
        items = list(items)
        if not items:
            raise ValueError("`items` is empty; give at least one.")
        first = items[0]
        if not isinstance(first, Mapping) or set(first) == {"bytes", "path"}:
            return self._inputs(items)
        if "pixel_values" in first:
            ready = {key: _stack(items, key) for key in INPUTS if key in first}
            return ready | self._others(items)
        return self._inputs(self._pictures(items)) | self._others(items)

    def collate_pixels(self, items: list[Any], crops: int = 1) -> dict[str, Tensor]:
        """Collate dictionaries as a call does, but to `pixels` from [`prepare`], which [`finish`] takes."""
        pixels = self.prepare(self._pictures(items), crops)
        return {"pixels": pixels} | self._others(items)

    def prepare(self, pictures: Iterable[Any], crops: int = 1) -> Tensor:
        """Resize and crop pictures as the processor does, without augmentation.

        Args:
            pictures: B pictures, as [`read_image`] takes them.
            crops: 1; or 5 for the centre and corners of a picture enlarged by 248 / 224, LIFT's test-time ensembling.

        Returns:
            (B, 3, H, W) or (B, 5, 3, H, W) uint8.
        """
        if crops not in (1, 5):
            raise ValueError(f"`crops` must be 1 or 5, got {crops!r}.")
        make = self._geometry.pixels if crops == 1 else self._geometry.five_crops
        side = decoding_side(self.image_processor)
        return torch.cat(_read_in_threads(pictures, side, make))

    def finish(self, pixels: Tensor) -> Tensor:
        """Scale and normalise pixels on their device; with "crop-flip" in training, augment them before.

        Args:
            pixels: (..., 3, H, W) uint8.

        Returns:
            (..., 3, H, W) float32.
        """
        images = pixels.flatten(0, -4).float()
        if self.training and self.augment == "crop-flip":
            kornia = _import_kornia()
            crop = kornia.RandomResizedCrop(
                images.shape[-2:],
                scale=(self.crop_scale, 1.0),
                cropping_mode="resample",
            )
            images = kornia.RandomHorizontalFlip()(crop(images))
        return self._geometry.finish(images).unflatten(0, pixels.shape[:-3])

    @cached_property
    def _geometry(self) -> "_Geometry":
        return _Geometry(self.image_processor)

    def _pictures(self, items: list[Any]) -> list[Any]:
        if self.image_column not in items[0]:
            raise ValueError(
                f"Items have no {self.image_column!r}, only {[*items[0]]}; `image_column` names the picture."
            )
        return [item[self.image_column] for item in items]

    def _others(self, items: list[Any]) -> dict[str, Tensor]:
        first = items[0]
        columns = {key: key for key in first if key.startswith("base_")}
        for label in ("labels", self.label_column):
            if first.get(label) is not None:
                columns["labels"] = label
        return {name: _stack(items, key) for name, key in columns.items()}

    def _inputs(self, pictures: list[Any]) -> dict[str, Tensor]:
        if self.image_processor is None:
            raise ValueError("`image_processor` is needed for pictures, got None.")
        augment: Any = self.augment if self.training else None
        if augment == "crop-flip":
            return {"pixel_values": self.finish(self.prepare(pictures))}
        side = decoding_side(self.image_processor) if augment is None else None
        images = [*chain(*_read_in_threads(pictures, side, list))]
        if augment is not None:
            images = [augment(image) for image in images]
        if _is_compose(self.image_processor):
            return {"pixel_values": torch.stack([*map(self.image_processor, images)])}
        return dict(self.image_processor(images=images, return_tensors="pt"))


class _Geometry:
    """What an image processor does, in two steps: uint8 pixels, and then their scale and normalisation.

    The second is a factor and an offset for each channel, which a black and a white picture tell.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        name = type(processor).__name__
        values = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
        noise = PIL.Image.fromarray(values)
        black, white = (
            self._whole([PIL.Image.new("RGB", noise.size, color)])
            for color in ("black", "white")
        )
        if black.ndim != 4:
            raise ValueError(
                f"`augment` and prepared pixels need an image processor that returns images; {name} cuts them into "
                "patches, as NaFlex does. A function as `augment` works with it."
            )
        height, width = black.shape[-2:]
        self.size: tuple[int, int] = (height, width)
        # Of the middle, as the margin may be padding.
        middle = (0, slice(None), [height // 2], [width // 2])
        self.offset = black[middle].view(3, 1, 1)
        self.factor = (white[middle].view(3, 1, 1) - self.offset) / 255
        finished = self.finish(self.pixels([noise]))
        if not torch.allclose(finished, self._whole([noise]), atol=0.01):
            raise ValueError(
                f"`augment` and prepared pixels need an image processor that ends with a scale and a normalisation "
                f"for each channel; {name} does not. A function as `augment` works with it."
            )

    def pixels(self, images: list[PIL.Image.Image], **geometry: Any) -> Tensor:
        """(B, 3, H, W) uint8."""
        if _is_compose(self.processor):
            values = (self._whole(images) - self.offset) / self.factor
            return values.round().clamp(0, 255).to(torch.uint8)
        geometry |= {"do_rescale": False, "do_normalize": False}
        return self._whole(images, **geometry).to(torch.uint8)

    def five_crops(self, images: list[PIL.Image.Image]) -> Tensor:
        """(B, 5, 3, H, W) uint8."""
        if _is_compose(self.processor):
            raise ValueError("`crops` needs an image processor of transformers.")
        sides = dict(self.processor.size).items()
        larger = {edge: round(side * 248 / 224) for edge, side in sides if side}
        crops = []
        for image in images:  # one at a time, as their shapes may differ
            pixels = self.pixels([image], size=larger, do_center_crop=False)[0]
            crops.append(_centre_and_corners(pixels, self.size))
        return torch.stack(crops)

    def finish(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) float32."""
        factor = self.factor.to(pixels.device)
        offset = self.offset.to(pixels.device)
        return torch.addcmul(offset, pixels.float(), factor)

    def _whole(self, images: list[PIL.Image.Image], **arguments: Any) -> Tensor:
        if _is_compose(self.processor):
            return torch.stack([self.processor(image) for image in images])
        processed = self.processor(images=images, return_tensors="pt", **arguments)
        return processed["pixel_values"]


def _centre_and_corners(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    bottom = pixels.shape[-2] - height
    right = pixels.shape[-1] - width
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    crops = [
        pixels[:, top : top + height, left : left + width]
        for top, left in [(bottom // 2, right // 2), *corners]
    ]
    return torch.stack(crops)


def _is_compose(processor: Any) -> bool:
    return hasattr(processor, "transforms")


def _stack(items: list[Any], key: str) -> Tensor:
    return torch.stack([torch.as_tensor(item[key]) for item in items])


def _import_kornia() -> Any:
    try:
        import kornia.augmentation
    except ImportError as error:
        raise ImportError(
            '`augment` needs kornia: pip install "peft_sage[data]"'
        ) from error
    return kornia.augmentation


def _read_in_threads(
    pictures: Iterable[Any],
    min_side: int | None,
    function: Callable[[list[PIL.Image.Image]], Any],
) -> list[Any]:
    """Apply a function to a few pictures at a time, which processors take in half the time, with a thread per core."""

    def work(part: list[Any]) -> Any:
        return function([read_image(picture, min_side=min_side) for picture in part])

    pictures = list(pictures)
    # A worker of a loader is one of many.
    cores = available_cores() if get_worker_info() is None else 1
    size = max(1, min(8, math.ceil(len(pictures) / cores)))
    parts = [pictures[i : i + size] for i in range(0, len(pictures), size)]
    if cores == 1 or len(parts) == 1:
        return [*map(work, parts)]
    with ThreadPoolExecutor(cores) as pool:
        return [*pool.map(work, parts)]
