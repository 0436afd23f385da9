# SPDX-License-Identifier: Apache-2.0
"""Every family of vision towers, each as a tiny random model (`tower_models.py`)."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_sage import SageClassifier, SageConfig, SageLayer
from peft_sage.towers.mlps import (
    find_mlps,
    layer_scale,
    mlp_widths,
)
from tests.tower_models import FAMILIES, LANGUAGE, TEXT, TINY, UNLISTED, VISION, Tiny


QUICK = (
    "clip-CLIPModel",
    "siglip2",
    "vit-ViTModel",
    "swin-SwinModel",
    "llava",
    "dinov2-",
)
every_family = pytest.mark.parametrize(
    "tiny",
    [
        pytest.param(
            tiny, marks=[] if tiny.id.startswith(QUICK) else [pytest.mark.slow]
        )
        for tiny in TINY
    ],
    ids=lambda tiny: tiny.id,
)


def expected(tiny: Tiny) -> list[str]:
    pattern = tiny.blocks or FAMILIES[tiny.model_type]
    return [
        pattern.format(*(count if isinstance(count, tuple) else (count,)))
        for count in tiny.counts
    ]


def adapted(model: nn.Module, init_weights: bool = True) -> PeftModel:
    config = SageConfig(
        guidance=torch.randn(5, 12), r=4, num_heads=2, init_weights=init_weights
    )
    return get_peft_model(model, config)


def run(tiny: Tiny, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output of the vision tower, wherever PEFT moved it."""
    prefix = "base_model.model" if isinstance(model, PeftModel) else ""
    tower = model.get_submodule(".".join(filter(None, (prefix, tiny.tower))))
    torch.manual_seed(1)  # masked autoencoders hide patches at random
    return first_tensor(tower(**inputs))


