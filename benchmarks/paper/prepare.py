# SPDX-License-Identifier: Apache-2.0
"""Bring ImageNet-LT, Places-LT or iNaturalist 2018 into the form that `examples/finetune.py` reads.

    python -m benchmarks.paper.prepare imagenet_lt --images /data/imagenet

The images are yours to get, in the folders of the official archives; they stay where they are. The lists of images
and classes are downloaded, and are not part of this repository. What is left in `data/NAME`: `train.parquet` and
`test.parquet` (paths and labels), and class descriptions as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value
from tqdm.auto import tqdm


#: The lists of OLTR (Liu et al. 2019, arXiv 1904.05160) as LIFT's authors keep them; the folder states no licence.
LISTS = "https://raw.githubusercontent.com/shijxcs/LIFT/661ead9b78368f05ba79abe4672d63154467f823/datasets"
#: The competition's own annotations and names of species (github.com/visipedia/inat_comp, 2018).
INAT = "https://ml-inat-competition-datasets.s3.amazonaws.com/2018"
#: WordNet 3.0, whose definitions are used; WordNet licence, which permits use with its notice.
WORDNET = "https://wordnetcode.princeton.edu/3.0/WNdb-3.0.tar.gz"
#: SHA-256 of the lists, of those that we have seen.
CHECKSUMS = {
    "ImageNet_LT_test.txt": "d1590191cf8a71fada7b1aaedaa2d139a2aea93ff2f1b755319d0bd8dbaa55d5",
    "ImageNet_LT_classnames.txt": "89e0b642c6697a3a43a06a2bb65f9fefb3ca295ccc5f4ba9ce385f1a3a58c629",
    "Places_LT_train.txt": "726c4871dcbf07ce2f857703bfe32e9a83ffbf52d704239f6d95c4f4f4c247f7",
    "Places_LT_test.txt": "44eee8441c8098c59195465abede425721bc35525d75209f9433b161a6eb37bc",
    "Places_LT_classnames.txt": "bee03ea5431ad49d156f159d24961f8c2787d3b7ac853b962c9cf256cafe50d1",
}
#: Images to train on, images to test on, classes.
SIZES = {
    "imagenet_lt": (115_846, 50_000, 1000),
    "places_lt": (62_500, 36_500, 365),
    "inat2018": (437_513, 24_426, 8142),
}

Images = list[tuple[str, int]]


@dataclass
class Benchmark:
    """What the lists say.

    Attributes:
        splits: "train" and "test", each with the path of every image, relative to the images' folder, and its class.
        class_names: Unique names, in the order of the class indices.
        texts: By name of the JSON file, the descriptions of each class, in that order.
    """

    splits: dict[str, Images]
    class_names: list[str]
    texts: dict[str, list[list[str]]]


def download(url: str, folder: Path, name: str) -> Path:
    """Return the file `folder/name`, and fetch it first if it is not there.

    Raises:
        ValueError: If what came is not the file that was published.
    """
    path = folder / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url) as response:
        size = int(response.headers.get("Content-Length") or 0) or None
        with tqdm.wrapattr(response, "read", total=size, desc=name) as body:
            content = body.read()
    if name in CHECKSUMS and hashlib.sha256(content).hexdigest() != CHECKSUMS[name]:
        raise ValueError(
            f"{url} is not the file that was published: its SHA-256 is not {CHECKSUMS[name]}."
        )
    unfinished = path.with_name(f"{name}.part")
    unfinished.write_bytes(content)
    unfinished.rename(path)
    return path


def read_list(path: Path) -> Images:
    """Read lines of the form `train/n01440764/n01440764_190.JPEG 0`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        (image, int(label)) for image, label in (line.rsplit(" ", 1) for line in lines)
    ]


def read_member(archive: Path, name: str) -> bytes:
    """Return the file of that name from a tar archive."""
    with tarfile.open(archive) as tar:
        member = next(
            (member for member in tar if Path(member.name).name == name), None
        )
        if member is None:
            raise ValueError(f"{str(archive)!r} holds no {name!r}.")
        return tar.extractfile(member).read()


def photo_of(name: str) -> str:
    """Return the name in the template that LIFT uses."""
    return f"a photo of a {name.replace('_', ' ')}."


def read_glosses(data_noun: str) -> dict[str, str]:
    """Return the definition of each noun of WordNet by its id, such as "n01440764", without the examples."""
    glosses = {}
    for line in data_noun.splitlines():
        if not line.startswith(" "):  # the licence
            definition = line.split(" | ", 1)[1].split('; "')[0]
            glosses[f"n{line[:8]}"] = definition.strip()
    return glosses


def read_oltr(
    sources: Path, name: str
) -> tuple[dict[str, Images], list[tuple[str, str]]]:
    """Return the splits of ImageNet-LT or Places-LT, and the folder and name of each class."""
    files = {}
    for kind in ("train", "test", "classnames"):
        file = f"{name}_{kind}.txt"
        url = f"{LISTS}/{name}/{'classnames.txt' if kind == 'classnames' else file}"
        files[kind] = download(url, sources, file)
    classes = [
        line.split(" ", 1)
        for line in files["classnames"].read_text(encoding="utf-8").splitlines()
    ]
    return {split: read_list(files[split]) for split in ("train", "test")}, [
        (id, text) for id, text in classes
    ]


