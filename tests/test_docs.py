# SPDX-License-Identifier: Apache-2.0
"""README and docs: every Python snippet runs, every command is one, links lead somewhere, and it stays short."""

import importlib.util
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

import peft_sage
from tests.hub_stand_in import Hub


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import finetune  # noqa: E402


DEMO_CLIP = "examples/emoji_lt/tiny-clip"
DOCS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")
)
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "examples/README.md",
    "examples/by_feature/README.md",
    *DOCS,
]
#: Twelve classes, as of a small user: most have few images.
COUNTS = dict(
    zip(
        [f"colour_{i}" for i in range(12)],
        [20, 12, 8, 6, 5, 4, 3, 3, 3, 3, 3, 3],
        strict=True,
    )
)


def blocks(page, *languages):
    """The code blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(
        rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )


def snippets(page):
    return [
        code.replace("openai/clip-vit-base-patch16", DEMO_CLIP)
        for code in blocks(page, "python")
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader of the docs works: a clone's examples, and a folder of photographs."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k, (name, count) in enumerate(COUNTS.items()):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count if split == "train" else 2):
                pixels = np.clip(
                    rng.normal((20 * k, 128, 255 - 20 * k), 20, size=(40, 56, 3)),
                    0,
                    255,
                )
                Image.fromarray(pixels.astype(np.uint8)).save(
                    tmp_path / "photos" / split / name / f"{i}.jpg"
                )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(page):
    names = {"__name__": "__main__"}
    for code in snippets(page):
        exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page) and page != "docs/hub.md"]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_snippets_run(page, folder, capsys):
    names = run(page)
    if page == "README.md":
        # The first block is the whole job, from texts to the predictions of a saved model.
        assert (
            snippets(page)[0].startswith("import torch")
            and (folder / "drawings").is_dir()
        )
        scores = names["trainer"].state.log_history[-1]
        assert (
            scores["eval_macro"] > 0.2
            and {"eval_many", "eval_medium", "eval_few"} <= scores.keys()
        )
        assert (
            "text prior" in (printed := capsys.readouterr().out)
            and "'label': " in printed
        )
    if page == "docs/quick_start.md":
        assert [len(answer) for answer in names["answers"]] == [3, 3]
    if page == "docs/trainer.md":
        assert [
            entry for entry in names["trainer"].state.log_history if "eval_few" in entry
        ]
    if page == "docs/long_tails.md":
        assert names["prior"].label_probability.nan_to_num(1).argmin() == 3
    if page == "docs/faq.md":
        assert (folder / "attention.png").stat().st_size > 1000 and names["maps"].shape[
            1
        ] == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hub_snippets_run(folder):
    """In a process of their own, because `HF_ENDPOINT` counts when huggingface_hub is imported."""
    for part in (CLIPModel, AutoTokenizer, AutoImageProcessor):
        part.from_pretrained(DEMO_CLIP).save_pretrained("clip")
    code = "\n".join(snippets("docs/hub.md"))
    with Hub() as hub:
        environment = hub.environment(folder / "home")
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip().endswith("['owl', 'cow']")


def commands(page):
    for block in blocks(page, "sh", "bash"):
        yield from (
            shlex.split(line, comments=True)
            for line in block.replace("\\\n", " ").splitlines()
        )


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_ones(page):
    """Scripts exist, and `finetune.py` has the flags."""
    for command in filter(None, commands(page)):
        for word in command:
            if word.endswith((".py", ".yaml")) and "/" in word:
                assert (ROOT / word).is_file(), word
        if "examples/finetune.py" in command:
            finetune.parse_args(command[command.index("examples/finetune.py") + 1 :])


def test_ci_runs_what_the_readme_says():
    section = (
        (ROOT / "README.md").read_text().split("## Quick start")[1].split("\n## ")[0]
    )
    demo, tests = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert demo.splitlines()[-1] == "accelerate launch examples/finetune.py"
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line in tests.splitlines()] == tests.splitlines()


def test_links_lead_somewhere_and_the_site_has_every_page():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert (
                target.startswith("http")
                or (ROOT / page).parent.joinpath(target).exists()
            ), f"{page}: {target}"
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
        "--site-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(peft_sage.__all__) - {
        "__version__",
        "templates",
    }:  # a module, with a heading of its own
        assert f'id="peft_sage.{name}"' in page, name


def test_it_stays_short():
    lines = {page: len((ROOT / page).read_text().splitlines()) for page in PAGES}
    assert lines["README.md"] <= 150
    pages = {page: count for page, count in lines.items() if page.startswith("docs/")}
    assert len(pages) <= 12 and max(pages.values()) <= 80, pages


def test_the_picture_is_fresh(tmp_path):
    runpy.run_path(str(ROOT / "docs" / "draw_adapter.py"))["draw"](
        str(tmp_path / "adapter.svg")
    )

    def labels(path):
        return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text())

    made = labels(tmp_path / "adapter.svg")
    assert "attention" in made and labels(ROOT / "docs" / "adapter.svg") == made, (
        "run: python docs/draw_adapter.py"
    )


def public_functions():
    """(name, function, docstring) of what a user may call; the docstring of a class is that of its arguments."""
    for name in set(peft_sage.__all__) - {"__version__", "templates"}:
        item = getattr(peft_sage, name)
        yield name, item, inspect.getdoc(item)
        if inspect.isclass(item):
            for method, function in vars(item).items():
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{method}", function, inspect.getdoc(function) or ""


def test_docstrings_name_the_arguments_that_there_are():
    for name, function, docstring in public_functions():
        if not inspect.isclass(function) and "." in name and not docstring:
            continue  # an override that says nothing new
        assert docstring and docstring[0].isupper(), name
        section = re.search(
            r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL
        )
        described = (
            re.findall(r"^    \*{0,2}(\w+): ", section[1], re.MULTILINE)
            if section
            else []
        )
        unknown = set(described) - set(inspect.signature(function).parameters)
        assert not unknown, f"{name}: {unknown}"
