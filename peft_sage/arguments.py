# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`SageTrainer`]: those of transformers, with the recipe's defaults, and the recipe's own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainingArguments

from .pictures import available_cores
from .validation import check_integer, check_number


#: Passes over the training images and the fewest optimizer steps, where `num_train_epochs` is not given.
EPOCHS, MIN_STEPS = 10, 300

if TYPE_CHECKING:
    Strength = float | str
else:
    # HfArgumentParser takes one type per field, and "auto" is to be possible on the command line.
    Strength = str


def has_fast_bfloat16() -> bool:
    """Whether computations run on a CPU, and it has instructions for bfloat16."""
    info = Path("/proc/cpuinfo")
    if torch.accelerator.is_available() or not info.exists():
        return False
    flags = info.read_text(encoding="utf-8").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _setting(default: Any, help: str, *aliases: str) -> Any:
    metadata = {"help": help, **({"aliases": list(aliases)} if aliases else {})}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class SageTrainingArguments(TrainingArguments):
    """Arguments of [`SageTrainer`]: one recipe for every data set, of which each part can be set.

    All other fields are those of `transformers.TrainingArguments`. What the fields mean stands in their `help`, which
    `HfArgumentParser` shows on the command line.

    Raises:
        ValueError: A value is out of range. The message names the field.
    """

    text_prior: Strength = _setting(
        "auto",
        "How strongly the head is held at the class texts, at least 0; auto: chosen by cross-validation",
    )
    text_guidance: Strength = _setting(
        "auto",
        "How strongly the tower is held at its frozen view of the texts; auto: 0.4 of the text prior",
    )
    tau: float = _setting(1.0, "Strength of the adjustment for the class counts")
    compensation: float = _setting(
        1.0,
        "Strength of the compensation for the gap between training images and new ones",
    )
    absent: Strength = _setting(
        "auto",
        "Count given to a class without images; none: left out of the softmax; auto: by cross-validation",
    )
    head_learning_rate: float | None = _setting(
        None,
        "Learning rate of the head; default: 2.5 times that of the rest",
        "--head-lr",
    )
    min_steps: int | None = _setting(
        None,
        f"Fewest optimizer steps, by more epochs; default: {MIN_STEPS}, or 0 if the epochs are given",
    )
    augment: Literal["crop-flip", "none"] = _setting(
        "crop-flip",
        "Random crops and flips of the resized images",
    )
    crop_scale: float = _setting(
        0.5, "Smallest share of an image's area that a random crop keeps"
    )
    patch_dropout: float = _setting(
        0.0,
        "Share of an image's patches that a training step leaves out, where the tower allows it; 0.5 halves its time",
    )
    cache_gib: float = _setting(
        2.0, "Decode a split once and keep it if it is no larger than this, in GiB"
    )
    choose_adapter_scale: bool = _setting(
        True,
        "After training halve the adapters' update, unless the validation images lose half a point by it",
    )
    test_crops: Literal[1, 5] = _setting(
        1, "5: on test images, the mean of the logits over centre and corners"
    )
    checkpointing_steps: int | None = _setting(
        None, "Save a checkpoint every so many steps too, not only after an epoch"
    )

    learning_rate: float = _setting(
        0.002, "Learning rate of everything but the head", "--lr"
    )
    num_train_epochs: float | None = _setting(  # type: ignore[assignment]
        None,
        f"Passes over the training images; default: {EPOCHS}, or more for `min_steps`",
        "--epochs",
    )
    per_device_train_batch_size: int = _setting(
        128,
        "Images per process and step; fewer if there are fewer images",
        "--batch-size",
    )
    per_device_eval_batch_size: int = _setting(
        128, "Images per process and step in evaluation"
    )
    lr_scheduler_type: str = _setting("cosine", "Schedule of the learning rates")
    max_grad_norm: float = _setting(0.0, "Clip gradients at this norm; 0: never")
    eval_strategy: str = _setting(
        "epoch",
        "When the validation images are evaluated; epoch: about ten times in longer runs",
    )
    save_strategy: str = _setting(
        "epoch", "When checkpoints are saved; epoch: about ten times in longer runs"
    )
    load_best_model_at_end: bool = _setting(
        True, "End with the epoch that is best on the validation images, if any"
    )
    metric_for_best_model: str | None = _setting(
        "macro", "What is best: macro, overall, many, medium, few or worst"
    )
    hub_strategy: str = _setting("end", "When to push to the Hub")
    logging_steps: float = _setting(10, "Log the loss every so many steps")
    seed: int = _setting(0, "Seed of everything random")
    remove_unused_columns: bool = _setting(
        False, "Remove the columns that the model's forward does not take"
    )
    dataloader_num_workers: int = _setting(
        lambda: min(8, available_cores()),
        "Processes that decode images which are not cached",
    )

    def __post_init__(self) -> None:
        if self.min_steps is None:
            exact = self.num_train_epochs is not None or self.max_steps > 0
            self.min_steps = 0 if exact else MIN_STEPS
        if self.num_train_epochs is None:
            self.num_train_epochs = EPOCHS
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        self.label_names = self.label_names or ["labels"]
        if "no" in (self.save_strategy, self.eval_strategy):
            self.load_best_model_at_end = False
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        self.text_prior = _strength("text_prior", self.text_prior, ("auto",))
        self.text_guidance = _strength("text_guidance", self.text_guidance, ("auto",))
        self.absent = _strength("absent", self.absent, ("auto", "none"))
        if self.absent == 0:
            raise ValueError("`absent` must be greater than 0, got 0.")
        check_number("tau", self.tau)
        for name in ("compensation", "cache_gib", "num_train_epochs"):
            check_number(name, getattr(self, name), 0)
        for name in ("learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(
                    f"`{name}` must be a number greater than 0, got {value}."
                )
        check_integer("min_steps", self.min_steps, 0)
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
        ):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"`crop_scale` must lie in (0, 1], got {self.crop_scale}.")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(
                f"`patch_dropout` must lie in [0, 1), got {self.patch_dropout}."
            )
        for name, values in (
            ("augment", ("crop-flip", "none")),
            ("test_crops", (1, 5)),
        ):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"`{name}` must be one of {values}, got {getattr(self, name)!r}."
                )
        if self.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be 0: give `SageLoss(label_smoothing=...)` as `compute_loss_func`."
            )


def _strength(name: str, value: Any, words: tuple[str, ...]) -> float | str:
    if value in words:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"`{name}` must be {' or '.join(words)} or a number, got {value!r}."
        ) from None
    check_number(name, number, 0)
    return number
