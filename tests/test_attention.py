# SPDX-License-Identifier: Apache-2.0
"""Attention maps against an explicit softmax; the plot against what it was given."""

import math

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import (
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
)

from peft_sage import (
    SageClassifier,
    SageConfig,
    SageLayer,
    attention_maps,
    plot_attention,
)
from tests.conftest import randomise, tiny_clip


GUIDANCE = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def adapted(model, **kwargs):
    model = get_peft_model(model, SageConfig(guidance=GUIDANCE, r=8, **kwargs)).eval()
    randomise(model)
    return model


def softmax_by_hand(layer, x):
    """The equation of `SageLayer`, written out: mean over heads of softmax(z (G W_k)^T / sqrt(r / h)), (..., M)."""
    z = layer.peft_sage_down["default"](layer.peft_sage_norm["default"](x))
    keys = (
        layer.shared_guidance["default"].rows @ layer.peft_sage_key["default"].weight.T
    )
    heads = layer.num_heads["default"]
    width = z.shape[-1] // heads
    slices = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return (
        sum((z[..., s] @ keys[:, s].T / math.sqrt(width)).softmax(-1) for s in slices)
        / heads
    )


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layer", [0, -1])
def test_attention_maps_are_the_softmax(heads, layer, pixel_values):
    model = adapted(SageClassifier(tiny_clip(), torch.randn(5, 16)), num_heads=heads)
    block = [module for module in model.modules() if isinstance(module, SageLayer)][
        layer
    ]
    seen = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(pixel_values=pixel_values)
    handle.remove()
    maps = attention_maps(model, pixel_values, layer)
    assert maps.shape == (4, 5, 2, 2)
    expected = softmax_by_hand(block, seen[0])[:, 1:]  # without the class token
    for b, m, row, column in [(0, 0, 0, 0), (1, 4, 0, 1), (3, 2, 1, 0), (2, 1, 1, 1)]:
        assert maps[b, m, row, column].item() == pytest.approx(
            expected[b, 2 * row + column, m].item(), abs=1e-5
        )
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(4, 2, 2))


def test_a_tower_with_registers_and_an_oblong_image():
    config = Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_register_tokens=8,
    )
    maps = attention_maps(
        adapted(Dinov2WithRegistersModel(config)), torch.randn(2, 3, 16, 8)
    )
    assert maps.shape == (2, 5, 4, 2)


def test_a_hierarchical_tower():
    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    )
    model = adapted(SwinModel(config))
    images = torch.randn(2, 3, 32, 32)
    assert attention_maps(model, images, layer=0).shape == (2, 5, 8, 8)
    assert attention_maps(model, images).shape == (2, 5, 4, 4)


def test_refusals(clip, pixel_values):
    with pytest.raises(ValueError, match="`adapter_name`"):
        attention_maps(clip, pixel_values)
    with pytest.raises(ValueError, match="`adapter_name`"):
        attention_maps(get_peft_model(tiny_clip(), SageConfig()), pixel_values)
    model = adapted(CLIPVisionModel(tiny_clip().config.vision_config))
    with pytest.raises(ValueError, match=r"`layer` must lie in \[-3, 3\), got 3"):
        attention_maps(model, pixel_values, layer=3)
    with pytest.raises(ValueError, match="'other'"):
        attention_maps(model, pixel_values, adapter_name="other")
    with pytest.raises(ValueError, match="`attention`"):
        plot_attention(Image.new("RGB", (8, 8)), torch.rand(1, 2, 2, 2))
    with pytest.raises(ValueError, match="`class_names` must have 2 entries"):
        plot_attention(Image.new("RGB", (8, 8)), torch.rand(2, 2, 2), ["a"])


def test_plot_attention_shows_the_strongest_maps(tmp_path):
    attention = torch.full((3, 2, 2), 0.1)
    attention[2, 0, 1] = 0.8
    attention[0, 1, 1] = 0.3
    figure = plot_attention(
        Image.new("RGB", (10, 6)), attention, ["cat", "dog $", "owl"], top=2
    )
    titles = [axis.get_title().split("\n")[0] for axis in figure.axes]
    assert titles == ["image", "owl", "cat"]
    overlay = figure.axes[1].images[1].get_array()
    assert (
        overlay.shape == (6, 10)
        and overlay.argmax() % 10 >= 5
        and overlay.argmax() // 10 < 3
    )
    plot_attention(
        torch.rand(6, 10, 3).numpy(), attention, ["cat", "dog $", "owl"]
    ).savefig(tmp_path / "a.png")


def test_pooled_rows_are_named_by_their_classes(pixel_values):
    directions = torch.eye(2, 16).repeat_interleave(5, dim=0) + 0.01 * torch.randn(
        10, 16
    )
    names = [f"owl {i}" for i in range(5)] + [f"cow {i}" for i in range(5)]
    classifier = SageClassifier(tiny_clip(), directions, names)
    model = get_peft_model(classifier, SageConfig(guidance_rows=2)).eval()
    names = model.peft_config["default"].row_names
    assert sorted(names) == [
        "cow 0, cow 1, cow 2 and 2 more",
        "owl 0, owl 1, owl 2 and 2 more",
    ]
    figure = plot_attention(
        Image.new("RGB", (8, 8)), attention_maps(model, pixel_values)[0], names
    )
    assert {axis.get_title().split("\n")[0] for axis in figure.axes} == {
        "image",
        *names,
    }
