# SPDX-License-Identifier: Apache-2.0
"""Every script of `examples/by_feature` runs, copied to an empty folder, and does what it says."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file

from peft_sage import SageClassifier, SageConfig
from tests.hub_stand_in import Hub


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = EXAMPLES / "by_feature"
CLIP = EXAMPLES / "emoji_lt" / "tiny-clip"
DEMO = ["--model", str(CLIP), "--dataset", str(EXAMPLES / "emoji_lt")]
QUICK = [*DEMO, "--max-images", "48", "--epochs", "1", "--batch-size"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
LAUNCH += [str(EXAMPLES / "accelerate_configs" / "ddp.yaml"), "--mixed_precision", "no"]
TWO_PROCESSES = {
    **os.environ,
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script in this process, copied to an empty folder, and return its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def run(name, *arguments):
        script = shutil.copy(SCRIPTS / f"{name}.py", tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        return runpy.run_path(script, run_name="__main__")

    return run


@pytest.fixture
def saved(tmp_path):
    """A folder with the files of a trained classifier."""
    texts = {"night owl": "an owl", "cow": "a cow"}
    model = get_peft_model(SageClassifier.from_texts(CLIP, texts), SageConfig())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_every_script_is_tested_and_listed():
    tests = Path(__file__).read_text()
    listed = (SCRIPTS / "README.md").read_text()
    for script in SCRIPTS.glob("*.py"):
        assert f'"{script.stem}' in tests and f"`{script.name}`" in listed, script


def test_lora_and_sage(run, capsys):
    run("lora_and_sage", *QUICK, 16)
    assert "loaded equals saved: True" in capsys.readouterr().out
    folders = {path.name for path in Path("lora_and_sage").iterdir() if path.is_dir()}
    assert folders == {"attention", "semantic"}


def test_predict(run, saved, tmp_path, capsys):
    """Folders in folders, a broken file that does not end the others, and the answers as a table."""
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for name, colour in {"b.png": "red", "deep/a.jpg": "blue"}.items():
        Image.new("RGB", (60, 40), colour).save(tmp_path / "new" / name)
    (tmp_path / "new" / "broken.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 of 3 images .* 'new/broken.jpg'"):
        run("predict", saved, "new", "--top-k", 2, "--output", "answers.parquet")
    lines = capsys.readouterr().out.splitlines()
    paths = ["new/b.png", "new/deep/a.jpg"]
    expected = SageClassifier.from_pretrained(saved).predict(paths, top_k=2)
    table = pd.read_parquet("answers.parquet").set_index("path")
    assert sorted(table.index) == ["new/b.png", "new/broken.jpg", "new/deep/a.jpg"]
    assert table.loc["new/broken.jpg"].isna().all()
    for line, path, (best, second) in zip(lines, paths, expected, strict=True):
        assert re.fullmatch(rf"{path}: {best['label']} .*%, .*%", line)
        row = table.loc[path]
        assert row["label"] == best["label"]
        assert row["runner_up_label"] == second["label"]
        assert row["score"] == pytest.approx(best["score"], abs=1e-5)


def test_predict_names_what_is_wrong(run, saved, capsys):
    Path("empty").mkdir()
    answers = (saved, "new", "--output", "answers.txt")
    cases = {
        "in .csv, .json or .parquet, got answers.txt": answers,
        "error: 'new' does not exist": (saved, "new"),
        "error: Folder 'empty' contains no images": (saved, "empty"),
        "error: There is no folder './absent'": ("./absent", saved / "README.md"),
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit) as end:
            run("predict", *arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and "Traceback" not in error


@pytest.mark.slow
def test_several_gpus(run):
    """Two CPU processes, which `accelerate launch` starts as its configuration says; and one."""
    run("several_gpus", *QUICK, 16)
    script = [str(SCRIPTS / "several_gpus.py"), *QUICK, "8", "--output-dir", "two"]
    pipes = {
        "capture_output": True,
        "text": True,
        "timeout": 300,
    }
    done = subprocess.run([*LAUNCH, *script], env=TWO_PROCESSES, **pipes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, MULTI_CPU: macro" in done.stdout
    weights = load_file("two/adapter_model.safetensors")
    assert any(w.any() for name, w in weights.items() if "peft_sage_up" in name)


def write_stream(folder, *sizes):
    """Parquet files of images of one colour each, told apart by their red; labels go round."""
    features = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=["owl", "cow", "ant"])}
    )
    folder.mkdir()
    first = 0
    for k, size in enumerate(sizes):
        rows = range(first, first := first + size)
        colours = [(10 * i, 80 * (i % 3), 0) for i in rows]
        images = [Image.new("RGB", (48, 48), colour) for colour in colours]
        columns = {"image": images, "label": [i % 3 for i in rows]}
        table = Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / f"train-{k}.parquet")


def launch_on_two_machines(*arguments):
    """As the page says, but for the addresses: both are this machine, with one CPU process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [*LAUNCH, "--num_machines", "2", "--num_processes", "2"]
    command += ["--main_process_ip", "localhost", "--main_process_port", port]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", rank, *arguments],
            env=TWO_PROCESSES,
            **pipes,
        )
        for rank in "01"
    ]
    try:
        printed = [machine.communicate(timeout=600)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    failed = [machine.returncode for machine in machines]
    assert failed == [0, 0], "\n".join(printed)[-5000:]


@pytest.mark.slow
def test_streaming(run, tmp_path, monkeypatch):
    """Each image of an epoch is trained on once, by one process, whatever the files and the batches; both processes
    end with the same weights, which are those of one process on the same batches, also after a break."""
    write_stream(tmp_path / "uneven", 9, 4)
    write_stream(tmp_path / "three", 5, 5, 3)
    common = ["--model", CLIP, "--buffer-size", 6, "--lr", 0.01, "--dataset"]
    files = [*common, "uneven", "--batch-size", 2, "--num-workers", 0, "--epochs", 2]
    whole = [*common, "uneven", "--batch-size", 9, "--num-workers", 0, "--epochs", 3]
    runs = {
        "files": files,
        "images": [*common, "three", "--batch-size", 2, "--epochs", 1],
        "whole": whole,
        "resumed": [*files, "--resume", "files/epoch-1"],
    }
    runs = [[*map(str, [*runs[name], "--output-dir", name])] for name in runs]
    job = Path(__file__).with_name("streaming_job.py")
    launch_on_two_machines(str(job), json.dumps(runs))
    ended = {}
    for name, epochs in {"files": 2, "images": 1, "whole": 3, "resumed": 1}.items():
        (seen, ended[name], counts, prior), (others, same, *_) = (
            torch.load(f"{name}/seen{rank}.pt") for rank in range(2)
        )
        torch.testing.assert_close(same, ended[name], atol=0, rtol=0)
        assert counts.tolist() == [5, 4, 4] and len(seen) == epochs
        for shares in zip(seen, others, strict=True):
            assert len(shares[0]) == len(shares[1])  # as many steps
            pairs = [[p for batch in share for p in batch] for share in shares]
            trained = [[pair for pair in share if pair[1] >= 0] for share in pairs]
            assert sorted(sum(trained, [])) == [[10 * i, i % 3] for i in range(13)]
            sizes = sorted(map(len, trained))
            assert sizes == ([6, 7] if name == "images" else [4, 9])
        if name == "whole":
            strength = prior
    torch.testing.assert_close(ended["resumed"], ended["files"])

    monkeypatch.setattr(
        "peft_sage.choose_text_prior",
        lambda *_, **__: SimpleNamespace(strength=strength),
    )
    one = run("streaming", *whole, "--batch-size", 13, "--output-dir", "one")
    parameters = one["classifier"].named_parameters()
    weights = {name: p.detach() for name, p in parameters if p.requires_grad}
    # A hundredth of one of the steps.
    torch.testing.assert_close(weights, ended["whole"], atol=1e-4, rtol=1e-4)
    image = Image.new("RGB", (48, 48), "red")
    [[best]] = SageClassifier.from_pretrained("files").predict([image])
    assert best["label"] in ("owl", "cow", "ant")


@pytest.mark.slow
def test_push_to_hub_and_back(saved, tmp_path):
    (saved / "report.html").write_text("not to be shared")
    snippet = f'from peft_sage import SageClassifier\nprint(SageClassifier.from_pretrained("{saved}").class_names)'
    card = f"---\nlibrary_name: peft\n---\n```python\n{snippet}\n```\n"
    (saved / "README.md").write_text(card)
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
        assert "is a local folder: see docs/hub.md" in printed
        files = hub.files("user/owls")
        assert "adapter_model.safetensors" in files and "report.html" not in files
        assert hub.repos["user/owls"]["private"]
        code = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
        assert process("-c", code[1]) == "['night owl', 'cow']\n"
