"""Second step of the photograph test bed: its CLIP-like models, and what the runs on them read.

OMP_WAIT_POLICY=PASSIVE python -m benchmarks.photos.pretrain DATA WORK --depth 12 --width 192

Regime A has seen the classes of Tiny ImageNet and CIFAR-10; regime B continues from it with half of CIFAR-100's
training images. WORK, where `prepare` has been, gets `towers/A-12x192` and `tasks/A-12x192`, likewise B and tiny. A
run that was stopped resumes from its last checkpoint. Two cores with fast bfloat16 take 10 to 20 minutes, three times
as long without the variable if others use them too: it lets threads sleep while they wait.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from .bed import ATTENTION, TASKS, keep_memory, load_tower
from .captions import (
    Concepts,
    Encoder,
    add_cifar100,
    class_captions,
    pretraining_concepts,
    read_imagenet,
    read_wordnet,
    spoken,
)
from .prepare import SEED, read_names
from .stem import CHANNELS, SIDE, device, has_fast_bfloat16
from .tasks import read_guesses, read_labels, read_maps, write_task


@dataclass(frozen=True)
class Regime:
    """How one of the two models is trained."""

    seed: int
    steps: dict[int, int]  # By the depth of the tower.
    lr: float
    shares: tuple[
        float, ...
    ]  # Of Tiny ImageNet, CIFAR-10 and, in B, CIFAR-100 in each batch.
    weight_decay: float = 0.1
    warmup: int = 50

    @property
    def cifar100(self) -> bool:
        """Whether CIFAR-100 is among the data."""
        return len(self.shares) > 2


REGIMES = {
    "A": Regime(seed=SEED, steps={4: 1600, 12: 420}, lr=1.5e-3, shares=(2 / 3, 1 / 3)),
    "B": Regime(
        seed=SEED + 1, steps={4: 700, 12: 220}, lr=8e-4, shares=(4 / 9, 2 / 9, 1 / 3)
    ),
}
BATCH = 512
TOKENS, KEPT, DROPPING = (
    SIDE * SIDE,
    5,
    0.85,
)  # Tokens of a map, those kept, and the share of the steps with dropping.
GUESS, HYPERNYM = (
    0.4,
    0.2,
)  # Shares of captions from the stem's guesses and from above the class.
GUESSES, HYPERNYMS = 3, 4
WRONG = 0.3  # Share of CIFAR-100's images whose caption is another class's.
TEXT_LR = 0.1  # The text map's learning rate, as a share of the tower's.
CHECKPOINT = 100  # Steps between checkpoints.
EMBED_WIDTH, HEAD_WIDTH = 192, 48


@dataclass(frozen=True)
class Source:
    """Images of one split for pretraining, and what is true of them."""

    maps: Tensor  # (n, views, 320, 3, 3) float16
    own: Tensor  # (n,) concept of the class
    broader: (
        Tensor  # (n, 4) concepts above the class, the class itself where there are none
    )
    guessed: Tensor  # (n, 3) concepts of the stem's guesses

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps, the concepts that are true of each, and one of these to name in its caption."""
        image = torch.randint(len(self.own), (count,), generator=generator)
        view = torch.randint(self.maps.shape[1], (count,), generator=generator)
        own, broader, guessed = (
            self.own[image, None],
            self.broader[image],
            self.guessed[image],
        )
        chance = torch.rand(count, 1, generator=generator)
        kind = (chance < GUESS + HYPERNYM).long() + (chance < GUESS).long()
        named = [
            concepts.gather(1, column(concepts, generator))
            for concepts in (own, broader, guessed)
        ]
        return (
            self.maps[image, view],
            torch.cat([own, broader, guessed], 1),
            torch.cat(named, 1).gather(1, kind)[:, 0],
        )


def column(table: Tensor, generator: torch.Generator) -> Tensor:
    """A random column for each row (B, 1)."""
    return torch.randint(table.shape[1], (len(table), 1), generator=generator)


