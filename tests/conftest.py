# SPDX-License-Identifier: Apache-2.0
"""Small models that every test can afford."""

import os


# Has to come before huggingface_hub, which would try again for minutes where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)


TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 40,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_clip(seed: int = 0) -> CLIPModel:
    """A `CLIPModel` with three vision blocks of width 32 and embeddings of width 16."""
    torch.manual_seed(seed)
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    ).eval()


def tiny_siglip(seed: int = 0) -> SiglipModel:
    """A `SiglipModel` of the same size."""
    torch.manual_seed(seed)
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose ids end with the end-of-text token 3, as the tiny CLIP's tower expects.

    Not 2: transformers takes that for an old checkpoint and pools the highest id instead.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        token: i for i, token in enumerate(["<pad>", "<s>", "<unk>", "</s>", *alphabet])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=40,
    )


@pytest.fixture
def clip() -> CLIPModel:
    return tiny_clip()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def clip_dir(tmp_path, clip) -> str:
    """A folder with the tiny CLIP and its tokenizer."""
    clip.save_pretrained(tmp_path / "clip")
    byte_tokenizer().save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every adapter random weights, so that it is no longer the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "peft_sage_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
