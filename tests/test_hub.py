# SPDX-License-Identifier: Apache-2.0
"""Push and load through the unmodified huggingface_hub, against a stand-in for the Hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import get_peft_model

from peft_sage import SageClassifier, SageConfig
from tests.conftest import randomise, tiny_clip
from tests.hub_client import RESULTS, create_model_card
from tests.hub_stand_in import Hub


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with Hub() as hub:
        environment = hub.environment(home)
        command = [sys.executable, "-m", "tests.hub_client"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        facts = json.loads(result.stdout.split("FACTS")[1])
        yield hub, facts


@pytest.mark.parametrize(
    "route", ["PeftModel", "low_cpu_mem_usage", "AutoPeftModel", "AutoModel", "load_adapter", "subfolder"]
)
def test_round_trip_gives_equal_outputs(route, pushed):
    assert pushed[1][route] is True


def test_what_is_in_the_repository(pushed):
    hub, facts = pushed
    assert sorted(hub.files("user/adapter")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert {"one/adapter_config.json", "two/adapter_model.safetensors"} <= set(hub.files("user/several"))
    assert facts["class_names"] == ["cat", "dog 🐶"]
    assert (
        "PUT",
        "/lfs/" + hub.repos["user/adapter"]["commits"][-1]["files"]["adapter_model.safetensors"]["lfs"],
    ) in (hub.requests)


def test_a_private_repository_needs_a_token(pushed):
    hub, facts = pushed
    assert hub.repos["user/adapter"]["private"]
    for repo_id in ("user/adapter", "user/no-such-adapter"):
        assert "adapter_config.json" in facts[f"refused {repo_id}"] and repo_id in facts[f"refused {repo_id}"]
    assert facts["unchanged"]


def test_trainer_pushes_an_adapter(pushed):
    hub, facts = pushed
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("user/trained"))
    assert facts["Trainer"] is True


def check_card(text, repo_id, base_model, pipeline_tag):
    _, header, body = text.split("---\n", 2)
    data = yaml.safe_load(header)
    assert data["base_model"] == base_model and data["library_name"] == "peft"
    assert data["pipeline_tag"] == pipeline_tag
    assert f"base_model:adapter:{base_model}" in data["tags"]
    snippet = body.split("```python\n")[1].split("```")[0]
    assert snippet.startswith("import peft_sage\n") and f'"{repo_id}"' in snippet and f'"{base_model}"' in snippet
    compile(snippet, "snippet", "exec")
    assert "More Information Needed" not in body
    return body


def test_the_card_survives(pushed):
    hub, _ = pushed
    text = hub.files("user/adapter")["README.md"].decode()
    body = check_card(text, "user/adapter", "user/clip", "zero-shot-image-classification")
    assert "`cat`" in body and "`dog 🐶`" in body
    for name, value in RESULTS.items():
        assert f"| {name} | {value} |" in body


def test_a_card_of_one_own_stays(clip_dir, tmp_path):
    clip = type(tiny_clip()).from_pretrained(clip_dir)
    model = get_peft_model(SageClassifier(clip, 2), SageConfig(class_descriptions=["cat", "dog"]))
    model.save_pretrained(tmp_path / "adapter")
    card = tmp_path / "adapter" / "README.md"
    create_model_card(model, RESULTS, "me/mine").save(card)
    model.save_pretrained(tmp_path / "adapter")
    body = check_card(card.read_text(), "me/mine", clip_dir, "image-classification")
    assert "| few | 0.5 |" in body and "SageClassifier(base_model, 2)" in body
    with pytest.raises(ValueError, match="`adapter_name`.*other"):
        create_model_card(model, adapter_name="other")


def test_the_snippet_loads_the_adapter(clip_dir, tmp_path, pixel_values, monkeypatch):
    config = SageConfig(class_descriptions=["cat", "dog"], modules_to_save=["class_head"])
    model = get_peft_model(SageClassifier(type(tiny_clip()).from_pretrained(clip_dir), 2), config)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    snippet = create_model_card(model, repo_id=str(tmp_path / "adapter")).text.split("```python\n")[1].split("```")[0]
    names = {}
    exec(snippet, names)
    assert (names["model"](pixel_values=pixel_values).logits == model.eval()(pixel_values=pixel_values).logits).all()
