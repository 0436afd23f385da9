# SPDX-License-Identifier: Apache-2.0
"""Semantic-guided adapters for Hugging Face PEFT. Importing the package is all the set-up that a script needs."""

from typing import TYPE_CHECKING, Any

from .classifier import CosineHead, ZeroShotClassifier
from .config import SageConfig
from .guidance import encode_class_descriptions
from .layer import SageLayer
from .loss import SageLoss
from .mismatch import estimate_mismatch, mismatch_from_counts
from .model import SageModel
from .model_card import create_model_card
from .registration import register
from .version import __version__


if TYPE_CHECKING:
    from .metrics import LongTailAccuracy

__all__ = [
    "CosineHead",
    "LongTailAccuracy",
    "SageConfig",
    "SageLayer",
    "SageLoss",
    "SageModel",
    "ZeroShotClassifier",
    "__version__",
    "create_model_card",
    "encode_class_descriptions",
    "estimate_mismatch",
    "mismatch_from_counts",
]

register(SageConfig, SageModel)


def __getattr__(name: str) -> Any:
    # torchmetrics is an extra, and costs time to import.
    if name == "LongTailAccuracy":
        from .metrics import LongTailAccuracy

        return LongTailAccuracy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
