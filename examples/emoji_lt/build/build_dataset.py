# SPDX-License-Identifier: Apache-2.0
"""Builds Emoji-LT: fetches the drawings, renders them, splits them by concept, thins them to a long tail.

    pip install datasets pillow resvg-py
    python build_dataset.py --cache ~/.cache/emoji-lt

`--styles DIR` also renders the drawing styles that are not shipped (share-alike licence) as
`DIR/unseen_styles.parquet`.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from sources import (
    UNSEEN_STYLES,
    VENDORS,
    Concept,
    IconPack,
    codes_by_name,
    fetch,
    load_concepts,
    match_icons,
    mentions,
    render,
)


HERE = Path(__file__).parent
DESCRIPTIONS_PER_CLASS = 4
EXAMPLES_PER_DESCRIPTION = 3
#: Largest class over smallest, and the seed of splits, long tail and texts.
IMBALANCE_RATIO, SEED = 90, 0


@dataclass
class Drawing:
    """A rendered drawing; `pixels` as `sources.render` returns them."""

    pixels: np.ndarray
    concept: Concept
    vendor: str


def group(items: Iterable, key: Callable) -> dict[str, list]:
    """Collect items by key."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def split_concepts(concepts: list[Concept]) -> dict[str, list[Concept]]:
    """Split by concept: per class 1 to 3 concepts for test, 0 to 2 for validation, at least 1 for training.

    A concept that a class is named after ("bird") is in training, since texts about the class mention it.
    """
    rng = random.Random(SEED)
    by_class = group(concepts, lambda concept: concept.label)
    owner = {}
    for label in sorted(by_class):
        members = by_class[label]
        movable = [
            concept.name
            for concept in members
            if not any(mentions(other, concept.name) for other in by_class)
        ]
        rng.shuffle(movable)
        total = len(members)
        test = 1 + (total >= 6) + (total >= 10)
        validation = (total >= 4) + (total >= 12)
        for name in movable[:test]:
            owner[name] = "test"
        for name in movable[test : test + validation]:
            owner.setdefault(name, "validation")
    return {
        split: [c for c in concepts if owner.get(c.name, "train") == split]
        for split in ("train", "validation", "test")
    }


def draw(
    node_modules: Path, packs: tuple[str, ...], concepts: list[Concept]
) -> list[Drawing]:
    """Render every drawing of `concepts`."""
    owner = {code: concept.name for concept in concepts for code in concept.codes}
    codes = codes_by_name(node_modules, owner)
    drawings = []
    for vendor in packs:
        pack = IconPack(node_modules, vendor)
        icons = match_icons(pack, owner, codes)
        for concept in concepts:
            for icon in sorted(icons[concept.name]):
                drawings.append(Drawing(render(pack.svg(icon)), concept, vendor))
    return drawings


def drop_copies(drawings: list[Drawing], seen: list[Drawing]) -> list[Drawing]:
    """Drop drawings whose pixels are identical to one of `seen`."""
    known = {drawing.pixels[..., :3].tobytes() for drawing in seen}
    return [d for d in drawings if d.pixels[..., :3].tobytes() not in known]


def thin(drawings: list[Drawing]) -> list[Drawing]:
    """Thin classes to at most n_max * ratio ** (-rank / (K - 1)) drawings, ranked by natural size."""
    rng = random.Random(SEED)
    by_class = group(drawings, lambda drawing: drawing.concept.label)
    ranked = sorted(by_class, key=lambda label: (-len(by_class[label]), label))
    largest = len(by_class[ranked[0]])
    kept = []
    for rank, label in enumerate(ranked):
        limit = max(1, round(largest * IMBALANCE_RATIO ** (-rank / (len(ranked) - 1))))
        members = by_class[label]
        kept += rng.sample(members, min(limit, len(members)))
    return kept