def imagenet_lt(sources: Path) -> Benchmark:
    """ImageNet-LT, with the definitions of WordNet, from which ImageNet takes its classes."""
    splits, classes = read_oltr(sources, "ImageNet_LT")
    glosses = read_glosses(
        read_member(download(WORDNET, sources, "WNdb-3.0.tar.gz"), "data.noun").decode()
    )
    seen = [text for _, text in classes]
    # Two pairs of classes share a name.
    names = [
        text if seen.count(text) == 1 else f"{text} ({id})" for id, text in classes
    ]
    photos = [photo_of(text) for _, text in classes]
    defined = [f"a photo of a {text}, {glosses[id]}." for id, text in classes]
    texts = {
        "names": [[photo] for photo in photos],
        "wordnet": [list(pair) for pair in zip(photos, defined, strict=True)],
    }
    return Benchmark(splits, names, texts)


def places_lt(sources: Path) -> Benchmark:
    """Places-LT, with its class names: no descriptions with a licence are known to us."""
    splits, classes = read_oltr(sources, "Places_LT")
    return Benchmark(
        splits,
        [text for _, text in classes],
        {"names": [[photo_of(text)] for _, text in classes]},
    )


def inat2018(sources: Path) -> Benchmark:
    """iNaturalist 2018, with the names of the species and of what they belong to."""
    splits = {}
    for split, part in (("train", "train2018"), ("test", "val2018")):
        archive = download(f"{INAT}/{part}.json.tar.gz", sources, f"{part}.json.tar.gz")
        annotations: dict[str, Any] = json.loads(read_member(archive, f"{part}.json"))
        files = {image["id"]: image["file_name"] for image in annotations["images"]}
        splits[split] = [
            (files[a["image_id"]], a["category_id"]) for a in annotations["annotations"]
        ]
    archive = download(
        f"{INAT}/categories.json.tar.gz", sources, "categories.json.tar.gz"
    )
    species = sorted(
        json.loads(read_member(archive, "categories.json")),
        key=lambda entry: entry["id"],
    )
    photos = [photo_of(entry["name"]) for entry in species]
    placed = [
        f"a photo of a {entry['name']}, a species of the family {entry['family']}, order {entry['order']}, "
        f"class {entry['class']}."
        for entry in species
    ]
    texts = {
        "names": [[photo] for photo in photos],
        "taxonomy": [list(pair) for pair in zip(photos, placed, strict=True)],
    }
    return Benchmark(splits, [entry["name"] for entry in species], texts)


BENCHMARKS = {"imagenet_lt": imagenet_lt, "places_lt": places_lt, "inat2018": inat2018}


def write(
    benchmark: Benchmark, images: Path, output: Path, partial: bool
) -> dict[str, int]:
    """Write the data set and its descriptions.

    Args:
        benchmark: What the lists say.
        images: The folder of the images.
        output: Where to write.
        partial: Whether images may be missing; they are then left out.

    Returns:
        The number of images of each split.

    Raises:
        ValueError: If an image is missing.
    """
    features = Features(
        {"image": Value("string"), "label": ClassLabel(names=benchmark.class_names)}
    )
    tables = {}
    for split, listed in benchmark.splits.items():
        found = [
            (str(images / path), label)
            for path, label in tqdm(listed, desc=f"looking for {split} images")
            if (images / path).is_file()
        ]
        if len(found) < len(listed) and not partial:
            missing = next(path for path, _ in listed if not (images / path).is_file())
            raise ValueError(
                f"`--images` {str(images)!r} lacks {len(listed) - len(found):,} of {len(listed):,} {split} images, "
                f"such as {missing!r}."
            )
        if not found:
            raise ValueError(
                f"`--images` {str(images)!r} holds none of the {split} images, such as {listed[0][0]!r}."
            )
        columns = {
            "image": [path for path, _ in found],
            "label": [label for _, label in found],
        }
        tables[split] = Dataset.from_dict(columns, features=features)
    output.mkdir(parents=True, exist_ok=True)
    for split, table in tables.items():
        table.to_parquet(str(output / f"{split}.parquet"))
    for name, texts in benchmark.texts.items():
        descriptions = dict(zip(benchmark.class_names, texts, strict=True))
        (output / f"{name}.json").write_text(
            json.dumps(descriptions, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    return {split: len(table) for split, table in tables.items()}


def main(argv: list[str] | None = None) -> None:
    """Run the script with a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(BENCHMARKS))
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="folder with train/ and val/, or train_val2018/",
    )
    parser.add_argument("--output", type=Path, help="default: data/NAME")
    parser.add_argument(
        "--partial", action="store_true", help="make do with the images that are there"
    )
    args = parser.parse_args(argv)
    output = args.output or Path("data", args.name)
    benchmark = BENCHMARKS[args.name](output / "sources")
    sizes = (
        len(benchmark.splits["train"]),
        len(benchmark.splits["test"]),
        len(benchmark.class_names),
    )
    if sizes != SIZES[args.name] and not args.partial:
        raise ValueError(
            f"The lists in {str(output / 'sources')!r} have {sizes} train images, test images and "
            f"classes; published are {SIZES[args.name]}."
        )
    for split, count in write(
        benchmark, args.images.resolve(), output, args.partial
    ).items():
        print(f"{output / split}.parquet: {count:,} images")


if __name__ == "__main__":
    main()
