# SPDX-License-Identifier: Apache-2.0
"""Data sets as people have them are read right or refused by name, by the loader of the examples."""

import csv
import io
import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import reading  # noqa: E402
from image_data import find_unreadable, load_images  # noqa: E402
from splitting import object_names  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        datasets.config,
        "HF_DATASETS_CACHE",
        str(tmp_path_factory.getbasetemp() / "datasets"),
    )
    datasets.disable_progress_bars()


def colour(number):
    """A colour that says which image it is."""
    return (number % 256, number // 256, 77)


def draw(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), colour(number)).save(path, "PNG")


def encoded(number):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour(number)).save(buffer, "PNG")
    return buffer.getvalue()


def load(folder, **arguments):
    return load_images(str(folder), **arguments)


def content(data):
    """Which image, by its colour, is in which split under which name."""
    return {
        split: Counter(
            (data.class_names[label], images.read(index).getpixel((0, 0)))
            for index, label in enumerate(images.labels)
        )
        for split, images in data.splits.items()
    }


def folders(root, **splits):
    """Draw `train={"owl": 2}`; the images are numbered in this order."""
    numbers = iter(range(10_000))
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                draw(root / split / name / f"{index}.png", next(numbers))
    return root


def sizes(data):
    return {
        split: dict(Counter(data.class_names[i] for i in images.labels))
        for split, images in data.splits.items()
    }


# Splits


@pytest.mark.parametrize(
    "name", ["bullet_train", "dev", "val", "test", "train", "validation"]
)
def test_a_class_called_like_a_split_is_a_class(name, tmp_path):
    classes = {name: 2, "owl": 2}
    data = load(
        folders(tmp_path / "my_test_photos" / "train_val", train=classes, test=classes)
    )
    assert sizes(data) == {"train": classes, "test": classes}


def test_other_names_of_splits(tmp_path):
    classes = {"cow": 2, "owl": 1}
    data = load(
        folders(tmp_path, Training=classes, val=classes, TEST=classes, more=classes)
    )
    assert sizes(data) == dict.fromkeys(["train", "validation", "test"], classes)
    assert data.notes == ["Not read, as neither splits nor tables of them: 'more'."]
    assert "validation" not in load(tmp_path, validation="none").splits
    assert load(tmp_path, test="more").splits.keys() == {"train", "validation", "test"}


def test_one_file_in_two_splits_is_refused(tmp_path):
    folders(tmp_path, train={"cow": 2, "owl": 2}, test={"cow": 1})
    (tmp_path / "test" / "owl").symlink_to(tmp_path / "train" / "owl")
    with pytest.raises(
        ValueError,
        match=r"test/owl/0.png' is in split 'train' as 'owl' and in split 'test' as 'owl'",
    ):
        load(tmp_path)


def test_a_folder_without_splits_is_split(tmp_path):
    counts = {"one": 1, "two": 2, "five": 5, "ten": 10, "hundred": 100}
    folders(tmp_path, photos=counts)
    for index in range(10):
        for view in range(3):
            draw(tmp_path / "photos" / "rex" / f"dog{index}_{view}.png", 200 + index)
    data = load(tmp_path / "photos", seed=3)
    found = sizes(data)
    assert (
        "seed 3" in data.notes[0] and "30 images that share an object" in data.notes[0]
    )
    assert {name: found["train"].get(name) for name in counts} == dict(
        zip(counts, [1, 1, 3, 7, 70], strict=True)
    )
    assert {name: found["test"].get(name) for name in counts} == dict(
        zip(counts, [None, 1, 1, 2, 20], strict=True)
    )
    assert (
        found["train"]["rex"],
        found["validation"]["rex"],
        found["test"]["rex"],
    ) == (21, 3, 6)
    dogs = [
        {pixel for name, pixel in images if name == "rex"}
        for images in content(data).values()
    ]
    assert sum(len(pixels) for pixels in dogs) == 10  # no dog is in two splits
    assert (
        content(load(tmp_path / "photos", seed=3))
        == content(data)
        != content(load(tmp_path / "photos", seed=4))
    )


