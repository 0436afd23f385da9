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
from safetensors.torch import load_file, save

from peft_sage import SageConfig
from tests.conftest import randomise, tiny_clip


EXAMPLES = int(os.environ.get("PEFT_SAGE_FUZZ_EXAMPLES", "200"))
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
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([0, 1, 2, 4, 8, 2**31, 2**63, 10**30]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["mlp", ".*mlp", "(", "layers.0.mlp", "all-linear", "PEFT_SAGE", "LORA"]
    ),
    st.lists(
        st.one_of(st.integers(-4, 30), st.text(max_size=5), st.none()), max_size=4
    ),
    st.dictionaries(
        st.text(max_size=4), st.one_of(st.text(max_size=4), st.integers()), max_size=3
    ),
)
#: Values that are valid, but may not be those of the weights.
plausible = {
    "r": st.sampled_from([2, 4, 8, 16, None]),
    "num_heads": st.sampled_from([1, 2, 4, 8]),
    "guidance_rows": st.sampled_from([1, 4, 5, 6]),
    "guidance_shape": st.lists(
        st.sampled_from([0, 4, 5, 6, 23, 24]), min_size=2, max_size=2
    ),
    "class_descriptions": st.lists(st.sampled_from(["cat", "dog", ""]), max_size=6),
    "class_names": st.lists(st.sampled_from(["cat", "dog"]), min_size=4, max_size=6),
    "scaling": st.floats(-2, 2),
    "learnable_scaling": st.booleans(),
    "init_weights": st.booleans(),
    "target_modules": st.sampled_from(
        ["mlp", ["mlp"], ["layers.0.mlp"], ".*vision.*mlp", ".*1.mlp", ["fc2"], []]
    ),
    "exclude_modules": st.sampled_from(
        ["mlp", ["mlp"], ["layers.0.mlp"], ".*text.*", []]
    ),
    "layers_to_transform": st.lists(st.integers(-3, 3), max_size=4),
    "modules_to_save": st.sampled_from(
        [["visual_projection"], ["layers.0.mlp"], ["logit_scale"], [""], []]
    ),
    "peft_type": st.sampled_from(["LORA", "IA3", "peft_sage", "PEFT_SAGE"]),
    "task_type": st.sampled_from(["FEATURE_EXTRACTION", "SEQ_CLS"]),
}


@FUZZ
@given(data=st.data())
def test_any_field_of_the_configuration(saved, data):
    config, weights, images, expected = saved
    fields = data.draw(
        st.lists(
            st.sampled_from([*sorted(config), "unknown_field"]), min_size=1, max_size=3
        )
    )
    drawn = {
        field: data.draw(st.one_of(plausible.get(field, values), values), label=field)
        for field in fields
    }
    changed = {**config, **drawn}
    output = load(images, json.dumps(changed).encode(), weights)
    if output is not None and SILENT.isdisjoint(fields):
        torch.testing.assert_close(output, expected)


@FUZZ
@given(
    text=st.one_of(
        st.binary(max_size=60),
        st.recursive(values, lambda v: st.lists(v, max_size=3)).map(
            lambda v: json.dumps(v, default=str).encode()
        ),
    )
)
def test_any_configuration_file(saved, text):
    _, weights, images, _ = saved
    assert load(images, text, weights) is None


@FUZZ
@given(data=st.data())
def test_any_change_of_the_weights_file(saved, data):
    config, weights, images, expected = saved
    numbers = 8 + struct.unpack("<Q", weights[:8])[0]
    changed = bytearray(weights)
    kind = data.draw(
        st.sampled_from(["length", "header", "digits", "numbers", "cut", "longer"])
    )
    if kind == "cut":
        changed = changed[: data.draw(st.integers(0, len(weights) - 1))]
    elif kind == "longer":
        changed += data.draw(st.binary(min_size=1, max_size=40))
    else:
        where = {
            "length": range(8),
            "header": range(8, numbers),
            "digits": [
                i for i in range(8, numbers) if chr(weights[i]).isdigit()
            ],  # the header stays well-formed
            "numbers": range(numbers, len(weights)),
        }[kind]
        what = (
            st.sampled_from(b"0123456789") if kind == "digits" else st.integers(0, 255)
        )
        for position in data.draw(
            st.lists(st.sampled_from(where), min_size=1, max_size=4)
        ):
            changed[position] = data.draw(what)
    event(kind)
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
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / WEIGHTS).write_bytes(weights)
        tensors = load_file(Path(name) / WEIGHTS)
    key = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(
        st.sampled_from(["drop", "shape", "nan", "integers", "add", "rename"])
    )
    value = tensors[key]
    if change == "drop":
        del tensors[key]
    elif change == "shape":
        tensors[key] = torch.zeros(
            data.draw(
                st.lists(st.integers(0, 33), max_size=3).filter(
                    lambda s: s != list(value.shape)
                )
            )
        )
    elif change == "nan" and value.is_floating_point():
        value.view(-1)[data.draw(st.integers(0, value.numel() - 1))] = data.draw(
            st.sampled_from([torch.nan, torch.inf, -torch.inf])
        )
    elif change == "integers" and value.is_floating_point():
        tensors[key] = value.to(
            data.draw(st.sampled_from([torch.int8, torch.int64, torch.bool]))
        )
    elif change == "add":
        tensors[key.replace("peft_sage_", "peft_sage_x")] = value.clone()
    else:
        tensors[key.replace("layers", "blocks")] = tensors.pop(key)
    assert (
        load(images, json.dumps(config).encode(), save(tensors, {"format": "pt"}))
        is None
    )
