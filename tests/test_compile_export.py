# SPDX-License-Identifier: Apache-2.0
"""Compiled and exported models give what the eager model gives."""

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.testing import CompileCounter
from transformers import CLIPVisionConfig, CLIPVisionModel

from peft_sage import SageClassifier, SageConfig
from tests.conftest import VISION, randomise, tiny_clip


class Logits(torch.nn.Module):
    """From pixel values to logits: what an exporter wants."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Dynamo keeps what it compiled by code object, `Logits.forward` here, and refuses to compile it a ninth time."""
    torch._dynamo.reset()


@pytest.fixture(
    params=[5, pytest.param(0, marks=pytest.mark.slow)], ids=["guidance", "no guidance"]
)
def model(request):
    guidance = {"guidance": torch.randn(request.param, 24)} if request.param else {}
    config = SageConfig(r=8, num_heads=2, modules_to_save=["class_head"], **guidance)
    model = get_peft_model(SageClassifier(tiny_clip(), torch.randn(6, 16)), config)
    randomise(model)
    return Logits(model).eval()


def test_compile_without_graph_breaks(model, pixel_values):
    expected = model(pixel_values)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixel_values), expected)

    expected.square().sum().backward()
    gradients = {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }
    model.zero_grad()
    compiled(pixel_values).square().sum().backward()
    torch.testing.assert_close(
        {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, gradients
    )


def adapted_classifier():
    torch.manual_seed(0)
    model = get_peft_model(
        SageClassifier(tiny_clip(), torch.randn(6, 16)),
        SageConfig(guidance=torch.randn(5, 24)),
    )
    return model.eval()


def test_compiles_once_for_all_that_has_the_same_shapes(pixel_values):
    counter = CompileCounter()
    model = adapted_classifier()
    model.add_adapter("second", SageConfig(guidance=torch.randn(3, 7)))
    compiled = torch.compile(Logits(model), fullgraph=True, backend=counter)
    for count, name in (
        (1, "default"),
        (2, "second"),
        (2, "default"),
        (2, "second"),
        (2, "default"),
    ):
        model.set_adapter(name)
        compiled(pixel_values)
        assert counter.frame_count == count
    for _ in range(3):
        model.set_guidance(torch.randn(5, 24))
        randomise(model)
        compiled(pixel_values)
    model.set_guidance(torch.randn(9, 24))
    compiled(pixel_values)
    assert counter.frame_count == 3
    torch._dynamo.reset()
    counter.clear()
    for _ in range(3):
        torch.compile(Logits(adapted_classifier()), fullgraph=True, backend=counter)(
            pixel_values
        )
    assert counter.frame_count == 1


def test_compiles_two_blocks_for_any_depth(pixel_values):
    """Block by block, as for deep models: the one that owns the guidance, and all others."""
    counter = CompileCounter()
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**{**VISION, "num_hidden_layers": 12})
    model = get_peft_model(
        CLIPVisionModel(vision).eval(), SageConfig(guidance=torch.randn(5, 24))
    )
    randomise(model)
    expected = model(pixel_values=pixel_values).pooler_output
    for layer in model.base_model.model.encoder.layers:
        layer.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(model(pixel_values=pixel_values).pooler_output, expected)
    assert counter.frame_count == 2


def test_export_keeps_guidance_as_one_buffer(model, pixel_values):
    expected = model(pixel_values)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        model,
        (pixel_values,),
        dynamic_shapes={"pixel_values": {0: batch}},
        strict=False,
    )
    torch.testing.assert_close(exported.module()(pixel_values), expected)
    torch.testing.assert_close(exported.module()(pixel_values[:3]), expected[:3])
    buffers = [name for name in exported.graph_signature.buffers if "guidance" in name]
    has_guidance = model.model.peft_config["default"].num_classes > 0
    assert len(buffers) == has_guidance
    used = set(exported.graph_signature.inputs_to_buffers.values())
    assert used.issuperset(buffers)


@pytest.mark.slow
def test_onnx(model, pixel_values, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "model.onnx")
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        model,
        (pixel_values,),
        path,
        dynamo=True,
        dynamic_shapes={"pixel_values": {0: batch}},
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in (pixel_values, pixel_values[:3]):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(logits), model(images).detach(), atol=1e-4, rtol=1e-4
        )
