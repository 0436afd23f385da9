# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: small, whole or absent, and enough to go on exactly where the run stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


WEIGHTS_FILE = "trainable.safetensors"
SETTINGS_FILE = "settings.json"


class TrainingProgress:
    """Where a run is, and its best epoch so far.

    Attributes:
        epoch: Epochs that are done.
        batch: Batches of the current epoch that are done, in each process.
        step: Optimiser steps done.
        validation: Scores on the validation split, and the `epoch` after which they were measured.
        best_epoch: The epoch with the best macro accuracy there, from 1; 0 before the first.
        best_weights: The trainable weights after it.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batch = 0
        self.step = 0
        self.validation: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best_weights: dict[str, torch.Tensor] = {}

    def record(self, scores: dict[str, float], model: nn.Module) -> None:
        """Note the scores after an epoch, and keep its weights if no earlier one had a better macro accuracy."""
        self.validation.append(scores | {"epoch": self.epoch})
        if all(scores["macro"] >= earlier["macro"] for earlier in self.validation):
            self.best_epoch = self.epoch
            self.best_weights = {
                name: weight.cpu().clone()
                for name, weight in trainable_weights(model).items()
            }

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def trainable_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that are trained, by name."""
    return {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def load_trainable_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put back what [`trainable_weights`] returned.

    Raises:
        ValueError: If the model trains other weights.
    """
    if weights.keys() != trainable_weights(model).keys():
        raise ValueError("The checkpoint holds other weights than this run trains.")
    model.load_state_dict(weights, strict=False)


def checkpoint_trainable_only(accelerator: Accelerator) -> None:
    """Make `save_state` and `load_state` leave out the frozen weights, which are those of the base model."""

    def save(
        models: list[nn.Module], states: list[dict[str, torch.Tensor]], folder: str
    ) -> None:
        states.clear()
        if accelerator.is_main_process:
            save_file(
                trainable_weights(accelerator.unwrap_model(models[0])),
                Path(folder, WEIGHTS_FILE),
            )

    def load(models: list[nn.Module], folder: str) -> None:
        load_trainable_weights(
            accelerator.unwrap_model(models.pop()),
            load_file(Path(folder, WEIGHTS_FILE)),
        )

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, settings: dict[str, Any]
) -> None:
    """Write the checkpoint `folder/step_N` in full before it gets its name, so that no kill leaves half a one.

    Args:
        accelerator: Its registered state is saved.
        folder: The folder of all checkpoints.
        step: Optimiser steps done.
        settings: What a run must share to go on from here.
    """
    target = folder / f"step_{step}"
    unfinished, replaced = folder / f"unfinished_{step}", folder / f"replaced_{step}"
    try:
        if accelerator.is_main_process:
            for stale in (unfinished, replaced):
                shutil.rmtree(stale, ignore_errors=True)
            unfinished.mkdir(parents=True)
            (unfinished / SETTINGS_FILE).write_text(json.dumps(settings, indent=2))
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"The checkpoint {str(target)!r} could not be written: {error}. Earlier ones are whole; go on from them "
            "with `--resume-from-checkpoint latest`."
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():
            target.rename(replaced)
        unfinished.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    accelerator.wait_for_everyone()


def find_checkpoint(which: str, folder: Path, settings: dict[str, Any]) -> Path | None:
    """Find the checkpoint to go on from.

    Args:
        which: A path, or "latest": the newest in `folder`.
        folder: The folder of all checkpoints.
        settings: Those of the present run.

    Returns:
        The checkpoint; `None` if "latest" finds none, so that the same command starts a run and goes on with it.

    Raises:
        ValueError: If the path is no checkpoint, or one of a run with other settings.
    """
    if which == "latest":
        found = sorted(
            folder.glob("step_*"), key=lambda path: (path.stat().st_mtime, path.name)
        )
        if not found:
            return None
        checkpoint = found[-1]
    else:
        checkpoint = Path(which)
    if not (checkpoint / SETTINGS_FILE).is_file():
        raise ValueError(
            f"`--resume-from-checkpoint` {which!r} is not a checkpoint of this script."
        )
    saved = json.loads((checkpoint / SETTINGS_FILE).read_text())
    changed = [
        f"{key}: {saved.get(key)!r} -> {value!r}"
        for key, value in settings.items()
        if saved.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"Checkpoint {str(checkpoint)!r} is of a run with other settings: {'; '.join(changed)}."
        )
    return checkpoint
