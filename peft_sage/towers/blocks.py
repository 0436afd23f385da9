# SPDX-License-Identifier: Apache-2.0
"""Where the adapter goes in a vision tower, and how a model turns text and images into embeddings.

One structural rule covers nearly every family: a vision tower is a stack of blocks, a block holds an MLP sub-block,
and the MLP maps `(..., d)` to `(..., d)` with the residual added outside. What breaks the rule is listed in the small
tables at the top; a new family is one entry there and one row in `tests/test_towers.py`.

Nothing here changes a model, keeps state, or imports a model library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


# Names under which a model that is more than a vision tower keeps its vision tower.
TOWER_NAMES = frozenset(
    {"vision_model", "vision_tower", "visual", "vision_encoder", "image_encoder", "image_model", "image_tower"}
)
# Names of the MLP sub-block of a block.
MLP_NAMES = frozenset({"mlp", "ffn", "feed_forward"})
# Sub-trees inside a vision-only model that are not its encoder.
NOT_ENCODER = frozenset({"decoder", "text_model", "text_encoder", "language_model", "qformer"})
# The LayerScale of the MLP branch, by the name it has in a block.
LAYER_SCALE_NAMES = ("lambda_2", "layer_scale2", "ls2", "gamma_2", "ls_2", "layer_scale_2", "gamma")


def find_blocks(model: nn.Module) -> list[str]:
    """Find the MLP sub-blocks of the vision tower that an adapter wraps by default.

    Args:
        model: A vision-language model, a vision tower, an image classifier, or one of these inside a wrapper (PEFT,
            `ZeroShotClassifier`). Modules that already carry adapters are found as well.

    Returns:
        The names of the blocks relative to `model`, from the first to the last in depth.

    Raises:
        ValueError: `model` has no vision tower (a text model, say), or its tower has no block of the right shape (a
            convolutional tower, say). Nothing has been changed.
    """
    towers = _towers(model)
    if not towers:
        raise ValueError(
            f"`model` must have a vision tower, but {_describe(model)} has none: no sub-module named one of "
            f"{sorted(TOWER_NAMES)}, and it does not read images itself. Pass `target_modules` to choose by hand."
        )
    blocks = [_join(tower, name) for tower in towers for name in _blocks(model.get_submodule(tower))]
    if not blocks:
        raise ValueError(
            f"`model` must have a vision tower made of transformer blocks, but {_describe(model)} has no repeated "
            f"block with an MLP that maps (..., d) to (..., d) in {', '.join(map(repr, towers))}: a convolutional "
            "tower cannot be adapted. Pass `target_modules` to choose modules by hand."
        )
    return blocks


def candidate_modules(model: nn.Module) -> list[str]:
    """List the names of all modules that have the shape of a block, for messages that suggest `target_modules`."""
    return list(_blocks(model, skip=frozenset()))


def block_width(module: nn.Module) -> int:
    """Width d of the tokens that enter and leave a block.

    Args:
        module: An MLP `(..., d) -> (..., d)`, or the `output` half of an `intermediate` / `output` pair. Linear layers
            may be quantised or carry adapters: only their `in_features` and `out_features` are read.

    Returns:
        d, in features.

    Raises:
        ValueError: `module` holds no linear layer, or its input and output differ in width.
    """
    linears = list(_linears(module))
    if not linears:
        raise ValueError(f"`module` must hold a linear layer, but {type(module).__name__} has none.")
    if block_input_index(module) == 1:
        return linears[-1].out_features
    width = linears[0].in_features
    if all(linear.out_features != width for linear in linears):
        raise ValueError(
            f"`module` must map (..., d) to (..., d), but {type(module).__name__} maps {width} features to "
            f"{linears[-1].out_features}."
        )
    return width


def block_input_index(module: nn.Module) -> int:
    """Which positional argument of a block carries its `(..., d)` tokens.

    Returns:
        0 for an MLP; 1 for the `output(hidden_states, input_tensor)` half of an `intermediate` / `output` pair, whose
        first argument is the widened tensor and whose second is the residual.
    """
    parameters = list(inspect.signature(_unwrapped(module).forward).parameters)
    return int(parameters[:2] == ["hidden_states", "input_tensor"])


def layer_scale(model: nn.Module, name: str) -> torch.Tensor | None:
    """The LayerScale that multiplies a block's output before the residual is added.

    Args:
        model: The model that holds the block.
        name: The block's name relative to `model`, as `find_blocks` gives it.

    Returns:
        The scale `(d,)`, or None where the tower has none.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    for attribute in LAYER_SCALE_NAMES:
        scale = getattr(parent, attribute, None)
        if isinstance(scale, nn.Module):
            scale = next(scale.parameters(), None)
        if isinstance(scale, torch.Tensor):
            return scale
    return None


def has_text_tower(model: nn.Module) -> bool:
    """Whether `encode_text` works on this model."""
    return _text_encoder(model) is not None


