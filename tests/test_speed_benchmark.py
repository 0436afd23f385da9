# SPDX-License-Identifier: Apache-2.0
"""The speed benchmark runs, on a model of no size; what it measures is not looked at."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks.speed import measures, run


SPEED = Path(run.__file__).parent

SMALL = ["--small", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_end_up_in_the_table_and_others_stay(tmp_path):
    first = ["loss_memory"]
    second = ["loss_step"]
    for groups in (first, second):
        run.main([*SMALL, "--output", str(tmp_path), "--rows", *groups])
    results = json.loads((tmp_path / "results.json").read_text())
    page = (tmp_path / "RESULTS.md").read_text()
    assert set(results) == {*first, *second}
    rows = [row for group in results.values() for row in group["rows"]]
    assert all(row["low"] <= row["median"] <= row["high"] for row in rows)
    assert all(f"| {row['what']} | " in page for row in rows)
    assert "`--small`: the numbers mean nothing" in page and run.NO_GPU in page


def test_the_page_is_what_the_results_say():
    results = json.loads((SPEED / "results.json").read_text())
    assert run.page(results) == (SPEED / "RESULTS.md").read_text(), (
        "python -m benchmarks.speed.run --report"
    )
    assert "--small" not in run.page(results)


def test_every_row_compares_runs_of_its_group():
    file = yaml.safe_load((SPEED / "rows.yaml").read_text())
    for group in (file["groups"] | file["gpu_groups"]).values():
        assert group["measure"] in measures.MEASURES
        for row in group["rows"]:
            assert {
                row[key] for key in ("of", "over", "less", "beside") if key in row
            } <= set(group["runs"])


def test_runs_take_turns():
    order = []
    values = run.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b") or 3.0},
        "cpu",
        2,
    )
    assert "".join(order) == "ba" + "ab" + "ba"
    assert np.array_equal(values["b"], [3.0, 3.0]) and (values["a"] < 1).all()


def test_living_bytes_are_counted():
    with measures.LiveBytes() as count:
        first = torch.zeros(100)
        del first
        second = torch.zeros(25).view(5, 5)
    assert (count.now, count.peak) == (100, 400) and second.numel() == 25


@pytest.mark.slow
def test_what_is_prepared_for_a_gpu_runs_on_the_cpu(tmp_path):
    command = [
        "bash",
        str(SPEED / "on_gpu.sh"),
        *f"--device cpu --output {tmp_path}".split(),
        *SMALL,
    ]
    subprocess.run(command, check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"gpu_training", "gpu_memory", "gpu_trainer"} <= set(results)
