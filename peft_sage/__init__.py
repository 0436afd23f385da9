# SPDX-License-Identifier: Apache-2.0
"""Semantic-guided adapters for Hugging Face PEFT. Importing the package is all the set-up that a script needs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import templates
from .classifier import SageClassifier, SageClassifierOutput
from .collator import ImageCollator
from .config import SageConfig
from .descriptions import read_class_descriptions
from .encoding import encode_class_descriptions
from .fitting import fit_head
from .guidance import pool_guidance
from .head import CosineHead
from .layer import SageLayer
from .loss import SageLoss
from .model import SageModel
from .optimization import parameter_groups
from .pictures import find_images, read_image
from .registration import register
from .text_prior import TextPrior, choose_text_prior


if TYPE_CHECKING:
    from .arguments import SageTrainingArguments
    from .callbacks import LongTailCallback
    from .metrics import LongTailAccuracy
    from .trainer import SageTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "CosineHead",
    "ImageCollator",
    "LongTailAccuracy",
    "LongTailCallback",
    "SageClassifier",
    "SageClassifierOutput",
    "SageConfig",
    "SageLayer",
    "SageLoss",
    "SageModel",
    "SageTrainer",
    "SageTrainingArguments",
    "TextPrior",
    "__version__",
    "choose_text_prior",
    "encode_class_descriptions",
    "find_images",
    "fit_head",
    "parameter_groups",
    "pool_guidance",
    "read_class_descriptions",
    "read_image",
    "templates",
]

register(SageConfig, SageModel)


def __getattr__(name: str) -> Any:
    # torchmetrics is an extra, and it and Trainer cost time to import.
    module = {
        "LongTailAccuracy": ".metrics",
        "LongTailCallback": ".callbacks",
        "SageTrainer": ".trainer",
        "SageTrainingArguments": ".arguments",
    }.get(name)
    if module:
        return getattr(import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
