# SPDX-License-Identifier: Apache-2.0
"""Embeddings of text and images, against the logits of the models themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING

from peft_sage import SageClassifier, SageConfig
from peft_sage.towers.embeddings import (
    encode_image,
    encode_text,
    has_text_tower,
    text_config,
)
from tests.tower_models import TEXT, TINY, VISION, Tiny, images, tokens


WITH_TEXT = [tiny for tiny in TINY if tiny.text]
every_model_with_text = pytest.mark.parametrize(
    "tiny", WITH_TEXT, ids=lambda tiny: tiny.id
)


def tiny_named(name: str) -> Tiny:
    return next(tiny for tiny in TINY if tiny.id == name)


def build(tiny: Tiny) -> nn.Module:
    torch.manual_seed(0)
    model = tiny.build()
    if tiny.model_type == "xclip":
        model.prompts_generator.alpha.data.zero_()  # how much a video changes the texts
    if getattr(model, "logit_bias", None) is not None:
        model.logit_bias.data.fill_(-3.0)
    return model


def own_logits(tiny: Tiny, model: nn.Module, pixels: dict, text: dict) -> torch.Tensor:
    output = model(**pixels, **text)
    return output[
        "logits_per_video" if tiny.model_type == "xclip" else "logits_per_image"
    ]


def scaled(model: nn.Module, cosines: torch.Tensor) -> torch.Tensor:
    """The model's own image-text logits from cosines."""
    scale, bias = (
        getattr(model, "logit_scale", None),
        getattr(model, "logit_bias", None),
    )
    if scale is not None:
        limit = getattr(model, "max_log_logit_scale", None)
        cosines = cosines * (scale if limit is None else scale.clamp(0.0, limit)).exp()
    elif isinstance(temperature := getattr(model, "temperature", None), torch.Tensor):
        cosines = cosines / temperature
    return cosines if bias is None else cosines + bias


@every_model_with_text
@torch.no_grad()
def test_embeddings_give_the_logits_of_the_model(tiny: Tiny) -> None:
    model = build(tiny)
    pixels = tiny.text()
    text = tokens()
    logits = own_logits(tiny, model, pixels, text)
    assert has_text_tower(model)
    assert logits.std() > 1e-4  # not one row repeated
    image, words = (
        encode_image(model, **pixels),
        encode_text(model, {**text, "unknown_to_the_tower": torch.zeros(1)}),
    )
    cosines = F.normalize(image, dim=-1) @ F.normalize(words, dim=-1).T
    torch.testing.assert_close(scaled(model, cosines), logits, atol=1e-5, rtol=1e-5)
    classifier = SageClassifier(model, words, scale=1.0)
    torch.testing.assert_close(classifier(**pixels).logits, cosines)


@torch.no_grad()
def test_wrapped_models_embed_alike() -> None:
    model = build(tiny_named("clip-CLIPModel"))
    pixels = images()
    text = tokens()
    expected = encode_image(model, **pixels), encode_text(model, text)
    wrapped = SageClassifier(model, torch.randn(5, 24))
    wrapped = get_peft_model(
        wrapped, SageConfig(guidance=torch.randn(5, 12), r=4, num_heads=2)
    )
    wrapped = get_peft_model(
        wrapped.base_model.model,
        LoraConfig(target_modules=["q_proj"]),
        adapter_name="lora",
    )
    assert has_text_tower(wrapped) and text_config(wrapped) is model.config
    actual = encode_image(wrapped, **pixels), encode_text(wrapped, text)
    torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_parts_of_a_model_embed_alike() -> None:
    model = build(tiny_named("clip-CLIPModel"))
    pixels = images()
    text = tokens()
    state = model.state_dict()
    for part, encode, inputs in (
        ("Text", encode_text, (text,)),
        ("Vision", encode_image, (pixels["pixel_values"],)),
    ):
        config = CONFIG_MAPPING[f"clip_{part.lower()}_model"](
            **(TEXT if part == "Text" else VISION), projection_dim=24
        )
        tower = getattr(transformers, f"CLIP{part}ModelWithProjection")(config).eval()
        tower.load_state_dict({name: state[name] for name in tower.state_dict()})
        torch.testing.assert_close(encode(tower, *inputs), encode(model, *inputs))
        assert has_text_tower(tower) == (part == "Text")


@torch.no_grad()
def test_towers_alone_give_what_they_pool_or_the_mean() -> None:
    for name, pooled in (
        ("vit-ViTForImageClassification", True),
        ("dinov2-Dinov2Model", True),
        ("ijepa-IJepaModel", False),
    ):
        model = build(tiny_named(name))
        pixels = images()
        output = model.base_model(**pixels)
        expected = (
            output.pooler_output if pooled else output.last_hidden_state.mean(dim=1)
        )
        if expected is None:  # a classifier's tower has no pooler
            expected = output.last_hidden_state.mean(dim=1)
        torch.testing.assert_close(encode_image(model, **pixels), expected)
        wrapped = get_peft_model(
            model, SageConfig(guidance=torch.randn(5, 12), r=4, num_heads=2)
        )
        torch.testing.assert_close(encode_image(wrapped, **pixels), expected)
    model = build(tiny_named("clip-CLIPForImageClassification"))
    pixels = images()
    torch.testing.assert_close(
        encode_image(model, **pixels), model.vision_model(**pixels).pooler_output
    )


def test_models_without_a_shared_space_are_refused() -> None:
    vit = build(tiny_named("vit-ViTModel"))
    assert not has_text_tower(vit)
    with pytest.raises(
        ValueError, match="`model` must have a text tower.*ViTModel .*pass embeddings"
    ):
        encode_text(vit, tokens())
    # It generates text, which is no embedding of text.
    assert not has_text_tower(build(tiny_named("blip-2-Blip2Model")))
    llava = build(tiny_named("llava-LlavaModel"))
    assert not has_text_tower(llava)
    with pytest.raises(ValueError, match=r"`model` must give embeddings .*LlavaModel"):
        encode_image(llava, torch.randn(2, 3, 16, 16))
