# SPDX-License-Identifier: Apache-2.0
"""Data sets as people have them are read right or refused by name, and become `datasets`."""

import csv
import io
import json
import multiprocessing
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from peft_sage import read_image
from peft_sage.data import load_images, tables
from peft_sage.data.groups import object_names
from peft_sage.data.splits import long_tailed_subset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
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


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def names_of(data, split):
    return [data.class_names[k] for k in data.splits[split]["label"]]


def sizes(data):
    return {split: dict(Counter(names_of(data, split))) for split in data.splits}


def content(data):
    """Which image, by its colour, is in which split under which name."""
    found = {}
    for split, rows in data.splits.items():
        pixels = [read_image(image).getpixel((0, 0)) for image in rows["image"]]
        found[split] = Counter(zip(names_of(data, split), pixels, strict=True))
    return found


def folders(root, **splits):
    """Draw `train={"owl": 2}`; the images are numbered in this order."""
    numbers = iter(range(10_000))
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                draw(root / split / name / f"{index}.png", next(numbers))
    return root


def write_parquet(path, labels, numbers=None, kind=None, names=None, **columns):
    """Write a table as `datasets` (with names: as its `ClassLabel`) or anybody else does."""
    images = [encoded(number) for number in (numbers or range(len(labels)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    if names is not None:
        features = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=names),
        }
        rows = {"image": [{"bytes": x, "path": None} for x in images], "label": labels}
        data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        data.to_parquet(str(path))
        return
    column = pa.array(labels) if kind is None else pa.array(labels, kind)
    pq.write_table(pa.table({"image": images, "label": column, **columns}), path)


def write_list(path, rows, columns=("file_name", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


# Splits


def test_other_names_of_splits(tmp_path):
    classes = {"cow": 2, "owl": 1}
    folders(tmp_path, Training=classes, val=classes, TEST=classes, more=classes)
    data = load_images(str(tmp_path))
    assert sizes(data) == dict.fromkeys(["train", "validation", "test"], classes)
    assert data.notes == ["Not read, as neither splits nor tables of them: more."]
    assert load_images(tmp_path, validation_split="none").validation is None
    assert load_images(tmp_path, test_split="more").test["file"][0] == "more/cow/0.png"


def test_one_file_in_two_splits_is_refused(tmp_path):
    folders(tmp_path, train={"cow": 2, "owl": 2}, test={"cow": 1})
    (tmp_path / "test" / "owl").symlink_to(tmp_path / "train" / "owl")
    message = (
        "test/owl/0.png' is in split 'train' as 'owl' and in split 'test' as 'owl'"
    )
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)


def test_a_folder_without_splits_is_split(tmp_path):
    counts = {"one": 1, "two": 2, "five": 5, "ten": 10, "hundred": 100}
    folders(tmp_path, photos=counts)
    for index in range(10):
        for view in range(3):
            name = f"dog{index}_{view}.png"
            draw(tmp_path / "photos" / "rex" / name, 200 + index)
    data = load_images(tmp_path / "photos", seed=3)
    found = sizes(data)
    assert "seed 3" in data.notes[0] and "30 images that share" in data.notes[0]
    wanted = {"train": [1, 1, 3, 7, 70, 21], "test": [None, 1, 1, 2, 20, 6]}
    for split, numbers in wanted.items():
        assert [found[split].get(name) for name in [*counts, "rex"]] == numbers
    dogs = [x for images in content(data).values() for x in images if x[0] == "rex"]
    assert len(dogs) == 10  # no dog is in two splits
    assert data.grouped_by == "file names"
    again, other = (load_images(tmp_path / "photos", seed=seed) for seed in (3, 4))
    assert content(again) == content(data) != content(other)


@pytest.mark.parametrize(
    ("stems", "objects"),
    [
        (["rex_1", "rex_2 (1)", "bella_1", "bella-copy"], ["rex"] * 2 + ["bella"] * 2),
        (["p12_a", "p12_b"], ["p12", "p12"]),
        (["owl_1", "owl_2", "owl_3"], ["owl_1", "owl_2", "owl_3"]),
        (["IMG_31", "IMG_32", "IMG_31 (1)"], ["IMG_31", "IMG_32", "IMG_31"]),
        ([f"a7_{i}" for i in range(13)], [f"a7_{i}" for i in range(13)]),
    ],
)
def test_file_names_that_tell_objects(stems, objects):
    assert object_names(stems) == objects


def test_groups_of_a_column(tmp_path):
    concepts = [f"c{i // 4}" for i in range(40)]
    labels = [*"ab"] * 20
    path = tmp_path / "all.parquet"
    labels.sort()
    write_parquet(path, labels, concept=[*concepts[:-1], None], scene=concepts)
    for column in (None, "scene"):
        data = load_images(path, group_column=column)
        assert data.grouped_by == f"column {column or 'concept'!r}"
        groups = [set(rows["group"]) for rows in data.splits.values()]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 10 + (not column)
    with pytest.raises(ValueError, match="no column 'x'.*`group_column`"):
        load_images(path, group_column="x")


def test_groups_in_several_splits(tmp_path):
    labels = [*"aabb"]
    for split, groups in {"train": [1, 1, 2, 3], "test": [1, 4, 4, 5]}.items():
        path = tmp_path / f"{split}.parquet"
        write_parquet(path, labels, object_id=groups, individual=labels)
    data = load_images(tmp_path)
    assert [*data.train["group"], *data.test["group"]] == [0, 0, 1, 2, 0, 3, 3, 4]
    assert "1 values of 'object_id' are in the training and in the test" in str(data)
    coarse = load_images(tmp_path, group_column="individual")
    assert coarse.train["group"] == [0, 0, 1, 1]
    for split in ("train", "test"):  # by default no group is as large as a class
        write_parquet(tmp_path / f"{split}.parquet", labels, individual=labels)
    assert load_images(tmp_path).grouped_by is None


# Classes


def test_class_labels_are_matched_by_name(tmp_path):
    for file, numbers, names in [
        ("train-00000-of-00002", [0, 1], ["cat", "dog"]),
        ("train-00001-of-00002", [2, 3], ["dog", "cat"]),
        ("test", [4, 5, 6], ["dog", "cat", "ox", "yak"]),
    ]:
        labels = range(len(numbers))
        write_parquet(
            tmp_path / "data" / f"{file}.parquet", labels, numbers, names=names
        )
    data = load_images(tmp_path)
    assert data.class_names == data.texts == ["cat", "dog", "ox", "yak"]
    assert data.class_counts == [2, 2, 0, 0]
    train = zip(["cat", "dog", "dog", "cat"], map(colour, range(4)), strict=True)
    test = zip(["dog", "cat", "ox"], map(colour, range(4, 7)), strict=True)
    assert content(data) == {"train": Counter(train), "test": Counter(test)}
    assert data.notes[0] == "2 classes have no training images: ox, yak."
    assert data.train.features["label"].names == data.class_names
    assert data.train["file"][2] == "row 0 of data/train-00001-of-00002.parquet"


def test_a_class_needs_no_images(tmp_path):
    folders(tmp_path, train={"cow": 2, "owl": 3, "empty": 0}, test={"cow": 1, "new": 2})
    texts = {name: [f"a {name}."] for name in ["owl", "cow", "new", "empty", " told"]}
    write_list(
        tmp_path / "descriptions.csv",
        [(name, text) for name, (text,) in texts.items()],
        ("class", "description"),
    )
    data = load_images(tmp_path)
    assert data.class_names == ["cow", "empty", "new", "owl", "told"]
    assert data.class_counts == [2, 0, 0, 3, 0]
    assert sizes(data)["test"] == {"cow": 1, "new": 2}
    assert list(data.texts) == data.class_names and data.texts["owl"] == ["a owl."]
    assert data.notes == [
        "3 classes have no training images: empty, new, told.",
        "3 classes have no test images: empty, owl, told.",
    ]
    (tmp_path / "test" / "owl").mkdir()
    draw(tmp_path / "test" / "owl" / "0.png")
    for file in (tmp_path / "test" / "new").iterdir():
        file.unlink()
    alike = load_images(tmp_path).notes
    assert alike == ["3 classes have no training or test images: empty, new, told."]
    named = load_images(tmp_path, descriptions=["zebra"])
    assert named.texts == named.class_names == ["cow", "empty", "new", "owl", "zebra"]
    file = tmp_path / "descriptions.json"
    file.write_text(json.dumps({"cow": "a cow", "owl": "an owl"}))
    message = rf"no entry for the classes \['empty', .*add them to '{file}', or delete"
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)


def test_names_that_are_alike(tmp_path):
    def table(*labels):
        rows = [(f"{k}.png", label) for k, label in enumerate([*labels, *labels])]
        for file, _ in rows:
            draw(tmp_path / file)
        write_list(tmp_path / "all.csv", rows)
        return load_images(tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table("owl", " owl", "cow\u00a0", "cow").class_names == ["cow", "owl"]
        # `SageClassifier.from_texts` warns of these, once.
        for pair in [["Owl", "owl"], ["snowy owl", "snowy_owl"], ["x2", "x\u00b2"]]:
            (tmp_path / "descriptions.json").write_text(json.dumps(pair))
            assert table(*pair, "cow").texts == sorted([*pair, "cow"])


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        ([2**64 - 1, 0, 5], pa.uint64(), ["0", "5", str(2**64 - 1)]),
        ([True, False, True], None, ["False", "True"]),
        ([1.0, 3.0, 2.0], None, ["1", "2", "3"]),
        (["b", "nan", "NA"], pa.large_string(), ["NA", "b", "nan"]),
        (["b", "c", "a"], pa.string_view(), ["a", "b", "c"]),
        (["b", "a", "a"], pa.dictionary(pa.int8(), pa.string()), ["a", "b"]),
        (["10", "9", "010"], None, ["9", "010", "10"]),
        (["cafe\u0301", "caf\u00e9", "x"], None, ["caf\u00e9", "x"]),
    ],
)
def test_labels_of_every_type(labels, kind, names, tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", labels, kind=kind)
    data = load_images(tmp_path)
    assert data.class_names == names
    named = [str(int(v)) if type(v) is float else str(v) for v in labels]
    named = [v.replace("e\u0301", "\u00e9") for v in named]
    expected = Counter((name, colour(i)) for i, name in enumerate(named))
    assert content(data)["test"] == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, None, 3], "'label' has no label in row 1 of train.parquet"),
        ([1.0, float("nan")], "not an integer .nan. in row 1"),
        ([1.0, 2.0, 2.5], "not an integer .2.5. in row 2"),
        ([float("inf"), 1.0], "not an integer .inf. in row 0"),
        ([0, 1, -1], "negative label .-1., .*, in row 2"),
        (["a", " ", "b"], "no label in row 1"),
        ([[0], [1]], "must hold class names or integers, got List"),
        ([b"a", b"b"], "must hold class names or integers, got .*binary"),
        (
            [1, 2],
            "integers .row 0 of train.parquet. and class names .row 0 of test.parquet., which",
        ),
    ],
)
def test_labels_without_meaning_are_refused(labels, message, tmp_path):
    write_parquet(tmp_path / "train.parquet", labels)
    write_parquet(tmp_path / "test.parquet", ["a", "b"])
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)


