# SPDX-License-Identifier: Apache-2.0
"""Every script of `examples/by_feature` runs, on a few of the demo's images, and does what it says."""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file

from peft_sage import SageClassifier, SageConfig, TextPrior
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
        monkeypatch.setattr(
            sys, "argv", [str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
        )
        return runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")

    return run


@pytest.fixture
def saved(tmp_path):
    """A folder with a classifier that is trained as far as the shape of its files goes."""
    classifier = SageClassifier.from_texts(
        CLIP, {"night owl": "an owl", "cow": "a cow"}
    )
    model = get_peft_model(classifier, SageConfig())
    torch.nn.init.normal_(classifier.head.weight)
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
    assert sorted(
        path.name for path in Path("lora_and_sage").iterdir() if path.is_dir()
    ) == ["attention", "semantic"]


def test_several_gpus(run):
    """Two CPU processes, which `accelerate launch` starts as its configuration says; and one."""
    one = run("several_gpus", *QUICK)
    script = [str(SCRIPTS / "several_gpus.py"), *QUICK[:-1], "8"]
    config = str(EXAMPLES / "accelerate_configs" / "ddp.yaml")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--mixed_precision",
        "no",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *script, "--output-dir", "two"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, MULTI_CPU: macro" in done.stdout
    assert sorted(path.name for path in Path("two").iterdir()) == sorted(
        path.name for path in Path("several_gpus").iterdir()
    )
    weights = [
        load_file(f"{folder}/adapter_model.safetensors")
        for folder in ("two", "several_gpus")
    ]
    assert (
        one["accelerator"].num_processes == 1 and weights[0].keys() == weights[1].keys()
    )
    assert any(
        weight.any()
        for name, weight in weights[0].items()
        if name.endswith("peft_sage_up.weight")
    )


def write_stream(folder, *sizes):
    """Parquet files of images of one colour each, which are told apart by their red; labels go round."""
    features = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=["owl", "cow", "ant"])}
    )
    first = 0
    for k, size in enumerate(sizes):
        images = range(first, first := first + size)
        rows = {
            "image": [
                Image.new("RGB", (48, 48), (10 * i, 80 * (i % 3), 0)) for i in images
            ],
            "label": [i % 3 for i in images],
        }
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(
            folder / f"train-{k}.parquet"
        )
    return first


def launch_on_two_machines(environment, *arguments):
    """As the page says, but for the addresses: both are this machine, with one CPU process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    config = str(EXAMPLES / "accelerate_configs" / "ddp.yaml")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--mixed_precision",
        "no",
    ]
    command += [
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--main_process_ip",
        "localhost",
    ]
    command += ["--main_process_port", str(port), "--machine_rank"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    machines = [
        subprocess.Popen([*command, str(k), *arguments], env=environment, **pipes)
        for k in range(2)
    ]
    try:
        printed = [machine.communicate(timeout=600)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(printed)[
        -5000:
    ]


def test_streaming(run, tmp_path, monkeypatch):
    """Every image of an epoch is trained on once, by one process, whatever the files and the batches; both processes
    end with the same weights, which are those of one process on the same batches, also after a break."""
    number = write_stream(tmp_path / "uneven", 9, 4)
    assert write_stream(tmp_path / "three", 5, 5, 3) == number
    common = ["--buffer-size", 6, "--lr", 0.01, "--epochs"]
    runs = {
        "files": [
            "--dataset",
            "uneven",
            "--batch-size",
            2,
            "--num-workers",
            0,
            *common,
            2,
        ],
        "images": [
            "--dataset",
            "three",
            "--batch-size",
            2,
            "--num-workers",
            1,
            *common,
            1,
        ],
        "whole": [
            "--dataset",
            "uneven",
            "--batch-size",
            9,
            "--num-workers",
            0,
            *common,
            3,
        ],
    }
    runs["resumed"] = [*runs["files"], "--resume", "files/epoch-1"]
    runs = {
        name: [*map(str, flags), "--output-dir", name] for name, flags in runs.items()
    }
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    job = Path(__file__).with_name("streaming_job.py")
    launch_on_two_machines(environment, str(job), json.dumps(list(runs.values())))
    ended = {}
    for name, epochs in {"files": 2, "images": 1, "whole": 3, "resumed": 1}.items():
        (seen, ended[name], counts, prior), (others, same, *_) = (
            torch.load(f"{name}/seen{k}.pt") for k in range(2)
        )
        torch.testing.assert_close(same, ended[name], atol=0, rtol=0)
        assert counts.tolist() == [5, 4, 4] and len(seen) == epochs
        for parts in zip(seen, others, strict=True):
            assert len(parts[0]) == len(parts[1])  # as many steps
            trained = [
                pair
                for part in parts
                for batch in part
                for pair in batch
                if pair[1] >= 0
            ]
            assert sorted(trained) == [[10 * i, i % 3] for i in range(number)]
            shares = [
                sum(label >= 0 for batch in part for _, label in batch)
                for part in parts
            ]
            assert sorted(shares) == ([6, 7] if name == "images" else [4, 9])
        if name == "whole":
            strength = prior
    torch.testing.assert_close(ended["resumed"], ended["files"])

    monkeypatch.setattr(
        "peft_sage.choose_text_prior",
        lambda *_, **__: TextPrior(strength, {}, torch.zeros(0)),
    )
    one = run("streaming", *runs["whole"], "--batch-size", 13, "--output-dir", "one")[
        "classifier"
    ]
    weights = {
        name: weight.detach()
        for name, weight in one.named_parameters()
        if weight.requires_grad
    }
    torch.testing.assert_close(
        weights, ended["whole"], atol=1e-4, rtol=1e-4
    )  # a hundredth of one of the steps
    [[best]] = SageClassifier.from_pretrained("files").predict(
        [Image.new("RGB", (48, 48), "red")]
    )
    assert best["label"] in ("owl", "cow", "ant")


def test_predict(run, saved, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    for name, colour in {"b.png": "red", "a.jpg": "blue"}.items():
        Image.new("RGB", (60, 40), colour).save(tmp_path / "new" / name)
    Image.new("RGB", (60, 40), "white").save(tmp_path / "alone.png")
    run("predict", saved, "new", "alone.png")
    lines = capsys.readouterr().out.splitlines()
    expected = SageClassifier.from_pretrained(saved).predict(
        ["new/a.jpg", "new/b.png", "alone.png"]
    )
    for line, path, [best] in zip(
        lines, ["new/a.jpg", "new/b.png", "alone.png"], expected, strict=True
    ):
        name, percent = re.fullmatch(rf"{path}: (.*) ([\d.]+) %", line).groups()
        assert name == best["label"] and float(percent) == pytest.approx(
            100 * best["score"], abs=0.051
        )


def test_push_to_hub_and_back(saved, tmp_path):
    for name in ("checkpoints/large.bin", "report.html"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("not to be shared")
    snippet = f'from peft_sage import SageClassifier\nprint(SageClassifier.from_pretrained("{saved}").class_names)'
    (saved / "README.md").write_text(
        f"---\nlibrary_name: peft\n---\n```python\n{snippet}\n```\n"
    )
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
        assert set(files) == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert hub.repos["user/owls"]["private"]
        code = re.search(
            r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL
        )[1]
        assert '"user/owls"' in code and process("-c", code) == "['night owl', 'cow']\n"
        Image.new("RGB", (60, 40)).save(tmp_path / "black.png")
        assert process(
            SCRIPTS / "predict.py", "user/owls", tmp_path / "black.png"
        ).endswith(" %\n")
