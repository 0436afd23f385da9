# SPDX-License-Identifier: Apache-2.0
"""`SageClassifier.predict` and `embed`: whatever pictures come in, each answer belongs to its picture."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import pipeline

from peft_sage import SageClassifier, SageConfig
from tests.conftest import tiny_clip
from tests.test_classifier import (
    NAMES,
    assert_same,
    folder,
    pictures,
    processor,
    trained,
)


__all__ = ["folder"]


def test_predict_reads_pictures_in_any_form(folder, tmp_path):
    classifier = SageClassifier.from_texts(folder, NAMES)
    images = pictures()
    paths = saved(images, tmp_path / "new")
    (tmp_path / "new" / ".hidden.png").write_bytes(b"")
    want = classifier.predict(images, top_k=3)
    several = {
        "paths": [Path(path) for path in paths],
        "folder": tmp_path / "new",
        "arrays": [np.asarray(image) for image in images],
        "array": np.stack([np.asarray(image) for image in images]),
        "array of paths": np.array(paths),
        "generator": (image for image in images),
        "prepared": processor()(images=images, return_tensors="pt"),
        "pattern": str(tmp_path / "**" / "[0-9].png"),
    }
    for given in several.values():
        assert_same(classifier.predict(given, top_k=3, batch_size=2), want)
    for answer in want:
        assert len(answer) == 3
        assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-5)
        assert answer[0]["score"] >= answer[1]["score"] and answer[0]["label"] in NAMES
    rotated = images[0].rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    rotated.save(tmp_path / "turned.png", exif=exif)
    assert_same(classifier.predict([tmp_path / "turned.png"], top_k=3), want[:1])


def test_predict_names_what_it_cannot_read(folder, tmp_path):
    classifier = SageClassifier.from_texts(folder, NAMES)
    (tmp_path / "empty").mkdir()
    for given in ([tmp_path / "missing.png"], tmp_path / "empty"):
        with pytest.raises(ValueError, match="missing.png|empty"):
            classifier.predict(given)
    with pytest.raises(
        ValueError, match="`top_k` must be an integer, at least 1, got 0"
    ):
        classifier.predict(pictures(), top_k=0)
    with pytest.raises(ValueError, match="`batch_size`"):
        classifier.predict(pictures(), batch_size=0)
    with pytest.raises(ValueError, match="`image_processor`"):
        SageClassifier(tiny_clip(), torch.randn(3, 16)).predict(pictures())


def test_embed_is_the_frozen_tower_whatever_is_given(folder):
    classifier = SageClassifier.from_texts(folder, NAMES)
    images = pictures(5)
    pixels = processor()(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        want = F.normalize(tiny_clip().get_image_features(pixels).pooler_output, dim=-1)
    model = trained(get_peft_model(classifier, SageConfig())).train()
    rows = [{"pixel_values": row, "labels": 0} for row in pixels]
    loader = DataLoader(rows, batch_size=2)
    for given in (
        images,
        rows,
        loader,
        ({"pixel_values": part} for part in pixels.split(2)),
        [{"pixel_values": part} for part in pixels.split(2)],
        [{"image": i} for i in images],
    ):
        torch.testing.assert_close(model.embed(given, batch_size=np.int64(2)), want)
    # The adapters are on again, trained as before, and the model in its mode.
    assert model.training and any(
        "peft_sage_" in n for n, p in model.named_parameters() if p.requires_grad
    )
    assert not torch.allclose(
        classifier.eval()(pixels).logits,
        25 * want @ classifier.text_embeds.T,
        atol=1e-3,
    )


def saved(images, target) -> list[str]:
    target.mkdir()
    for index, image in enumerate(images):
        image.save(target / f"{index}.png")
    return [str(target / f"{index}.png") for index in range(len(images))]


def test_a_series_is_read_by_position(folder, tmp_path):
    pandas = pytest.importorskip("pandas")
    classifier = SageClassifier.from_texts(folder, NAMES)
    paths = pandas.Series(saved(pictures(5), tmp_path / "new"))
    for chosen in (paths.sample(frac=1, random_state=1), paths[paths.index % 2 == 1]):
        assert list(chosen.index) != list(range(len(chosen)))
        want = classifier.predict(chosen.tolist(), top_k=3)
        assert_same(classifier.predict(chosen, top_k=3), want)
        rows = classifier.embed(chosen.tolist())
        torch.testing.assert_close(classifier.embed(chosen), rows)
    with pytest.raises(TypeError, match="`images` must be one column"):
        classifier.predict(paths.to_frame())


def test_one_picture_in_any_form_is_one_picture(folder, tmp_path):
    classifier = SageClassifier.from_texts(folder, NAMES)
    images = pictures()
    paths = saved(images, tmp_path / "new")
    want = classifier.predict(images, top_k=3)
    data = (tmp_path / "new" / "0.png").read_bytes()
    file = io.BytesIO(data)
    forms = (images[0], np.asarray(images[0]), paths[0], data, {"image": data}, file)
    for given in forms:
        assert_same(classifier.predict(given, top_k=3), want[:1])
    grey = images[0].convert("L")
    for given in (grey, np.asarray(grey), np.asarray(grey)[..., None]):
        assert_same(classifier.predict(given, top_k=3), classifier.predict([grey], 3))


def test_what_is_no_picture_is_refused_by_name(folder):
    classifier = SageClassifier.from_texts(folder, NAMES)
    for given in (None, 3, torch.zeros(3, 8, 8), {"a", "b"}, {0: "a.png"}):
        with pytest.raises(TypeError, match="`images`"):
            classifier.predict(given)
    for given in ("", np.zeros((2, 3, 8, 8, 3)), np.zeros((5, 8, 7)), "*.nothing"):
        with pytest.raises(ValueError, match="`images`"):
            classifier.predict(given)
    with pytest.raises(TypeError, match="`images` must yield batches"):
        classifier.predict(DataLoader(torch.zeros(2, 3, 8, 8)))
    assert classifier.predict([]) == []
    with pytest.raises(ValueError, match="`images` is empty"):
        classifier.embed([])
    assert len(classifier.predict(pictures(1), top_k=99)[0]) == len(NAMES)
    blank = SageClassifier(tiny_clip(), None, image_processor=processor())
    with pytest.raises(ValueError, match="no classes"):
        blank.predict(pictures(1))


def test_folders_are_searched_to_their_ends_and_one_broken_file_ends_nothing(
    folder, tmp_path
):
    classifier = SageClassifier.from_texts(folder, NAMES)
    images = pictures(4)
    top = tmp_path / "new"
    saved(images[:2], top)
    saved(images[2:], top / "inside")
    want = classifier.predict(images, top_k=3)
    assert_same(classifier.predict(top, top_k=3), want)
    (top / "1a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="1a.png"):
        classifier.predict(top)
    with pytest.warns(UserWarning, match="1 of 5 images could not be read: .*1a.png"):
        got = classifier.predict(top, top_k=3, batch_size=2, on_error="skip")
    assert got[2] is None
    assert_same([*got[:2], *got[3:]], want)
    missing = [str(top / "nothing.png")]
    with pytest.warns(UserWarning, match="nothing.png"):
        assert classifier.predict(missing, on_error="skip") == [None]
    with pytest.raises(ValueError, match="`on_error`"):
        classifier.predict(images, on_error="ignore")


def test_unsure_answers_are_none(folder):
    classifier = SageClassifier.from_texts(folder, NAMES)
    answers = classifier.predict(pictures(6))
    middle = sorted(answer[0]["score"] for answer in answers)[3]
    got = classifier.predict(pictures(6), min_score=middle)
    assert got == [a if a[0]["score"] >= middle else None for a in answers]
    assert 0 < got.count(None) < 6
    with pytest.raises(ValueError, match="`min_score`"):
        classifier.predict(pictures(), min_score=70)


def test_one_temperature_is_fitted_used_and_saved(folder, tmp_path):
    classifier = SageClassifier.from_texts(folder, NAMES)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 3, generator=generator)
    truth = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator)[:, 0]
    model = get_peft_model(classifier, SageConfig())
    temperature = model.fit_temperature(logits, truth)
    grid = torch.linspace(0.5, 6, 1101)
    losses = torch.stack([F.cross_entropy(logits / t, truth) for t in grid])
    assert temperature == pytest.approx(grid[losses.argmin()].item(), abs=0.01)
    before = torch.tensor(
        [[e["score"] for e in a] for a in model.predict(pictures(), 3)]
    )
    classifier.head.temperature = 1.0
    plain = torch.tensor(
        [[e["score"] for e in a] for a in model.predict(pictures(), 3)]
    )
    torch.testing.assert_close(before, (plain.log() / temperature).softmax(1))
    classifier.head.temperature = temperature
    model.save_pretrained(tmp_path)
    loaded = SageClassifier.from_pretrained(tmp_path)
    assert loaded.head.temperature == temperature
    assert f"temperature={temperature:g}" in repr(loaded)
    # Separable: as sharp as allowed, and not a division by zero.
    assert classifier.fit_temperature(torch.eye(3), torch.arange(3)) < 0.06
    with pytest.raises(ValueError, match="`logits` must have the shape"):
        classifier.fit_temperature(torch.randn(4, 7), torch.zeros(4, dtype=torch.long))


def test_embed_turns_off_what_is_saved_inside_the_tower(folder):
    classifier = SageClassifier.from_texts(folder, NAMES)
    want = classifier.embed(pictures())
    config = LoraConfig(
        target_modules=r".*vision_model.*q_proj",
        modules_to_save=["class_head", "visual_projection"],
    )
    model = trained(get_peft_model(classifier, config))
    pixels = processor()(images=pictures(), return_tensors="pt")["pixel_values"]
    adapted = F.normalize(
        classifier.model.get_image_features(pixels).pooler_output, dim=-1
    )
    assert not torch.allclose(adapted, want, atol=0.01)
    torch.testing.assert_close(model.embed(pictures()), want)
    biased = LoraConfig(target_modules=r".*vision_model.*q_proj", bias="all")
    get_peft_model(other := SageClassifier.from_texts(folder, NAMES), biased)
    with pytest.warns(UserWarning, match="`bias` trains biases of the base model"):
        other.embed(pictures())


def test_pipeline_in_batches_of_a_model_in_training_mode(folder):
    classifier = SageClassifier.from_texts(folder, NAMES)
    want = classifier.predict(pictures(), top_k=2)
    model = get_peft_model(classifier, SageConfig()).train()
    for of in (classifier.train(), model):
        pipe = pipeline(
            "image-classification", model=of, image_processor=processor(), device="cpu"
        )
        assert_same(pipe(pictures(), batch_size=2, top_k=2), want)