# Layouts


def test_what_is_no_class_is_listed(tmp_path):
    folders(tmp_path, train={"cow": 2, "owl": 2}, test={"cow": 1, "owl": 1})
    for name in (".hidden/x.png", "__MACOSX/train/cow/1.png", "train/cow/._0.png"):
        draw(tmp_path / name)
    for name in ("train/notes.txt", "train/cow/Thumbs.db", "train/cow/raw.cr2"):
        (tmp_path / name).write_text("mine")
    blank = tmp_path / "train" / " "
    blank.mkdir()
    with pytest.raises(ValueError, match="train/ ' has a name of white space only"):
        load_images(tmp_path)
    blank.rename(tmp_path / "train" / "papers")
    (tmp_path / "train" / "papers" / "a.pdf").write_text("mine")
    data = load_images(tmp_path)
    assert sizes(data)["train"] == {"cow": 2, "owl": 2}
    files = ["train/cow/raw.cr2"]
    assert data.skipped == {"train": {"without an image's file extension": files}}
    assert data.notes == ["No classes, as they contain no images: papers."]
    assert data.to_dict()["skipped"] == data.skipped
    described = data.to_dict()["splits"]["train"]
    assert (described["images"], described["classes"]) == (4, 2)
    assert described["images_per_class"] == {"cow": 2, "owl": 2}
    table = str(data).splitlines()
    assert table[1].split() == ["train", "4", "2", "2", "to", "2,", "median", "2"]
    assert "skipped 1 file in train without an image's" in str(data)
    draw(tmp_path / "train" / "stray.png")
    with pytest.raises(ValueError, match="train/stray.png' is outside the class"):
        load_images(tmp_path)
    skipped = load_images(tmp_path, on_bad_image="skip").skipped["train"]
    assert skipped["outside the class folders"] == ["train/stray.png"]


