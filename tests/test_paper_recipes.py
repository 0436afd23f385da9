# SPDX-License-Identifier: Apache-2.0
"""The recipes of `benchmarks/paper`: a dry run of each on generated images, and what surrounds them."""

import importlib.util
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from benchmarks.paper import prepare
from benchmarks.paper.recipes import (
    DATA,
    RECIPES,
    REPORTED_PARAMETERS,
    Recipe,
    commands,
    table,
)
from peft_sage import SageClassifier, SageConfig
from peft_sage.command_line import CommandLineParser
from tests.conftest import byte_tokenizer, tiny_clip


ROOT = Path(__file__).parents[1]
PAPER = ROOT / "benchmarks" / "paper"
OVERRIDES = [
    "--epochs",
    "1",
    "--batch-size",
    "4",
    "--fp16",
    "False",
    "--use_cpu",
    "True",
]


#: As they stand in the files, with the second and the third class of one name.
WORDNET = """  1 This software and database is being provided to you
01440764 05 n 02 tench 0 Tinca_tinca 0 002 @ 01439121 n 0000 #m 01440655 n 0000 | freshwater dace-like game fish  \n\
03773504 06 n 01 missile 0 003 @ 04565375 n 0000 | a rocket carrying a warhead; "the missile was launched"  \n\
04008634 06 n 02 projectile 0 missile 0 003 @ 04565375 n 0000 | a weapon that is forcibly thrown  \n"""
IMAGENET = "n01440764 tench\nn03773504 missile\nn04008634 missile\n"
PLACES = "airfield airfield\nairplane_cabin airplane_cabin\n"
SPECIES = [
    {
        "id": 1,
        "name": "Bubo bubo",
        "family": "Strigidae",
        "order": "Strigiformes",
        "class": "Aves",
    },
    {
        "id": 0,
        "name": "Bos taurus",
        "family": "Bovidae",
        "order": "Artiodactyla",
        "class": "Mammalia",
    },
]
TRAIN_COUNTS = (6, 3, 1)


def draw(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(label).integers(
        0, 255, size=(24, 32, 3), dtype=np.uint8
    )
    Image.fromarray(pixels).save(path)


def archive(path, name, content):
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(f"folder/{name}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def listed(classes, root):
    """The lists of OLTR for a few images of each class, which are drawn too."""
    lines = {"train": [], "test": []}
    for split, counts in (("train", TRAIN_COUNTS), ("test", (2, 2, 2))):
        for label, folder in enumerate(classes):
            for i in range(counts[label]):
                path = f"{'train' if split == 'train' else 'val'}/{folder}/{i}.JPEG"
                draw(root / path, label)
                lines[split].append(f"{path} {label}")
    return lines


def make_oltr(folder, key, name, classnames):
    sources = folder / "data" / key / "sources"
    sources.mkdir(parents=True)
    (sources / f"{name}_classnames.txt").write_text(classnames)
    lines = listed(
        [line.split()[0] for line in classnames.splitlines()], folder / "images" / key
    )
    for split, rows in lines.items():
        (sources / f"{name}_{split}.txt").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which the commands work: the data, prepared from files of the published form, and a small CLIP."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    make_oltr(folder, "imagenet_lt", "ImageNet_LT", IMAGENET)
    archive(
        folder / "data/imagenet_lt/sources/WNdb-3.0.tar.gz",
        "data.noun",
        WORDNET.encode(),
    )
    make_oltr(folder, "places_lt", "Places_LT", PLACES)

    sources = folder / "data" / "inat2018" / "sources"
    sources.mkdir(parents=True)
    for part, rows in {"train2018": [0, 0, 0, 1], "val2018": [0, 1]}.items():
        files = [
            f"train_val2018/Aves/{label}/{part}{i}.jpg" for i, label in enumerate(rows)
        ]
        for file, label in zip(files, rows, strict=True):
            draw(folder / "images" / "inat2018" / file, label)
        content = {
            "images": [
                {"id": 100 - i, "file_name": file} for i, file in enumerate(files)
            ],
            "annotations": [
                {"image_id": 100 - i, "category_id": label}
                for i, label in enumerate(rows)
            ],
        }
        archive(
            sources / f"{part}.json.tar.gz",
            f"{part}.json",
            json.dumps(content).encode(),
        )
    archive(
        sources / "categories.json.tar.gz",
        "categories.json",
        json.dumps(SPECIES).encode(),
    )
    for name in prepare.BENCHMARKS:
        images, output = folder / "images" / name, folder / "data" / name
        prepare.main(
            [name, "--images", str(images), "--output", str(output), "--partial"]
        )

    # A folder of the name that the data set has on the Hub, with the same columns.
    cifar = folder / "uoft-cs" / "cifar100"
    cifar.mkdir(parents=True)
    names = ["apple", "aquarium_fish", "baby"]
    features = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)}
    features["coarse_label"] = datasets.Value("int64")
    draw(cifar / "pixels.png", 0)
    image = {"path": None, "bytes": (cifar / "pixels.png").read_bytes()}
    for split, count in (("train", 10), ("test", 2)):
        labels = [label for label in range(3) for _ in range(count)]
        columns = {
            "img": [image] * len(labels),
            "fine_label": labels,
            "coarse_label": [0] * len(labels),
        }
        data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        data.to_parquet(str(cifar / f"{split}-00000-of-00001.parquet"))

    tiny_clip().save_pretrained(folder / "clip")
    byte_tokenizer().save_pretrained(folder / "clip")
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def example():
    """`examples/finetune.py` as a module."""
    path = ROOT / "examples" / "finetune.py"
    spec = importlib.util.spec_from_file_location("paper_finetune", path)
    # Trainer pickles its arguments, and their class has to be found.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(example, flags):
    kinds = example.DataArguments, example.ModelArguments, example.RunArguments
    return CommandLineParser(kinds, "").parse(flags)


