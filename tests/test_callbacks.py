# SPDX-License-Identifier: Apache-2.0
"""`LongTailCallback` in a real `Trainer`."""

import multiprocessing
import os
import socket

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from peft_sage import (
    LongTailAccuracy,
    LongTailCallback,
    SageClassifier,
    SageConfig,
    SageLoss,
    estimate_mismatch,
)
from peft_sage.towers import encode_image
from tests.conftest import randomise, tiny_clip


LABELS = [0] * 6 + [1] * 3 + [2]
IMAGES = torch.randn(len(LABELS), 3, 16, 16, generator=torch.Generator().manual_seed(5))
DATA = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]
COUNTS = [6, 3, 1]


def make_trainer(folder, callbacks, loss, **kwargs):
    torch.manual_seed(0)
    model = get_peft_model(
        SageClassifier(tiny_clip(), 3),
        SageConfig(guidance=torch.randn(3, 8), dropout=0.5, modules_to_save=["class_head"]),
    )
    randomise(model)
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    return Trainer(model, args, train_dataset=DATA, compute_loss_func=loss, callbacks=callbacks, **kwargs)


class Witness(TrainerCallback):
    """Measures for itself what the callback before it should have set."""

    def __init__(self, loss):
        self.loss = loss
        self.seen = []

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            features = encode_image(model.eval(), IMAGES)
        model.train()
        expected = SageLoss(COUNTS, mismatch=estimate_mismatch(features, torch.tensor(LABELS), 3, scale=25.0))
        self.seen.append((self.loss.mismatch.clone(), expected.mismatch))


def test_measures_the_mismatch_before_each_epoch(tmp_path):
    loss = SageLoss(COUNTS)
    from_counts = loss.mismatch.clone()
    callback, witness = LongTailCallback(loss, COUNTS), Witness(loss)
    make_trainer(tmp_path, [callback, witness], loss).train()
    assert len(witness.seen) == 2
    for measured, expected in witness.seen:
        torch.testing.assert_close(measured, expected)
    # Trained in between with a large step, and not what the counts say.
    assert not torch.allclose(witness.seen[0][0], witness.seen[1][0])
    assert not torch.allclose(witness.seen[0][0], from_counts)


def test_measuring_does_not_disturb_the_training(tmp_path):
    """With lambda = 0 the mismatch has no effect, so that the same weights must come out, dropout included."""
    weights = []
    for refresh in (False, True):
        loss = SageLoss(COUNTS, compensation=0.0)
        trainer = make_trainer(tmp_path, [LongTailCallback(loss, COUNTS, refresh=refresh)], loss)
        trainer.train()
        assert trainer.model.training
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 5
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_reports_many_medium_and_few(tmp_path):
    loss = SageLoss([200, 50, 0])
    callback = LongTailCallback(loss, [200, 50, 0])
    trainer = make_trainer(tmp_path, [callback], loss, eval_dataset=DATA, compute_metrics=callback.compute_metrics)
    metrics = trainer.evaluate()
    accuracy = LongTailAccuracy([200, 50, 0])
    with torch.no_grad():
        accuracy.update(trainer.model.eval()(pixel_values=IMAGES).logits, torch.tensor(LABELS))
    for name in ("overall", "macro", "many", "medium", "few", "worst"):
        assert metrics[f"eval_{name}"] == pytest.approx(accuracy.compute()[name].item())
    without_few = LongTailCallback(SageLoss([200, 200, 200]), [200, 200, 200])
    trainer.compute_metrics = without_few.compute_metrics
    assert "eval_few" not in trainer.evaluate()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="`class_counts` must have the 3 classes of `loss`, got 2"):
        LongTailCallback(SageLoss(COUNTS), [1, 2])
    loss = SageLoss(COUNTS)
    callback = LongTailCallback(loss, COUNTS)
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="`scale`"):
        callback.on_epoch_begin(args, None, None, model=tiny_clip(), train_dataloader=DATA)


def measure(rank, port, folder):
    """What a process of two does before its epoch: measure its share of the images."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    AcceleratorState._reset_state(reset_partial_state=True)
    args = TrainingArguments(folder, report_to=[], use_cpu=True)
    assert args.world_size == 2
    loss = SageLoss(COUNTS)
    loader = DataLoader(DATA, batch_size=4, collate_fn=default_data_collator)
    callback = LongTailCallback(loss, COUNTS, scale=25.0)
    callback.on_epoch_begin(args, None, None, model=tiny_clip(), train_dataloader=loader)
    torch.save(loss.mismatch, folder / f"{rank}.pt")


def test_two_processes_measure_what_one_does(tmp_path):
    """Each takes five of the ten images; both set the mismatch of all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Not forked: threads of a process that has computed do not survive that.
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=measure, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    with torch.no_grad():
        features = encode_image(tiny_clip(), IMAGES)
    expected = SageLoss(COUNTS, mismatch=estimate_mismatch(features, torch.tensor(LABELS), 3, scale=25.0)).mismatch
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