def describe(train: list[Drawing], held_out: list[Concept]) -> dict[str, list[str]]:
    """Write texts such as "fruit, such as grapes, melon or peach" that name training concepts only."""
    rng = random.Random(SEED)
    by_class = group(train, lambda drawing: drawing.concept.label)
    texts = {}
    for label in sorted(by_class):
        names = dict.fromkeys(drawing.concept.name for drawing in by_class[label])
        usable = [
            name
            for name in names
            if not any(mentions(name, concept.name) for concept in held_out)
        ]
        rng.shuffle(usable)
        size = EXAMPLES_PER_DESCRIPTION
        examples = [usable[i : i + size] for i in range(0, len(usable), size)]
        if len(examples) > 1 and len(examples[-1]) < size:
            examples.pop()
        texts[label] = [
            f"{label}, such as {enumerate_words(words)}"
            for words in examples[:DESCRIPTIONS_PER_CLASS]
        ] or [label]
    return texts


def enumerate_words(words: list[str]) -> str:
    """Join words as in "a, b or c"."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def encode(pixels: np.ndarray) -> dict[str, bytes | None]:
    """Encode as lossless WebP that keeps the colours of transparent pixels."""
    buffer = BytesIO()
    PILImage.fromarray(pixels).save(
        buffer, "WEBP", lossless=True, quality=100, method=6, exact=True
    )
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(
    path: Path,
    drawings: list[Drawing],
    class_names: list[str],
) -> None:
    """Write the columns image, concept, vendor and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features(
        image=Image(),
        concept=Value("string"),
        vendor=Value("string"),
        label=ClassLabel(names=class_names),
    )
    rows = [
        {
            "image": encode(drawing.pixels),
            "concept": drawing.concept.name,
            "vendor": drawing.vendor,
            "label": drawing.concept.label,
        }
        for drawing in drawings
    ]
    Dataset.from_list(rows, features=features).to_parquet(path)


def size_table(splits: dict[str, list[Drawing]]) -> str:
    """Return the data card's table: images, concepts and classes of each split, and class sizes."""
    lines = ["| split | images | concepts | classes | images per class |"]
    lines.append("|---|---|---|---|---|")
    for split, drawings in splits.items():
        counts = Counter(drawing.concept.label for drawing in drawings)
        concepts = {
            (drawing.concept.label, drawing.concept.name) for drawing in drawings
        }
        sizes = counts.values()
        lines.append(
            f"| {split} | {len(drawings)} | {len(concepts)} | {len(counts)} | {max(sizes)} to {min(sizes)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Build the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cache", type=Path, required=True, help="folder for the npm packages")
    add("--output", type=Path, default=HERE.parent, help="folder for the data set")
    add("--styles", type=Path, help="also render the unseen styles, into this folder")
    args = parser.parse_args()
    node_modules = fetch(args.cache)
    concepts = load_concepts(node_modules)
    sizes = Counter(concept.label for concept in concepts)
    concepts = [concept for concept in concepts if sizes[concept.label] > 1]
    class_names = sorted({concept.label for concept in concepts})
    by_split = split_concepts(concepts)
    held_out = by_split["validation"] + by_split["test"]

    natural, validation, test = (
        draw(node_modules, VENDORS, by_split[split])
        for split in ("train", "validation", "test")
    )
    test = drop_copies(test, natural)
    splits = {
        "train": thin(natural),
        "validation": drop_copies(validation, natural + test),
        "test": test,
    }
    for name, drawings in splits.items():
        write_parquet(args.output / f"{name}.parquet", drawings, class_names)
    descriptions = describe(splits["train"], held_out)
    text = json.dumps(descriptions, indent=1, ensure_ascii=False)
    (args.output / "descriptions.json").write_text(text + "\n", encoding="utf-8")

    if args.styles:
        unseen = draw(node_modules, UNSEEN_STYLES, by_split["test"])
        write_parquet(args.styles / "unseen_styles.parquet", unseen, class_names)
    print(size_table(splits))


if __name__ == "__main__":
    main()
