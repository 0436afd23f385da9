# SPDX-License-Identifier: Apache-2.0
"""Emoji-LT keeps its promises: disjoint concepts, no copies, a long tail, honest texts, a checkpoint that sees."""

import hashlib
import json
import re
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


pq = pytest.importorskip("pyarrow.parquet")
FOLDER = Path(__file__).parent.parent / "examples" / "emoji_lt"
sys.path.insert(0, str(FOLDER))

import evaluate_zero_shot as zero_shot  # noqa: E402
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel  # noqa: E402


SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, list]]:
    return {
        split: pq.read_table(FOLDER / f"{split}.parquet").to_pydict()
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def names() -> list[str]:
    return zero_shot.class_names_of(FOLDER / "train.parquet")


@pytest.fixture(scope="module")
def descriptions() -> dict[str, list[str]]:
    return json.loads((FOLDER / "descriptions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(FOLDER / "tiny-clip", dtype=torch.float32).eval()


def test_splits_share_no_concept(tables: dict[str, dict[str, list]]) -> None:
    train, validation, test = (set(tables[split]["concept"]) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_held_out_images_are_no_copies(tables: dict[str, dict[str, list]]) -> None:
    def digests(split: str) -> set[bytes]:
        return {
            hashlib.sha256(zero_shot.decode(image["bytes"])).digest()
            for image in tables[split]["image"]
        }

    train, validation, test = (digests(split) for split in SPLITS)
    assert not test & (train | validation)
    assert not validation & train


def test_training_set_has_a_long_tail(
    tables: dict[str, dict[str, list]], names: list[str]
) -> None:
    counts = np.bincount(tables["train"]["label"], minlength=len(names))
    assert counts.min() > 0
    assert 80 <= counts.max() / counts.min() <= 110
    groups = Counter(
        "many" if n > 100 else "medium" if n >= 20 else "few" for n in counts
    )
    assert min(groups[name] for name in ("many", "medium", "few")) >= 10


def test_every_class_is_tested(
    tables: dict[str, dict[str, list]], names: list[str]
) -> None:
    concepts = set(zip(tables["test"]["label"], tables["test"]["concept"], strict=True))
    sizes = Counter(label for label, _ in concepts)
    assert set(sizes) == set(range(len(names)))
    assert max(sizes.values()) <= 3


def test_images_are_drawings_laid_on_white(tables: dict[str, dict[str, list]]) -> None:
    for image in tables["test"]["image"][::50]:
        decoded = Image.open(BytesIO(image["bytes"]))
        pixels = np.asarray(decoded)
        assert decoded.size == (48, 48)
        assert decoded.mode in ("RGBA", "RGB")
        if decoded.mode == "RGBA":
            assert (pixels[pixels[..., 3] == 0][:, :3] == 255).all()


def test_descriptions_cover_the_classes_and_keep_the_secret(
    tables: dict[str, dict[str, list]],
    names: list[str],
    descriptions: dict[str, list[str]],
) -> None:
    assert list(descriptions) == names
    held_out = {*tables["validation"]["concept"], *tables["test"]["concept"]}
    for name, texts in descriptions.items():
        assert texts
        for text in texts:
            assert text.startswith(name)
            told = [
                c
                for c in held_out
                if re.search(rf"(?<!\w){re.escape(c.lower())}(?!\w)", text.lower())
            ]
            assert not told, text


def test_distractors_of_scenes_are_split_by_concept() -> None:
    table = pq.read_table(FOLDER / "distractors.parquet").to_pydict()
    owner: dict[str, str] = {}
    for concept, split in zip(table["concept"], table["split"], strict=True):
        assert owner.setdefault(concept, split) == split
    assert set(owner.values()) == set(SPLITS)


def test_text_tower_pools_the_end_token_and_tells_classes_apart(
    clip: CLIPModel, names: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tiny-clip")
    assert clip.config.text_config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        alone = clip.text_model(**tokenizer(["cow"], return_tensors="pt")).pooler_output
        texts = ["cow", "a much longer text about a cow in the meadow"]
        padded = clip.text_model(
            **tokenizer(texts, padding=True, return_tensors="pt")
        ).pooler_output
    torch.testing.assert_close(alone[0], padded[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(padded[0], padded[1], atol=1e-2)
    classes = zero_shot.encode_classes(clip, tokenizer, [[name] for name in names])
    similarity = classes @ classes.T - 2 * torch.eye(len(names))
    assert similarity.max() < 0.99


def test_checkpoint_beats_chance(
    clip: CLIPModel,
    tables: dict[str, dict[str, list]],
    names: list[str],
    descriptions: dict[str, list[str]],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tiny-clip")
    processor = AutoImageProcessor.from_pretrained(FOLDER / "tiny-clip")
    classes = zero_shot.encode_classes(
        clip, tokenizer, [descriptions[name] for name in names]
    )
    table = tables["validation"]
    images = [
        Image.fromarray(zero_shot.decode(image["bytes"]))
        for image in table["image"][::4]
    ]
    labels = torch.tensor(table["label"][::4])
    logits = (
        zero_shot.encode_images(
            clip, processor(images, return_tensors="pt")["pixel_values"]
        )
        @ classes.T
    )
    result = zero_shot.group_accuracy(logits, labels)
    assert result["macro"] > 10 * 100 / len(names)
    assert result["top5"] > 4 * 500 / len(names)


def test_group_accuracy_against_a_worked_example() -> None:
    logits = torch.eye(7)[torch.tensor([0, 0, 1, 2, 2, 6])]
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    counts = torch.tensor([200, 50, 5, 5, 5, 5, 5])
    result = zero_shot.group_accuracy(logits, labels, counts)
    assert result["overall"] == pytest.approx(100 * 4 / 6)
    assert result["macro"] == pytest.approx(100 * (1 + 1 / 2 + 2 / 3) / 3)
    assert result["many"] == pytest.approx(100)
    assert result["medium"] == pytest.approx(50)
    assert result["few"] == pytest.approx(100 * 2 / 3)