@pytest.mark.parametrize(("ratio", "images"), [(10, 19573), (50, 12608), (100, 10847)])
def test_imbalance_gives_the_published_subset_of_cifar_100_lt(ratio, images):
    """Class by class, in order, NumPy's global generator shuffles the images and the first ones stay."""
    labels = np.random.default_rng(0).permutation(np.tile(np.arange(100), 500))
    np.random.seed(0)
    expected = []
    for label in range(100):
        own = np.where(labels == label)[0]
        np.random.shuffle(own)
        expected.extend(own[: int(500 * (1 / ratio) ** (label / 99))])
    kept = long_tailed_subset(labels, 100, ratio, seed=0)
    assert len(kept) == images and kept.tolist() == sorted(expected)


def test_a_thinned_training_set(tmp_path):
    data = load_images(folders(tmp_path, train={"a": 9, "b": 9, "c": 9}, test={"a": 1}))
    thinned = data.thin(9, seed=1)
    assert (thinned.class_counts, data.class_counts) == ([9, 3, 1], [9, 9, 9])
    assert thinned.train["file"] != data.thin(9, seed=2).train["file"]
    with pytest.raises(ValueError, match=r"`imbalance_ratio` must lie in \[1, 9\]"):
        data.thin(10)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"train": {"birds/owl": 1, "cow": 1}, "test": {"cow": 1}},
            r"birds/owl/0.png' lies deeper than birds/\*",
        ),
        ({"train": {"cow": 1}, "test": {"cow": 1}}, r"two classes, got \['cow'\]"),
        (
            {"train": {"cow": 1, "owl": 1}, "test": {"ox": 1}},
            r"no image of a class of the training split.*\['ox'\]",
        ),
        (
            {"train": {"cow": 1, "owl": 1}, "validation": {"cow": 1}},
            r"no images in a split 'test', only in \['train', 'validation'\]; `test_split`",
        ),
        (
            {"train": {"cow": 1, "owl": 1}, "test": {"cow": 0}},
            r"no images in a split 'test', only in \['train'\]",
        ),
        ({"train": {"": 2}, "test": {"": 2}}, r"only \['test', 'train"),
        ({}, "contains neither"),
    ],
)
def test_layouts_that_say_too_little(layout, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_images(folders(tmp_path, **layout))


def test_what_is_no_data_set(tmp_path):
    folders(tmp_path, train={"cow": 1, "owl": 1}, test={"cow": 1})
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    write_parquet(tmp_path / "a" / "a.parquet", ["a", "b"])
    write_parquet(tmp_path / "a" / "b.parquet", [1, 2])
    table = tmp_path / "a" / "a.parquet"
    for source, arguments, message in [
        ("./nowhere", {}, "`source` './nowhere' is not a folder"),
        ("nobody/nothing", {}, "'nobody/nothing' is neither a folder nor on the Hub"),
        (tmp_path / "x.txt", {}, "x.txt' is neither"),
        (tmp_path / "x.parquet", {}, "x.parquet' cannot be read"),
        (tmp_path, {"test_split": "train"}, "`train_split` must differ"),
        (tmp_path, {"test_split": "other"}, "no images in a split 'other', only"),
        (tmp_path, {"on_bad_image": "stop"}, "`on_bad_image` must be"),
        (table, {"image_column": "x"}, r"no column 'x', .*\['image', .*`image_column`"),
        (table, {"label_column": "x"}, "no column 'x', .*`label_column`"),
        (table, {"image_column": "label"}, "Image 'a' cannot be read: No such file"),
        (
            tmp_path / "a" / "b.parquet",
            {"image_column": "label"},
            "Column 'label' of 'b.parquet', .*int64.*, cannot be read as images",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            load_images(source, **arguments)


def test_data_sets_of_datasets(monkeypatch, tmp_path):
    features = {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"])}
    images = [{"bytes": encoded(i), "path": None} for i in range(4)]
    rows = {"img": images, "fine": [1, 0, 1, 0]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    splits = datasets.DatasetDict(train=data, valid=data, test=data)
    monkeypatch.setattr(tables, "load_dataset", lambda name: splits)
    monkeypatch.setattr(tables.HfApi, "dataset_info", lambda *_, **__: None)
    expected = Counter(("ba"[i % 2], colour(i)) for i in range(4))
    columns = {"image_column": "img", "label_column": "fine"}
    splits.save_to_disk(tmp_path / "saved")
    data.save_to_disk(tmp_path / "all")
    for source in ("user/photos", splits, tmp_path / "saved"):
        found = load_images(source, **columns)
        assert content(found) == dict.fromkeys(found.splits, expected)
        assert [*found.splits] == ["train", "validation", "test"]
        assert found.train["file"][1] == "row 1 of train"
    for source in (data, tmp_path / "all"):
        drawn = load_images(source, **columns)
        assert sum(content(drawn).values(), Counter()) == expected
    unlabelled = data.remove_columns("fine").add_column("fine", [0, 1, -1, 0])
    with pytest.raises(ValueError, match="negative label.* in row 2 of test"):
        load_images(datasets.DatasetDict(train=data, test=unlabelled), **columns)


@pytest.mark.parametrize("layout", ["a", "b", "c", "d", "e"])
def test_layouts_with_the_split_in_a_folders_name(tmp_path, layout):
    labels = {"train": ["owl", "cow", "owl"], "test": ["owl", "cow"]}
    rows = []
    for split, names in labels.items():
        for number, name in enumerate(names):
            file = f"{split}/{number}.png"
            draw(tmp_path / file, number)
            rows.append({"file_name": file, "label": name, "split": split})

    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for split, names in labels.items():
        of_split = [row for row in rows if row["split"] == split]
        inside = [{**row, "file_name": row["file_name"][-5:]} for row in of_split]
        if layout == "a":
            write(tmp_path / split / "metadata.jsonl", inside)
        elif layout == "b":
            pairs = [(row["file_name"], row["label"]) for row in inside]
            write_list(tmp_path / split / "metadata.csv", pairs)
        elif layout == "c":
            write(tmp_path / f"{split}.jsonl", of_split)
        elif layout == "d":
            write_parquet(tmp_path / split / "0000.parquet", names)
    if layout == "e":
        of_all = ["\t".join(row) for row in [rows[0], *map(dict.values, rows)]]
        (tmp_path / "all.tsv").write_text("\n".join(of_all).replace("split", "part"))
    expected = {
        split: Counter((name, colour(number)) for number, name in enumerate(names))
        for split, names in labels.items()
    }
    assert content(load_images(tmp_path)) == expected


def test_lines_that_are_not_json(tmp_path):
    (tmp_path / "all.jsonl").write_text('{"file_name": "a.png", "label": "a"}\n[1')
    with pytest.raises(ValueError, match="all.jsonl': line 2 is not a JSON object"):
        load_images(tmp_path / "all.jsonl")


# Pictures


def test_damaged_images_are_found_before_training(tmp_path):
    folders(tmp_path, train={"cow": 3, "owl": 2, "ox": 1}, test={"cow": 1, "owl": 1})
    bad = [f"train/{name}" for name in ("cow/half.jpg", "cow/1.png", "ox/0.png")]
    bad += [f"test/owl/{name}" for name in ("gone.jpg", "phone.heic")]
    Image.effect_noise((40, 40), 90).save(tmp_path / bad[0])
    cut(tmp_path / bad[0])
    cut(tmp_path / bad[1])
    (tmp_path / bad[2]).write_bytes(b"")
    (tmp_path / bad[3]).symlink_to("nowhere")
    (tmp_path / bad[4]).write_bytes(b"ftypheic")
    message = "Images of `source` .* cannot be read, 5 in all; `on_bad_image='skip'`"
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path)
    data = load_images(tmp_path, on_bad_image="skip")
    assert data.class_counts == [2, 2, 0]  # nothing is left of the ox
    assert sizes(data)["test"] == {"cow": 1, "owl": 1}
    listed = [x for part in data.skipped.values() for x in part["that cannot be read"]]
    assert len(listed) == 5
    for name in bad:
        named = f"{name}', split '{name.partition('/')[0]}'"
        assert named in str(caught.value) and any(named in line for line in listed)


def test_damaged_images_of_tables_are_named_by_row(tmp_path):
    good = encoded(1)
    bad = encoded(2)[:40]
    for split, images in {"train": [good, good, bad], "test": [good, None]}.items():
        columns = {
            "image": pa.array(images, pa.binary()),
            "label": [*"aba"][: len(images)],
        }
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    message = "Image row 2 of train.parquet, split 'train' cannot be read"
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)
    data = load_images(tmp_path, on_bad_image="skip")
    assert [len(rows) for rows in data.splits.values()] == [2, 1]
    assert "row 1 of" in data.skipped["test"]["that cannot be read"][0]


def _check_share(rank, root, results):
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/sync", rank=rank, world_size=2
    )
    data = load_images(f"{root}/photos", on_bad_image="skip")
    results.put((data.train["file"], data.skipped))


def test_processes_share_the_check(tmp_path):
    folders(tmp_path / "photos", train={"cow": 4, "owl": 3}, test={"cow": 1})
    for index in (0, 3):
        cut(tmp_path / "photos" / "train" / "cow" / f"{index}.png")
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    jobs = [
        fork.Process(target=_check_share, args=(rank, tmp_path, results))
        for rank in range(2)
    ]
    for job in jobs:
        job.start()
    first = results.get()
    second = results.get()
    for job in jobs:
        job.join()
    alone = load_images(tmp_path / "photos", on_bad_image="skip")
    assert first == second == (alone.train["file"], alone.skipped)


# Tables of files


def test_tables_of_files(tmp_path):
    paths = ["train/0.png", "train/sub/1.png", "test/2.png"]
    labels = ["cow", "owl", "owl"]
    splits = ["train", "train", "test"]
    rows = [*zip(paths, labels, splits, strict=True)]
    for number, path in enumerate(paths):
        draw(tmp_path / path, number)
    train = Counter([("cow", colour(0)), ("owl", colour(1))])
    expected = {"train": train, "test": Counter([("owl", colour(2))])}
    for split in ("train", "test"):
        write_list(tmp_path / f"{split}.csv", [x[:2] for x in rows if x[2] == split])
    assert content(load_images(tmp_path)) == expected
    write_list(tmp_path / "all.csv", rows, ("image", "label", "split"))
    columns = {"image": paths, "label": labels, "split": splits}
    pq.write_table(pa.table(columns), tmp_path / "names.parquet")
    columns["image"] = [(tmp_path / path).read_bytes() for path in paths]
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    for name in ("all.csv", "names.parquet", "images.parquet"):
        assert content(load_images(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a.png", "cow"), ("a.png", "")],
            "'label' has no label in line 3 of 'all.csv",
        ),
        ([("a.png", "cow"), ("", "owl")], "'file_name' has no file name in line 3"),
        ([("a.png", "cow"), ("a.png", "owl")], "is in split .* as 'cow' and in split"),
        ([("a.png", "cow", "more")], "line 2"),
        ([("a.png", "cow"), ("b.png", "owl")], "Image 'b.png'.* cannot be read"),
        ([], "no rows"),
    ],
)
def test_tables_of_files_that_say_too_little(rows, message, tmp_path):
    draw(tmp_path / "a.png")
    write_list(tmp_path / "all.csv", rows)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "all.csv")


