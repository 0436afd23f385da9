# SPDX-License-Identifier: Apache-2.0
"""What a run of the photograph test bed reads: its tasks and its towers."""

import ctypes
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection


TASKS = {"A": "A", "B": "B", "tiny": "A"}  # The regime of each task's tower.


# In bfloat16 on a CPU the gradient of torch's fused attention takes ten times as long as that of plain products.
ATTENTION = "eager"
TEXT_MAP = "text_map.npz"  # In a tower's folder.


@dataclass(frozen=True)
class Split:
    """Images of a task, as the input of its tower's first block: the plain view first, then random crops."""

    tokens: np.ndarray  # (n, views, 10, width) float16, on disk
    labels: Tensor  # (n,) int64
    embeds: Tensor  # (n, views, 192) float32, by the frozen tower, not normalised


@dataclass(frozen=True)
class Task:
    """A task's images and texts; all text embeddings have unit length."""

    train: Split  # The pool that long-tailed training sets are drawn from.
    validation: Split
    test: Split
    class_names: list[str]
    text_embeds: Tensor  # (K, 192) float32
    logit_scale: float  # At which the tower was pretrained.


def keep_memory() -> None:
    """Let glibc keep the memory that tensors leave, as asking the system for it again can take most of the time."""
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_max = -1, -4  # Names of the options in malloc.h.
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)


def load_split(folder: Path, split: str) -> Split:
    """One split of a task, whose tokens stay on disk until they are read."""
    tokens = np.load(folder / f"{split}_tokens.npy", mmap_mode="r")
    labels, embeds = (
        torch.from_numpy(np.load(folder / f"{split}_{kind}.npy"))
        for kind in ("labels", "embeds")
    )
    return Split(tokens, labels, embeds)


def load_task(work: Path, name: str, shape: str) -> Task:
    """A task of the bed, "A", "B" or "tiny", for a tower of a shape such as "12x192"."""
    folder = Path(work) / "tasks" / f"{name}-{shape}"
    splits = {
        split: load_split(folder, split) for split in ("train", "validation", "test")
    }
    with np.load(folder / "texts.npz") as texts:
        embeds = torch.from_numpy(texts["text_embeds"])
        scale = float(texts["logit_scale"])
    names = json.loads((folder / "class_names.json").read_text())
    return Task(**splits, class_names=names, text_embeds=embeds, logit_scale=scale)


def load_tower(
    work: Path, name: str
) -> tuple[CLIPVisionModelWithProjection, dict[str, Tensor]]:
    """A pretrained tower, such as "A-12x192", and its text map.

    The tower's pixels are the stem's maps (B, 320, 3, 3), less `mean`, over `std`. `weight` and `bias` map MiniLM's
    embeddings to the tower's, `log_scale` is the temperature.
    """
    folder = Path(work) / "towers" / name
    with np.load(folder / TEXT_MAP) as arrays:
        numbers = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    tower = CLIPVisionModelWithProjection.from_pretrained(
        folder, attn_implementation=ATTENTION
    )
    return tower.eval(), numbers


class Tokens(nn.Module):
    """Stands for the embeddings of a tower whose pixels are tokens already."""

    def forward(self, tokens: Tensor, **unused: object) -> Tensor:
        """The tokens."""
        return tokens


def load_upper_tower(
    work: Path, task: str, shape: str, blocks: int | None = None
) -> CLIPVisionModelWithProjection:
    """The last blocks of a task's tower, all by default: its pixels are tokens (B, 10, width)."""
    tower, _ = load_tower(work, f"{TASKS[task]}-{shape}")
    vision = tower.vision_model
    vision.embeddings = Tokens()
    vision.pre_layrnorm = nn.Identity()
    vision.encoder.layers = vision.encoder.layers[-(blocks or 0) :]
    tower.config.num_hidden_layers = len(vision.encoder.layers)
    return tower


def long_tailed(labels: Tensor, ratio: float, seed: int, largest: int) -> Tensor:
    """Images of a long-tailed training set, whose largest class has `ratio` times the images of its smallest.

    The seed chooses the order of the classes, so that another seed has another tail, and the images of each class.
    """
    generator = np.random.default_rng(seed)
    classes = generator.permutation(int(labels.max()) + 1)
    chosen = []
    for rank, label in enumerate(classes):
        size = max(int(largest * ratio ** (-rank / (len(classes) - 1))), 1)
        images = np.flatnonzero(labels.numpy() == label)
        if size > len(images):
            raise ValueError(
                f"class {label} has {len(images)} images, {size} were asked for"
            )
        chosen.append(generator.permutation(images)[:size])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))
