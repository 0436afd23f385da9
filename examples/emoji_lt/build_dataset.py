# SPDX-License-Identifier: Apache-2.0
"""Builds Emoji-LT: fetches the drawings, renders them, splits them by concept, thins them to a long tail.

    pip install datasets pillow resvg-py
    python build_dataset.py --cache ~/.cache/emoji-lt

`--styles DIR` renders the drawing styles that are not shipped (share-alike licence) as `DIR/unseen_styles.parquet`;
`--archive DIR` packs everything that pretraining may see, with captions.
"""

import argparse
import json
import random
import re
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from sources import (
    DISTRACTOR_SUBGROUPS,
    DROPPED_SUBGROUPS,
    PRETRAINING_VENDORS,
    UNSEEN_STYLES,
    VENDORS,
    Concept,
    IconPack,
    load_concepts,
    match_icons,
    render,
)


HERE = Path(__file__).parent
PACKAGES = {
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/emojione-v1": "1.2.3",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/openmoji": "1.2.29",
    "@iconify-json/twemoji": "1.2.5",
    "emojibase-data": "17.0.0",
    "emojilib": "4.0.3",
}
ARCHIVE_SIZE = 64
DESCRIPTIONS_PER_CLASS = 4
EXAMPLES_PER_DESCRIPTION = 3


@dataclass
class Drawing:
    """One rendering. `pixels` is (size, size, 4) uint8: colours laid on white, and the alpha that they had."""

    pixels: np.ndarray
    concept: Concept
    vendor: str


def fetch(cache: Path, packages: dict[str, str]) -> Path:
    """Installs the npm packages that `cache` lacks and returns its `node_modules` folder."""
    node_modules = cache / "node_modules"
    missing = [
        f"{name}@{version}"
        for name, version in packages.items()
        if not (node_modules / name).exists()
    ]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        command = [
            "npm",
            "install",
            "--prefix",
            str(cache),
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            *missing,
        ]
        subprocess.run(command, check=True)
    return node_modules


def mentions(text: str, name: str) -> bool:
    """Whether `text` holds `name` as whole words."""
    return (
        re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", text.lower()) is not None
    )


def split_concepts(concepts: list[Concept], seed: int) -> dict[str, list[Concept]]:
    """Splits by concept: 1 to 3 test concepts a class, 0 to 2 for validation, at least 1 stays for training.

    A concept that a class is named after ("bird") always trains, since every text about the class mentions it.

    Args:
        concepts: Concepts of the classes.
        seed: Seed of the draw.

    Returns:
        Concepts by split, in the order of the standard.
    """
    rng = random.Random(seed)
    by_class: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        by_class[concept.label].append(concept)
    held_out: dict[str, set[str]] = {"validation": set(), "test": set()}
    for label in sorted(by_class):
        members = by_class[label]
        total = len(members)
        movable = [
            c.name
            for c in members
            if not any(mentions(other, c.name) for other in by_class)
        ]
        rng.shuffle(movable)
        test = 1 if total < 6 else 2 if total < 10 else 3
        validation = 0 if total < 4 else 1 if total < 12 else 2
        held_out["test"].update(movable[:test])
        held_out["validation"].update(movable[test : test + validation])
    splits: dict[str, list[Concept]] = {"train": [], "validation": [], "test": []}
    for concept in concepts:
        split = next(
            (name for name, names in held_out.items() if concept.name in names), "train"
        )
        splits[split].append(concept)
    return splits


def draw(
    node_modules: Path, packs: tuple[str, ...], concepts: list[Concept], size: int
) -> list[Drawing]:
    """Renders every drawing of `concepts`, `size` x `size` pixels."""
    icons = match_icons(node_modules, packs, concepts)
    drawings = []
    for vendor in packs:
        pack = IconPack(node_modules, vendor)
        for concept in concepts:
            for icon in icons[vendor].get(concept.name, []):
                drawings.append(
                    Drawing(lay_on_white(render(pack.svg(icon), size)), concept, vendor)
                )
    return drawings


