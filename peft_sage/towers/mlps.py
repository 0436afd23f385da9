# SPDX-License-Identifier: Apache-2.0
"""The MLPs of a vision tower, which adapters wrap.

One structural rule covers nearly every family: a vision tower is a stack of blocks; a block mixes tokens and holds an
MLP that maps (..., d) to (..., d), with the residual added outside. The names that the rule needs are the constants
below. A family that follows the rule needs no entry anywhere.
"""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


# Names under which a model that is more than a vision tower keeps its vision tower.
TOWER_NAMES = {
    "vision_model",
    "vision_tower",
    "vision_encoder",
    "image_model",
    "image_tower",
    "image_encoder",
    "visual",
}
MLP_NAMES = frozenset({"mlp", "ffn", "feed_forward"})
# Words in the names of sub-trees next to the encoder of a model that reads images.
NOT_ENCODER = frozenset({"decoder", "text", "language", "qformer", "predictor", "aifi"})
# The LayerScale of the MLP branch, by the name that it has in a block.
LAYER_SCALE_NAMES = (
    "lambda_2",
    "layer_scale2",
    "ls2",
    "gamma_2",
    "ls_2",
    "layer_scale_2",
    "gamma",
)
# What `torch.compile` and accelerate's `compile_regions` put between a module and its name.
COMPILED = "_orig_mod"
BY_HAND = "Pass `target_modules` to choose modules by hand."


def find_mlps(model: nn.Module) -> list[str]:
    """Find the MLPs of the vision tower, in depth order, by their names in `model`.

    `model` is a vision-language model, a vision tower, an image classifier, or one of these inside a wrapper. MLPs
    that already carry adapters are found as well.

    Raises:
        ValueError: `model` has no vision tower (a text model, say), or its tower has no MLP of the right shape (a
            convolutional tower, say).
    """
    towers = find_towers(model)
    if not towers:
        raise ValueError(
            f"`model` must have a vision tower, but {type(model).__name__} reads no images. {BY_HAND}"
        )
    mlps = [
        f"{tower}.{name}".lstrip(".")
        for tower in towers
        for name in _mlps(model.get_submodule(tower))
    ]
    if not mlps:
        raise ValueError(
            f"`model` must have blocks with MLPs, but {type(model).__name__} has none. {BY_HAND}"
        )
    return mlps


def candidate_modules(model: nn.Module) -> list[str]:
    """List the modules in any part of `model` that have the place and shape of an MLP, for error messages."""
    return list(_mlps(model, skip=frozenset()))


def mlp_widths(module: nn.Module) -> tuple[int, int]:
    """Widths of the tokens that an MLP, or the `output` half of an `intermediate` / `output` pair, reads and returns.

    Linear layers may be quantised or carry adapters: only their `in_features` and `out_features` are read. The widths
    differ for an `output` half that is not given the residual, as it reads the widened tokens.

    Raises:
        ValueError: `module` holds no linear layer, or returns wider tokens than it reads.
    """
    linears = _linears(module)
    if not linears:
        raise ValueError(
            f"`module` must hold a linear layer, but {type(module).__name__} has none."
        )
    outputs = [linear.out_features for linear in linears]
    if mlp_input(module)[0] == 1:
        return outputs[-1], outputs[-1]
    width = linears[0].in_features
    # Gated MLPs do not always define their last linear layer last.
    width_out = width if width in outputs else outputs[-1]
    if width_out > width:
        raise ValueError(
            f"`module` must map (..., d) to (..., d), got {width} to {width_out} features."
        )
    return width, width_out


def mlp_input(module: nn.Module) -> tuple[int, str]:
    """Position and name of the argument that carries an MLP's tokens (..., d).

    It is the first, but the second of a half `output(hidden_states, input_tensor)`, whose first is the widened tensor.
    """
    names = list(inspect.signature(_unwrapped(module).forward).parameters)
    return (1, names[1]) if names[1:2] == ["input_tensor"] else (0, names[0])


def layer_scale(model: nn.Module, name: str) -> Tensor | None:
    """The LayerScale (d,) that multiplies an MLP's output before the residual is added, if there is one."""
    parent = model.get_submodule(name.rpartition(".")[0])
    for attribute in LAYER_SCALE_NAMES:
        scale = getattr(parent, attribute, None)
        if isinstance(scale, nn.Module):
            scale = next(scale.parameters(), None)
        if isinstance(scale, Tensor):
            return scale
    return None


