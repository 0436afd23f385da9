# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind for people: pictures and a model card beside the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from image_data import PixelDataset, PixelTransform
from matplotlib.figure import Figure
from peft import PeftModel

from peft_sage import (
    SageClassifier,
    SageConfig,
    attention_maps,
    plot_attention,
    read_class_descriptions,
)


GROUPS = ("many", "medium", "few")
NAMED_CLASSES = 40

CARD = """
# Sage adapter for {base_model}

A semantic-guided adapter in the vision tower of `{base_model}`, made with `peft_sage`.

## How to load it

```python
{snippet}
```
{results}{pictures}{worst}{settings}{classes}"""

LISTED_CLASSES = 100
WORST_CLASSES = 10


def write_report(
    folder: Path,
    model: PeftModel,
    method: str,
    results: dict[str, Any],
    test: PixelDataset,
    transform: PixelTransform,
    repo_id: str,
) -> None:
    """Write the pictures, and the model card where the adapter is one of Sage's.

    Args:
        folder: Where the adapter was saved.
        model: The trained model.
        method: Its name in tables and legends.
        results: What goes into `results.json`.
        test: Test images.
        transform: What turns them into the model's input.
        repo_id: Where the adapter will be found.
    """
    model.eval()
    transform.eval()
    counts = results["class_counts"]
    runs = {"zero-shot": results["zero_shot"], method: results["trained"]}
    pictures = {"long_tail.png": "Test accuracy, %: each class (points), running mean (lines), and the groups."}
    class_names = read_class_descriptions(results["class_names"])
    plot_long_tail(runs, counts, list(class_names)).savefig(folder / "long_tail.png")

    config = model.peft_config["default"]
    if not isinstance(config, SageConfig):
        return
    if config.guidance_shape[0]:
        rarest = int(np.argmin([count or max(counts) + 1 for count in counts]))
        index = int(np.flatnonzero(test.split.labels == rarest)[0]) if rarest in test.split.labels else 0
        pixels = test[index]["pixel_values"]
        images = transform(pixels[None].to(next(model.parameters()).device))
        name = class_names[test.split.labels[index]]
        maps = attention_maps(model, images)[0]
        figure = plot_attention(pixels.permute(1, 2, 0).numpy(), maps, config.row_names)
        figure.savefig(folder / "attention.png")
        pictures["attention.png"] = f"What the last adapter attends to in a test image of the class `{name}`."
    columns = ("overall", "macro", "many", "medium", "few", "worst")
    create_model_card(
        model,
        {run: {f"{name}, %": scores[name] for name in columns} for run, scores in runs.items()},
        repo_id,
        settings=results["settings"],
        pictures=pictures,
        per_class=results["trained"]["per_class"],
        class_counts=counts,
    ).save(folder / "README.md")


