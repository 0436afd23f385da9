# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the tiny CLIP: byte-level BPE in CLIP's own format."""

import json

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer


START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
# CLIP's tokenizer splits text by this before byte-pair encoding.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def build_tokenizer(
    texts: list[str],
    size: int,
    context: int,
) -> CLIPTokenizer:
    """Train byte-level BPE of `size` tokens; the tokenizer truncates to `context` and pads with the end token."""
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix=END_OF_WORD))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        special_tokens=[START, END],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    # CLIP's format needs both tokens of every byte, also of those that never ended a word.
    vocabulary = dict(learnt["vocab"])
    for letter in alphabet:
        for token in (letter, letter + END_OF_WORD):
            vocabulary.setdefault(token, len(vocabulary))
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" "))
        for merge in learnt["merges"]
    ]
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token=END, model_max_length=context
    )


def tokenize(
    tokenizer: CLIPTokenizer,
    texts: list[str],
    context: int,
) -> Tensor:
    """Return token ids (n, context), padded with the end token."""
    batch = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=context,
    )
    return torch.tensor(batch["input_ids"])
