# SPDX-License-Identifier: Apache-2.0
"""Packs what the tiny CLIP is pretrained on: other makers' emoji of no held-out concept, icons, texts.

    python build_dataset.py --cache CACHE --archive ARCHIVE      # first: emoji.npz and captions.json
    python pretraining_data.py --cache CACHE --archive ARCHIVE --sentence-encoder FOLDER --dictionary data.noun

Icons widen the vocabulary, but what validation and test ask for stays unseen: an icon is dropped if its name holds the
name of a held-out concept, or a word that only held-out concepts have among their names and keywords.
"""

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from build_dataset import fetch, lay_on_white, mentions
from sources import IconPack, load_concepts, match_icons, render
from tqdm import tqdm
from transformers import AutoTokenizer, BertModel


# Pack: (version, what an icon's name must match to be taken). Licences are listed in the data card.
ICON_PACKS = {
    "flat-color-icons": ("1.2.3", ""),
    "fluent-color": ("1.2.21", r"-(48|32)$"),
    "game-icons": ("1.2.4", ""),
    "healthicons": ("1.2.13", r"^(?!.*(outline|24px|negative))"),
    "icon-park": ("1.2.4", ""),
    "marketeq": ("1.2.2", ""),
    "mdi": (
        "1.2.3",
        r"^(?!.*(outline|-off|alpha-|numeric-|arrow|chevron|format-|-box|-circle))",
    ),
    "meteocons": ("1.2.4", r"-fill$"),
    "ph": ("1.2.2", r"-duotone$"),
    "solar": ("1.2.13", r"-bold-duotone$"),
    "streamline-color": ("1.2.2", r"-flat$"),
    "streamline-kameleon-color": ("1.2.2", r"^(?!.*-duo$)"),
    "streamline-plump-color": ("1.2.2", r"-flat$"),
    "streamline-ultimate-color": ("1.2.2", ""),
    "temaki": ("1.2.6", ""),
}
# Packs of emoji: an icon is taken only where its name is that of a concept which is not held out.
EMOJI_PACKS = {"emojione-monotone": "1.2.1", "streamline-emojis": "1.2.4"}
SUFFIXES = {
    "flat",
    "fill",
    "duotone",
    "bold",
    "duo",
    "alt",
    "simple",
    "variant",
    "svgrepo",
    "com",
    "f",
    "m",
}
SIZE = 64
CAPTIONS_PER_CONCEPT = 8


def words(text: str) -> list[str]:
    """Splits a name into lower-case words without digits."""
    return re.findall(r"[a-z]+", text.lower())


COMMON = set(words("a an and at by for from in no of off on or out the to up with"))


def held_out_filter(
    concepts: list[dict], held_out: list[dict]
) -> tuple[set[str], list[str]]:
    """Returns the words that only held-out concepts have, and the names of held-out concepts."""
    known = {
        w for c in concepts for text in (c["name"], *c["keywords"]) for w in words(text)
    }
    secret = {
        w for c in held_out for text in (c["name"], *c["keywords"]) for w in words(text)
    }
    return secret - known - COMMON, [" ".join(words(c["name"])) for c in held_out]


def random_color(rng: random.Random) -> str:
    """Draws a colour that can be seen on white."""
    return f"#{rng.randrange(200):02x}{rng.randrange(200):02x}{rng.randrange(200):02x}"


def pack_icons(archive: Path, node_modules: Path, seed: int) -> None:
    """Renders the icon packs into `icons.npz` and their captions into `icons.json`."""
    rng = random.Random(seed)
    captions = json.loads((archive / "captions.json").read_text(encoding="utf-8"))
    secret_words, secret_names = held_out_filter(
        captions["concepts"], captions["held_out"]
    )
    pixels, owners, names = [], [], {}
    for pack_name, (_, pattern) in ICON_PACKS.items():
        pack = IconPack(node_modules, pack_name)
        for icon in tqdm(
            [i for i in pack.parents if i == pack.parents[i] and re.search(pattern, i)],
            desc=pack_name,
        ):
            name = " ".join(w for w in words(icon) if w not in SUFFIXES)
            if (
                len(name) < 3
                or secret_words & set(words(name))
                or any(mentions(name, s) for s in secret_names)
            ):
                continue
            drawing = lay_on_white(render(pack.svg(icon, random_color(rng)), SIZE))
            if (drawing[..., 3] > 64).mean() > 0.03:
                pixels.append(drawing)
                owners.append(names.setdefault(name, len(names)))
    np.savez(archive / "icons.npz", pixels=np.stack(pixels), concept=np.array(owners))
    (archive / "icons.json").write_text(json.dumps(list(names)), encoding="utf-8")
    print(f"{len(pixels)} icons of {len(names)} names")