@pytest.mark.parametrize(
    ("stems", "objects"),
    [
        (
            ["rex_1", "rex_2 (1)", "bella_1", "bella-copy"],
            ["rex", "rex", "bella", "bella"],
        ),
        (["p12_a", "p12_b"], ["p12", "p12"]),
        (["owl_1", "owl_2", "owl_3"], ["owl_1", "owl_2", "owl_3"]),
        (
            ["IMG_2031", "IMG_2032", "IMG_2031 (1)"],
            ["IMG_2031", "IMG_2032", "IMG_2031"],
        ),
        ([f"a7_{i}" for i in range(13)], [f"a7_{i}" for i in range(13)]),
    ],
)
def test_file_names_that_tell_objects(stems, objects):
    assert object_names(stems) == objects


# Labels


def write_parquet(path, labels, numbers=None, kind=None, names=None):
    """Write a table as `datasets` (with names: as its `ClassLabel`) or anybody else does."""
    images = [encoded(number) for number in (numbers or range(len(labels)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    if names is not None:
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        )
        rows = {
            "image": [{"bytes": image, "path": None} for image in images],
            "label": labels,
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
        return
    column = pa.array(labels) if kind is None else pa.array(labels, kind)
    pq.write_table(pa.table({"image": images, "label": column}), path)


def test_class_labels_are_matched_by_name(tmp_path):
    write_parquet(
        tmp_path / "data" / "train-00000-of-00002.parquet",
        [0, 1],
        [0, 1],
        names=["cat", "dog"],
    )
    write_parquet(
        tmp_path / "data" / "train-00001-of-00002.parquet",
        [0, 1],
        [2, 3],
        names=["dog", "cat"],
    )
    write_parquet(
        tmp_path / "data" / "test.parquet",
        [0, 1, 2],
        [4, 5, 6],
        names=["dog", "cat", "ox"],
    )
    with pytest.warns(
        UserWarning,
        match=r"'test' has 1 images of classes without training images.*\['ox'\]",
    ):
        data = load(tmp_path)
    assert data.class_names == ["cat", "dog", "ox"]
    assert content(data) == {
        "train": Counter(
            [
                ("cat", colour(0)),
                ("dog", colour(1)),
                ("dog", colour(2)),
                ("cat", colour(3)),
            ]
        ),
        "test": Counter([("dog", colour(4)), ("cat", colour(5))]),
    }


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        ([1, 2, 3], None, ["1", "2", "3"]),
        ([10, 9, 2**40], None, ["9", "10", str(2**40)]),
        ([2**64 - 1, 0, 5], pa.uint64(), ["0", "5", str(2**64 - 1)]),
        ([True, False, True], None, ["False", "True"]),
        ([1.0, 3.0, 2.0], None, ["1", "2", "3"]),
        (["b", "a", "NA"], pa.large_string(), ["NA", "a", "b"]),
        (["b", "a", "nan"], pa.string_view(), ["a", "b", "nan"]),
        (["b", "a", "a"], pa.dictionary(pa.int8(), pa.string()), ["a", "b"]),
        (["10", "9", "010"], None, ["9", "010", "10"]),
        (["cafe\u0301", "caf\u00e9", "x"], None, ["caf\u00e9", "x"]),
    ],
)
def test_labels_of_every_type(labels, kind, names, tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", labels, kind=kind)
    data = load(tmp_path)
    assert data.class_names == names
    named = [
        "caf\u00e9"
        if str(v).startswith("caf")
        else str(int(v))
        if type(v) is float
        else str(v)
        for v in labels
    ]
    assert content(data)["test"] == Counter(
        (name, colour(i)) for i, name in enumerate(named)
    )


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([1, None, 3], None, r"'label' has no label in row 1 of '.*train.parquet'"),
        (
            [1.0, float("nan"), 3.0],
            None,
            "'label' has a label that is no whole number in row 1",
        ),
        ([1.0, 2.0, 2.5], None, "no whole number in row 2"),
        ([float("inf"), 1.0], None, "no whole number in row 0"),
        ([0, 1, -1], None, "negative label.* in row 2"),
        (["a", " ", "b"], None, "an empty label in row 1"),
        ([[0], [1]], None, "must hold class names or whole numbers, got list"),
        ([b"a", b"b"], None, "must hold class names or whole numbers, got binary"),
    ],
)
def test_labels_without_meaning_are_refused(labels, kind, message, tmp_path):
    write_parquet(tmp_path / "train.parquet", labels, kind=kind)
    write_parquet(tmp_path / "test.parquet", ["a", "b"])
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_names_and_numbers_are_not_matched(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["a", "b"])
    write_parquet(tmp_path / "test.parquet", [0, 1])
    with pytest.raises(
        ValueError, match="'label' has class names in 'train' and integers in 'test'"
    ):
        load(tmp_path)
    write_parquet(tmp_path / "test.parquet", [0, -1], names=["a", "b"])
    with pytest.raises(
        ValueError,
        match="negative label, which says `without label` in row 1 of .*test.parquet",
    ):
        load(tmp_path)


