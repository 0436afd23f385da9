# SPDX-License-Identifier: Apache-2.0
"""Every script of `examples/by_feature` runs, on a few of the demo's images, and does what it says."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file

from peft_sage import SageClassifier, SageConfig
from tests.hub_stand_in import Hub


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = EXAMPLES / "by_feature"
CLIP = EXAMPLES / "emoji_lt" / "tiny-clip"
QUICK = ["--max-images", "48", "--epochs", "1", "--batch-size", "16"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script in this process, in an empty folder, and return its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / f"{name}.py"), *map(str, arguments)])
        return runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")

    return run


@pytest.fixture
def saved(tmp_path):
    """A folder with a classifier that is trained as far as the shape of its files goes."""
    classifier = SageClassifier.from_texts(CLIP, {"night owl": "an owl", "cow": "a cow"})
    model = get_peft_model(classifier, SageConfig())
    torch.nn.init.normal_(classifier._head.weight)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_every_script_is_tested_and_listed():
    scripts = {path.stem for path in SCRIPTS.glob("*.py")} - {"demo"}
    tests = Path(__file__).read_text()
    listed = (SCRIPTS / "README.md").read_text()
    assert scripts
    for script in scripts:
        assert f'"{script}' in tests and f"`{script}.py`" in listed, script


def test_lora_and_sage(run, capsys):
    run("lora_and_sage", *QUICK)
    assert "loaded equals saved: True" in capsys.readouterr().out
    assert sorted(path.name for path in Path("lora_and_sage").iterdir() if path.is_dir()) == ["attention", "semantic"]


def test_several_gpus(run):
    """Two CPU processes, which `accelerate launch` starts as its configuration says; and one."""
    one = run("several_gpus", *QUICK)
    script = [str(SCRIPTS / "several_gpus.py"), *QUICK[:-1], "8"]
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


def test_predict(run, saved, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    for name, colour in {"b.png": "red", "a.jpg": "blue"}.items():
        Image.new("RGB", (60, 40), colour).save(tmp_path / "new" / name)
    Image.new("RGB", (60, 40), "white").save(tmp_path / "alone.png")
    run("predict", saved, "new", "alone.png")
    lines = capsys.readouterr().out.splitlines()
    expected = SageClassifier.from_pretrained(saved).predict(["new/a.jpg", "new/b.png", "alone.png"])
    for line, path, [best] in zip(lines, ["new/a.jpg", "new/b.png", "alone.png"], expected, strict=True):
        name, percent = re.fullmatch(rf"{path}: (.*) ([\d.]+) %", line).groups()
        assert name == best["label"] and float(percent) == pytest.approx(100 * best["score"], abs=0.051)


def test_push_to_hub_and_back(saved, tmp_path):
    for name in ("checkpoints/large.bin", "report.html"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("not to be shared")
    snippet = f'from peft_sage import SageClassifier\nprint(SageClassifier.from_pretrained("{saved}").class_names)'
    (saved / "README.md").write_text(f"---\nlibrary_name: peft\n---\n```python\n{snippet}\n```\n")
    with Hub() as hub:

        def process(*command):
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                env=hub.environment(tmp_path / "home"),
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        printed = process(SCRIPTS / "push_to_hub.py", saved, "user/owls", "--private")
        assert "Loaded user/owls with 2 classes: night owl, cow" in printed
        assert "which nobody else has: see docs/hub.md" in printed
        files = hub.files("user/owls")
        assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert hub.repos["user/owls"]["private"]
        code = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)[1]
        assert '"user/owls"' in code and process("-c", code) == "['night owl', 'cow']\n"
        Image.new("RGB", (60, 40)).save(tmp_path / "black.png")
        assert process(SCRIPTS / "predict.py", "user/owls", tmp_path / "black.png").endswith(" %\n")
