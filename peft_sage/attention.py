# SPDX-License-Identifier: Apache-2.0
"""Where in an image an adapter attends to, as numbers and as a picture."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import SageLayer
from .towers.embeddings import encode_image
from .validation import check_integer


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    pixel_values: Tensor,
    layer: int = -1,
    adapter_name: str | None = None,
) -> Tensor:
    """Return where in an image each row of the guidance is attended to.

    These are the weights `softmax(z (G W_k)^T / sqrt(r / h))` of [`SageLayer`], averaged over its heads, for the
    tokens that stand for places in the image. They say what the adapter reads, not why the model decides. `row_names`
    of the adapter's configuration has the classes that each row stands for.

    Args:
        model: A model with a Sage adapter, wrapped or not. It is run as it is: call `model.eval()` first.
        pixel_values: Images (B, C, H, W) from the model's image processor.
        layer: The adapted block, in depth order; negative from the end.
        adapter_name: The adapter. Default: the active one.

    Returns:
        Weights (B, M, h, w) on the grid of patches, float32. They sum to 1 over M: 1 / M everywhere means that the
        adapter looks at nothing in particular.

    Raises:
        ValueError: There is no such adapter with guidance or no such layer, or its tokens do not form a grid.
    """
    layers = [module for module in model.modules() if isinstance(module, SageLayer)]
    active = [name for module in layers for name in module.active_adapters]
    name = adapter_name or next(iter(active), "default")
    layers = [module for module in layers if name in module.shared_guidance]
    if not layers:
        raise ValueError(
            f"`adapter_name` must be a Sage adapter with guidance in `model`, got {name!r}."
        )
    if not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"`layer` must lie in [{-len(layers)}, {len(layers)}), got {layer}."
        )
    block = layers[layer]
    tokens: list[Tensor] = []

    def keep_tokens(_: nn.Module, args: Any, kwargs: Any) -> None:
        tokens.append(block.tokens(args, kwargs))

    handle = block.register_forward_pre_hook(keep_tokens, with_kwargs=True)
    try:
        encode_image(model, pixel_values)
    finally:
        handle.remove()
    weights = attention_weights(block, tokens[0], name).mean(dim=0).float()
    return _on_grid(weights, pixel_values, _patch_size(model)).permute(0, 3, 1, 2)


def attention_weights(layer: SageLayer, x: Tensor, adapter_name: str) -> Tensor:
    """Return the softmax (h, ..., M) of the layer's equation for its input (..., d), for each head."""
    z = layer.queries(x, adapter_name)
    keys = layer.peft_sage_key[adapter_name](
        layer.shared_guidance[adapter_name].like(z)
    )
    q = layer.split_heads(z, adapter_name)
    k = layer.split_heads(keys, adapter_name)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return weights[0].reshape(-1, *x.shape[:-1], len(keys))


def plot_attention(
    image: Any,
    attention: Tensor,
    class_names: Sequence[str] | None = None,
    top: int = 4,
) -> Any:
    """Lay attention maps over the image.

    Args:
        image: The image: a PIL image or an array (H, W) or (H, W, 3), in the crop that the model saw.
        attention: Maps (M, h, w) of this image, from [`attention_maps`].
        class_names: Names of the M rows: `row_names` of the adapter's configuration.
        top: How many maps to show: those that reach the highest weight.

    Returns:
        A matplotlib `Figure`: the image, and the image under each map, coloured from its least to its greatest weight.
    """
    from matplotlib.figure import Figure

    if attention.ndim != 3:
        raise ValueError(
            f"`attention` must have the shape (M, h, w) of one image, got {tuple(attention.shape)}."
        )
    names = class_names
    if names is None:
        names = [f"class {index}" for index in range(len(attention))]
    if len(names) != len(attention):
        raise ValueError(
            f"`class_names` must have {len(attention)} entries, got {len(names)}."
        )
    check_integer("top", top, 1)
    shown = attention.flatten(1).amax(dim=1).argsort(descending=True)[:top].tolist()
    figure = Figure(figsize=(2.4 * (1 + len(shown)), 2.9), layout="constrained")
    axes = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    size = (image.height, image.width) if hasattr(image, "height") else image.shape[:2]
    for axis, row in zip(axes, [None, *shown], strict=True):
        axis.imshow(image, cmap="gray")
        axis.set_axis_off()
        title = "image"
        if row is not None:
            overlay = F.interpolate(
                attention[row][None, None].float().cpu(), size, mode="bilinear"
            )[0, 0]
            axis.imshow(overlay, cmap="inferno", alpha=0.6)
            title = f"{names[row]}\n{attention[row].min():.3f} to {attention[row].max():.3f}"
        axis.set_title(title, fontsize=9, parse_math=False)
    return figure


def _on_grid(weights: Tensor, pixel_values: Tensor, patch_size: int | None) -> Tensor:
    """Bring weights (.., M) of the tokens of a batch into the shape (B, h, w, M)."""
    batch, shape = len(pixel_values), tuple(weights.shape[:-1])
    if len(shape) == 3 and shape[0] == batch:
        return weights  # hierarchical towers with channels last
    if len(shape) != 2 or batch not in shape:
        raise ValueError(
            f"`layer` must have tokens that form one grid per image, got {shape} for {batch} images."
        )
    if shape[0] != batch:
        weights = weights.transpose(0, 1)  # sequence first
    # Deeper stages of a hierarchical tower have larger patches than its configuration says.
    height, width = pixel_values.shape[-2:]
    sizes = filter(None, (patch_size, *range(1, max(height, width) + 1)))
    grids = ((height // size, width // size) for size in sizes)
    rows, columns = next(
        grid for grid in grids if grid[0] * grid[1] <= weights.shape[1]
    )
    # Class token and registers come first.
    return weights[:, weights.shape[1] - rows * columns :].unflatten(1, (rows, columns))


def _patch_size(model: nn.Module) -> int | None:
    configs = (getattr(module, "config", None) for module in model.modules())
    sizes = (
        getattr(getattr(config, "vision_config", config), "patch_size", None)
        for config in configs
    )
    return next((size for size in sizes if isinstance(size, int)), None)
