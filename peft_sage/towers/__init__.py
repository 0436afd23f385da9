# SPDX-License-Identifier: Apache-2.0
"""Model families: where the adapter goes in a vision tower, and how a model embeds text and images.

Nothing here changes a model, keeps state, or imports a model library.
"""

from .blocks import block_input_index, block_widths, candidate_modules, find_blocks, layer_scale
from .embeddings import encode_image, encode_text, eval_mode, has_text_tower, logit_scale_and_bias, text_config
from .families import FAMILIES, Family, families_line, families_table


__all__ = [
    "FAMILIES",
    "Family",
    "block_input_index",
    "block_widths",
    "candidate_modules",
    "encode_image",
    "encode_text",
    "eval_mode",
    "families_line",
    "families_table",
    "find_blocks",
    "has_text_tower",
    "layer_scale",
    "logit_scale_and_bias",
    "text_config",
]
