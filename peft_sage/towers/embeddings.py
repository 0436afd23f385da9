# SPDX-License-Identifier: Apache-2.0
"""Embeddings of text and images in the space that the two share.

Nearly every family has `get_text_features` and `get_image_features` (transformers) or `encode_text` and `encode_image`
(open_clip and its kin); the functions below treat the rest.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .mlps import find_towers


# These families' `get_text_features` returns features of a generating language model, or one vector per token for a
# detector: no embedding that could be compared with an image's.
NO_TEXT_EMBEDDING = frozenset({"blip-2", "sam3", "sam3_lite_text", "sam3_video"})


def has_text_tower(model: nn.Module) -> bool:
    """Whether [`encode_text`] works on a model, which may be wrapped."""
    return _text_encoder(model) is not None


def text_config(model: nn.Module) -> Any | None:
    """The configuration of the model that owns the text tower, also below wrappers; None for models without one."""
    return getattr(_owner(model, "get_text_features") or model, "config", None)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def encode_text(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Embed tokenised texts: (n, e), projected into the space shared with images, not normalised.

    Args:
        model: A model with a text tower; it may be wrapped, or a part of it.
        inputs: What the tokenizer returned. Entries that the text tower does not take are dropped.

    Raises:
        ValueError: `model` has no text tower.
    """
    encode = _text_encoder(model)
    if encode is None:
        raise ValueError(
            f"`model` must have a text tower, but {type(model).__name__} has none: pass embeddings."
        )
    names = inspect.signature(encode).parameters
    return _embedding(
        encode(**{name: value for name, value in inputs.items() if name in names}),
        model,
    )


def encode_image(model: nn.Module, pixel_values: Tensor, **kwargs: Any) -> Tensor:
    """Embed images: (B, e), not normalised.

    They are projected into the space shared with text where there is one. Without one they are what the tower pools,
    or the mean over tokens where it does not pool.

    Args:
        model: A vision-language model or a vision tower; it may be wrapped.
        pixel_values: Images (B, C, H, W) (videos (B, T, C, H, W) for X-CLIP, patches (B, N, p) for NaFlex).
        **kwargs: Further inputs of the vision tower, such as `pixel_attention_mask` and `spatial_shapes`.

    Raises:
        ValueError: `model` does not give one embedding per image.
    """
    for method in ("get_image_features", "encode_image", "get_video_features"):
        if (owner := _owner(model, method)) is not None:
            return _embedding(getattr(owner, method)(pixel_values, **kwargs), owner)
    if (owner := _owner(model, "forward_head")) is not None:
        return owner.forward_head(owner.forward_features(pixel_values), pre_logits=True)
    return _embedding(_vision_tower(model)(pixel_values, **kwargs), model)


def _text_encoder(model: nn.Module) -> Callable[..., Any] | None:
    owner = _owner(model, "get_text_features")
    if owner is not None and _model_type(owner) not in NO_TEXT_EMBEDDING:
        return owner.get_text_features
    if (owner := _owner(model, "encode_text")) is not None:
        return lambda input_ids: owner.encode_text(input_ids)
    projecting = (
        module
        for module in model.modules()
        if type(module).__name__.endswith("TextModelWithProjection")
    )
    return getattr(next(projecting, None), "forward", None)


def _vision_tower(model: nn.Module) -> nn.Module:
    """The part of a model without text that ends in an embedding, below wrappers and the head of a classifier."""
    model = next(
        (
            module
            for module in model.modules()
            if hasattr(type(module), "base_model_prefix")
        ),
        model,
    )
    if type(model).__name__.endswith("VisionModelWithProjection"):
        return model
    if type(model).__name__.endswith("ForImageClassification"):
        model = getattr(model, "base_model", model)
    return model.get_submodule(next(iter(find_towers(model)), ""))


def _owner(model: nn.Module, method: str) -> Any | None:
    """The outermost sub-module whose class defines `method`: wrappers only forward it."""
    return next(
        (
            module
            for module in model.modules()
            if callable(getattr(type(module), method, None))
        ),
        None,
    )


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _embedding(output: Any, model: nn.Module) -> Tensor:
    """The embedding (B, e) in what a model returns: a tensor or, in transformers, an output object."""
    if not isinstance(output, Tensor):
        fields = (
            getattr(output, name, None)
            for name in ("text_embeds", "image_embeds", "pooler_output")
        )
        output = next((field for field in fields if field is not None), output)
    if (hidden := getattr(output, "last_hidden_state", None)) is not None:
        output = hidden.mean(dim=1)
    if (
        isinstance(output, Tensor)
        and output.ndim == 3
        and _model_type(model) == "flava"
    ):
        output = output[:, 0]  # FLAVA projects all tokens and compares the first.
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ValueError(
            f"`model` must give embeddings (B, e), but {type(model).__name__} gives none."
        )
    return output
