# SPDX-License-Identifier: Apache-2.0
"""What [`SageTrainer`] fills in where nothing is given."""

import copy
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .arguments import SageTrainingArguments
from .classifier import SageClassifier
from .collator import ImageCollator
from .config import SageConfig


logger = logging.get_logger(__name__)


def default_collator(
    args: SageTrainingArguments, processor: Any, data: dict[str, Any]
) -> ImageCollator:
    """The collator for pictures, or for the `pixel_values` that the data hold.

    Raises:
        ValueError: There is no image processor, and it is needed.
    """
    items = [dataset[0] for dataset in data.values() if len(dataset)]
    has_pixels = all("pixel_values" in item for item in items) and bool(items)
    if processor is None and not has_pixels:
        raise ValueError(
            "`data_collator` is needed, as the model has no image processor and the data have no `pixel_values`; "
            "`processing_class` takes an image processor too."
        )
    augment = None if args.augment == "none" or has_pixels else args.augment
    return ImageCollator(processor, augment, crop_scale=args.crop_scale)


def fitted_arguments(
    args: SageTrainingArguments, num_images: int, eval_dataset: Any
) -> SageTrainingArguments:
    """The arguments for these data: batches no larger than the data, evaluation only of validation images."""
    args = copy.copy(args)
    most = max(1, num_images // args.world_size)
    if num_images and args.per_device_train_batch_size > most:
        logger.info(f"Batches of {most} images, as there are only {num_images}")
        args.per_device_train_batch_size = most
    if eval_dataset is None:
        args.eval_strategy = IntervalStrategy.NO
        args.do_eval = False
        args.load_best_model_at_end = False
    return args


def wrapped_model(
    model: nn.Module, peft_config: PeftConfig | None, classifier: SageClassifier | None
) -> nn.Module:
    """The model with PEFT's adapter; a classifier without one is frozen but for its head."""
    if peft_config is None and model is classifier:
        # PEFT saves and loads the head alone as it does an adapter.
        peft_config = SageConfig(target_modules=[], modules_to_save=["class_head"])
    if peft_config is None:
        return model
    if classifier is not None and getattr(peft_config, "modules_to_save", ()) is None:
        peft_config = copy.copy(peft_config)
        setattr(peft_config, "modules_to_save", ["class_head"])  # noqa: B010
    return get_peft_model(model, peft_config)
