# SPDX-License-Identifier: Apache-2.0
"""From class descriptions to guidance: one unit vector a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from . import towers
from .config import SageConfig
from .descriptions import Descriptions, expand
from .pooling import pool_guidance
from .tokenization import TextBatches
from .validation import check_embeddings


@torch.no_grad()
def encode_class_descriptions(
    model: nn.Module,
    tokenizer: Any,
    descriptions: Descriptions,
    templates: Sequence[str] | None = None,
    batch_size: int = 256,
    progress_bar: bool | None = None,
) -> torch.Tensor:
    """Encode class descriptions with the model's own text tower.

    Each text is encoded and normalised; the mean over a class's texts is normalised again.

    Args:
        model: A model with a text tower; wrapped ones will do.
        tokenizer: Its tokenizer: one of transformers, or a function from texts to ids (n, length) as open_clip has.
        descriptions: A list of class names; or one list of written descriptions a class; or a dictionary from class
            name to one or more written descriptions.
        templates: For bare class names, texts with one `{}` each. Default: "a photo of a {}.".
        batch_size: Texts a batch.
        progress_bar: Whether to show one, on the main process. Default: with more than 20 batches.

    Returns:
        A float32 tensor (M, e) on the model's device with one L2-normalised row a class.

    Raises:
        ValueError: If a description is empty, `batch_size` is not positive, the model has no text tower, or all rows
            come out identical, which happens when the tokenizer does not fit the model.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive, got {batch_size!r}.")
    texts_of_class = expand(descriptions, templates)
    if not towers.has_text_tower(model):
        raise ValueError(f"`model` ({type(model).__name__}) has no text tower to encode class descriptions with.")
    unique = list(dict.fromkeys(text for texts in texts_of_class for text in texts))
    row_of_text = {text: row for row, text in enumerate(unique)}
    embeddings = F.normalize(_encode_texts(model, tokenizer, unique, batch_size, progress_bar), dim=-1)

    index = torch.tensor([row_of_text[text] for texts in texts_of_class for text in texts], device=embeddings.device)
    owner = torch.tensor([i for i, texts in enumerate(texts_of_class) for _ in texts], device=embeddings.device)
    sums = embeddings.new_zeros(len(texts_of_class), embeddings.shape[1]).index_add_(0, owner, embeddings[index])
    guidance = F.normalize(sums, dim=-1)
    _check_rows_differ(guidance, texts_of_class)
    return guidance


def make_guidance(model: nn.Module, config: SageConfig, on_meta: bool = False) -> torch.Tensor | None:
    """Return the guidance that a new adapter starts with.

    Args:
        model: The model to adapt.
        config: The adapter's configuration.
        on_meta: Whether guidance that is still to be loaded goes on the meta device.

    Returns:
        A float32 tensor (M, e) with L2-normalised rows; NaN where it is still to be loaded, so that it cannot be used
        by mistake; `None` without guidance.

    Raises:
        ValueError: If the class descriptions cannot be encoded.
    """
    if config.guidance is not None:
        return encode_for(model, config, config.guidance) if len(config.guidance) else None
    if config.saved:
        shape = tuple(config.guidance_shape or (0, 0))
        return torch.full(shape, torch.nan, device="meta" if on_meta else None) if shape[0] else None
    if config.class_descriptions is not None:
        return encode_for(model, config, config.class_descriptions)
    return None


def encode_for(model: nn.Module, config: SageConfig, source: torch.Tensor | Descriptions) -> torch.Tensor:
    """Return normalised guidance from a tensor, or from class descriptions by the model's own text tower.

    Args:
        model: The model to adapt.
        config: The configuration that names the tokenizer and the templates, and may limit the rows.
        source: A tensor (M, e), which is taken as it is, or class descriptions.

    Returns:
        A float32 tensor (M, e) with L2-normalised rows.

    Raises:
        TypeError: If the tensor is not of floating point.
        ValueError: If the tensor is not fit to be guidance, or the descriptions cannot be encoded.
    """
    if isinstance(source, torch.Tensor):
        check_embeddings(source, "guidance")
        return F.normalize(source.detach().float(), dim=-1)
    if not towers.has_text_tower(model):
        raise ValueError(
            f"{type(model).__name__} has no text tower to encode `class_descriptions` with. Either wrap the full "
            "model, such as CLIPModel instead of CLIPVisionModel, or encode them elsewhere "
            "(`encode_class_descriptions`) and pass the tensor as `guidance`."
        )
    guidance = encode_class_descriptions(model, _load_tokenizer(model, config), source, config.text_templates)
    return pool_guidance(guidance, config.guidance_rows) if config.guidance_rows else guidance


def _load_tokenizer(model: nn.Module, config: SageConfig) -> Any:
    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError(
            "`class_descriptions` need a tokenizer, and the model does not say where it came from. Set "
            "`tokenizer_name_or_path`, or encode them (`encode_class_descriptions`) and pass the tensor as `guidance`."
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`class_descriptions` need a tokenizer, and none could be loaded from {name!r} "
            f"(`tokenizer_name_or_path`={config.tokenizer_name_or_path!r}): {error}"
        ) from error


def _encode_texts(
    model: nn.Module, tokenizer: Any, texts: list[str], batch_size: int, progress_bar: bool | None
) -> torch.Tensor:
    """Return raw float32 text embeddings (n, e), in the order of `texts`."""
    batches = TextBatches(model, tokenizer, texts, batch_size)
    device = next(model.parameters()).device
    show = (len(batches) > 20 if progress_bar is None else progress_bar) and _is_main_process()
    encoded, order = [], []
    with towers.eval_mode(model):
        for positions, inputs in tqdm(batches, desc="Encoding class descriptions", disable=not show):
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            encoded.append(towers.encode_text(model, inputs).float())
            order += positions
    rows = torch.cat(encoded)
    return rows[torch.tensor(order, device=rows.device).argsort()]


def _check_rows_differ(guidance: torch.Tensor, texts_of_class: list[list[str]]) -> None:
    if len(guidance) < 2 or len({tuple(texts) for texts in texts_of_class}) < 2:
        return
    if torch.allclose(guidance, guidance[:1].expand_as(guidance), atol=1e-6):
        raise ValueError(
            "All class descriptions have the same embedding. Either the tokenizer does not fit the text tower (the "
            "token that the tower pools, `eos_token_id` of its config, does not occur in the tokenizer's output), or "
            "the texts differ only beyond the tower's limit."
        )


def _is_main_process() -> bool:
    return not (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()
    )
