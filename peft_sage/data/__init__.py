# SPDX-License-Identifier: Apache-2.0
"""Labelled images as people have them, in folders, tables and on the Hub, as data sets of `datasets`."""

from .image_data import ImageData
from .load import load_images


__all__ = ["ImageData", "load_images"]
