# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind for people: pictures and a model card beside the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_data import PixelDataset, PixelTransform
from peft import PeftModel
from torch.utils.data import DataLoader

from peft_sage import (
    SageConfig,
    attention_maps,
    create_model_card,
    estimate_mismatch,
    plot_attention,
    plot_long_tail,
    plot_mismatch,
    read_class_descriptions,
)
from peft_sage.towers import encode_image


def write_report(
    folder: Path,
    model: PeftModel,
    method: str,
    results: dict[str, Any],
    train: PixelDataset,
    test: PixelDataset,
    transform: PixelTransform,
    repo_id: str,
    num_workers: int = 0,
) -> None:
    """Write the pictures, and the model card where the adapter is one of Sage's.

    Args:
        folder: Where the adapter was saved.
        model: The trained model.
        method: Its name in tables and legends.
        results: What goes into `results.json`.
        train: Training images.
        test: Test images.
        transform: What turns them into the model's input.
        repo_id: Where the adapter will be found.
        num_workers: Processes that decode images which are not decoded yet.
    """
    model.eval()
    transform.eval()
    counts = results["class_counts"]
    runs = {"zero-shot": results["zero_shot"], method: results["trained"]}
    pictures = {"long_tail.png": "Test accuracy, %: each class (points), running mean (lines), and the groups."}
    class_names = read_class_descriptions(results["class_names"])
    plot_long_tail(runs, counts, list(class_names)).savefig(folder / "long_tail.png")

    features, labels, train_logits = own_class(model, train, transform, num_workers)
    _, test_labels, test_logits = own_class(model, test, transform, num_workers)
    if max(counts) > 1:
        estimated = estimate_mismatch(features, labels, len(counts), model.get_base_model().class_head.scale)
        measured = class_means(train_logits, labels, len(counts)) - class_means(test_logits, test_labels, len(counts))
        plot_mismatch(estimated, measured, counts).savefig(folder / "mismatch.png")
        pictures["mismatch.png"] = (
            "How much higher the logit of the right class is on training images than on test images, in nats: as "
            "estimated from the training images alone, and as it is. A point a class."
        )

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


@torch.inference_mode()
def own_class(
    model: PeftModel, images: PixelDataset, transform: PixelTransform, num_workers: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the images' embeddings (N, e), their labels (N,), and the logit of the right class (N,)."""
    classifier = model.get_base_model()
    device = next(model.parameters()).device
    features, labels, logits = [], [], []
    for batch in DataLoader(images, batch_size=128, num_workers=0 if images.pixels is not None else num_workers):
        embeddings = encode_image(classifier, transform(batch["pixel_values"].to(device)))
        own = classifier.class_head(embeddings).gather(1, batch["labels"].to(device)[:, None])
        features.append(embeddings.float().cpu())
        labels.append(batch["labels"])
        logits.append(own[:, 0].float().cpu())
    return torch.cat(features), torch.cat(labels), torch.cat(logits)


def class_means(values: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the mean of `values` (N,) over each class; NaN for a class that does not occur."""
    sums = torch.zeros(num_classes).index_add_(0, labels, values)
    return sums / torch.bincount(labels, minlength=num_classes)