# Layouts


def test_what_is_no_class_is_listed(tmp_path):
    folders(tmp_path, train={"cow": 2, "owl": 2, "empty": 0}, test={"cow": 1, "owl": 1})
    for name in (
        ".hidden/x.png",
        "__MACOSX/train/cow/1.png",
        "train/.DS_Store",
        "train/cow/._0.png",
    ):
        draw(tmp_path / name)
    (tmp_path / "train" / "notes.txt").write_text("mine")
    (tmp_path / "train" / "cow" / "Thumbs.db").write_bytes(b"\0")
    data = load(tmp_path)
    assert sizes(data)["train"] == {"cow": 2, "owl": 2}
    assert data.skipped == {
        "train": {
            "not an image by its name": [
                str(tmp_path / "train/notes.txt"),
                str(tmp_path / "train/cow/Thumbs.db"),
            ],
            "without images": [str(tmp_path / "train/empty")],
        }
    }
    assert data.as_dict()["skipped"] == data.skipped
    described = data.as_dict()["splits"]["train"]
    assert (described["images"], described["classes"]) == (4, 2)
    assert described["images_per_class"] == {"cow": 2, "owl": 2}
    table = data.summary().splitlines()
    assert table[1].split() == ["train", "4", "2", "2", "to", "2,", "median", "2"]
    assert (
        "2 not an image by its name" in data.summary() and "notes.txt" in data.summary()
    )


