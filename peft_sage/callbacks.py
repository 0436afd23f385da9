# SPDX-License-Identifier: Apache-2.0
"""What `transformers.Trainer` needs beside the loss."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from .loss import SageLoss
from .metrics import LongTailAccuracy
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
        self.class_counts = check_class_counts(class_counts, len(loss.adjustment))

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracies as fractions, for Trainer's `compute_metrics`; groups without a class are left out."""
        logits = (
            prediction.predictions[0]
            if isinstance(prediction.predictions, tuple)
            else prediction.predictions
        )
        # Trainer has gathered the predictions of all processes.
        metric = LongTailAccuracy(self.class_counts, sync_on_compute=False)
        scores = metric(torch.as_tensor(logits), torch.as_tensor(prediction.label_ids))
        named = {
            name: scores[name].item()
            for name in ("overall", "macro", "many", "medium", "few", "worst")
        }
        return {name: score for name, score in named.items() if score == score}

    def on_train_begin(
        self, args: TrainingArguments, state: Any, *_: Any, **kwargs: Any
    ) -> None:
        """Refuse label smoothing by Trainer, and give the loss what a checkpoint kept of it."""
        if args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` is ignored by Trainer: use `SageLoss(label_smoothing=...)`."
            )
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and kept:
            file = io.BytesIO(base64.b64decode(kept["attributes"]["loss"]))
            self.loss.load_state_dict(torch.load(file, weights_only=True))

    def state(self) -> dict[str, Any]:
        """What Trainer writes into `trainer_state.json`."""
        file = io.BytesIO()
        torch.save(self.loss.state_dict(), file)
        return {
            "args": {},
            "attributes": {"loss": base64.b64encode(file.getvalue()).decode()},
        }
