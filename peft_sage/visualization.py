# SPDX-License-Identifier: Apache-2.0
"""Pictures of what an adapter attends to and of how a long tail fares.

The plots need matplotlib (`pip install peft_sage[examples]`). They return a `matplotlib.figure.Figure`, which belongs
to no window: `figure.savefig("attention.png")` works on a machine without a display as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from . import towers
from .layer import SageLayer
from .validation import check_class_counts


if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = ("many", "medium", "few")
NAMED_CLASSES = 40


@torch.no_grad()
def attention_maps(
    model: nn.Module, pixel_values: torch.Tensor, layer: int = -1, adapter_name: str | None = None
) -> torch.Tensor:
    """Return where in an image each row of the guidance is attended to.

    These are the weights `softmax(z (G W_k)^T / sqrt(r / h))` of the adapter itself, averaged over its heads, for the
    tokens that stand for places in the image. They say what the adapter reads, not why the model decides.

    Args:
        model: A model with a Sage adapter, wrapped or not. It is run as it is: call `model.eval()` first.
        pixel_values: Images (B, C, H, W) from the model's image processor.
        layer: The adapted block, in depth order; negative from the end.
        adapter_name: The adapter. Default: the active one.

    Returns:
        Weights (B, M, h, w) on the grid of patches, float32. They sum to 1 over M: 1 / M everywhere means that the
        adapter looks at nothing in particular.

    Raises:
        ValueError: If the model has no adapter of that name with guidance, `layer` is out of range, or the block's
            tokens do not form a grid.

    Reference: arXiv 2507.12807 for attention to class descriptions; the equation is ours, see [`SageLayer`].
    """
    layers = [module for module in model.modules() if isinstance(module, SageLayer)]
    name = adapter_name or next((name for module in layers for name in module.active_adapters), "default")
    layers = [module for module in layers if module.guidance(name) is not None]
    if not layers:
        raise ValueError(f"`adapter_name`={name!r} is no Sage adapter with guidance in `model`.")
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"`layer` must lie in [{-len(layers)}, {len(layers)}), got {layer}.")
    inputs: list[torch.Tensor] = []
    block = layers[layer]
    handle = block.register_forward_pre_hook(lambda module, args: inputs.append(args[module.input_index]))
    try:
        towers.encode_image(model, pixel_values)
    finally:
        handle.remove()
    weights = block.attention_weights(inputs[0], name).mean(dim=0).float()
    return _on_grid(weights, pixel_values, _patch_size(model)).permute(0, 3, 1, 2)


def plot_attention(
    image: Any, attention: torch.Tensor, class_names: Sequence[str] | None = None, top: int = 4
) -> Figure:
    """Lay attention maps over the image.

    Args:
        image: The image: a PIL image or an array (H, W) or (H, W, 3), in the crop that the model saw.
        attention: Maps (M, h, w) of this image, from [`attention_maps`].
        class_names: Names of the M rows.
        top: How many maps to show: those that reach the highest weight.

    Returns:
        The image, and the image under each map. A map's colours go from its least to its greatest weight, which its
        title names.

    Raises:
        ValueError: If a shape is wrong, or `top` is not positive.
    """
    from matplotlib.figure import Figure

    if attention.ndim != 3:
        raise ValueError(f"`attention` must have the shape (M, h, w) of one image, got {tuple(attention.shape)}.")
    names = _names(class_names, len(attention))
    if top < 1:
        raise ValueError(f"`top` must be positive, got {top}.")
    shown = attention.flatten(1).amax(dim=1).argsort(descending=True)[:top].tolist()
    figure = Figure(figsize=(2.4 * (1 + len(shown)), 2.9), layout="constrained")
    axes = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    size = (image.height, image.width) if hasattr(image, "height") else image.shape[:2]
    for axis, row in zip(axes, [None, *shown], strict=True):
        axis.imshow(image, cmap="gray")
        axis.set_axis_off()
        if row is None:
            axis.set_title("image", fontsize=9)
            continue
        overlay = F.interpolate(attention[row][None, None].float().cpu(), size, mode="bilinear")[0, 0]
        axis.imshow(overlay, cmap="inferno", alpha=0.6)
        low, high = attention[row].min().item(), attention[row].max().item()
        axis.set_title(f"{names[row]}\n{low:.3f} to {high:.3f}", fontsize=9, parse_math=False)
    return figure


def plot_long_tail(
    results: Mapping[str, Mapping[str, Any]],
    class_counts: Sequence[int] | torch.Tensor,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Show class frequencies with the accuracy of each class, and the accuracies of the groups, for several runs.

    Args:
        results: From the name of a run to its `many`, `medium`, `few` and `per_class` (K,), as [`LongTailAccuracy`]
            returns them (fractions) or `examples/finetune.py` writes them (percent); all in the same unit. `None` or
            NaN for a group or class without images.
        class_counts: (K,) numbers of training images.
        class_names: Names of the K classes, written below the axis where there are no more than 40.

    Returns:
        On the left the classes, ordered by their number of training images (bars), with a line of accuracy a run; on
        the right bars for the groups.

    Raises:
        ValueError: If there is no run, or one of them, or `class_names`, has another number of classes.
    """
    from matplotlib.figure import Figure

    counts = check_class_counts(class_counts)
    if not results:
        raise ValueError("`results` is empty; give at least one run.")
    per_class = {run: _numbers(scores["per_class"]) for run, scores in results.items()}
    for run, accuracy in per_class.items():
        if len(accuracy) != len(counts):
            raise ValueError(f"`results` of {run!r} must have {len(counts)} classes, got {len(accuracy)}.")
    names = _names(class_names, len(counts))
    order = counts.argsort(descending=True, stable=True)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    classes, groups = figure.subplots(1, 2, width_ratios=[2, 1])
    classes.bar(range(len(counts)), counts[order], width=1.0, color="0.85")
    classes.set(yscale="log", xlabel="classes, most frequent first", ylabel="training images")
    if class_names is not None and len(counts) <= NAMED_CLASSES:
        named = [names[k] for k in order.tolist()]
        classes.set_xticks(
            range(len(counts)), named, rotation=45, ha="right", rotation_mode="anchor", parse_math=False, fontsize=8
        )
    accuracies = classes.twinx()
    accuracies.set_ylabel("test accuracy")
    width = 0.8 / len(results)
    for number, (run, scores) in enumerate(results.items()):
        accuracies.plot(per_class[run][order], ".", alpha=0.35, color=f"C{number}")
        accuracies.plot(_moving_mean(per_class[run][order]), color=f"C{number}", label=run)
        places = [place + (number - (len(results) - 1) / 2) * width for place in range(len(GROUPS))]
        bars = groups.bar(places, _numbers([scores[group] for group in GROUPS]), width, color=f"C{number}", label=run)
        groups.bar_label(bars, fmt="%.3g", fontsize=8)
    accuracies.set_ylim(bottom=0)
    groups.set_xticks(range(len(GROUPS)), GROUPS)
    groups.set(xlabel="classes by number of training images", ylabel="test accuracy")
    groups.margins(y=0.1)
    figure.legend(*groups.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    return figure


def _on_grid(weights: torch.Tensor, pixel_values: torch.Tensor, patch_size: int | None) -> torch.Tensor:
    """Bring weights (.., M) of the tokens of a batch into the shape (B, h, w, M)."""
    batch, height, width = len(pixel_values), *pixel_values.shape[-2:]
    if weights.ndim == 4 and len(weights) == batch:  # hierarchical towers with channels last
        return weights
    if weights.ndim == 3 and len(weights) != batch and weights.shape[1] == batch:  # sequence first
        weights = weights.transpose(0, 1)
    if weights.ndim != 3 or len(weights) != batch:
        raise ValueError(
            f"`layer` is a block whose tokens do not form one grid an image, but come as {tuple(weights.shape[:-1])} "
            f"for {batch} images."
        )
    # Deeper stages of a hierarchical tower have larger patches than its configuration says.
    sizes = [*([patch_size] if patch_size else []), *range(1, max(height, width) + 1)]
    grids = ((height // size, width // size) for size in sizes)
    rows, columns = next(grid for grid in grids if grid[0] * grid[1] <= weights.shape[1])
    # Class token and registers come first.
    return weights[:, weights.shape[1] - rows * columns :].unflatten(1, (rows, columns))


def _patch_size(model: nn.Module) -> int | None:
    configs = (getattr(module, "config", None) for module in model.modules())
    sizes = (getattr(getattr(config, "vision_config", config), "patch_size", None) for config in configs)
    return next((size for size in sizes if isinstance(size, int)), None)


def _names(class_names: Sequence[str] | None, count: int) -> Sequence[str]:
    names = [f"class {index}" for index in range(count)] if class_names is None else class_names
    if len(names) != count:
        raise ValueError(f"`class_names` must have {count} entries, got {len(names)}.")
    return names


def _numbers(values: Sequence[float | None] | torch.Tensor) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach().double().cpu()
    return torch.tensor([float("nan") if value is None else float(value) for value in values], dtype=torch.float64)


def _moving_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over a tenth of the classes around each, without the missing ones."""
    window = max(1, len(values) // 10)
    near = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    return torch.stack([part.nanmean() for part in near])
