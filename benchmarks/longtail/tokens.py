# SPDX-License-Identifier: Apache-2.0
"""What enters the first adapted block: all before it is frozen, so it is computed once for all runs."""

from __future__ import annotations

from collections import OrderedDict

import torch
from data import Task, augment, in_scenes, on_white, premultiplied
from torch import nn
from transformers import CLIPModel


KEPT = 2  # sets of training tokens in memory; they are half a gigabyte each


def tower_of(model: nn.Module) -> CLIPModel:
    """Return the CLIP within a model."""
    return next(module for module in model.modules() if isinstance(module, CLIPModel))


def image_embeddings(clip: CLIPModel, hidden: torch.Tensor, first: int) -> torch.Tensor:
    """Run the tower from a block on.

    Args:
        clip: The model, with or without adapters from that block on.
        hidden: Tokens that enter the block (B, N, d).
        first: Index of the block; the number of blocks for none.

    Returns:
        Image embeddings, not normalised (B, e).
    """
    vision = clip.vision_model
    for block in vision.encoder.layers[first:]:
        hidden = block(hidden, None)
    return clip.visual_projection(vision.post_layernorm(hidden[:, 0]))


class Tokens:
    """Tokens of a task's images for a frozen tower.

    Args:
        clip: The frozen model.
        task: Images.
        look: How they are shown: composed into "scenes", or on white for anything else.
        views: Augmented views of each training image.
    """

    def __init__(self, clip: CLIPModel, task: Task, look: str, views: int) -> None:
        self.clip, self.task, self.look, self.views = clip, task, look, views
        self.held_out: dict[tuple[str, int], torch.Tensor] = {}
        self.training: OrderedDict[int, torch.Tensor] = OrderedDict()

    def train(self, first: int) -> torch.Tensor:
        """Return what enters block `first` for all views of the training images (views, n, N, d)."""
        if first not in self.training:
            while len(self.training) >= KEPT:
                self.training.popitem(last=False)
            generator = torch.Generator(device=self.task.splits["train"].images.device).manual_seed(0)
            made = [self._tokens("train", first, generator) for _ in range(self.views)]
            self.training[first] = torch.stack(made)
        self.training.move_to_end(first)
        return self.training[first]

    def evaluation(self, split: str, first: int) -> torch.Tensor:
        """Return what enters block `first` for the images of a held-out split (n, N, d)."""
        if (split, first) not in self.held_out:
            generator = torch.Generator(device=self.task.splits[split].images.device).manual_seed(12345)
            self.held_out[split, first] = self._tokens(split, first, generator)
        return self.held_out[split, first]

    @torch.no_grad()
    def _tokens(self, split: str, first: int, generator: torch.Generator) -> torch.Tensor:
        vision, parts = self.clip.vision_model, []
        for images in self.task.splits[split].images.split(256):
            pixels = self._render(images, split, generator)
            with torch.autocast(pixels.device.type, torch.bfloat16):
                hidden = vision.pre_layrnorm(vision.embeddings(pixels))
                for block in vision.encoder.layers[:first]:
                    hidden = block(hidden, None)
            if first == len(vision.encoder.layers):
                hidden = hidden[:, :1]  # nothing but the CLS token is read after the last block
            parts.append(hidden.bfloat16())
        return torch.cat(parts)

    def _render(self, images: torch.Tensor, split: str, generator: torch.Generator) -> torch.Tensor:
        images = premultiplied(images)
        if split == "train":
            images = augment(images, generator)
        if self.look == "scenes":
            clutter = self.task.distractors["train" if split == "train" else "test"]
            images = in_scenes(images, clutter, generator)
        else:
            images = on_white(images)
        return images * 2 - 1  # mean and standard deviation 0.5, as the checkpoint's image processor
