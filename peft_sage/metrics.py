# SPDX-License-Identifier: Apache-2.0
"""Accuracy as long-tailed recognition reports it. Needs torchmetrics: `pip install peft_sage[all]`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .validation import check_class_counts, check_labels


class LongTailAccuracy(Metric):
    """Accuracies over all classes and over those with many, a medium number of and few training images.

    Group accuracies are unweighted means over classes, as in the long-tail literature. A class that does not occur in
    the evaluation counts nowhere. All accuracies are fractions in [0, 1]. Right under several processes: the states
    are sums over images, which torchmetrics adds up before `compute`.

    Args:
        class_counts: (K,) numbers of *training* images, which decide the groups.
        many: a class with more training images than this has many.
        few: a class with fewer training images than this has few; all others are medium.
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
        if not 0 <= few <= many:
            raise ValueError(
                f"`few` must be at least 0 and at most `many`, got few={few} and many={many}."
            )
        self.many, self.few = many, few
        self.register_buffer("class_counts", counts, persistent=False)
        self.add_state("correct", torch.zeros_like(counts), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros_like(counts), dist_reduce_fx="sum")

    def update(self, preds: Tensor, labels: Tensor) -> None:
        """Counts a batch.

        Args:
            preds: (B, K) logits or probabilities, or (B,) predicted class indices.
            labels: (B,) class indices.

        Raises:
            TypeError, ValueError: a type or shape is wrong, or a class out of range (checked on the CPU only).
        """
        num_classes = len(self.class_counts)
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

        They are `overall` (over images), `macro` (over classes), `many`, `medium`, `few`, `worst` (class) and
        `per_class` (K,), NaN where there is nothing to average; and how many classes the groups have in the
        evaluation, `num_many`, `num_medium` and `num_few`.
        """
        seen = self.total > 0
        per_class = self.correct / self.total  # 0 / 0 is NaN: the class did not occur
        accuracy, counts = per_class[seen], self.class_counts[seen]
        groups = {"many": counts > self.many, "few": counts < self.few}
        groups["medium"] = ~(groups["many"] | groups["few"])
        return {
            "overall": self.correct.sum() / self.total.sum(),
            "macro": accuracy.mean(),
            **{
                name: accuracy[groups[name]].mean()
                for name in ("many", "medium", "few")
            },
            "worst": accuracy.min() if len(accuracy) else accuracy.mean(),
            "per_class": per_class,
            **{f"num_{name}": groups[name].sum() for name in ("many", "medium", "few")},
        }