def lay_on_white(pixels: np.ndarray) -> np.ndarray:
    """Composes colours with white and keeps alpha beside them, so that dropping alpha shows the drawing on white."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    colours = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.concatenate([colours, pixels[..., 3:]], axis=-1)


def drop_copies(drawings: list[Drawing], seen: list[Drawing]) -> list[Drawing]:
    """Drops the drawings that are pixel-identical to one of `seen`."""
    known = {drawing.pixels[..., :3].tobytes() for drawing in seen}
    return [
        drawing
        for drawing in drawings
        if drawing.pixels[..., :3].tobytes() not in known
    ]


def thin(drawings: list[Drawing], imbalance_ratio: float, seed: int) -> list[Drawing]:
    """Thins classes to at most n_max * ratio ** (-rank / (K - 1)) drawings, by rank of natural size."""
    rng = random.Random(seed)
    by_class: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        by_class[drawing.concept.label].append(drawing)
    ranked = sorted(by_class, key=lambda label: (-len(by_class[label]), label))
    largest = len(by_class[ranked[0]])
    kept = []
    for rank, label in enumerate(ranked):
        limit = max(1, round(largest * imbalance_ratio ** (-rank / (len(ranked) - 1))))
        members = by_class[label]
        kept += rng.sample(members, min(limit, len(members)))
    return kept


def describe(
    train: list[Drawing], held_out: list[Concept], seed: int
) -> dict[str, list[str]]:
    """Writes texts such as "fruit, such as grapes, melon or peach" from training concepts only."""
    rng = random.Random(seed)
    names: dict[str, list[str]] = defaultdict(list)
    for drawing in train:
        concept = drawing.concept
        if concept.name not in names[concept.label]:
            names[concept.label].append(concept.name)
    secret = [concept.name for concept in held_out]
    texts = {}
    for label in sorted(names):
        usable = [
            name
            for name in names[label]
            if not any(mentions(name, other) for other in secret)
        ]
        rng.shuffle(usable)
        groups = [
            usable[i : i + EXAMPLES_PER_DESCRIPTION]
            for i in range(0, len(usable), EXAMPLES_PER_DESCRIPTION)
        ]
        if len(groups) > 1 and len(groups[-1]) < EXAMPLES_PER_DESCRIPTION:
            groups.pop()
        texts[label] = [
            f"{label}, such as {enumerate_words(group)}"
            for group in groups[:DESCRIPTIONS_PER_CLASS]
        ]
        texts[label] = texts[label] or [label]
    return texts


def enumerate_words(words: list[str]) -> str:
    """Joins words as in "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def encode(pixels: np.ndarray) -> bytes:
    """Encodes as lossless WebP that keeps the colours of transparent pixels."""
    buffer = BytesIO()
    PILImage.fromarray(pixels).save(
        buffer, format="WEBP", lossless=True, quality=100, method=6, exact=True
    )
    return buffer.getvalue()


def write_labelled(path: Path, drawings: list[Drawing], class_names: list[str]) -> None:
    """Writes drawings as parquet with the columns image, label, concept and vendor."""
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=class_names),
            "concept": Value("string"),
            "vendor": Value("string"),
        }
    )
    columns = {
        "image": [{"bytes": encode(d.pixels), "path": None} for d in drawings],
        "label": [class_names.index(d.concept.label) for d in drawings],
        "concept": [d.concept.name for d in drawings],
        "vendor": [d.vendor for d in drawings],
    }
    Dataset.from_dict(columns, features=features).to_parquet(path)


def split_distractors(concepts: list[Concept], seed: int) -> dict[str, str]:
    """Assigns every distractor concept to the scenes of one split."""
    rng = random.Random(seed)
    return {
        c.name: rng.choices(("train", "validation", "test"), (0.6, 0.15, 0.25))[0]
        for c in concepts
    }


def write_distractors(
    path: Path,
    drawings: list[Drawing],
    splits: dict[str, str],
    per_concept: int,
    seed: int,
) -> None:
    """Writes `per_concept` drawings of every distractor with the columns image, concept, vendor and split."""
    rng = random.Random(seed)
    by_concept: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        by_concept[drawing.concept.name].append(drawing)
    kept = [
        d
        for group in by_concept.values()
        for d in rng.sample(group, min(per_concept, len(group)))
    ]
    features = Features(
        {
            "image": Image(),
            "concept": Value("string"),
            "vendor": Value("string"),
            "split": Value("string"),
        }
    )
    columns = {
        "image": [{"bytes": encode(d.pixels), "path": None} for d in kept],
        "concept": [d.concept.name for d in kept],
        "vendor": [d.vendor for d in kept],
        "split": [splits[d.concept.name] for d in kept],
    }
    Dataset.from_dict(columns, features=features).to_parquet(path)


