# SPDX-License-Identifier: Apache-2.0
"""The rows that the blocks of an adapter attend to: how they are made, where they are kept, how they are replaced."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._peft_compat import BufferDict
from .config import SageConfig
from .descriptions import Descriptions, normalise_descriptions
from .encoding import encode_class_descriptions, load_tokenizer
from .towers.embeddings import has_text_tower
from .validation import check_embeddings, check_integer


#: Steps of k-means at most.
STEPS = 20


class SharedGuidance:
    """The guidance (M, e) of an adapter, with rows of unit length, for all of its blocks.

    The first block that takes it keeps it as a buffer, so that it is saved once. All blocks read it through the
    `BufferDict` of that block and never hold the tensor, which loading and moving replace.
    """

    def __init__(self, adapter_name: str, rows: Tensor) -> None:
        self.adapter_name = adapter_name
        self.owner: BufferDict | dict[str, Tensor] = {adapter_name: rows}

    def keep_in(self, buffers: BufferDict) -> None:
        """Make the rows a buffer of the first block that asks for it."""
        if not isinstance(self.owner, BufferDict):
            buffers[self.adapter_name] = self.rows
            self.owner = buffers

    @property
    def rows(self) -> Tensor:
        """The tensor (M, e), where the first block is. Setting it keeps the device and the precision."""
        return self.owner[self.adapter_name]

    @rows.setter
    def rows(self, rows: Tensor) -> None:
        self.owner[self.adapter_name] = rows.to(self.rows)


def find_guidance(model: nn.Module, adapter_name: str) -> SharedGuidance | None:
    """Return the guidance of an adapter in a model, None if it has none."""
    for module in model.modules():
        shared = getattr(module, "shared_guidance", {})
        if adapter_name in shared:
            return shared[adapter_name]
    return None


def make_guidance(
    model: nn.Module,
    config: SageConfig,
    source: Tensor | Descriptions | None,
) -> Tensor | None:
    """Make the rows (M, e) of an adapter; None for an adapter without guidance.

    Args:
        model: The model that is adapted; its text tower encodes descriptions.
        config: For `guidance_rows`, `text_templates` and `tokenizer_name_or_path`.
        source: A tensor, class descriptions, or None for a classifier's own embeddings.
    """
    embeddings = own_embeddings(model) if source is None else source
    if config.guidance_rows == 0 or embeddings is None or not len(embeddings):
        return None
    if not isinstance(embeddings, Tensor):
        # Without a text tower, that is what the error is about, and not the tokenizer.
        tokenizer = None
        if has_text_tower(model):
            tokenizer = load_tokenizer(model, config.tokenizer_name_or_path)
        embeddings = encode_class_descriptions(
            model, tokenizer, embeddings, config.text_templates
        )
    return pool_guidance(embeddings, config.guidance_rows)


def own_embeddings(model: nn.Module) -> Tensor | None:
    """Return the `text_embeds` (K, e) of the head of a classifier, None for other models."""
    return getattr(getattr(model, "class_head", None), "text_embeds", None)


def set_guidance(model: nn.Module, source: Any, adapter_name: str) -> None:
    """Give a trained adapter another set of classes, without training: attention is over a set of any size.

    `model` comes without PEFT's wrapper; `source` is as in [`SageModel.set_guidance`].

    Raises:
        TypeError, ValueError: The adapter does not exist or has no guidance, or the source does not fit.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, SageConfig):
        raise ValueError(
            f"`adapter_name` must be a Sage adapter of {list(configs)}, got {adapter_name!r}."
        )
    shared = find_guidance(model, adapter_name)
    if shared is None:
        raise ValueError(
            f"The adapter {adapter_name!r} was made without guidance, so it cannot be given any."
        )
    names = None
    texts = None
    if source is None:
        names = getattr(model, "class_names", None)
    elif isinstance(source, (Mapping, list, tuple)):
        names, texts = normalise_descriptions(source)
    else:
        check_embeddings(source, "guidance")
    rows = make_guidance(model, config, source)
    width = shared.rows.shape[1]
    if rows is None or rows.shape[1] != width:
        shape = None if rows is None else tuple(rows.shape)
        raise ValueError(f"`guidance` must have the shape (M, {width}), got {shape}.")
    shared.rows = rows
    config.class_names = names
    config.class_descriptions = texts
    config.guidance_shape = list(rows.shape)
    config.guidance = None


@torch.no_grad()
def pool_guidance(guidance: Tensor, num_rows: int = 64) -> Tensor:
    """Replace the embeddings (M, e) of many classes by fewer rows that stand for groups of similar classes.

    What an adapter costs grows with the rows that its blocks attend to. Spherical k-means (Dhillon and Modha, 2001)
    gathers the classes around `num_rows` directions, on the CPU, so that all processes come to the same result.

    Args:
        guidance: One embedding per class; normalised here.
        num_rows: R, how many rows remain.

    Returns:
        A float32 tensor (R, e) with L2-normalised rows, on the device of `guidance`; if M is at most R, all M rows.
    """
    check_embeddings(guidance, "guidance")
    check_integer("num_rows", num_rows, 1)
    rows = F.normalize(guidance.detach().float(), dim=-1)
    if len(rows) <= num_rows:
        return rows
    rows = rows.cpu()
    generator = torch.Generator().manual_seed(0)
    means = rows[torch.randperm(len(rows), generator=generator)[:num_rows]]
    for _ in range(STEPS):
        nearest = (rows @ means.T).argmax(dim=1)
        sums = torch.zeros_like(means).index_add_(0, nearest, rows)
        # A group without rows, or whose rows cancel out, keeps its direction.
        moved = sums.norm(dim=1, keepdim=True) > 1e-6
        before = means
        means = torch.where(moved, F.normalize(sums, dim=-1), means)
        if torch.equal(before, means):
            break
    return means.to(guidance.device)
