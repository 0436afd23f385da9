# SPDX-License-Identifier: Apache-2.0
"""Batches of a data set by position, with its images decoded once where they fit into memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .classifier import SageClassifier
from .collator import ImageCollator


#: Images that are decoded between two steps of the progress bar.
CHUNK = 256


class ImageBatches(Dataset[Any]):
    """Batches of a data set: `batches.__getitems__([3, 1])` is a dictionary of tensors, as a `DataLoader` asks for it.

    With an [`ImageCollator`] a batch has `pixels` (B, 3, H, W) uint8, which can be kept in memory and become the
    model's input on its device, by [`ImageCollator.finish`]. Where that is not possible, since the items have
    `pixel_values` already or augmentation starts from the pictures, and for any other collator, it is collated here.

    Args:
        source: Items by position, each a dictionary.
        collator: What makes batches of them.
        crops: 5 for `pixels` (B, 5, 3, H, W) of centre and corners.

    Attributes:
        cached: All pixels (n, ...) and labels, once they are in memory.
        embeds: (n, e) embeddings by the frozen tower, which go with the images as `base_image_embeds`.
    """

    def __init__(
        self, source: Any, collator: Callable[[list[Any]], Any], crops: int = 1
    ) -> None:
        self.source = source
        self.collator = collator
        self.crops = crops
        self.cached: dict[str, Tensor] = {}
        self.embeds: Tensor | None = None
        self.makes_pixels = False
        if isinstance(collator, ImageCollator) and "pixel_values" not in source[0]:
            self.source = undecoded(source, collator.image_column)
            self.makes_pixels = collator.makes_pixels

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        batch = {key: values[indices] for key, values in self.cached.items()}
        batch = batch or self._collated(indices)
        if self.embeds is not None:
            batch["base_image_embeds"] = self.embeds[indices]
        return batch

    def _collated(self, indices: Iterable[int]) -> dict[str, Any]:
        collator: Any = self.collator
        items = [self.source[index] for index in indices]
        if self.makes_pixels:
            return collator.collate_pixels(items, self.crops)
        return dict(collator(items))

    def cache(self, max_bytes: float, progress: bool = False) -> None:
        """Decode all images now if they take no more than `max_bytes`."""
        if not self.makes_pixels:
            return
        first = self._collated([0])
        if first["pixels"].numel() * len(self) > max_bytes:
            return
        cached = {
            key: values.new_empty(len(self), *values.shape[1:])
            for key, values in first.items()
        }
        title = "decoding images"
        with tqdm(
            total=len(self), desc=title, leave=False, disable=not progress
        ) as bar:
            for start in range(0, len(self), CHUNK):
                rows = range(len(self))[start : start + CHUNK]
                for key, values in self._collated(rows).items():
                    cached[key][start : rows.stop] = values
                bar.update(len(rows))
        self.cached = cached

    def loader(self, num_workers: int, **arguments: Any) -> DataLoader[Any]:
        """A loader of these batches; workers decode what is not in memory."""
        if self.cached or isinstance(self.source, list):
            num_workers = 0
        return DataLoader(self, num_workers=num_workers, collate_fn=dict, **arguments)


def embed_images(
    accelerator: Accelerator,
    classifier: SageClassifier,
    batches: ImageBatches,
    finish: Callable[[Tensor], Tensor],
    batch_size: int,
    num_workers: int,
) -> Tensor:
    """Embeddings (n, e) of all images by the frozen tower, of which each process computes its share.

    `finish` makes the model's input of `pixels`, without augmentation.
    """
    rank = accelerator.process_index
    size = -(-len(batches) // accelerator.num_processes)
    share = range(len(batches))[rank * size : (rank + 1) * size]
    loader = batches.loader(num_workers, batch_size=batch_size, sampler=share)

    def inputs() -> Iterator[dict[str, Tensor]]:
        for batch in loader:
            if "pixels" in batch:
                pixels = batch["pixels"].to(accelerator.device, non_blocking=True)
                batch["pixel_values"] = finish(pixels)
            yield batch

    embeds = classifier.text_embeds[:0].float().cpu()
    if share:
        with accelerator.autocast():
            embeds = classifier.embed(inputs())
    padded = accelerator.pad_across_processes(embeds.to(accelerator.device))
    return accelerator.gather(padded).cpu()[: len(batches)]


def undecoded(source: Any, image_column: str) -> Any:
    """A data set whose images come as bytes and paths, which `read_image` takes, if it is one of `datasets`."""
    if not hasattr(source, "cast_column"):
        return source
    from datasets import Image

    if not isinstance(source.features.get(image_column), Image):
        return source
    return source.cast_column(image_column, Image(decode=False))
