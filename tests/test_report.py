# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for people: its numbers, a page in a browser, and a card whose snippet runs."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torchmetrics.functional.classification import multiclass_calibration_error

from peft_sage import SageClassifier, SageConfig, SageTrainer, SageTrainingArguments
from peft_sage.data import ImageData, load_images
from peft_sage.report import Evaluation, RunResults, make_model_card, write_report
from peft_sage.report.statistics import (
    calibration_error,
    confidence_threshold,
    expected_gains,
    paired_difference_interval,
    wilson_interval,
)


markdown_it = pytest.importorskip("markdown_it")
CLIP = Path(__file__).parents[1] / "examples" / "emoji_lt" / "tiny-clip"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BROWSER = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync "
    "--disable-component-update --no-first-run --virtual-time-budget=5000 --dump-dom"
)
#: Put into the page, says what a browser found as the title of the page around it: a window is never as narrow.
CHECK = """<script>addEventListener("load", () => {
    document.querySelectorAll("details").forEach(part => part.open = true);
    const links = [...document.querySelectorAll("a")].map(a => a.getAttribute("href"));
    const images = [...document.querySelectorAll("body > :not(dialog) img")];
    const button = document.querySelector("button.picture");
    if (button) button.click();
    const large = document.querySelector("dialog img");
    parent.document.title = JSON.stringify({
        width: innerWidth,
        too_wide: Math.max(0, document.documentElement.scrollWidth - innerWidth),
        broken: images.filter(image => !image.naturalWidth).length,
        silent: images.filter(image => !image.alt).length,
        dead_links: links.filter(link => !document.querySelector(link)),
        sections: document.querySelectorAll("section").length - new Set(links).size,
        enlarged: large.clientWidth > button.clientWidth && large.src == button.firstChild.src,
        requests: performance.getEntriesByType("resource").map(entry => entry.name)
            .filter(name => !name.startsWith("data:")),
    });
})</script>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder, results and data of a run on four noisy colours: one has one training image, one has none."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for split, counts in {
        "train": (21, 6, 1, 0),
        "validation": (4, 4, 4, 4),
        "test": (4, 4, 4, 4),
    }.items():
        for k, count in enumerate(counts):
            folder = root / "photos" / split / f"colour_{k}"
            folder.mkdir(parents=True)
            for i in range(count):
                mean = (60 * k, 120, 200 - 60 * k)
                pixels = np.clip(rng.normal(mean, 25, size=(48, 48, 3)), 0, 255)
                image = PILImage.fromarray(pixels.astype(np.uint8))
                image.save(folder / f"{i}.png")
    data = load_images(root / "photos")
    classifier = SageClassifier.from_texts(CLIP, data.texts)
    args = SageTrainingArguments(
        output_dir=root / "out",
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        dataloader_num_workers=0,
        report_to="none",
        hub_token="hf_secret",
    )
    trainer = SageTrainer(
        classifier, args, data.train, data.validation, peft_config=SageConfig(r=8)
    )
    trainer.train()
    settings = {"model": str(CLIP), "dataset": str(root / "photos")}
    results = RunResults.collect(trainer, data, method="sage", settings=settings)
    trainer.save_model()
    write_report(root / "out", results, data)
    return root / "out", results, data


def many_classes(count=300):
    """Results and data of many classes with long names; zero-shot is right, training spoils half of the images."""
    rng = np.random.default_rng(0)
    picture = PILImage.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    labels = np.arange(2 * count) % count
    columns = {
        "image": [picture] * len(labels),
        "label": labels,
        "file": [f"row {i} of <test>.parquet" for i in range(len(labels))],
    }
    images = Dataset.from_dict(columns).cast_column("image", Image())
    names = [f"a class of many words {k} {'unbreakable' * 8}" for k in range(count)]
    data = ImageData(images, None, images, names, names)
    logits = 5 * torch.eye(count)[labels]
    spoiled = torch.cat([logits[:count], logits[:count].roll(1, dims=1)])
    counts = [*range(count)]
    results = RunResults(
        class_names=names,
        class_counts=counts,
        texts=names,
        method="sage",
        settings={"model": "user/clip", "dataset": "<b>photos</b>"},
        data={},
        labels=labels.tolist(),
        zero_shot=Evaluation.from_logits(logits, labels.tolist(), counts),
        trained=Evaluation.from_logits(spoiled, labels.tolist(), counts),
        suspects=[{"index": 0, "predicted": 7, "probability": 0.001}],
    )
    return results, data


@settings(deadline=None)  # the first import of scipy's part takes its time
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_what_a_test_would_not_reject(counts):
    right, total = counts
    for bound in wilson_interval(right, total):
        deviation = 1.959964 * math.sqrt(bound * (1 - bound) / total)
        assert abs(right / total - bound) == pytest.approx(deviation, abs=1e-6)


def test_the_interval_of_a_difference():
    low, high = paired_difference_interval(30, 10, 100)
    assert low < 0.2 < high and paired_difference_interval(0, 30, 100)[1] < 0
    assert paired_difference_interval(10, 30, 100) == pytest.approx((-high, -low))
    assert paired_difference_interval(0, 1, 2)[1] > 0


def test_calibration_is_that_of_torchmetrics():
    logits = 2 * torch.randn(2000, 5)
    labels = torch.multinomial(logits.softmax(dim=1), 1)[:, 0]
    sharp = 3 * logits
    answers = Evaluation.from_logits(sharp, labels.tolist(), [9] * 5).answers(labels)
    expected = multiclass_calibration_error(sharp.softmax(dim=1), labels, 5, n_bins=15)
    assert calibration_error(*answers) == pytest.approx(expected.item(), abs=1e-4)


def test_the_threshold_is_the_lowest_that_is_right_often_enough():
    confidences = np.array([0.9, 0.8, 0.8, 0.7])
    right = np.array([1, 1, 0, 0]) > 0
    assert confidence_threshold(confidences, right, 0.6) == 0.8
    assert confidence_threshold(confidences, right) == 0.9
    assert confidence_threshold(confidences, ~right, 0.95) is None


def test_rare_classes_gain_most_from_more_images_also_those_that_are_never_right():
    counts = np.array([400, 100, 25, 6, 6, 0, 9])
    tested = np.full(7, 50)
    tested[4] = 0
    right = np.array([48, 40, 30, 20, 0, 0, 0])
    extra, gains = expected_gains(counts, right, tested)
    assert extra == 9 and gains[4] == 0
    assert gains[3] > gains[2] > gains[1] > gains[0] > 0
    assert gains[5] > 0 and gains[6] > 0
    falling = expected_gains(counts, np.array([9, 20, 30, 48, 0, 50, 49]), tested)
    assert not falling[1].any()
    assert not expected_gains(counts, tested, tested)[1].any()


def test_results_come_back_from_their_file_and_fit_the_console(run, tmp_path):
    folder, results, _ = run
    assert RunResults.load(folder) == results
    text = (folder / "results.json").read_text()
    assert "hf_secret" not in text and "labels" in json.loads(text)
    assert results.class_counts == [21, 6, 1, 0]
    assert results.trained.num_classes == {"many": 0, "medium": 1, "few": 2, "none": 1}
    worse = len(results.worse_classes)
    verb = "is" if worse == 1 else "are"
    assert f"{worse} of 4 classes {verb} worse than before training" in str(results)
    assert f"{results.trained.none:.1f}" in str(results)
    assert len(results.validation) == 2 and results.kept_epoch in (1, 2)
    scores = results.adapter_scale_scores
    assert [*scores] == ["1", "0.5"]
    halved = scores["0.5"] >= scores["1"] - 0.005
    assert results.adapter_scale == (0.5 if halved else 1)
    half = dataclasses.replace(results, adapter_scale=0.5)
    assert "Of the adapters' update 50% is kept" in str(half)


def test_results_are_what_the_models_say(run):
    folder, results, data = run
    for evaluation, model in (
        (results.trained, SageClassifier.from_pretrained(folder)),
        (results.zero_shot, SageClassifier.from_texts(CLIP, data.texts)),
    ):
        answers = [answer[0] for answer in model.predict(data.test["image"][:])]
        names = [results.class_names[k] for k in evaluation.predictions]
        assert [answer["label"] for answer in answers] == names
        scores = [answer["score"] for answer in answers]
        assert scores == pytest.approx(evaluation.confidences, abs=1e-4)


def test_the_page_leads_to_files_and_says_what_changed(tmp_path):
    results, data = many_classes()
    write_report(tmp_path, results, data)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = unescape(
        re.sub(r"<script>.*?</script>|<style>.*?</style>|<[^>]*>", "", page, flags=re.S)
    )
    assert "<b>photos" not in page and "<b>photos</b>" in text
    assert all(name in text for name in data.class_names)
    assert "300 of 300 classes are less accurate than zero-shot" in text
    assert (
        "row 300 of <test>.parquet" in text
        and "looks like a class of many words 7" in text
    )
    assert "50.0" in text and "46.0 to 54.0" in text
    assert len(page) < 2_000_000


def test_the_page_of_a_run(run):
    folder, results, _ = run
    page = (folder / "report.html").read_text(encoding="utf-8")
    for value in (results.command, results.date, results.versions["torch"]):
        assert value in unescape(page)
    assert re.search(r"colour_\d/\d\.png", page) and "Validation accuracy" in page
    assert f"{100 * results.adapter_scale:g}% of the adapters' update is kept" in page
    absent = f"images: 1 of 4, accuracy {results.trained.none:.1f}%"
    assert absent in page and "better descriptions" in page
    assert 'src="http' not in page and str(folder.parent) not in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("which", ["run", "many"])
def test_a_browser_shows_all_of_it(which, width, request, tmp_path):
    folder = tmp_path
    if which == "many":
        write_report(tmp_path, *many_classes())
    else:
        folder = request.getfixturevalue("run")[0]
    page = (folder / "report.html").read_text(encoding="utf-8")
    style = f'width={width} height=800 style="border:0"'
    frame = f'<title>-</title><iframe {style} srcdoc="{escape(page + CHECK)}"></iframe>'
    file = tmp_path / "frame.html"
    file.write_text(frame, encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *BROWSER.split(), profile, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>{" in done.stdout, done.stderr[-2000:]
    found = json.loads(unescape(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1]))
    nothing = {"too_wide": 0, "broken": 0, "silent": 0, "sections": 0}
    nothing |= {"dead_links": [], "requests": []}
    assert found == {"width": width, "enlarged": True, **nothing}


def test_the_card_shows_the_results_and_its_snippet_runs(run, monkeypatch, capsys):
    folder, results, _ = run
    card = (folder / "README.md").read_text().split("---\n", 2)[2]
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(card)
    assert re.findall(r'<img src="(.*?)" alt=".+?"', html) == ["long_tail.png"]
    picture = PILImage.open(folder / "long_tail.png").convert("L")
    assert np.asarray(picture).std() > 10
    assert f"<td>{results.trained.macro:.1f}</td>" in html
    settings = yaml.safe_load(re.search("```yaml\n(.*?)```", card, re.S)[1])
    assert settings == results.shown_settings and settings["dataset"] == "photos"
    assert settings["mixed_precision"] == "no"
    monkeypatch.chdir(folder.parent / "photos" / "test" / "colour_0")
    shutil.copy("0.png", folder / "photo.jpg")
    monkeypatch.chdir(folder)
    exec(card.split("```python\n")[1].split("```")[0], {})
    expected = SageClassifier.from_pretrained(folder).predict("photo.jpg")
    assert capsys.readouterr().out == f"{expected}\n"


def test_the_card_names_a_base_model_of_the_hub_only(run):
    results = run[1]
    for model, known in [
        ("user/clip", "user/clip"),
        (str(CLIP), None),
        ("a/b/c", None),
    ]:
        card = make_model_card(replace(results, settings={"model": model}), "me/mine")
        assert card.data.base_model == known
        assert 'from_pretrained("me/mine")' in card.text


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['jinja2'] = None; import peft_sage.report"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'needs jinja2: pip install "peft_sage[report]"' in done.stderr
