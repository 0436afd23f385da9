# SPDX-License-Identifier: Apache-2.0
"""The recipes of `benchmarks/paper`: a dry run of each on generated images, and what surrounds them."""

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from tests.conftest import byte_tokenizer, tiny_clip


ROOT = Path(__file__).parents[1]
PAPER = ROOT / "benchmarks" / "paper"
sys.path[:0] = [str(ROOT / "examples"), str(PAPER)]

import estimate  # noqa: E402
import finetune  # noqa: E402
import prepare  # noqa: E402
from recipes import DATA, RECIPES, REPORTED_PARAMETERS, Recipe, commands, table  # noqa: E402


OVERRIDES = (
    "--epochs 1 --batch-size 4 --mixed-precision no --num-workers 0 --cpu-threads 1"
)
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


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in RECIPES if recipe.model == "b16"],
    ids=lambda recipe: recipe.name,
)
def test_dry_run(recipe, project, monkeypatch):
    """The recipe's own flags, but for the model, the length, and what only a GPU can do."""
    monkeypatch.chdir(project)
    milder = (
        ["--imbalance-ratio", "10"] if "cifar" in recipe.data else []
    )  # the test data hold no more
    results = finetune.main(
        [*recipe.flags, "--model", str(project / "clip"), *OVERRIDES.split(), *milder]
    )
    counts = {"imagenet_lt": [6, 3, 1], "places_lt": [6, 3], "inat2018": [3, 1]}
    assert results["class_counts"] == counts.get(recipe.data, [10, 3, 1])
    assert results["trained"]["macro"] is not None and results["kept_epoch"] == 1

    weights = load_file(project / "runs" / recipe.name / "adapter_model.safetensors")
    guidance = [tensor.shape for name, tensor in weights.items() if "guidance" in name]
    assert guidance == (
        [(len(results["class_names"]), 16)] if recipe.method == "sage" else []
    )
    assert {
        len(weights[name]) for name in weights if name.endswith("peft_sage_down.weight")
    } == {recipe.r}
    assert (project / "runs" / recipe.name / "README.md").is_file()


def test_all_rows_have_the_same_budget_and_commands_that_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    for recipe in RECIPES:
        args = finetune.parse_args(recipe.flags)
        assert (args.optimizer, args.lr, args.momentum, args.weight_decay) == (
            "sgd",
            0.01,
            0.9,
            5e-4,
        )
        assert (args.batch_size, args.epochs) == (
            128,
            20 if recipe.data == "inat2018" else 10,
        )
        assert (args.lr_decay, args.augmentation, args.crop_scale) == (
            "epoch",
            "resized-crop-flip",
            0.08,
        )
        assert (
            args.test_crops,
            args.model_selection,
            args.mixed_precision,
            args.seed,
        ) == (5, "last", "fp16", 0)
        expected = (
            ("adaptformer", "la") if recipe.method == "lift" else ("sage", "sage")
        )
        assert (args.method, args.loss) == expected
        assert args.output_dir == f"runs/{recipe.name}"
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES) == 24


def test_the_readme_has_the_table_and_the_commands():
    readme = (PAPER / "README.md").read_text()
    assert table() in readme and commands() in readme, (
        "copy the output of: python benchmarks/paper/recipes.py"
    )


@pytest.mark.parametrize("data", REPORTED_PARAMETERS)
def test_adapters_have_as_many_parameters_as_lift_reports(data):
    model = estimate.build(Recipe(data, "b16", "lift"))
    counts = {
        name: p.numel() for name, p in model.named_parameters() if p.requires_grad
    }
    assert (
        sum(count for name, count in counts.items() if "peft_sage_" in name)
        == REPORTED_PARAMETERS[data]
    )
    assert (
        sum(count for name, count in counts.items() if "head" in name)
        == 512 * DATA[data].classes
    )


def test_the_estimate_agrees_with_counting_by_hand():
    needs = estimate.cost(Recipe("cifar100_lt_100", "b16", "lift"))
    n, d, blocks, r = 197, 768, 12, 4
    tower = 196 * 768 * d + blocks * (12 * n * d**2 + 2 * n**2 * d) + d * 512
    adapters, head = blocks * n * 2 * d * r, 512 * 100
    assert needs.prediction == pytest.approx(2 * (tower + adapters + head), rel=0.01)
    # Backward: to the tower's activations once more (attention twice), to adapter and head also their weights.
    assert 1.9 < needs.step / needs.prediction < 2.2
    assert (
        needs.frozen == 149_620_737 + 512 * 100
    )  # OpenAI's ViT-B/16, and the head as it was before training
    # At the least a block keeps for its backward pass: attention's q, k, v and result, and what QuickGELU came from.
    assert (
        128 * n * blocks * (4 * d + 4 * d) * 2
        < needs.activations
        < 128 * n * blocks * 24 * d * 2
    )
    hours = estimate.hours(Recipe("cifar100_lt_100", "b16", "lift"), 100, 0.5, 1e9)
    images = 10 * 10_847 * needs.step + 3 * 5 * 10_000 * needs.prediction
    assert hours == pytest.approx(images / 50e12 / 3600)
    slow = estimate.hours(Recipe("cifar100_lt_100", "b16", "lift"), 1e9, 0.5, 100)
    assert slow == pytest.approx((10 * 10_847 + 3 * 10_000) / 100 / 3600)


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
