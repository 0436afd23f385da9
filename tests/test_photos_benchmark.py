# SPDX-License-Identifier: Apache-2.0
"""The photograph test bed's runs and report, on a bed of random numbers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.photos import bed as photos
from benchmarks.photos import blocks, data, methods, results, rivals, run, tables


FOLDER = Path(photos.__file__).parent
CLASSES, WIDTH, TOKENS, SHAPE = 6, 32, 10, "4x192"


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """A folder with a tower of random weights and a task of random tokens."""
    work = tmp_path_factory.mktemp("bed")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        num_channels=3,
        image_size=3,
        patch_size=1,
        num_hidden_layers=4,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_attention_heads=2,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(
        work / "towers" / f"A-{SHAPE}"
    )
    np.savez(work / "towers" / f"A-{SHAPE}" / "text_map.npz", log_scale=np.float32(3))
    folder = work / "tasks" / f"A-{SHAPE}"
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, images, views in (
        ("train", 20, 3),
        ("validation", 5, 1),
        ("test", 5, 1),
    ):
        shape = (CLASSES * images, views, TOKENS, WIDTH)
        np.save(
            folder / f"{split}_tokens.npy",
            generator.standard_normal(shape).astype(np.float16),
        )
        np.save(folder / f"{split}_labels.npy", np.repeat(np.arange(CLASSES), images))
        np.save(
            folder / f"{split}_embeds.npy",
            generator.standard_normal((*shape[:2], WIDTH), dtype=np.float32),
        )
    texts = generator.standard_normal((CLASSES, WIDTH), dtype=np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    np.savez(folder / "texts.npz", logit_scale=np.float32(20), text_embeds=texts)
    (folder / "class_names.json").write_text(
        json.dumps([str(k) for k in range(CLASSES)])
    )
    return work


@pytest.fixture
def script(monkeypatch, capsys):
    """Calls a script of the test bed in this process and returns the lines that it prints."""
    threads = torch.get_num_threads()

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out.splitlines()

    yield call
    torch.set_num_threads(threads)


def test_runs_are_done_once_and_reported(bed, tmp_path, script, monkeypatch):
    for module in (methods, rivals):
        monkeypatch.setattr(module, "HEAD_STEPS", 20)
    monkeypatch.setitem(data.LARGEST, "A", 20)
    grid = {"tasks": ["A"], "ratios": [10], "seeds": [10]}
    grid["arms"] = {
        "LIFT": {
            "rows": "none",
            "compensation": 0,
            "text_prior": 0,
            "epochs": 1,
            "vary": {"tau": [0.5, 1.0]},
        }
    }
    trial = {"tasks": ["A"], "ratios": [10], "seeds": [0, 1]}
    trial["arms"] = {
        "Sage": {"epochs": 1, "blocks": 1.0},
        "LIFT's recipe": {"choose": "LIFT"},
        "trained": {"epochs": 1, "start": "trained"},
        "cosine": {"epochs": 1, "target": "cosine", "view": "same"},
    }
    trial["arms"] |= {
        name: {"method": name, "epochs": 1}
        for name in ("zero-shot", "head", "lora", "block", "clap", "gda")
    }
    trial["arms"]["cache"] = {"method": "tip-adapter", "rates": [0, 0.001]}
    for name, content in {"grid-lift": grid, "trial": trial}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        assert script(run, bed, tmp_path / f"{name}.yaml", "--results", tmp_path)
    assert script(run, bed, tmp_path / "trial.yaml", "--results", tmp_path) == []
    lines = results.read_results(tmp_path / "trial.jsonl")
    assert len(lines) == 22
    assert {line["seed"] for line in lines} == {0, 1}
    assert all(
        0 <= line[split]["macro"] <= 100
        for line in lines
        for split in ("validation", "test")
    )
    printed = script(tables, tmp_path / "trial.jsonl", "--baseline", "Sage")
    assert sum(line.startswith("|") for line in printed) == 13


@pytest.mark.parametrize("upper", [1, 2, 4])
def test_the_faster_blocks_compute_the_same(bed, upper):
    tokens = torch.randn(4, TOKENS, WIDTH).half()
    with torch.no_grad():
        plain = photos.load_upper_tower(bed, "A", SHAPE)
        expected = plain(pixel_values=tokens.float()).image_embeds
        for remembering in (False, True):
            inputs = blocks.run_frozen(bed, "A", SHAPE, upper, tokens, remembering)
            tower = blocks.load_fast_tower(bed, "A", SHAPE, upper, remembering)
            fast = tower(pixel_values=inputs.float()).image_embeds
            torch.testing.assert_close(fast, expected, atol=2e-2, rtol=2e-2)


def test_batches_are_paired():
    first, second = (list(methods.batches(10, 3, 4, 7, seed=5)) for _ in range(2))
    assert len(first) == 7
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert sorted(torch.cat([images for images, _ in first[:3]]).tolist()) == list(
        range(10)
    )


def test_settings_are_chosen_on_the_validation_split():
    lines = [
        {
            "task": "A",
            "group": "g",
            "arm": arm,
            "seed": seed,
            "settings": {},
            "validation": {"macro": v},
            "test": {"macro": 100 - v},
        }
        for arm, v in (("worse", 1), ("better", 2))
        for seed in (0, 1)
    ]
    assert results.best_arm(lines, "A", "g")["arm"] == "better"


@pytest.mark.parametrize(
    "file", sorted((FOLDER / "experiments").glob("*.yaml")), ids=lambda file: file.stem
)
def test_experiments_have_known_settings(file):
    known = set(methods.Settings.__dataclass_fields__) | {"choose", "vary"}
    for arm in yaml.safe_load(file.read_text())["arms"].values():
        assert set(arm) <= known
        assert set(arm.get("vary", {})) <= known


@pytest.mark.parametrize(("half", "chosen"), [(44.6, 2.0), (44.4, 1.0)])
def test_the_tables_choose_a_factor_as_the_trainer_does(half, chosen):
    def scores(validation, test):
        return {"validation": {"macro": validation}, "test": {"macro": test}}

    head = {"arm": "head alone", **scores(50.0, 3.0)}
    halves = {"half": scores(half, 2.0), "off": scores(50.0, 0.0)}
    runs = [{"arm": "Sage", **scores(45.0, 1.0), **halves}, head]
    found = [line["test"]["macro"] for line in results.by_factor(runs)]
    assert found == [1.0, 2.0, 0.0, chosen, 3.0]
