# SPDX-License-Identifier: Apache-2.0
"""Callbacks of [`SageTrainer`]: what is due in which epoch, and a progress bar that says the accuracies."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .arguments import EPOCHS
from .callbacks import GROUPS


class ScheduleCallback(TrainerCallback):
    """Tell the sampler its epoch, and evaluate and save about ten times where there are more epochs."""

    sampler: Any = None

    def on_epoch_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        if self.sampler is not None:
            # Trainer does not reach a sampler below others, as where a run is resumed within an epoch.
            self.sampler.set_epoch(int((state.epoch or 0) + 1e-9))

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        **kwargs: Any,
    ) -> None:
        every = args.checkpointing_steps
        if every and state.global_step % every == 0:
            control.should_save = True

    def on_epoch_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        **kwargs: Any,
    ) -> None:
        every = max(1, state.num_train_epochs // EPOCHS)
        epoch = round(state.epoch or 0)
        if epoch % every == 0 or epoch >= state.num_train_epochs:
            return
        if args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_evaluate = False
        if args.save_strategy == SaveStrategy.EPOCH:
            control.should_save = False


class TrainingBar(ProgressCallback):
    """One bar for a run: the loss stands next to it, the accuracies of each evaluation above.

    Args:
        describe: Says what is about to be trained.
    """

    def __init__(self, describe: Callable[[], str]) -> None:
        super().__init__()
        self.describe = describe

    def on_train_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, *rest, **kwargs)
        if self.training_bar is not None:
            self.training_bar.write(self.describe())
            self.training_bar.set_description("training")
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if self.training_bar is None:
            super().on_prediction_step(*args, **kwargs)
            if self.prediction_bar is not None:
                self.prediction_bar.set_description("evaluating")

    def on_log(self, *_: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        *rest: Any,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_evaluate(args, state, *rest, **kwargs)
        if self.training_bar is None:
            return
        found = {name.removeprefix("eval_"): x for name, x in (metrics or {}).items()}
        shown = [f"{name} {100 * found[name]:.1f}%" for name in GROUPS if name in found]
        if shown:
            self.training_bar.write(
                f"epoch {round(state.epoch or 0, 2):g} of {state.num_train_epochs}: validation {', '.join(shown)}"
            )
