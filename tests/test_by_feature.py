# SPDX-License-Identifier: Apache-2.0
"""Every script of `examples/by_feature` runs, copied to an empty folder, and does what it says."""

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
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
    """One process, and two machines of one CPU process each."""
    run("several_gpus", *QUICK, 16)
    script = str(SCRIPTS / "several_gpus.py")
    printed = launch_on_two_machines(script, *QUICK, "8", "--output-dir", "two")
    assert "2 processes, MULTI_CPU: macro" in printed
    weights = load_file("two/adapter_model.safetensors")
    assert any(w.any() for name, w in weights.items() if "peft_sage_up" in name)


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
    return printed[0]


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
