# SPDX-License-Identifier: Apache-2.0
"""What `examples/finetune.py` leaves behind: a card whose snippet runs, pictures, and a page that renders."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


markdown_it = pytest.importorskip("markdown_it")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
import report  # noqa: E402


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
    assert sorted(pictures) == ["attention.png", "long_tail.png", "mismatch.png"]
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
    assert "<title>images 3 broken  wide </title>" in done.stdout, done.stdout[-500:]


def test_class_means():
    means = report.class_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 3)
    torch.testing.assert_close(means, torch.tensor([2.0, float("nan"), 5.0]), equal_nan=True)
