# SPDX-License-Identifier: Apache-2.0
"""What `transformers.Trainer` needs in addition to the loss."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from .loss import SageLoss
from .metrics import LongTailAccuracy
from .validation import check_class_counts


GROUPS = ("overall", "macro", "many", "medium", "few", "none", "worst")


class LongTailCallback(TrainerCallback):
    """Accuracies over many, medium, few and no training images, and a loss that resumes with the run.

        loss = SageLoss(class_counts)
        callback = LongTailCallback(loss, class_counts)
        Trainer(..., compute_loss_func=loss, callbacks=[callback], compute_metrics=callback.compute_metrics)

    A run that starts at step 0 starts with a fresh loss; a resumed one with what its checkpoint holds.

    Args:
        loss: The loss that Trainer uses. Its moving average is saved in `scheduler.pt` of each checkpoint.
        class_counts: (K,) numbers of training images; a pandas Series or dict is read by its index.

    Raises:
        ValueError: `class_counts` are not (K,) integers, or their number is not that of the loss; when training
            starts: `label_smoothing_factor` is set, which Trainer ignores with `compute_loss_func`.
    """

    def __init__(self, loss: SageLoss, class_counts: Sequence[int] | Tensor) -> None:
        self.loss = loss
        self.class_counts = check_class_counts(class_counts, len(loss.adjustment))

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracies as fractions, for Trainer's `compute_metrics`; groups without a class are left out.

        Images whose label is the loss's `ignore_index` are ignored.
        """
        outputs = prediction.predictions
        labels = prediction.label_ids
        # Lists of batches, with `eval_do_concat_batches=False`.
        in_batches = isinstance(labels, list)
        batches = (
            zip(outputs, labels, strict=True) if in_batches else [(outputs, labels)]
        )
        # Trainer has gathered the predictions of all processes.
        metric = LongTailAccuracy(self.class_counts, sync_on_compute=False)
        for logits, label_ids in batches:
            first = logits[0] if isinstance(logits, (tuple, list)) else logits
            targets = torch.as_tensor(label_ids)
            counted = targets != self.loss.ignore_index
            metric.update(torch.as_tensor(first)[counted], targets[counted])
        scores = metric.compute()
        named = {name: scores[name].item() for name in GROUPS}
        return {name: score for name, score in named.items() if score == score}

    def on_train_begin(
        self, args: TrainingArguments, state: Any, *_: Any, **kwargs: Any
    ) -> None:
        """Refuse label smoothing by Trainer, and bring the loss to where the run starts."""
        if args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` is ignored by Trainer: use `SageLoss(label_smoothing=...)`."
            )
        self.loss.reset()
        # Trainer tells a callback nothing of the checkpoint's folder; what hangs on the scheduler is saved and comes
        # back with it, in a file of its own and whatever the folder's name.
        saved: Any = getattr(kwargs.get("lr_scheduler"), "sage_loss", None)
        if state.global_step and saved is None:
            warnings.warn(
                "The checkpoint does not hold the covariance that `SageLoss` measured: it is measured afresh.",
                stacklevel=2,
            )
        elif state.global_step:
            self.loss.load_state_dict(saved)

    def on_step_end(
        self, args: TrainingArguments, state: Any, *_: Any, **kwargs: Any
    ) -> None:
        """Keep the loss's state where Trainer saves it."""
        if kwargs.get("lr_scheduler") is not None:
            kwargs["lr_scheduler"].sage_loss = dict(self.loss.state_dict())
