# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: which one is complete and the newest, and of which settings and data it is."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arguments import SageTrainingArguments
from .classifier import SageClassifier
from .text_prior import TextPrior


SETTINGS_FILE, TEXT_PRIOR_FILE = "settings.json", "text_prior.pt"
#: What Trainer writes last.
STATE_FILE = "trainer_state.json"
#: The arguments that the trained weights depend on. All others may differ when a run is resumed.
RESULT_ARGUMENTS = (
    "text_prior",
    "text_guidance",
    "tau",
    "compensation",
    "absent",
    "min_steps",
    "choose_adapter_scale",
    "head_learning_rate",
    "augment",
    "crop_scale",
    "patch_dropout",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "mixed_precision",
    "seed",
)
#: Fields of a PEFT configuration that say where something comes from, or are filled in.
IGNORED_CONFIG = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "guidance_shape",
    "tokenizer_name_or_path",
)


def run_settings(
    args: SageTrainingArguments, model: nn.Module, data: str
) -> dict[str, Any]:
    """What a run must share to be resumed from a checkpoint, by name.

    Args:
        args: Arguments of the run, after they were fitted to the data.
        model: The model, with PEFT's configuration if it has one.
        data: [`fingerprint`] of the training data.
    """
    settings = {name: getattr(args, name) for name in RESULT_ARGUMENTS}
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    settings["images_per_step"] = size * args.world_size
    for adapter, config in getattr(model, "peft_config", {}).items():
        for key, value in config.to_dict().items():
            if key not in IGNORED_CONFIG:
                settings[f"{adapter}.{key}"] = _short(value)
    settings["data"] = data
    return json.loads(json.dumps(settings, default=str))


def _short(value: Any) -> Any:
    value = sorted(value) if isinstance(value, set) else value
    text = json.dumps(value, default=str)
    return value if len(text) < 200 else fingerprint([text])


def fingerprint(values: Iterable[Any]) -> str:
    """16 characters that change with the values, their number and their order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{value}\0".encode())
    return digest.hexdigest()[:16]


def changed_settings(saved: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The settings that differ, each as "name: before -> now"."""
    return [
        f"{key}: {saved.get(key)!r} -> {settings.get(key)!r}"
        for key in {**saved, **settings}
        if saved.get(key) != settings.get(key)
    ]


def is_complete(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state is written last."""
    try:
        json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in a folder, if there is any."""
    steps = {}
    for path in Path(folder).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and is_complete(path):
            steps[int(match[1])] = path
    return steps[max(steps)] if steps else None


def check_checkpoint(
    checkpoint: str | os.PathLike[str], settings: dict[str, Any]
) -> None:
    """Refuse what is not a complete checkpoint, or is one of another run.

    Raises:
        ValueError: The message names what differs.
    """
    if not is_complete(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint` {os.fspath(checkpoint)!r} is not a complete checkpoint of Trainer."
        )
    path = Path(checkpoint, SETTINGS_FILE)
    if not path.is_file():
        return  # of a plain Trainer
    changed = changed_settings(json.loads(path.read_text(encoding="utf-8")), settings)
    if changed:
        raise ValueError(
            f"`resume_from_checkpoint` {os.fspath(checkpoint)!r} is of a run with other settings: "
            f"{'; '.join(changed)}."
        )


def save_text_prior(folder: str | os.PathLike[str], chosen: TextPrior | None) -> None:
    """Keep the choice in a checkpoint, as devices may differ in the last digits and so in what they choose."""
    if chosen is not None:
        torch.save(vars(chosen), Path(folder, TEXT_PRIOR_FILE))


def load_text_prior(folder: str | os.PathLike[str] | None) -> TextPrior | None:
    """What [`save_text_prior`] kept; None if there is nothing."""
    path = Path(folder or "", TEXT_PRIOR_FILE)
    if folder is None or not path.is_file():
        return None
    return TextPrior(**torch.load(path, weights_only=True))


def check_saved_model(
    classifier: SageClassifier, folder: str | os.PathLike[str], images: Any
) -> None:
    """Load what was saved, as a user would, and compare what both say of up to 256 `images` (a data set).

    Raises:
        RuntimeError: They differ.
    """
    loaded = SageClassifier.from_pretrained(folder, device=classifier.device)
    some = list(images.select(range(min(256, len(images))))["image"])
    answers = [model.predict(some, top_k=3) for model in (classifier, loaded)]
    for number, (before, after) in enumerate(zip(*answers, strict=True)):
        scores = {answer["label"]: answer["score"] for answer in before}
        # Classes that are alike to the last digits may change places.
        least = min(scores.values())
        for answer in after:
            if abs(answer["score"] - scores.get(answer["label"], least)) >= 1e-3:
                raise RuntimeError(
                    f"The model loaded from {os.fspath(folder)!r} sees image {number} differently: {after}, not "
                    f"{before}."
                )
    print(
        f"Saved to {os.fspath(folder)}; a fresh model with it predicts the same for {len(some)} test images."
    )
