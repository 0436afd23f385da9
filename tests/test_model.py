# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from accelerate.utils import compile_regions
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextModel, CLIPVisionModel

from peft_sage import (
    SageClassifier,
    SageConfig,
    SageLayer,
    encode_class_descriptions,
    pool_guidance,
)
from peft_sage.model import default_r
from tests.conftest import randomise, tiny_clip


def features(model, pixel_values):
    return model.get_image_features(pixel_values).pooler_output


def adapted(model) -> list[str]:
    return [
        name for name, module in model.named_modules() if isinstance(module, SageLayer)
    ]


def guidance_of(model) -> torch.Tensor:
    layer = next(module for module in model.modules() if isinstance(module, SageLayer))
    return layer.shared_guidance["default"].rows if layer.shared_guidance else None


def test_guidance_is_saved_once_and_loading_encodes_no_text(
    clip_dir, clip, pixel_values, tmp_path, monkeypatch
):
    clip = type(clip).from_pretrained(clip_dir).eval()
    model = get_peft_model(
        clip, SageConfig(class_descriptions={"cat": "fur", "dog": ["bark", "tail"]})
    )
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("guidance" in key for key in weights) == 1
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["class_names"] == ["cat", "dog"] and config["guidance_shape"] == [
        2,
        16,
    ]
    assert config["base_model_name_or_path"] == clip_dir

    monkeypatch.setattr(CLIPTextModel, "forward", None)
    again = PeftModel.from_pretrained(
        type(clip).from_pretrained(clip_dir).eval(), tmp_path / "adapter"
    )
    assert torch.equal(features(again, pixel_values), features(model, pixel_values))


def test_several_adapters_with_other_classes_widths_and_blocks(
    clip, pixel_values, tmp_path
):
    expected = features(clip, pixel_values)
    model = get_peft_model(
        clip, SageConfig(guidance=torch.randn(5, 24), r=4), adapter_name="a"
    )
    model.add_adapter(
        "b",
        SageConfig(
            guidance=torch.randn(3, 10), layers_to_transform=[1, -1], num_heads=2
        ),
    )
    model.add_adapter("c", SageConfig(r=4))
    randomise(model)
    outputs = {}
    for name in "abc":
        model.set_adapter(name)
        outputs[name] = features(model, pixel_values)
        model.save_pretrained(tmp_path, selected_adapters=[name])
        again = PeftModel.from_pretrained(tiny_clip(), tmp_path / name)
        assert torch.equal(features(again, pixel_values), outputs[name])
    assert len({output.sum().item() for output in [*outputs.values(), expected]}) == 4

    model.delete_adapter("a")
    model.set_adapter("b")
    assert torch.equal(features(model, pixel_values), outputs["b"])
    assert not any(".a" in name and "peft_sage" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "blocks"),
    [
        ({}, [0, 1, 2]),
        ({"layers_to_transform": -1}, [2]),
        ({"layers_to_transform": [0, 2]}, [0, 2]),
        ({"exclude_modules": r".*layers\.1\.mlp"}, [0, 2]),
        ({"target_modules": r"vision_model.*layers\.[01]\.mlp"}, [0, 1]),
        ({"target_modules": ["vision_model.encoder.layers.1.mlp"]}, [1]),
        (
            {
                "target_modules": ["mlp"],
                "exclude_modules": "text_model.*",
                "layers_to_transform": [1],
            },
            [1],
        ),
    ],
)
def test_choice_of_blocks(clip, kwargs, blocks):
    get_peft_model(clip, SageConfig(guidance=torch.randn(5, 24), **kwargs))
    assert adapted(clip) == [f"vision_model.encoder.layers.{i}.mlp" for i in blocks]


@pytest.mark.parametrize("targets", [["mlp"], r".*layers\.\d\.mlp"])
def test_the_text_tower_is_left_alone(clip, targets):
    with pytest.warns(UserWarning, match="2 modules outside .*'text_model.encoder"):
        get_peft_model(clip, SageConfig(guidance_rows=0, target_modules=targets))
    assert adapted(clip) == [f"vision_model.encoder.layers.{i}.mlp" for i in range(3)]


def test_without_guidance_the_user_is_told(clip, recwarn):
    get_peft_model(tiny_clip(), SageConfig(guidance_rows=0))
    get_peft_model(SageClassifier(tiny_clip(), torch.eye(3, 16)), SageConfig())
    assert not [w for w in recwarn if "AdaptFormer" in str(w.message)]
    with pytest.warns(UserWarning, match="plain AdaptFormer: give `class_descript"):
        get_peft_model(clip, SageConfig())


@pytest.mark.parametrize("name", ["default", "second"])
def test_a_peft_model_is_refused(clip, pixel_values, name):
    model = get_peft_model(clip, SageConfig(guidance=torch.randn(5, 24)))
    config = model.peft_config["default"]
    parts = list(model.modules())
    with pytest.raises(ValueError, match="`model` must not be a PeftModel: .*add_ad"):
        get_peft_model(model, SageConfig(), adapter_name=name)
    assert model.peft_config == {"default": config} and list(model.modules()) == parts


