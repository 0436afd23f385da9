# SPDX-License-Identifier: Apache-2.0
"""Towers of timm and open_clip, which need torchvision: run in an environment that has them, skipped elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from peft_sage import SageClassifier, SageConfig, SageLayer
from peft_sage.towers.embeddings import encode_image, encode_text, has_text_tower
from peft_sage.towers.mlps import find_mlps, layer_scale
from tests.tower_models import FAMILIES


timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

VIT = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 0,
}
TOWER = {
    "image_size": 16,
    "patch_size": 8,
    "width": 32,
    "layers": 2,
    "head_width": 16,
}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
TWO = [(0,), (1,)]
STAGES = [(0, 0), (1, 0)]


def clip(vision: dict[str, Any], cls: str = "CLIP", **kwargs: Any) -> nn.Module:
    text = TEXT
    if cls == "CoCa":
        kwargs["multimodal_cfg"] = open_clip.coca_model.MultimodalCfg(**TEXT)
        text = TEXT | {"embed_cls": True, "output_tokens": True}
    return getattr(open_clip, cls)(
        embed_dim=32, vision_cfg=vision, text_cfg=text, **kwargs
    )


def clip_with_timm(name: str, **kwargs: Any) -> nn.Module:
    """A CustomTextCLIP whose vision tower is timm's, with a tiny one in its place."""
    vision = {
        "timm_model_name": "test_vit",
        "timm_pool": "",
        "timm_proj": "",
        "image_size": 160,
    }
    model = open_clip.CustomTextCLIP(
        embed_dim=32, vision_cfg=vision, text_cfg=TEXT, **kwargs
    )
    model.visual.trunk = timm.create_model(name, **VIT)
    return model


def timm_wrapper() -> nn.Module:
    arguments = {name: value for name, value in VIT.items() if name != "num_classes"}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=arguments
    )
    return transformers.TimmWrapperModel(config)


