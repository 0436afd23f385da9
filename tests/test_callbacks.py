# SPDX-License-Identifier: Apache-2.0
"""`LongTailCallback` in a real `Trainer`."""

import shutil

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


def fingerprint(trainer, loss):
    state = {**trainer.model.state_dict(), **loss.state_dict()}
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("restores", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, restores):
    """Resumed from a copy elsewhere, in the middle of an epoch, by a loss that has seen another run."""
    loss = SageLoss(COUNTS, text_prior=0.3)
    settings = {"save_strategy": "steps", "save_steps": 2}
    settings["restore_callback_states_from_checkpoint"] = restores
    whole = make_trainer(tmp_path / "whole", loss, **settings)
    whole.train()
    want = fingerprint(whole, loss)
    assert want["covariance.scatter"].any()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "moved")
    shutil.rmtree(tmp_path / "whole")
    resumed = make_trainer(tmp_path / "resumed", loss, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert resumed.state.global_step == 6
    torch.testing.assert_close(fingerprint(resumed, loss), want, rtol=0, atol=0)
    # The state of the run stays small enough to read.
    state = tmp_path / "resumed/checkpoint-6/trainer_state.json"
    assert "scatter" not in state.read_text()
    assert (state.parent / "scheduler.pt").stat().st_size > 4 * 16 * 16


def test_a_run_from_step_0_starts_fresh(tmp_path):
    loss = SageLoss(COUNTS)
    states = []
    for run in ("first", "second"):
        trainer = make_trainer(tmp_path / run, loss, save_strategy="no")
        trainer.train()
        states.append(fingerprint(trainer, loss))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_checkpoint_without_the_covariance_is_resumed_with_a_warning(tmp_path):
    make_trainer(tmp_path, SageLoss(COUNTS), save_only_model=True).train()
    trainer = make_trainer(tmp_path, SageLoss(COUNTS))
    with pytest.warns(UserWarning, match="measured afresh"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("in_batches", [False, True])
def test_reports_groups_and_ignores_what_the_loss_ignores(tmp_path, in_batches):
    counts = [200, 50, 0]
    trainer = make_trainer(
        tmp_path,
        SageLoss(counts),
        counts,
        eval_do_concat_batches=not in_batches,
        per_device_eval_batch_size=4,
    )
    unlabelled = [{"pixel_values": IMAGES[0], "labels": -100}]
    metrics = trainer.evaluate(DATA + unlabelled)
    accuracy = LongTailAccuracy(counts)
    with torch.no_grad():
        logits = trainer.model.eval()(pixel_values=IMAGES).logits
    accuracy.update(logits, torch.tensor(LABELS))
    want = accuracy.compute()
    for name in ("overall", "macro", "many", "medium", "none", "worst"):
        assert metrics[f"eval_{name}"] == pytest.approx(want[name].item())
    assert "eval_few" not in metrics


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"`class_counts` .* \(3,\), got \(2,\)"):
        LongTailCallback(SageLoss(COUNTS), [1, 2])
    trainer = make_trainer(tmp_path, SageLoss(COUNTS), label_smoothing_factor=0.4)
    with pytest.raises(ValueError, match="`label_smoothing_factor` is ignored"):
        trainer.train()
