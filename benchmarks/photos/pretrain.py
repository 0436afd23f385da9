# SPDX-License-Identifier: Apache-2.0
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from .bed import ATTENTION, TASKS, TEXT_MAP, keep_memory, load_tower
from .captions import Encoder, add_cifar100, pretraining_concepts
from .hardware import device, has_fast_bfloat16
from .prepare import SEED
from .pretraining_data import Images, cifar100_source, pretraining_sources
from .stem import CHANNELS, SIDE
from .tasks import write_task


@dataclass(frozen=True)
class Regime:
    """How one of the two models is trained."""

    seed: int
    steps: dict[int, int]  # By the depth of the tower.
    lr: float
    # Of Tiny ImageNet, CIFAR-10 and, in B, CIFAR-100 in each batch.
    shares: tuple[float, ...]
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
# Tokens of a map, and those kept while some are dropped.
TOKENS = SIDE * SIDE
KEPT = 5
TEXT_LR = 0.1  # The text map's learning rate, as a share of the tower's.
CHECKPOINT = 100  # Steps between checkpoints.
EMBED_WIDTH, HEAD_WIDTH = 192, 48


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
        self.weight.data = axes.contiguous()
        self.bias.data = -axes @ centre

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
    logits = scale * images @ texts.T
    true = true.float()
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
        dropping: float,
    ) -> None:
        self.regime = regime
        self.dropping = dropping
        self.images = images
        self.step = 0
        self.steps = regime.steps[tower.config.num_hidden_layers]
        self.tower = tower.to(device()).train()
        self.text_map = text_map.to(device())
        matrices = [weight for weight in tower.parameters() if weight.ndim > 1]
        vectors = [weight for weight in tower.parameters() if weight.ndim < 2]
        base = regime.lr
        groups = [
            {
                "params": matrices,
                "base": base,
                "weight_decay": regime.weight_decay,
            },
            {"params": [*vectors, text_map.log_scale], "base": base},
            {"params": [text_map.weight, text_map.bias], "base": base * TEXT_LR},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=base,
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )

    def train_step(self) -> float:
        """One step of the optimizer; returns the loss."""
        progress = min(self.step / self.steps, 1)
        falling = 0.5 + 0.5 * math.cos(math.pi * progress)
        rate = min((self.step + 1) / self.regime.warmup, falling)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        # All of a step is drawn by its number, so a run that was stopped continues as if it had not been.
        seed = 1_000_000 * self.regime.seed + self.step
        generator = torch.Generator().manual_seed(seed)
        drawn = self.images.batch(generator)
        maps, captions, true = (part.to(device()) for part in drawn)
        dropping = self.step < self.dropping * self.steps
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

    def run(self, checkpoint: Path) -> None:
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
        bar = tqdm(range(self.step, self.steps), checkpoint.stem, mininterval=60)
        for _ in bar:
            bar.set_postfix(loss=f"{self.train_step():.3f}", refresh=False)
            if self.step % CHECKPOINT and self.step < self.steps:
                continue
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"step": self.step}, checkpoint.with_suffix(".partial"))
            os.replace(checkpoint.with_suffix(".partial"), checkpoint)


def save_tower(folder: Path, trainer: Trainer) -> None:
    """Write the tower, its standardisation and its text map."""
    trainer.tower.save_pretrained(folder)
    arrays = dict(trainer.text_map.named_parameters())
    arrays |= {"mean": trainer.images.mean, "std": trainer.images.std}
    arrays = {name: array.detach().cpu().numpy() for name, array in arrays.items()}
    np.savez(folder / TEXT_MAP, **arrays)


def pretrain(
    data: Path,
    work: Path,
    name: str,
    depth: int,
    width: int,
    dropping: float,
    encoder: Encoder,
) -> None:
    """Train one of the two models and write it."""
    regime = REGIMES[name]
    concepts = pretraining_concepts(data)
    if regime.cifar100:
        add_cifar100(concepts, data)
    sources = pretraining_sources(data, work, concepts.ids())
    if regime.cifar100:
        sources.append(cifar100_source(data, work, concepts.ids()))
    images = Images(
        sources, [int(share * BATCH) for share in regime.shares], concepts, encoder
    )
    torch.manual_seed(regime.seed)
    tower = new_tower(depth, width)
    text_map = TextMap(images.captions, EMBED_WIDTH)
    if regime.cifar100:
        tower, texts = load_tower(work, f"A-{depth}x{width}")
        images.mean = texts.pop("mean")
        images.std = texts.pop("std")
        text_map.load_state_dict(texts)
    trainer = Trainer(regime, tower, text_map, images, dropping)
    folder = work / "towers" / f"{name}-{depth}x{width}"
    trainer.run(folder.with_suffix(".pt"))
    save_tower(folder, trainer)


def main() -> None:
    """Train both models and write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the photographs")
    parser.add_argument("work", type=Path, help="folder of everything that is computed")
    parser.add_argument("--depth", type=int, choices=(4, 12), default=4)
    parser.add_argument("--width", type=int, choices=(192, 384), default=192)
    parser.add_argument(
        "--dropping",
        type=float,
        default=0.85,
        help="share of the steps in which some tokens are dropped",
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    data = arguments.data
    work = arguments.work
    sizes = arguments.depth, arguments.width
    (work / "towers").mkdir(parents=True, exist_ok=True)
    encoder = Encoder(work / "captions.pt")
    shape = "x".join(map(str, sizes))
    for name in REGIMES:
        if not (work / "towers" / f"{name}-{shape}" / TEXT_MAP).exists():
            pretrain(data, work, name, *sizes, arguments.dropping, encoder)
        for task in (task for task in arguments.tasks if TASKS[task] == name):
            folder = work / "tasks" / f"{task}-{shape}"
            if not (folder / "class_names.json").exists():
                write_task(data, work, task, shape, encoder)


if __name__ == "__main__":
    main()
