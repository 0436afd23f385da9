# SPDX-License-Identifier: Apache-2.0
"""The rows of the table, and for each the one command that makes it.

python -m benchmarks.paper.recipes
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..markdown import markdown_table


@dataclass(frozen=True)
class Data:
    """A benchmark.

    Attributes:
        title: Its name in tables.
        classes: Number of classes.
        train_images: Size of the long-tailed training set.
        test_images: Size of the balanced test set.
        flags: Where `finetune.py` finds it, and what it needs in addition to the YAML file.
        texts: Class descriptions by method, flags as well. Without any, the class names go into "a photo of a {}.".
    """

    title: str
    classes: int
    train_images: int
    test_images: int
    flags: str
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A pretrained CLIP: its name in tables, its Hub id, and the number of blocks of its vision tower."""

    title: str
    hub_id: str
    blocks: int


def _cifar(ratio: int, train_images: int) -> Data:
    columns = "--image-column img --label-column fine_label"
    flags = f"--dataset uoft-cs/cifar100 {columns} --imbalance-ratio {ratio}"
    return Data(f"CIFAR-100-LT, ratio {ratio}", 100, train_images, 10_000, flags)


def _texts(name: str, guided: str) -> dict[str, str]:
    return {
        "lift": f"--descriptions data/{name}/names.json",
        "sage": f"--descriptions data/{name}/{guided}.json",
    }


DATA = {
    "imagenet_lt": Data(
        "ImageNet-LT",
        1000,
        115_846,
        50_000,
        "--dataset data/imagenet_lt",
        _texts("imagenet_lt", "wordnet"),
    ),
    "places_lt": Data(
        "Places-LT",
        365,
        62_500,
        36_500,
        "--dataset data/places_lt",
        _texts("places_lt", "names"),
    ),
    "inat2018": Data(
        "iNaturalist 2018",
        8142,
        437_513,
        24_426,
        "--dataset data/inat2018 --epochs 20",
        _texts("inat2018", "taxonomy"),
    ),
    "cifar100_lt_100": _cifar(100, 10_847),
    "cifar100_lt_50": _cifar(50, 12_608),
    "cifar100_lt_10": _cifar(10, 19_573),
}
MODELS = {
    "b16": Model("ViT-B/16", "openai/clip-vit-base-patch16", 12),
    "l14": Model("ViT-L/14", "openai/clip-vit-large-patch14", 24),
}
METHODS = {"lift": "AdaptFormer + logit adjustment (LIFT)", "sage": "Sage"}
#: Overall accuracy in percent as LIFT's authors report it, by data and model. Not measured here.
REPORTED = {
    ("imagenet_lt", "b16"): 78.3,
    ("imagenet_lt", "l14"): 82.9,
    ("places_lt", "b16"): 52.2,
    ("places_lt", "l14"): 53.7,
    ("cifar100_lt_100", "b16"): 81.7,
    ("cifar100_lt_50", "b16"): 83.1,
    ("cifar100_lt_10", "b16"): 84.9,
}
#: Reported without a word on the model.
REPORTED_WITHOUT_MODEL = {"inat2018": 85.2}
#: Adapter parameters of LIFT with ViT-B/16, as its authors report them.
REPORTED_PARAMETERS = {
    "imagenet_lt": 617_868,
    "places_lt": 175_212,
    "cifar100_lt_100": 101_436,
    "inat2018": 4_749_324,
}


@dataclass(frozen=True)
class Recipe:
    """One row: a benchmark, a model and a method, by their keys."""

    data: str
    model: str
    method: str

    @property
    def name(self) -> str:
        """Name of the row and of its output folder."""
        return f"{self.data}_{self.model}_{self.method}"

    @property
    def r(self) -> int:
        """Width of the adapter by LIFT's rule, 2^max(0, floor(log2(C / (2 L)))); for Sage at least 8."""
        width = 2 ** max(
            0,
            math.floor(
                math.log2(DATA[self.data].classes / (2 * MODELS[self.model].blocks))
            ),
        )
        return max(8, width) if self.method == "sage" else width

    @property
    def flags(self) -> list[str]:
        """The command line of `finetune.py`."""
        data = DATA[self.data]
        parts = [
            f"--config benchmarks/paper/{self.method}.yaml --model {MODELS[self.model].hub_id}",
            data.flags,
            data.texts.get(self.method, ""),
            f"--r {self.r} --output-dir runs/{self.name}",
        ]
        return " ".join(parts).split()

    @property
    def command(self) -> str:
        """What to type in the project's root."""
        return f"accelerate launch examples/finetune.py {' '.join(self.flags)}"


RECIPES = [
    Recipe(data, model, method)
    for data in DATA
    for model in MODELS
    for method in METHODS
]


def table() -> str:
    """Return the rows with the figures that others report for them, in Markdown."""
    rows = []
    for recipe in RECIPES:
        reported = str(REPORTED.get((recipe.data, recipe.model), ""))
        if recipe.data in REPORTED_WITHOUT_MODEL:
            reported = f"{REPORTED_WITHOUT_MODEL[recipe.data]} (model not stated)"
        rows.append(
            [
                DATA[recipe.data].title,
                MODELS[recipe.model].title,
                METHODS[recipe.method],
                recipe.r,
                reported if recipe.method == "lift" else "",
            ]
        )
    heads = ["data", "CLIP", "method", "r", "reported by LIFT, overall %"]
    return markdown_table(heads, rows)


def commands() -> str:
    """Return all commands, one per line."""
    return "\n".join(recipe.command for recipe in RECIPES)


if __name__ == "__main__":
    print(table(), commands(), sep="\n\n")
