# SPDX-License-Identifier: Apache-2.0
"""Encoding class descriptions, against the text tower alone."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from settings import Measurement, Settings
from timing import interleaved, row
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from peft_sage import encode_class_descriptions


GOAL = 1.05
BATCH_SIZE = 256
TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "emoji_lt" / "tiny-clip"
TEMPLATES = [
    "a photo of a {}.",
    "a bad photo of the {}.",
    "a close-up photo of a {}.",
    "a {} in the wild.",
    "a drawing of a {}.",
    "a photo of the small {}.",
    "a photo of many {}.",
]


def text(settings: Settings) -> Measurement:
    """`encode_class_descriptions` over the tower's own forward on the same tokens, sorted by length."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    clip = _clip(settings, tokenizer)
    names = _names(settings.text_classes)
    texts = [template.format(name) for name in names for template in TEMPLATES]
    ids = sorted(tokenizer(texts)["input_ids"], key=len)
    starts = range(0, len(ids), BATCH_SIZE)
    batches = [tokenizer.pad({"input_ids": ids[i : i + BATCH_SIZE]}, return_tensors="pt") for i in starts]
    batches = [batch.to(settings.device) for batch in batches]

    @torch.no_grad()
    def tower_alone() -> None:
        for batch in batches:
            clip.get_text_features(**batch)

    def encode() -> None:
        encode_class_descriptions(clip, tokenizer, names, TEMPLATES, BATCH_SIZE, progress_bar=False)

    seconds = interleaved({"encode": encode, "tower": tower_alone}, settings)
    what = f"`encode_class_descriptions`, {len(names):,} classes x {len(TEMPLATES)} templates / text tower alone"
    return [row(what, seconds["encode"] / seconds["tower"], GOAL)], []


def _clip(settings: Settings, tokenizer: object) -> CLIPModel:
    torch.manual_seed(0)
    width = settings.width * 2 // 3
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": settings.blocks,
        "num_attention_heads": max(1, width // 64),
        "vocab_size": 49408,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=tower, vision_config={"num_hidden_layers": 1}, projection_dim=512)
    return CLIPModel(config).eval().to(settings.device)


def _names(count: int) -> list[str]:
    """Return names of one to four words, as those of species and products are."""
    generator = random.Random(0)
    syllables = [a + b for a in "bcdfglmnprstv" for b in "aeiou"]
    word = lambda: "".join(generator.choices(syllables, k=generator.randint(2, 4)))  # noqa: E731
    return [" ".join(word() for _ in range(generator.randint(1, 4))) + f" {i}" for i in range(count)]
