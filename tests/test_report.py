# SPDX-License-Identifier: Apache-2.0
"""What `examples/finetune.py` leaves behind: a card whose snippet runs, pictures, and a page that renders."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from peft_sage import SageClassifier, SageConfig
from tests.conftest import tiny_clip


markdown_it = pytest.importorskip("markdown_it")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
from report import create_model_card, plot_long_tail  # noqa: E402


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
STYLE = "<style>body{width:800px} img{max-width:100%} td{border:1px solid}</style>"
#: Says in the page's title whether a picture is missing or something is wider than the page.
CHECK = """<script>addEventListener("load", () => {
    const broken = [...document.images].filter(image => image.naturalWidth == 0).map(image => image.src);
    const wide = [...document.body.children].filter(part => part.scrollWidth > 810).map(part => part.tagName);
    document.title = `images ${document.images.length} broken ${broken} wide ${wide}`;
})</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The output folder of a run on three classes of noisy colours, one of them with one image."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for split, counts in {"train": (21, 6, 1), "test": (4, 4, 4)}.items():
        for k, count in enumerate(counts):
            (root / "photos" / split / f"colour_{k}").mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal((90 * k, 120, 200 - 90 * k), 25, size=(48, 48, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / "photos" / split / f"colour_{k}" / f"{i}.png")
    flags = [
        "--dataset",
        str(root / "photos"),
        "--output-dir",
        str(root / "out"),
        "--epochs",
        "2",
        "--batch-size",
        "8",
        "--lr",
        "0.01",
    ]
    finetune.main([*flags, "--num-workers", "0", "--cpu-threads", "1"])
    return root / "out"


@pytest.fixture(scope="module")
def html(folder):
    text = (folder / "README.md").read_text().split("---\n", 2)[2]
    return markdown_it.MarkdownIt("commonmark").enable("table").render(text)


def test_the_pictures_are_there_and_in_the_card(folder, html):
    pictures = re.findall(r'<img src="(.*?)"', html)
    assert sorted(pictures) == ["attention.png", "long_tail.png"]
    for picture in pictures:
        assert np.asarray(Image.open(folder / picture).convert("L")).std() > 10


def test_the_card_says_what_the_results_say(folder, html):
    results = finetune.json.loads((folder / "results.json").read_text())
    assert f"<td>{results['trained']['macro']:.4g}</td>" in html
    assert "lr: 0.01" in html and "colour 2" in html
    worst = html.split("The worst classes</h2>")[1].split("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in worst.split("<tr>")[2:]]
    accuracies = [float(row[2]) for row in rows]
    assert len(rows) == 3 and accuracies == sorted(accuracies)
    assert {row[0]: row[1] for row in rows} == {"colour 0": "21", "colour 1": "6", "colour 2": "1"}


def test_the_snippet_of_the_card_runs(folder):
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(snippet, names)
    blank = finetune.SageClassifier(finetune.load_clip(str(finetune.DEMO / "tiny-clip")), 3)
    expected = finetune.PeftModel.from_pretrained(blank, folder).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(pixel_values=images).logits, expected(images).logits)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_a_browser_shows_all_of_it(folder, html):
    page = folder / "card.html"
    page.write_text(f"<meta charset=utf-8>{STYLE}{html}{CHECK}", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>images 2 broken  wide </title>" in done.stdout, done.stdout[-500:]


# The card and the plot alone


NAMES = ["cow", "owl | night", "bat", "ox"]


@pytest.fixture
def model():
    config = SageConfig(class_descriptions=NAMES, guidance=torch.randn(4, 8))
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


def test_plot_long_tail_draws_the_results(tmp_path):
    run = {"many": 0.9, "medium": None, "few": float("nan"), "per_class": [0.5, None, 1.0]}
    figure = plot_long_tail({"one": run, "two": {**run, "many": 0.7}}, [3, 500, 50])
    classes, groups, accuracies = figure.axes
    assert [bar.get_height() for bar in classes.patches] == [500, 50, 3]
    points = accuracies.lines[0].get_ydata()
    assert math.isnan(points[0]) and list(points[1:]) == [1.0, 0.5]
    assert [bar.get_height() for container in groups.containers for bar in container][::3] == [0.9, 0.7]
    figure.savefig(tmp_path / "tail.png")
    named = plot_long_tail({"one": run}, [3, 500, 50], ["owl", "cow $", "bat"])
    assert [label.get_text() for label in named.axes[0].get_xticklabels()] == ["cow $", "bat", "owl"]
    named.savefig(tmp_path / "named.png")


def test_other_numbers_of_classes_are_refused():
    with pytest.raises(ValueError, match="`results` of 'run' must have 3 classes, got 2"):
        plot_long_tail({"run": {"per_class": [0, 1]}}, [3, 2, 1])
    with pytest.raises(ValueError, match="`class_names` must have 2 entries, got 1"):
        plot_long_tail({"run": {"per_class": [0, 1]}}, [2, 1], ["cow"])
