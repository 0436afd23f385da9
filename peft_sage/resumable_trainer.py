# SPDX-License-Identifier: Apache-2.0
"""Trainer whose checkpoints are complete or not there, and are resumed by the run that they are of."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from .run_files import (
    SETTINGS_FILE,
    check_checkpoint,
    latest_checkpoint,
    save_text_prior,
)


class ResumableTrainer(Trainer):
    """Trainer that a kill or a full disk at any moment leaves with its earlier checkpoints.

    Attributes:
        settings: What a run must share to be resumed from a checkpoint.
        text_prior: What is kept with it, if anything was chosen.
    """

    args: Any
    settings: dict[str, Any]
    text_prior: Any

    def find_checkpoint(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to resume from, the same on all processes; ValueError if it is not of this run."""
        found: Any = wanted or None
        if wanted is True or wanted == "latest":
            found = latest_checkpoint(self.args.output_dir)
            if found is None and wanted is True:
                raise ValueError(
                    f"`resume_from_checkpoint` is True, but {self.args.output_dir!r} has no complete checkpoint."
                )
        # Processes may look at different moments.
        found = broadcast_object_list([found and str(found)])[0]
        if found is not None:
            check_checkpoint(found, self.settings)
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that is complete only at its end: Trainer writes its own state last."""
        folder = Path(
            self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"
        )
        try:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                settings = json.dumps(self.settings, indent=2)
                (folder / SETTINGS_FILE).write_text(settings, encoding="utf-8")
                save_text_prior(folder, self.text_prior)
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"The checkpoint {str(folder)!r} could not be written: {error}. Earlier ones are whole; resume from "
                "them with `resume_from_checkpoint`."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The checkpoint counts as complete with what the main process writes next.
        self.accelerator.wait_for_everyone()
