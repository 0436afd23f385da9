# SPDX-License-Identifier: Apache-2.0
"""Semantic-guided adapters for Hugging Face PEFT. Importing the package is all the set-up that a script needs."""

from typing import TYPE_CHECKING, Any

from . import requirements, templates  # noqa: F401 - the versions are checked first
from .classifier import CosineHead, SageClassifier, SageClassifierOutput
from .config import SageConfig
from .descriptions import read_class_descriptions
from .guidance import encode_class_descriptions
from .layer import SageLayer
from .loss import SageLoss
from .model import SageModel
from .model_card import create_model_card
from .pooling import pool_guidance
from .registration import register
from .text_prior import TextPrior, choose_text_prior
from .version import __version__
from .visualization import attention_maps, plot_attention, plot_long_tail


if TYPE_CHECKING:
    from .callbacks import LongTailCallback
    from .metrics import LongTailAccuracy

__all__ = [
    "CosineHead",
    "LongTailAccuracy",
    "LongTailCallback",
    "SageClassifier",
    "SageClassifierOutput",
    "SageConfig",
    "SageLayer",
    "SageLoss",
    "SageModel",
    "TextPrior",
    "__version__",
    "attention_maps",
    "choose_text_prior",
    "create_model_card",
    "encode_class_descriptions",
    "plot_attention",
    "plot_long_tail",
    "pool_guidance",
    "read_class_descriptions",
    "templates",
]

register(SageConfig, SageModel)


def __getattr__(name: str) -> Any:
    # torchmetrics is an extra, and it and Trainer cost time to import.
    if name == "LongTailAccuracy":
        from .metrics import LongTailAccuracy

        return LongTailAccuracy
    if name == "LongTailCallback":
        from .callbacks import LongTailCallback

        return LongTailCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
