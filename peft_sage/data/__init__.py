# SPDX-License-Identifier: Apache-2.0
"""Labelled images as people have them, in folders, tables and on the Hub, as data sets of `datasets`."""

try:
    import datasets as _datasets  # noqa: F401
except ImportError as error:
    raise ImportError(
        '`peft_sage.data` needs datasets: pip install "peft_sage[data]"'
    ) from error

from .image_data import ImageData
from .load import load_images


__all__ = ["ImageData", "load_images"]
