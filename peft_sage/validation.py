# SPDX-License-Identifier: Apache-2.0
"""Checks of user input: an error names the argument, the value, and what would be right."""

from collections.abc import Iterable, Mapping, Sequence, Set
from math import inf
from typing import Any, TypeGuard

import torch
from torch import Tensor


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_int(value: Any) -> TypeGuard[int]:
    """Whether a value is a Python integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: Any, low: float = -inf, high: float = inf) -> float:
    """Return a finite number in [low, high] as a Python number; ValueError for anything else.

    NumPy scalars and tensors without dimensions are numbers too.
    """
    number = _as_scalar(value)
    is_number = is_int(number) or isinstance(number, float)
    if not is_number or abs(number) == inf or not low <= number <= high:
        raise ValueError(_message(name, "a finite number", value, low, high))
    return number


def check_integer(name: str, value: Any, low: int, high: float = inf) -> int:
    """Return an integer in [low, high] as a Python integer; ValueError for anything else."""
    number = _as_scalar(value)
    if not is_int(number) or not low <= number <= high:
        raise ValueError(_message(name, "an integer", value, low, high))
    return number


def _as_scalar(value: Any) -> Any:
    """The Python number of a NumPy scalar, or of an array or tensor without dimensions."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _message(name: str, kind: str, value: Any, low: float, high: float) -> str:
    bounds = [f"at least {low:g}"] if low > -inf else []
    bounds += [f"at most {high:g}"] if high < inf else []
    return f"`{name}` must be {', '.join([kind, *bounds])}, got {value!r}."


def check_embeddings(embeddings: Tensor, name: str, width: int | None = None) -> None:
    """Raise unless they are rows (M, e): TypeError for their type, ValueError for shape, NaN, infinity or zeros."""
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        is_tensor = isinstance(embeddings, Tensor)
        found = embeddings.dtype if is_tensor else type(embeddings).__name__
        raise TypeError(f"`{name}` must be a tensor of floats (M, e), got {found}.")
    shape = tuple(embeddings.shape)
    if len(shape) != 2 or shape[1] == 0 or width not in (None, shape[1]):
        raise ValueError(
            f"`{name}` must have the shape (M, {width or 'e'}), got {shape}."
        )
    for what, rows in (
        ("be finite, got NaN or infinity", ~embeddings.isfinite().all(dim=1)),
        ("have no rows of zeros, got them", (embeddings == 0).all(dim=1)),
    ):
        if not rows.is_meta and rows.any():
            raise ValueError(
                f"`{name}` must {what} in rows {rows.nonzero().flatten().tolist()[:10]}."
            )


def as_numbers(values: Sequence[float] | Tensor, name: str) -> Tensor:
    """Read real numbers as a tensor on the CPU without gradient; TypeError if they are something else.

    A pandas Series is read by position, whatever its index.
    """
    try:
        if isinstance(values, (str, Mapping, Set)):
            raise TypeError
        if hasattr(values, "tolist") and not isinstance(values, Tensor):
            values = values.tolist()
        elif isinstance(values, Iterable) and not isinstance(values, (Tensor, list)):
            values = list(values)
        numbers = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"`{name}` must be a (K,) tensor or list of numbers, got {values!r}."
        ) from error
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold real numbers, got {numbers.dtype}.")
    return numbers


def check_class_counts(class_counts: Any, num_classes: int | None = None) -> Tensor:
    """Read numbers of training images as (K,) int64 on the CPU; TypeError or ValueError says what is wrong.

    A pandas Series or a dict is read by its index, the class indices. Classes that it lacks have no images, if the
    number of classes is known.
    """
    values = by_class(class_counts, "class_counts", num_classes)
    counts = as_numbers(values, "class_counts").double()
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


def by_class(values: Any, name: str, num_classes: int | None) -> Any:
    """Put what a pandas Series or a dict has for each class into the order of the classes; the rest as it is."""
    if not (hasattr(values, "keys") and hasattr(values, "items")):
        return values
    counts = dict(values.items())
    keys = range(len(counts) if num_classes is None else num_classes)
    unknown = list(counts.keys() - set(keys))
    if unknown or len(counts) != len(values):
        found = unknown[:5] or "an index more than once"
        raise ValueError(
            f"`{name}` must be indexed by the class indices 0 to {len(keys) - 1}, each once; got {found}."
        )
    return [counts.get(key, 0) for key in keys]


def check_targets(labels: Any, shape: tuple[int, ...], ignore_index: int) -> None:
    """Raise unless they are class indices (B,), see [`check_labels`], or probabilities of the shape (B, K)."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        check_labels(labels, shape[0], shape[1], ignore_index)
        return
    if labels.shape != shape or not labels.is_floating_point():
        raise ValueError(
            f"`labels` must be indices (B,) or probabilities {shape}, got {tuple(labels.shape)}."
        )
    if torch.compiler.is_compiling() or not len(labels):
        return
    rows = labels.float()
    # Half precision rounds each of the K probabilities: their sum is right within a per cent.
    right = ((rows.sum(dim=1) - 1).abs() <= 0.01) & (rows >= 0).all(dim=1)
    if not right.all():
        where = int((~right).nonzero()[0])
        raise ValueError(
            "`labels` (B, K) must be probabilities, at least 0 with the sum 1 in each row, got the sum"
            f" {rows[where].sum().item():g} and the least {rows[where].min().item():g} in row {where}."
        )


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
        found = getattr(labels, "dtype", type(labels))
        raise TypeError(f"`{name}` must be a tensor of integers, got {found}.")
    if labels.shape != (num_images,):
        raise ValueError(
            f"`{name}` must have the shape ({num_images},), got {tuple(labels.shape)}."
        )
    on_cpu = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if num_classes is None or not on_cpu:
        return
    # The default of `ignore_index` lies in the range anyway.
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if wrong.any():
        where = int(wrong.nonzero()[0])
        raise ValueError(
            f"`{name}` must lie in [0, {num_classes}), got {labels[where].item()} at {where}."
        )
