# SPDX-License-Identifier: Apache-2.0
"""The tasks of the photograph test bed: images as the tokens that a tower's blocks are given, texts as embeddings."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .bed import TASKS, load_tower
from .captions import Encoder, class_captions
from .hardware import device, has_fast_bfloat16


BATCH = 200

# Splits of the images that each split of a task has. In A the model has seen none of CIFAR-100, in B one half.
CIFAR100 = {
    "train": ["cifar100-pool"],
    "validation": ["cifar100-validation"],
    "test": ["cifar100-test"],
}
SPLITS = {
    "A": {**CIFAR100, "train": ["cifar100-pretrain", "cifar100-pool"]},
    "B": CIFAR100,
    "tiny": {
        "train": ["tiny-pool"],
        "validation": ["tiny-validation"],
        "test": ["tiny-test"],
    },
}


def read_chunks(
    work: Path,
    split: str,
    kind: str,
) -> Tensor:
    """The stem's "maps" (n, views, 320, 3, 3) of a split, or its best "guesses" (n, 5) at ImageNet classes."""
    arrays = [
        np.load(path)[kind] for path in sorted((work / "stem" / split).glob("*.npz"))
    ]
    return torch.from_numpy(np.concatenate(arrays))


def read_labels(work: Path, split: str) -> Tensor:
    """The labels of a split."""
    with np.load(work / "splits.npz") as arrays:
        return torch.from_numpy(arrays[f"{split}.labels"])


@torch.inference_mode()
def write_images(
    work: Path,
    folder: Path,
    name: str,
    shape: str,
    split: str,
) -> None:
    """Write the tokens, labels and embeddings of one split of a task."""
    tower, texts = load_tower(work, f"{TASKS[name]}-{shape}")
    vision = tower.to(device()).vision_model
    mean, std = (texts[key].view(-1, 1, 1) for key in ("mean", "std"))
    parts = SPLITS[name][split]
    maps = torch.cat([read_chunks(work, part, "maps") for part in parts])
    tokens = []
    embeds = []
    for part in maps.split(BATCH):
        pixels = (part.flatten(0, 1).float() - mean) / std
        hidden = vision.pre_layrnorm(vision.embeddings(pixels.to(device())))
        tokens.append(hidden.half().cpu().unflatten(0, part.shape[:2]))
        with torch.autocast(device().type, torch.bfloat16, enabled=has_fast_bfloat16()):
            for block in vision.encoder.layers:
                hidden = block(hidden, None)
        final = tower.visual_projection(vision.post_layernorm(hidden[:, 0].float()))
        embeds.append(final.cpu().unflatten(0, part.shape[:2]))
    labels = torch.cat([read_labels(work, part) for part in parts])
    arrays = {
        "tokens": torch.cat(tokens),
        "embeds": torch.cat(embeds),
        "labels": labels,
    }
    for kind, array in arrays.items():
        np.save(folder / f"{split}_{kind}.npy", array.numpy())


def write_texts(
    data: Path,
    work: Path,
    folder: Path,
    name: str,
    shape: str,
    encoder: Encoder,
) -> None:
    """Write a task's class names and the embeddings of its texts."""
    _, text_map = load_tower(work, f"{TASKS[name]}-{shape}")
    weight = text_map["weight"]
    bias = text_map["bias"]

    def embed(captions: list[str]) -> Tensor:
        return F.normalize(F.linear(encoder(captions), weight, bias), dim=-1)

    names, captions, descriptions = class_captions(data, name)
    classes = F.normalize(
        torch.stack([embed(texts).mean(0) for texts in captions]), dim=-1
    )
    np.savez(
        folder / "texts.npz",
        text_embeds=classes.numpy(),
        # No run reads them, but encoding them here keeps B's captions, and so its tower, the same bit for bit.
        description_embeds=torch.stack(
            [embed(texts) for texts in descriptions]
        ).numpy(),
        logit_scale=text_map["log_scale"].exp().numpy(),
    )
    (folder / "class_names.json").write_text(json.dumps(names))


def write_task(
    data: Path,
    work: Path,
    name: str,
    shape: str,
    encoder: Encoder,
) -> None:
    """Write all that the runs of a task read."""
    folder = work / "tasks" / f"{name}-{shape}"
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS[name]:
        write_images(work, folder, name, shape, split)
    write_texts(data, work, folder, name, shape, encoder)
