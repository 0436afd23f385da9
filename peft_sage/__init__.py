# SPDX-License-Identifier: Apache-2.0
"""Semantic-guided adapters for Hugging Face PEFT. Importing the package is all the set-up that a script needs."""

from typing import TYPE_CHECKING, Any

from . import requirements, templates  # noqa: F401 - the versions are checked first
from .attention import attention_maps, plot_attention
from .classifier import CosineHead, SageClassifier
from .config import SageConfig
from .description_files import read_class_descriptions
from .encoding import encode_class_descriptions, pool_guidance
from .layer import SageLayer
from .loss import SageLoss
from .mismatch import estimate_mismatch, mismatch_from_counts
from .model import SageModel
from .registration import register


if TYPE_CHECKING:
    from .callbacks import LongTailCallback
    from .metrics import LongTailAccuracy

__version__ = "0.1.0.dev0"

__all__ = [
    "CosineHead",
    "LongTailAccuracy",
    "LongTailCallback",
    "SageClassifier",
    "SageConfig",
    "SageLayer",
    "SageLoss",
    "SageModel",
    "__version__",
    "attention_maps",
    "encode_class_descriptions",
    "estimate_mismatch",
    "mismatch_from_counts",
    "plot_attention",
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