def test_unload_gives_the_base_model_back(clip, pixel_values):
    classifier = SageClassifier(clip, torch.randn(3, 16), ["a", "b", "c"]).eval()
    parts = list(classifier.modules())
    expected = classifier(pixel_values).logits
    model = get_peft_model(classifier, SageConfig())
    model.add_adapter("second", SageConfig(layers_to_transform=[0]))
    randomise(model)
    model.set_classes(torch.randn(4, 16))
    base = model.unload()
    assert base is classifier and list(base.modules()) == parts
    assert torch.equal(base.eval()(pixel_values).logits, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"target_modules": ["nothing"]},
            r"`target_modules`=\{'nothing'\} matches none of .*layers.0.mlp",
        ),
        (
            {"target_modules": ["fc1"]},
            "matches 'vision_model.encoder.layers.0.mlp.fc1', which cannot be adapted",
        ),
        (
            {"target_modules": ".*text.*mlp"},
            r"must match modules of the vision tower \['vision_model'\]",
        ),
        ({"modules_to_save": ["projektion"]}, "'projektion' matches none"),
        ({"layers_to_transform": [3]}, r"within the 3 blocks of the tower, got \[3\]"),
        (
            {"guidance": None, "class_descriptions": ["cat"]},
            "`tokenizer_name_or_path`, none in ''",
        ),
        (
            {
                "guidance": None,
                "class_descriptions": ["cat"],
                "tokenizer_name_or_path": "/nowhere",
            },
            "none in '/nowhere'",
        ),
    ],
)
def test_errors_leave_the_model_alone(clip, kwargs, message):
    before = {name: p.requires_grad for name, p in clip.named_parameters()}
    config = SageConfig(**{"guidance": torch.randn(5, 24), **kwargs})
    with pytest.raises(ValueError, match=message):
        get_peft_model(clip, config)
    assert {name: p.requires_grad for name, p in clip.named_parameters()} == before
    assert not hasattr(clip, "peft_config") and config.r is None


def test_no_text_tower_says_both_ways_out(clip):
    with pytest.raises(ValueError, match="wrap the full model, or pass embeddings"):
        get_peft_model(
            CLIPVisionModel(clip.config.vision_config),
            SageConfig(class_descriptions=["cat"]),
        )


def test_set_guidance_changes_the_classes(clip_dir, pixel_values, tmp_path):
    clip = type(tiny_clip()).from_pretrained(clip_dir).eval()
    model = get_peft_model(clip, SageConfig(class_descriptions=["cat", "dog", "cow"]))
    randomise(model)
    before = features(model, pixel_values)
    model.set_guidance({"bee": "it flies", "ant": "it walks"}, adapter_name="default")
    assert not torch.allclose(features(model, pixel_values), before)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        type(clip).from_pretrained(clip_dir).eval(), tmp_path / "adapter"
    )
    assert torch.equal(features(again, pixel_values), features(model, pixel_values))
    assert again.peft_config["default"].class_names == ["bee", "ant"]
    model.set_guidance(["cat", "dog", "cow"])
    torch.testing.assert_close(features(model, pixel_values), before)


def test_guidance_rows_limit_every_source(clip_dir, pixel_values, tmp_path):
    names = [f"thing {i}" for i in range(70)]
    clip = type(tiny_clip()).from_pretrained(clip_dir).eval()
    model = get_peft_model(clip, SageConfig(class_descriptions=names))
    randomise(model)
    config = model.peft_config["default"]
    rows = encode_class_descriptions(
        clip, AutoTokenizer.from_pretrained(clip_dir), names
    )
    assert torch.equal(guidance_of(model), pool_guidance(rows, 64))
    assert config.num_classes == 70 and config.guidance_shape == [64, 16]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        type(clip).from_pretrained(clip_dir).eval(), tmp_path / "adapter"
    )
    assert torch.equal(features(again, pixel_values), features(model, pixel_values))
    assert again.peft_config["default"].num_classes == 70

    model.set_guidance(rows[:40])
    torch.testing.assert_close(guidance_of(model), rows[:40])
    model.set_guidance(["bee", *names])
    assert config.num_classes == 71 and config.guidance_shape == [64, 16]


def test_a_classifier_gives_its_embeddings_its_names_and_its_head(
    clip, pixel_values, tmp_path
):
    embeddings = torch.randn(70, 16)
    classifier = SageClassifier(clip, embeddings, [f"thing {i}" for i in range(70)])
    config = SageConfig()
    model = get_peft_model(classifier, config)
    torch.testing.assert_close(guidance_of(model), pool_guidance(embeddings, 64))
    filled = model.peft_config["default"]
    assert filled.class_names == classifier.class_names and filled.modules_to_save == [
        "class_head"
    ]
    assert (
        config.class_names,
        config.modules_to_save,
        config.r,
        config.guidance_shape,
    ) == (None,) * 4
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        SageClassifier(tiny_clip(), torch.randn(70, 16)), tmp_path
    )
    assert torch.equal(again(pixel_values).logits, model.eval()(pixel_values).logits)

    model.set_classes(torch.eye(3, 16))
    assert torch.equal(guidance_of(model), torch.eye(3, 16))
    plain = get_peft_model(
        SageClassifier(tiny_clip(), embeddings),
        SageConfig(guidance_rows=0, modules_to_save=[]),
    )
    assert (
        guidance_of(plain) is None
        and not plain.base_model.model.class_head.weight.requires_grad
    )
    with pytest.raises(ValueError, match=r"`guidance` must have the shape .*got None"):
        get_peft_model(tiny_clip(), SageConfig(guidance=embeddings)).set_guidance()