def test_an_image_beside_the_class_folders(tmp_path):
    folders(tmp_path, train={"cow": 2, "owl": 2}, test={"cow": 1})
    draw(tmp_path / "train" / "stray.png")
    with pytest.raises(
        ValueError, match=r"train/stray.png' lies beside the class folders"
    ):
        load(tmp_path)
    data = load(tmp_path, on_bad_image="skip")
    assert data.class_names == ["cow", "owl"]
    assert data.skipped["train"] == {
        "beside the class folders": [str(tmp_path / "train" / "stray.png")]
    }


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"train": {"birds/owl": 1, "cow": 1}, "test": {"cow": 1}},
            r"birds/owl/0.png' lies deeper than birds/\*",
        ),
        (
            {"train": {"cow": 1}, "test": {"cow": 1}},
            r"two classes at least, got \['cow'\]",
        ),
        (
            {"train": {"cow": 1, "owl": 1}, "test": {"ox": 1}},
            r"no image of a class of the training split.*\['ox'\]",
        ),
        (
            {"train": {"cow": 1, "owl": 1}, "validation": {"cow": 1}},
            r"no split 'test', only \['train', 'validation'\]",
        ),
        (
            {"train": {"cow": 1, "owl": 1}, "test": {"cow": 0}},
            "Split 'test' has no images",
        ),
        (
            {"train": {"": 2}, "test": {"": 2}},
            r"no class folders in \['test', 'train'\]",
        ),
        ({"a": {"b/c/d": 1}}, "b/c/d/0.png' lies deeper"),
        ({}, "holds neither"),
    ],
)
def test_layouts_that_say_too_little(layout, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(folders(tmp_path, **layout))


def test_what_is_no_data_set(tmp_path, monkeypatch):
    def missing(name):
        raise datasets.exceptions.DatasetNotFoundError(
            f"Dataset '{name}' doesn't exist on the Hub"
        )

    monkeypatch.setattr(reading, "load_dataset", missing)
    folders(tmp_path, train={"cow": 1, "owl": 1}, test={"cow": 1})
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for name, arguments, message in [
        ("./nowhere", {}, "'./nowhere' is not a folder"),
        (
            "nobody/nothing",
            {},
            "'nobody/nothing' is neither a folder nor a data set that the Hub gives",
        ),
        (tmp_path / "x.txt", {}, "x.txt' is neither"),
        (tmp_path / "x.parquet", {}, "x.parquet' cannot be read"),
        (tmp_path, {"test": "train"}, "Three different splits"),
        (tmp_path, {"test": "other"}, "no split 'other', only"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(name, **arguments)
    write_parquet(tmp_path / "a.parquet", ["a", "b"])
    for arguments in ({"image_column": "picture"}, {"label_column": "picture"}):
        with pytest.raises(
            ValueError, match=r"no column 'picture', only \['image', 'label'\].*`--"
        ):
            load(tmp_path / "a.parquet", **arguments)
    with pytest.raises(
        ValueError, match="/a', row 0 of '.*a.parquet' cannot be read: No such file"
    ):
        load(tmp_path / "a.parquet", image_column="label")
    write_parquet(tmp_path / "b.parquet", [1, 2])
    with pytest.raises(
        ValueError,
        match="Column 'label' of .*b.parquet', int64, cannot be read as images",
    ):
        load(tmp_path / "b.parquet", image_column="label")


def test_a_data_set_of_the_hub(monkeypatch):
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {
        "img": [{"bytes": encoded(i), "path": None} for i in range(4)],
        "fine": [1, 0, 1, 0],
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(
        reading,
        "load_dataset",
        lambda name: datasets.DatasetDict(train=data, valid=data, test=data),
    )
    found = load("user/photos", image_column="img", label_column="fine")
    expected = Counter(("ba"[i % 2], colour(i)) for i in range(4))
    assert content(found) == dict.fromkeys(["train", "validation", "test"], expected)


# Pictures


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_damaged_images_are_found_before_training(tmp_path):
    folders(tmp_path, train={"cow": 3, "owl": 2, "ox": 1}, test={"cow": 1, "owl": 1})
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "train" / "cow" / "half.jpg")
    cut(tmp_path / "train" / "cow" / "half.jpg")
    cut(tmp_path / "train" / "cow" / "1.png")
    (tmp_path / "train" / "ox" / "0.png").write_bytes(b"")
    (tmp_path / "test" / "owl" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "test" / "owl" / "phone.heic").write_bytes(b"ftypheic")
    bad = [
        "cow/half.jpg', split 'train'",
        "cow/1.png', split 'train'",
        "ox/0.png', split 'train'",
    ]
    bad += ["owl/gone.jpg', split 'test'", "owl/phone.heic', split 'test'"]
    with pytest.raises(
        ValueError, match="3 images cannot be read; `--on-bad-image skip`"
    ) as caught:
        load(tmp_path)
    assert all(name in str(caught.value) for name in bad[:3])
    data = load(tmp_path, on_bad_image="skip")
    assert data.class_names == ["cow", "owl"]  # nothing is left of the ox
    assert sizes(data) == {"train": {"cow": 2, "owl": 2}, "test": {"cow": 1, "owl": 1}}
    listed = data.skipped["train"]["unreadable"] + data.skipped["test"]["unreadable"]
    assert len(listed) == 5 and all(
        any(name in line for line in listed) for name in bad
    )


def test_damaged_images_of_tables_are_named_by_row(tmp_path):
    good, bad = encoded(1), encoded(2)[:40]
    for split, images in {"train": [good, good, bad], "test": [good, None]}.items():
        table = pa.table(
            {
                "image": pa.array(images, pa.binary()),
                "label": ["a", "b", "a"][: len(images)],
            }
        )
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(
        ValueError,
        match=r"Image row 2 of '.*/train.parquet', split 'train' cannot be read",
    ):
        load(tmp_path)
    data = load(tmp_path, on_bad_image="skip")
    assert [len(images) for images in data.splits.values()] == [2, 1]
    assert "row 1 of" in data.skipped["test"]["unreadable"][0]
    write_list(tmp_path / "train.csv", [("a.png", "a"), ("b.png", "b")])
    draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"Image '.*/b.png', line 3 of '.*train.csv'"):
        load(tmp_path / "train.csv")


def test_the_check_may_be_shared(tmp_path):
    folders(tmp_path, train={"cow": 2, "owl": 1}, test={"cow": 1})
    cut(tmp_path / "train" / "cow" / "0.png")
    found = []

    def share(tables):
        found.append(find_unreadable(tables, progress=False))
        return found[0]

    assert (
        len(load(tmp_path, on_bad_image="skip", unreadable=share).splits["train"]) == 2
    )
    assert list(found[0]["train"]) == [0] and found[0]["test"] == {}


# Tables of files


def write_list(path, rows, columns=("file_name", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def test_tables_of_files(tmp_path):
    rows = {
        "train": [("0.png", "cow"), ("sub/1.png", "owl")],
        "test": [("2.png", "owl")],
    }
    for split, files in rows.items():
        for file, _ in files:
            draw(tmp_path / split / file, int(Path(file).stem))
    expected = {
        "train": Counter([("cow", colour(0)), ("owl", colour(1))]),
        "test": Counter([("owl", colour(2))]),
    }
    for split, files in rows.items():
        write_list(
            tmp_path / f"{split}.csv", files
        )  # named within the folder of the split
    assert content(load(tmp_path)) == expected
    for split, files in rows.items():
        (tmp_path / f"{split}.csv").unlink()
        write_list(tmp_path / split / "metadata.csv", files)
    draw(tmp_path / "train" / "unlisted.png")
    data = load(tmp_path)
    assert content(data) == expected
    assert data.skipped == {
        "train": {"not in metadata.csv": [str(tmp_path / "train" / "unlisted.png")]}
    }
    for split in rows:
        (tmp_path / split / "metadata.csv").unlink()
    (tmp_path / "train" / "unlisted.png").unlink()
    lines = [
        {"file_name": f"{s}/{file}", "label": name}
        for s, files in rows.items()
        for file, name in files
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert content(load(tmp_path)) == expected
    (tmp_path / "metadata.jsonl").unlink()
    table = [
        (f"{s}/{file}", name, s) for s, files in rows.items() for file, name in files
    ]
    write_list(tmp_path / "all.csv", table, ("image", "label", "split"))
    assert content(load(tmp_path)) == content(load(tmp_path / "all.csv")) == expected
    images = [
        {"bytes": (tmp_path / file).read_bytes(), "path": file} for file, *_ in table
    ]
    labels, splits = [name for _, name, _ in table], [split for *_, split in table]
    (tmp_path / "one").mkdir()
    pq.write_table(
        pa.table({"image": images, "label": labels, "split": splits}),
        tmp_path / "one" / "all.parquet",
    )
    assert (
        content(load(tmp_path / "one"))
        == content(load(tmp_path / "one" / "all.parquet"))
        == expected
    )


def test_tables_of_files_that_say_too_little(tmp_path):
    draw(tmp_path / "a.png")
    for rows, message in [
        (
            [("a.png", "cow"), ("a.png", "")],
            "'label' has no label in line 3 of '.*all.csv'",
        ),
        ([("a.png", "cow"), ("", "owl")], "'file_name' has no file name in line 3"),
        (
            [("a.png", "cow"), ("a.png", "owl")],
            "is in split .* as 'cow' and in split .* as 'owl'",
        ),
        ([("a.png", "cow", "more")], "fields beside .* in line 2"),
        ([], "no rows"),
    ]:
        write_list(tmp_path / "all.csv", rows)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "all.csv")


# Names and paths


def test_odd_paths(tmp_path, monkeypatch):
    classes = {"a b": 1, "[x]": 1, "*": 1, "caf\u00e9 \u732b": 1, "1": 1}
    for name in ("photos[x]", "pho*tos", "a b", "caf\u00e9", "{a,b}"):
        folders(tmp_path / name, train=classes, test=classes)
        assert sizes(load(str(tmp_path / name) + "/")) == {
            "train": classes,
            "test": classes,
        }
        write_parquet(tmp_path / f"{name} tables" / "train.parquet", ["a", "b"])
        write_parquet(tmp_path / f"{name} tables" / "test.parquet", ["b"], [7])
        assert content(load(tmp_path / f"{name} tables"))["test"] == Counter(
            [("b", colour(7))]
        )
    (tmp_path / "link").symlink_to(tmp_path / "a b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sizes(load("~/link"))["test"] == classes
    monkeypatch.chdir(tmp_path)
    data = load("a b")
    monkeypatch.chdir("/")
    assert len(content(data)["train"]) == 5


# A property: whatever the layout, the names, the labels and the pictures are, the answer is known beforehand


NAMES = [
    "train",
    "test",
    "val",
    "dev",
    "bullet_train",
    "a b",
    "[x]",
    "*",
    "caf\u00e9",
    "\u732b",
    "007",
    "7",
    "NA",
]
NAMES += [
    "nan",
    "None",
    "true",
    "1e5",
    "a,b",
    'q"t',
    "x.y",
    "-1",
    "Owl",
    "owl",
    "snowy_owl",
    "100%",
    "__x",
]


def picture(path, number, style):
    """Draw an image of a colour that says its number, in one of many forms."""
    red, green, blue = colour(number)
    plain = Image.new("RGB", (style % 3 + 1, style % 2 + 1), (red, green, blue))
    forms = {
        ".png": [
            plain,
            plain.convert("P", palette=Image.Palette.ADAPTIVE),
            plain.convert("RGBA"),
        ],
        ".bmp": [plain],
        ".TIFF": [plain],
        ".gif": [plain.convert("P", palette=Image.Palette.ADAPTIVE)],
    }
    ending = sorted(forms)[style % len(forms)]
    form = forms[ending][style % len(forms[ending])]
    exif = Image.Exif()
    exif[0x0112] = style % 8 + 1
    path = path.with_name(path.name + ending)
    path.parent.mkdir(parents=True, exist_ok=True)
    form.save(path, **({"exif": exif} if ending == ".png" else {}))
    return path


@st.composite
def data_sets(draw):
    names = draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=5, unique=True))
    kind = draw(
        st.sampled_from(["folders", "parquet", "lists", "metadata", "one list"])
    )
    labels = (
        draw(st.sampled_from(["names", "class labels", "integers", "views"]))
        if kind == "parquet"
        else "names"
    )
    if labels == "integers":
        names = [
            str(number)
            for number in draw(
                st.lists(st.integers(0, 2**50), min_size=2, max_size=5, unique=True)
            )
        ]
    splits = ["train", "test"] + ["validation"] * draw(st.booleans())
    rows, number = {}, 0
    for split in splits:
        rows[split] = []
        for name in names:
            for _ in range(draw(st.integers(split == "train", 3))):
                rows[split].append((name, number, draw(st.integers(0, 47))))
                number += 1
        rows[split] = rows[split] or [(names[0], number + len(splits), 0)]
        rows[split] = draw(st.permutations(rows[split]))
    odd = draw(
        st.sampled_from(
            ["nothing", "nothing", "stray files", "broken", "unknown class"]
        )
    )
    return kind, labels, names, rows, odd, draw(st.randoms(use_true_random=False))


def write(root, kind, labels, names, rows, random):
    files = {}
    for split, images in rows.items():
        paths = []
        for position, (name, number, style) in enumerate(images):
            folder = (
                root / split / name if kind == "folders" else root / "files" / split
            )
            folder = root / split if kind == "metadata" else folder
            paths.append(
                picture(
                    folder / f"{position}_{random.choice(['train', 'b b', '[y]'])}",
                    number,
                    style,
                )
            )
        files[split] = paths
        given = [
            (str(path.relative_to(root)), image[0])
            for path, image in zip(paths, images, strict=True)
        ]
        if kind == "parquet":
            order = random.sample(names, len(names))
            column = {
                "names": lambda images: pa.array([name for name, *_ in images]),
                "views": lambda images: pa.array([name for name, *_ in images]).cast(
                    pa.string_view()
                ),
                "integers": lambda images: pa.array([int(name) for name, *_ in images]),
                "class labels": lambda images, order=order: pa.array(
                    [order.index(name) for name, *_ in images]
                ),
            }[labels](images)
            table = pa.table(
                {"image": [path.read_bytes() for path in paths], "label": column}
            )
            if labels == "class labels":
                feature = {
                    "label": {"names": order, "_type": "ClassLabel"},
                    "image": {"_type": "Image"},
                }
                table = table.replace_schema_metadata(
                    {"huggingface": json.dumps({"info": {"features": feature}})}
                )
            pq.write_table(table, root / f"{split}.parquet")
        elif kind == "lists":
            write_list(root / f"{split}.csv", given)
        elif kind == "metadata":
            write_list(
                root / split / "metadata.csv",
                [(Path(file).name, name) for file, name in given],
            )
    if kind == "parquet":
        shutil.rmtree(root / "files")
    if kind == "one list":
        table = [
            (str(p.relative_to(root)), i[0], s)
            for s in rows
            for p, i in zip(files[s], rows[s], strict=True)
        ]
        write_list(root / "table.csv", table, ("path", "label", "split"))
    return files


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data_sets())
def test_the_loader_returns_what_was_written(case):
    kind, labels, names, rows, odd, random = case
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        root = Path(folder) / random.choice(
            ["photos", "pho[t]os", "test photos", "train"]
        )
        if odd == "unknown class":
            warnings.simplefilter("ignore", UserWarning)
            if labels != "integers":
                rows["test"] = [*rows["test"], ("only in test", 60_000, 0)]
                names = [*names, "only in test"]
        files = write(root, kind, labels, names, rows, random)
        if odd == "stray files":
            for place in (
                root,
                *(path.parent for path in files["train"] if path.exists()),
            ):
                (place / "readme.txt").write_text("mine")
                (place / ".hidden.png").write_bytes(b"")
        expected = {
            split: Counter(
                (name, colour(number))
                for name, number, _ in images
                if name != "only in test"
            )
            for split, images in rows.items()
        }
        if odd == "broken" and kind != "parquet":
            broken = files["test"][-1]
            broken.write_bytes(broken.read_bytes()[:20])
            with pytest.raises(ValueError) as caught:
                load(root)
            assert str(broken) in str(caught.value) and "split 'test'" in str(
                caught.value
            )
            name, number, _ = rows["test"][-1]
            expected["test"] -= Counter([(name, colour(number))])
            if not expected["test"]:
                return
        data = load(root, on_bad_image="skip" if odd == "broken" else "error")
        assert content(data) == expected
