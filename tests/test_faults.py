# SPDX-License-Identifier: Apache-2.0
"""What goes wrong ends in a clear error, with the model and the files as they were before."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from peft_sage import SageClassifier, SageConfig, encode_class_descriptions
from tests.conftest import VISION, byte_tokenizer, randomise, tiny_clip


ROOT = Path(__file__).parent.parent
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST = "base_model.model.vision_model.encoder.layers.0.mlp."


def features(model, pixel_values):
    return model.get_image_features(pixel_values).pooler_output


def picture(model):
    """All that a refused load must not change."""
    modules = [
        (name, type(module), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    parameters = [
        (name, p.requires_grad, p.dtype) for name, p in model.named_parameters()
    ]
    return modules, parameters, model.training, hasattr(model, "peft_config")


def assert_load_fails(folder, error, message, make=tiny_clip):
    """Loading fails alike as the first adapter, as a further one, and with `low_cpu_mem_usage`."""
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(error, match=message):
            PeftModel.from_pretrained(
                make(), folder, low_cpu_mem_usage=low_cpu_mem_usage
            )
    model = get_peft_model(
        make(), SageConfig(guidance=torch.randn(3, 4)), adapter_name="mine"
    )
    before = picture(model)
    with pytest.raises(error, match=message):
        model.load_adapter(folder, "other")
    return model, before


def assert_refused(folder, message, make=tiny_clip):
    """What a weights file lacks, or has too much, is refused with the model as it was."""
    model, before = assert_load_fails(folder, ValueError, message, make)
    assert (
        picture(model) == before
        and list(model.peft_config) == ["mine"]
        and model.active_adapters == ["mine"]
    )
    base = make()
    modules = picture(base)[0]
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert picture(base)[0] == modules and not hasattr(base, "peft_config")


@pytest.fixture
def adapter_dir(tmp_path):
    model = get_peft_model(
        tiny_clip(), SageConfig(guidance=torch.randn(5, 24), r=8, num_heads=2)
    )
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


# Files


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:5],
        lambda raw: b"",
        lambda raw: b"\xff" * len(raw),
        lambda raw: raw[:8] + b"\x00" * 100 + raw[108:],
        lambda raw: raw + b"more",
        lambda raw: pickle.dumps({"a": 1}),
    ],
    ids=[
        "half",
        "five bytes",
        "empty",
        "garbage",
        "garbled header",
        "longer",
        "pickle",
    ],
)
def test_damaged_weights(damage, adapter_dir, pixel_values):
    raw = (adapter_dir / WEIGHTS).read_bytes()
    (adapter_dir / WEIGHTS).write_bytes(damage(raw))
    base = tiny_clip()
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(base, adapter_dir)
    with pytest.raises(
        RuntimeError, match="were not loaded"
    ):  # never on random weights
        features(base, pixel_values)
    assert_load_fails(adapter_dir, SafetensorError, "")


def test_missing_weights(adapter_dir):
    (adapter_dir / WEIGHTS).unlink()
    assert_load_fails(str(adapter_dir), Exception, "adapter")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_a_pickle_is_never_executed(name, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (adapter_dir / WEIGHTS).unlink()
    torch.save({"a": Malicious()}, adapter_dir / name)
    assert_load_fails(adapter_dir, (SafetensorError, pickle.UnpicklingError), "")
    (adapter_dir / name).write_bytes(pickle.dumps(Malicious()))
    assert_load_fails(adapter_dir, (SafetensorError, pickle.UnpicklingError), "")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, ValueError),
        ("", ValueError),
        ('{"peft_type": "PEFT_SAGE", "r": 8', ValueError),
        ("[1, 2]", TypeError),
        ('{"r": 8}', KeyError),
        ('{"peft_type": "PEFT_SAGE", "r": -1}', ValueError),
        ('{"peft_type": "PEFT_SAGE", "r": "8"}', ValueError),
        ('{"peft_type": "PEFT_SAGE", "num_heads": 1e400}', ValueError),
        ('{"peft_type": "NEW_METHOD"}', KeyError),
    ],
)
def test_missing_or_invalid_config(text, error, adapter_dir):
    (adapter_dir / CONFIG).unlink()
    if text is not None:
        (adapter_dir / CONFIG).write_text(text)
    assert_load_fails(str(adapter_dir), error, "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 16}, r"peft_sage_down.*\(8.*expected .*\(16"),
        ({"r": 4}, r"expected .*\(4"),
        (
            {"guidance_shape": [6, 24]},
            r"peft_sage_guidance.*\(5, 24\).*expected .*\(6, 24\)",
        ),
        ({"guidance_shape": [5, 12]}, r"expected .*\((5|8), 12\)"),
        ({"guidance_shape": [0, 0]}, "not expected"),
        ({"num_heads": 3}, "`r` must be divisible"),
        ({"layers_to_transform": [0, 1]}, "do not fit the model: the file has"),
        ({"layers_to_transform": [9]}, "`layers_to_transform`"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"target_modules": []}, "matches none of"),
        ({"exclude_modules": ["layers.0.mlp"]}, "do not fit the model"),
        ({"learnable_scaling": False}, "not expected.*scaling"),
    ],
)
def test_config_and_weights_that_disagree(values, message, adapter_dir):
    edit_config(adapter_dir, **values)
    assert_refused(adapter_dir, message)


def test_other_configs_that_disagree(adapter_dir):
    edit_config(adapter_dir, modules_to_save=["visual_projection"])
    assert_load_fails(adapter_dir, KeyError, "visual_projection")
    for other, message in (
        (["self_attn.q_proj"], "do not fit the model"),
        (r".*text_model.*mlp", "must match modules of the vision tower"),
    ):
        edit_config(adapter_dir, modules_to_save=None, target_modules=other)
        assert_load_fails(adapter_dir, ValueError, message)
    edit_config(
        adapter_dir, target_modules=None, guidance_shape=None
    )  # an AdaptFormer, by its configuration
    assert_load_fails(adapter_dir, ValueError, "not expected.*guidance")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST + "peft_sage_guidance"), "missing.*peft_sage_guidance"),
        (lambda t: t.pop(FIRST + "peft_sage_up.weight"), "missing.*peft_sage_up"),
        (
            lambda t: t.update({FIRST + "peft_sage_new": torch.zeros(1)}),
            "not expected.*peft_sage_new",
        ),
        (
            lambda t: t[FIRST + "peft_sage_up.weight"].fill_(torch.nan),
            "NaN or infinity",
        ),
        (
            lambda t: t[FIRST + "peft_sage_guidance"][3].fill_(torch.inf),
            "NaN or infinity",
        ),
        (
            lambda t: t.update(
                {FIRST + "peft_sage_up.bias": torch.zeros(32, dtype=torch.long)}
            ),
            "int64",
        ),
        (lambda t: t.clear(), r"file has adapted blocks \[\]"),
    ],
)
def test_incomplete_or_damaged_tensors(change, message, adapter_dir):
    edit_weights(adapter_dir, change)
    assert_refused(adapter_dir, message)


def test_weights_of_another_method(adapter_dir, tmp_path):
    lora = get_peft_model(tiny_clip(), LoraConfig(target_modules=["mlp.fc1"]))
    lora.save_pretrained(tmp_path / "lora")
    os.replace(tmp_path / "lora" / WEIGHTS, adapter_dir / WEIGHTS)
    assert_refused(adapter_dir, r"file has adapted blocks \[\]")


def wider_clip():
    vision = {**VISION, "hidden_size": 64}
    return CLIPModel(
        CLIPConfig(
            text_config={"num_hidden_layers": 1},
            vision_config=vision,
            projection_dim=16,
        )
    )


def deeper_clip():
    vision = {**VISION, "num_hidden_layers": 4}
    return CLIPModel(
        CLIPConfig(
            text_config={"num_hidden_layers": 1},
            vision_config=vision,
            projection_dim=16,
        )
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [(wider_clip, "expected .*64"), (deeper_clip, "do not fit the model")],
)
def test_wrong_base_model(make, message, adapter_dir):
    assert_refused(adapter_dir, message, make)


def test_a_head_with_other_classes(tmp_path):
    def classifier(classes):
        return SageClassifier(tiny_clip(), torch.randn(classes, 16))

    model = get_peft_model(
        classifier(5),
        SageConfig(guidance=torch.randn(5, 24), modules_to_save=["class_head"]),
    )
    model.save_pretrained(tmp_path)
    assert_refused(
        tmp_path, r"class_head.*\(5, 16\).*expected .*\(7, 16\)", lambda: classifier(7)
    )


def test_a_misfit_does_not_touch_an_adapter_that_is_there(adapter_dir, pixel_values):
    model = get_peft_model(tiny_clip(), SageConfig(guidance=torch.randn(6, 24), r=8))
    randomise(model, seed=3)
    expected = features(model, pixel_values)
    with pytest.raises(ValueError, match="expected"):
        model.load_adapter(adapter_dir, "default")
    assert torch.equal(features(model, pixel_values), expected)


def test_transformers_own_loader_never_runs_on_what_it_did_not_load(
    adapter_dir, pixel_values
):
    model = tiny_clip()
    expected = features(model, pixel_values)
    edit_weights(adapter_dir, lambda t: t.pop(FIRST + "peft_sage_guidance"))
    model.load_adapter(str(adapter_dir))
    with pytest.raises(RuntimeError, match="were not loaded"):
        features(model, pixel_values)
    model.delete_adapter("default")
    assert torch.equal(features(model, pixel_values), expected)


@pytest.mark.parametrize(
    "name", ["../escape", "a/b", "/tmp/escape", "..", "", "v1.0", "keys"]
)
def test_adapter_names_that_cannot_be_used(name):
    model = tiny_clip()
    before = picture(model)
    with pytest.raises(ValueError, match="`adapter_name`"):
        get_peft_model(model, SageConfig(guidance=torch.randn(3, 4)), adapter_name=name)
    assert picture(model) == before


@pytest.mark.parametrize(
    "name", ["norm", "up", "value", "scaling", "base_layer", "default", "p"]
)
def test_modules_to_save_that_mean_the_adapter(name):
    model = tiny_clip()
    before = picture(model)
    with pytest.raises(
        ValueError, match=f"`modules_to_save` .* '{name}' matches '.*{name}'"
    ):
        get_peft_model(
            model, SageConfig(guidance=torch.randn(3, 4), modules_to_save=[name])
        )
    assert picture(model) == before


# Saving


SAVE = """
import resource, sys, torch
from peft import get_peft_model
from peft_sage import SageConfig
from tests.conftest import tiny_clip
model = get_peft_model(tiny_clip(), SageConfig(guidance=torch.randn(20000, 64), guidance_rows=20000, r=8))
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
model.save_pretrained(sys.argv[1])
"""


def saver(folder, limit=0):
    return subprocess.Popen(
        [sys.executable, "-c", SAVE, str(folder), str(limit)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def assert_whole(folder):
    model = PeftModel.from_pretrained(tiny_clip(), folder)
    assert model.peft_config["default"].guidance_shape == [20000, 64]


def test_a_full_disk_leaves_the_old_adapter(tmp_path):
    process = saver(tmp_path)
    assert process.wait(120) == 0, process.stderr.read()
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    process = saver(tmp_path, limit=1_000_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and b"File too large" in errors
    assert {name: (tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG)} == {
        name: old[name] for name in (WEIGHTS, CONFIG)
    }
    assert_whole(tmp_path)


# Class descriptions


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def test_twenty_thousand_classes(clip_dir, pixel_values, tmp_path):
    descriptions = {f"class {i}": f"thing {i}" for i in range(20_000)}
    model = get_peft_model(
        CLIPModel.from_pretrained(clip_dir), SageConfig(class_descriptions=descriptions)
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        CLIPModel.from_pretrained(clip_dir).eval(), tmp_path / "adapter"
    )
    assert again.peft_config["default"].class_names[-1] == "class 19999"
    assert torch.equal(features(again, pixel_values), features(model, pixel_values))


@pytest.mark.parametrize(
    "descriptions",
    [
        ["猫", "Straße", "кошка"],
        ["🐈", "🐕‍🦺", "👩🏽‍🌾"],
        ["a\u0000b", "c\n\td"],
        ["ﷺ", "\u202eabc"],
    ],
)
def test_any_unicode(descriptions, clip_dir, clip, tokenizer, tmp_path):
    rows = encode_class_descriptions(clip, tokenizer, descriptions)
    assert rows.shape == (len(descriptions), 16) and rows.isfinite().all()
    assert len(rows.unique(dim=0)) == len(descriptions)
    config = SageConfig(class_descriptions={name: [name] for name in descriptions})
    get_peft_model(CLIPModel.from_pretrained(clip_dir), config).save_pretrained(
        tmp_path / "adapter"
    )
    assert SageConfig.from_pretrained(tmp_path / "adapter").class_names == descriptions


def test_fewer_descriptions_than_the_head_has(clip_dir):
    model = SageClassifier(CLIPModel.from_pretrained(clip_dir), torch.randn(4, 16))
    before = picture(model)
    with pytest.raises(ValueError, match="3 classes.*head has 4"):
        get_peft_model(model, SageConfig(class_descriptions=["a", "b", "c"]))
    assert picture(model) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(model, SageConfig(class_descriptions=["a", "b", "c", "d"]))
