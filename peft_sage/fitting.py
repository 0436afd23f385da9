# SPDX-License-Identifier: Apache-2.0
"""Cosine heads trained on cached image embeddings, in seconds."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .covariance import compensation
from .loss import SageLoss
from .validation import as_numbers, check_embeddings, check_labels


#: Optimizer steps, images per step, learning rate, and the scale of the cosines.
STEPS, BATCH_SIZE, LEARNING_RATE, SCALE = 200, 256, 0.01, 25.0


def fit_head(
    features: Tensor,
    labels: Sequence[int] | Tensor,
    text_embeds: Tensor,
    loss: SageLoss,
    *,
    seed: int = 0,
) -> Tensor:
    """Train a head on cached image embeddings, starting from the texts.

    Args:
        features: (n, e) image embeddings of the frozen tower, on any device.
        labels: (n,) class indices.
        text_embeds: (K, e) text embeddings of the classes.
        loss: Its adjustment, compensation and text prior are applied. It is not changed.
        seed: Seed of the order of the images. The global random state is left alone.

    Returns:
        (K, e) rows of unit length, on the device of `features`.

    Raises:
        TypeError, ValueError: An argument does not fit, or `loss` smooths labels.
    """
    labels = check_features(features, labels, text_embeds)
    if len(loss.adjustment) != len(text_embeds):
        raise ValueError(
            f"`loss` must be of the {len(text_embeds)} classes of `text_embeds`, got {len(loss.adjustment)}."
        )
    if loss.label_smoothing:
        raise ValueError(
            f"`loss` must have `label_smoothing=0` here, got {loss.label_smoothing}."
        )
    heads = train_heads(
        F.normalize(features.float(), dim=-1),
        labels,
        F.normalize(text_embeds.float(), dim=-1),
        loss.training_adjustment[None],
        loss.gamma,
        torch.tensor([loss.text_prior]),
        Generator().manual_seed(seed),
    )
    return heads[0]


def check_features(
    features: Tensor, labels: Sequence[int] | Tensor, text_embeds: Tensor
) -> Tensor:
    """Return the labels as a tensor; TypeError or ValueError if features, labels and texts do not go together."""
    labels = as_numbers(labels, "labels")
    check_embeddings(features, "features")
    check_embeddings(text_embeds, "text_embeds", features.shape[1])
    check_labels(labels, len(features), len(text_embeds))
    return labels


@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    texts: Tensor,
    adjustment: Tensor,
    gamma: Tensor,
    strengths: Tensor,
    rng: Generator,
) -> Tensor:
    """Train H heads from the texts at once, and return their rows (H, K, e), of unit length.

    All tensors may be on any device; the heads are on that of the features.

    Args:
        features: (n, e), of unit length.
        labels: (n,) class indices.
        texts: (K, e), of unit length.
        adjustment: (H, K), added to the logits; -inf leaves a class out of the softmax.
        gamma: (K,) of the compensation.
        strengths: (H,) of the text prior.
        rng: For the order of the images.
    """
    labels = labels.to(features.device)
    texts, adjustment, gamma, strengths = (
        tensor.to(features) for tensor in (texts, adjustment, gamma, strengths)
    )
    heads = len(strengths)
    # The features are frozen, and so is their covariance within the classes.
    covariance = _covariance(SCALE * features, labels, len(texts))
    weight = texts.expand(heads, -1, -1).clone()
    optimizer = torch.optim.AdamW([weight], lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for batch in _batches(len(labels), rng):
        label = labels[batch]
        norm = weight.norm(dim=-1, keepdim=True)
        rows = (weight / norm).requires_grad_()
        with torch.enable_grad():
            logits = adjustment[:, None] + compensation(
                rows, covariance, gamma[label], label, SCALE * features[batch]
            )
            prior = strengths @ (1 - (rows * texts).sum(dim=-1)).mean(dim=1)
            # Each head is a run of its own: their losses add up.
            loss = F.cross_entropy(logits.flatten(0, 1), label.repeat(heads))
            (heads * loss + prior).backward()
        # The gradient of the weight is that of its direction, without the part along it.
        along = (rows.grad * rows).sum(dim=-1, keepdim=True)
        weight.grad = torch.addcmul(rows.grad, along, rows, value=-1).div_(norm)
        optimizer.step()
        schedule.step()
    return F.normalize(weight, dim=-1)


def _covariance(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The pooled covariance (e, e) of all features within their classes."""
    images = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    sums = features.new_zeros(num_classes, features.shape[1])
    sums.index_add_(0, labels, features)
    residuals = features - (sums / images[:, None])[labels]
    degrees_of_freedom = len(labels) - len(labels.unique())
    return residuals.T @ residuals / max(1, degrees_of_freedom)


def _batches(num_images: int, rng: Generator) -> tuple[Tensor, ...]:
    """The images of each step: epochs of all of them in random order."""
    size = min(BATCH_SIZE, num_images)
    epochs = range(math.ceil(STEPS * size / num_images))
    order = torch.cat([torch.randperm(num_images, generator=rng) for _ in epochs])
    return order[: STEPS * size].split(size)