def create_model_card(
    model: PeftModel,
    results: Mapping[str, float] | Mapping[str, Mapping[str, float | None]] | None = None,
    repo_id: str = "user/name",
    adapter_name: str = "default",
    settings: Mapping[str, object] | None = None,
    pictures: Mapping[str, str] | None = None,
    per_class: Sequence[float | None] | None = None,
    class_counts: Sequence[int] | None = None,
) -> ModelCard:
    """Describe a trained adapter: how to load it, what it reaches, where it fails, how it was made.

    Save it with `card.save("folder/README.md")`, or upload it with `card.push_to_hub("user/name")`. Do the latter
    after the first `model.push_to_hub("user/name")`, which puts a generic card there; later ones keep this card.

    Args:
        model: The model with the adapter.
        results: Figures to put into a table, such as the many / medium / few accuracies of [`LongTailAccuracy`]; or
            those of several runs, by the run's name.
        repo_id: Where the adapter will be found, for the loading snippet.
        adapter_name: The adapter's name.
        settings: What it was trained with.
        pictures: From file names beside the card to captions.
        per_class: (K,) accuracies, for a table of the worst classes, in percent or, if none is above 1, fractions; NaN
            or `None` for classes that were not tested.
        class_counts: (K,) numbers of training images, for the same table.

    Returns:
        The card.

    Raises:
        ValueError: If there is no such Sage adapter, or `per_class` and `class_counts` differ in length.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, SageConfig):
        raise ValueError(f"`adapter_name` must be one of {list(model.peft_config)}, got {adapter_name!r}.")
    base = model.get_base_model()
    base_model = config.base_model_name_or_path or getattr(base, "name_or_path", None)
    report = {
        "results": _results(results),
        "pictures": _pictures(pictures),
        "worst": _worst(config, per_class, class_counts),
        "settings": _settings(settings),
    }
    return _card(config, base_model, type(base).__name__, report, repo_id)


def _card(
    config: SageConfig,
    base_model: str | None,
    base_model_class: str,
    report: Mapping[str, str],
    repo_id: str,
) -> ModelCard:
    trained_head = bool(config.modules_to_save)
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        pipeline_tag="image-classification" if trained_head else "zero-shot-image-classification",
        tags=["peft_sage", "long-tailed-recognition", *([f"base_model:adapter:{base_model}"] if base_model else [])],
    )
    text = CARD.format(
        base_model=base_model or base_model_class,
        snippet=_snippet(base_model, base_model_class, repo_id),
        classes=_classes(config),
        **{part: report.get(part, "") for part in ("results", "pictures", "worst", "settings")},
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _snippet(base_model: str | None, base_model_class: str, repo_id: str) -> str:
    if base_model_class == SageClassifier.__name__:
        model = f'model = peft_sage.SageClassifier.from_pretrained("{repo_id}")'
        return f'import peft_sage\n\n# An adapter of "{base_model}", which is loaded as well.\n{model}'
    lines = [
        "import peft_sage",
        "from peft import PeftModel",
        f"from transformers import {base_model_class}",
        "",
        # In the precision of the training, whatever that of the base model's file.
        f'base_model = {base_model_class}.from_pretrained("{base_model}", dtype="float32")',
        f'model = PeftModel.from_pretrained(base_model, "{repo_id}")',
    ]
    return "\n".join(lines)


def _results(results: Mapping[str, Any] | None) -> str:
    if not results:
        return ""
    if not isinstance(next(iter(results.values())), Mapping):
        return f"\n## Results\n\n{_table(['metric', 'value'], results.items())}"
    metrics = list(dict.fromkeys(metric for run in results.values() for metric in run))
    rows = [[name, *(run.get(metric) for metric in metrics)] for name, run in results.items()]
    return f"\n## Results\n\n{_table(['', *metrics], rows)}"


def _pictures(pictures: Mapping[str, str] | None) -> str:
    return "".join(f"\n![{caption}]({file})\n\n{caption}\n" for file, caption in (pictures or {}).items())


def _worst(config: SageConfig, per_class: Sequence[float | None] | None, class_counts: Sequence[int] | None) -> str:
    if per_class is None:
        return ""
    if class_counts is not None and len(class_counts) != len(per_class):
        raise ValueError(
            f"`class_counts` must have the {len(per_class)} entries of `per_class`, got {len(class_counts)}."
        )
    tested = [(float(a), k) for k, a in enumerate(per_class) if a is not None and not math.isnan(a)]
    names = config.class_names if config.class_names and len(config.class_names) == len(per_class) else None
    rows = [
        [names[k] if names else f"class {k}", *([class_counts[k]] if class_counts is not None else []), accuracy]
        for accuracy, k in sorted(tested)[:WORST_CLASSES]
    ]
    unit = ", %" if any(accuracy > 1 for accuracy, _ in tested) else ""
    head = ["class", *(["training images"] if class_counts is not None else []), f"accuracy{unit}"]
    return f"\n## The worst classes\n\n{_table(head, rows)}"


def _settings(settings: Mapping[str, object] | None) -> str:
    if not settings:
        return ""
    lines = "\n".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
    return f"\n## Settings\n\n```yaml\n{lines}\n```\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return str(value).replace("|", "\\|") if isinstance(value, (str, int)) else f"{value:.4g}"


def _classes(config: SageConfig) -> str:
    if not config.class_names:
        return f"\n## Classes\n\n{config.num_classes} classes.\n" if config.num_classes else ""
    listed = ", ".join(f"`{name}`" for name in config.class_names[:LISTED_CLASSES])
    more = len(config.class_names) - LISTED_CLASSES
    return f"\n## Classes\n\n{listed}{f' and {more} more' if more > 0 else ''}\n"


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
    counts = torch.as_tensor(class_counts)
    if not results:
        raise ValueError("`results` is empty; give at least one run.")
    per_class = {run: _numbers(scores["per_class"]) for run, scores in results.items()}
    for run, accuracy in per_class.items():
        if len(accuracy) != len(counts):
            raise ValueError(f"`results` of {run!r} must have {len(counts)} classes, got {len(accuracy)}.")
    names = [f"class {k}" for k in range(len(counts))] if class_names is None else class_names
    if len(names) != len(counts):
        raise ValueError(f"`class_names` must have {len(counts)} entries, got {len(names)}.")
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


def _numbers(values: Sequence[float | None] | torch.Tensor) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach().double().cpu()
    return torch.tensor([float("nan") if value is None else float(value) for value in values], dtype=torch.float64)


def _moving_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over a tenth of the classes around each, without the missing ones."""
    window = max(1, len(values) // 10)
    near = [values[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(values))]
    return torch.stack([part.nanmean() for part in near])
