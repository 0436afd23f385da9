# SPDX-License-Identifier: Apache-2.0
"""Readers of class descriptions, template sets, and the check of what a model makes of them."""

import json
import warnings

import pytest
from datasets import ClassLabel

from peft_sage import (
    SageConfig,
    check_descriptions,
    encode_class_descriptions,
    read_class_descriptions,
    templates,
)
from peft_sage.descriptions import check_templates
from tests.conftest import byte_tokenizer


TEXTS = {"snowy_owl": ["a white owl", "an owl, in snow"], "cow": ["a cow"]}


@pytest.fixture
def json_file(tmp_path):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"snowy_owl": TEXTS["snowy_owl"], "cow": "a cow"}), encoding="utf-8")
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
    for source in (["snowy_owl", "cow"], ClassLabel(names=["snowy_owl", "cow"]), tmp_path / "names.json"):
        assert read_class_descriptions(source) == ["snowy owl", "cow"]
        assert read_class_descriptions(source, class_names=["cow"]) == ["cow"]


def test_refusals(tmp_path, json_file):
    with pytest.raises(ValueError, match=r"no entry for 1 of the classes: \['bat'\]"):
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


@pytest.mark.parametrize("name", ["NATURAL", "SPECIES", "PRODUCTS", "SATELLITE", "MEDICAL", "TEXTURE"])
def test_template_sets_are_templates(name):
    chosen = getattr(templates, name)
    assert check_templates(chosen) == chosen and len(set(chosen)) == len(chosen)


def test_nothing_to_warn_of(clip):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_descriptions(clip, byte_tokenizer(), {"cow": "a cow", "owl": "an owl"}, threshold=1.0) == []


def test_warns_by_name_of_shared_and_cut_texts(clip):
    descriptions = {"cow": ["an animal", "a cow"], "owl": "an animal", "bat": "a very long text about a bat " * 3}
    with pytest.warns(UserWarning) as caught:
        problems = check_descriptions(clip, byte_tokenizer(), descriptions, threshold=1.0)
    assert [str(warning.message) for warning in caught] == problems
    assert len(problems) == 2
    assert "['cow', 'owl']" in problems[0] and "'an animal'" in problems[0]
    # 87 bytes, with the tokens of beginning and end.
    assert "'bat'" in problems[1] and "89 tokens, cut at 40" in problems[1]


def test_warns_by_name_of_classes_that_nearly_coincide(clip):
    descriptions = {"cow": "a cow", "owl": "an owl", "ox": "a cox", "cattle": "a cow"}
    rows = encode_class_descriptions(clip, byte_tokenizer(), descriptions)
    cosines = {(i, j): (rows[i] @ rows[j]).item() for i in range(4) for j in range(i + 1, 4)}
    threshold = (sorted(cosines.values())[-2] + sorted(cosines.values())[-3]) / 2
    expected = sorted((pair for pair, cosine in cosines.items() if cosine > threshold), key=cosines.get)[::-1]
    with pytest.warns(UserWarning):
        problems = check_descriptions(clip, byte_tokenizer(), descriptions, threshold=threshold)
    names = list(descriptions)
    assert "share the text" in problems[0] and len(problems) == 1 + len(expected) == 3
    for problem, (i, j) in zip(problems[1:], expected, strict=True):
        assert f"{names[i]!r} and {names[j]!r}" in problem and f"{cosines[i, j]:.3f}" in problem


def test_bare_names_go_through_templates(clip):
    with pytest.warns(UserWarning, match="'cow'.*'cow'"):
        problems = check_descriptions(clip, byte_tokenizer(), ["cow", "cow"], ["one {}", "some {}"])
    assert [problem for problem in problems if "'one cow'" in problem]
    with pytest.raises(ValueError, match="`threshold`"):
        check_descriptions(clip, byte_tokenizer(), ["cow"], threshold=0)


def test_indices_without_names(clip):
    with pytest.warns(UserWarning):
        problems = check_descriptions(clip, byte_tokenizer(), [["a cow"], ["an owl"], ["a cow"]], threshold=0.999)
    assert "['class 0', 'class 2'] share the text 'a cow'" in problems[0]
    assert "Classes 'class 0' and 'class 2' have embeddings of cosine 1.000" in problems[1] and len(problems) == 2
