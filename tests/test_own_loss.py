# SPDX-License-Identifier: Apache-2.0
"""The classifier's own loss in Trainer is that of the whole batch, for any method, in parts and processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from tests.classifier_job import (
    KINDS,
    OpenClipLayout,
    by_hand,
    make_images,
    make_model,
    trained_step,
)


@pytest.mark.parametrize("kind", [*KINDS, "open_clip", "soft labels"])
def test_accumulation_is_one_batch(kind, tmp_path):
    def make():
        tower = OpenClipLayout() if kind == "open_clip" else None
        return make_model(kind, tower)

    data = make_images(10)  # parts of 4, 4 and 2
    if kind == "soft labels":
        generator = torch.Generator().manual_seed(0)
        for item in data:
            item["labels"] = torch.rand(3, generator=generator).softmax(dim=0)
    loss, parameters = by_hand(make(), data)
    size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    got, found = trained_step(make(), tmp_path, data, **size)
    assert got == pytest.approx(loss, rel=1e-3)
    torch.testing.assert_close(found, parameters, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    root = Path(__file__).parent.parent
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command, "-m", "tests.classifier_job", str(folder)],
        cwd=root,
        env=environment | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind, two_processes):
    loss, parameters = by_hand(make_model(kind), make_images(12))
    got, found = torch.load(two_processes / f"{kind}.pt")
    assert got == pytest.approx(loss, rel=1e-3)
    torch.testing.assert_close(found, parameters, rtol=1e-4, atol=1e-5)


def test_a_sharded_head_has_the_gradient_of_a_whole_one(two_processes):
    units, (sharded, whole) = torch.load(two_processes / "sharded.pt")
    assert any(name.endswith("class_head.modules_to_save.default") for name in units)
    torch.testing.assert_close(sharded, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_and_a_plain_loss(kind, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    model = make_model(kind)
    args = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        report_to=["tensorboard"],
        use_cpu=True,
        disable_tqdm=True,
    )

    def plain(output, labels, num_items_in_batch=None):
        return F.cross_entropy(output.logits, labels)

    trainer = Trainer(
        model,
        args,
        train_dataset=make_images(),
        eval_dataset=make_images(4),
        compute_loss_func=plain,
    )
    trainer.train()
    assert any((tmp_path / "runs").rglob("events*"))
    # What the callbacks of other trackers ask for.
    config = json.loads(model.config.to_json_string())
    assert config["num_labels"] == 3
    assert model.config.to_dict()["id2label"][0] == "LABEL_0"


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 3]), r"`labels` must lie in \[0, 3\), got 3"),
        (torch.ones(2, 3), "`labels` .*must be probabilities"),
        (torch.ones(2, 3, dtype=torch.int64), "`labels` must be indices"),
    ],
)
def test_labels_that_are_none_are_refused_by_name(labels, message):
    with pytest.raises(ValueError, match=message):
        make_model("plain")(torch.randn(2, 3, 16, 16), labels=labels)


@pytest.mark.parametrize("count", [None, 0])
def test_ignored_images_alone_have_the_loss_zero(count):
    ignored = torch.full((2,), -100, dtype=torch.int32)
    pixels = torch.randn(2, 3, 16, 16)
    loss = make_model("plain")(pixels, labels=ignored, num_items_in_batch=count).loss
    assert loss == 0
