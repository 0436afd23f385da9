# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftConfig

from peft_sage import SageConfig


DESCRIPTIONS = {
    "zebra": ["a striped horse", "black and white stripes"],
    "ant": "a small insect",
}


def test_descriptions_keep_their_order_in_the_file(tmp_path):
    SageConfig(class_descriptions=DESCRIPTIONS).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SageConfig)
    assert loaded.class_names == ["zebra", "ant"]
    assert loaded.class_descriptions == [DESCRIPTIONS["zebra"], [DESCRIPTIONS["ant"]]]


def test_round_trip_gives_an_equal_config(tmp_path):
    config = SageConfig(
        class_descriptions=["cat", "dog"],
        r=6,
        num_heads=3,
        target_modules=["mlp"],
        layers_to_transform=[0, 2],
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_scalars_and_arrays_become_plain_values(tmp_path):
    given = {
        "r": np.int64(8),
        "num_heads": np.int32(2),
        "scaling": np.float32(0.5),
        "dropout": torch.tensor(0.25),
        "learnable_scaling": np.bool_(False),
        "layers_to_transform": np.array([0, 2]),
        "target_modules": ("mlp",),
        "class_names": np.array(["cat", "dog"]),
        "guidance_rows": np.uint8(3),
        "tokenizer_name_or_path": Path("folder"),
    }
    SageConfig(guidance=torch.randn(2, 4), **given).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = {**given, "target_modules": ["mlp"], "tokenizer_name_or_path": "folder"}
    assert {name: saved[name] for name in given} == {
        name: getattr(value, "tolist", lambda value=value: value)()
        for name, value in plain.items()
    }


def test_every_field_is_described():
    inherited = {field.name for field in fields(PeftConfig)}
    own = [field for field in fields(SageConfig) if field.name not in inherited]
    assert len(own) == 18 and all(len(field.metadata["help"]) > 20 for field in own)


def test_keys_of_a_newer_version_are_named(tmp_path):
    SageConfig(class_descriptions=["cat", "dog"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"gating": {"rank": 3}}))
    with pytest.warns(UserWarning, match="gating"):
        assert PeftConfig.from_pretrained(tmp_path).class_names == ["cat", "dog"]


def test_tensor_is_not_serialised_and_stays_on_the_object(tmp_path):
    config = SageConfig(guidance=torch.randn(3, 4))
    config.save_pretrained(tmp_path)
    assert "guidance" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert "guidance" not in config.to_dict()
    assert config.guidance.shape == (3, 4)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"class_descriptions": []}, ValueError, "`class_descriptions` is empty"),
        ({"class_descriptions": "cat"}, TypeError, "got str"),
        ({"class_descriptions": {"cat": []}}, ValueError, "'cat' must not be empty"),
        (
            {"class_descriptions": ["cat", ""]},
            ValueError,
            "1 must not be empty or have an empty text",
        ),
        (
            {"class_descriptions": ["cat", ["dog"], 3]},
            TypeError,
            "2 must be a str or a list",
        ),
        (
            {"class_descriptions": {"cat": "a"}, "class_names": ["cat"]},
            ValueError,
            "`class_names` must not be given",
        ),
        (
            {"class_descriptions": [["a"], ["b"]], "class_names": ["cat"]},
            ValueError,
            "1 entries, but there are 2",
        ),
        ({"guidance": [[1.0]]}, TypeError, "tensor of floats .*, got list"),
        ({"guidance": np.ones((2, 3))}, TypeError, "got ndarray"),
        ({"class_names": "cat"}, TypeError, "`class_names` must be a list of str"),
        ({"init_weights": "no"}, TypeError, "`init_weights` must be True or False"),
        ({"tokenizer_name_or_path": 3}, TypeError, "`tokenizer_name_or_path`"),
        ({"guidance": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "torch.int64"),
        ({"guidance": torch.ones(3)}, ValueError, r"shape \(M, e\), got \(3,\)"),
        (
            {"guidance": torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])},
            ValueError,
            r"NaN or infinity in rows \[1\]",
        ),
        (
            {"guidance": torch.tensor([[0.0, 0.0], [1.0, 0.0]])},
            ValueError,
            r"rows of zeros, got them in rows \[0\]",
        ),
        (
            {"guidance": torch.ones(2, 3), "class_descriptions": ["a"]},
            ValueError,
            "2 entries, .* 1 classes",
        ),
        ({"text_templates": ["no place"]}, ValueError, "exactly one `{}`"),
        (
            {"r": 0},
            ValueError,
            "`r` must be an integer, at least 1, at most 65536, got 0",
        ),
        ({"r": 8.0}, ValueError, "got 8.0"),
        (
            {"r": 6, "num_heads": 4},
            ValueError,
            "divisible by `num_heads`, got r=6, num_heads=4",
        ),
        ({"num_heads": 0}, ValueError, "`num_heads`"),
        (
            {"guidance_rows": -1},
            ValueError,
            "`guidance_rows` must be an integer, at least 0, got -1",
        ),
        ({"guidance_rows": True}, ValueError, "`guidance_rows` must be .*, got True"),
        (
            {"class_names": ["a"], "guidance_shape": [2, 3]},
            ValueError,
            "2 rows, but there are 1 classes",
        ),
        (
            {"target_modules": "("},
            ValueError,
            "`target_modules` must hold names or regular expressions",
        ),
        (
            {"modules_to_save": ["("]},
            ValueError,
            "`modules_to_save` must hold names or regular expressions",
        ),
        ({"task_type": "CAUSAL_LM"}, ValueError, "`task_type` must be None"),
        ({"scaling": float("inf")}, ValueError, "`scaling`"),
        ({"dropout": 1.0}, ValueError, "`dropout` must be .* at most 0.999, got 1.0"),
        ({"target_modules": 3}, TypeError, "`target_modules`"),
        (
            {"target_modules": ".*mlp", "layers_to_transform": 1},
            ValueError,
            "`layers_to_transform` cannot be used",
        ),
        (
            {"layers_to_transform": "last"},
            ValueError,
            "`layers_to_transform` must be an integer",
        ),
        ({"layers_pattern": "layers"}, ValueError, "`layers_pattern`"),
        ({"guidance_shape": [1, 2, 3]}, ValueError, "`guidance_shape`"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        SageConfig(**kwargs)
