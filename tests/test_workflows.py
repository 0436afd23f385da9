# SPDX-License-Identifier: Apache-2.0
"""Everything that a user of PEFT does with an adapter, on small models."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import (
    BitsAndBytesConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from peft_sage import SageClassifier, SageConfig, SageLayer, SageModel
from tests.conftest import randomise, tiny_clip


def features(model, pixel_values):
    return model.get_image_features(pixel_values).pooler_output


@torch.no_grad()
def tower_output(model, pixel_values):
    """What the vision tower pools, whatever class holds it."""
    holder = model.get_base_model() if isinstance(model, PeftModel) else model
    named = {name.rpartition(".")[2]: part for name, part in holder.named_modules()}
    return named.get("vision_model", holder)(pixel_values).pooler_output


@pytest.fixture
def config():
    return SageConfig(guidance=torch.randn(5, 24), r=8, num_heads=2)


@pytest.fixture
def trained(clip, config):
    """A `CLIPModel` with an adapter that is not the identity."""
    model = get_peft_model(clip, config)
    randomise(model)
    return model


@pytest.fixture
def adapter_dir(trained, tmp_path):
    trained.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


# Several adapters


def test_adapter_names_within_one_batch(clip, pixel_values):
    classifier = SageClassifier(clip, torch.randn(6, 16))
    model = get_peft_model(
        classifier,
        SageConfig(guidance=torch.randn(5, 24), modules_to_save=["class_head"]),
        adapter_name="birds",
    )
    model.add_adapter(
        "flowers",
        SageConfig(guidance=torch.randn(9, 12), r=16, modules_to_save=["class_head"]),
    )
    randomise(model)
    with torch.no_grad():
        classifier.class_head.modules_to_save["flowers"].weight.add_(torch.randn(6, 16))
    model.eval()
    expected = {}
    for name in ("birds", "flowers"):
        model.set_adapter(name)
        expected[name] = model(pixel_values=pixel_values).logits
    with model.disable_adapter():
        expected["__base__"] = model(pixel_values=pixel_values).logits
    names = ["flowers", "__base__", "birds", "flowers"]
    mixed = model(pixel_values=pixel_values, adapter_names=names).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], expected[name][i])
    torch.testing.assert_close(
        model(pixel_values=pixel_values).logits, expected["flowers"]
    )
    with pytest.raises(ValueError, match="non-existing.*fish"):
        model(pixel_values=pixel_values, adapter_names=["fish"] * 4)
    with pytest.raises(ValueError, match="adapter_names"):
        model(pixel_values=pixel_values, adapter_names=["birds"] * 3)
    model.train()
    with pytest.raises(ValueError, match="training"):
        model(pixel_values=pixel_values, adapter_names=names)


def test_merge_and_mixed_types_are_refused_before_anything_happens(
    trained, pixel_values, tmp_path
):
    expected = features(trained, pixel_values)
    for refused in (
        trained.merge_and_unload,
        trained.merge_adapter,
        trained.base_model.merge_and_unload,
    ):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            refused()
    with pytest.raises(ValueError, match="different peft types"):
        trained.add_adapter("lora", LoraConfig(target_modules=["fc1"]))
    with pytest.raises(ValueError, match="PEFT_SAGE"):
        PeftMixedModel(tiny_clip(), SageConfig(guidance=torch.randn(2, 4)), "default")
    assert torch.equal(features(trained, pixel_values), expected)


@pytest.mark.parametrize("name", ["mlp", "base_layer2", "0"])
def test_adapter_names_that_also_occur_in_the_model(name, clip, pixel_values, tmp_path):
    model = get_peft_model(
        clip, SageConfig(guidance=torch.randn(5, 24)), adapter_name=name
    )
    randomise(model)
    expected = features(model, pixel_values)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_clip(), tmp_path / name, adapter_name=name)
    assert torch.equal(features(again, pixel_values), expected)


class MessageEncoder(torch.nn.Module):
    """Base weights whose names hold parts of our prefix, beside a tower."""

    def __init__(self):
        super().__init__()
        self.clip = tiny_clip()
        self.message_encoder = torch.nn.Linear(2, 2)
        self.sage_norm = torch.nn.LayerNorm(2)


def test_base_weights_with_names_like_ours_are_not_saved(tmp_path):
    model = get_peft_model(MessageEncoder(), SageConfig(guidance=torch.randn(5, 24)))
    model.add_adapter("second", SageConfig(guidance=torch.randn(3, 24)))
    model.save_pretrained(tmp_path)
    names = {*load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {
        key for key in get_peft_model_state_dict(model) if ".mlp.peft_sage_" in key
    }
    model.delete_adapter("second")
    assert not any("second" in key for key in model.state_dict())


# The routes by which an adapter comes back


def test_transformers_own_methods(clip, pixel_values, tmp_path, config):
    base = features(clip, pixel_values)
    clip.add_adapter(config)
    randomise(clip)
    expected = features(clip, pixel_values)
    assert not torch.allclose(expected, base)
    clip.save_pretrained(tmp_path / "adapter")
    clip.disable_adapters()
    assert torch.equal(features(clip, pixel_values), base)
    clip.enable_adapters()

    again = tiny_clip()
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(features(again, pixel_values), expected)
    again.load_adapter(str(tmp_path / "adapter"), adapter_name="second")
    again.set_adapter("second")
    assert torch.equal(features(again, pixel_values), expected)
    again.delete_adapter(["default", "second"])
    assert torch.equal(features(again, pixel_values), base)


def test_inject_adapter_in_model(clip, pixel_values, adapter_dir, trained):
    state = get_peft_model_state_dict(trained)
    expected = features(trained, pixel_values)
    for low_cpu_mem_usage in (False, True):
        model = tiny_clip()
        config = SageConfig(guidance=torch.randn(5, 24), r=8, num_heads=2)
        inject_adapter_in_model(config, model, low_cpu_mem_usage=low_cpu_mem_usage)
        set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(features(model, pixel_values), expected)


def load_class(cls, folder):
    if cls is SageClassifier:
        return SageClassifier(CLIPModel.from_pretrained(folder), torch.randn(7, 16))
    # A saved `CLIPModel` says the projection's width only at the top.
    width = {"projection_dim": 16} if cls is CLIPVisionModelWithProjection else {}
    return cls.from_pretrained(folder, **width)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (CLIPModel, CLIPVisionModel),
        (CLIPVisionModel, CLIPModel),
        (CLIPForImageClassification, SageClassifier),
        (SageClassifier, CLIPVisionModelWithProjection),
    ],
)
def test_an_adapter_follows_its_tower_into_every_class(
    source, target, clip_dir, pixel_values, tmp_path, config, recwarn
):
    model = get_peft_model(load_class(source, clip_dir).eval(), config)
    randomise(model)
    expected = tower_output(model, pixel_values)
    model.save_pretrained(tmp_path / "adapter")
    other = load_class(target, clip_dir).eval()
    again = PeftModel.from_pretrained(
        other, tmp_path / "adapter", low_cpu_mem_usage=True
    )
    torch.testing.assert_close(tower_output(again, pixel_values), expected)
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]
    # transformers' own loader matches names: it loads, or the adapter refuses to run.
    if target is not SageClassifier:
        other = load_class(target, clip_dir).eval()
        other.load_adapter(str(tmp_path / "adapter"))
        try:
            torch.testing.assert_close(tower_output(other, pixel_values), expected)
        except RuntimeError as error:
            assert "were not loaded" in str(error)


def test_lora_beside_sage(clip, pixel_values, tmp_path):
    base = features(clip, pixel_values)
    sage = get_peft_model(
        clip, SageConfig(guidance=torch.randn(5, 24)), adapter_name="sage"
    )
    lora_config = LoraConfig(
        target_modules=r".*vision_model.*q_proj", init_lora_weights=False
    )
    both = get_peft_model(sage.base_model.model, lora_config, adapter_name="lora")
    sage.base_model.set_adapter("sage")
    for name, parameter in both.named_parameters():
        parameter.requires_grad_("peft_sage_" in name or "lora_" in name)
    randomise(both)
    optimizer = torch.optim.SGD(
        [p for p in both.parameters() if p.requires_grad], lr=0.01
    )
    features(both, pixel_values).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in both.parameters()
        if p.requires_grad
    )
    optimizer.step()
    expected = features(both, pixel_values)

    sage.save_pretrained(tmp_path / "s", selected_adapters=["sage"])
    both.save_pretrained(tmp_path / "l", selected_adapters=["lora"])
    again = PeftModel.from_pretrained(
        tiny_clip(), tmp_path / "s" / "sage", adapter_name="sage"
    )
    outer = PeftModel.from_pretrained(
        again.base_model.model, tmp_path / "l" / "lora", adapter_name="lora"
    )
    torch.testing.assert_close(features(outer, pixel_values), expected)
    with outer.disable_adapter():  # of the outer model: both
        assert torch.equal(features(outer, pixel_values), base)


def test_one_name_for_lora_and_sage_is_refused(clip):
    """PEFT keeps one configuration per name, so one of the two would be lost when they are saved."""
    lora = get_peft_model(clip, LoraConfig(target_modules=r".*vision_model.*q_proj"))
    config = lora.peft_config["default"]
    sage = SageConfig(guidance=torch.randn(5, 24))
    with pytest.raises(ValueError, match="`adapter_name` must not be .*got 'default'"):
        get_peft_model(lora.get_base_model(), sage)
    assert lora.peft_config == {"default": config}
    get_peft_model(lora.get_base_model(), sage, adapter_name="sage")


# Memory, precision, copies


def test_whole_model_on_meta(adapter_dir, trained, pixel_values):
    with torch.device("meta"):
        empty = tiny_clip()
    model = PeftModel.from_pretrained(
        empty, adapter_dir, low_cpu_mem_usage=True, torch_device="cpu"
    )
    model.base_model.model.load_state_dict(
        {
            k: v
            for k, v in trained.base_model.model.state_dict().items()
            if "peft_sage_" not in k
        },
        strict=False,
        assign=True,
    )
    for (
        name,
        module,
    ) in model.named_modules():  # position ids are buffers that no file holds
        if "position_ids" in module._buffers:
            module.position_ids = trained.get_submodule(name).position_ids
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(features(model, pixel_values), features(trained, pixel_values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_low_precision_base(
    dtype, autocast_adapter_dtype, pixel_values, adapter_dir, trained
):
    expected = features(trained, pixel_values)
    model = PeftModel.from_pretrained(
        tiny_clip().to(dtype),
        adapter_dir,
        autocast_adapter_dtype=autocast_adapter_dtype,
        is_trainable=True,
    )
    kept = torch.float32 if autocast_adapter_dtype else dtype
    adapter = {n: p for n, p in model.named_parameters() if "peft_sage_" in n}
    assert {p.dtype for p in adapter.values()} == {kept}
    # The guidance is data: it is not rounded to half precision on the way.
    [guidance] = [b for name, b in model.named_buffers() if "peft_sage_" in name]
    assert guidance.dtype == torch.float32
    torch.testing.assert_close(guidance.norm(dim=-1), torch.ones(5))
    output = features(model, pixel_values.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.values())


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save]
)
def test_copies_are_independent(clone, trained, pixel_values):
    trained.add_adapter("second", SageConfig(guidance=torch.randn(3, 24)))
    expected = features(trained, pixel_values)
    copied = clone(trained)
    assert isinstance(copied.base_model, SageModel)
    assert torch.equal(features(copied, pixel_values), expected)
    copied.set_guidance(torch.randn(7, 24))
    assert not torch.equal(features(copied, pixel_values), expected)
    assert torch.equal(features(trained, pixel_values), expected)
    layers = [module for module in copied.modules() if isinstance(module, SageLayer)]
    assert all(
        layer.shared_guidance["default"].rows
        is layers[0].shared_guidance["default"].rows
        for layer in layers
    )


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_bitsandbytes_base(bits, pixel_values, tmp_path):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes packs 4-bit weights in blocks of 64.
    tower = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "intermediate_size": 128, "image_size": 16, "patch_size": 8}
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(tmp_path / "tower")
    settings = BitsAndBytesConfig(**{bits: True})
    base = CLIPVisionModel.from_pretrained(
        tmp_path / "tower", quantization_config=settings, device_map="cpu"
    )
    # Trained before the first evaluation: on some CPUs bitsandbytes packs 4-bit weights for it, and then refuses.
    model = get_peft_model(base, SageConfig(guidance=torch.eye(5, 24), r=8))
    randomise(model)
    model.train()(pixel_values).pooler_output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "peft_sage_" in name and parameter.dtype == torch.float32
            assert parameter.grad.isfinite().all() and parameter.grad.any()
    output = tower_output(model.eval(), pixel_values)
    with model.disable_adapter():
        assert not torch.allclose(tower_output(model, pixel_values), output)


# Gradient checkpointing


def enable_checkpointing(model, use_reentrant):
    # The name before transformers 5.23.
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("through", ["model", "classifier", "transformers"])
def test_gradient_checkpointing_gives_the_same_gradients(through, layers, pixel_values):
    def gradients(order, use_reentrant=None):
        clip = tiny_clip()
        model = (
            SageClassifier(clip, torch.eye(5, 16)) if through == "classifier" else clip
        )
        if order == "before":
            enable_checkpointing(clip, use_reentrant)
        config = SageConfig(guidance=torch.eye(5, 24), layers_to_transform=layers)
        if through == "transformers":
            clip.add_adapter(config)
        else:
            model = get_peft_model(model, config)
        randomise(model)
        if order == "after":  # through PEFT, as Trainer does
            enable_checkpointing(model, use_reentrant)
        model.train()
        if through == "classifier":
            model(pixel_values=pixel_values, labels=torch.arange(4)).loss.backward()
        else:
            features(model, pixel_values).square().sum().backward()
        block = clip.vision_model.encoder.layers[0]
        assert getattr(block, "gradient_checkpointing", False) == (order != "never")
        return {n: p.grad for n, p in model.named_parameters() if "peft_sage_" in n}

    expected = gradients("never")
    assert all(
        gradient is not None and gradient.any() for gradient in expected.values()
    )
    for order in ("before", "after"):
        for use_reentrant in (False, True):
            torch.testing.assert_close(gradients(order, use_reentrant), expected)
