# SPDX-License-Identifier: Apache-2.0
"""Where the MLPs of a vision tower are, and how a model embeds text and images.

Nothing here changes a model, keeps state, or imports a model library.
"""

from .embeddings import encode_image, encode_text, eval_mode, has_text_tower, text_config
from .mlps import candidate_modules, find_mlps, layer_scale, mlp_input, mlp_widths, same_module


__all__ = [
    "candidate_modules",
    "encode_image",
    "encode_text",
    "eval_mode",
    "find_mlps",
    "has_text_tower",
    "layer_scale",
    "mlp_input",
    "mlp_widths",
    "same_module",
    "text_config",
]
