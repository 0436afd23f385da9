# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user gave: an error names the argument, what came, and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch


def is_int(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: Any, low: float = -float("inf"), high: float = float("inf")) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high]."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) < float("inf") or not low <= value <= high:
        bounds = f", at least {low:g}" * (low > -float("inf")) + f", at most {high:g}" * (high < float("inf"))
        raise ValueError(f"`{name}` must be a finite number{bounds}, got {value!r}.")


def check_embeddings(embeddings: torch.Tensor, name: str) -> None:
    """Raise unless `embeddings` are floating-point rows (M, e): TypeError for their type, ValueError for their shape,
    NaN, infinity, or rows of zeros."""
    if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
        kind = embeddings.dtype if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor (M, e), got {kind}.")
    if embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ValueError(f"`{name}` must have the shape (M, e), got {tuple(embeddings.shape)}.")
    if embeddings.is_meta:
        return
    wrong = {"be finite, got NaN or infinity": ~embeddings.isfinite().all(dim=1)}
    wrong["have no rows of zeros, got them"] = (embeddings == 0).all(dim=1)
    for what, rows in wrong.items():
        if rows.any():
            raise ValueError(f"`{name}` must {what} in rows {rows.nonzero().flatten().tolist()[:10]}.")


def as_numbers(values: Sequence[float] | torch.Tensor, name: str) -> torch.Tensor:
    """Read real numbers as a tensor without gradient; TypeError if they are something else."""
    try:
        numbers = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be a (K,) tensor or list of numbers, got {values!r}.") from error
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold real numbers, got {numbers.dtype}.")
    return numbers


def check_class_counts(class_counts: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Read numbers of training images as (K,) int64 on the CPU; TypeError or ValueError says what is wrong."""
    counts = as_numbers(class_counts, "class_counts").cpu()
    if counts.ndim != 1 or len(counts) == 0:
        raise ValueError(
            f"`class_counts` must have shape (K,), one number per class, got shape {tuple(counts.shape)}."
        )
    counts = counts.double()
    wrong = ~((counts >= 0) & (counts == counts.round()) & counts.isfinite())
    if wrong.any():
        k = int(wrong.nonzero()[0])
        raise ValueError(
            "`class_counts` must hold whole numbers of images, at least 0 (counts, not frequencies), "
            f"got {counts[k].item()} for class {k}."
        )
    if not counts.any():
        raise ValueError("`class_counts` are all zero; at least one class must have training images.")
    return counts.long()


def check_labels(
    labels: torch.Tensor, num_classes: int, ignore_index: int | None = None, name: str = "labels"
) -> None:
    """Raise unless class indices are integers (TypeError) in [0, num_classes) or `ignore_index` (ValueError).

    The range is checked on the CPU only: elsewhere the host would wait for the device at every step, and the kernels
    that use the labels there assert it themselves.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"`{name}` must be integer class indices, got {labels.dtype}.")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (labels < 0) | (labels >= num_classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        raise ValueError(
            f"`{name}` must lie in [0, {num_classes}), got {labels[wrong][0].item()} at {int(wrong.nonzero()[0])}."
        )
