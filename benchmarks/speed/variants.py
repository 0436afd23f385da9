# SPDX-License-Identifier: Apache-2.0
"""The models that are compared: one frozen tower, and what is trained beside it."""

from __future__ import annotations

import copy
from functools import cache

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from settings import Settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from peft_sage import SageClassifier, SageConfig


POOLED_ROWS = 512
#: What the pooled guidance adds to the title of Sage.
POOLED = f", guidance pooled to {POOLED_ROWS} rows"
#: Method and its title. Each trains the cosine head as well; with "base" that is all.
METHODS = {
    "base": "frozen base",
    "lora": "LoRA (q, v)",
    "adaptformer": "AdaptFormer",
    "sage": "Sage",
    "pooled": f"Sage{POOLED}",
}
EMBEDDING_WIDTH = 512


def methods(num_classes: int) -> list[str]:
    """Return what is compared with so many classes; fewer than `POOLED_ROWS` need no pooling."""
    return [method for method in METHODS if method != "pooled" or num_classes > POOLED_ROWS]


@cache
def tower(settings: Settings) -> nn.Module:
    """Return the image tower with random weights; in the default sizes that of ViT-B/16 CLIP."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.blocks,
        num_attention_heads=max(1, settings.width // 64),
        patch_size=16,
        image_size=settings.image_size,
        projection_dim=EMBEDDING_WIDTH,
    )
    return CLIPVisionModelWithProjection(config).to(settings.device).requires_grad_(False)


def make(settings: Settings, method: str, num_classes: int, r: int | None = None) -> nn.Module:
    """Return a classifier of one of `METHODS`. The frozen weights are shared by all that this makes."""
    base = tower(settings)
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(num_classes, EMBEDDING_WIDTH), dim=-1)
    classifier = SageClassifier(copy.deepcopy(base, shared), embeddings)
    r = r or settings.r
    if method == "base":
        return classifier
    if method == "lora":
        targets = ["q_proj", "v_proj"]
        return get_peft_model(
            classifier, LoraConfig(r=r, lora_alpha=r, target_modules=targets, modules_to_save=["class_head"])
        )
    rows = {"sage": embeddings, "pooled": embeddings[:POOLED_ROWS]}  # which rows does not matter to the time
    guidance = {"guidance": rows[method]} if method in rows else {"guidance_rows": 0}
    return get_peft_model(classifier, SageConfig(r=r, init_weights=False, modules_to_save=["class_head"], **guidance))


def images(settings: Settings, batch_size: int | None = None) -> torch.Tensor:
    """Return random images (B, 3, H, W)."""
    torch.manual_seed(1)
    shape = (batch_size or settings.batch_size, 3, settings.image_size, settings.image_size)
    return torch.randn(shape, device=settings.device)


class TrainingStep:
    """Forward, cross-entropy, backward and AdamW on a fixed batch."""

    def __init__(self, model: nn.Module, pixel_values: torch.Tensor, num_classes: int) -> None:
        self.model = model.train()
        self.pixel_values = pixel_values
        self.labels = torch.arange(len(pixel_values), device=pixel_values.device) % num_classes
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def __call__(self, pixel_values: torch.Tensor | None = None) -> None:
        pixel_values = self.pixel_values if pixel_values is None else pixel_values
        F.cross_entropy(self.model(pixel_values=pixel_values).logits, self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Inference:
    """Forward in evaluation mode on a fixed batch."""

    def __init__(self, model: nn.Module, pixel_values: torch.Tensor, num_classes: int) -> None:
        self.model = model.eval()
        self.pixel_values = pixel_values

    @torch.inference_mode()
    def __call__(self) -> None:
        self.model(pixel_values=self.pixel_values)


#: What is timed, by the figure that it belongs to.
RUNS = {"training": TrainingStep, "inference": Inference}


@cache
def operations(settings: Settings, figure: str, method: str, num_classes: int, r: int | None = None) -> float:
    """Return the floating-point operations of the matrix products of one run.

    Counted at batches of one and two and continued to the batch size, with attention as two products whose weights are
    kept for the backward pass: fewer operations than any kernel that recomputes them.
    """
    counts = []
    for batch_size in (1, 2):
        run = RUNS[figure](make(settings, method, num_classes, r), images(settings, batch_size), num_classes)
        math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with math_only, FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    return counts[0] + (settings.batch_size - 1) * (counts[1] - counts[0])
