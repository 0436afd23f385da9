# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_sage import SageConfig, SageLayer
from tests.conftest import randomise


def make(guidance=None, **kwargs) -> SageLayer:
    block = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
    model = nn.ModuleDict({"mlp": block})
    config = SageConfig(guidance=guidance, r=8, target_modules=["mlp"], **kwargs)
    return get_peft_model(model, config).base_model.model["mlp"]


def explicit(layer: SageLayer, x: torch.Tensor, heads: int) -> torch.Tensor:
    """The equations of `SageLayer`, written out with an explicit softmax."""
    norm, down, up = (
        getattr(layer, f"peft_sage_{name}")["default"]
        for name in ("norm", "down", "up")
    )
    z = F.linear(
        F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias), down.weight, down.bias
    )
    a = 0
    if layer.shared_guidance:
        guidance = layer.shared_guidance["default"].rows
        keys = guidance @ layer.peft_sage_key["default"].weight.T
        values = guidance @ layer.peft_sage_value["default"].weight.T
        parts = []
        for q, k, v in zip(
            z.chunk(heads, -1),
            keys.chunk(heads, -1),
            values.chunk(heads, -1),
            strict=True,
        ):
            parts.append(((q @ k.T) / q.shape[-1] ** 0.5).softmax(-1) @ v)
        a = torch.cat(parts, -1)
    return layer.base_layer(x) + layer.peft_sage_scaling["default"] * F.linear(
        F.gelu(z + a), up.weight, up.bias
    )


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("classes", [0, 1, 7])
@pytest.mark.parametrize("shape", [(5, 3, 12), (12,), (2, 4, 4, 12)])
def test_forward_follows_the_equations(heads, classes, shape):
    layer = make(torch.randn(classes, 6) if classes else None, num_heads=heads)
    randomise(layer)
    x = torch.randn(shape)
    torch.testing.assert_close(
        layer(x), explicit(layer, x, heads), rtol=1e-5, atol=1e-5
    )


def test_guidance_follows_the_device_of_the_block_that_asks(clip):
    """As with `device_map="auto"`: blocks on several devices, of which the first keeps the guidance."""
    model = get_peft_model(clip, SageConfig(guidance=torch.randn(9, 6)))
    first, *others = (m for m in model.modules() if isinstance(m, SageLayer))
    for layer in others:
        layer.to("meta")
        assert layer(torch.randn(2, 5, 32, device="meta")).is_meta
    model.set_guidance(torch.randn(4, 6))
    assert first.shared_guidance["default"].rows.device.type == "cpu"
    assert others[0](torch.randn(2, 5, 32, device="meta")).shape == (2, 5, 32)


def test_guidance_has_no_gradient_and_unit_rows():
    layer = make(torch.randn(9, 6) * 10)
    guidance = layer.shared_guidance["default"].rows
    assert not guidance.requires_grad
    torch.testing.assert_close(guidance.norm(dim=-1), torch.ones(9))


def test_fixed_scaling_is_taken_literally_and_not_trained():
    layer, x = (
        make(torch.randn(5, 6), scaling=0.5, learnable_scaling=False),
        torch.randn(3, 12),
    )
    randomise(layer)
    half = layer(x) - layer.base_layer(x)
    layer.fixed_scaling["default"] = 1.0
    torch.testing.assert_close(half * 2, layer(x) - layer.base_layer(x))
    assert not list(layer.peft_sage_scaling.parameters())


def test_dropout_only_while_training():
    layer = make(torch.randn(5, 6), dropout=0.5)
    x = torch.randn(3, 12)
    randomise(layer)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def test_attributes_of_the_block_show_through():
    layer = make()
    layer.base_layer.mark = "here"
    assert layer.mark == "here"
    assert (layer.in_features, layer.out_features) == (12, 12)
    with pytest.raises(AttributeError):
        _ = layer.nothing
