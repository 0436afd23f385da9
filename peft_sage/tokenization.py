# SPDX-License-Identifier: Apache-2.0
"""Texts as batches of token ids, in the form that the model's text tower was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import towers


class TextBatches:
    """Batches of tokenised texts, those of similar length together, so that little is padded.

    Args:
        model: The model with the text tower.
        tokenizer: One of transformers, or a function from texts to ids (n, length) as open_clip has.
        texts: The texts. Those that are longer than the tower's limit are cut, with one warning that counts them.
        batch_size: Texts a batch.

    Iterating gives, for each batch, the positions of its texts and the tower's inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: list[str],
        batch_size: int,
    ) -> None:
        self.inputs: Callable[[list[int]], dict[str, torch.Tensor]]
        if hasattr(tokenizer, "pad"):
            ids = _token_ids(model, tokenizer, texts)
            padding = _padding(model, tokenizer)
            self.inputs = lambda chosen: dict(
                tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt", **padding)
            )
            order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        else:
            self.inputs = lambda chosen: {"input_ids": tokenizer([texts[i] for i in chosen])}
            order = list(range(len(texts)))
        # The longest texts first, as they need the most memory; a batch that is not full is one of long texts.
        self.positions = [order[start : start + batch_size] for start in range(0, len(texts), batch_size)][::-1]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        for chosen in self.positions:
            yield chosen, self.inputs(chosen)


def max_length(model: nn.Module, tokenizer: Any) -> int:
    """Return the length at which the text tower cuts a text.

    Args:
        model: A model with a text tower.
        tokenizer: Its tokenizer, one of transformers.

    Returns:
        A number of tokens, start and end tokens included: the less of the tower's positions and the tokenizer's limit.
    """
    config = towers.text_config(model)
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    return min(positions or tokenizer.model_max_length, tokenizer.model_max_length)


def _token_ids(model: nn.Module, tokenizer: Any, texts: list[str]) -> list[list[int]]:
    limit = max_length(model, tokenizer)
    full = tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
    cut = sum(len(ids) > limit for ids in full)
    if not cut:
        return full
    warnings.warn(
        f"{cut} of {len(texts)} class descriptions are longer than the text tower's limit of {limit} tokens and were "
        "truncated; write shorter ones, several a class if need be.",
        stacklevel=5,
    )
    return tokenizer(texts, padding=False, truncation=True, max_length=limit)["input_ids"]


def _padding(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    # SigLIP was trained on texts padded to the full length, without an attention mask, and reads the last position.
    if str(getattr(towers.text_config(model), "model_type", "")).startswith("siglip"):
        return {"padding": "max_length", "max_length": max_length(model, tokenizer), "return_attention_mask": False}
    return {"padding": "longest"}