def first_tensor(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    hidden = getattr(output, "last_hidden_state", None)
    return first_tensor(output[0]) if hidden is None else hidden


def gradients(
    tiny: Tiny, model: PeftModel, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = run(tiny, model, inputs)
    # A plain sum has no gradient behind a LayerNorm.
    torch.manual_seed(2)
    (output * torch.randn_like(output)).sum().backward()
    return {
        name: weight.grad
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


@every_family
def test_blocks_identity_gradients_and_saving(tiny: Tiny, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = tiny.build().requires_grad_(False)  # what torch computes with depends on it
    other = copy.deepcopy(model)
    blocks = expected(tiny)
    inputs = tiny.inputs()
    assert find_mlps(model) == blocks
    before = run(tiny, model, inputs)
    model = adapted(model)
    layers = [n for n, module in model.named_modules() if isinstance(module, SageLayer)]
    assert layers == find_mlps(model) == [f"base_model.model.{b}" for b in blocks]
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == {n for n in model.state_dict() if is_weight(n)}
    assert torch.equal(run(tiny, model, inputs), before)

    gradients(tiny, model, inputs)
    # Until then the up-projection is zero and hides the rest.
    torch.optim.SGD(trainable.values(), lr=0.1).step()
    for name, gradient in gradients(tiny, model, inputs).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), (
            name
        )
    after = run(tiny, model, inputs)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(run(tiny, again, inputs), after)


def is_weight(name: str) -> bool:
    return ".peft_sage_" in name and "guidance" not in name


def test_every_listed_family_has_a_row_and_is_documented() -> None:
    # The others need timm or open_clip: see tests/matrix.
    others = set(FAMILIES) - {tiny.model_type for tiny in TINY}
    assert all("timm" in name or "clip" in name for name in others)
    documented = (Path(__file__).parents[1] / "docs" / "own_model.md").read_text()
    for family in FAMILIES:
        assert f"`{family}`" in documented


@pytest.mark.parametrize("tiny", UNLISTED, ids=lambda tiny: tiny.id)
def test_families_without_an_entry_work_by_the_rule(tiny: Tiny) -> None:
    assert tiny.model_type not in FAMILIES
    torch.manual_seed(0)
    model = tiny.build().requires_grad_(False)
    assert find_mlps(model) == expected(tiny)
    inputs = tiny.inputs()
    before = run(tiny, model, inputs)
    assert torch.equal(run(tiny, adapted(model), inputs), before)
    model = adapted(tiny.build(), init_weights=False)
    assert all(gradient.any() for gradient in gradients(tiny, model, inputs).values())


REFUSED = {
    "reads no images": [
        ("CLIPTextModel", "clip_text_model", TEXT),
        ("BertModel", "bert", TEXT),
        ("LlamaModel", "llama", LANGUAGE),
        ("ViltModel", "vilt", VISION | TEXT),
    ],
    "has none": [
        (
            "ResNetModel",
            "resnet",
            {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8},
        ),
        ("PoolFormerModel", "poolformer", {"hidden_sizes": [8] * 4, "depths": [1] * 4}),
    ],
}


@pytest.mark.parametrize(
    ("reason", "model_class", "config_type", "config"),
    [(reason, *row) for reason, rows in REFUSED.items() for row in rows],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_anything_is_changed(
    reason: str, model_class: str, config_type: str, config: dict
) -> None:
    model = Tiny(config_type, model_class, config).build()
    before = [(name, weight.requires_grad) for name, weight in model.named_parameters()]
    modules = list(model.modules())
    with pytest.raises(
        ValueError,
        match=f"`model` must have .*{model_class}.*{reason}.*`target_modules`",
    ):
        adapted(model)
    assert [
        (name, weight.requires_grad) for name, weight in model.named_parameters()
    ] == before
    assert all(
        module is other for module, other in zip(model.modules(), modules, strict=True)
    )


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 2)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x, x, x)[0]
        return x + self.mlp(x)


def plain_transformer() -> nn.Module:
    blocks = nn.Sequential(PlainBlock(), PlainBlock())
    return nn.Sequential(OrderedDict(resblocks=blocks))


class PlainClip(nn.Module):
    """The layout of OpenAI's `clip` package: sequence first, and the text transformer hangs on the root."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.token_embedding = nn.Embedding(64, 32)
        self.visual.conv1 = nn.Conv2d(3, 32, 8, 8)
        self.visual.transformer = plain_transformer()
        self.transformer = plain_transformer()

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.visual.conv1(image).flatten(2).permute(2, 0, 1)  # (N, B, d)
        return self.visual.transformer(tokens)[0]

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return self.transformer(self.token_embedding(text).transpose(0, 1))[-1]


def test_sequence_first_layout_of_plain_modules() -> None:
    model = PlainClip().eval().requires_grad_(False)
    images = torch.randn(3, 3, 16, 16)
    text = torch.randint(0, 64, (3, 5))
    blocks = [f"visual.transformer.resblocks.{i}.mlp" for i in range(2)]
    assert find_mlps(model) == blocks
    with pytest.raises(ValueError, match="reads no images"):
        find_mlps(model.transformer)
    before = model.encode_image(images), model.encode_text(text)
    model = adapted(model, init_weights=False)
    together = model.encode_image(images)
    assert not torch.allclose(together, before[0])
    assert torch.equal(model.encode_text(text), before[1])
    apart = [model.encode_image(image[None]) for image in images]
    torch.testing.assert_close(torch.cat(apart), together)


def test_projectors_in_a_stack_are_no_blocks() -> None:
    """As in Qwen3-Omni, whose `merger_list` holds MLPs of the right shape that no token mixing goes with."""
    tower = CLIP.build().vision_model
    mlp = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    merger = nn.ModuleDict({"ln_q": nn.LayerNorm(32), "mlp": mlp})
    tower.merger_list = nn.ModuleList([merger])
    assert find_mlps(tower) == [name.partition(".")[2] for name in BLOCKS]


def tiny_named(name: str) -> Tiny:
    return next(tiny for tiny in TINY if tiny.id == name)


CLIP = tiny_named("clip-CLIPModel")
BLOCKS = ["vision_model.encoder.layers.0.mlp", "vision_model.encoder.layers.1.mlp"]


def test_blocks_are_found_inside_wrappers() -> None:
    clip = CLIP.build()
    classifier = SageClassifier(clip, torch.randn(5, 24))
    assert find_mlps(classifier) == [f"model.{block}" for block in BLOCKS]
    lora = get_peft_model(
        copy.deepcopy(clip), LoraConfig(target_modules=["fc1", "fc2", "q_proj"])
    )
    assert find_mlps(lora) == [f"base_model.model.{block}" for block in BLOCKS]
    assert find_mlps(adapted(classifier)) == [
        f"base_model.model.model.{block}" for block in BLOCKS
    ]
    assert find_mlps(nn.DataParallel(clip)) == [f"module.{block}" for block in BLOCKS]
    vision = nn.DataParallel(tiny_named("vit-ViTModel").build())
    assert find_mlps(adapted(vision.module)) == [
        f"base_model.model.layers.{i}.mlp" for i in range(2)
    ]


def test_width_is_read_off_the_block() -> None:
    linear = nn.Linear
    gated = {"w1": linear(32, 64), "w2": linear(64, 32), "w3": linear(32, 64)}
    assert mlp_widths(nn.ModuleDict(gated)) == (32, 32)
    with pytest.raises(ValueError, match="must hold a linear layer, but GELU has none"):
        mlp_widths(nn.GELU())
    with pytest.raises(ValueError, match="got 32 to 48 features"):
        mlp_widths(nn.Sequential(linear(32, 64), linear(64, 48)))


WITH_LAYER_SCALE = [
    tiny
    for tiny in TINY
    if tiny.model_type
    in {
        "beit",
        "data2vec-vision",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "tipsv2",
        "radio",
        "internvl",
        "internvl_vision",
    }
]


@pytest.mark.parametrize("tiny", WITH_LAYER_SCALE, ids=lambda tiny: tiny.id)
def test_layer_scale_is_the_factor_of_the_update(tiny: Tiny) -> None:
    torch.manual_seed(0)
    model = tiny.build()
    scales = [layer_scale(model, name) for name in expected(tiny)]
    with torch.no_grad():
        for scale in scales:
            scale.uniform_(0.1, 0.2)
    model = adapted(model, init_weights=False)
    inputs = tiny.inputs()
    name, layer = next(
        (name, m) for name, m in model.named_modules() if isinstance(m, SageLayer)
    )
    with torch.no_grad():
        for scaling in layer.peft_sage_scaling.values():
            scaling.fill_(1.0)
    residuals = []
    updates = []
    block = model.get_submodule(name.rpartition(".")[0])
    block.register_forward_hook(
        lambda _, __, output: residuals.append(first_tensor(output).detach())
    )
    layer.register_forward_hook(lambda _, __, output: updates.append(output.detach()))
    run(tiny, model, inputs)
    with model.disable_adapter():
        run(tiny, model, inputs)
    change = scales[0].detach() * (updates[0] - updates[1])
    torch.testing.assert_close(
        residuals[0] - residuals[1], change.view_as(residuals[0]), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("gamma", [1e-5, 0.1])
def test_layer_scale_does_not_shrink_the_update(gamma: float) -> None:
    """The change of the residual stream starts as large as in the same tower without LayerScale."""
    model = Tiny("dinov2", "Dinov2Model", dict(VISION, layerscale_value=gamma)).build()
    block = find_mlps(model)[0]
    scale = layer_scale(model, block)
    layer = adapted(model).get_base_model().get_submodule(block)
    torch.testing.assert_close(
        layer.peft_sage_scaling["default"] * scale, torch.ones(32)
    )
