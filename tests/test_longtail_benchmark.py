# SPDX-License-Identifier: Apache-2.0
"""The experiments of `benchmarks/longtail`, in processes of their own, as their modules have the example's names."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1] / "benchmarks" / "longtail"
SKLEARN = importlib.util.find_spec("sklearn") is not None


def run(*command):
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_experiment_is_well_formed():
    """Fields that the runner knows, no run twice, and arms for every comparison and for the baseline."""
    code = """
import json, pathlib, yaml
from run import expand
from training import DEFAULTS

for path in sorted(pathlib.Path("experiments").glob("*.yaml")):
    experiment = yaml.safe_load(path.read_text())
    specs = expand(experiment)
    assert specs and not {key for spec in specs for key in spec} - DEFAULTS.keys(), path
    full = [{**DEFAULTS, **spec} for spec in specs]
    assert len({json.dumps(spec, sort_keys=True) for spec in full}) == len(full), path
    wanted = [experiment["baseline"]]
    wanted += [fields for asked in experiment.get("compare", []) for fields in (asked["arm"], asked["against"])]
    for fields in wanted:
        arm = {**DEFAULTS, **experiment.get("base", {}), **fields}
        assert any(all(spec[k] == v for k, v in arm.items() if k != "seed") for spec in full), (path, fields)
print("checked")
"""
    assert "checked" in run("-c", code)


@pytest.mark.skipif(not SKLEARN, reason="needs scikit-learn")
def test_runs_are_kept_and_go_on(tmp_path):
    experiment, output = tmp_path / "short.yaml", tmp_path / "short.jsonl"
    experiment.write_text("""
base: {task: digits, layers: [4], epochs: 1, views: 1, split: validation, lr: 0.01, head_lr: 1.0}
grids:
  - method: [zero_shot, head, sage]
""")
    command = ("run.py", experiment, "--output", output, "--workers", "1")
    run(*command, "--limit", "2")
    first = output.read_text()
    run(*command)
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    assert output.read_text().startswith(first) and len(runs) == 3
    macro = {found["spec"]["method"]: found["macro"] for found in runs}
    assert macro["sage"] > macro["zero_shot"] and macro["head"] > macro["zero_shot"]
