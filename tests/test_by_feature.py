# SPDX-License-Identifier: Apache-2.0
"""Every script of `examples/by_feature` runs, on a few of the demo's images, and does what it says."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel

from peft_sage import SageClassifier, SageConfig
from tests.conftest import byte_tokenizer
from tests.hub_client import create_model_card
from tests.hub_stand_in import Hub


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = EXAMPLES / "by_feature"
CLIP = EXAMPLES / "emoji_lt" / "tiny-clip"
COLOURS = {"blue": (30, 40, 220), "green": (40, 200, 60), "dark_red": (150, 10, 10)}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script in this process, in an empty folder, and return its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name, *arguments, quick=True):
        few = ["--max-images", "48", "--epochs", "1", "--batch-size", "16"] if quick else []
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / f"{name}.py"), *few, *map(str, arguments)])
        return runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")

    return run


def load(folder, num_classes=86):
    clip = AutoModel.from_pretrained(CLIP, dtype=torch.float32)
    return PeftModel.from_pretrained(SageClassifier(clip, num_classes), folder).eval()


@torch.no_grad()
def logits(model, data, count=8):
    return model.cpu().eval()(pixel_values=torch.stack([data[i]["pixel_values"] for i in range(count)])).logits


def test_every_script_is_tested_and_listed():
    scripts = {path.stem for path in SCRIPTS.glob("*.py")} - {"demo"}
    tests = Path(__file__).read_text()
    listed = (SCRIPTS / "README.md").read_text()
    assert scripts
    for script in scripts:
        assert f'"{script}' in tests and f"`{script}.py`" in listed, script


def test_trainer(run):
    trained = run("trainer")
    logged = [entry for entry in trained["trainer"].state.log_history if "test_macro" in entry]
    assert 0 <= logged[0]["test_macro"] <= 1
    test = trained["demo"].splits["test"]
    torch.testing.assert_close(logits(load("trainer"), test), logits(trained["model"], test))


def test_checkpointing_resumes_where_it_stopped(run):
    whole = run("checkpointing", "--output-dir", "whole")
    stopped = run("checkpointing", "--output-dir", "parts", "--stop-after", 2, "--save-steps", 1)
    assert stopped["trainer"].state.global_step == 2
    resumed = run("checkpointing", "--output-dir", "parts", "--save-steps", 1)
    assert resumed["trainer"].state.global_step == whole["trainer"].state.global_step == 3
    test = whole["demo"].splits["test"]
    torch.testing.assert_close(logits(resumed["model"], test), logits(whole["model"], test))
    assert not torch.allclose(logits(stopped["model"], test), logits(whole["model"], test), atol=1e-3)
    saved = load_file("parts/checkpoint-3/adapter_model.safetensors")
    assert all("peft_sage_" in name or ".class_head." in name for name in saved)  # no base model in the checkpoints


def test_tracking(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scores = run("tracking")["scores"]
    events = EventAccumulator(str(next(Path("tracking").rglob("events*")).parent)).Reload()
    assert events.Tags()["images"] == ["attention"]
    assert events.Scalars("validation/macro")[0].value == pytest.approx(scores["macro"].item())


def test_lora_and_sage(run, capsys):
    run("lora_and_sage")
    assert "loaded equals saved: True" in capsys.readouterr().out
    assert sorted(path.name for path in Path("lora_and_sage").iterdir() if path.is_dir()) == ["attention", "semantic"]


def test_test_time_ensembling(run):
    def left_edge(pixel_values):
        assert pixel_values.shape == (10, 3, 224, 224)
        return SimpleNamespace(logits=pixel_values[:, 0, 0, :1])

    ramp = torch.linspace(0, 1, 224).expand(2, 3, 224, 224)
    crops = run("test_time_ensembling")["FiveCrops"](left_edge)
    logits = crops(ramp).logits
    # Of five crops two start at the left edge, two 24 of 248 pixels from it, and one 12.
    assert logits.shape == (2, 1)
    assert logits[0].item() == pytest.approx((2 * 0 + 2 * 24 / 248 + 12 / 248) / 5, abs=3e-3)


def test_open_vocabulary(run, capsys):
    variables = run("open_vocabulary")
    model, heads = variables["model"], variables["heads"]
    assert model.peft_config["default"].class_names == list(variables["texts"]["new"])
    assert logits(model, variables["test"], 4).shape == (4, 43)
    torch.testing.assert_close(variables["classifier"].class_head.weight.data, heads["new"])
    assert capsys.readouterr().out.count("new classes") == 2


def test_own_guidance(run, tmp_path):
    assert run("own_guidance")["model"].peft_config["default"].guidance_shape == [86, 256]
    tokenizer = byte_tokenizer()
    size = {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    BertModel(BertConfig(vocab_size=300, max_position_embeddings=40, **size)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    assert run("own_guidance", "--text-encoder", "bert")["model"].peft_config["default"].guidance_shape == [86, 20]


def test_several_gpus(run, tmp_path):
    """Two CPU processes, which `accelerate launch` starts as its configuration says; and one."""
    one = run("several_gpus", "--batch-size", 16)
    script = [str(SCRIPTS / "several_gpus.py"), "--max-images", "48", "--epochs", "1", "--batch-size", "8"]
    config = str(EXAMPLES / "accelerate_configs" / "ddp.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--mixed_precision", "no"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *script, "--output-dir", "two"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, MULTI_CPU: macro" in done.stdout
    assert sorted(path.name for path in Path("two").iterdir()) == sorted(
        path.name for path in Path("several_gpus").iterdir()
    )
    weights = [load_file(f"{folder}/adapter_model.safetensors") for folder in ("two", "several_gpus")]
    assert one["accelerator"].num_processes == 1 and weights[0].keys() == weights[1].keys()
    assert any(weight.any() for name, weight in weights[0].items() if name.endswith("peft_sage_up.weight"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A long tail of noisy colours."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, counts in {"train": [12, 5, 2], "test": [3, 3, 3]}.items():
        for (name, colour), count in zip(COLOURS.items(), counts, strict=True):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 20, size=(48, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def test_own_images_then_predict(run, photos, capsys):
    options = ["--dataset", photos, "--model", CLIP, "--epochs", 4, "--batch-size", 8, "--lr", 0.01]
    trained = run("own_images", *options, quick=False)
    assert trained["names"] == ["blue", "dark_red", "green"]
    assert trained["scores"]["macro"] > 0.6
    capsys.readouterr()

    paths = sorted(photos.glob("test/*/*.png"))
    folders = sorted(photos.glob("test/*"))
    run("predict", "own_images", *folders, "--top", 1, quick=False)
    lines = capsys.readouterr().out.splitlines()
    with torch.no_grad():
        pixel_values, _ = trained["collate"]([{"image": Image.open(path), "label": 0} for path in paths])
        expected = trained["model"](pixel_values=pixel_values).logits.softmax(dim=-1).max(dim=-1)
    assert len(lines) == len(paths)
    for line, path, k, p in zip(lines, paths, expected.indices.tolist(), expected.values.tolist(), strict=True):
        name, percent = re.fullmatch(rf"{re.escape(str(path))}: (.*) ([\d.]+) %", line).groups()
        assert name == trained["names"][k] and float(percent) == pytest.approx(100 * p, abs=0.06)


def test_own_images_wants_two_splits(run, photos, capsys):
    with pytest.raises(SystemExit):
        run("own_images", "--dataset", photos / "train", "--model", CLIP, quick=False)
    assert "`--dataset` must have the folders train/ and test/" in capsys.readouterr().err


def test_push_to_hub(tmp_path):
    clip = AutoModel.from_pretrained(CLIP, dtype=torch.float32)
    model = get_peft_model(SageClassifier(clip, torch.randn(2, 16), ["cow", "owl"]), SageConfig())
    model.save_pretrained(tmp_path / "adapter")
    create_model_card(model, repo_id=str(tmp_path / "adapter")).save(tmp_path / "adapter" / "README.md")
    (tmp_path / "adapter" / "checkpoints").mkdir()
    (tmp_path / "adapter" / "checkpoints" / "large.bin").write_bytes(b"0")
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
        command = [
            sys.executable,
            str(SCRIPTS / "push_to_hub.py"),
            str(tmp_path / "adapter"),
            "user/owls",
            "--private",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Loaded user/owls with 2 classes: cow, owl" in done.stdout
        files = hub.files("user/owls")
        assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        snippet = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)[1]
        assert 'from_pretrained("user/owls")' in snippet
        done = subprocess.run([sys.executable, "-c", snippet], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.repos["user/owls"]["private"]
        assert json.loads(files["adapter_config.json"])["class_names"] == ["cow", "owl"]