def write_archive(
    folder: Path,
    node_modules: Path,
    concepts: list[Concept],
    distractors: list[Concept],
    held_out: list[Concept],
) -> None:
    """Packs what pretraining may see: other makers' drawings of no held-out concept, captions, training clutter."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings = draw(
        node_modules, PRETRAINING_VENDORS, concepts + distractors, ARCHIVE_SIZE
    )
    everything = concepts + distractors
    index = {id(concept): i for i, concept in enumerate(everything)}
    clutter = {id(concept) for concept in distractors}
    np.savez(
        folder / "emoji.npz",
        pixels=np.stack([d.pixels for d in drawings]),
        concept=np.array([index[id(d.concept)] for d in drawings]),
        clutter=np.array([id(d.concept) in clutter for d in drawings]),
    )
    captions = {
        "concepts": [{"name": c.name, "keywords": c.keywords} for c in everything],
        "held_out": [{"name": c.name, "keywords": c.keywords} for c in held_out],
    }
    (folder / "captions.json").write_text(
        json.dumps(captions, ensure_ascii=False), encoding="utf-8"
    )


def report(splits: dict[str, list[Drawing]]) -> str:
    """Returns the table of the data card: images, concepts and classes of every split and the sizes of classes."""
    lines = [
        "| split | images | concepts | classes | images a class |",
        "|---|---|---|---|---|",
    ]
    for name, drawings in splits.items():
        counts = Counter(d.concept.label for d in drawings)
        concepts = {(d.concept.label, d.concept.name) for d in drawings}
        sizes = f"{max(counts.values())} to {min(counts.values())}"
        lines.append(
            f"| {name} | {len(drawings)} | {len(concepts)} | {len(counts)} | {sizes} |"
        )
    counts = Counter(d.concept.label for d in splits["train"])
    groups = Counter(
        "many" if n > 100 else "medium" if n >= 20 else "few" for n in counts.values()
    )
    lines.append("")
    lines.append(
        "Classes: " + ", ".join(f"{groups[g]} {g}" for g in ("many", "medium", "few"))
    )
    return "\n".join(lines)


def main() -> None:
    """Builds the data set from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for the npm packages"
    )
    parser.add_argument(
        "--output", type=Path, default=HERE, help="folder for the parquet files"
    )
    parser.add_argument(
        "--size", type=int, default=48, help="side of the images, in pixels"
    )
    parser.add_argument(
        "--imbalance-ratio",
        type=float,
        default=90.0,
        help="largest class over smallest",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--styles",
        type=Path,
        help="also render the unseen drawing styles, into this folder",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        help="also pack the pretraining images, into this folder",
    )
    args = parser.parse_args()

    node_modules = fetch(args.cache, PACKAGES)
    everything = load_concepts(node_modules)
    distractors = [c for c in everything if c.subgroup in DISTRACTOR_SUBGROUPS]
    concepts = [c for c in everything if c.subgroup not in DROPPED_SUBGROUPS]
    sizes = Counter(c.label for c in concepts)
    concepts = [c for c in concepts if sizes[c.label] > 1]
    class_names = sorted({c.label for c in concepts})
    by_split = split_concepts(concepts, args.seed)
    held_out = by_split["validation"] + by_split["test"]

    natural = draw(node_modules, VENDORS, by_split["train"], args.size)
    train = thin(natural, args.imbalance_ratio, args.seed)
    test = drop_copies(
        draw(node_modules, VENDORS, by_split["test"], args.size), natural
    )
    validation = drop_copies(
        draw(node_modules, VENDORS, by_split["validation"], args.size), natural + test
    )
    splits = {"train": train, "validation": validation, "test": test}

    args.output.mkdir(parents=True, exist_ok=True)
    for name, drawings in splits.items():
        write_labelled(args.output / f"{name}.parquet", drawings, class_names)
    descriptions = describe(train, held_out, args.seed)
    text = json.dumps(descriptions, indent=1, ensure_ascii=False)
    (args.output / "descriptions.json").write_text(text + "\n", encoding="utf-8")
    clutter_splits = split_distractors(distractors, args.seed)
    clutter = draw(node_modules, VENDORS, distractors, args.size)
    write_distractors(
        args.output / "distractors.parquet", clutter, clutter_splits, 2, args.seed
    )
    if args.styles:
        args.styles.mkdir(parents=True, exist_ok=True)
        unseen = draw(node_modules, UNSEEN_STYLES, by_split["test"], args.size)
        write_labelled(args.styles / "unseen_styles.parquet", unseen, class_names)
    if args.archive:
        training_clutter = [c for c in distractors if clutter_splits[c.name] == "train"]
        others = [
            c
            for c in everything
            if c.subgroup not in DISTRACTOR_SUBGROUPS and c not in held_out
        ]
        write_archive(args.archive, node_modules, others, training_clutter, held_out)
    print(report(splits))


if __name__ == "__main__":
    main()