def test_a_folder_by_its_link_home_or_relative_path(tmp_path, monkeypatch):
    classes = {"a b": 1, "*": 1, "caf\u00e9 \u732b": 1}
    folders(tmp_path / "photos", train=classes, test=classes)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sizes(load_images("~/link/")) == {"train": classes, "test": classes}
    monkeypatch.chdir(tmp_path)
    data = load_images("link")
    monkeypatch.chdir("/")
    assert len(content(data)["train"]) == 3


# A property: whatever the layout, the names, the labels and the pictures are, the answer is known beforehand


NAMES = "train test val bullet_train [x] * caf\u00e9 \u732b 007 7 NA nan None true 1e5"
NAMES = [*NAMES.split(), "a b", "a,b", 'q"t', "x.y", "-1", "snowy_owl", "100%", "__x"]


def picture(path, number):
    """Draw an image of a colour that says its number, in one of three formats."""
    image = Image.new("RGB", (number % 3 + 1, 2), colour(number))
    path = path.with_name(path.name + [".png", ".bmp", ".TIFF"][number % 3])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@st.composite
def data_sets(draw):
    names = draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=5, unique=True))
    kinds = ["folders", "parquet", "lists", "one list"]
    kind = draw(st.sampled_from(kinds))
    rows = {}
    number = 0
    for split in ["train", "test"] + ["validation"] * draw(st.booleans()):
        rows[split] = []
        for name in names:
            for _ in range(draw(st.integers(split == "train", 3))):
                rows[split].append((name, number))
                number += 1
        rows[split] = rows[split] or [(names[0], 50_000 + len(rows))]
        rows[split] = draw(st.permutations(rows[split]))
    odd = draw(st.sampled_from(["nothing", "stray files", "broken"]))
    return kind, rows, odd, draw(st.randoms(use_true_random=False))


