# SPDX-License-Identifier: Apache-2.0
"""Push and load through the unmodified huggingface_hub, against a stand-in for the Hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_stand_in import Hub


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with Hub() as hub:
        environment = hub.environment(home)
        command = [sys.executable, "-m", "tests.hub_client"]
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        facts = json.loads(result.stdout.split("FACTS")[1])
        yield hub, facts


@pytest.mark.parametrize(
    "route",
    ["PeftModel", "low_cpu_mem_usage", "AutoPeftModel", "AutoModel", "load_adapter"],
)
def test_round_trip_gives_equal_outputs(route, pushed):
    assert pushed[1][route] is True


def test_what_is_in_the_repository(pushed):
    hub, facts = pushed
    assert sorted(hub.files("user/adapter")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert facts["class_names"] == ["cat", "dog 🐶"]
    assert (
        "PUT",
        "/lfs/"
        + hub.repos["user/adapter"]["commits"][-1]["files"][
            "adapter_model.safetensors"
        ]["lfs"],
    ) in (hub.requests)


def test_a_private_repository_needs_a_token(pushed):
    hub, facts = pushed
    assert hub.repos["user/adapter"]["private"]
    for repo_id in ("user/adapter", "user/no-such-adapter"):
        assert (
            "adapter_config.json" in facts[f"refused {repo_id}"]
            and repo_id in facts[f"refused {repo_id}"]
        )
    assert facts["unchanged"]


def test_trainer_pushes_an_adapter(pushed):
    hub, facts = pushed
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(
        hub.files("user/trained")
    )
    assert facts["Trainer"] is True


def test_a_classifier_pushes_itself(pushed):
    hub, facts = pushed
    for name in ("user/head", "user/whole"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(
            hub.files(name)
        )
    assert hub.repos["user/head"]["private"] and facts["classifier"] is True


def test_a_card_of_one_own_survives(pushed):
    hub, _ = pushed
    text = hub.files("user/adapter")["README.md"].decode()
    # PEFT adds to the metadata, and leaves the text alone.
    assert "# My own card" in text and "More Information Needed" not in text
