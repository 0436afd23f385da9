# SPDX-License-Identifier: Apache-2.0
"""What the photograph test bed compares: heads, adapters and their losses, and the data of a run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bed import Split, Task, load_task, load_upper_tower, long_tailed
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPEncoderLayer

from peft_sage import (
    CosineHead,
    LongTailAccuracy,
    SageClassifier,
    SageConfig,
    SageLoss,
    TextPrior,
    choose_text_prior,
)


LARGEST = {"A": 450, "B": 200, "tiny": 90}  # Images of a task's largest class.
EPOCHS, BATCH_SIZE, RANK = 10, 128, 16
HEAD_STEPS, HEAD_BATCH_SIZE = 600, 256
SCALE = 25.0  # Of the cosines of every trained head.
SPLITS = ("train", "validation", "test")
SCORES = ("overall", "macro", "many", "medium", "few")


@dataclass(frozen=True)
class Settings:
    """What a run does. The defaults are Sage's recipe."""

    method: str = (
        "adapter"  # zero-shot, head, adapter, lora, block, clap, tip-adapter or gda
    )
    rates: tuple[float, float] = (
        0.002,
        0.005,
    )  # Learning rates of the tower and of the head.
    tau: float = 1.0
    compensation: float = 1.0
    form: str = "features"  # Of the compensation: features, logits or detached.
    text_prior: float | str = "chosen"  # A strength, or chosen by `choose_text_prior`.
    text_guidance: float = 0.4  # As a share of the text prior.
    target: str = "texts"  # Of the guidance: the distribution over texts or over random rows, or the cosine.
    view: str = "plain"  # That the target is taken from: plain, or the same that the tower sees.
    rows: str = "texts"  # That the adapter attends to: texts, rotated, random or none.


@dataclass(frozen=True)
class Data:
    """A long-tailed training set of a task."""

    task: Task
    tokens: dict[str, Tensor]  # (n, views, 10, 192) float16 of each split,
    remembered: dict[
        str, Tensor
    ]  # and (n, views, 10, 384), what the first block's frozen parts make of them.
    labels: Tensor  # (n,)
    embeds: Tensor  # (n, views, e): the frozen tower's embeddings, of unit length.
    counts: Tensor  # (K,)

    @functools.cached_property
    def text_prior(self) -> TextPrior:
        """How far the texts are to be trusted."""
        return choose_text_prior(self.embeds[:, 0], self.labels, self.task.text_embeds)


class ClassTokenLayer(CLIPEncoderLayer):
    """The last block of a tower, computed for the class token only, as nothing else of it is read."""

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, **unused: object
    ) -> Tensor:
        """The class token (B, 1, d) of the tokens (B, t, d)."""
        attention, normed = self.self_attn, self.layer_norm1(hidden_states)
        projected = (
            attention.q_proj(normed[:, :1]),
            attention.k_proj(normed),
            attention.v_proj(normed),
        )
        heads = [
            states.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for states in projected
        ]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        hidden = hidden_states[:, :1] + attention.out_proj(attended)
        return hidden + self.mlp(self.layer_norm2(hidden))


class RememberedMLP(CLIPMLP):
    """An MLP whose output was computed before."""

    output: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """That output."""
        return self.output


class RememberedLayer(CLIPEncoderLayer):
    """A block with an adapter beside its MLP, given what its frozen parts make of the tokens, as `remember` does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.remembered = (
            RememberedMLP(config),
        )  # In a tuple, as the adapter will wrap the module.
        self.mlp = self.remembered[0]

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, **unused: object
    ) -> Tensor:
        """The block's output (B, t, d)."""
        attended, self.remembered[0].output = hidden_states.chunk(2, dim=-1)
        return attended + self.mlp(self.layer_norm2(attended))


