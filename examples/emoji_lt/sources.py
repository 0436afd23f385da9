# SPDX-License-Identifier: Apache-2.0
"""Emoji concepts of the Unicode standard and the drawings of them in permissively licensed icon packs."""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image


# Apple's and Facebook's drawings may not be redistributed and are never used.
VENDORS = (
    "noto",
    "noto-v1",
    "fluent-emoji",
    "fluent-emoji-flat",
    "fluent-emoji-high-contrast",
)
# Other makers, whom a model may be pretrained on: the data set shows drawings that such a model has never seen.
PRETRAINING_VENDORS = ("twemoji", "emojione", "fxemoji")
# Share-alike (CC-BY-SA-4.0): never shipped, never trained on, rendered on request as a test of unseen drawing styles.
UNSEEN_STYLES = ("openmoji", "emojione-v1")

# Clutter for scenes, never classes: flags, keycaps, letters, shapes and the catch-all groups of the standard.
DISTRACTOR_SUBGROUPS = (
    "flag",
    "country-flag",
    "subdivision-flag",
    "keycap",
    "alphanum",
    "geometric",
    "other-symbol",
    "person-symbol",
)
DROPPED_SUBGROUPS = (
    "family",
    "skin-tone",
    "hair-style",
    "other-object",
    "place-other",
    *DISTRACTOR_SUBGROUPS,
)

# Unicode's subgroup names are written for sorting; these read as a noun phrase.
CLASS_NAMES = {
    "face-smiling": "smiling face",
    "face-affection": "affectionate face",
    "face-tongue": "face with tongue",
    "face-hand": "face with hand",
    "face-neutral-skeptical": "neutral or skeptical face",
    "face-sleepy": "sleepy face",
    "face-unwell": "unwell face",
    "face-hat": "face with hat",
    "face-glasses": "face with glasses",
    "face-concerned": "concerned face",
    "face-negative": "negative face",
    "face-costume": "costume face",
    "cat-face": "cat face",
    "monkey-face": "monkey face",
    "emotion": "emotion sign",
    "hand-fingers-open": "hand with open fingers",
    "hand-fingers-partial": "hand with some fingers extended",
    "hand-single-finger": "hand with a single finger",
    "hand-fingers-closed": "fist",
    "hand-prop": "hand holding an object",
    "body-parts": "body part",
    "person-gesture": "gesturing person",
    "person-role": "person in an occupation",
    "person-fantasy": "fantasy person",
    "person-activity": "active person",
    "person-sport": "person doing sport",
    "person-resting": "resting person",
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-amphibian": "amphibian",
    "animal-reptile": "reptile",
    "animal-marine": "marine animal",
    "animal-bug": "bug",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "prepared food",
    "food-asian": "asian food",
    "food-sweet": "sweet food",
    "place-map": "map",
    "place-geographic": "landscape",
    "place-building": "building",
    "place-religious": "religious building",
    "transport-ground": "ground vehicle",
    "transport-water": "water vehicle",
    "transport-air": "air vehicle",
    "hotel": "hotel object",
    "time": "timepiece",
    "sky-weather": "sky and weather",
    "event": "festive event",
    "award-medal": "award medal",
    "arts-crafts": "arts and crafts",
    "sound": "sound device",
    "light-video": "light and video device",
    "book-paper": "book or paper",
    "mail": "mail item",
    "writing": "writing tool",
    "office": "office item",
    "science": "science instrument",
    "medical": "medical item",
    "household": "household item",
    "transport-sign": "transport sign",
    "warning": "prohibition or warning sign",
    "religion": "religious symbol",
    "zodiac": "zodiac sign",
    "av-symbol": "media control symbol",
    "gender": "gender sign",
    "math": "mathematical symbol",
    "punctuation": "punctuation mark",
    "currency": "currency symbol",
    "hands": "pair of hands",
    "lock": "lock or key",
    "game": "game or toy",
    "sport": "sports equipment",
}

