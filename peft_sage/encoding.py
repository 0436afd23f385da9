# SPDX-License-Identifier: Apache-2.0
"""From class descriptions to embeddings: tokenise and encode them with the model's own text tower."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from .descriptions import Descriptions, expand
from .towers import embeddings as towers
from .validation import check_integer


@torch.no_grad()
def encode_class_descriptions(
    model: nn.Module,
    tokenizer: Any,
    descriptions: Descriptions,
    templates: Sequence[str] | None = None,
    batch_size: int = 256,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Encode class descriptions with the model's own text tower.

    Each text is encoded and normalised; the mean over the texts of a class is normalised again. Texts that are longer
    than the tower's limit are cut, with one warning that counts them.

    Args:
        model: A model with a text tower; it may be wrapped.
        tokenizer: One of transformers, or a function from texts to ids (n, length) as open_clip has.
        descriptions: A list of class names; a list with one list of texts per class; or a dictionary from class name
            to one or more texts.
        templates: For bare class names, texts with one `{}` each. Default: "a photo of a {}.".
        batch_size: Texts per batch. More than 20 batches show a progress bar, on the main process.
        cache_dir: Folder in which the rows are kept, for the next time with the same weights and texts.

    Returns:
        A float32 tensor (M, e) on the model's device, with one L2-normalised row per class.

    Raises:
        ValueError: A text is empty, there is no text tower, or its tokenizer does not fit (all rows are identical).
    """
    check_integer("batch_size", batch_size, 1)
    texts_of_class = expand(descriptions, templates)
    if not towers.has_text_tower(model):
        raise ValueError(
            f"{type(model).__name__} has no text tower: wrap the full model, or pass embeddings."
        )
    device = next(model.parameters()).device
    kept = (
        None
        if cache_dir is None
        else Path(cache_dir, f"{_fingerprint(model, texts_of_class)}.safetensors")
    )
    if kept is not None and kept.is_file():
        return load_file(kept)["text_embeds"].to(device)
    unique = list(dict.fromkeys(text for texts in texts_of_class for text in texts))
    place = {text: index for index, text in enumerate(unique)}
    embeddings = F.normalize(
        _encode_texts(model, tokenizer, unique, batch_size), dim=-1
    )
    rows = torch.stack(
        [
            embeddings[[place[text] for text in texts]].mean(dim=0)
            for texts in texts_of_class
        ]
    )
    rows = F.normalize(rows, dim=-1)
    if len(set(map(tuple, texts_of_class))) > 1 and torch.allclose(
        rows, rows[:1].expand_as(rows), atol=1e-6
    ):
        raise ValueError(
            "All class descriptions have the same embedding: does the tokenizer fit (`eos_token_id`)?"
        )
    if (
        kept is not None
    ):  # written beside and renamed, so that a kill leaves no half of it
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {"text_embeds": rows.cpu()}, part := kept.with_suffix(f".{os.getpid()}")
        )
        part.replace(kept)
    return rows


def load_tokenizer(model: Any, name: str | None = None, **hub: Any) -> Any:
    """The tokenizer `name`, or a classifier's, or that of the folder or repository of a model; ValueError without."""
    own = getattr(model, "tokenizer", None)
    if name is None and own is not None:
        return own
    name = name or getattr(model, "name_or_path", None) or ""
    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Texts need a `tokenizer` or `tokenizer_name_or_path`, none in {name!r}."
        ) from error


def _fingerprint(model: nn.Module, texts_of_class: list[list[str]]) -> str:
    """A name for rows that these weights make of these texts."""
    sums = [
        parameter.detach().double().sum().item() for parameter in model.parameters()
    ]
    return hashlib.sha256(json.dumps([texts_of_class, sums]).encode()).hexdigest()[:32]


def _encode_texts(
    model: nn.Module, tokenizer: Any, texts: list[str], batch_size: int
) -> Tensor:
    """Return raw float32 text embeddings (n, e), in the order of `texts`."""
    order, inputs_of = _tokenise(model, tokenizer, texts)
    # Texts of similar length together, so that little is padded; the longest first, as they need the most memory.
    batches = [
        order[start : start + batch_size] for start in range(0, len(texts), batch_size)
    ][::-1]
    device, encoded = next(model.parameters()).device, []
    hidden = len(batches) <= 20 or (
        dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    )
    with towers.eval_mode(model):
        for batch in tqdm(batches, desc="Encoding class descriptions", disable=hidden):
            inputs = {
                name: tensor.to(device) for name, tensor in inputs_of(batch).items()
            }
            encoded.append(towers.encode_text(model, inputs).float())
    rows = torch.cat(encoded)
    return rows[
        torch.tensor(
            [i for batch in batches for i in batch], device=rows.device
        ).argsort()
    ]


def _tokenise(
    model: nn.Module, tokenizer: Any, texts: list[str]
) -> tuple[list[int], Callable[..., dict[str, Any]]]:
    """Return the order of the texts by length, and a function from some of them to the tower's inputs."""
    if not hasattr(tokenizer, "pad"):
        return list(range(len(texts))), lambda chosen: {
            "input_ids": tokenizer([texts[i] for i in chosen])
        }
    config = towers.text_config(model)
    positions = getattr(
        getattr(config, "text_config", config), "max_position_embeddings", None
    )
    limit = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    ids = tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
    if cut := sum(len(text) > limit for text in ids):
        warnings.warn(
            f"{cut} of {len(texts)} class descriptions were cut to {limit} tokens.",
            stacklevel=4,
        )
        ids = tokenizer(texts, padding=False, truncation=True, max_length=limit)[
            "input_ids"
        ]
    padding: dict[str, Any] = {"padding": "longest"}
    if str(getattr(config, "model_type", "")).startswith("siglip"):
        # It was trained on texts padded to the full length, without an attention mask, and reads the last position.
        padding = {
            "padding": "max_length",
            "max_length": limit,
            "return_attention_mask": False,
        }
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    padding["return_tensors"] = "pt"
    return order, lambda chosen: dict(
        tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, **padding)
    )
