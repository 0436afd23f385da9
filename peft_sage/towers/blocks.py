# SPDX-License-Identifier: Apache-2.0
"""The blocks of a vision tower that adapters wrap.

One structural rule covers nearly every family: a vision tower is a stack of blocks; a block mixes tokens and holds an
MLP sub-block that maps `(..., d)` to `(..., d)`, with the residual added outside. The names that the rule needs are
the constants below. A family that follows the rule needs no entry anywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


# Names under which a model that is more than a vision tower keeps its vision tower.
TOWER_NAMES = frozenset(
    {"vision_model", "vision_tower", "visual", "vision_encoder", "image_encoder", "image_model", "image_tower"}
)
# Names of the MLP sub-block of a block.
MLP_NAMES = frozenset({"mlp", "ffn", "feed_forward"})
# Words in the names of sub-trees beside the encoder of a model that reads images.
NOT_ENCODER = frozenset({"decoder", "text", "language", "qformer", "predictor", "aifi"})
# The LayerScale of the MLP branch, by the name that it has in a block.
LAYER_SCALE_NAMES = ("lambda_2", "layer_scale2", "ls2", "gamma_2", "ls_2", "layer_scale_2", "gamma")


def find_blocks(model: nn.Module) -> list[str]:
    """Find the MLP sub-blocks of the vision tower, which an adapter wraps by default.

    Args:
        model: A vision-language model, a vision tower, an image classifier, or one of these inside a wrapper (PEFT,
            `SageClassifier`). Modules that already carry adapters are found as well.

    Returns:
        The names of the blocks relative to `model`, in depth order.

    Raises:
        ValueError: `model` has no vision tower (a text model, say), or its tower has no block of the right shape (a
            convolutional tower, say). Nothing has been changed.
    """
    towers = find_towers(model)
    if not towers:
        raise ValueError(
            f"`model` must have a vision tower, but {describe(model)} has none: it does not read images, and no "
            f"sub-module is named one of {sorted(TOWER_NAMES)}. Pass `target_modules` to choose modules by hand."
        )
    blocks = [_join(tower, name) for tower in towers for name in _blocks(model.get_submodule(tower))]
    if not blocks:
        names = [type(model.get_submodule(tower)).__name__ for tower in towers if tower]
        raise ValueError(
            f"`model` must have a vision tower of transformer blocks, but {' with '.join([describe(model), *names])} "
            "has no repeated block with an MLP of linear layers that maps (..., d) to (..., d): it may be "
            "convolutional. Pass `target_modules` to choose modules by hand."
        )
    return blocks


def candidate_modules(model: nn.Module) -> list[str]:
    """List the modules that have the place and shape of a block, in any part of the model.

    Args:
        model: Any model.

    Returns:
        Their names relative to `model`, for messages that suggest `target_modules`.
    """
    return list(_blocks(model, skip=frozenset()))


def block_widths(module: nn.Module) -> tuple[int, int]:
    """Widths of the tokens that a block reads and returns.

    Args:
        module: An MLP `(..., d) -> (..., d)`, or the `output` half of an `intermediate` / `output` pair. Linear layers
            may be quantised or carry adapters: only their `in_features` and `out_features` are read.

    Returns:
        Both widths, in features. They differ for an `output` half that is not given the residual, as it reads the
        widened tokens.

    Raises:
        ValueError: `module` holds no linear layer, or returns wider tokens than it reads.
    """
    linears = list(_linears(module))
    if not linears:
        raise ValueError(f"`module` must hold a linear layer, but {type(module).__name__} has none.")
    if block_input_index(module) == 1:
        return linears[-1].out_features, linears[-1].out_features
    width = linears[0].in_features
    # Gated MLPs do not always define their last linear layer last.
    width_out = width if any(linear.out_features == width for linear in linears) else linears[-1].out_features
    if width_out > width:
        raise ValueError(
            f"`module` must map (..., d) to (..., d), but {type(module).__name__} maps {width} features to "
            f"{width_out}."
        )
    return width, width_out


def block_input_index(module: nn.Module) -> int:
    """Which positional argument of a block carries its `(..., d)` tokens.

    Args:
        module: A block.

    Returns:
        0 for an MLP; 1 for the half `output(hidden_states, input_tensor)` of an `intermediate` / `output` pair, whose
        first argument is the widened tensor and whose second is the residual.
    """
    parameters = list(inspect.signature(_unwrapped(module).forward).parameters)
    return int(parameters[1:2] == ["input_tensor"])


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


def find_towers(model: nn.Module) -> list[str]:
    """Find the outermost vision towers of a model.

    Args:
        model: Any model.

    Returns:
        Their names; the empty name if the model as a whole is one.
    """
    towers: list[str] = []
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] in TOWER_NAMES and not name.startswith(tuple(f"{tower}." for tower in towers)):
            towers.append(name)
    return towers or [""] * _reads_images(model)


def describe(model: nn.Module) -> str:
    """Name a model for an error message.

    Args:
        model: Any model.

    Returns:
        Its class and, where its configuration has one, its `model_type`.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")


def _reads_images(model: nn.Module) -> bool:
    """Whether a model without a named tower is itself one: it starts from pixels and has no vocabulary."""
    config = getattr(model, "config", None)
    embeddings = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    main_inputs = getattr(model, "main_input_name", None)
    if main_inputs is None:  # A plain module: timm's have `forward_features`, and hardly a tower has no convolution.
        is_tower = hasattr(model, "forward_features") or any(isinstance(m, nn.Conv2d) for m in model.modules())
        return is_tower and not embeddings
    if getattr(config, "vocab_size", None) in embeddings:
        return False
    main_inputs = [main_inputs] if isinstance(main_inputs, str) else main_inputs
    # "input_ids" is what transformers assumes where a model does not say: many towers of language models do not.
    return main_inputs[0].startswith("pixel_values") or (
        main_inputs == ["input_ids"] and hasattr(config, "patch_size")
    )


def _blocks(tower: nn.Module, skip: frozenset[str] = NOT_ENCODER) -> Iterator[str]:
    """Names of the repeated MLP sub-blocks below `tower`, in depth order."""
    modules = dict(tower.named_modules())
    for name, module in modules.items():
        *path, last = name.split(".")
        if not path or not path[-1].isdigit():
            continue  # `head.mlp` and `attn_pool.mlp` are not in an element of a stack.
        if not skip.isdisjoint(word for part in path for word in part.split("_")):
            continue
        block = modules[".".join(path)]
        is_pair = last == "output" and hasattr(block, "intermediate")
        if (is_pair or last in MLP_NAMES) and _fits(module, is_pair) and _mixes_tokens(block, last):
            yield name


def _fits(module: nn.Module, is_pair: bool) -> bool:
    """Whether a module has linear layers and, unless it is half of a pair, returns the width that it reads."""
    try:
        width_in, width_out = block_widths(module)
    except ValueError:
        return False
    return is_pair or width_in == width_out


def _mixes_tokens(block: nn.Module, mlp: str) -> bool:
    """Whether a block has weights outside its MLP, as attention has: a projector of tokens has not."""
    mlp_parts = (f"{mlp}.", "intermediate.")
    return any(weight.ndim > 1 for name, weight in block.named_parameters() if not name.startswith(mlp_parts))


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


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
