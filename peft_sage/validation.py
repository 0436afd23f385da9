# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user gave: an error names the argument, what came, and what would be right."""

from collections.abc import Sequence
from math import inf
from typing import Any, TypeGuard

import torch
from torch import Tensor


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_int(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: Any, low: float = -inf, high: float = inf) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high]."""
    if (
        not (is_int(value) or isinstance(value, float))
        or not abs(value) < inf
        or not low <= value <= high
    ):
        bounds = f", at least {low:g}" * (low > -inf) + f", at most {high:g}" * (
            high < inf
        )
        raise ValueError(f"`{name}` must be a finite number{bounds}, got {value!r}.")


def check_integer(name: str, value: Any, low: int, high: float = inf) -> None:
    """Raise ValueError unless `value` is an integer in [low, high]."""
    if not is_int(value) or not low <= value <= high:
        bounds = f", at least {low}" + f", at most {high:g}" * (high < inf)
        raise ValueError(f"`{name}` must be an integer{bounds}, got {value!r}.")


def check_embeddings(embeddings: Tensor, name: str, width: int | None = None) -> None:
    """Raise unless they are rows (M, e): TypeError for their type, ValueError for shape, NaN, infinity or zeros."""
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise TypeError(
            f"`{name}` must be floats (M, e), got {getattr(embeddings, 'dtype', type(embeddings))}."
        )
    if (
        embeddings.ndim != 2
        or embeddings.shape[1] == 0
        or width not in (None, embeddings.shape[1])
    ):
        raise ValueError(
            f"`{name}` must have the shape (M, {width or 'e'}), got {tuple(embeddings.shape)}."
        )
    wrong = {"be finite, got NaN or infinity": ~embeddings.isfinite().all(dim=1)}
    wrong["have no rows of zeros, got them"] = (embeddings == 0).all(dim=1)
    for what, rows in wrong.items():
        if not rows.is_meta and rows.any():
            raise ValueError(
                f"`{name}` must {what} in rows {rows.nonzero().flatten().tolist()[:10]}."
            )


def as_numbers(values: Sequence[float] | Tensor, name: str) -> Tensor:
    """Read real numbers as a tensor on the CPU without gradient; TypeError if they are something else."""
    try:
        numbers = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`{name}` must be a (K,) tensor or list of numbers, got {values!r}."
        ) from error
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold real numbers, got {numbers.dtype}.")
    return numbers


def check_class_counts(
    class_counts: Sequence[int] | Tensor, num_classes: int | None = None
) -> Tensor:
    """Read numbers of training images as (K,) int64 on the CPU; TypeError or ValueError says what is wrong."""
    counts = as_numbers(class_counts, "class_counts").double()
    if counts.ndim != 1 or len(counts) == 0 or num_classes not in (None, len(counts)):
        raise ValueError(
            f"`class_counts` must have the shape ({num_classes or 'K'},), got {tuple(counts.shape)}."
        )
    for k, count in enumerate(counts.tolist()):
        if not 0 <= count < inf or count != int(count):
            raise ValueError(
                f"`class_counts` must be numbers of images, not frequencies, got {count} for class {k}."
            )
    if not counts.any():
        raise ValueError(
            "`class_counts` are all zero; at least one class must have training images."
        )
    return counts.long()


def check_labels(
    labels: Tensor,
    num_images: int,
    num_classes: int | None,
    ignore_index: int = 0,
    name: str = "labels",
) -> None:
    """Raise unless class indices are integers (TypeError), (num_images,) in [0, num_classes) or `ignore_index`.

    The range is checked on the CPU only: elsewhere the host would wait for the device at every step, and the kernels
    that use the labels there assert it themselves. Without `num_classes` it is not checked.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        raise TypeError(
            f"`{name}` must be a tensor of integers, got {getattr(labels, 'dtype', type(labels))}."
        )
    if labels.shape != (num_images,):
        raise ValueError(
            f"`{name}` must have the shape ({num_images},), got {tuple(labels.shape)}."
        )
    if (
        num_classes is None
        or labels.device.type != "cpu"
        or torch.compiler.is_compiling()
    ):
        return
    # The default of `ignore_index` lies in the range anyway.
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if wrong.any():
        where = int(wrong.nonzero()[0])
        raise ValueError(
            f"`{name}` must lie in [0, {num_classes}), got {labels[where].item()} at {where}."
        )
