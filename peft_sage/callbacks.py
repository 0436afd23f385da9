# SPDX-License-Identifier: Apache-2.0
"""What `transformers.Trainer` needs beside the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import towers
from .classifier import CosineHead
from .loss import SageLoss
from .mismatch import estimate_mismatch
from .validation import check_class_counts


class LongTailCallback(TrainerCallback):
    """Measures the mismatch anew before each epoch, and reports accuracies over many, medium and few classes.

        loss = SageLoss.from_labels(labels, num_classes)
        callback = LongTailCallback(loss, class_counts)
        Trainer(..., compute_loss_func=loss, callbacks=[callback], compute_metrics=callback.compute_metrics)

    Before each epoch the training images go once through the tower as it is then, without dropout and gradients, and
    `loss.set_mismatch` gets what [`estimate_mismatch`] says of their embeddings.
    Each process takes its share of the images. Augmentation that the data set does itself is seen as it comes.

    Args:
        loss: The loss that Trainer uses.
        class_counts: (K,) numbers of training images.
        refresh: Whether to measure; without, the callback is for `compute_metrics` only.
        scale: Scale of the head's cosines. Default: that of the model's [`CosineHead`].

    Raises:
        ValueError: `class_counts` is no (K,) list of whole numbers, or its length is not that of the loss. While
            training: the model has no `CosineHead` and no `scale` was given, or the data set has no length.

    Reference: the compensation is the paper's (arXiv 2507.12807); measuring it each epoch is ours.
    """

    def __init__(
        self,
        loss: SageLoss,
        class_counts: Sequence[int] | torch.Tensor,
        refresh: bool = True,
        scale: float | None = None,
    ) -> None:
        self.loss = loss
        self.class_counts = check_class_counts(class_counts)
        if len(self.class_counts) != len(loss.adjustment):
            raise ValueError(
                f"`class_counts` must have the {len(loss.adjustment)} classes of `loss`, got {len(self.class_counts)}."
            )
        self.refresh = refresh
        self.scale = scale

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the accuracies, for Trainer's `compute_metrics`. Needs torchmetrics.

        Args:
            prediction: Logits (N, K) and class indices (N,).

        Returns:
            `overall`, `macro`, `many`, `medium`, `few` and `worst` as fractions; groups without a class are left out.
        """
        from .metrics import LongTailAccuracy

        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        # Trainer has gathered the predictions of all processes.
        metric = LongTailAccuracy(self.class_counts, sync_on_compute=False)
        metric.update(torch.as_tensor(logits), torch.as_tensor(prediction.label_ids))
        scores = metric.compute()
        named = {name: scores[name].item() for name in ("overall", "macro", "many", "medium", "few", "worst")}
        return {name: score for name, score in named.items() if score == score}

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure the mismatch and give it to the loss; called by Trainer.

        Args:
            args: Trainer's arguments, of which the device is used.
            state: Unused.
            control: Unused.
            model: The model, unwrapped.
            train_dataloader: Its batches have `pixel_values` (B, C, H, W) and `labels` (B,).
            **kwargs: Unused.

        Raises:
            ValueError: If no `scale` was given and the model has no [`CosineHead`], or the data set has no length.
        """
        if not self.refresh or model is None or train_dataloader is None:
            return
        scale = self.scale
        if scale is None:
            head = next((module for module in model.modules() if isinstance(module, CosineHead)), None)
            if head is None:
                raise ValueError("`scale` must be given, because the model has no `CosineHead` that tells it.")
            scale = head.scale
        features, labels = _features(model, train_dataloader, args.device)
        self.loss.set_mismatch(estimate_mismatch(features, labels, len(self.class_counts), scale))


@torch.no_grad()
def _features(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, e) and class indices (N,) of the training images, from all processes, on the CPU."""
    if not hasattr(loader.dataset, "__len__"):
        raise ValueError("`refresh` needs a training data set with a length; pass `refresh=False` for a stream.")
    processes = PartialState()
    share = Subset(loader.dataset, range(processes.process_index, len(loader.dataset), processes.num_processes))
    # Not Trainer's own loader: reading it would change the order of the images to come.
    batches = DataLoader(
        share,
        batch_size=getattr(loader, "total_batch_size", None) or loader.batch_size or 1,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )
    features, labels = [], []
    # Nor may random augmentation shift the random numbers of the training.
    with towers.eval_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for batch in tqdm(
            batches, desc="Measuring mismatch", leave=False, disable=not processes.is_local_main_process
        ):
            features.append(towers.encode_image(model, batch["pixel_values"].to(device)).float().cpu())
            labels.append(batch["labels"].cpu())
    gathered = gather_object([(torch.cat(features), torch.cat(labels))] if features else [])
    return torch.cat([part for part, _ in gathered]), torch.cat([part for _, part in gathered])
