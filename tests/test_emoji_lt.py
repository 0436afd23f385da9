# SPDX-License-Identifier: Apache-2.0
"""Emoji-LT keeps its promises: disjoint concepts, no copies, a long tail, honest texts, a checkpoint that sees."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from peft_sage import LongTailAccuracy, SageClassifier


FOLDER = Path(__file__).parents[1] / "examples" / "emoji_lt"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    cache = tmp_path_factory.mktemp("datasets")
    return load_dataset(str(FOLDER), cache_dir=str(cache))


def test_splits_share_neither_concepts_nor_images(emoji):
    concepts = [set(emoji[split]["concept"]) for split in SPLITS]
    images = [
        {image.convert("RGB").tobytes() for image in emoji[split]["image"]}
        for split in SPLITS
    ]
    for train, validation, test in (concepts, images):
        assert not test & (train | validation) and not validation & train


def test_training_set_has_a_long_tail_and_every_class_is_tested(emoji):
    counts = np.bincount(emoji["train"]["label"][:])
    assert counts.min() > 0 and 80 <= counts.max() / counts.min() <= 110
    groups = np.digitize(counts, (20, 101))
    assert min(Counter(groups.tolist()).values()) >= 10
    tested = set(zip(emoji["test"]["label"], emoji["test"]["concept"], strict=True))
    sizes = Counter(label for label, _ in tested)
    assert set(sizes) == set(range(len(counts))) and max(sizes.values()) <= 3


def test_descriptions_name_no_held_out_concept(emoji):
    descriptions = json.loads((FOLDER / "descriptions.json").read_text("utf-8"))
    assert list(descriptions) == emoji["train"].features["label"].names
    held_out = {*emoji["validation"]["concept"], *emoji["test"]["concept"]}
    names = "|".join(re.escape(name.lower()) for name in held_out)
    for name, texts in descriptions.items():
        assert texts and all(text.startswith(name) for text in texts)
        for text in texts:
            assert not re.search(rf"(?<!\w)({names})(?!\w)", text.lower()), text


def test_checkpoint_beats_chance(emoji):
    texts = json.loads((FOLDER / "descriptions.json").read_text("utf-8"))
    classifier = SageClassifier.from_texts(FOLDER / "tiny-clip", texts)
    accuracy = LongTailAccuracy([1] * len(texts))
    validation = emoji["validation"]
    logits = classifier.embed(validation) @ classifier.text_embeds.T
    accuracy.update(logits, validation["label"][:])
    assert accuracy.compute()["macro"] > 10 / 86
