# SPDX-License-Identifier: Apache-2.0
"""`LongTailCallback` in a real `Trainer`."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_sage import (
    LongTailAccuracy,
    LongTailCallback,
    SageClassifier,
    SageConfig,
    SageLoss,
)
from tests.conftest import tiny_clip


LABELS = [0] * 6 + [1] * 3 + [2]
IMAGES = torch.randn(len(LABELS), 3, 16, 16, generator=torch.Generator().manual_seed(5))
DATA = [
    {"pixel_values": image, "labels": label}
    for image, label in zip(IMAGES, LABELS, strict=True)
]
COUNTS = [6, 3, 1]


def make_trainer(folder, loss, counts=COUNTS, **arguments):
    torch.manual_seed(0)
    config = SageConfig(
        guidance=torch.randn(3, 8), dropout=0.5, modules_to_save=["class_head"]
    )
    model = get_peft_model(SageClassifier(tiny_clip(), torch.randn(3, 16)), config)
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "epoch",
        "logging_strategy": "no",
    } | arguments
    callback = LongTailCallback(loss, counts)
    return Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        train_dataset=DATA,
        eval_dataset=DATA,
        compute_loss_func=loss,
        callbacks=[callback],
        compute_metrics=callback.compute_metrics,
    )


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """Resumed from a copy elsewhere, in the middle of an epoch, with a loss that is new."""
    states = []
    for folder, checkpoint in (
        (tmp_path / "whole", None),
        (tmp_path / "resumed", tmp_path / "whole/checkpoint-2"),
    ):
        loss = SageLoss(COUNTS, text_prior=0.3)
        trainer = make_trainer(folder, loss, save_strategy="steps", save_steps=2)
        trainer.train(
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
        )
        assert trainer.state.global_step == 6
        states.append({**trainer.model.state_dict(), **loss.state_dict()})
    assert states[0]["covariance.scatter"].any()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_reports_many_medium_and_few(tmp_path):
    trainer = make_trainer(tmp_path, SageLoss([200, 50, 5]), [200, 50, 5])
    metrics = trainer.evaluate()
    accuracy = LongTailAccuracy([200, 50, 5])
    with torch.no_grad():
        accuracy.update(
            trainer.model.eval()(pixel_values=IMAGES).logits, torch.tensor(LABELS)
        )
    for name in ("overall", "macro", "many", "medium", "few", "worst"):
        assert metrics[f"eval_{name}"] == pytest.approx(accuracy.compute()[name].item())
    trainer.compute_metrics = LongTailCallback(
        SageLoss([200, 200, 200]), [200, 200, 200]
    ).compute_metrics
    assert "eval_few" not in trainer.evaluate()


def test_refusals(tmp_path):
    with pytest.raises(
        ValueError, match=r"`class_counts` must have the shape \(3,\), got \(2,\)"
    ):
        LongTailCallback(SageLoss(COUNTS), [1, 2])
    with pytest.raises(
        ValueError, match="`label_smoothing_factor` is ignored by Trainer"
    ):
        make_trainer(tmp_path, SageLoss(COUNTS), label_smoothing_factor=0.4).train()