# Firefox OS names that no standard name covers; every one was checked on a picture sheet.
FXEMOJI_NAMES = {
    "2hearts": "1F495",
    "bow": "",
    "down": "1F447",
    "pout": "1F64E",
    "pouting": "1F621",
    "sunglasses": "1F60E",
    "wave": "1F30A",
    "americasglobe": "1F30E",
    "asiaaustraliaglobe": "1F30F",
    "europeafricaglobe": "1F30D",
    "banknotedollar": "1F4B5",
    "banknoteeuro": "1F4B6",
    "banknotepound": "1F4B7",
    "banknoteyen": "1F4B4",
    "bellcancellation": "1F515",
    "bookmarktab": "1F4D1",
    "bouquetofflowers": "1F490",
    "bunny": "1F430",
    "bunnyside": "1F407",
    "bunnyears": "1F46F",
    "cellphone": "1F4F1",
    "chartdownwardstrend": "1F4C9",
    "chartupwardstrend": "1F4C8",
    "chilipepper": "1F336",
    "closedmailboxlowered": "1F4EA",
    "closedmailboxraised": "1F4EB",
    "confetti": "1F38A",
    "constructionsign": "1F6A7",
    "controlknob": "1F39B",
    "cop": "1F46E",
    "crying": "1F622",
    "dragonhead": "1F432",
    "earofmaize": "1F33D",
    "evergreen": "1F332",
    "fallingleaf": "1F342",
    "fishcakeswirl": "1F365",
    "forkknife": "1F374",
    "frontfacingchick": "1F425",
    "hampster": "1F439",
    "handheldvideocamera": "1F4F9",
    "headmassage": "1F486",
    "heels": "1F460",
    "leaffluttering": "1F343",
    "leftmagnifyingglass": "1F50D",
    "lockandkey": "1F510",
    "loudlycrying": "1F62D",
    "lowerleftpen": "1F58A",
    "mansshirt": "1F455",
    "mensshoe": "1F45E",
    "meridianglobe": "1F310",
    "monkeyhear": "1F649",
    "monkeysee": "1F648",
    "monkeyspeak": "1F64A",
    "mouth": "1F444",
    "notebookdecorativecover": "1F4D4",
    "openmailboxlowered": "1F4ED",
    "openmailboxraised": "1F4EC",
    "pigsnout": "1F43D",
    "pinkwallet": "1F45B",
    "present": "1F381",
    "rightmagnifyingglass": "1F50E",
    "ringingbell": "1F514",
    "sandals": "1F461",
    "screamfear": "1F631",
    "sleuthspy": "1F575",
    "snowmountains": "1F3D4",
    "speaker3soundwaves": "1F50A",
    "speakercancellation": "1F507",
    "speakeronesoundwave": "1F509",
    "speechbubble": "1F4AC",
    "spurtingwhale": "1F433",
    "studiomic": "1F399",
    "tennisball": "1F3BE",
    "thoughtbaloon": "1F4AD",
    "tie": "1F454",
    "tongueout": "1F61B",
    "videocasette": "1F4FC",
    "waningbibbousmoon": "1F316",
    "waving": "1F44B",
    "womansshirt": "1F45A",
}


@dataclass
class Concept:
    """One thing that is drawn: every gender and facing variant of it, by every vendor.

    Args:
        name: Name in the Unicode standard, of the gender-neutral variant where there is one.
        subgroup: Subgroup in the Unicode standard.
        codes: Code point sequences of its variants, in capitals, joined by "-", without U+FE0F.
        keywords: Search keywords, never the name of the subgroup.
    """

    name: str
    subgroup: str
    codes: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name of the class that the concept belongs to."""
        return CLASS_NAMES.get(self.subgroup, self.subgroup.replace("-", " "))


def canonical(hexcode: str) -> str:
    """Returns a code point sequence in capitals and without the variation selector."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def neutral(code: str) -> str:
    """Returns the code of the gender-neutral variant that faces as drawn."""
    for suffix in ("-200D-2640", "-200D-2642", "-200D-27A1"):
        code = code.replace(suffix, "")
    for adult in ("1F468-200D", "1F469-200D"):
        if code.startswith(adult):
            code = "1F9D1-200D" + code[len(adult) :]
    return code


def load_concepts(node_modules: Path) -> list[Concept]:
    """Reads the emoji of the standard and merges gender and facing variants and "cat" with "cat face".

    Args:
        node_modules: Folder with the npm packages.

    Returns:
        Concepts in the order of the standard, those of dropped subgroups included.
    """
    data = _load(node_modules / "emojibase-data/en/data.json")
    subgroups = _load(node_modules / "emojibase-data/meta/groups.json")["subgroups"]
    library = {
        canonical("-".join(f"{ord(c):X}" for c in emoji)): words
        for emoji, words in _load(
            node_modules / "emojilib/dist/emoji-en-US.json"
        ).items()
    }
    entries = [entry for entry in data if "subgroup" in entry]
    labels = {canonical(entry["hexcode"]): entry["label"] for entry in entries}
    in_subgroup = {(entry["label"], entry["subgroup"]) for entry in entries}
    concepts: dict[tuple[str, str], Concept] = {}
    for entry in sorted(entries, key=lambda entry: entry["order"]):
        code = canonical(entry["hexcode"])
        subgroup = subgroups[str(entry["subgroup"])]
        name = labels.get(neutral(code), entry["label"]).replace(":", " with")
        if (
            subgroup.startswith("animal")
            and (name.removesuffix(" face"), entry["subgroup"]) in in_subgroup
        ):
            name = name.removesuffix(" face")
        concept = concepts.setdefault((name, subgroup), Concept(name, subgroup))
        concept.codes.append(code)
        words = [
            *entry.get("tags", []),
            *(word.replace("_", " ") for word in library.get(code, [])[1:]),
        ]
        banned = {subgroup, concept.label, concept.name, *subgroup.split("-")}
        concept.keywords += [
            w.lower()
            for w in words
            if w.lower() not in banned and w.lower() not in concept.keywords
        ]
    return list(concepts.values())


