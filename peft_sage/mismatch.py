# SPDX-License-Identifier: Apache-2.0
"""How far the images a class was trained on are from the images it will meet: the mismatch delta of `SageLoss`.

The abstract of Sage (arXiv 2507.12807) says that the class-conditional distributions of training and target data
differ and that a compensation factor corrects it. Both estimators of that factor in this file are ours: they measure,
in nats, how much better a class fits its own training images than images it has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .validation import check_class_counts, check_labels


# 8 MiB in float32: a chunk of features stays in the processor's shared cache between the steps, and is large enough
# that waking the threads for a step takes little of it. Elsewhere starting the steps has to take no time.
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_ACCELERATOR = 2**21, 2**26


def mismatch_from_counts(class_counts: Sequence[int] | torch.Tensor, effective_dim: float = 32.0) -> torch.Tensor:
    """Expected mismatch of a class of which only the number of training images is known.

    For Gaussian class conditionals with a shared covariance and a mean estimated from `n_k` images, the expected
    divergence from the true class is `effective_dim / (2 n_k)`; this is its bounded, posterior-predictive form:

        delta_k = (effective_dim / 2) * log(1 + 1 / n_k)

    Args:
        class_counts: (K,) numbers of training images. A class without images counts as one with a single image.
        effective_dim: number of directions in which an estimated class mean really errs; far below the embedding
            width. A quarter of the default did as well on the validation split of Emoji-LT (RESULTS.md).

    Returns:
        (K,) float32, in nats; falls with the count and tends to 0.

    Raises:
        ValueError: `class_counts` is no (K,) list of whole numbers, or `effective_dim` is not positive and finite.

    Reference: ours.
    """
    if not (math.isfinite(effective_dim) and effective_dim > 0):
        raise ValueError(f"`effective_dim` must be a positive, finite number, got {effective_dim}.")
    counts = check_class_counts(class_counts).double().clamp(min=1)
    return (effective_dim / 2 * torch.log1p(1 / counts)).float()


@torch.no_grad()
def estimate_mismatch(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    scale: float,
    shrinkage: float = 10.0,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Measured mismatch: how much closer images are to their class mean because they took part in it.

    With unit features `f_i`, the sum `S_k` of a class, its direction `m_k = S_k / |S_k|` and the direction
    `m_{k,-i}` of `S_k - f_i`, in which image i had no part, the optimism of class k is

        o_k = mean_i [ cos(f_i, m_k) - cos(f_i, m_{k,-i}) ]
        cos(f_i, m_k)      = a_i / |S_k|                                  where a_i = f_i . S_k
        cos(f_i, m_{k,-i}) = (a_i - 1) / sqrt(|S_k|^2 - 2 a_i + 1)

    so that three passes over the features suffice: for the lengths, the sums and the `a_i`. A few images say little
    about the dispersion of their class, and one image says nothing. So `o_k` is drawn towards the optimism of `n_k`
    images with the pooled within-class dispersion `1 - c`, `c` being the mean cosine of two images of one class:

        o(n, c) = sqrt((1 + (n - 1) c) / n) - c sqrt(m / (1 + (m - 1) c)),   m = max(n - 1, 1);   o(1, c) = 1 - c
        delta_k = scale * [ w_k o_k + (1 - w_k) o(n_k, c) ],                 w_k = (n_k - 1) / (n_k - 1 + shrinkage)

    Images of one class are often several of the same thing: of one animal, one patient, one product. An image that is
    left out alone is then still known through the others, and the mismatch comes out too small. With `groups`, all
    images of a group are left out together: the group's sum `G_g` takes the place of `f_i` in `S_k - f_i`, and the
    effective number of groups, n_k^2 / sum_g n_g^2, that of n_k.

    Under several processes, pass the features and labels gathered from all of them: sums over a part of a class give
    another result than their mean. To follow the adapted tower, measure anew each epoch and hand the result to
    `SageLoss.set_mismatch`.

    Args:
        features: (N, d) image features of the training images, of any floating type; normalised here. Beyond the
            features, memory is one (K, d) sum of float32 and a few numbers an image.
        labels: (N,) class indices.
        num_classes: K. A class without images counts as one with a single image.
        scale: the scale by which the head multiplies its cosines, which turns cosines into nats.
        shrinkage: the number of images (or groups) that the pooled dispersion is worth; 0 trusts each class's own from
            two.
        groups: (N,) integers that tell which images of a class belong together. Default: each image stands alone.

    Returns:
        (K,) float32, in nats, on the device of the features.

    Raises:
        ValueError: a shape, a label or a number is out of range, a feature is zero or not finite, or no class has two
            images (or groups), so that there is no dispersion to measure.
        TypeError: the features are not floating-point, or the labels or groups are not integers.

    Reference: ours.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "`features` must have shape (N, d) and `labels` shape (N,), "
            f"got {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if not features.is_floating_point():
        raise TypeError(f"`features` must be floating-point, got {features.dtype}.")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"`scale` must be a positive, finite number, got {scale}.")
    if not (math.isfinite(shrinkage) and shrinkage >= 0):
        raise ValueError(f"`shrinkage` must be a finite number, at least 0, got {shrinkage}.")
    check_labels(labels, num_classes)
    if groups is not None:
        if not isinstance(groups, torch.Tensor):
            raise TypeError(f"`groups` must be a tensor of integers, got {type(groups).__name__}.")
        if groups.shape != labels.shape:
            raise ValueError(f"`groups` must have shape {tuple(labels.shape)}, got {tuple(groups.shape)}.")
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise TypeError(f"`groups` must be integers, got {groups.dtype}.")

    labels = labels.to(features.device, torch.long)
    norm = _lengths(features)
    if not (norm.isfinite() & (norm > 0)).all():
        raise ValueError("`features` must be finite and no row may be zero.")
    a, squares, counts = _class_products(features, norm, labels, num_classes)
    if groups is None:
        # Of the sum of what is left out with an image: |G|^2, S_k . G, f_i . G, and the images in it.
        group_square, group_product, own, size = torch.ones_like(a), a, torch.ones_like(a), torch.ones_like(a)
    else:
        _, group = torch.stack([labels, groups.to(labels)], dim=1).unique(dim=0, return_inverse=True)
        num_groups = int(group.max()) + 1
        own, group_squares, sizes = _class_products(features, norm, group, num_groups)
        group_product = torch.zeros_like(group_squares).index_add_(0, group, a)[group]
        group_square, size = group_squares[group], sizes[group]

    # The two cosines differ by O(1 / n): their difference is taken in float64, which costs nothing at size (N,).
    square = squares[labels]
    with_own = a / square.clamp(min=1e-12).sqrt()
    without_own = (a - own) / (square - 2 * group_product + group_square).clamp(min=1e-12).sqrt()

    def of_class(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(squares).index_add_(0, labels, values)

    counts = counts.clamp(min=1)
    optimism = of_class(with_own - without_own) / counts
    repeats = (of_class(size) / counts).clamp(min=1)  # images in the group of an image, on average
    number = counts / repeats  # of groups
    degrees = number - 1
    if not degrees.any():
        things = "images" if groups is None else "groups"
        raise ValueError(f'`labels` hold no class with two {things}; use `mismatch="counts"`, which needs none.')
    between = ((squares - of_class(group_square / size)) / counts).sum() / (counts - repeats).sum()
    within = (group_square / size.square()).mean()
    pooled = _expected_optimism(number, between.clamp(0, 1), within)
    weight = torch.where(degrees > 0, degrees / (degrees + shrinkage), 0.0)
    return (scale * torch.lerp(pooled, optimism, weight).clamp(min=0)).float()


def _lengths(features: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    parts = features.split(_chunk_rows(features))
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in parts])


def chunk_rows(tensor: torch.Tensor, on_cpu: int, elsewhere: int) -> int:
    """Say how many rows of a tensor to work on at a time.

    Args:
        tensor: (N, d).
        on_cpu: How many elements on the CPU.
        elsewhere: How many elements on an accelerator.

    Returns:
        The number of rows, at least 1.
    """
    elements = on_cpu if tensor.device.type == "cpu" else elsewhere
    return max(1, elements // max(1, tensor.shape[1]))


def _chunk_rows(features: torch.Tensor) -> int:
    return chunk_rows(features, _CHUNK_ELEMENTS, _CHUNK_ELEMENTS_ACCELERATOR)


def _class_products(
    features: torch.Tensor, norm: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With the sum S_k of a class's unit features f_i: f_i . S_k (N,), |S_k|^2 (K,), the images (K,), in float64."""
    counts = torch.bincount(labels, minlength=num_classes)
    sums = _class_sums(features, norm.reciprocal(), labels, counts)
    rows = _chunk_rows(features)
    a = torch.empty_like(norm)
    products = sums.new_empty(rows, sums.shape[1])  # new memory for each chunk would cost as much as the products
    for part, label, out in zip(features.split(rows), labels.split(rows), a.split(rows), strict=True):
        own = torch.index_select(sums, 0, label, out=products[: len(label)])
        torch.sum(own.mul_(part), dim=1, out=out)
    return (a / norm).double(), torch.linalg.vecdot(sums, sums).double(), counts.double()


def _class_sums(
    features: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Sums (K, d) of the weighted features of each class, in the precision of the weights."""
    if features.dtype == weights.dtype:
        order = labels.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        return F.embedding_bag(order, features, starts, mode="sum", per_sample_weights=weights[order])
    # A bag of rows in half precision would be rounded to it.
    sums = weights.new_zeros(len(counts), features.shape[1])
    rows = _chunk_rows(features)
    for part, weight, label in zip(features.split(rows), weights.split(rows), labels.split(rows), strict=True):
        sums.index_add_(0, label, part * weight[:, None])
    return sums


def _expected_optimism(n: torch.Tensor, between: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    """Optimism of a class of `n` groups, from the cosine of two images of different groups and of the same group."""
    m = (n - 1).clamp(min=1)  # a lone group is compared with one other group of its class
    return ((within + (n - 1) * between) / n).sqrt() - between * (m / (within + (m - 1) * between)).sqrt()
