# SPDX-License-Identifier: Apache-2.0
"""What the photograph test bed compares: heads, adapters and their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_sage import (
    CosineHead,
    LongTailAccuracy,
    SageClassifier,
    SageConfig,
    SageLoss,
    fit_head,
)
from peft_sage.patch_dropout import drop_patches

from .bed import Split
from .blocks import autocast, in_batches, load_fast_tower
from .data import SPLITS, Data, tower_inputs


HEAD_STEPS, HEAD_BATCH_SIZE = 600, 256
SCALE = 25.0  # Of the cosines of every trained head.
SCORES = ("overall", "macro", "many", "medium", "few", "none")


@dataclass(frozen=True)
class Settings:
    """What a run does. A line of results that lacks a setting was run with the default that stands here."""

    #: zero-shot, head, adapter, lora, block, clap, tip-adapter or gda
    method: str = "adapter"
    #: Learning rates of the tower and of the head.
    rates: tuple[float, float] = (0.002, 0.005)
    tau: float = 1.0
    compensation: float = 1.0
    #: Of the compensation: features, logits or detached.
    form: str = "features"
    #: A strength, or chosen by `choose_text_prior`.
    text_prior: float | str = "chosen"
    #: As a share of the text prior.
    text_guidance: float = 0.4
    #: Of the guidance: the distribution over texts or over random rows, or the cosine.
    target: str = "texts"
    #: That the target is taken from: plain, or the same that the tower sees.
    view: str = "plain"
    #: That the adapter attends to: texts, rotated, random or none.
    rows: str = "texts"
    #: Share of the tower's blocks, the last ones, that are adapted.
    blocks: float = 0.5
    r: int = 16
    #: Share of the patches that a step leaves out.
    patch_dropout: float = 0.0
    epochs: int = 10
    batch_size: int = 128
    #: Of the head: texts, or trained on the frozen embeddings.
    start: str = "texts"
    #: How many of the 40 rarest classes lose their images.
    without_images: int = 0
    #: Count of such a class in the loss, "left out" or "chosen".
    absent: float | str = 1.0


def batches(
    images: int, views: int, size: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of images, epoch by epoch, and of a random view of each; the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        view = torch.randint(views, (images,), generator=generator)
        for batch in torch.randperm(images, generator=generator).split(size):
            if not steps:
                return
            yield batch, view[batch]
            steps -= 1


def adapt(
    settings: Settings, classifier: SageClassifier, texts: Tensor, seed: int
) -> nn.Module:
    """The classifier with what its method trains."""
    torch.manual_seed(seed)
    if settings.method == "adapter":
        rows = guidance_rows(settings.rows, texts, seed)
        # Without rows of its own, a classifier's adapter would attend to its texts.
        limit = 0 if rows is None else len(rows)
        config = SageConfig(r=settings.r, guidance=rows, guidance_rows=limit)
        return get_peft_model(classifier, config)
    if settings.method == "lora":
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.r,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["class_head"],
        )
        return get_peft_model(classifier, config)
    last = classifier.model.vision_model.encoder.layers[-1]
    classifier.requires_grad_(False)
    for module in (last, classifier.class_head):
        module.requires_grad_(True)
    return classifier


def guidance_rows(kind: str, texts: Tensor, seed: int) -> Tensor | None:
    """The texts, the texts rotated at random, as many random rows, or none."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return F.normalize(torch.randn(texts.shape, generator=generator), dim=-1)
    if kind == "rotated":
        width = texts.shape[1]
        return texts @ torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return {"texts": texts, "none": None}[kind]


