# SPDX-License-Identifier: Apache-2.0
"""From class descriptions to embeddings: tokenise and encode them with the model's own text tower."""

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from .descriptions import Descriptions, equal_keys, expand, normalise_descriptions
from .towers import embeddings as towers
from .validation import check_integer


Ids = tuple[int, ...]


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
    than the tower's limit are cut, with one warning that counts them; classes whose texts are equal are named in one.

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
    texts = list(itertools.chain(*texts_of_class))
    ids, padding = _tokenize(model, tokenizer, texts)
    parts = iter(ids)
    ids_of_class = [list(itertools.islice(parts, len(t))) for t in texts_of_class]
    _warn_of_equal(descriptions, ids_of_class)

    def encode(texts: list[Ids]) -> Tensor:
        return _encode(model, tokenizer, texts, padding, batch_size)

    if cache_dir is None:
        return _class_means(encode, ids_of_class)
    pads = [getattr(tokenizer, n, None) for n in ("pad_token_id", "padding_side")]
    key = _fingerprint(model, ids_of_class, padding, pads)
    kept = Path(cache_dir, f"{key}.safetensors")
    if kept.is_file():
        try:
            rows = load_file(kept)["text_embeds"]
            return rows.to(next(model.parameters()).device)
        except (SafetensorError, KeyError):
            warnings.warn(
                f"{str(kept)!r} is damaged: the texts are encoded again.", stacklevel=3
            )
    rows = _class_means(encode, ids_of_class)
    # Written to another file and renamed, so that an interrupted run leaves no half of it.
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")
    save_file({"text_embeds": rows.cpu()}, part)
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


def _warn_of_equal(descriptions: Descriptions, ids_of_class: list[list[Ids]]) -> None:
    """Warn of classes whose texts are the same to the tokenizer, by name."""
    names = normalise_descriptions(descriptions)[0] or range(len(ids_of_class))
    keys = [tuple(sorted(ids)) for ids in ids_of_class]
    if equal := equal_keys(zip(names, keys, strict=True)):
        warnings.warn(
            f"Classes with equal texts get the same embedding, so that they cannot be told apart: {equal}.",
            stacklevel=4,
        )


def _fingerprint(model: nn.Module, *inputs: Any) -> str:
    """A name for what these weights, in this architecture, make of these inputs, on any machine."""
    config: dict[str, Any] = getattr(towers.text_config(model), "to_dict", dict)()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype"):
        config.pop(name, None)
    tensors = itertools.chain(model.parameters(), model.buffers())
    parts = [inputs, config, repr(model), [_sum_of_bits(tensor) for tensor in tensors]]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's bits as integers: unlike that of floats it does not depend on the order, or on threads."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(sizes[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def _class_means(
    encode: Callable[[list[Ids]], Tensor], ids_of_class: list[list[Ids]]
) -> Tensor:
    """Unit rows (M, e): the means of the unit embeddings of the texts of each class."""
    # Similar lengths together, so that little is padded; the longest first, as they need the most memory.
    texts = [*dict.fromkeys(itertools.chain(*ids_of_class))]
    texts.sort(key=len, reverse=True)
    place = {ids: index for index, ids in enumerate(texts)}
    embeddings = F.normalize(encode(texts), dim=-1)
    means = [
        embeddings[[place[ids] for ids in own]].mean(dim=0) for own in ids_of_class
    ]
    rows = F.normalize(torch.stack(means), dim=-1)
    differ = len(set(map(tuple, ids_of_class))) > 1
    if differ and torch.allclose(rows, rows[:1].expand_as(rows), atol=1e-6):
        raise ValueError(
            "All class descriptions have the same embedding: does the tokenizer fit (`eos_token_id`)?"
        )
    return rows


def _encode(
    model: nn.Module,
    tokenizer: Any,
    texts: list[Ids],
    padding: dict[str, Any],
    batch_size: int,
) -> Tensor:
    """Raw float32 embeddings (n, e) of tokenised texts."""
    device = next(model.parameters()).device
    starts = range(0, len(texts), batch_size)
    is_other = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    hidden = is_other or len(starts) <= 20
    encoded = []
    with towers.eval_mode(model):
        for start in tqdm(starts, desc="Encoding class descriptions", disable=hidden):
            batch = [list(ids) for ids in texts[start : start + batch_size]]
            inputs: Any = {"input_ids": batch}
            if padding:
                inputs = tokenizer.pad(inputs, return_tensors="pt", **padding)
            inputs = {
                name: torch.as_tensor(value).to(device)
                for name, value in inputs.items()
            }
            encoded.append(towers.encode_text(model, inputs).float())
    return torch.cat(encoded)


def _tokenize(
    model: nn.Module, tokenizer: Any, texts: list[str]
) -> tuple[list[Ids], dict[str, Any]]:
    """The token ids of texts, and how the tokenizer pads them, if they are not padded yet."""
    if not hasattr(tokenizer, "pad"):
        return [tuple(map(int, row)) for row in tokenizer(texts)], {}
    config = towers.text_config(model)
    model_type = str(getattr(config, "model_type", ""))
    config = getattr(config, "text_config", config)
    limit = tokenizer.model_max_length
    limit = min(limit, getattr(config, "max_position_embeddings", None) or limit)
    ids = tokenizer(texts, padding=False, truncation=False, verbose=False)
    cut = sum(len(text) > limit for text in ids["input_ids"])
    if cut:
        warnings.warn(
            f"{cut} of {len(texts)} class descriptions were cut to {limit} tokens.",
            stacklevel=4,
        )
        ids = tokenizer(texts, padding=False, truncation=True, max_length=limit)
    padding: dict[str, Any] = {"padding": "longest"}
    if model_type.startswith("siglip"):
        # It was trained on texts padded to the full length, without a mask, and reads the last position.
        padding = {
            "padding": "max_length",
            "max_length": limit,
            "return_attention_mask": False,
        }
    return [tuple(row) for row in ids["input_ids"]], padding
