# SPDX-License-Identifier: Apache-2.0
"""README and docs: every Python snippet runs, links lead somewhere, generated pages are fresh."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

import peft_sage
from tests.hub_stand_in import Hub


ROOT = Path(__file__).parents[1]
DEMO_CLIP = "examples/emoji_lt/tiny-clip"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
MODULES = sorted((ROOT / "peft_sage").rglob("*.py"))
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: Twelve classes, as of a small user: most have few images.
COUNTS = dict(zip([f"colour_{i}" for i in range(12)], [20, 12, 8, 6, 5, 4, 3, 3, 3, 3, 3, 3], strict=True))


def snippets(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code.replace("openai/clip-vit-base-patch16", DEMO_CLIP) for code in SNIPPET.findall(text)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader of the docs works: a clone's examples, and a folder of photographs."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k, (name, count) in enumerate(COUNTS.items()):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count if split == "train" else 2):
                pixels = np.clip(rng.normal((20 * k, 128, 255 - 20 * k), 20, size=(40, 56, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / split / name / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(page):
    names = {"__name__": "__main__"}
    for code in snippets(page):
        exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in ["README.md", *PAGES] if snippets(page) and page != "docs/hub.md"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_snippets_run(page, folder):
    names = run(page)
    if page == "docs/quick_start.md":
        logged = names["trainer"].state.log_history
        assert [entry for entry in logged if "eval_macro" in entry and "eval_few" in entry]
        assert names["probabilities"].shape == (1, 12)
    if page == "docs/concepts.md":
        assert (folder / "attention.png").stat().st_size > 1000


def test_the_example_readme_loads_what_the_example_saved(tmp_path, monkeypatch):
    """Its snippet, with the head and adapter of an untrained classifier in place of the trained ones."""
    from peft import get_peft_model

    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    classifier = peft_sage.SageClassifier(CLIPModel.from_pretrained(DEMO_CLIP), 86)
    config = peft_sage.SageConfig(class_descriptions=[f"class {i}" for i in range(86)], modules_to_save=["class_head"])
    get_peft_model(classifier, config).save_pretrained("finetuned")
    assert run("examples/README.md")["model"].peft_config["default"].num_classes == 86


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hub_snippets_run(folder):
    """In a process of their own, because `HF_ENDPOINT` counts when huggingface_hub is imported."""
    for part in (CLIPModel, AutoTokenizer, AutoImageProcessor):
        part.from_pretrained(DEMO_CLIP).save_pretrained("clip")
    code = "\n".join(snippets("docs/hub.md"))
    with Hub() as hub:
        environment = hub.environment(folder / "home")
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip().endswith("['owl', 'cow']")
        assert b"macro accuracy" in hub.files("user/owls")["README.md"]


def test_every_page_is_in_the_index_and_links_lead_somewhere():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        assert page == "docs/README.md" or f"({Path(page).name})" in index, page
    for page in ["README.md", "examples/README.md", "examples/by_feature/README.md", *PAGES]:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_api_page_is_fresh():
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["make_page"]()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == made, "run: python docs/make_api.py"


def test_the_picture_is_fresh(tmp_path):
    runpy.run_path(str(ROOT / "docs" / "draw_adapter.py"))["draw"](str(tmp_path / "adapter.svg"))

    def labels(path):
        return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text())

    made = labels(tmp_path / "adapter.svg")
    assert "attention" in made and labels(ROOT / "docs" / "adapter.svg") == made, "run: python docs/draw_adapter.py"


def test_the_table_of_the_readme_has_every_public_name():
    section = (ROOT / "README.md").read_text().split("## API")[1].split("\n## ")[0]
    listed = {name for row in section.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row)}
    assert set(peft_sage.__all__) - {"__version__"} <= listed


def test_every_public_docstring_says_what_and_whence():
    for name in peft_sage.__all__:
        item = getattr(peft_sage, name)
        if callable(item):
            assert item.__doc__ and item.__doc__.strip()[0].isupper() and "Args:" in item.__doc__, name


def public_functions(path):
    """(name, function, docstring) of each public function and method of a module; a class's is that of `__init__`."""

    def of(node, prefix=""):
        for item in node.body:
            if isinstance(item, ast.ClassDef) and not item.name.startswith("_"):
                yield from of(item, f"{item.name}.")
            elif isinstance(item, ast.FunctionDef) and not is_exempt(item):
                documented = node if item.name == "__init__" else item
                if item.name == "__init__" or not item.name.startswith("_"):
                    yield prefix + item.name, item, ast.get_docstring(documented) or ""

    def is_exempt(function):
        return {"property", "overload"} & {ast.unparse(decorator) for decorator in function.decorator_list}

    return of(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_docstrings_name_arguments_results_and_errors(path):
    for name, function, docstring in public_functions(path):
        arguments = [a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg) and a.arg not in ("self", "cls")]
        where = f"{path.name}: {name}"
        assert docstring, where
        for argument in arguments:
            assert re.search(rf"^ +\*{{0,2}}{argument}( \(.+\))?: ", docstring, re.MULTILINE), f"{where}: {argument}"
        returns = function.returns is not None and ast.unparse(function.returns) != "None"
        if returns and not (docstring.startswith("Return ") and not arguments):
            assert "\nReturns:\n" in docstring or "\nYields:\n" in docstring, where
        if any(isinstance(part, ast.Raise) for part in ast.walk(function)):
            assert "\nRaises:\n" in docstring, where
