# SPDX-License-Identifier: Apache-2.0
"""What the towers are pretrained on: images of several sources, and what captions can say of them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .captions import Concepts, Encoder, read_imagenet, read_wordnet, spoken
from .prepare import SEED, read_names
from .tasks import read_chunks, read_labels


# Shares of captions from the stem's guesses and from above the class.
GUESS, HYPERNYM = 0.4, 0.2
GUESSES, HYPERNYMS = 3, 4
WRONG = 0.3  # Share of CIFAR-100's images whose caption is another class's.


@dataclass(frozen=True)
class Source:
    """Images of one split for pretraining, and what is true of them."""

    maps: Tensor  # (n, views, 320, 3, 3) float16
    own: Tensor  # (n,) concept of the class
    broader: Tensor  # (n, 4) concepts above it, the class itself where there are none
    guessed: Tensor  # (n, 3) concepts of the stem's guesses

    def draw(
        self,
        count: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps, the concepts that are true of each, and one of these to name in its caption."""
        image = torch.randint(len(self.own), (count,), generator=generator)
        view = torch.randint(self.maps.shape[1], (count,), generator=generator)
        concepts = self.own[image, None], self.broader[image], self.guessed[image]
        chance = torch.rand(count, 1, generator=generator)
        kind = (chance < GUESS + HYPERNYM).long() + (chance < GUESS).long()
        named = [part.gather(1, column(part, generator)) for part in concepts]
        caption = torch.cat(named, 1).gather(1, kind)[:, 0]
        return self.maps[image, view], torch.cat(concepts, 1), caption


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
        self.sources = sources
        self.counts = counts
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
        share = torch.rand(len(named), generator=generator)
        number = (share * self.captions_of[named]).long()
        captions = self.captions[self.first[named] + number]
        return self.standardized(maps), captions, (concepts[:, :, None] == named).any(1)


def pretraining_sources(
    data: Path,
    work: Path,
    ids: dict[str, int],
) -> list[Source]:
    """Tiny ImageNet and CIFAR-10, with the stem's guesses as concepts."""
    wordnet = read_wordnet(data)
    imagenet = read_imagenet(data)
    guess_ids = torch.tensor([ids[label] for label in imagenet])
    tiny = [wordnet["tiny-imagenet"][k] for k in read_names(data, "tiny-imagenet-half")]
    cifar10 = [wordnet["cifar10"][key] for key in read_names(data, "cifar10-part")]
    named = {
        "tiny-pretrain": [(", ".join(one["names"]), one["hypernyms"]) for one in tiny],
        "cifar10-pretrain": [(one["names"][0], []) for one in cifar10],
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
        guessed = guess_ids[read_chunks(work, split, "guesses").long()[:, :GUESSES]]
        sources.append(
            Source(
                read_chunks(work, split, "maps"), own[labels], broader[labels], guessed
            )
        )
    return sources


def cifar100_source(
    data: Path,
    work: Path,
    ids: dict[str, int],
) -> Source:
    """CIFAR-100 captioned by class alone, for a share of the images by a wrong one."""
    generator = torch.Generator().manual_seed(SEED)
    labels = read_labels(work, "cifar100-pretrain")
    names = read_names(data, "cifar100-train")
    wrong = torch.rand(len(labels), generator=generator) < WRONG
    shift = torch.randint(1, len(names), labels.shape, generator=generator)
    labels = torch.where(wrong, (labels + shift) % len(names), labels)
    own = torch.tensor([ids[spoken(name)] for name in names])[labels]
    broader, guessed = (own[:, None].expand(-1, n) for n in (HYPERNYMS, GUESSES))
    return Source(read_chunks(work, "cifar100-pretrain", "maps"), own, broader, guessed)
