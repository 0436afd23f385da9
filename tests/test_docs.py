# SPDX-License-Identifier: Apache-2.0
"""README and docs: every Python snippet runs, every command is one, links lead somewhere, and it stays short."""

import importlib.util
import inspect
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import HfArgumentParser

import peft_sage
from tests.hub_stand_in import Hub


ROOT = Path(__file__).parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "examples/README.md",
    "examples/by_feature/README.md",
    "examples/emoji_lt/README.md",
    *DOCS,
]
#: Twelve classes, as of a small user: most have few images.
COUNTS = (20, 12, 8, 6, 5, 4, 4, 4, 4, 4, 4, 4)


def blocks(page, languages):
    """The code blocks of a page, also those in lists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = rf"^( *)```(?:{languages})\n(.*?)^\1```"
    found = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def snippets(page):
    demo = "examples/emoji_lt/tiny-clip"
    code = "\n".join(blocks(page, "python"))
    return code.replace("openai/clip-vit-base-patch16", demo)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader of the docs works: a clone's examples, and a folder of photographs."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    rng = np.random.default_rng(0)
    for k, count in enumerate(COUNTS):
        photos = tmp_path / "photos" / f"colour_{k:02}"
        photos.mkdir(parents=True)
        for i in range(count):
            colour = (20 * k, 128, 255 - 20 * k)
            pixels = rng.normal(colour, 20, size=(40, 56, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(photos / f"{i:02}.jpg")
    Image.new("RGB", (40, 56)).save(tmp_path / "owl.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


SLOW = ("README.md", "docs/quick_start.md")
RUN = [page for page in PAGES if blocks(page, "python") and page != "docs/hub.md"]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in RUN],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_snippets_run(
    page,
    folder,
    capsys,
):
    names = {"__name__": "__main__"}
    exec(compile(snippets(page), page, "exec"), names)
    printed = capsys.readouterr().out
    if page == "README.md":
        # The first block is the whole job, from texts to the predictions of a saved model.
        scores = names["trainer"].state.log_history[-1]
        assert scores["eval_macro"] > 0.2
        assert {"eval_many", "eval_medium", "eval_few"} <= scores.keys()
        assert (folder / "drawings").is_dir() and "'label': " in printed
    if page == "docs/quick_start.md":
        assert "text prior" in printed and len(names["answers"]) == sum(COUNTS)
        assert all(len(answer) == 3 for answer in names["answers"])
    if page == "docs/trainer.md":
        history = names["trainer"].state.log_history
        assert any("train_loss" in entry for entry in history)
    if page == "docs/from_lora_and_lift.md":
        weights = " ".join(names["both"].state_dict())
        assert "lora_A.attention" in weights and "modules_to_save.semantic" in weights
    if page == "docs/long_tails.md":
        assert names["prior"].label_probability.nan_to_num(1).argmin() == 3


def test_hub_snippets_run(folder):
    """In a process of their own, because `HF_ENDPOINT` counts when huggingface_hub is imported."""
    with Hub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", snippets("docs/hub.md")],
            env=hub.environment(folder / "home"),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "['owl', 'cow']" in done.stdout and "torch.Size([2, 2])" in done.stdout


@pytest.fixture(scope="module")
def job():
    """The parser of the main script."""
    names = runpy.run_path(str(ROOT / "examples" / "finetune.py"), run_name="finetune")
    kinds = ("DataArguments", "ModelArguments", "RunArguments")
    return HfArgumentParser([names[kind] for kind in kinds])


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_ones(page, job):
    """Scripts exist, and `finetune.py` has the flags."""
    for block in blocks(page, "sh|bash"):
        for line in block.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            for word in command:
                if word.startswith("examples/") and word.endswith((".py", ".yaml")):
                    assert (ROOT / word).is_file(), word
            if "examples/finetune.py" in command:
                flags = command[command.index("examples/finetune.py") + 1 :]
                assert job.parse_known_args(flags)[1] == [], line


def test_ci_runs_what_the_readme_says():
    demo, tests = blocks("README.md", "bash")
    assert demo.splitlines()[-1] == "python examples/finetune.py"
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line in tests.splitlines()] == tests.splitlines()


def test_links_lead_somewhere_and_the_site_has_every_page():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)", text):
            path = (ROOT / page).parent / target
            assert target.startswith("http") or path.exists(), f"{page}: {target}"
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(f"docs/{page}" for page in nav) == DOCS


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None, reason="needs the `docs` extra"
)
def test_the_site_has_every_public_name(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "--strict",
    ]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(peft_sage.__all__) - {"__version__", "templates"}:
        assert f'id="peft_sage.{name}"' in page, name


def test_it_stays_short():
    lines = {page: len((ROOT / page).read_text().splitlines()) for page in PAGES}
    assert lines["README.md"] <= 150
    assert len(DOCS) <= 12 and max(lines[page] for page in DOCS) <= 90, lines


def public_functions():
    """(name, function, docstring) of what a user may call; the docstring of a class is that of its arguments."""
    for name in set(peft_sage.__all__) - {"__version__", "templates"}:
        item = getattr(peft_sage, name)
        yield name, item, inspect.getdoc(item)
        for method, function in vars(item).items() if inspect.isclass(item) else ():
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function, inspect.getdoc(function) or ""


def test_docstrings_name_the_arguments_that_there_are():
    for name, function, docstring in public_functions():
        if not inspect.isclass(function) and "." in name and not docstring:
            continue  # an override that says nothing new
        assert docstring and docstring[0].isupper(), name
        pattern = r"^Args:\n(.*?)(?=^\S|\Z)"
        sections = re.findall(pattern, docstring, re.MULTILINE | re.DOTALL)
        described = re.findall(r"^    \*{0,2}(\w+): ", "".join(sections), re.MULTILINE)
        unknown = set(described) - set(inspect.signature(function).parameters)
        assert not unknown, f"{name}: {unknown}"
