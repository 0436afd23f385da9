# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of what comes from outside: an adapter's configuration file and its weights file.

Each input either loads and gives finite outputs, or ends in a documented exception with the model as it was.
`PEFT_SAGE_FUZZ_EXAMPLES` sets the number of inputs of each test.
"""

import json
import os
import struct
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save

from peft_sage import SageConfig, SageLayer
from tests.conftest import randomise, tiny_clip


EXAMPLES = int(os.environ.get("PEFT_SAGE_FUZZ_EXAMPLES", "200"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)
#: What is documented: ours are ValueError and TypeError; KeyError is PEFT's answer to an unknown `peft_type`.
DOCUMENTED = (ValueError, TypeError, KeyError)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def saved():
    """A saved adapter (configuration, weights as bytes), images, and what the adapter gives on them."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    model = get_peft_model(tiny_clip(), SageConfig(guidance=torch.randn(5, 24), r=8, num_heads=2))
    randomise(model)
    with torch.no_grad():
        expected = model.get_image_features(images).pooler_output
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        config = json.loads((Path(name) / CONFIG).read_text())
        yield config, (Path(name) / WEIGHTS).read_bytes(), images, expected


def load(images, config: bytes, weights: bytes):
    """Return the outputs, or `None` if loading was refused and the model is as it was."""
    base = tiny_clip()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(name) / CONFIG).write_bytes(config)
        (Path(name) / WEIGHTS).write_bytes(weights)
        try:
            model = PeftModel.from_pretrained(base, name)
        except DOCUMENTED:
            assert not any(isinstance(module, SageLayer) for module in base.modules())
            assert not hasattr(base, "peft_config")
            return None
        with torch.no_grad():
            return model.get_image_features(images).pooler_output


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**63, 10**30]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["mlp", ".*mlp", "(", "layers.0.mlp", "all-linear", "PEFT_SAGE", "LORA", "CAUSAL_LM"]),
    st.lists(st.one_of(st.integers(-4, 30), st.text(max_size=5), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=4), st.integers()), max_size=3),
)
#: Fields whose change alone cannot be seen in the weights, or that mean the same afterwards.
FREE = {
    *("auto_mapping", "base_model_name_or_path", "class_descriptions", "class_names", "dropout", "inference_mode"),
    *("init_weights", "peft_version", "revision", "text_templates", "tokenizer_name_or_path", "scaling", "task_type"),
}


@FUZZ
@given(data=st.data())
def test_any_field_of_the_configuration(saved, data):
    config, weights, images, expected = saved
    fields = data.draw(st.lists(st.sampled_from([*sorted(config), "unknown_field"]), min_size=1, max_size=3))
    changed = {**config, **{field: data.draw(values, label=field) for field in fields}}
    output = load(images, json.dumps(changed).encode(), weights)
    if output is not None:
        assert output.shape == expected.shape and output.isfinite().all()
        if not set(fields) - FREE:
            torch.testing.assert_close(output, expected)


@FUZZ
@given(
    text=st.one_of(
        st.binary(max_size=60),
        st.recursive(values, lambda v: st.lists(v, max_size=3)).map(lambda v: json.dumps(v, default=str).encode()),
    )
)
def test_any_configuration_file(saved, text):
    _, weights, images, _ = saved
    assert load(images, text, weights) is None


@FUZZ
@given(data=st.data())
def test_any_change_of_the_weights_file(saved, data):
    config, weights, images, expected = saved
    length = struct.unpack("<Q", weights[:8])[0]
    changed = bytearray(weights)
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly within the header, where the structure is.
        position = data.draw(st.one_of(st.integers(0, 8 + length), st.integers(0, len(weights) - 1)))
        changed[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    output = load(images, json.dumps(config).encode(), bytes(changed[:cut]))
    if output is not None:
        assert output.shape == expected.shape
        # The numbers themselves have no checksum: only when no number was changed must the output be the same.
        if changed[8 + length :] == weights[8 + length :] and cut == len(weights):
            torch.testing.assert_close(output, expected)


@FUZZ
@given(data=st.data())
def test_any_header(saved, data):
    config, weights, images, expected = saved
    length = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + length])
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        entry = header.get(name)
        match data.draw(st.sampled_from(["drop", "rename", "dtype", "shape", "offsets", "value"])):
            case "drop":
                header.pop(name, None)
            case "rename":
                header[data.draw(st.text(max_size=60))] = header.pop(name, None)
            case "dtype" if isinstance(entry, dict):
                entry["dtype"] = data.draw(
                    st.sampled_from(["F16", "BF16", "I32", "F64", "BOOL", "U8", "X", "F8_E4M3"])
                )
            case "shape" if isinstance(entry, dict):
                entry["shape"] = data.draw(st.lists(st.integers(-1, 70), max_size=4))
            case "offsets" if isinstance(entry, dict):
                entry["data_offsets"] = data.draw(st.lists(st.integers(-1, len(weights)), max_size=3))
            case _:
                header[name] = data.draw(values)
    raw = json.dumps(header).encode()
    output = load(images, json.dumps(config).encode(), struct.pack("<Q", len(raw)) + raw + weights[8 + length :])
    if output is not None:
        torch.testing.assert_close(output, expected)


@FUZZ
@given(data=st.data())
def test_any_tensors(saved, data):
    """A well-formed file with other tensors is refused, but for other floating-point types."""
    config, weights, images, expected = saved
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / WEIGHTS).write_bytes(weights)
        tensors = load_file(Path(name) / WEIGHTS)
    key = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from(["drop", "shape", "nan", "integers", "add", "rename"]))
    value = tensors[key]
    if change == "drop":
        del tensors[key]
    elif change == "shape":
        tensors[key] = torch.zeros(
            data.draw(st.lists(st.integers(0, 33), max_size=3).filter(lambda s: s != list(value.shape)))
        )
    elif change == "nan" and value.is_floating_point():
        value.view(-1)[data.draw(st.integers(0, value.numel() - 1))] = data.draw(
            st.sampled_from([torch.nan, torch.inf, -torch.inf])
        )
    elif change == "integers" and value.is_floating_point():
        tensors[key] = value.to(data.draw(st.sampled_from([torch.int8, torch.int64, torch.bool])))
    elif change == "add":
        tensors[key.replace("peft_sage_", "peft_sage_x")] = value.clone()
    else:
        tensors[key.replace("layers", "blocks")] = tensors.pop(key)
    assert load(images, json.dumps(config).encode(), save(tensors, {"format": "pt"})) is None
