# SPDX-License-Identifier: Apache-2.0
"""Methods of other papers that work on the frozen embeddings, written from the papers."""

import functools
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_sage import SageLoss

from .methods import (
    HEAD_BATCH_SIZE,
    HEAD_STEPS,
    Data,
    Settings,
    accuracies,
    batches,
    each_split,
    fit,
)


CACHE_EPOCHS, SHOTS = 5, 16


def zero_shot(
    settings: Settings,
    data: Data,
    seed: int,
) -> dict[str, Tensor]:
    """Similarity to the texts."""
    return each_split(data, lambda embeds: embeds @ data.task.text_embeds.T)


def clap(
    settings: Settings,
    data: Data,
    seed: int,
) -> dict[str, Tensor]:
    """CLAP (arXiv 2312.12730): a linear probe that starts at the texts and is held there, class by class.

    The multiplier of a class is the mean probability that zero-shot gives its training images, set once.
    """
    texts = data.task.text_embeds
    scale = data.task.logit_scale
    probability = (
        (scale * data.embeds[:, 0] @ texts.T)
        .softmax(dim=1)
        .gather(1, data.labels[:, None])[:, 0]
    )
    multipliers = torch.zeros(len(texts)).index_add_(
        0, data.labels, probability
    ) / data.counts.clamp(min=1)
    weight = texts.clone().requires_grad_()
    loss = SageLoss(data.counts, tau=settings.tau, compensation=0)

    def losses() -> Iterator[Tensor]:
        for images, views in batches(
            *data.embeds.shape[:2], HEAD_BATCH_SIZE, HEAD_STEPS, seed
        ):
            distances = (weight - texts).square().sum(dim=1)
            logits = scale * data.embeds[images, views] @ F.normalize(weight, dim=-1).T
            yield loss(logits, data.labels[images]) + (multipliers * distances).mean()

    fit(
        torch.optim.AdamW([weight], lr=settings.rates[1], weight_decay=0),
        losses(),
        HEAD_STEPS,
    )
    rows = F.normalize(weight.detach(), dim=-1)
    return each_split(data, lambda embeds: embeds @ rows.T)


def best_on_validation(
    data: Data, candidates: Iterable[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The logits with the best macro accuracy on the validation split."""
    return max(
        candidates,
        key=lambda logits: accuracies(
            logits["validation"], data.task.validation, data.counts
        )["macro"],
    )


def tip_adapter(
    settings: Settings,
    data: Data,
    seed: int,
) -> dict[str, Tensor]:
    """Tip-Adapter-F (arXiv 2111.03930): a cache of all training images, whose keys are trained.

    Every class weighs as much as one of 16 images does in the paper, where all have as many. The weight and sharpness
    of the cache are searched on the validation split after training, as there.
    """
    texts = data.task.text_embeds
    scale = data.task.logit_scale
    keys = F.normalize(data.embeds.mean(dim=1), dim=-1).requires_grad_()
    values = SHOTS * F.one_hot(data.labels, len(texts)) / data.counts[data.labels, None]
    loss = SageLoss(data.counts, tau=settings.tau, compensation=0)

    def cache(features: Tensor, beta: float) -> Tensor:
        return (beta * (features @ keys.T - 1)).exp() @ values

    steps = CACHE_EPOCHS * math.ceil(len(data.labels) / HEAD_BATCH_SIZE)
    order = batches(*data.embeds.shape[:2], HEAD_BATCH_SIZE, steps, seed)

    def losses() -> Iterator[Tensor]:
        for images, views in order:
            features = data.embeds[images, views]
            logits = scale * features @ texts.T + cache(features, 5.5)
            yield loss(logits, data.labels[images])

    optimizer = torch.optim.AdamW([keys], settings.rates[1], eps=1e-4, weight_decay=0)
    fit(optimizer, losses(), steps)

    @torch.no_grad()
    def candidates() -> Iterator[dict[str, Tensor]]:
        zero_shot = each_split(data, lambda features: scale * features @ texts.T)
        for beta in (1.0, 5.5, 20.0):
            cached = each_split(data, functools.partial(cache, beta=beta))
            for alpha in (0.3, 1.0, 3.0):
                yield {k: zero_shot[k] + alpha * cached[k] for k in zero_shot}

    return best_on_validation(data, candidates())


def gda(
    settings: Settings,
    data: Data,
    seed: int,
) -> dict[str, Tensor]:
    """Gaussian discriminant analysis with zero-shot logits (arXiv 2402.04087): one covariance, shrunk, no training.

    The weight of the two is searched on the validation split, as in the paper.
    """
    texts = data.task.text_embeds
    scale = data.task.logit_scale
    features, labels = (
        data.embeds.flatten(0, 1),
        data.labels.repeat_interleave(data.embeds.shape[1]),
    )
    means = (
        torch.zeros_like(texts).index_add_(0, labels, features)
        / labels.bincount(minlength=len(texts))[:, None]
    )
    covariance = (features - means[labels]).T.cov()
    images, width = features.shape
    precision = width * torch.linalg.inv(
        (images - 1) * covariance + covariance.trace() * torch.eye(width)
    )
    weight = means @ precision
    bias = -(weight * means).sum(dim=1) / 2

    def logits(seen: Tensor, alpha: float) -> Tensor:
        return scale * seen @ texts.T + alpha * (seen @ weight.T + bias)

    tried = (
        each_split(data, functools.partial(logits, alpha=alpha))
        for alpha in (3, 30, 300)
    )
    return best_on_validation(data, tried)
