# SPDX-License-Identifier: Apache-2.0
"""PEFT's own tests with our cases. `run.py` copies this file beside the tests of the installed PEFT; see there."""

import functools
import importlib.util
import inspect
import os
import sys
import tempfile
import types

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import CLIPConfig, CLIPForImageClassification

from peft_sage import SageConfig


# The tests import diffusers for others than ours; a placeholder will do where it is not installed.
if importlib.util.find_spec("diffusers") is None:
    sys.modules["diffusers"] = types.ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = None
from . import test_custom_models, testing_common  # noqa: E402
from .testing_utils import set_init_weights_false  # noqa: E402


if getattr(sys.modules.get("diffusers"), "StableDiffusionPipeline", True) is None:
    del sys.modules["diffusers"]

METHOD = os.environ.get("PEFT_SUITE_METHOD", "sage")
CASE = "test_name, model_id, config_cls, config_kwargs"


# PEFT's custom models, with blocks that map a width to itself


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 20))

    def forward(self, x):
        return x + self.mlp(x)


class BlockMLP(nn.Module):
    """Between the layers of the `MLP` of PEFT's tests lie two blocks of a transformer."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        # PEFT finds the number of a layer only behind a further name.
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.lin1 = nn.Linear(20, 2)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X):
        X = self.lin0(X.to(self.dtype) / 90)
        for layer in self.encoder["layers"]:
            X = layer(X)
        return self.sm(self.lin1(X))


class Models:
    @classmethod
    def from_pretrained(cls, model_id, dtype=None):
        torch.manual_seed(0)
        return BlockMLP().to(dtype or torch.float32)


GUIDANCE = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
SAGE_CASES = {
    "list of targets": {"target_modules": ["mlp"]},
    "regular expression": {"target_modules": r".*layers\.1\.mlp"},
    "one layer": {"target_modules": ["mlp"], "layers_to_transform": [0]},
    "heads": {"target_modules": ["mlp"], "r": 8, "num_heads": 4},
    "fixed scaling": {
        "target_modules": ["mlp"],
        "learnable_scaling": False,
        "scaling": 2.0,
    },
    "excluded": {"target_modules": ["mlp"], "exclude_modules": ["layers.0.mlp"]},
    "head": {"target_modules": ["mlp"], "modules_to_save": ["lin1"]},
}
LORA_CASES = {
    "list of targets": {"target_modules": ["mlp.0"]},
    "regular expression": {"target_modules": r".*layers\.1\.mlp\.0"},
    "one layer": {"target_modules": ["mlp.0"], "layers_to_transform": [0]},
    "head": {"target_modules": ["mlp.0"], "modules_to_save": ["lin1"]},
}
if METHOD == "sage":
    CONFIG = SageConfig
    CUSTOM = [
        (name, "BlockMLP", SageConfig, {"guidance": GUIDANCE, **case})
        for name, case in SAGE_CASES.items()
    ]
    CUSTOM.append(("no guidance", "BlockMLP", SageConfig, {"target_modules": ["mlp"]}))
    CLIP = [
        ("default targets", SageConfig, {"guidance": GUIDANCE}),
        ("no guidance", SageConfig, {}),
    ]
else:
    CONFIG = LoraConfig
    CUSTOM = [(name, "BlockMLP", LoraConfig, case) for name, case in LORA_CASES.items()]
    CLIP = [("q_proj", LoraConfig, {"target_modules": ["q_proj"]})]


def without_merging(function):
    """Sage refuses to merge, and says so; PEFT's tests know which of its own methods do."""

    @functools.wraps(function)
    def test(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except NotImplementedError as error:
            if "cannot be merged" not in str(error):
                raise
            pytest.skip("Sage adapters cannot be merged.")

    return test


def with_cases(function):
    """A copy of a test that runs on our cases, `None` if it is about other methods or their special models."""
    marks = getattr(function, "pytestmark", [])
    if not any(mark.name == "parametrize" and mark.args[0] == CASE for mark in marks):
        return None
    copied = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied = without_merging(functools.update_wrapper(copied, function))
    copied.pytestmark = [
        pytest.mark.parametrize(CASE, CUSTOM, ids=[case[0] for case in CUSTOM]).mark
        if mark.name == "parametrize" and mark.args[0] == CASE
        else mark
        for mark in marks
    ]
    return copied


class TestCustomModel(test_custom_models.TestPeftCustomModel):
    """`TestPeftCustomModel` on our cases."""

    transformers_class = Models


for name, function in inspect.getmembers(
    test_custom_models.TestPeftCustomModel, inspect.isfunction
):
    if name.startswith("test_"):
        setattr(TestCustomModel, name, with_cases(function))


# PEFT's common tests, on a small CLIP that is loaded from a folder


@pytest.fixture(scope="module")
def clip_folder():
    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    vision = {**tower, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 100}, vision_config=vision, num_labels=3
    )
    with tempfile.TemporaryDirectory() as folder:
        CLIPForImageClassification(config).save_pretrained(folder)
        yield folder


ARGUMENTS = {
    "safe_serialization": [True, False],
    "use_reentrant": [True, False],
    "dtype": [torch.float16, torch.bfloat16],
}


class TestClip(testing_common.PeftCommonTester):
    """Every test of `PeftCommonTester` that takes a model and a configuration."""

    transformers_class = CLIPForImageClassification

    def prepare_inputs_for_testing(self):
        return {
            "pixel_values": torch.randn(
                2, 3, 16, 16, generator=torch.Generator().manual_seed(1)
            )
        }


def common_test(name, parameters):
    extra = {
        parameter: ARGUMENTS[parameter]
        for parameter in parameters
        if parameter in ARGUMENTS
    }

    @without_merging
    def test(self, clip_folder, config_cls, config_kwargs, **kwargs):
        if "generate" in name or "input_embeds" in name or "prompt_learning" in name:
            pytest.skip("The test is about language models.")
        if any(
            word in name for word in ("merge", "unload", "mixed")
        ):  # as PEFT's tests of other models do
            config_kwargs = set_init_weights_false(config_cls, config_kwargs)
        arguments = [
            *(["name"] if "test_name" in parameters else []),
            clip_folder,
            config_cls,
            config_kwargs,
        ]
        getattr(self, name)(*arguments, **kwargs)

    variables = ["self", "clip_folder", "config_cls", "config_kwargs", *extra]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    test.__signature__ = inspect.Signature(
        [inspect.Parameter(variable, kind) for variable in variables]
    )
    for variable, values in extra.items():
        test = pytest.mark.parametrize(variable, values)(test)
    cases = [pytest.param(config, kwargs, id=case) for case, config, kwargs in CLIP]
    return pytest.mark.parametrize("config_cls, config_kwargs", cases)(test)


for name, function in inspect.getmembers(
    testing_common.PeftCommonTester, inspect.isfunction
):
    parameters = list(inspect.signature(function).parameters)
    if name.startswith("_test_") and {"model_id", "config_cls", "config_kwargs"} <= set(
        parameters
    ):
        unknown = set(parameters) - {
            "self",
            "test_name",
            "model_id",
            "config_cls",
            "config_kwargs",
            *ARGUMENTS,
        }
        if not unknown:
            setattr(TestClip, name[1:], common_test(name, parameters))
