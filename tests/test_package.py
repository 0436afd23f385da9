# SPDX-License-Identifier: Apache-2.0
"""The package as it is published: types, wheel, and what an import costs."""

import importlib.util
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import peft_sage


ROOT = Path(__file__).parents[1]


EXTRAS = ("matplotlib", "torchmetrics", "datasets", "kornia", "sklearn")
IMPORT = f"""
import sys, peft
before = [name for name in {EXTRAS} if name in sys.modules]
import peft_sage
print(before == [name for name in {EXTRAS} if name in sys.modules])
"""


def test_the_import_needs_no_extra():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.slow
def test_the_import_costs_less_than_60_ms_beyond_peft():
    code = "import peft, time; start = time.perf_counter(); import peft_sage; print(time.perf_counter() - start)"
    run = [sys.executable, "-c", code]
    # The least of several, which other work on the machine disturbs least.
    assert (
        min(float(subprocess.check_output(run, cwd=ROOT, text=True)) for _ in range(5))
        < 0.06
    )


def test_the_version_is_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", peft_sage.__version__)
    for file in ("setup.cfg", "pyproject.toml", "README.md"):
        assert peft_sage.__version__ not in (ROOT / file).read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_types():
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs build")
def test_the_wheel_works_where_the_repository_is_not(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(*command, cwd=ROOT):
        done = subprocess.run(
            [str(part) for part in command], cwd=cwd, capture_output=True, text=True
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    # The wheel is made from the source distribution, so nothing of an earlier build is in it.
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist")
    run(
        sys.executable,
        "-m",
        "twine",
        "check",
        "--strict",
        *(tmp_path / "dist").iterdir(),
    )
    wheel = next((tmp_path / "dist").glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    data = {"py.typed", "report/card.md.jinja", "report/page.html.jinja"}
    assert {f"peft_sage/{name}" for name in data} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"peft_sage"}
    modules = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "peft_sage").rglob("*.py")
    }
    assert modules == {name for name in names if name.endswith(".py")}

    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    # The dependencies are those of this environment; the package is the wheel's.
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    ).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = "import peft_sage; print(peft_sage.__file__, peft_sage.__version__, peft_sage.SageLoss([3, 1]).adjustment)"
    printed = run(python, "-I", "-c", code, cwd=tmp_path)
    assert str(tmp_path / "env") in printed and peft_sage.__version__ in printed
