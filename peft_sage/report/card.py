# SPDX-License-Identifier: Apache-2.0
"""The model card: how to load a trained model, what it reaches, where it fails, how it was made."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .results import RunResults
from .templates import render


def make_model_card(
    results: RunResults, repo_id: str, picture: str = "long_tail.png"
) -> ModelCard:
    """Describe a trained model.

    Args:
        results: The results of the run.
        repo_id: Repository or folder to load the model from.
        picture: File name of the figure of [`write_report`].
    """
    base = results.settings.get("model") or ""
    tags = ["peft_sage", "long-tailed-recognition"]
    # The Hub refuses a card whose base model is the path of a folder.
    known = None
    if base and base.count("/") < 2 and not Path(base).exists():
        known = base
        tags.append(f"base_model:adapter:{known}")
    metadata = ModelCardData(
        base_model=known,
        library_name="peft",
        pipeline_tag="image-classification",
        tags=tags,
    )
    text = render(
        "card.md.jinja",
        metadata=metadata.to_yaml(),
        base_model=Path(base).name or "A classifier",
        run=results,
        settings=yaml.safe_dump(results.shown_settings, allow_unicode=True),
        repo_id=repo_id,
        picture=picture,
    )
    return ModelCard(text)
