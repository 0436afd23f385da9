# SPDX-License-Identifier: Apache-2.0
"""The model card as a report: what is in it, and that it renders."""

import re

import pytest
import torch
from peft import get_peft_model

from peft_sage import SageClassifier, SageConfig, create_model_card
from tests.conftest import tiny_clip


markdown_it = pytest.importorskip("markdown_it")
NAMES = ["cow", "owl | night", "bat", "ox"]


@pytest.fixture
def model():
    config = SageConfig(class_descriptions=NAMES, guidance=torch.randn(4, 8), modules_to_save=["class_head"])
    return get_peft_model(SageClassifier(tiny_clip(), 4), config)


def render(card):
    """The card as HTML, without the metadata."""
    return markdown_it.MarkdownIt("commonmark").enable("table").render(card.text)


def rows(html, heading):
    """Cells of the table under a heading."""
    table = html.split(f"{heading}</h2>")[1].split("</table>")[0]
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("<tr>")[1:]]


def test_a_table_of_several_runs(model):
    runs = {"zero-shot": {"macro, %": 40.0, "few, %": None}, "sage": {"macro, %": 61.23456, "few, %": 50.0}}
    html = render(create_model_card(model, runs))
    assert rows(html, "Results") == [
        ["", "macro, %", "few, %"],
        ["zero-shot", "40", "-"],
        ["sage", "61.23", "50"],
    ]


def test_the_worst_classes(model):
    card = create_model_card(model, per_class=[0.9, 0.25, None, float("nan")], class_counts=[30, 5, 2, 1])
    assert rows(render(card), "The worst classes") == [
        ["class", "training images", "accuracy"],
        ["owl | night", "5", "0.25"],
        ["cow", "30", "0.9"],
    ]
    percent = create_model_card(model, per_class=[90.0, 25.0, 0.5, None])
    assert rows(render(percent), "The worst classes")[:2] == [["class", "accuracy, %"], ["bat", "0.5"]]
    with pytest.raises(ValueError, match="`class_counts` must have the 2 entries of `per_class`, got 1"):
        create_model_card(model, per_class=[1.0, 0.0], class_counts=[3])


def test_settings_and_pictures(model):
    card = create_model_card(model, settings={"lr": 0.01, "r": None}, pictures={"a.png": "What it reads."})
    html = render(card)
    assert "lr: 0.01" in html and "r: None" not in html
    assert '<img src="a.png" alt="What it reads." />' in html


def test_a_card_without_a_report_has_no_empty_sections(model):
    headings = re.findall(r"<h2>(.*?)</h2>", render(create_model_card(model)))
    assert headings == ["How to load it", "Classes"]
