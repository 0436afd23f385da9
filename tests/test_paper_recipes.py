# SPDX-License-Identifier: Apache-2.0
"""The recipes of `benchmarks/paper`: data prepared from files of the published form, and a dry run of each."""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from benchmarks.paper import prepare
from peft_sage.command_line import CommandLineParser
from tests.conftest import byte_tokenizer, tiny_clip


ROOT = Path(__file__).parents[1]
# As they stand in the files, with the second and the third class of one name.
GLOSSES = """  1 This software and database is being provided to you
01440764 05 n 02 tench 0 Tinca_tinca 0 002 @ 01439121 n 0000 | freshwater dace-like game fish  \n\
03773504 06 n 01 missile 0 003 @ 04565375 n 0000 | a rocket carrying a warhead; "the missile was launched"  \n\
04008634 06 n 02 projectile 0 missile 0 003 @ 04565375 n 0000 | a weapon that is forcibly thrown  \n"""
IMAGENET = "n01440764 tench\nn03773504 missile\nn04008634 missile\n"
SPECIES = [
    {"id": 1, "name": "Bubo bubo", "family": "Strigidae", "order": "B", "class": "A"},
    {"id": 0, "name": "Bos taurus", "family": "Bovidae", "order": "C", "class": "M"},
]


def draw(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(label)
    pixels = rng.integers(0, 255, size=(24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def archive(path, name, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(f"folder/{name}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def prepared(folder, name, *flags):
    output = folder / "data" / name
    images = ["--images", str(folder / "images"), "--output", str(output)]
    prepare.main([name, *images, *flags])

    def texts(file):
        return json.loads((output / f"{file}.json").read_text())

    return texts


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The lists of ImageNet-LT for a few images of three classes, and the images."""
    folder = tmp_path_factory.mktemp("imagenet")
    sources = folder / "data" / "imagenet_lt" / "sources"
    archive(sources / "WNdb-3.0.tar.gz", "data.noun", GLOSSES.encode())
    (sources / "ImageNet_LT_classnames.txt").write_text(IMAGENET)
    for split, place, counts in (
        ("train", "train", (6, 3, 1)),
        ("test", "val", (2, 2, 2)),
    ):
        lines = []
        for label, line in enumerate(IMAGENET.splitlines()):
            for i in range(counts[label]):
                path = f"{place}/{line.split()[0]}/{i}.JPEG"
                draw(folder / "images" / path, label)
                lines.append(f"{path} {label}\n")
        (sources / f"ImageNet_LT_{split}.txt").write_text("".join(lines))
    return folder


def test_what_is_not_the_benchmark_is_refused(imagenet):
    with pytest.raises(ValueError, match=r"\(10, 6, 3\) .* published are \(115846"):
        prepared(imagenet, "imagenet_lt")
    image = imagenet / "images" / "train" / "n01440764" / "0.JPEG"
    benchmark = prepare.imagenet_lt(imagenet / "data" / "imagenet_lt" / "sources")
    try:
        image.rename(image.with_suffix(".away"))
        with pytest.raises(ValueError, match="lacks 1 of 10 train images.*0.JPEG'"):
            prepare.write(benchmark, imagenet / "images", imagenet / "new", False)
    finally:
        image.with_suffix(".away").rename(image)
    assert not (imagenet / "new").exists()


def test_imagenet_has_the_definitions_of_wordnet(imagenet):
    texts = prepared(imagenet, "imagenet_lt", "--partial")
    fish = "a photo of a tench, freshwater dace-like game fish."
    rocket = "a photo of a missile, a rocket carrying a warhead."
    weapon = "a photo of a missile, a weapon that is forcibly thrown."
    assert texts("wordnet") == {
        "tench": ["a photo of a tench.", fish],
        "missile (n03773504)": ["a photo of a missile.", rocket],
        "missile (n04008634)": ["a photo of a missile.", weapon],
    }
    assert texts("names")["missile (n04008634)"] == ["a photo of a missile."]


def test_inaturalist_has_what_the_species_belong_to(tmp_path):
    sources = tmp_path / "data" / "inat2018" / "sources"
    for part in ("train2018", "val2018"):
        files = [f"train_val2018/Aves/{part}{label}.jpg" for label in (0, 1)]
        for label, file in enumerate(files):
            draw(tmp_path / "images" / file, label)
        images = [{"id": 9 - i, "file_name": file} for i, file in enumerate(files)]
        labels = [{"image_id": 9 - i, "category_id": i} for i in (0, 1)]
        content = json.dumps({"images": images, "annotations": labels})
        archive(sources / f"{part}.json.tar.gz", f"{part}.json", content.encode())
    species = json.dumps(SPECIES).encode()
    archive(sources / "categories.json.tar.gz", "categories.json", species)
    texts = prepared(tmp_path, "inat2018", "--partial")
    assert texts("taxonomy")["Bubo bubo"] == [
        "a photo of a Bubo bubo.",
        "a photo of a Bubo bubo, a species of the family Strigidae, order B, class A.",
    ]
    path = str(tmp_path / "data" / "inat2018" / "test.parquet")
    data = datasets.load_dataset("parquet", data_files=path, split="train")
    assert [Path(image).name for image in data["image"]] == [
        "val20180.jpg",
        "val20181.jpg",
    ]
    assert data["label"] == [0, 1]
    assert data.features["label"].names == ["Bos taurus", "Bubo bubo"]


@pytest.fixture(scope="module")
def example():
    """`examples/finetune.py` as a module."""
    path = ROOT / "examples" / "finetune.py"
    spec = importlib.util.spec_from_file_location("paper_finetune", path)
    # Trainer pickles its arguments, and their class has to be found.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["sage", "lift"])
def test_dry_run(method, imagenet, example, tmp_path):
    """The recipe, but for the model, the length, and what only a GPU can do."""
    prepared(imagenet, "imagenet_lt", "--partial")
    data = imagenet / "data" / "imagenet_lt"
    tiny_clip().save_pretrained(tmp_path / "clip")
    byte_tokenizer().save_pretrained(tmp_path / "clip")
    size = {"size": {"shortest_edge": 16}, "crop_size": 16}
    CLIPImageProcessorPil(**size).save_pretrained(tmp_path / "clip")
    config = ROOT / "benchmarks" / "paper" / f"{method}.yaml"
    flags = f"--config {config} --dataset {data} --descriptions {data}/wordnet.json"
    flags += f" --model {tmp_path}/clip --r 4 --output-dir {tmp_path}/run"
    flags += " --epochs 1 --batch-size 4 --fp16 False --use_cpu True"
    kinds = example.DataArguments, example.ModelArguments, example.RunArguments
    results = example.finetune(*CommandLineParser(kinds, "").parse(flags.split()))
    assert results.class_counts == [6, 3, 1] and results.trained.macro is not None
    assert results.kept_epoch is None  # the last one
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    guided = [name for name in weights if "guidance" in name]
    assert bool(guided) == (method == "sage")


def test_a_download_is_checked_and_whole(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("a 0\n")
    url = (tmp_path / "list.txt").as_uri()
    sources = tmp_path / "sources"
    monkeypatch.setitem(prepare.CHECKSUMS, "checked.txt", "0" * 64)
    with pytest.raises(ValueError, match="not the file that was published"):
        prepare.download(url, sources, "checked.txt")
    assert not list(sources.iterdir())
    path = prepare.download(url, sources, "other.txt")
    assert prepare.read_list(path) == [("a", 0)]
    (tmp_path / "list.txt").unlink()
    assert prepare.download(url, sources, "other.txt") == path  # there already
