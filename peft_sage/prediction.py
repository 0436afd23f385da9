# SPDX-License-Identifier: Apache-2.0
"""Whatever people hold pictures in, as batches for an image tower, in the order in which it was given."""

import glob
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from .collator import INPUTS, ImageCollator
from .pictures import find_images, read_image
from .validation import check_labels


_KINDS = "a path, a folder, a PIL image, an array (H, W, 3), or a list of these"


def make_batches(
    images: Any,
    image_processor: Any,
    batch_size: int,
    title: str,
    on_error: str = "raise",
) -> Iterator[tuple[dict[str, Tensor] | None, list[str | None]]]:
    """Yield inputs of the image tower, and for each image None or why it cannot be read; with a progress bar.

    Args:
        images: What [`SageClassifier.predict`] and [`SageClassifier.embed`] take.
        image_processor: Makes inputs of pictures.
        batch_size: Images in a batch, unless a loader makes the batches.
        title: Of the progress bar.
        on_error: "raise", or "skip" images that cannot be read; a batch of none but such is None.

    Raises:
        TypeError, ValueError: `images` is none of what can be read.
    """
    collate = ImageCollator(image_processor)
    items = _as_items(images)
    if isinstance(items, (list, tuple)):
        items = list(_expand(items, on_error))
    total = len(items) if hasattr(items, "__len__") else None
    if isinstance(items, DataLoader):
        chunks: Any = items
    elif hasattr(items, "__getitem__") and total is not None:
        # By position: the loader counts.
        chunks = DataLoader(items, batch_size=batch_size, collate_fn=list)
    else:
        chunks = _chunks(_expand(items, on_error), batch_size)
    with tqdm(desc=title, total=total, leave=False, delay=1) as bar:
        for chunk in chunks:
            if isinstance(chunk, list):
                chunk = [_stripped(item) for item in chunk]
                batch, errors = _collate(chunk, collate, on_error)
            else:
                batch = _inputs_of(chunk)
                errors = [None] * len(batch["pixel_values"])
            yield batch, errors
            bar.update(1 if isinstance(items, DataLoader) else len(errors))


def _as_items(images: Any) -> Any:
    """A sequence of pictures by position, an iterable of pictures or of batches, or a loader of batches."""
    is_file = isinstance(images, (str, os.PathLike, bytes)) or hasattr(images, "read")
    if is_file or isinstance(images, PIL.Image.Image):
        return [images]
    if isinstance(images, Mapping):
        if not images.keys() & {"pixel_values", "image", "bytes", "path"}:
            raise TypeError(
                f"`images` must be {_KINDS}, got a dictionary: give its `values()`."
            )
        return iter([images]) if "pixel_values" in images else [images]
    if isinstance(images, np.ndarray):
        return _pictures_in(images)
    if isinstance(images, Tensor):
        raise TypeError(
            "`images` must not be a tensor, which may be pixels before or after the image processor: give "
            '{"pixel_values": tensor} if it is (B, C, H, W) after it, or else arrays.'
        )
    if isinstance(images, (set, frozenset)):
        raise TypeError(
            "`images` must have an order, got a set: give `sorted(images)`."
        )
    if hasattr(images, "iloc"):
        # pandas, whose `[]` goes by the index and not by position
        if hasattr(images, "columns"):
            raise TypeError(
                f"`images` must be one column of a table, got all of {list(images.columns)}."
            )
        return images.tolist()
    if isinstance(images, IterableDataset):
        return iter(images)
    if isinstance(images, (list, tuple)) and images and _is_batch(images[0]):
        return iter(images)
    if not isinstance(images, Iterable) and not hasattr(images, "__getitem__"):
        raise TypeError(f"`images` must be {_KINDS}, got {type(images).__name__}.")
    return images


def _pictures_in(array: np.ndarray[Any, Any]) -> list[Any]:
    """The picture or pictures that an array is, or the paths that it holds."""
    if array.ndim == 1 and array.dtype.kind in "OU":
        return array.tolist()
    if array.ndim == 4:
        return list(array)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        return [array]
    raise ValueError(
        "`images` as an array must be one picture (H, W) or (H, W, 1, 3 or 4), or several (n, H, W, 1, 3 or 4), got "
        f"{array.shape}."
    )