class Objective:
    """The loss of a run, with the controls that `SageLoss` does not offer."""

    def __init__(self, settings: Settings, data: Data, seed: int) -> None:
        self.settings = settings
        self.prior = prior_strength(settings, data)
        self.strength = settings.text_guidance * self.prior
        self.rows = guidance_rows("random", data.task.text_embeds, seed)
        self.loss = SageLoss(
            data.counts,
            absent=absent_count(settings.absent, data),
            tau=settings.tau,
            compensation=settings.compensation,
            text_prior=self.prior,
            text_guidance=self.strength if settings.target == "texts" else 0,
        )

    def __call__(self, outputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """The loss of a batch."""
        total = self.loss(reformed(outputs, self.settings.form), labels)
        if self.settings.target == "texts" or not self.strength:
            return total
        rows = self.rows if self.settings.target == "random" else None
        return total + self.strength * departure(outputs, rows)


def reformed(outputs: Mapping[str, Any], form: str) -> Mapping[str, Any]:
    """What the loss is given for a form of the compensation."""
    if form == "logits":
        return {
            name: value for name, value in outputs.items() if name != "image_embeds"
        }
    if form == "detached":
        return {**outputs, "class_embeds": outputs["class_embeds"].detach()}
    return outputs


def departure(outputs: Mapping[str, Any], rows: Tensor | None) -> Tensor:
    """How far embeddings are from the frozen tower's: divergence over rows, without rows one minus the cosine."""
    adapted = outputs["image_embeds"]
    frozen = outputs["base_image_embeds"]
    if rows is None:
        return (1 - F.cosine_similarity(adapted, frozen)).mean()
    seen, target = (
        F.log_softmax(outputs["logit_scale"] * view @ rows.T, dim=-1)
        for view in (adapted, frozen)
    )
    return F.kl_div(seen, target, reduction="batchmean", log_target=True)


def prior_strength(settings: Settings, data: Data) -> float:
    """The strength of the text prior; with another `absent` than the chosen one, as if no class lacked images."""
    if settings.text_prior != "chosen":
        return float(settings.text_prior)
    prior = data.text_prior
    if settings.absent == "chosen":
        return prior.strength
    return max(prior.scores, key=prior.scores.__getitem__)


def absent_count(absent: float | str, data: Data) -> float | None:
    """The count that the loss gives to classes without images."""
    if absent == "chosen":
        return data.text_prior.absent
    return None if absent == "left out" else float(absent)


def fit(optimizer: torch.optim.Optimizer, losses: Iterator[Tensor], steps: int) -> None:
    """Minimise losses; the learning rate falls to zero along a cosine."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def train_tower(settings: Settings, data: Data, seed: int) -> dict[str, Any]:
    """Train adapters, or whatever the method trains in the tower, and a head; return logits.

    For adapters there are also the logits with half of their output and without it.
    """
    inputs = tower_inputs(data, settings.blocks, remembers_first_block(settings))
    model = make_model(settings, data, seed)
    objective = Objective(settings, data, seed)
    trained = [
        (name, weight)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]
    groups = [
        {
            "params": [w for name, w in trained if ("class_head" in name) == head],
            "lr": lr,
        }
        for head, lr in enumerate(settings.rates)
    ]
    steps = settings.epochs * math.ceil(len(data.labels) / settings.batch_size)

    def losses() -> Iterator[Tensor]:
        size = settings.batch_size
        for images, views in batches(*data.embeds.shape[:2], size, steps, seed):
            base = data.embeds[images, views if settings.view == "same" else 0]
            tokens = inputs["train"][images, views].float()
            if settings.patch_dropout:
                tokens = drop_patches(tokens, settings.patch_dropout)
            outputs = model(tokens, base_image_embeds=base)
            yield objective(outputs, data.labels[images])

    fit(torch.optim.AdamW(groups, weight_decay=0), losses(), steps)
    model.eval()

    def logits() -> dict[str, Tensor]:
        return {
            split: in_batches(lambda part: model(part).logits, inputs[split])
            for split in SPLITS[1:]
        }

    answers = logits()
    if settings.method == "adapter":
        scale_adapters(model, 0.5)
        answers["half"] = logits()
        head = model.get_submodule("base_model.model").class_head
        with torch.no_grad():
            answers["off"] = each_split(data, head)
    return answers


def remembers_first_block(settings: Settings) -> bool:
    """Whether the frozen part of the first block is the same in every step."""
    return settings.method == "adapter" and not settings.patch_dropout


def make_model(settings: Settings, data: Data, seed: int) -> nn.Module:
    """The upper blocks of the task's tower with a head, and what the method adds."""
    texts = data.task.text_embeds
    depth = int(data.shape.split("x")[0])
    tower = load_fast_tower(
        data.work,
        data.name,
        data.shape,
        round(depth * settings.blocks),
        remembering=remembers_first_block(settings),
    )
    # The head stays in float32.
    tower.forward = autocast()(tower.forward)
    classifier = SageClassifier(tower, texts, scale=SCALE)
    if settings.start == "trained":
        loss = Objective(settings, data, seed).loss
        rows = fit_head(data.embeds[:, 0], data.labels, texts, loss)
        classifier.class_head.weight.data.copy_(rows)
    return adapt(settings, classifier, texts, seed).train()


def scale_adapters(model: nn.Module, factor: float) -> None:
    """Scale the output of all adapters."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "peft_sage_up" in name:
                weight.mul_(factor)


def train_head(settings: Settings, data: Data, seed: int) -> dict[str, Tensor]:
    """Train a head on frozen embeddings; return logits."""
    head, objective = (
        CosineHead(data.task.text_embeds, SCALE),
        Objective(settings, data, seed),
    )

    def losses() -> Iterator[Tensor]:
        for images, views in batches(
            *data.embeds.shape[:2], HEAD_BATCH_SIZE, HEAD_STEPS, seed
        ):
            features = data.embeds[images, views]
            logits, _, class_embeds = head(features, return_embeds=True)
            outputs = {
                "logits": logits,
                "image_embeds": features,
                "class_embeds": class_embeds,
                "text_embeds": head.text_embeds,
                "base_image_embeds": features,
                "logit_scale": SCALE,
            }
            yield objective(outputs, data.labels[images])

    fit(
        torch.optim.AdamW(head.parameters(), lr=settings.rates[1], weight_decay=0),
        losses(),
        HEAD_STEPS,
    )
    with torch.no_grad():
        return each_split(data, head)


def each_split(data: Data, logits: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A function of the frozen embeddings, of unit length, of the validation and of the test split."""
    return {
        split: logits(F.normalize(getattr(data.task, split).embeds[:, 0], dim=-1))
        for split in SPLITS[1:]
    }


def accuracies(logits: Tensor, split: Split, counts: Tensor) -> dict[str, float]:
    """Accuracies in per cent."""
    metric = LongTailAccuracy(counts)
    metric.update(logits, split.labels)
    return {
        name: round(100 * float(value), 3)
        for name, value in metric.compute().items()
        if name in SCORES
    }
