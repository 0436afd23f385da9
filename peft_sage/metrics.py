# SPDX-License-Identifier: Apache-2.0
"""Accuracy as long-tailed recognition reports it. Needs torchmetrics: `pip install "peft_sage[metrics]"`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .validation import as_numbers, check_class_counts, check_integer, check_labels


class LongTailAccuracy(Metric):
    """Accuracies over all classes and over those with many, a medium number of, few and no training images.

    Group accuracies are unweighted means over classes, as in the long-tail literature. Classes that do not occur in
    the evaluation are excluded. All accuracies are fractions in [0, 1]. Right under several processes: the states
    are sums over images, which torchmetrics adds up before `compute`.

    Args:
        class_counts: (K,) numbers of *training* images, which decide the groups; a pandas Series or dict is read by
            its index.
        many: a class with more training images than this has many.
        few: a class with fewer training images than this, and at least one, has few; all others are medium.
        **kwargs: passed to `torchmetrics.Metric`.
    """

    full_state_update = False
    class_counts: Tensor
    correct: Tensor
    total: Tensor

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        many: int = 100,
        few: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        counts = check_class_counts(class_counts)
        self.many = check_integer("many", many, 0)
        self.few = check_integer("few", few, 0)
        if few > many:
            raise ValueError(
                f"`few` must be at most `many`, got few={few} and many={many}."
            )
        self.register_buffer("class_counts", counts, persistent=False)
        self.add_state("correct", torch.zeros_like(counts), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros_like(counts), dist_reduce_fx="sum")

    def update(self, preds: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            preds: (B, K) logits or probabilities, or (B,) predicted class indices, as a tensor or numbers by position.
            labels: (B,) class indices.

        Raises:
            TypeError, ValueError: a type or shape is wrong, or a class out of range (checked on the CPU only).
        """
        num_classes = len(self.class_counts)
        if not isinstance(preds, Tensor):
            preds = as_numbers(preds, "preds").to(self.class_counts.device)
        if not isinstance(labels, Tensor):
            labels = as_numbers(labels, "labels").to(self.class_counts.device)
        if preds.ndim == 2:
            if preds.shape[1] != num_classes:
                raise ValueError(
                    f"`preds` must have {num_classes} classes, got shape {tuple(preds.shape)}."
                )
            preds = preds.argmax(dim=1)
        check_labels(preds, len(labels), num_classes, name="preds")
        check_labels(labels, len(preds), num_classes)
        self.total += torch.bincount(labels, minlength=num_classes)
        self.correct += torch.bincount(labels[preds == labels], minlength=num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies of all batches so far.

        They are `overall` (over images), `macro` (over classes), `many`, `medium`, `few`, `none`, `worst` (class) and
        `per_class` (K,), NaN where there is nothing to average; and how many classes the groups have in the
        evaluation, `num_many`, `num_medium`, `num_few` and `num_none`.
        """
        seen = self.total > 0
        per_class = self.correct / self.total  # 0 / 0 is NaN: the class did not occur
        accuracy = per_class[seen]
        counts = self.class_counts[seen]
        groups = {
            "many": counts > self.many,
            "medium": (counts >= self.few) & (counts <= self.many) & (counts > 0),
            "few": (counts < self.few) & (counts > 0),
            "none": counts == 0,
        }
        return {
            "overall": self.correct.sum() / self.total.sum(),
            "macro": accuracy.mean(),
            **{name: accuracy[group].mean() for name, group in groups.items()},
            "worst": accuracy.min() if len(accuracy) else accuracy.mean(),
            "per_class": per_class,
            **{f"num_{name}": group.sum() for name, group in groups.items()},
        }
