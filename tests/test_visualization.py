# SPDX-License-Identifier: Apache-2.0
"""Attention maps against an explicit softmax; plots against what they were given."""

import math

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import CLIPVisionModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SwinConfig, SwinModel

from peft_sage import SageClassifier, SageConfig, SageLayer, mismatch_from_counts
from peft_sage.visualization import attention_maps, plot_attention, plot_long_tail, plot_mismatch
from tests.conftest import randomise, tiny_clip


GUIDANCE = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def adapted(model, **kwargs):
    model = get_peft_model(model, SageConfig(guidance=GUIDANCE, r=8, **kwargs)).eval()
    randomise(model)
    return model


def softmax_by_hand(layer, x):
    """The equation of `SageLayer`, written out: mean over heads of softmax(z (G W_k)^T / sqrt(r / h)), (..., M)."""
    z = layer.peft_sage_down["default"](layer.peft_sage_norm["default"](x))
    keys = layer.guidance("default") @ layer.peft_sage_key["default"].weight.T
    heads = layer.num_heads["default"]
    width = z.shape[-1] // heads
    slices = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return sum((z[..., s] @ keys[:, s].T / math.sqrt(width)).softmax(-1) for s in slices) / heads


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layer", [0, -1])
def test_attention_maps_are_the_softmax(heads, layer, pixel_values):
    model = adapted(SageClassifier(tiny_clip(), 5), num_heads=heads)
    block = [module for module in model.modules() if isinstance(module, SageLayer)][layer]
    seen = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(pixel_values=pixel_values)
    handle.remove()
    maps = attention_maps(model, pixel_values, layer)
    assert maps.shape == (4, 5, 2, 2)
    expected = softmax_by_hand(block, seen[0])[:, 1:]  # without the class token
    for b, m, row, column in [(0, 0, 0, 0), (1, 4, 0, 1), (3, 2, 1, 0), (2, 1, 1, 1)]:
        assert maps[b, m, row, column].item() == pytest.approx(expected[b, 2 * row + column, m].item(), abs=1e-5)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(4, 2, 2))


def test_the_layer_attends_with_these_weights():
    model = adapted(tiny_clip(), num_heads=1)
    layer = next(module for module in model.modules() if isinstance(module, SageLayer))
    x = torch.randn(2, 7, 32)
    z = layer.peft_sage_down["default"](layer.peft_sage_norm["default"](x))
    values = layer.peft_sage_value["default"](layer.guidance("default"))
    torch.testing.assert_close(layer.attention_weights(x, "default")[0] @ values, layer.attend(z, "default"))


def test_a_tower_with_registers_and_an_oblong_image():
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, num_register_tokens=8
    )
    maps = attention_maps(adapted(Dinov2WithRegistersModel(config)), torch.randn(2, 3, 16, 8))
    assert maps.shape == (2, 5, 4, 2)


def test_a_hierarchical_tower():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    model = adapted(SwinModel(config))
    images = torch.randn(2, 3, 32, 32)
    assert attention_maps(model, images, layer=0).shape == (2, 5, 8, 8)
    assert attention_maps(model, images).shape == (2, 5, 4, 4)


def test_attention_maps_leave_the_model_as_it_was(pixel_values):
    model = adapted(tiny_clip())
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    attention_maps(model, pixel_values)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


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
    with pytest.raises(ValueError, match="`results` of 'run' must have 3 classes, got 2"):
        plot_long_tail({"run": {"per_class": [0, 1]}}, [3, 2, 1])
    with pytest.raises(ValueError, match="`class_names` must have 2 entries, got 1"):
        plot_long_tail({"run": {"per_class": [0, 1]}}, [2, 1], ["cow"])
    with pytest.raises(ValueError, match="same length"):
        plot_mismatch([1.0], [1.0, 2.0], [1, 2])


def test_plot_attention_shows_the_strongest_maps(tmp_path):
    attention = torch.full((3, 2, 2), 0.1)
    attention[2, 0, 1] = 0.8
    attention[0, 1, 1] = 0.3
    figure = plot_attention(Image.new("RGB", (10, 6)), attention, ["cat", "dog $", "owl"], top=2)
    titles = [axis.get_title().split("\n")[0] for axis in figure.axes]
    assert titles == ["image", "owl", "cat"]
    overlay = figure.axes[1].images[1].get_array()
    assert overlay.shape == (6, 10) and overlay.argmax() % 10 >= 5 and overlay.argmax() // 10 < 3
    plot_attention(torch.rand(6, 10, 3).numpy(), attention, ["cat", "dog $", "owl"]).savefig(tmp_path / "a.png")


def test_plot_long_tail_draws_the_results(tmp_path):
    run = {"many": 0.9, "medium": None, "few": float("nan"), "per_class": [0.5, None, 1.0]}
    figure = plot_long_tail({"one": run, "two": {**run, "many": 0.7}}, [3, 500, 50])
    classes, groups, accuracies = figure.axes
    assert [bar.get_height() for bar in classes.patches] == [500, 50, 3]
    points = accuracies.lines[0].get_ydata()
    assert math.isnan(points[0]) and list(points[1:]) == [1.0, 0.5]
    assert [bar.get_height() for container in groups.containers for bar in container][::3] == [0.9, 0.7]
    figure.savefig(tmp_path / "tail.png")
    named = plot_long_tail({"one": run}, [3, 500, 50], ["owl", "cow $", "bat"])
    assert [label.get_text() for label in named.axes[0].get_xticklabels()] == ["cow $", "bat", "owl"]
    named.savefig(tmp_path / "named.png")


def test_plot_mismatch_draws_a_point_a_class(tmp_path):
    counts = [100, 10, 1]
    estimated = mismatch_from_counts(counts)
    figure = plot_mismatch(estimated, [0.0, 1.0, float("nan")], counts)
    offsets = figure.axes[0].collections[0].get_offsets()
    assert offsets.data[:2].tolist() == [
        pytest.approx([estimated[0].item(), 0.0]),
        pytest.approx([estimated[1].item(), 1.0]),
    ]
    figure.savefig(tmp_path / "mismatch.png")