class IconPack:
    """An Iconify pack: SVG bodies by name.

    Args:
        node_modules: Folder with the npm packages.
        name: Name of the pack within `@iconify-json`.
    """

    def __init__(self, node_modules: Path, name: str) -> None:
        self.name = name
        folder = node_modules / "@iconify-json" / name
        self._data = _load(folder / "icons.json")
        chars = folder / "chars.json"
        self.chars: dict[str, str] = _load(chars) if chars.exists() else {}
        plain = {
            alias: v["parent"]
            for alias, v in self._data.get("aliases", {}).items()
            if set(v) <= {"parent"}
        }
        self.parents: dict[str, str] = {
            **{icon: icon for icon in self._data["icons"]},
            **plain,
        }

    def svg(self, name: str, color: str = "#202020") -> str:
        """Returns the SVG document of an icon; `color` fills what the pack leaves to the page."""
        while name not in self._data["icons"]:
            name = self.parents[name]
        icon = self._data["icons"][name]
        left, top = (icon.get(key, self._data.get(key, 0)) for key in ("left", "top"))
        width, height = (
            icon.get(key, self._data.get(key, 16)) for key in ("width", "height")
        )
        body = icon["body"].replace("currentColor", color)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{body}</svg>'
        )


def render(svg: str, size: int) -> np.ndarray:
    """Renders an SVG document, centred on a transparent square.

    Args:
        svg: SVG document.
        size: Side of the square, in pixels.

    Returns:
        (size, size, 4) uint8 array, red, green, blue and alpha, not premultiplied.
    """
    box = [float(x) for x in svg.split('viewBox="')[1].split('"')[0].split()]
    side = {"width": size} if box[2] >= box[3] else {"height": size}
    image = Image.open(
        BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **side))
    ).convert("RGBA")
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(canvas)


def match_icons(
    node_modules: Path, packs: Iterable[str], concepts: list[Concept]
) -> dict[str, dict[str, list[str]]]:
    """Finds the icons of every concept: by code point where a pack has a table, by name elsewhere.

    Args:
        node_modules: Folder with the npm packages.
        packs: Names of the packs.
        concepts: Concepts to find.

    Returns:
        Icon names by pack and concept name.
    """
    owner = {code: concept.name for concept in concepts for code in concept.codes}
    names = _names_of_codes(node_modules, owner)
    found: dict[str, dict[str, list[str]]] = {}
    for pack_name in packs:
        pack = IconPack(node_modules, pack_name)
        matches: dict[str, set[str]] = defaultdict(set)
        if pack.chars:
            pairs = [(canonical(code), icon) for code, icon in pack.chars.items()]
        else:
            pairs = [(_code_of(icon, names, pack_name), icon) for icon in pack.parents]
        for code, icon in pairs:
            if code in owner and icon in pack.parents:
                matches[owner[code]].add(pack.parents[icon])
        found[pack_name] = {name: sorted(icons) for name, icons in matches.items()}
    return found


def _code_of(icon: str, names: dict[str, str], pack: str) -> str:
    key = icon.replace("-", "")
    if pack == "fxemoji":
        if key in FXEMOJI_NAMES:
            return FXEMOJI_NAMES[key]
        if key not in names and key.endswith("side"):
            key = key.removesuffix("side")
    return names.get(key, "")


def _names_of_codes(node_modules: Path, codes: Iterable[str]) -> dict[str, str]:
    """Maps every unambiguous name of an emoji, letters only, to its code; earlier sources win."""
    codes = set(codes)
    tiers: list[list[tuple[str, str]]] = []
    for pack in ("noto", "twemoji", "fluent-emoji-flat"):
        tiers.append(
            [
                (slug, canonical(code))
                for code, slug in IconPack(node_modules, pack).chars.items()
            ]
        )
    data = _load(node_modules / "emojibase-data/en/data.json")
    tiers.append([(entry["label"], canonical(entry["hexcode"])) for entry in data])
    tiers.append(
        [(unicodedata.name(chr(int(c, 16)), ""), c) for c in codes if "-" not in c]
    )
    for source in ("cldr", "iamcal", "joypixels", "github", "emojibase"):
        table = _load(node_modules / f"emojibase-data/en/shortcodes/{source}.json")
        for code, short in table.items():
            tiers.append(
                [
                    (name, canonical(code))
                    for name in ([short] if isinstance(short, str) else short)
                ]
            )
    merged: dict[str, str] = {}
    for tier in tiers:
        by_name: dict[str, set[str]] = defaultdict(set)
        for name, code in tier:
            key = "".join(c for c in name.lower() if c.isalnum())
            if code in codes:
                by_name[key].add(code)
        for name, candidates in by_name.items():
            if name and len(candidates) == 1:
                merged.setdefault(name, next(iter(candidates)))
    return merged


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
