# SPDX-License-Identifier: Apache-2.0
"""Emoji concepts of the Unicode standard, and drawings of them from permissively licensed icon packs."""

import json
import re
import shutil
import subprocess
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


HERE = Path(__file__).parent
#: Side of the images in pixels.
SIZE = 48
# Apple's and Facebook's drawings may not be redistributed and are never used.
VENDORS = (
    "noto",
    "noto-v1",
    "fluent-emoji",
    "fluent-emoji-flat",
    "fluent-emoji-high-contrast",
)
# Share-alike (CC-BY-SA-4.0): never shipped, never trained on, rendered on request as unseen drawing styles.
UNSEEN_STYLES = ("openmoji", "emojione-v1")

# No classes: flags, keycaps, letters, shapes and the standard's catch-all groups.
DROPPED_SUBGROUPS = (
    "family",
    "skin-tone",
    "hair-style",
    "other-object",
    "place-other",
    "flag",
    "country-flag",
    "subdivision-flag",
    "keycap",
    "alphanum",
    "geometric",
    "other-symbol",
    "person-symbol",
)
# Unicode's subgroup names, written for sorting, as noun phrases.
CLASS_NAMES = json.loads((HERE / "names.json").read_text(encoding="utf-8"))


@dataclass
class Concept:
    """One thing that is drawn, with all its gender and direction variants.

    Args:
        name: Name in the Unicode standard, of the gender-neutral variant if there is one.
        subgroup: Subgroup in the Unicode standard.
        codes: Code point sequences of its variants: capitals, joined by "-", without U+FE0F.
    """

    name: str
    subgroup: str
    codes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name of the concept's class."""
        return CLASS_NAMES.get(self.subgroup, self.subgroup.replace("-", " "))


def fetch(cache: Path) -> Path:
    """Install the npm packages into `cache` and return its `node_modules` folder."""
    cache.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "package.json", cache)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(command, cwd=cache, check=True)
    return cache / "node_modules"


def mentions(text: str, name: str) -> bool:
    """Whether `text` contains `name` as whole words."""
    pattern = rf"(?<!\w){re.escape(name.lower())}(?!\w)"
    return re.search(pattern, text.lower()) is not None


def canonical(hexcode: str) -> str:
    """Return a code point sequence in capitals, without the variation selector."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def neutral(code: str) -> str:
    """Return the code of the gender-neutral variant in the default direction."""
    for suffix in ("-200D-2640", "-200D-2642", "-200D-27A1"):
        code = code.replace(suffix, "")
    return re.sub("^1F46[89]-200D", "1F9D1-200D", code)


def load_concepts(node_modules: Path) -> list[Concept]:
    """Read the emoji of the classes, in the standard's order; variants are merged, as is "cat face"."""
    data = _load(node_modules / "emojibase-data/en/data.json")
    subgroups = _load(node_modules / "emojibase-data/meta/groups.json")["subgroups"]
    entries = [entry for entry in data if "subgroup" in entry]
    labels = {canonical(entry["hexcode"]): entry["label"] for entry in entries}
    in_subgroup = {(entry["label"], entry["subgroup"]) for entry in entries}
    concepts: dict[tuple[str, str], Concept] = {}
    for entry in sorted(entries, key=lambda entry: entry["order"]):
        code = canonical(entry["hexcode"])
        subgroup = subgroups[str(entry["subgroup"])]
        name = labels.get(neutral(code), entry["label"]).replace(":", " with")
        animal = name.removesuffix(" face")
        if subgroup.startswith("animal") and (animal, entry["subgroup"]) in in_subgroup:
            name = animal
        concept = concepts.setdefault((name, subgroup), Concept(name, subgroup))
        concept.codes.append(code)
    return [c for c in concepts.values() if c.subgroup not in DROPPED_SUBGROUPS]


class IconPack:
    """An Iconify pack: `chars` maps code points to icons, `parents` every name or alias to an icon."""

    def __init__(self, node_modules: Path, name: str) -> None:
        folder = node_modules / "@iconify-json" / name
        self._data = _load(folder / "icons.json")
        chars = folder / "chars.json"
        self.chars: dict[str, str] = _load(chars) if chars.exists() else {}
        self.parents = {icon: icon for icon in self._data["icons"]}
        for alias, value in self._data.get("aliases", {}).items():
            if set(value) == {"parent"}:
                self.parents[alias] = value["parent"]

    def svg(self, name: str) -> str:
        """Return an icon as an SVG document, drawn in dark grey unless it has colours of its own."""
        while name not in self._data["icons"]:
            name = self.parents[name]
        icon = self._data["icons"][name]
        box = {"left": 0, "top": 0, "width": 16, "height": 16}
        box = {key: icon.get(key, self._data.get(key, box[key])) for key in box}
        view = " ".join(str(value) for value in box.values())
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view}">{icon["body"].replace("currentColor", "#202020")}</svg>'
        )


def render(svg: str) -> np.ndarray:
    """Render an SVG document, centred on a white square.

    Returns:
        (SIZE, SIZE, 4) uint8: the colours on white, and the alpha that they had.
    """
    _, _, width, height = map(float, svg.split('viewBox="')[1].split('"')[0].split())
    side = "width" if width >= height else "height"
    data = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **{side: SIZE})
    image = Image.open(BytesIO(data)).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    pixels = np.asarray(canvas)
    alpha = pixels[..., 3:].astype(np.float32) / 255
    colours = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.concatenate([colours, pixels[..., 3:]], axis=-1)


def match_icons(
    pack: IconPack, owner: dict[str, str], codes: dict[str, str]
) -> dict[str, set[str]]:
    """Find the icons of a pack for each concept: by code point if the pack has a table, else by name.

    Args:
        pack: The pack.
        owner: Concept names by code.
        codes: Codes by name, from [`codes_by_name`].
    """
    pairs = [(canonical(code), icon) for code, icon in pack.chars.items()]
    if not pairs:
        pairs = [(codes.get(icon.replace("-", ""), ""), icon) for icon in pack.parents]
    icons: dict[str, set[str]] = defaultdict(set)
    for code, icon in pairs:
        if code in owner and icon in pack.parents:
            icons[owner[code]].add(pack.parents[icon])
    return icons


def codes_by_name(node_modules: Path, codes: Iterable[str]) -> dict[str, str]:
    """Map each unambiguous name of an emoji, letters and digits only, to its code; earlier sources win."""
    folder = node_modules / "emojibase-data/en"
    sources: list[list[tuple[str, str]]] = []
    for pack in ("noto", "twemoji", "fluent-emoji-flat"):
        chars = IconPack(node_modules, pack).chars
        sources.append([(slug, code) for code, slug in chars.items()])
    data = _load(folder / "data.json")
    sources.append([(entry["label"], entry["hexcode"]) for entry in data])
    single = [code for code in codes if "-" not in code]
    sources.append([(unicodedata.name(chr(int(c, 16)), ""), c) for c in single])
    for site in ("cldr", "iamcal", "joypixels", "github", "emojibase"):
        for code, names in _load(folder / f"shortcodes/{site}.json").items():
            names = [names] if isinstance(names, str) else names
            sources.append([(name, code) for name in names])
    merged: dict[str, str] = {}
    for source in sources:
        by_name: dict[str, set[str]] = defaultdict(set)
        for name, code in source:
            key = "".join(c for c in name.lower() if c.isalnum())
            if key and canonical(code) in codes:
                by_name[key].add(canonical(code))
        for name, candidates in by_name.items():
            if len(candidates) == 1:
                merged.setdefault(name, next(iter(candidates)))
    return merged


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