def _expand(items: Iterable[Any], on_error: str) -> Iterator[Any]:
    """Put the images of folders in place of the folders, and those of patterns with `*` in place of the patterns."""
    for item in items:
        if not isinstance(item, (str, os.PathLike)):
            yield item
            continue
        path = os.path.expanduser(os.fspath(item))
        if not path:
            raise ValueError("`images` has an empty path.")
        if os.path.lexists(path) or not glob.has_magic(path):
            missing = on_error == "skip" and not os.path.isdir(path)
            yield from [item] if missing else find_images(item, recursive=True)
            continue
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise ValueError(f"`images`: nothing matches {path!r}.")
        yield from (p for p in find_images(found) if not os.path.isdir(p))


def _chunks(items: Iterator[Any], batch_size: int) -> Iterator[Any]:
    """Lists of pictures from an iterator of pictures; the batches of an iterator of batches as they are."""
    for item in items:
        if _is_batch(item):
            yield item
        else:
            yield [item, *itertools.islice(items, batch_size - 1)]


def _is_batch(item: Any) -> bool:
    """Whether a dictionary from an iterable holds the pixels of several images, and not of one."""
    if not (isinstance(item, Mapping) and "pixel_values" in item):
        return False
    if "pixel_attention_mask" in item:
        return item["pixel_attention_mask"].ndim == 2
    return item["pixel_values"].ndim >= 4


def _inputs_of(batch: Any) -> dict[str, Tensor]:
    if not (isinstance(batch, Mapping) and "pixel_values" in batch):
        raise TypeError(
            f"`images` must yield batches with `pixel_values`, got {type(batch).__name__}."
        )
    return {name: batch[name] for name in INPUTS if name in batch}


def _stripped(item: Any) -> Any:
    """What the tower needs of an item, without labels and the like."""
    if not isinstance(item, Mapping) or set(item) == {"bytes", "path"}:
        return item
    return {name: item[name] for name in ("image", *INPUTS) if name in item}


def _collate(
    items: list[Any], collate: ImageCollator, on_error: str
) -> tuple[dict[str, Tensor] | None, list[str | None]]:
    try:
        return collate(items), [None] * len(items)
    except ValueError:
        if on_error == "raise":
            raise
    errors = [_reading_error(item) for item in items]
    readable = [
        item for item, error in zip(items, errors, strict=True) if error is None
    ]
    return (collate(readable) if readable else None), errors


def _reading_error(item: Any) -> str | None:
    is_row = isinstance(item, Mapping) and "image" in item
    try:
        read_image(item["image"] if is_row else item)
    except ValueError as error:
        return str(error)
    return None


def best_classes(
    scores: Tensor, names: Mapping[int, str], top_k: int, min_score: float | None
) -> Iterator[list[dict[str, Any]] | None]:
    """Yield the likeliest classes of each image with scores (B, K), or None if the first is below `min_score`."""
    best = scores.topk(min(top_k, scores.shape[1]))
    for values, classes in zip(
        best.values.tolist(), best.indices.tolist(), strict=True
    ):
        if min_score is not None and values[0] < min_score:
            yield None
            continue
        pairs = zip(classes, values, strict=True)
        yield [{"label": names[k], "score": score} for k, score in pairs]


@torch.no_grad()
def fit_temperature(logits: Tensor, labels: Tensor, num_classes: int) -> float:
    """The factor in [0.05, 20] by which logits (n, K) are too large for the lowest cross-entropy on labels (n,)."""
    logits = torch.as_tensor(logits).detach().double()
    labels = torch.as_tensor(labels, device=logits.device)
    if logits.ndim != 2 or logits.shape[1] != num_classes or not len(logits):
        raise ValueError(
            f"`logits` must have the shape (n, {num_classes}), n > 0, got {tuple(logits.shape)}."
        )
    check_labels(labels, len(logits), num_classes)
    of_label = logits.gather(1, labels.long()[:, None]).mean()
    low = math.log(0.05)
    high = math.log(20)
    # The cross-entropy is convex in 1 / T; its derivative there is the mean logit minus that of the labels.
    while high - low > 1e-4:
        middle = (low + high) / 2
        probabilities = (logits / math.exp(middle)).softmax(dim=1)
        too_sharp = (probabilities * logits).sum(dim=1).mean() > of_label
        low, high = (middle, high) if too_sharp else (low, middle)
    return math.exp((low + high) / 2)
