# SPDX-License-Identifier: Apache-2.0
"""Run PEFT's own tests on Sage.

    pip download --no-binary :all: --no-deps peft==0.21.2
    python -m tests.peft_suite.run peft-0.21.2.tar.gz

The tests must be those of the installed PEFT. They are copied into a temporary folder; none of them is part of this
repository. With `--method lora` the same tests run on LoRA, to tell a fault of ours from one of the test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path


def unpack(source: Path, folder: Path) -> Path:
    """Return the folder of PEFT's tests in a checkout or a source distribution."""
    if source.is_dir():
        return source / "tests"
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("peft-*/tests"))


def report(results: Path) -> int:
    """Print the counts, and each failure and reason to skip. Return the number of failures."""
    passed = 0
    failures = []
    skipped = Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        failure = (
            case.find("failure")
            if case.find("failure") is not None
            else case.find("error")
        )
        if failure is not None:
            failures.append((name, (failure.get("message") or "").split("\n")[0][:200]))
        elif case.find("skipped") is not None:
            skipped[
                (case.find("skipped").get("message") or "").split("\n")[0][:200]
            ] += 1
        else:
            passed += 1
    print(f"{passed} passed, {len(failures)} failed, {sum(skipped.values())} skipped")
    for name, message in failures:
        print(f"failed   {name}: {message}")
    for reason, count in skipped.most_common():
        print(f"skipped  {count:4d}  {reason}")
    return len(failures)


def main() -> int:
    """Run the tests and print a report; the exit status is 1 if a test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a checkout of PEFT, or its source distribution from PyPI",
    )
    parser.add_argument("--method", choices=["sage", "lora"], default="sage")
    parser.add_argument(
        "pytest_arguments", nargs="*", help="passed on to pytest, after `--`"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package = folder / "suite" / "peft_tests"
        shutil.copytree(unpack(arguments.source, folder), package)
        (package / "__init__.py").touch()
        shutil.copy(
            Path(__file__).with_name("suite.py"), package / "test_with_our_cases.py"
        )
        results = folder / "results.xml"
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            f"--junitxml={results}",
            "-c",
            os.devnull,
        ]
        command = [
            sys.executable,
            "-m",
            "pytest",
            *options,
            *arguments.pytest_arguments,
            "test_with_our_cases.py",
        ]
        environment = {
            **os.environ,
            "PEFT_SUITE_METHOD": arguments.method,
            "HF_HUB_OFFLINE": "1",
        }
        environment["PYTHONPATH"] = (
            f"{Path(__file__).parents[2]}{os.pathsep}{folder / 'suite'}"
        )
        subprocess.run(
            [*command[:-1], str(package / command[-1])],
            cwd=folder / "suite",
            env=environment,
            check=False,
        )
        return int(report(results) > 0)


if __name__ == "__main__":
    sys.exit(main())
