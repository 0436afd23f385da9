# SPDX-License-Identifier: Apache-2.0
"""The speed benchmark runs, on a model of no size; what it measures is not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "speed" / "run.py"
TINY = {
    "--blocks": "1",
    "--width": "64",
    "--image-size": "32",
    "--batch-size": "2",
    "--classes": "5 9",
    "--repetitions": "2",
    "--threads": "1",
    "--loss-shape": "4 9",
    "--features": "50 8 5",
}


@pytest.mark.slow
def test_rows_end_up_in_the_table_and_in_the_figure(tmp_path):
    page = tmp_path / "RESULTS.md"
    flags = [word for flag, values in TINY.items() for word in (flag, *values.split())]
    for rows in (["training"], ["loss", "mismatch"]):  # the second run keeps what the first one measured
        subprocess.run([sys.executable, str(RUN), "--rows", *rows, "--output", str(page), *flags], check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    text = page.read_text()
    assert set(results) == {"training", "loss", "mismatch"}
    measured = [row for entry in results.values() for row in entry["rows"]]
    assert all(row["low"] <= row["median"] <= row["high"] for row in measured)
    assert all(row["what"] in text for row in measured)
    assert "**Not ViT-B/16**" in text
    assert (tmp_path / "cost_against_C.png").stat().st_size > 0