TIMM, SWIN, CONVNEXT = (
    "timm (ViT, EVA, BEiT, DINO, PE)",
    "timm (Swin)",
    "timm (ConvNeXt)",
)
TRUNK = "open_clip with a timm tower"
MODELS: dict[str, tuple[Callable[[], nn.Module], str, list[tuple[int, ...]]]] = {
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", **VIT), TIMM, TWO),
    "vit with attention pooling": (
        lambda: timm.create_model("vit_base_patch16_siglip_224", **VIT),
        TIMM,
        TWO,
    ),
    "dinov2": (lambda: timm.create_model("vit_small_patch14_dinov2", **VIT), TIMM, TWO),
    "dinov3": (lambda: timm.create_model("vit_small_patch16_dinov3", **VIT), TIMM, TWO),
    "eva02": (lambda: timm.create_model("eva02_tiny_patch14_224", **VIT), TIMM, TWO),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", **VIT), TIMM, TWO),
    "pe": (lambda: timm.create_model("vit_pe_core_tiny_patch16_384", **VIT), TIMM, TWO),
    "naflex": (
        lambda: timm.create_model(
            "naflexvit_base_patch16_gap",
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
        ),
        TIMM,
        TWO,
    ),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=16,
            window_size=2,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(2, 2),
        ),
        SWIN,
        STAGES,
    ),
    "convnext": (
        lambda: timm.create_model(
            "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)
        ),
        CONVNEXT,
        STAGES + [(2, 0), (3, 0)],
    ),
    "timm_wrapper": (timm_wrapper, "timm_wrapper", TWO),
    "open_clip": (lambda: clip(TOWER), "open_clip", TWO),
    "open_clip with LayerScale": (
        lambda: clip({**TOWER, "ls_init_value": 1e-5}),
        "open_clip",
        TWO,
    ),
    "open_clip CustomTextCLIP": (
        lambda: clip(TOWER, "CustomTextCLIP"),
        "open_clip",
        TWO,
    ),
    "open_clip CoCa": (
        lambda: clip(
            {
                **TOWER,
                "attentional_pool": True,
                "attn_pooler_heads": 2,
                "output_tokens": True,
            },
            "CoCa",
        ),
        "open_clip",
        TWO,
    ),
    "open_clip SigLIP": (
        lambda: clip_with_timm("vit_base_patch16_siglip_224", init_logit_bias=-10.0),
        TRUNK,
        TWO,
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    # What torch computes attention with depends on `requires_grad`, and adapters freeze the rest.
    return MODELS[name][0]().eval().requires_grad_(False)


def expected(name: str) -> list[str]:
    _, family, counts = MODELS[name]
    return [FAMILIES[family].format(*count) for count in counts]


def adapted(model: nn.Module, init_weights: bool = True) -> PeftModel:
    config = SageConfig(
        guidance=torch.randn(5, 12), r=4, num_heads=2, init_weights=init_weights
    )
    return get_peft_model(model, config).eval()


def pixels(name: str) -> torch.Tensor:
    torch.manual_seed(1)
    size = 64 if name == "convnext" else 16
    return torch.randn(3, 3, size, size)


def tokens() -> torch.Tensor:
    torch.manual_seed(2)
    ids = torch.randint(1, 60, (3, 8))
    ids[:, 5], ids[:, 6:] = (
        63,
        0,
    )  # open_clip finds the end of the text by the highest id
    return ids


@every_model
def test_blocks_identity_gradients_and_saving(name: str, tmp_path: Any) -> None:
    model = build(name)
    images = pixels(name)
    assert find_mlps(model) == expected(name)
    with torch.no_grad():
        before = encode_image(model, images)
        model = adapted(model)
        assert torch.equal(encode_image(model, images), before)
    layers = [
        name for name, module in model.named_modules() if isinstance(module, SageLayer)
    ]
    assert (
        layers
        == [f"base_model.model.{block}" for block in expected(name)]
        == find_mlps(model)
    )
    trainable = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    assert all(".peft_sage_" in name for name in trainable)
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    for _ in range(2):  # in the first step the up-projection is zero and hides the rest
        optimizer.zero_grad()
        output = encode_image(model, images)
        torch.manual_seed(2)
        (output * torch.randn_like(output)).sum().backward()
        optimizer.step()
    for weight_name, weight in trainable.items():
        assert weight.grad.isfinite().all() and weight.grad.any(), weight_name
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert torch.equal(encode_image(other, images), encode_image(model, images))


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name.startswith("open_clip")]
)
@torch.no_grad()
def test_text_of_open_clip(name: str) -> None:
    model = build(name)
    images = pixels(name)
    text = tokens()
    assert has_text_tower(model)
    before = encode_text(model, {"input_ids": text})
    output = model(images, text)
    image, words = (
        (output["image_features"], output["text_features"])
        if isinstance(output, dict)
        else output[:2]
    )
    torch.testing.assert_close(F.normalize(before, dim=-1), words)
    torch.testing.assert_close(F.normalize(encode_image(model, images), dim=-1), image)
    classifier = SageClassifier(model, words, scale=1.0)
    torch.testing.assert_close(classifier(images).logits, image @ words.T)
    # The text tower is not touched.
    assert torch.equal(
        encode_text(adapted(model, init_weights=False), {"input_ids": text}), before
    )


LAYER_SCALED = {
    "dinov2",
    "dinov3",
    "beit",
    "naflex",
    "convnext",
    "open_clip with LayerScale",
}


@every_model
def test_layer_scale_is_found_where_there_is_one(name: str) -> None:
    model = build(name)
    scales = [layer_scale(model, block) for block in expected(name)]
    assert all((scale is not None) == (name in LAYER_SCALED) for scale in scales)


REFUSED = {
    "resnet": lambda: timm.create_model("resnet18"),
    "convolutional MLP": lambda: timm.create_model("convnextv2_atto"),
    "open_clip ModifiedResNet": lambda: clip(
        {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_changed(name: str) -> None:
    model = REFUSED[name]()
    modules = list(model.modules())
    with pytest.raises(
        ValueError, match="`model` must have blocks with MLPs.*`target_modules`"
    ):
        adapted(model)
    assert all(
        module is other for module, other in zip(model.modules(), modules, strict=True)
    )
    assert all(weight.requires_grad for weight in model.parameters())