def same_module(one: str, other: str) -> bool:
    """Whether two names stand for the same module of one vision tower, held by different classes.

    `vision_model.encoder.layers.0.mlp` of `CLIPModel` is `encoder.layers.0.mlp` of `CLIPVisionModel`, and a wrapper
    around either puts something in front.
    """
    short, long = sorted((_within_tower(one), _within_tower(other)), key=len)
    return long[len(long) - len(short) :] == short and _in_encoder(
        long[: len(long) - len(short)]
    )


def find_towers(model: nn.Module) -> list[str]:
    """Names of the outermost vision towers of a model; the empty name if the model as a whole is one."""
    named = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in TOWER_NAMES
    ]
    towers = [
        name
        for name in named
        if not name.startswith(tuple(f"{tower}." for tower in named))
    ]
    return towers or [""] * _reads_images(model)


def _reads_images(model: nn.Module) -> bool:
    """Whether a model without a named tower is itself one: it starts from pixels and has no vocabulary."""
    config = getattr(model, "config", None)
    embeddings = [
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    main_inputs = getattr(model, "main_input_name", None)
    if (
        main_inputs is None
    ):  # A plain module: timm's have `forward_features`, and hardly a tower has no convolution.
        is_tower = hasattr(model, "forward_features") or any(
            isinstance(m, nn.Conv2d) for m in model.modules()
        )
        return is_tower and not embeddings
    if getattr(config, "vocab_size", None) in embeddings:
        return False
    main_inputs = [main_inputs] if isinstance(main_inputs, str) else main_inputs
    # "input_ids" is what transformers assumes where a model does not say: many towers of language models do not.
    unsaid = main_inputs == ["input_ids"] and hasattr(config, "patch_size")
    return unsaid or main_inputs[0].startswith("pixel_values")


def _mlps(tower: nn.Module, skip: frozenset[str] = NOT_ENCODER) -> Iterator[str]:
    """Names of the MLPs of the repeated blocks below `tower`, in depth order."""
    for name, module in tower.named_modules():
        *path, last = name.split(".")
        block = tower.get_submodule(".".join(path))
        path = [part for part in path if part != COMPILED]
        # `head.mlp` and `attn_pool.mlp` are not in an element of a stack.
        if not path or not path[-1].isdigit() or not _in_encoder(path, skip):
            continue
        is_pair = last == "output" and hasattr(block, "intermediate")
        if (
            (is_pair or last in MLP_NAMES)
            and _fits(module, is_pair)
            and _mixes_tokens(block, last)
        ):
            yield name


def _in_encoder(path: list[str], skip: frozenset[str] = NOT_ENCODER) -> bool:
    return skip.isdisjoint(word for part in path for word in part.split("_"))


def _within_tower(name: str) -> list[str]:
    path = [part for part in name.split(".") if part != COMPILED]
    towers = [place for place, part in enumerate(path) if part in TOWER_NAMES]
    return path[towers[-1] + 1 :] if towers else path


def _fits(module: nn.Module, is_pair: bool) -> bool:
    """Whether a module has linear layers and, unless it is half of a pair, returns the width that it reads."""
    try:
        width_in, width_out = mlp_widths(module)
    except ValueError:
        return False
    return is_pair or width_in == width_out


def _mixes_tokens(block: nn.Module, mlp: str) -> bool:
    """Whether a block has weights outside its MLP, as attention has: a projector of tokens has not."""
    return any(
        weight.ndim > 1 and not name.startswith((f"{mlp}.", "intermediate."))
        for name, weight in block.named_parameters()
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module below adapter layers, which keep what they wrap in `base_layer`, and below `torch.compile`."""
    while inner := module._modules.get("base_layer") or module._modules.get(COMPILED):
        module = inner
    return module


def _linears(module: nn.Module) -> list[Any]:
    """Linear layers of an MLP in order of definition, without those that adapters add."""
    module = _unwrapped(module)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return [module]
    return [linear for child in module.children() for linear in _linears(child)]
