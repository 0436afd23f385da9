# SPDX-License-Identifier: Apache-2.0
"""Packs what the tiny CLIP is pretrained on: other makers' emoji of no held-out concept, icons, texts.

    python build_dataset.py --cache CACHE --archive ARCHIVE      # first: emoji.npz and captions.json
    python pretraining_data.py --cache CACHE --archive ARCHIVE --sentence-encoder FOLDER --dictionary data.noun

Icons widen the vocabulary, but what validation and test ask for stays unseen: an icon is dropped if its name contains
the name of a held-out concept, or a word that only held-out concepts have among their names and keywords.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sources import IconPack, fetch, load_concepts, match_icons, mentions, render
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, BertModel


EMOJI_LT = Path(__file__).resolve().parents[1]
# Pattern that an icon's name must match. The licences are in the model card.
ICON_PACKS = {
    "flat-color-icons": "",
    "fluent-color": r"-(48|32)$",
    "game-icons": "",
    "healthicons": r"^(?!.*(outline|24px|negative))",
    "icon-park": "",
    "marketeq": "",
    "mdi": r"^(?!.*(outline|-off|alpha-|numeric-|arrow|chevron|format-|-box|-circle))",
    "meteocons": r"-fill$",
    "ph": r"-duotone$",
    "solar": r"-bold-duotone$",
    "streamline-color": r"-flat$",
    "streamline-kameleon-color": r"^(?!.*-duo$)",
    "streamline-plump-color": r"-flat$",
    "streamline-ultimate-color": "",
    "temaki": "",
}
# An icon of these is taken only if its name is that of a concept that is not held out.
EMOJI_PACKS = ("emojione-monotone", "streamline-emojis")
SUFFIXES = r"flat|fill|duotone|bold|duo|alt|simple|variant|svgrepo|com|f|m"
FUNCTION_WORDS = "a an and at by for from in no of off on or out the to up with"
SIZE = 64
CAPTIONS_PER_CONCEPT = 8
NOUNS = 30_000


def words(text: str) -> list[str]:
    """Split a name into lower-case words without digits."""
    return re.findall(r"[a-z]+", text.lower())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def vocabulary(concepts: list[dict]) -> set[str]:
    """Return the words of all names and keywords."""
    texts = [text for c in concepts for text in (c["name"], *c["keywords"])]
    return set(words(" ".join(texts)))


def random_color(rng: random.Random) -> str:
    """Draw a colour that can be seen on white."""
    return "#" + "".join(f"{rng.randrange(200):02x}" for _ in range(3))


def pack_icons(
    archive: Path,
    node_modules: Path,
    rng: random.Random,
) -> None:
    """Render the icon packs into `icons.npz`, with their captions in `icons.json`."""
    captions = read_json(archive / "captions.json")
    known = vocabulary(captions["concepts"]) | set(words(FUNCTION_WORDS))
    secret_words = vocabulary(captions["held_out"]) - known
    secret_names = [" ".join(words(c["name"])) for c in captions["held_out"]]
    pixels, owners, names = [], [], {}
    for pack_name, pattern in ICON_PACKS.items():
        pack = IconPack(node_modules, pack_name)
        for icon, parent in tqdm(pack.parents.items(), desc=pack_name):
            if icon != parent or not re.search(pattern, icon):
                continue
            kept = [word for word in words(icon) if not re.fullmatch(SUFFIXES, word)]
            name = " ".join(kept)
            if len(name) < 3 or secret_words & set(kept):
                continue
            if any(mentions(name, secret) for secret in secret_names):
                continue
            drawing = render(pack.svg(icon, random_color(rng)), SIZE)
            if (drawing[..., 3] > 64).mean() > 0.03:
                pixels.append(drawing)
                owners.append(names.setdefault(name, len(names)))
    np.savez(archive / "icons.npz", pixels=np.stack(pixels), concept=owners)
    (archive / "icons.json").write_text(json.dumps(list(names)), encoding="utf-8")
    print(f"{len(pixels)} icons of {len(names)} names")


def pack_more_styles(
    archive: Path,
    node_modules: Path,
    rng: random.Random,
) -> None:
    """Render emoji packs that are not in the data set into `styles.npz`, concepts as in `captions.json`."""
    concepts = read_json(archive / "captions.json")["concepts"]
    index = {concept["name"]: i for i, concept in enumerate(concepts)}
    pixels, owners = [], []
    found = match_icons(node_modules, EMOJI_PACKS, load_concepts(node_modules))
    for pack_name, icons in found.items():
        pack = IconPack(node_modules, pack_name)
        for name in sorted(icons.keys() & index.keys()):
            for icon in icons[name]:
                pixels.append(render(pack.svg(icon, random_color(rng)), SIZE))
                owners.append(index[name])
    np.savez(archive / "styles.npz", pixels=np.stack(pixels), concept=owners)
    print(f"{len(pixels)} more drawings of emoji")


def captions_of(
    name: str,
    keywords: list[str],
    rng: random.Random,
) -> list[str]:
    """Write the captions of a concept from its name and keywords."""
    texts = [name, f"a photo of a {name}.", f"an icon of {name}"]
    while len(texts) < CAPTIONS_PER_CONCEPT:
        count = min(len(keywords), rng.randrange(1, 5))
        parts = [name, *rng.sample(keywords, count)]
        if rng.random() < 0.5:
            parts = [*parts[1:], name]
        texts.append(", ".join(parts))
    return texts


@torch.no_grad()
def encode_sentences(
    folder: Path, texts: list[str], batch_size: int = 256
) -> np.ndarray:
    """Return the mean-pooled unit embeddings (n, 384) float16 of a frozen encoder such as MiniLM."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    embeddings = np.zeros((len(texts), model.config.hidden_size), np.float16)
    options = {
        "padding": True,
        "truncation": True,
        "max_length": 48,
    }
    for start in tqdm(range(0, len(texts), batch_size), desc="encode"):
        rows = order[start : start + batch_size]
        sentences = [texts[i] for i in rows]
        batch = tokenizer(sentences, return_tensors="pt", **options)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = (hidden.float() * mask).sum(1) / mask.sum(1)
        embeddings[rows] = F.normalize(pooled, dim=-1).numpy()
    return embeddings


