# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind for people: pictures and a model card beside the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from image_data import PixelDataset, PixelTransform
from peft import PeftModel

from peft_sage import (
    SageConfig,
    attention_maps,
    create_model_card,
    plot_attention,
    plot_long_tail,
    read_class_descriptions,
)


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
    if config.num_classes:
        rarest = int(np.argmin([count or max(counts) + 1 for count in counts]))
        index = int(np.flatnonzero(test.split.labels == rarest)[0]) if rarest in test.split.labels else 0
        pixels = test[index]["pixel_values"]
        images = transform(pixels[None].to(next(model.parameters()).device))
        name = class_names[test.split.labels[index]]
        rows = config.guidance_shape[0]
        groups = [f"group {row} of classes" for row in range(rows)]
        names = config.class_names if rows == config.num_classes else groups
        figure = plot_attention(pixels.permute(1, 2, 0).numpy(), attention_maps(model, images)[0], names)
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