def encode_text(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Embed tokenised text with the model's own text tower.

    Args:
        model: A model with a text tower; it may be wrapped.
        inputs: What the tokenizer returned: `input_ids (n, length)` and, where the model wants it, `attention_mask`.
            Entries that the text tower does not take are dropped.

    Returns:
        Embeddings `(n, e)` in the space shared with images: projected, not normalised.

    Raises:
        ValueError: `model` has no text tower.
    """
    encode = _text_encoder(model)
    if encode is None:
        raise ValueError(
            f"`model` must have a text tower to encode class descriptions, but {_describe(model)} has none: encode "
            "them with another model and pass the embeddings as `guidance`."
        )
    return encode(inputs)


def encode_image(model: nn.Module, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Embed images with the model's vision tower.

    Args:
        model: A vision-language model or a vision tower; it may be wrapped.
        pixel_values: Images `(B, C, H, W)` (video `(B, T, C, H, W)` for X-CLIP, patches `(B, N, p)` for NaFlex).
        **kwargs: Further inputs of the vision tower, such as `pixel_attention_mask` and `spatial_shapes`.

    Returns:
        Embeddings `(B, e)`: projected into the space shared with text where there is one, not normalised.
    """
    for method in ("get_video_features", "get_image_features", "encode_image"):
        owner = _owner(model, method)
        if owner is not None:
            return _pooled(getattr(owner, method)(pixel_values, **kwargs))
    return _pooled(model(pixel_values, **kwargs))


def logit_scale_and_bias(model: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scale and bias of the model's own image-text logits, `scale * cos(image, text) + bias`.

    Returns:
        The scale, already exponentiated, and the bias; None for what the model does not have.
    """
    for module in model.modules():
        scale = getattr(module, "logit_scale", None)
        if isinstance(scale, torch.Tensor):
            return scale.exp(), getattr(module, "logit_bias", None)
    return None, None


def _towers(model: nn.Module) -> list[str]:
    """Names of the outermost vision towers in `model`; the empty name if `model` as a whole is one."""
    towers: list[str] = []
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in TOWER_NAMES and not any(name.startswith(f"{tower}.") for tower in towers):
            towers.append(name)
    return towers or [""] * _reads_images(model)


def _reads_images(model: nn.Module) -> bool:
    """Whether a model without a named tower is itself one: its main input is pixels, or it starts from patches."""
    main_input = getattr(model, "main_input_name", None)
    if main_input is not None:
        return main_input == "pixel_values"
    modules = list(model.modules())
    return any(isinstance(m, nn.Conv2d) for m in modules) and not any(isinstance(m, nn.Embedding) for m in modules)


def _blocks(tower: nn.Module, skip: frozenset[str] = NOT_ENCODER) -> Iterator[str]:
    """Names of the repeated MLP sub-blocks below `tower`, in depth order."""
    modules = dict(tower.named_modules())
    for name, module in modules.items():
        *path, last = name.split(".")
        if len(path) < 2 or not path[-1].isdigit() or not skip.isdisjoint(path):
            continue  # `head.mlp`, `attn_pool.mlp`: not an element of a stack
        is_pair = last == "output" and hasattr(modules[".".join(path)], "intermediate")
        if (last in MLP_NAMES or (is_pair and block_input_index(module) == 1)) and _is_block(module):
            yield name


def _is_block(module: nn.Module) -> bool:
    try:
        block_width(module)
    except ValueError:
        return False
    return True


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module below adapter layers: PEFT keeps what it wraps in `base_layer`."""
    while isinstance(inner := module._modules.get("base_layer"), nn.Module):
        module = inner
    return module


def _linears(module: nn.Module) -> Iterator[Any]:
    """Linear layers of a block in order of definition, without those that adapters add."""
    module = _unwrapped(module)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        yield module
        return
    for child in module.children():
        yield from _linears(child)


def _owner(model: nn.Module, method: str) -> nn.Module | None:
    """The outermost sub-module whose class defines `method`: wrappers only forward it."""
    return next((module for module in model.modules() if callable(getattr(type(module), method, None))), None)


def _text_encoder(model: nn.Module) -> Callable[[dict[str, torch.Tensor]], torch.Tensor] | None:
    """The function that embeds tokenised text, or None."""
    if (owner := _owner(model, "get_text_features")) is not None:
        return lambda inputs: _pooled(owner.get_text_features(**_accepted(owner.get_text_features, inputs)))
    if (owner := _owner(model, "encode_text")) is not None:
        return lambda inputs: owner.encode_text(inputs["input_ids"])
    return None


def _accepted(function: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = inspect.signature(function).parameters
    return {name: value for name, value in inputs.items() if name in names}


def _pooled(output: Any) -> torch.Tensor:
    """The embedding in what a model returns: transformers 4 gives a tensor, transformers 5 an output object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _describe(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")