def pack_more_styles(archive: Path, node_modules: Path, seed: int) -> None:
    """Renders emoji packs that are not in the data set into `styles.npz`, concepts as in `captions.json`."""
    rng = random.Random(seed)
    captions = json.loads((archive / "captions.json").read_text(encoding="utf-8"))
    index = {c["name"]: i for i, c in enumerate(captions["concepts"])}
    pixels, owners = [], []
    for pack_name, icons in match_icons(
        node_modules, tuple(EMOJI_PACKS), load_concepts(node_modules)
    ).items():
        pack = IconPack(node_modules, pack_name)
        for name in sorted(icons.keys() & index.keys()):
            for icon in icons[name]:
                pixels.append(
                    lay_on_white(render(pack.svg(icon, random_color(rng)), SIZE))
                )
                owners.append(index[name])
    np.savez(archive / "styles.npz", pixels=np.stack(pixels), concept=np.array(owners))
    print(f"{len(pixels)} more drawings of emoji")


def captions_of(name: str, keywords: list[str], rng: random.Random) -> list[str]:
    """Writes the captions of one concept from its name and keywords."""
    texts = [name, f"a photo of a {name}.", f"an icon of {name}"]
    while len(texts) < CAPTIONS_PER_CONCEPT:
        some = (
            rng.sample(keywords, min(len(keywords), rng.randrange(1, 5)))
            if keywords
            else []
        )
        texts.append(
            rng.choice((f"{name}, {', '.join(some)}", f"{', '.join(some)}, {name}"))
            if some
            else name
        )
    return texts


class SentenceEncoder:
    """Mean-pooled, normalised sentence embeddings of a frozen encoder such as MiniLM.

    Args:
        folder: Folder with its configuration, weights and tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = BertModel.from_pretrained(
            folder, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str], batch_size: int = 256) -> np.ndarray:
        """Returns the (len(texts), 384) float16 embeddings of `texts`."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = np.zeros((len(texts), self.model.config.hidden_size), np.float16)
        for start in tqdm(range(0, len(texts), batch_size), desc="encode"):
            rows = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=48,
                return_tensors="pt",
            )
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            pooled = (hidden.float() * mask).sum(1) / mask.sum(1)
            out[rows] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return out


def dictionary_texts(path: Path, limit: int, seed: int) -> list[str]:
    """Reads nouns with their glosses from a WordNet `data.noun` file."""
    texts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        fields, _, gloss = line.partition(" | ")
        word = fields.split()[4].replace("_", " ")
        if not word[0].isupper():
            texts.append(word.lower())
            texts.append(f"{word}, {gloss.split(';')[0].strip()}".lower())
    random.Random(seed).shuffle(texts)
    return texts[:limit]


def pack_texts(
    archive: Path,
    encoder: SentenceEncoder,
    dictionary: Path | None,
    descriptions: Path,
    seed: int,
) -> None:
    """Encodes captions of emoji and icons, and texts that only the text tower learns, into `texts.npz`."""
    rng = random.Random(seed)
    captions = json.loads((archive / "captions.json").read_text(encoding="utf-8"))[
        "concepts"
    ]
    names = json.loads((archive / "icons.json").read_text(encoding="utf-8"))
    groups = [captions_of(c["name"], c["keywords"], rng) for c in captions]
    emoji = [text for group in groups for text in group]
    icon = [text for name in names for text in (name, f"an icon of {name}")]
    classes = json.loads(descriptions.read_text(encoding="utf-8"))
    class_texts = [
        text
        for label, texts in classes.items()
        for text in (label, f"a photo of a {label}.", *texts)
    ]
    extra = list(
        dict.fromkeys(
            class_texts
            + (dictionary_texts(dictionary, 30_000, seed) if dictionary else [])
        )
    )
    everything = emoji + icon + extra
    embeddings = encoder(everything)
    np.savez(archive / "texts.npz", embeddings=embeddings)
    layout = {
        "emoji": len(emoji),
        "icon": len(icon),
        "per_emoji": CAPTIONS_PER_CONCEPT,
        "per_icon": 2,
    }
    (archive / "texts.json").write_text(
        json.dumps({**layout, "texts": everything}), encoding="utf-8"
    )
    print(f"{len(everything)} texts")


def main() -> None:
    """Packs the pretraining data from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder for the npm packages"
    )
    parser.add_argument(
        "--archive",
        type=Path,
        required=True,
        help="folder with emoji.npz, for the results",
    )
    parser.add_argument(
        "--sentence-encoder",
        type=Path,
        required=True,
        help="folder of a BERT sentence encoder",
    )
    parser.add_argument("--dictionary", type=Path, help="WordNet's data.noun")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    packages = {
        f"@iconify-json/{name}": version for name, (version, _) in ICON_PACKS.items()
    }
    packages |= {
        f"@iconify-json/{name}": version for name, version in EMOJI_PACKS.items()
    }
    node_modules = fetch(args.cache, packages)
    pack_icons(args.archive, node_modules, args.seed)
    pack_more_styles(args.archive, node_modules, args.seed)
    descriptions = Path(__file__).parent / "descriptions.json"
    pack_texts(
        args.archive,
        SentenceEncoder(args.sentence_encoder),
        args.dictionary,
        descriptions,
        args.seed,
    )


if __name__ == "__main__":
    main()
