# SPDX-License-Identifier: Apache-2.0
"""What `transformers.Trainer` needs beside the loss."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .loss import SageLoss
from .validation import check_class_counts


class LongTailCallback(TrainerCallback, ExportableState):
    """Accuracies over many, medium and few classes, and a loss that resumes with the run.

        loss = SageLoss(class_counts)
        callback = LongTailCallback(loss, class_counts)
        Trainer(..., compute_loss_func=loss, callbacks=[callback], compute_metrics=callback.compute_metrics)

    Args:
        loss: The loss that Trainer uses. Its moving average goes into the checkpoints and comes back from them.
        class_counts: (K,) numbers of training images.

    Raises:
        ValueError: `class_counts` is no (K,) list of whole numbers, or its length is not that of the loss; when
            training starts: `label_smoothing_factor` is set, which Trainer ignores beside `compute_loss_func`.
    """

    def __init__(self, loss: SageLoss, class_counts: Sequence[int] | Tensor) -> None:
        self.loss = loss
        self.class_counts = check_class_counts(class_counts)
        expected, got = len(loss.adjustment), len(self.class_counts)
        if got != expected:
            raise ValueError(f"`class_counts` must have the {expected} classes of `loss`, got {got}.")

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracies as fractions, for Trainer's `compute_metrics`; groups without a class are left out."""
        from .metrics import LongTailAccuracy

        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        # Trainer has gathered the predictions of all processes.
        metric = LongTailAccuracy(self.class_counts, sync_on_compute=False)
        metric.update(torch.as_tensor(logits), torch.as_tensor(prediction.label_ids))
        scores = metric.compute()
        named = {name: scores[name].item() for name in ("overall", "macro", "many", "medium", "few", "worst")}
        return {name: score for name, score in named.items() if score == score}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Refuse label smoothing by Trainer, and give the loss what a checkpoint kept of it."""
        if args.label_smoothing_factor:
            got = f"got {args.label_smoothing_factor}, which Trainer ignores beside `compute_loss_func`"
            raise ValueError(f"`label_smoothing_factor` must be 0, {got}: use `SageLoss(label_smoothing=...)`.")
        saved: Any = state.stateful_callbacks or {}
        kept = saved.get(type(self).__name__)
        if state.global_step and kept:
            file = io.BytesIO(base64.b64decode(kept["attributes"]["loss"]))
            self.loss.load_state_dict(torch.load(file, weights_only=True))

    def state(self) -> dict[str, Any]:
        """What Trainer writes into `trainer_state.json`."""
        file = io.BytesIO()
        torch.save(self.loss.state_dict(), file)
        return {"args": {}, "attributes": {"loss": base64.b64encode(file.getvalue()).decode()}}
