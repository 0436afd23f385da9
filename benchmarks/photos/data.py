# SPDX-License-Identifier: Apache-2.0
"""The long-tailed training set of a run."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_sage import TextPrior, choose_text_prior

from .bed import Task, load_task, long_tailed
from .blocks import run_frozen


LARGEST = {"A": 450, "B": 200, "tiny": 90}  # Images of a task's largest class.
SPLITS = ("train", "validation", "test")
RAREST = 40  # Classes that those without images are drawn from.


@dataclass(frozen=True, eq=False)
class Data:
    """A training set of a task, and what the frozen tower makes of it."""

    work: Path
    name: str
    shape: str
    task: Task
    images: Tensor  # (n,) indices in the task's training pool
    labels: Tensor  # (n,)
    embeds: Tensor  # (n, views, e): the frozen tower's embeddings, of unit length.
    counts: Tensor  # (K,)

    @functools.cached_property
    def text_prior(self) -> TextPrior:
        """How far the texts are to be trusted."""
        return choose_text_prior(self.embeds[:, 0], self.labels, self.task.text_embeds)


@functools.lru_cache(maxsize=1)
def load_data(
    work: Path,
    name: str,
    shape: str,
    ratio: int,
    seed: int,
    without_images: int,
) -> Data:
    """The training set of a seed, in which some of the rarest classes have no images."""
    task = load_task(work, name, shape)
    images = long_tailed(task.train.labels, ratio, seed, LARGEST[name])
    counts = torch.bincount(task.train.labels[images])
    rarest = counts.argsort(stable=True)[:RAREST].numpy()
    absent = np.random.default_rng(seed).choice(rarest, without_images, replace=False)
    images = images[~np.isin(task.train.labels[images], absent)]
    labels = task.train.labels[images]
    embeds = task.train.embeds[images]
    counts = torch.bincount(labels, minlength=len(task.class_names))
    embeds = F.normalize(embeds, dim=-1)
    return Data(work, name, shape, task, images, labels, embeds, counts)


@functools.lru_cache(maxsize=3)
def tower_inputs(
    data: Data,
    blocks: float,
    remembering: bool,
) -> dict[str, Tensor]:
    """Inputs of the last blocks: (n, views, t, d) of the training images, (n, t, d) of the others."""
    task = data.task
    depth = int(data.shape.split("x")[0])
    run = functools.partial(
        run_frozen, data.work, data.name, data.shape, round(depth * blocks)
    )
    train = torch.tensor(task.train.tokens[data.images.numpy()])
    inputs = {
        "train": run(train.flatten(0, 1), remembering).unflatten(0, train.shape[:2])
    }
    for split in SPLITS[1:]:
        tokens = torch.tensor(getattr(task, split).tokens[:, 0])
        inputs[split] = run(tokens, remembering)
    return inputs