@pytest.mark.parametrize(
    ("guidance", "adapter_name", "message"),
    [
        (torch.randn(2, 23), None, r"shape \(M, 24\)"),
        (torch.randn(0, 24), None, "got None"),
        (torch.full((2, 24), float("nan")), None, "NaN or infinity"),
        (
            torch.randn(2, 24),
            "nobody",
            r"a Sage adapter of \['default', 'plain'\], got 'nobody'",
        ),
        (torch.randn(2, 24), "plain", "made without guidance"),
    ],
)
def test_set_guidance_refuses(clip, pixel_values, guidance, adapter_name, message):
    model = get_peft_model(clip, SageConfig(guidance=torch.randn(5, 24)))
    model.add_adapter("plain", SageConfig())
    randomise(model)
    before = features(model, pixel_values)
    with pytest.raises(ValueError, match=message):
        model.set_guidance(guidance, adapter_name)
    assert torch.equal(features(model, pixel_values), before)


def test_a_saved_config_alone_cannot_run(clip, pixel_values, tmp_path):
    get_peft_model(clip, SageConfig(guidance=torch.randn(5, 24))).save_pretrained(
        tmp_path
    )
    model = get_peft_model(tiny_clip(), SageConfig.from_pretrained(tmp_path))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="weights .* were not loaded"):
            features(model, pixel_values)
    config = SageConfig.from_pretrained(tmp_path)
    config.guidance_shape = None
    config.guidance = torch.randn(3, 24)
    assert features(get_peft_model(tiny_clip(), config), pixel_values).isfinite().all()


class CallsByKeyword(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.attention = torch.nn.Linear(8, 8)
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(hidden_states=self.attention(x))


class MLP(torch.nn.Sequential):
    def forward(self, hidden_states):
        return super().forward(hidden_states)


def plain_tower():
    tower = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 4), torch.nn.Flatten(2), torch.nn.Module()
    )
    mlps = [
        MLP(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
        for _ in range(2)
    ]
    tower[2] = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool1d(8), *map(CallsByKeyword, mlps)
    )
    return tower


def test_an_mlp_that_is_called_by_keyword():
    tower = plain_tower()
    images = torch.randn(2, 3, 8, 8)
    expected = tower(images)
    model = get_peft_model(tower, SageConfig(guidance=torch.randn(5, 24)))
    assert torch.equal(model(images), expected) and len(adapted(model)) == 2
    randomise(model)
    assert not torch.allclose(model(images), expected)


def test_base_id_of_a_plain_module_is_kept(tmp_path):
    tower = plain_tower()
    tower.name_or_path = "hf-hub:timm/vit"  # PEFT reads it off any module
    get_peft_model(tower, SageConfig(guidance_rows=0)).save_pretrained(tmp_path)
    config = SageConfig.from_pretrained(tmp_path)
    assert config.base_model_name_or_path == "hf-hub:timm/vit"


def compiled_inside(model, part):
    for layer in model.vision_model.encoder.layers:
        layer.set_submodule(
            part, torch.compile(layer.get_submodule(part), backend="eager")
        )
    return model


@pytest.mark.parametrize(
    "compiled",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: compile_regions(model, backend="eager"),
        lambda model: compiled_inside(model, "mlp"),
    ],
    ids=["whole", "regions", "mlps"],
)
def test_models_that_were_compiled_beforehand(compiled, pixel_values, tmp_path):
    model = get_peft_model(
        compiled(tiny_clip()), SageConfig(guidance=torch.randn(5, 24))
    )
    assert len(adapted(model)) == 3
    randomise(model)
    expected = features(model, pixel_values)
    assert not torch.allclose(expected, features(tiny_clip(), pixel_values))
    model.save_pretrained(tmp_path)
    for other in (tiny_clip(), compiled(tiny_clip())):
        torch.testing.assert_close(
            features(PeftModel.from_pretrained(other, tmp_path), pixel_values), expected
        )


@pytest.mark.parametrize(
    ("num_classes", "num_blocks", "r"),
    [
        (0, 12, 8),
        (365, 12, 8),
        (1000, 12, 32),
        (1000, 24, 16),
    ],
)
def test_default_r_is_lift_with_a_floor(num_classes, num_blocks, r):
    assert default_r(num_classes, num_blocks) == r
