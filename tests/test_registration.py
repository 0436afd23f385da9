# SPDX-License-Identifier: Apache-2.0
import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import peft_sage
from peft_sage import SageConfig, SageModel
from peft_sage.registration import register


def test_member_behaves_like_peft_own():
    member = PeftType.PEFT_SAGE
    assert member is PeftType("PEFT_SAGE") is PeftType["PEFT_SAGE"]
    assert member == "PEFT_SAGE" and isinstance(member, PeftType)
    assert member in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "PEFT_SAGE"}
    assert len(set(PeftType)) == len(PeftType)


def test_all_of_peft_maps_know_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PEFT_SAGE] is SageConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PEFT_SAGE] is SageModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.PEFT_SAGE] == "peft_sage_"


def test_registering_twice_does_nothing():
    before = list(PeftType)
    register(SageConfig, SageModel)
    assert list(PeftType) == before


def test_another_holder_of_the_name_is_an_error(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.PEFT_SAGE, LoraConfig)
    with pytest.raises(KeyError, match="already PEFT method"):
        register(SageConfig, SageModel)


def test_another_holder_of_the_prefix_is_an_error():
    code = (
        "import peft\n"
        "from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as prefixes\n"
        "prefixes['peft_sage_'] = 'peft_sage_'\n"
        "import peft_sage\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KeyError" in run.stderr.splitlines()[-1]


def test_peft_is_unchanged_for_lora(clip, tmp_path):
    model = get_peft_model(clip, LoraConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_type is PeftType.LORA


def test_another_version_of_peft_is_refused_at_import():
    code = "import peft; peft.__version__ = '0.22.0'; import peft_sage"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    setup = (Path(__file__).parents[1] / "setup.cfg").read_text()
    needed = re.search(r"^ +(peft>=.*)", setup, re.MULTILINE)[1]
    error = f"ImportError: peft_sage needs {needed}, but peft 0.22.0 is installed"
    assert run.stderr.splitlines()[-1].startswith(error)


def test_documented_names_are_importable():
    assert sorted(peft_sage.__all__) == peft_sage.__all__
    for name in peft_sage.__all__:
        assert getattr(peft_sage, name) is not None