def remember(layer: CLIPEncoderLayer, tokens: Tensor) -> Tensor:
    """The tokens (..., t, d) after a block's attention, and its MLP's output (..., t, 2 d), in float16."""

    def frozen(tokens: Tensor) -> Tensor:
        attended = tokens + layer.self_attn(layer.layer_norm1(tokens))[0]
        return torch.cat(
            [attended, layer.mlp(layer.layer_norm2(attended))], dim=-1
        ).half()

    return embed(frozen, tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


def replace(layers: nn.ModuleList, index: int, layer: CLIPEncoderLayer) -> None:
    """Put another layer, with the same weights, in the place of one."""
    layer.load_state_dict(layers[index].state_dict())
    layers[index] = layer


def load_tower(work: Path, name: str, remembering: bool = False) -> nn.Module:
    """The upper blocks of a task's tower; the first of them may be given what `remember` makes of the tokens."""
    tower = load_upper_tower(work, name)
    layers = tower.vision_model.encoder.layers
    replace(layers, -1, ClassTokenLayer(tower.config))
    if remembering:
        replace(layers, 0, RememberedLayer(tower.config))
    return tower.eval()


@functools.lru_cache(maxsize=1)
def load_data(work: Path, name: str, ratio: int, seed: int) -> Data:
    """The training set of a seed."""
    task = load_task(work, name)
    images = long_tailed(task.train.labels, ratio, seed, LARGEST[name])
    parts = task.train.tokens[images.numpy()], task.validation.tokens, task.test.tokens
    tokens = {
        split: torch.tensor(part) for split, part in zip(SPLITS, parts, strict=True)
    }
    first = load_upper_tower(work, name).vision_model.encoder.layers[0]
    remembered = {split: remember(first, part) for split, part in tokens.items()}
    tower, labels = load_tower(work, name, remembering=True), task.train.labels[images]
    embeds = embed(
        lambda pixels: tower(pixel_values=pixels).image_embeds,
        remembered["train"].flatten(0, 1),
    )
    embeds = F.normalize(embeds, dim=-1).unflatten(0, tokens["train"].shape[:2])
    counts = torch.bincount(labels, minlength=len(task.class_names))
    return Data(task, tokens, remembered, labels, embeds, counts)


@torch.inference_mode()
def embed(function: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """What a function of tokens gives, in batches."""
    return torch.cat([function(part.float()) for part in tokens.split(500)])


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
        return get_peft_model(
            classifier, SageConfig(r=RANK, guidance=rows, guidance_rows=limit)
        )
    if settings.method == "lora":
        config = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
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
        return (
            texts
            @ torch.linalg.qr(torch.randn(2 * texts.shape[1:], generator=generator)).Q
        )
    return {"texts": texts, "none": None}[kind]


class Objective:
    """The loss of a run, with the controls that `SageLoss` does not offer."""

    def __init__(self, settings: Settings, data: Data, seed: int) -> None:
        self.settings = settings
        self.prior = prior_strength(settings.text_prior, data)
        self.strength = settings.text_guidance * self.prior
        self.rows = guidance_rows("random", data.task.text_embeds, seed)
        self.loss = SageLoss(
            data.counts,
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
    adapted, frozen = outputs["image_embeds"], outputs["base_image_embeds"]
    if rows is None:
        return (1 - F.cosine_similarity(adapted, frozen)).mean()
    seen, target = (
        F.log_softmax(outputs["logit_scale"] * view @ rows.T, dim=-1)
        for view in (adapted, frozen)
    )
    return F.kl_div(seen, target, reduction="batchmean", log_target=True)


def prior_strength(text_prior: float | str, data: Data) -> float:
    """The strength of the text prior."""
    return data.text_prior.strength if text_prior == "chosen" else float(text_prior)


def fit(optimizer: torch.optim.Optimizer, losses: Iterator[Tensor], steps: int) -> None:
    """Minimise losses; the learning rate falls to zero along a cosine."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def train_tower(
    settings: Settings, data: Data, work: Path, name: str, seed: int
) -> dict[str, Tensor]:
    """Train adapters, or whatever the method trains in the tower, and a head; return logits."""
    texts, remembering = data.task.text_embeds, settings.method == "adapter"
    tokens = data.remembered if remembering else data.tokens
    model = adapt(
        settings,
        SageClassifier(load_tower(work, name, remembering), texts, scale=SCALE),
        texts,
        seed,
    ).train()
    trained = {
        key: value for key, value in model.named_parameters() if value.requires_grad
    }
    groups = [
        {
            "params": [
                value for key, value in trained.items() if ("class_head" in key) == head
            ],
            "lr": rate,
        }
        for head, rate in enumerate(settings.rates)
    ]
    steps = EPOCHS * math.ceil(len(data.labels) / BATCH_SIZE)
    objective = Objective(settings, data, seed)

    def losses() -> Iterator[Tensor]:
        for images, views in batches(*data.embeds.shape[:2], BATCH_SIZE, steps, seed):
            base = data.embeds[images, views if settings.view == "same" else 0]
            outputs = model(
                tokens["train"][images, views].float(), base_image_embeds=base
            )
            yield objective(outputs, data.labels[images])

    fit(torch.optim.AdamW(groups, weight_decay=0), losses(), steps)
    model.eval()
    return {
        split: embed(lambda part: model(part).logits, tokens[split][:, 0])
        for split in SPLITS[1:]
    }


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
            outputs = {
                "logits": head(features),
                "image_embeds": features,
                "class_embeds": F.normalize(head.weight, dim=-1),
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
        split: logits(F.normalize(getattr(data.task, split).embeds, dim=-1))
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