def write(root, kind, rows, random):
    """Write the images; return their files, by split."""
    files = {}
    table = []
    place = "{0}/{1}" if kind == "folders" else "files/{0}"
    for split, images in rows.items():
        paths = []
        for position, (name, number) in enumerate(images):
            folder = root / place.format(split, name)
            stem = f"{position}_{random.choice(['train', 'b b', '[y]'])}"
            paths.append(picture(folder / stem, number))
        files[split] = paths
        named = [name for name, _ in images]
        relative = [str(path.relative_to(root)) for path in paths]
        table += zip(relative, named, [split] * len(named), strict=True)
        if kind == "parquet":
            pictures = [path.read_bytes() for path in paths]
            parquet = pa.table({"image": pictures, "label": named})
            pq.write_table(parquet, root / f"{split}.parquet")
        elif kind == "lists":
            write_list(root / f"{split}.csv", zip(relative, named, strict=True))
    if kind == "parquet":
        shutil.rmtree(root / "files")
    if kind == "one list":
        write_list(root / "table.csv", table, ("path", "label", "split"))
    return files


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data_sets())
def test_the_loader_returns_what_was_written(case):
    kind, rows, odd, random = case
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        roots = [
            "photos",
            "pho[t]os",
            "ph*",
            "{a,b}",
            "caf\u00e9",
            "test photos",
            "train",
        ]
        root = Path(folder) / random.choice(roots)
        files = write(root, kind, rows, random)
        if odd == "stray files":
            shown = [path.parent for path in files["train"] if path.exists()]
            for place in (root, *shown):
                (place / "readme.txt").write_text("mine")
                (place / ".hidden.png").write_bytes(b"")
        expected = {
            split: Counter((name, colour(number)) for name, number in images)
            for split, images in rows.items()
        }
        if odd == "broken" and kind != "parquet":
            broken = files["test"][-1]
            image = rows["test"][-1]
            broken.write_bytes(broken.read_bytes()[:20])
            named = f"Image '{broken.relative_to(root)}', split 'test'"
            with pytest.raises(ValueError) as caught:
                load_images(root)
            assert named in str(caught.value)
            expected["test"] -= Counter([(image[0], colour(image[1]))])
            if not expected["test"]:
                return
        data = load_images(root, on_bad_image="skip" if odd == "broken" else "error")
        assert content(data) == expected