def standardization(sources: list[Source]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over plain views."""
    maps = torch.cat([source.maps[::10, 0] for source in sources]).float()
    return maps.mean((0, 2, 3)), maps.std((0, 2, 3))


class Images:
    """Batches of the images of all sources, with captions."""

    def __init__(
        self,
        sources: list[Source],
        counts: list[int],
        concepts: Concepts,
        encoder: Encoder,
    ) -> None:
        self.sources, self.counts = sources, counts
        captions, self.first, self.captions_of = concepts.flat()
        self.captions = encoder(captions)
        self.mean, self.std = standardization(sources)

    def standardized(self, maps: Tensor) -> Tensor:
        """The maps as the tower is given them."""
        return (maps.float() - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, 320, 3, 3), captions (B, 384), and which of the captions are true of which image (B, B)."""
        drawn = [
            source.draw(count, generator)
            for source, count in zip(self.sources, self.counts, strict=True)
        ]
        maps, concepts, named = (torch.cat(part) for part in zip(*drawn, strict=True))
        number = (
            torch.rand(len(named), generator=generator) * self.captions_of[named]
        ).long()
        captions = self.captions[self.first[named] + number]
        return self.standardized(maps), captions, (concepts[:, :, None] == named).any(1)


def random_tokens(count: int, generator: torch.Generator) -> Tensor:
    """The class token and random ones of the others (B, 1 + kept)."""
    others = torch.rand(count, TOKENS, generator=generator).argsort(1)[:, :KEPT] + 1
    return F.pad(others, (1, 0))


class TextMap(nn.Linear):
    """The map from MiniLM's embeddings to the model's, and the temperature."""

    def __init__(self, captions: Tensor, width: int) -> None:
        super().__init__(captions.shape[1], width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        centre = captions.mean(0)
        axes = torch.linalg.svd(captions - centre, full_matrices=False).Vh[:width]
        self.weight.data, self.bias.data = axes.contiguous(), -axes @ centre

    def forward(self, captions: Tensor) -> Tensor:
        """Embeddings of unit length."""
        return F.normalize(super().forward(captions), dim=-1)


def new_tower(depth: int, width: int) -> CLIPVisionModelWithProjection:
    """A tower whose pixels are the stem's maps."""
    config = CLIPVisionConfig(
        num_channels=CHANNELS,
        image_size=SIDE,
        patch_size=1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_WIDTH,
        projection_dim=EMBED_WIDTH,
        attn_implementation=ATTENTION,
    )
    return CLIPVisionModelWithProjection(config)


def embed(
    tower: CLIPVisionModelWithProjection, maps: Tensor, kept: Tensor | None
) -> Tensor:
    """Image embeddings from the class token and some of the others, of unit length."""
    vision = tower.vision_model
    hidden = vision.embeddings(maps)
    if kept is not None:
        hidden = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = vision.pre_layrnorm(hidden)
    for block in vision.encoder.layers:
        hidden = block(hidden, None)
    return F.normalize(
        tower.visual_projection(vision.post_layernorm(hidden[:, 0])).float(), dim=-1
    )


def contrastive_loss(
    images: Tensor, texts: Tensor, true: Tensor, scale: Tensor
) -> Tensor:
    """The mean of both directions, where every caption that is true of an image counts as its own (B, B)."""
    logits, true = scale * images @ texts.T, true.float()
    rows = F.cross_entropy(logits, true / true.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.T, true.T / true.T.sum(1, keepdim=True))
    return (rows + columns) / 2


class Trainer:
    """Trains a tower and its text map in one regime, with checkpoints."""

    def __init__(
        self,
        regime: Regime,
        tower: CLIPVisionModelWithProjection,
        text_map: TextMap,
        images: Images,
    ) -> None:
        self.regime, self.images, self.step = regime, images, 0
        self.steps = regime.steps[tower.config.num_hidden_layers]
        self.tower, self.text_map = tower.to(device()).train(), text_map.to(device())
        matrices = [weight for weight in tower.parameters() if weight.ndim > 1]
        vectors = [weight for weight in tower.parameters() if weight.ndim < 2]
        base, decay = regime.lr, regime.weight_decay
        groups = [
            {"params": matrices, "base": base, "weight_decay": decay},
            {
                "params": [*vectors, text_map.log_scale],
                "base": base,
                "weight_decay": 0.0,
            },
            {
                "params": [text_map.weight, text_map.bias],
                "base": base * TEXT_LR,
                "weight_decay": 0.0,
            },
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=base, betas=(0.9, 0.98))

    def train_step(self) -> float:
        """One step of the optimizer; returns the loss."""
        progress = min(self.step / self.steps, 1)
        rate = min(
            (self.step + 1) / self.regime.warmup,
            0.5 + 0.5 * math.cos(math.pi * progress),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        # All of a step is drawn by its number, so a run that was stopped goes on as if it had not been.
        generator = torch.Generator().manual_seed(
            1_000_000 * self.regime.seed + self.step
        )
        maps, captions, true = (
            part.to(device()) for part in self.images.batch(generator)
        )
        dropping = self.step < DROPPING * self.steps
        kept = random_tokens(len(maps), generator).to(device()) if dropping else None
        with torch.autocast(device().type, torch.bfloat16, enabled=has_fast_bfloat16()):
            images = embed(self.tower, maps, kept)
        scale = self.text_map.log_scale.clamp(max=math.log(100)).exp()
        loss = contrastive_loss(images, self.text_map(captions), true, scale)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def run(self, checkpoint: Path, report: Callable[[], str]) -> None:
        """Train to the end, from the checkpoint where there is one."""
        parts = {
            "tower": self.tower,
            "text_map": self.text_map,
            "optimizer": self.optimizer,
        }
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location=device())
            self.step = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        began, losses = time.time(), []
        while self.step < self.steps:
            losses.append(self.train_step())
            if self.step % CHECKPOINT == 0 or self.step == self.steps:
                state = {
                    "step": self.step,
                    **{name: part.state_dict() for name, part in parts.items()},
                }
                torch.save(state, checkpoint.with_suffix(".partial"))
                os.replace(checkpoint.with_suffix(".partial"), checkpoint)
                pace = (time.time() - began) / len(losses)
                message = f"step {self.step} of {self.steps}, {pace:.2f} s/step"
                print(
                    f"{message}, loss {np.mean(losses[-CHECKPOINT:]):.3f}, {report()}",
                    flush=True,
                )


def pretraining_sources(data: Path, work: Path, ids: dict[str, int]) -> list[Source]:
    """Tiny ImageNet and CIFAR-10, with the stem's guesses as concepts."""
    wordnet, imagenet = read_wordnet(data), read_imagenet(data)
    guess_ids = torch.tensor([ids[label] for label in imagenet])
    tiny = [
        wordnet["tiny-imagenet"][key] for key in read_names(data, "tiny-imagenet-half")
    ]
    cifar10 = [wordnet["cifar10"][key] for key in read_names(data, "cifar10-part")]
    named = {
        "tiny-pretrain": [
            (", ".join(entry["names"]), entry["hypernyms"]) for entry in tiny
        ],
        "cifar10-pretrain": [(entry["names"][0], []) for entry in cifar10],
    }
    sources = []
    for split, classes in named.items():
        labels = read_labels(work, split)
        own = torch.tensor([ids[name] for name, _ in classes])
        # As many above each class: the class stands for those that it lacks.
        above = [
            (hypernyms + [name] * HYPERNYMS)[:HYPERNYMS] for name, hypernyms in classes
        ]
        broader = torch.tensor([[ids[name] for name in names] for names in above])
        guessed = guess_ids[read_guesses(work, split)[:, :GUESSES]]
        sources.append(
            Source(read_maps(work, split), own[labels], broader[labels], guessed)
        )
    return sources


def cifar100_source(data: Path, work: Path, ids: dict[str, int]) -> Source:
    """CIFAR-100 captioned by class alone, for a share of the images by a wrong one."""
    generator = torch.Generator().manual_seed(SEED)
    labels = read_labels(work, "cifar100-pretrain")
    names = read_names(data, "cifar100-train")
    wrong = torch.rand(len(labels), generator=generator) < WRONG
    shift = torch.randint(1, len(names), labels.shape, generator=generator)
    labels = torch.where(wrong, (labels + shift) % len(names), labels)
    own = torch.tensor([ids[spoken(name)] for name in names])[labels]
    broader, guessed = (
        own[:, None].expand(-1, HYPERNYMS),
        own[:, None].expand(-1, GUESSES),
    )
    return Source(read_maps(work, "cifar100-pretrain"), own, broader, guessed)


def save_tower(folder: Path, trainer: Trainer) -> None:
    """Write the tower, its standardisation and its text map."""
    trainer.tower.save_pretrained(folder)
    beside = {
        name: weight.detach().cpu().numpy()
        for name, weight in trainer.text_map.named_parameters()
    }
    np.savez(
        folder / "beside.npz",
        mean=trainer.images.mean.numpy(),
        std=trainer.images.std.numpy(),
        **beside,
    )


class Report:
    """Tells the zero-shot accuracy on validation images."""

    def __init__(
        self, data: Path, work: Path, encoder: Encoder, trainer: Trainer
    ) -> None:
        self.trainer = trainer
        self.tasks = []
        for task, split in (("A", "cifar100-validation"), ("tiny", "tiny-validation")):
            captions = [encoder(texts) for texts in class_captions(data, task)[1]]
            self.tasks.append(
                (
                    split,
                    captions,
                    read_maps(work, split)[:, 0],
                    read_labels(work, split),
                )
            )

    @torch.inference_mode()
    def __call__(self) -> str:
        """The accuracies, in words."""
        return ", ".join(
            f"{split} {self.accuracy(*images):.1f} %" for split, *images in self.tasks
        )

    def accuracy(self, captions: list[Tensor], maps: Tensor, labels: Tensor) -> float:
        """Per cent of the images that are nearest to the captions of their class."""
        tower, text_map, images = (
            self.trainer.tower,
            self.trainer.text_map,
            self.trainer.images,
        )
        texts = F.normalize(
            torch.stack([text_map(texts.to(device())).mean(0) for texts in captions]),
            dim=1,
        )
        embeds = [
            embed(tower, images.standardized(part).to(device()), None)
            for part in maps.split(BATCH)
        ]
        return (
            100
            * ((torch.cat(embeds) @ texts.T).argmax(1).cpu() == labels)
            .float()
            .mean()
            .item()
        )


def pretrain(
    data: Path, work: Path, name: str, depth: int, width: int, encoder: Encoder
) -> None:
    """Train one of the two models and write it."""
    regime, concepts = REGIMES[name], pretraining_concepts(data)
    if regime.cifar100:
        add_cifar100(concepts, data)
    sources = pretraining_sources(data, work, concepts.ids())
    if regime.cifar100:
        sources.append(cifar100_source(data, work, concepts.ids()))
    images = Images(
        sources, [int(share * BATCH) for share in regime.shares], concepts, encoder
    )
    torch.manual_seed(regime.seed)
    tower, text_map = new_tower(depth, width), TextMap(images.captions, EMBED_WIDTH)
    if regime.cifar100:
        tower, texts = load_tower(work, f"A-{depth}x{width}")
        images.mean, images.std = texts.pop("mean"), texts.pop("std")
        text_map.load_state_dict(texts)
    trainer = Trainer(regime, tower, text_map, images)
    folder = work / "towers" / f"{name}-{depth}x{width}"
    checkpoint = folder.with_suffix(".pt")
    trainer.run(checkpoint, Report(data, work, encoder, trainer))
    save_tower(folder, trainer)


def main() -> None:
    """Train both models and write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the photographs")
    parser.add_argument("work", type=Path, help="folder of everything that is computed")
    parser.add_argument("--depth", type=int, choices=(4, 12), default=4)
    parser.add_argument("--width", type=int, choices=(192, 384), default=192)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    data, work, sizes = (
        arguments.data,
        arguments.work,
        (arguments.depth, arguments.width),
    )
    (work / "towers").mkdir(parents=True, exist_ok=True)
    encoder = Encoder(work / "captions.pt")
    shape = "x".join(map(str, sizes))
    for name in REGIMES:
        if not (work / "towers" / f"{name}-{shape}" / "beside.npz").exists():
            pretrain(data, work, name, *sizes, encoder)
        for task in (task for task in arguments.tasks if TASKS[task] == name):
            folder = work / "tasks" / f"{task}-{shape}"
            if not (folder / "class_names.json").exists():
                write_task(data, work, task, shape, encoder)


if __name__ == "__main__":
    main()