@pytest.mark.parametrize("name", ["imagenet_lt_b16_sage", "cifar100_lt_10_b16_lift"])
def test_dry_run(name, project, example, monkeypatch, tmp_path):
    """The recipe's own flags, but for the model, the length, and what only a GPU can do."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    flags = [*recipe.flags, "--model", str(project / "clip"), *OVERRIDES]
    results = example.finetune(*parse(example, flags))
    counts = {"imagenet_lt": [6, 3, 1], "cifar100_lt_10": [10, 3, 1]}[recipe.data]
    assert results.class_counts == counts
    assert results.trained.macro is not None and results.kept_epoch is None

    weights = load_file(project / "runs" / name / "adapter_model.safetensors")
    guidance = [tensor.shape for key, tensor in weights.items() if "guidance" in key]
    assert guidance == ([(3, 16)] if recipe.method == "sage" else [])
    down = [w for key, w in weights.items() if key.endswith("peft_sage_down.weight")]
    assert {len(weight) for weight in down} == {recipe.r}


def test_all_rows_have_the_same_budget_and_commands_that_parse(example, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(example, "check_source", lambda *arguments: None)
    monkeypatch.setattr(
        Path, "is_file", lambda path: path.name != "adapter_config.json"
    )
    for recipe in RECIPES:
        _, model, run = parse(example, [*recipe.flags, "--fp16", "False"])
        epochs = 20 if recipe.data == "inat2018" else 10
        assert (run.per_device_train_batch_size, run.num_train_epochs) == (128, epochs)
        assert (run.augment, run.crop_scale) == ("resized-crop-flip", 0.08)
        assert (run.test_crops, run.load_best_model_at_end, run.seed) == (5, False, 0)
        lift = recipe.method == "lift"
        expected = ("adaptformer", "la") if lift else ("sage", "sage")
        assert (model.method, model.loss, model.last_blocks) == (*expected, None)
        rates = run.optim, run.learning_rate, run.head_learning_rate
        assert not lift or rates == ("sgd", 0.01, 0.01)
        assert run.output_dir == f"runs/{recipe.name}"
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES) == 24


def test_the_readme_has_the_table_and_the_commands():
    readme = (PAPER / "README.md").read_text()
    assert table() in readme and commands() in readme, (
        "copy the output of: python -m benchmarks.paper.recipes"
    )


@pytest.mark.parametrize("data", REPORTED_PARAMETERS)
def test_adapters_have_as_many_parameters_as_lift_reports(data):
    with torch.device("meta"):
        config = CLIPVisionConfig(patch_size=16, projection_dim=512)
        clip = CLIPVisionModelWithProjection(config)
    classifier = SageClassifier(clip, torch.ones(DATA[data].classes, 512))
    config = SageConfig(r=Recipe(data, "b16", "lift").r, guidance_rows=0)
    model = get_peft_model(classifier, config)
    counts = {
        name: p.numel() for name, p in model.named_parameters() if "peft_sage_" in name
    }
    assert sum(counts.values()) == REPORTED_PARAMETERS[data]


def test_what_prepare_writes(project):
    def texts(name):
        return json.loads((project / "data" / f"{name}.json").read_text())

    assert texts("imagenet_lt/wordnet") == {
        "tench": [
            "a photo of a tench.",
            "a photo of a tench, freshwater dace-like game fish.",
        ],
        "missile (n03773504)": [
            "a photo of a missile.",
            "a photo of a missile, a rocket carrying a warhead.",
        ],
        "missile (n04008634)": [
            "a photo of a missile.",
            "a photo of a missile, a weapon that is forcibly thrown.",
        ],
    }
    assert list(texts("imagenet_lt/names").values()) == [
        ["a photo of a tench."],
        *[["a photo of a missile."]] * 2,
    ]
    assert texts("places_lt/names")["airplane_cabin"] == [
        "a photo of a airplane cabin."
    ]
    assert list(texts("inat2018/taxonomy")) == ["Bos taurus", "Bubo bubo"]
    assert texts("inat2018/taxonomy")["Bubo bubo"] == [
        "a photo of a Bubo bubo.",
        "a photo of a Bubo bubo, a species of the family Strigidae, order Strigiformes, class Aves.",
    ]
    data = datasets.load_dataset(
        "parquet", data_files=str(project / "data/inat2018/test.parquet"), split="train"
    )
    assert [Path(path).parts[-3:] for path in data["image"]] == [
        ("Aves", "0", "val20180.jpg"),
        ("Aves", "1", "val20181.jpg"),
    ]
    assert data["label"] == [0, 1] and data.features["label"].names == [
        "Bos taurus",
        "Bubo bubo",
    ]


def test_prepare_refuses_what_is_not_the_benchmark(project, tmp_path):
    shutil.copytree(
        project / "data" / "places_lt" / "sources", tmp_path / "places" / "sources"
    )
    arguments = [
        "places_lt",
        "--images",
        str(project / "images" / "places_lt"),
        "--output",
        str(tmp_path / "places"),
    ]
    with pytest.raises(
        ValueError, match=r"have \(9, 4, 2\) .* published are \(62500, 36500, 365\)"
    ):
        prepare.main(arguments)
    benchmark = prepare.places_lt(tmp_path / "places" / "sources")
    images = tmp_path / "images"
    draw(images / "train" / "airfield" / "0.JPEG", 0)
    with pytest.raises(
        ValueError, match=r"lacks 8 of 9 train images, such as 'train/airfield/1.JPEG'"
    ):
        prepare.write(benchmark, images, tmp_path / "places", partial=False)
    with pytest.raises(ValueError, match="holds none of the test images"):
        prepare.write(benchmark, images, tmp_path / "places", partial=True)
    assert not list((tmp_path / "places").glob("*.parquet"))


def test_a_download_is_checked_and_whole(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("a 0\n")
    url = (tmp_path / "list.txt").as_uri()
    monkeypatch.setitem(prepare.CHECKSUMS, "checked.txt", "0" * 64)
    with pytest.raises(ValueError, match="not the file that was published"):
        prepare.download(url, tmp_path / "sources", "checked.txt")
    assert not list((tmp_path / "sources").iterdir())
    path = prepare.download(url, tmp_path / "sources", "other.txt")
    assert prepare.read_list(path) == [("a", 0)]
    (tmp_path / "list.txt").unlink()
    assert (
        prepare.download(url, tmp_path / "sources", "other.txt") == path
    )  # there already
