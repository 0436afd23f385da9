# SPDX-License-Identifier: Apache-2.0
"""Guidance from a text encoder of your own: any tensor (M, e), with one row a class.

The adapter then needs no text tower, so that it fits a vision-only model such as DINOv2.

python examples/by_feature/own_guidance.py --text-encoder sentence-transformers/all-MiniLM-L6-v2
python examples/by_feature/own_guidance.py        (offline: counts of letter triples stand in for the encoder)
"""

import zlib

import torch
from demo import evaluate, load, parse, report, train
from peft import get_peft_model
from transformers import AutoModel, AutoTokenizer

from peft_sage import SageConfig, SageLoss


def mean_of_tokens(texts: list[str], name: str) -> torch.Tensor:
    """Embed texts with an encoder of transformers: the mean over the tokens."""
    tokens = AutoTokenizer.from_pretrained(name)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(name)(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def letter_triples(texts: list[str], size: int = 256) -> torch.Tensor:
    """Count the triples of letters: similar words have similar vectors."""
    rows = torch.zeros(len(texts), size)
    for row, text in zip(rows, texts, strict=True):
        for start in range(len(text) - 2):
            row[zlib.crc32(text[start : start + 3].lower().encode()) % size] += 1
    return rows


args = parse(__doc__, text_encoder=None)
demo = load(args)
texts = [" ".join(demo.descriptions[name]) for name in demo.class_names]
guidance = mean_of_tokens(texts, args.text_encoder) if args.text_encoder else letter_triples(texts)
config = SageConfig(guidance=guidance, class_names=demo.class_names, modules_to_save=["class_head"])
model = get_peft_model(demo.classifier(), config)
train(model, demo.splits["train"], SageLoss(demo.class_counts), args)
report("own guidance", evaluate(model, demo.splits["test"], demo.class_counts))