def read_nouns(path: Path, rng: random.Random) -> list[str]:
    """Read nouns and their glosses from WordNet's `data.noun`."""
    texts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fields, _, gloss = line.partition(" | ")
        word = "" if line.startswith("  ") else fields.split()[4].replace("_", " ")
        if word[:1].islower():
            texts.append(word)
            texts.append(f"{word}, {gloss.split(';')[0].strip()}".lower())
    rng.shuffle(texts)
    return texts[:NOUNS]


def pack_texts(args: argparse.Namespace, rng: random.Random) -> None:
    """Encode captions of emoji and icons, and texts for the text tower alone, into `texts.npz`."""
    archive = args.archive
    emoji = [
        text
        for concept in read_json(archive / "captions.json")["concepts"]
        for text in captions_of(concept["name"], concept["keywords"], rng)
    ]
    icons = [
        text
        for name in read_json(archive / "icons.json")
        for text in (name, f"an icon of {name}")
    ]
    class_texts = [
        text
        for label, texts in read_json(EMOJI_LT / "descriptions.json").items()
        for text in (label, f"a photo of a {label}.", *texts)
    ]
    nouns = read_nouns(args.dictionary, rng) if args.dictionary else []
    texts = emoji + icons + list(dict.fromkeys(class_texts + nouns))
    embeddings = encode_sentences(args.sentence_encoder, texts)
    np.savez(archive / "texts.npz", embeddings=embeddings)
    layout = {
        "emoji": len(emoji),
        "icon": len(icons),
        "per_emoji": CAPTIONS_PER_CONCEPT,
        "per_icon": 2,
        "texts": texts,
    }
    (archive / "texts.json").write_text(json.dumps(layout), encoding="utf-8")
    print(f"{len(texts)} texts")


def main() -> None:
    """Pack the pretraining data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--cache",
        type=Path,
        required=True,
        help="folder for the npm packages",
    )
    add(
        "--archive",
        type=Path,
        required=True,
        help="folder with emoji.npz",
    )
    add(
        "--sentence-encoder",
        type=Path,
        required=True,
        help="folder of a BERT encoder",
    )
    add("--dictionary", type=Path, help="WordNet's data.noun")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of colours, captions and nouns",
    )
    args = parser.parse_args()
    node_modules = fetch(args.cache)
    pack_icons(args.archive, node_modules, random.Random(args.seed))
    pack_more_styles(args.archive, node_modules, random.Random(args.seed))
    pack_texts(args, random.Random(args.seed))


if __name__ == "__main__":
    main()
