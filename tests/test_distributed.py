# SPDX-License-Identifier: Apache-2.0
"""Two and four processes on one machine, with gloo."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from peft_sage import LongTailAccuracy, SageLoss
from tests.distributed_job import COUNTS, loss_outputs, make_model, make_trainer


ROOT = Path(__file__).parent.parent


def run(folder, processes, *jobs):
    folder.mkdir(exist_ok=True)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    command = [
        sys.executable,
        *launcher,
        "-m",
        "tests.distributed_job",
        str(folder),
        *jobs,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_weights(tmp_path):
    run(tmp_path / "one", 1, "train")
    run(tmp_path / "two", 2, "train")
    one, two = (
        load_file(tmp_path / n / "adapter" / "adapter_model.safetensors")
        for n in ("one", "two")
    )
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
    start = {
        name: p
        for name, p in make_model().named_parameters()
        if "peft_sage_up" in name and "weight" in name
    }
    assert not any(p.any() for p in start.values())
    assert all(one[name.replace(".default", "")].any() for name in start)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(folder, 1, "trainer")
    return folder


@pytest.mark.parametrize(
    ("processes", "resumed"),
    [
        (2, True),
        pytest.param(2, False, marks=pytest.mark.slow),
        pytest.param(4, False, marks=pytest.mark.slow),
    ],
)
def test_trainer_gives_the_weights_and_losses_of_one_process(
    alone, processes, resumed, tmp_path
):
    """With accumulation, ignored images and text terms; resumed from where one process was after its second step."""
    if resumed:
        shutil.copytree(alone / "checkpoint-2", tmp_path / "checkpoint-2")
    run(tmp_path, processes, "trainer")
    expected, found = (torch.load(folder / "run.pt") for folder in (alone, tmp_path))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    weights = expected[0]
    start = get_peft_model_state_dict(make_model().double())
    moved = [
        (weights[name] - start[name]).abs().max() for name in start if "up.w" in name
    ]
    assert min(moved) > 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(folder, 2, "loss", "fsdp2")
    return folder


def test_the_loss_of_two_processes_is_that_of_one(folder):
    """Also where the other process has soft labels, ignored images only, or no images."""
    one = SageLoss(COUNTS, reduction="none")
    accuracy = LongTailAccuracy(COUNTS)
    whole = [one(*loss_outputs(step)) for step in range(6)]
    for step in range(3):
        outputs, labels = loss_outputs(step)
        accuracy.update(outputs["logits"], labels)
    for rank in range(2):
        losses, state, scores = torch.load(folder / f"loss{rank}.pt")
        torch.testing.assert_close(state, dict(one.state_dict()))
        torch.testing.assert_close(losses[:3], [part[rank::2] for part in whole[:3]])
        torch.testing.assert_close(scores, accuracy.compute(), equal_nan=True)
    torch.testing.assert_close(losses[3:], whole[3:])


def test_under_fsdp2_trainer_saves_the_weights_of_one_process(folder, tmp_path):
    trainer = make_trainer(tmp_path, 8)
    before = copy.deepcopy(trainer.model)
    trainer.train()
    one = get_peft_model_state_dict(trainer.model)
    two = load_file(folder / "fsdp2" / "adapter_model.safetensors")
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
    moved = get_peft_model_state_dict(before)
    assert all((one[n] - moved[n]).abs().max() > 1e-4 for n in one if "up.w" in n)
    logits = torch.as_tensor(trainer.predict(trainer.eval_dataset).predictions)
    torch.testing.assert_close(
        torch.load(folder / "fsdp2.pt"), logits, atol=1e-4, rtol=1e-4
    )


def test_deepspeed_gives_the_weights_of_one_process(tmp_path):
    pytest.importorskip("deepspeed")
    run(tmp_path, 2, "deepspeed")
    stage, (spread, whole, start) = torch.load(tmp_path / "deepspeed.pt")
    assert stage == 2
    torch.testing.assert_close(spread, whole, atol=1e-5, rtol=1e-4)
    assert any(
        (start[name] - whole[name]).abs().max() > 1e-2
        for name in whole
        if "peft_sage_up" in name
    )
