# SPDX-License-Identifier: Apache-2.0
"""The model card of an adapter: how to load it, its classes and its results."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from .classifier import CosineHead, SageClassifier
from .config import SageConfig


#: A line of the template that PEFT and transformers fill a new card with.
TEMPLATE_LINE = "<!-- Provide a quick summary of what the model is/does. -->"

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
    head = next((module for module in base.modules() if isinstance(module, CosineHead)), None)
    base_model = config.base_model_name_or_path or getattr(base, "name_or_path", None)
    report = {
        "results": _results(results),
        "pictures": _pictures(pictures),
        "worst": _worst(config, per_class, class_counts),
        "settings": _settings(settings),
    }
    return _card(config, base_model, type(base).__name__, head.out_features if head else None, report, repo_id)


def replace_template_card(folder: str, config: SageConfig, base_model_class: str) -> None:
    """Replace the card that PEFT has just written into a folder, unless somebody has filled it in.

    Args:
        folder: Where the adapter is saved.
        config: Its configuration.
        base_model_class: Name of the class of the base model.
    """
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        if TEMPLATE_LINE not in file.read():
            return
    card = _card(config, config.base_model_name_or_path, base_model_class, config.num_classes, {}, "user/name")
    card.save(path)


def _card(
    config: SageConfig,
    base_model: str | None,
    base_model_class: str,
    head_classes: int | None,
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
        snippet=_snippet(base_model, base_model_class, head_classes, repo_id),
        classes=_classes(config),
        **{part: report.get(part, "") for part in ("results", "pictures", "worst", "settings")},
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _snippet(base_model: str | None, base_model_class: str, head_classes: int | None, repo_id: str) -> str:
    classifier = base_model_class == SageClassifier.__name__
    auto_class = "AutoModel" if classifier else base_model_class
    lines = [
        "import peft_sage",
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        # In the precision of the training, whatever that of the base model's file.
        f'base_model = {auto_class}.from_pretrained("{base_model or "path/of/the/base-model"}", dtype="float32")',
    ]
    if classifier:
        lines.append(f"base_model = peft_sage.SageClassifier(base_model, {head_classes or 'num_classes'})")
    return "\n".join([*lines, f'model = PeftModel.from_pretrained(base_model, "{repo_id}")'])


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
