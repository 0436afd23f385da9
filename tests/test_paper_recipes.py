# SPDX-License-Identifier: Apache-2.0
"""The recipes of `benchmarks/paper`: the page's snippets on files of the published form, and a dry run of each."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from peft_sage.command_line import CommandLineParser
from peft_sage.data import load_images
from tests.conftest import byte_tokenizer, tiny_clip
from tests.test_docs import snippets


ROOT = Path(__file__).parents[1]
PAGE = "benchmarks/paper/README.md"
# As they stand in the files, with the second and the third class of one name.
GLOSSES = """  1 This software and database is being provided to you
01440764 05 n 02 tench 0 Tinca_tinca 0 002 @ 01439121 n 0000 | freshwater dace-like game fish  \n\
03773504 06 n 01 missile 0 003 @ 04565375 n 0000 | a rocket carrying a warhead; "the missile was launched"  \n\
04008634 06 n 02 projectile 0 missile 0 003 @ 04565375 n 0000 | a weapon that is forcibly thrown  \n"""
CLASSES = "n01440764 tench\nn03773504 missile\nn04008634 missile\n"
SPECIES = [
    {"id": 1, "name": "Bubo bubo", "family": "Strigidae", "order": "B", "class": "A"},
    {"id": 0, "name": "Bos taurus", "family": "Bovidae", "order": "C", "class": "M"},
]


def draw(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), (90 * label, 40, 9)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the page's snippets leave of the lists, for a few images."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "data.noun").write_text(GLOSSES)
    (folder / "classnames.txt").write_text(CLASSES)
    for split, place, counts in (
        ("train", "train", (6, 3, 1)),
        ("test", "val", (2, 2, 2)),
    ):
        lines = []
        for label, line in enumerate(CLASSES.splitlines()):
            for i in range(counts[label]):
                path = f"{place}/{line.split()[0]}/{i}.JPEG"
                draw(folder / "imagenet" / path, label)
                lines.append(f"{path} {label}\n")
        (folder / f"ImageNet_LT_{split}.txt").write_text("".join(lines))
    (folder / "categories.json").write_text(json.dumps(SPECIES))
    for part in ("train2018", "val2018"):
        files = [f"train_val2018/Aves/{part}{label}.jpg" for label in (0, 1)]
        for label, file in enumerate(files):
            draw(folder / "inaturalist" / file, label)
        images = [{"id": 9 - i, "file_name": file} for i, file in enumerate(files)]
        labels = [{"image_id": 9 - i, "category_id": i} for i in (0, 1)]
        content = json.dumps({"images": images, "annotations": labels})
        (folder / f"{part}.json").write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(snippets(PAGE), PAGE, "exec"), {})
    return folder / "data"


def test_imagenet_has_the_definitions_of_wordnet(data):
    photos = load_images(
        data / "imagenet_lt", descriptions=data / "imagenet_lt" / "wordnet.json"
    )
    fish = "a photo of a tench, freshwater dace-like game fish."
    rocket = "a photo of a missile, a rocket carrying a warhead."
    weapon = "a photo of a missile, a weapon that is forcibly thrown."
    assert photos.texts == {
        "tench": ["a photo of a tench.", fish],
        "missile (n03773504)": ["a photo of a missile.", rocket],
        "missile (n04008634)": ["a photo of a missile.", weapon],
    }
    names = json.loads((data / "imagenet_lt" / "names.json").read_text())
    assert names["missile (n04008634)"] == "a photo of a missile."
    for image in photos.train:
        name = photos.class_names[image["label"]]
        folder = {"tench": "n01440764"}.get(name, name[9:-1])
        assert Path(image["file"]).parts[-2] == folder


def test_inaturalist_has_what_the_species_belong_to(data):
    folder = data / "inat2018"
    photos = load_images(folder, descriptions=folder / "taxonomy.json")
    assert photos.texts["Bubo bubo"] == [
        "a photo of a Bubo bubo.",
        "a photo of a Bubo bubo, a species of the family Strigidae, order B, class A.",
    ]
    found = {Path(image["file"]).name: image["label"] for image in photos.test}
    labels = [photos.class_names.index(name) for name in ("Bos taurus", "Bubo bubo")]
    assert found == dict(zip(("val20180.jpg", "val20181.jpg"), labels, strict=True))


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
def test_dry_run(method, data, example, tmp_path):
    """The recipe, but for the model, the length, and what only a GPU can do."""
    folder = data / "imagenet_lt"
    tiny_clip().save_pretrained(tmp_path / "clip")
    byte_tokenizer().save_pretrained(tmp_path / "clip")
    size = {"size": {"shortest_edge": 16}, "crop_size": 16}
    CLIPImageProcessorPil(**size).save_pretrained(tmp_path / "clip")
    config = ROOT / "benchmarks" / "paper" / f"{method}.yaml"
    flags = f"--config {config} --dataset {folder} --descriptions {folder}/wordnet.json"
    flags += f" --model {tmp_path}/clip --r 4 --output-dir {tmp_path}/run"
    flags += " --epochs 1 --batch-size 4 --fp16 False --use_cpu True"
    kinds = example.DataArguments, example.ModelArguments, example.RunArguments
    results = example.finetune(*CommandLineParser(kinds, "").parse(flags.split()))
    assert sorted(results.class_counts) == [1, 3, 6]
    assert results.trained.macro is not None
    assert results.kept_epoch is None  # the last one
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    guided = [name for name in weights if "guidance" in name]
    assert bool(guided) == (method == "sage")
