# SPDX-License-Identifier: Apache-2.0
"""The model card of an adapter: how to load it, its classes and its results."""

from __future__ import annotations

import os
from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from .classifier import CosineHead, ZeroShotClassifier
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
{results}{classes}"""

LISTED_CLASSES = 100


def create_model_card(
    model: PeftModel,
    results: Mapping[str, float] | None = None,
    repo_id: str = "user/name",
    adapter_name: str = "default",
) -> ModelCard:
    """Describe a trained adapter.

    Save it with `card.save("folder/README.md")`, or upload it with `card.push_to_hub("user/name")`. Do the latter
    after the first `model.push_to_hub("user/name")`, which puts a generic card there; later ones keep this card.

    Args:
        model: The model with the adapter.
        results: Figures to put into a table, such as the many / medium / few accuracies of [`LongTailAccuracy`].
        repo_id: Where the adapter will be found, for the loading snippet.
        adapter_name: The adapter's name.

    Returns:
        The card.

    Raises:
        ValueError: If there is no such Sage adapter.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, SageConfig):
        raise ValueError(f"`adapter_name` must be one of {list(model.peft_config)}, got {adapter_name!r}.")
    base = model.get_base_model()
    head = next((module for module in base.modules() if isinstance(module, CosineHead)), None)
    base_model = config.base_model_name_or_path or getattr(base, "name_or_path", None)
    return _card(config, base_model, type(base).__name__, head.out_features if head else None, results, repo_id)


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
    _card(config, config.base_model_name_or_path, base_model_class, None, None, "user/name").save(path)


def _card(
    config: SageConfig,
    base_model: str | None,
    base_model_class: str,
    head_classes: int | None,
    results: Mapping[str, float] | None,
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
        results=_results(results),
        classes=_classes(config),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _snippet(base_model: str | None, base_model_class: str, head_classes: int | None, repo_id: str) -> str:
    classifier = base_model_class == ZeroShotClassifier.__name__
    auto_class = "AutoModel" if classifier else base_model_class
    lines = [
        "import peft_sage",
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f'base_model = {auto_class}.from_pretrained("{base_model or "path/of/the/base-model"}")',
    ]
    if classifier:
        lines.append(f"base_model = peft_sage.ZeroShotClassifier(base_model, {head_classes or 'num_classes'})")
    return "\n".join([*lines, f'model = PeftModel.from_pretrained(base_model, "{repo_id}")'])


def _results(results: Mapping[str, float] | None) -> str:
    if not results:
        return ""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in results.items())
    return f"\n## Results\n\n| metric | value |\n|---|---|\n{rows}\n"


def _classes(config: SageConfig) -> str:
    if not config.class_names:
        return f"\n## Classes\n\n{config.num_classes} classes.\n" if config.num_classes else ""
    listed = ", ".join(f"`{name}`" for name in config.class_names[:LISTED_CLASSES])
    more = len(config.class_names) - LISTED_CLASSES
    return f"\n## Classes\n\n{listed}{f' and {more} more' if more > 0 else ''}\n"
