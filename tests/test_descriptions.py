# SPDX-License-Identifier: Apache-2.0
"""Readers of class descriptions, and template sets."""

import json

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel

from peft_sage import SageConfig, read_class_descriptions, templates
from peft_sage.descriptions import check_templates


TEXTS = {"snowy_owl": ["a white owl", "an owl, in snow"], "cow": ["a cow"]}


@pytest.fixture
def json_file(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(
        json.dumps({"snowy_owl": TEXTS["snowy_owl"], "cow": "a cow"}), encoding="utf-8"
    )
    return path


@pytest.fixture
def csv_file(tmp_path):
    # With the mark that spreadsheets put in front, and a quoted comma.
    path = tmp_path / "texts.csv"
    text = 'class,source,description\nsnowy_owl,a book,a white owl\ncow,,a cow\nsnowy_owl,,"an owl, in snow"\n'
    path.write_text(text, encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("shape", ["dict", "json", "csv"])
def test_texts_come_in_the_order_of_the_classes(shape, json_file, csv_file):
    source = {"dict": TEXTS, "json": str(json_file), "csv": csv_file}[shape]
    assert read_class_descriptions(source) == TEXTS
    assert list(read_class_descriptions(source)) == ["snowy_owl", "cow"]
    swapped = read_class_descriptions(source, class_names=["cow", "snowy_owl"])
    assert swapped == TEXTS and list(swapped) == ["cow", "snowy_owl"]
    SageConfig(class_descriptions=swapped)


def test_names_without_texts(tmp_path):
    (tmp_path / "names.json").write_text('["snowy_owl", "cow"]')
    for source in (
        ["snowy_owl", "cow"],
        ClassLabel(names=["snowy_owl", "cow"]),
        pd.Index(["snowy_owl", "cow"]),
        pd.Series(["snowy_owl", "cow"], index=[1, 0]),
        tmp_path / "names.json",
    ):
        assert read_class_descriptions(source) == ["snowy_owl", "cow"]
        assert read_class_descriptions(source, class_names=["cow", "snowy_owl"]) == [
            "cow",
            "snowy_owl",
        ]
    assert read_class_descriptions(pd.Series(TEXTS)) == TEXTS


def test_refusals(tmp_path, json_file):
    with pytest.raises(ValueError, match=r"no entry for the classes \['bat'\]"):
        read_class_descriptions(json_file, class_names=["cow", "bat"])
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.csv").write_text("name,text\ncow,a cow\n")
    for name, message in [
        ("broken.json", "cannot be read"),
        ("missing.json", "cannot be read"),
        ("other.csv", r"columns 'class' and 'description', got \['name', 'text'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_class_descriptions(tmp_path / name)
    (tmp_path / "texts.txt").write_text("cow")
    with pytest.raises(ValueError, match=".json or .csv"):
        read_class_descriptions(tmp_path / "texts.txt")
    with pytest.raises(TypeError, match="class names"):
        read_class_descriptions([["a cow"], ["an owl"]])
    with pytest.raises(TypeError, match="class_descriptions"):
        read_class_descriptions(7)


@pytest.mark.parametrize(
    "name", ["NATURAL", "SPECIES", "PRODUCTS", "SATELLITE", "MEDICAL", "TEXTURE"]
)
def test_template_sets_are_templates(name):
    chosen = getattr(templates, name)
    assert check_templates(chosen) == chosen and len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_survive_their_file(encoding, tmp_path):
    texts = {
        "caf\u00e9": ["an ox\nwith horns", "a\u2028b \u0085 c"],
        "NA": ['so "quoted", yes'],
    }
    (tmp_path / "texts.json").write_text(
        json.dumps(texts, ensure_ascii=False), encoding=encoding
    )
    lines = [
        f'"{name}","{text.replace(chr(34), 2 * chr(34))}"'
        for name, entries in texts.items()
        for text in entries
    ]
    for delimiter in ",;\t":
        table = "\r\n".join(["class,description", *lines]).replace(
            '","', f'"{delimiter}"'
        )
        table = table.replace("class,", f"class{delimiter}")
        (tmp_path / "texts.csv").write_text(table, encoding=encoding, newline="")
        assert read_class_descriptions(tmp_path / "texts.csv") == texts
    assert read_class_descriptions(tmp_path / "texts.json") == texts
    # Folders may spell a letter and its accent apart.
    assert list(read_class_descriptions(texts, ["NA", "cafe\u0301"])) == [
        "NA",
        "cafe\u0301",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.json",
            '{"cow": "a", "owl": "b", "cow": "c"}',
            r"a.json' cannot be read: .*more than one entry .*\['cow'\]",
        ),
        (
            "a.json",
            '{"cow": " "}',
            "a.json': .*'cow' must not be empty or have an empty text",
        ),
        ("a.json", '{"cow": []}', "a.json': .*'cow' must not be empty"),
        ("a.json", "{}", "a.json': .*is empty"),
        (
            "a.csv",
            "class,description\ncow,\n",
            r"a.csv' has an empty description in line 2 \(class 'cow'\)",
        ),
        ("a.csv", "class,description\n,a cow\n", "empty class in line 2"),
        (
            "a.csv",
            "class,description\nowl,an owl, in snow\n",
            "line 2 has 3 fields, expected 2",
        ),
        (
            "a.csv",
            'class,description\nowl,"an owl\n',
            "a.csv' cannot be read at line 2",
        ),
        ("a.csv", "class,class\na,b\n", "names a column twice"),
        ("a.csv", "", "is empty"),
        (
            "a.csv",
            "class,description\nk\xfche,eine Kuh\n",
            "cannot be read as UTF-8: .*byte 0xfc",
        ),
    ],
)
def test_files_that_say_something_else_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        read_class_descriptions(tmp_path / name)


def test_classes_that_are_not_used_are_named():
    with pytest.warns(
        UserWarning, match=r"1 classes that are not used: \['snowy_owl'\]"
    ):
        assert read_class_descriptions(TEXTS, ["cow"]) == {"cow": ["a cow"]}


def test_white_space_is_no_part_of_a_class(tmp_path):
    (tmp_path / "a.csv").write_text("class,description\nowl ,white \n owl,it flies\n")
    assert read_class_descriptions(tmp_path / "a.csv") == {"owl": ["white", "it flies"]}
    assert read_class_descriptions([" owl", "cow\n"]) == ["owl", "cow"]
    assert read_class_descriptions({"owl ": "a"}, ["owl"]) == {"owl": ["a"]}
    for source in (["owl ", "owl"], {"owl ": "a", "owl": "b"}):
        with pytest.raises(ValueError, match="'owl ' and 'owl', which differ only in"):
            read_class_descriptions(source)
    assert read_class_descriptions(np.array(["owl", "cow"])) == ["owl", "cow"]
