# SPDX-License-Identifier: Apache-2.0
"""Training with transformers' Trainer and with Accelerate in one process."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from peft_sage import LongTailCallback, SageClassifier, SageConfig, SageLoss
from tests.conftest import tiny_clip


COUNTS = [12, 6, 3]


@pytest.fixture
def data():
    """Images whose mean tells the class, with a tail."""
    labels = [k for k, count in enumerate(COUNTS) for _ in range(count)]
    noise = torch.randn(
        len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(5)
    )
    return [
        {"pixel_values": image * 0.3 + label, "labels": label}
        for image, label in zip(noise, labels, strict=True)
    ]


def make_model():
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    classifier = SageClassifier(tiny_clip(), torch.randn(3, 16, generator=generator))
    guidance = torch.randn(3, 24, generator=generator)
    return get_peft_model(
        classifier,
        SageConfig(guidance=guidance, modules_to_save=["class_head"], dropout=0.1),
    )


def trained_state(model):
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
    }


def make_trainer(model, folder, data, **kwargs):
    arguments = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "logging_steps": 1,
        "disable_tqdm": True,
        **kwargs,
    }
    loss = SageLoss(COUNTS)
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=data,
        eval_dataset=data,
        compute_loss_func=loss,
        callbacks=[LongTailCallback(loss, COUNTS)],
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_trainer_with_gradient_checkpointing(use_reentrant, data, tmp_path):
    plain, checkpointed = make_model(), make_model()
    make_trainer(plain, tmp_path, data, max_steps=3).train()
    mode = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    make_trainer(checkpointed, tmp_path, data, max_steps=3, **mode).train()
    assert (
        checkpointed.get_base_model()
        .model.vision_model.encoder.layers[0]
        .gradient_checkpointing
    )
    torch.testing.assert_close(trained_state(checkpointed), trained_state(plain))


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerate_steps(accelerator, model, optimizer, loader, loss, steps):
    for _, batch in zip(range(steps), loader, strict=False):
        with accelerator.accumulate(model):
            accelerator.backward(
                loss(model(pixel_values=batch["pixel_values"]), batch["labels"])
            )
            optimizer.step()
            optimizer.zero_grad()


def test_accelerate_state_round_trip(accelerator, data, tmp_path):
    model = make_model().eval()  # no dropout, so that both go the same way
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2
    )
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(data, batch_size=4)
    )
    loss = SageLoss(COUNTS)
    accelerate_steps(accelerator, model, optimizer, loader, loss, 4)
    accelerator.save_state(str(tmp_path / "state"))
    accelerate_steps(accelerator, model, optimizer, loader, loss, 4)
    expected = trained_state(model)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in expected:
                parameter.fill_(7.0)
        for name, buffer in model.named_buffers():
            if "guidance" in name:
                buffer.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    accelerate_steps(accelerator, model, optimizer, loader, loss, 4)
    torch.testing.assert_close(trained_state(model), expected)
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(
        SageClassifier(tiny_clip(), torch.ones(3, 16)), tmp_path / "adapter"
    )


def test_gradient_accumulation_equals_the_whole_batch(accelerator, data):
    loss = SageLoss(
        COUNTS, compensation=0
    )  # which each micro-batch measures for itself
    halves, whole = make_model().eval(), make_model().eval()
    for model, size in ((halves, 4), (whole, 8)):
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2
        )
        if model is halves:
            model, optimizer, loader = accelerator.prepare(
                model, optimizer, DataLoader(data[:16], batch_size=size)
            )
            accelerate_steps(accelerator, model, optimizer, loader, loss, 4)
        else:
            for batch in DataLoader(data[:16], batch_size=size):
                loss(
                    model(pixel_values=batch["pixel_values"]), batch["labels"]
                ).backward()
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(trained_state(halves), trained_state(whole))
