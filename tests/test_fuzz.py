# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of what comes from outside: an adapter's configuration file and its weights file.

Each input either loads and gives the outputs of the adapter that was saved, or ends in a documented exception, and
what was not loaded never runs. `PEFT_SAGE_FUZZ_EXAMPLES` sets the number of inputs of each of the four tests, and
`--hypothesis-show-statistics` prints how many were refused, and with which exception.
"""

import json
import os
import struct
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from peft_sage import SageConfig
from tests.conftest import randomise, tiny_clip


EXAMPLES = int(os.environ.get("PEFT_SAGE_FUZZ_EXAMPLES", "60"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
#: Ours are ValueError and TypeError; PEFT's are KeyError, for an unknown `peft_type` or a module to save that the file
#: lacks, and SafetensorError for a damaged file.
DOCUMENTED = (ValueError, TypeError, KeyError, SafetensorError)
#: Fields that change what an adapter computes, but no shape.
SILENT = {"num_heads", "scaling", "dropout"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def saved():
    """A saved adapter (configuration, weights as bytes), images, and what the adapter gives on them."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    model = get_peft_model(
        tiny_clip(), SageConfig(guidance=torch.randn(5, 24), r=8, num_heads=2)
    )
    randomise(model)
    with torch.no_grad():
        expected = model.get_image_features(images).pooler_output
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        config = json.loads((Path(name) / CONFIG).read_text())
        yield config, (Path(name) / WEIGHTS).read_bytes(), images, expected


@torch.no_grad()
def load(images, config: bytes, weights: bytes):
    """Return the outputs, or `None` if loading was refused and the model gives what it gave, or nothing."""
    base = tiny_clip()
    before = base.get_image_features(images).pooler_output
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(name) / CONFIG).write_bytes(config)
        (Path(name) / WEIGHTS).write_bytes(weights)
        try:
            model = PeftModel.from_pretrained(base, name)
        except DOCUMENTED as error:
            event(f"refused by {type(error).__name__}")
            try:
                assert torch.equal(
                    base.get_image_features(images).pooler_output, before
                )
            except RuntimeError as error:
                assert "were not loaded" in str(error)
            return None
        event("loaded")
        return model.get_image_features(images).pooler_output


values = st.one_of(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    st.integers(-3, 70) | st.sampled_from([2**31, 2**63, 10**30]),
    st.sampled_from(["(", "layers.0.mlp", "all-linear", "PEFT_SAGE", "LORA"]),
    st.lists(st.integers(-4, 30) | st.text(max_size=5) | st.none(), max_size=4),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3),
)
#: Values that are valid, but may not be those of the weights.
PLAUSIBLE = {
    "r": [2, 4, 8, 16, None],
    "num_heads": [1, 2, 4, 8],
    "guidance_rows": [1, 4, 5, 6],
    "guidance_shape": [[5, 24], [5, 23], [4, 24], [6, 24], [0, 24], [24, 5]],
    "class_descriptions": [["cat"], ["cat", "dog", ""], [*"abcde"], []],
    "class_names": [["cat", "dog"], [*"abcd"], [*"abcde"], [*"aabcd"]],
    "scaling": [-2.0, 0.0, 0.5],
    "target_modules": ["mlp", ["mlp"], ["layers.0.mlp"], ".*1.mlp", ["fc2"], []],
    "exclude_modules": ["mlp", ["layers.0.mlp"], ".*text.*", []],
    "layers_to_transform": [[0], [1], [-1], [0, 1], [3], []],
    "modules_to_save": [["visual_projection"], ["layers.0.mlp"], ["logit_scale"], []],
    "peft_type": ["LORA", "IA3", "peft_sage", "PEFT_SAGE"],
    "task_type": ["FEATURE_EXTRACTION", "SEQ_CLS"],
}


@FUZZ
@given(data=st.data())
def test_any_field_of_the_configuration(saved, data):
    config, weights, images, expected = saved
    names = st.sampled_from([*sorted(config), "unknown_field"])
    changed = dict(config)
    fields = data.draw(st.lists(names, min_size=1, max_size=3))
    for field in fields:
        options = values
        if field in PLAUSIBLE:
            options = st.sampled_from(PLAUSIBLE[field]) | values
        changed[field] = data.draw(options, label=field)
    output = load(images, json.dumps(changed).encode(), weights)
    if output is not None and SILENT.isdisjoint(fields):
        torch.testing.assert_close(output, expected)


@FUZZ
@given(text=st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode()))
def test_any_configuration_file(saved, text):
    _, weights, images, _ = saved
    assert load(images, text, weights) is None


@FUZZ
@given(data=st.data())
def test_any_change_of_the_weights_file(saved, data):
    config, weights, images, expected = saved
    start = 8 + struct.unpack("<Q", weights[:8])[0]
    header = range(8, start)
    where = {
        "length": range(8),
        "header": header,
        # The header stays well-formed.
        "digits": [i for i in header if chr(weights[i]).isdigit()],
        "numbers": range(start, len(weights)),
    }
    kind = data.draw(st.sampled_from([*where, "cut", "longer"]))
    event(kind)
    changed = bytearray(weights)
    if kind == "cut":
        changed = changed[: data.draw(st.integers(0, len(weights) - 1))]
    elif kind == "longer":
        changed += data.draw(st.binary(min_size=1, max_size=40))
    else:
        what = b"0123456789" if kind == "digits" else range(256)
        places = st.lists(st.sampled_from(where[kind]), min_size=1, max_size=4)
        for position in data.draw(places):
            changed[position] = data.draw(st.sampled_from(what))
    output = load(images, json.dumps(config).encode(), bytes(changed))
    if kind == "numbers":
        # They have no checksum. Only NaN and infinity show.
        assert output is None or output.shape == expected.shape
    elif output is not None:
        assert kind not in ("cut", "longer")
        torch.testing.assert_close(output, expected)


@FUZZ
@given(data=st.data())
def test_any_tensors(saved, data):
    """A well-formed file with other tensors is refused, but for other floating-point types."""
    config, weights, images, expected = saved
    tensors = load_tensors(weights)
    key = data.draw(st.sampled_from(sorted(tensors)))
    value = tensors[key]
    kinds = ["drop", "shape", "add", "rename"]
    if value.is_floating_point():
        kinds += ["nan", "integers"]
    change = data.draw(st.sampled_from(kinds))
    event(change)
    if change == "shape":
        shapes = st.lists(st.integers(0, 33), max_size=3)
        other = shapes.filter(lambda shape: shape != list(value.shape))
        tensors[key] = torch.zeros(data.draw(other))
    elif change == "nan":
        position = data.draw(st.integers(0, value.numel() - 1))
        value.view(-1)[position] = data.draw(st.sampled_from([torch.nan, torch.inf]))
    elif change == "integers":
        types = st.sampled_from([torch.int8, torch.int64, torch.bool])
        tensors[key] = value.to(data.draw(types))
    elif change == "add":
        tensors[key.replace("peft_sage_", "peft_sage_x")] = value.clone()
    else:
        del tensors[key]
    if change == "rename":
        tensors[f"x{key}"] = value
    changed = save(tensors, {"format": "pt"})
    assert load(images, json.dumps(config).encode(), changed) is None
