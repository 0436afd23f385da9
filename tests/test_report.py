# SPDX-License-Identifier: Apache-2.0
"""What `examples/finetune.py` leaves for people: a card whose snippet runs, pictures, and a page in a browser."""

import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from peft_sage import SageClassifier


markdown_it = pytest.importorskip("markdown_it")
EXAMPLES = Path(__file__).parents[1] / "examples"
CLIP = EXAMPLES / "emoji_lt" / "tiny-clip"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
from image_data import LabelledImages  # noqa: E402
from report import (  # noqa: E402
    confused_pairs,
    create_model_card,
    expected_gains,
    make_page,
    plot_long_tail,
)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BROWSER = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
BROWSER += "--disable-sync --no-first-run --virtual-time-budget=5000 --dump-dom"
#: Put into the page, says what a browser found as the title of the page around it: a window is never as narrow.
CHECK = """<script>addEventListener("load", () => {
    const images = [...document.images];
    document.querySelectorAll("details").forEach(part => part.open = true);
    parent.document.title = JSON.stringify({
        width: innerWidth,
        too_wide: Math.max(0, document.documentElement.scrollWidth - innerWidth),
        broken: images.filter(image => !image.naturalWidth).length,
        silent: images.filter(image => !image.alt).length,
        requests: performance.getEntriesByType("resource").map(entry => entry.name)
            .filter(name => !name.startsWith("data:")),
    });
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
                pixels = np.clip(
                    rng.normal((90 * k, 120, 200 - 90 * k), 25, size=(48, 48, 3)),
                    0,
                    255,
                )
                PILImage.fromarray(pixels.astype(np.uint8)).save(
                    root / "photos" / split / f"colour_{k}" / f"{i}.png"
                )
    flags = [
        "--dataset",
        root / "photos",
        "--output-dir",
        root / "out",
        "--epochs",
        2,
        "--batch-size",
        8,
    ]
    flags += ["--lr", 0.01, "--num-workers", 0, "--cpu-threads", 1]
    finetune.main([str(flag) for flag in flags])
    return root / "out"


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


def many_classes(
    count=300, name="a class with a name of many words {} " + "unbreakable" * 8
):
    """A page about many classes with long names; half of the images are named wrongly."""
    rng = np.random.default_rng(0)
    picture = PILImage.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    labels = np.arange(2 * count) % count
    data = Dataset.from_dict({"image": [picture] * len(labels)}).cast_column(
        "image", Image()
    )
    images = LabelledImages(data, "image", labels, "test")
    # Right for the first image of each class, and one class further on for the second.
    predicted = torch.arange(2 * count) + torch.arange(2 * count) // count
    predictions = [predicted % count, torch.full((2 * count,), 0.9)]

    names = [name.format(k) for k in range(count)]
    scores = {
        "overall": 50.0,
        "macro": 50.0,
        "many": 50.0,
        "medium": 50.0,
        "few": None,
        "worst": 0.0,
    }
    scores |= {
        "per_class": [None, *[50.0] * (count - 1)],
        "num_classes": {"many": 100, "medium": count - 100, "few": 0},
    }
    results = {
        "settings": {"model": "user/clip", "dataset": "<b>photos</b>"},
        "class_names": names,
    }
    results |= {
        "class_counts": [20 + k for k in range(count)],
        "zero_shot": scores,
        "trained": scores,
    }
    probability = torch.linspace(0, 1, len(labels))
    return make_page("sage", results, images, predictions, images, probability), results


class Sources(HTMLParser):
    """Collects what a page would fetch, and its texts."""

    def __init__(self, page):
        super().__init__()
        self.sources, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.sources += [
            value
            for name, value in attributes
            if name in ("src", "href", "srcset", "action")
        ]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_asks_for_nothing_and_says_what_the_results_say(folder, results):
    page = Sources((folder / "report.html").read_text(encoding="utf-8"))
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    text = " ".join(page.texts)
    assert "@import" not in text and "url(" not in text
    for name in ("overall", "macro", "medium", "few"):
        assert f"{results['trained'][name]:.1f}" in text
    assert f"Text prior: {results['text_prior']}" in text
    # The image without another one of its class was never held out.
    suspects = text.split("Likely label errors")[1].split("Which classes would gain")[0]
    assert (
        "colour_0: " in suspects
        and "colour_1: " in suspects
        and "colour_2: " not in suspects
    )
    assert re.search(r"colour_0/\d+\.png", suspects)


def test_a_page_of_many_classes_with_long_names():
    page, results = many_classes()
    text = " ".join(Sources(page).texts)
    assert "<b>photos" not in page and "<b>photos</b>" in text
    assert all(name in text for name in results["class_names"])
    assert (
        "1 of 2 a class with a name of many words 5 " in text
        and "taken for a class with a name of many words 6 " in text
    )
    assert len(page) < 2_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("which", ["run", "many"])
def test_a_phone_shows_all_of_it(which, folder, tmp_path):
    page = (
        (folder / "report.html").read_text(encoding="utf-8")
        if which == "run"
        else many_classes()[0]
    )
    file = tmp_path / "page.html"
    frame = f'<title>-</title><iframe width=360 height=800 style="border:0" srcdoc="{escape(page + CHECK)}"></iframe>'
    file.write_text(frame, encoding="utf-8")
    command = [
        CHROMIUM,
        *BROWSER.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>{" in done.stdout, done.stderr[-2000:]
    found = json.loads(unescape(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1]))
    assert found == {
        "width": 360,
        "too_wide": 0,
        "broken": 0,
        "silent": 0,
        "requests": [],
    }


@pytest.fixture(scope="module")
def html(folder):
    """The card, without its metadata."""
    text = (folder / "README.md").read_text().split("---\n", 2)[2]
    return markdown_it.MarkdownIt("commonmark").enable("table").render(text)


def test_the_card_shows_the_results_and_its_pictures(folder, results, html):
    pictures = re.findall(r'<img src="(.*?)" alt=".+?"', html)
    assert sorted(pictures) == ["attention.png", "long_tail.png"]
    for picture in pictures:
        assert np.asarray(PILImage.open(folder / picture).convert("L")).std() > 10
    assert f"<td>{results['trained']['macro']:.4g}</td>" in html
    assert "lr: 0.01" in html and "dataset: photos\n" in html
    worst = html.split("The worst classes</h2>")[1].split("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in worst.split("<tr>")[2:]]
    assert {row[0]: row[1] for row in rows} == {
        "colour_0": "21",
        "colour_1": "6",
        "colour_2": "1",
    }
    assert [float(row[2]) for row in rows] == sorted(float(row[2]) for row in rows)


def test_the_snippet_of_the_card_runs(folder, monkeypatch, capsys):
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent / "photos" / "test" / "colour_0")
    photo = Path("0.png").rename("photo.jpg")
    try:
        exec(snippet, {})
    finally:
        photo.rename("0.png")
    expected = SageClassifier.from_pretrained(folder).predict(["0.png"])
    assert capsys.readouterr().out == f"{expected}\n"


def test_the_card_names_a_base_model_of_the_hub_only(results):
    for model, known in [
        ("user/clip", "user/clip"),
        (str(CLIP), None),
        ("a/b/c", None),
    ]:
        settings = results["settings"] | {"model": model}
        card = create_model_card(results | {"settings": settings}, "sage", "me/mine")
        assert (
            card.data.base_model == known and 'from_pretrained("me/mine")' in card.text
        )


def test_confused_pairs():
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 0, 1, 0])
    rows = confused_pairs(labels, predicted, ["cow", "owl", "bat"])
    assert rows[0] == {
        "count": 3,
        "text": "2 of 3 cow taken for owl; 1 of 2 owl taken for cow",
    }
    assert rows[1] == {"count": 1, "text": "1 of 1 bat taken for cow"}


def test_rare_classes_gain_most_from_more_images():
    counts = np.array([400, 100, 25, 6, 6])
    extra, gains = expected_gains(
        counts, [95.0, 80.0, 60.0, 40.0, None], np.full(5, 50)
    )
    assert (
        extra == 25
        and [k for k, _ in gains][0] == 3
        and gains[0][1] > 10 > gains[-1][1] > 0
    )
    assert (
        expected_gains(counts, [40.0, 60.0, 80.0, 95.0, None], np.full(5, 50))[1] == []
    )
    # All right: nothing to gain, and nothing breaks.
    assert all(
        abs(gain) < 5
        for _, gain in expected_gains(counts, [100.0] * 5, np.full(5, 50))[1]
    )


def test_plot_long_tail_draws_the_results(tmp_path):
    run = {"many": 90.0, "medium": None, "few": None, "per_class": [50.0, None, 100.0]}
    figure = plot_long_tail(
        {"one": run, "two": {**run, "many": 70.0}},
        [3, 500, 50],
        ["owl", "cow $", "bat"],
    )
    classes, groups, accuracies = figure.axes
    points = accuracies.lines[0].get_ydata()
    assert np.isnan(points[0]) and list(points[1:]) == [100.0, 50.0]
    assert [bar.get_height() for container in groups.containers for bar in container][
        ::3
    ] == [90.0, 70.0]
    assert [label.get_text() for label in classes.get_xticklabels()] == [
        "cow $",
        "bat",
        "owl",
    ]
    figure.savefig(tmp_path / "tail.png")
