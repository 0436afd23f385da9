# SPDX-License-Identifier: Apache-2.0
"""The main job, `examples/finetune.py`, on a tiny random CLIP and a few generated images."""

import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from peft_sage import SageClassifier, SageTrainer, command_line
from peft_sage.arguments import has_fast_bfloat16
from peft_sage.report import RunResults
from tests.hub_stand_in import Hub


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "finetune.py"
COLOURS = {
    "blue": (30, 40, 220),
    "green": (40, 200, 60),
    "grey": (120, 120, 120),
    "red": (220, 30, 40),
}
TRAIN_COUNTS = {"blue": 11, "green": 6, "grey": 4, "red": 2}
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]

spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
finetune = importlib.util.module_from_spec(spec)
sys.modules["finetune"] = finetune  # where dataclasses look
spec.loader.exec_module(finetune)
ARGUMENTS = (finetune.DataArguments, finetune.ModelArguments, finetune.RunArguments)


def parse(argv):
    return command_line.CommandLineParser(ARGUMENTS, "").parse(argv)


def main(argv):
    return finetune.finetune(*parse(argv))


def fails(capsys, *argv):
    """The error of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        command_line.run(finetune.finetune, ARGUMENTS, "", argv)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP with tokenizer and image processor, saved as users have it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    words = [*special.values(), "<unk>", *["a", "photo", "of", ".", "thing"], *COLOURS]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = CLIPTextConfig(**tower, vocab_size=len(words), **ids)
    vision = CLIPVisionConfig(**tower, image_size=16, patch_size=4)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    CLIPModel(config).half().save_pretrained(folder)
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=16, unk_token="<unk>", **special
    ).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    return folder


def draw(folder, counts, rng):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(rng.normal(COLOURS[name], 25, size=(20, 16, 3)), 0, 255)
            # Letters, so that no numbering is taken for views of one object.
            name_of_file = f"{name}{chr(97 + i) * 3}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / name_of_file)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Noisy colours, one per class; 11 test images, which no batch size divides."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    draw(folder / "train", TRAIN_COUNTS, rng)
    draw(folder / "validation", dict.fromkeys(COLOURS, 2), rng)
    draw(folder / "test", {"blue": 3, "green": 3, "grey": 3, "red": 2}, rng)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def command(clip_folder, image_folder, tmp_path):
    """The flags of a short run that leaves its files in `tmp_path/out`."""
    flags = (
        f"--model {clip_folder} --dataset {image_folder} --output-dir {tmp_path}/out"
    )
    flags += (
        " --epochs 2 --batch-size 4 --r 8 --lr 0.01 --disable-tqdm true --bf16 false"
    )
    return flags.split()


@pytest.mark.parametrize(
    ("method", "loss"),
    [("sage", "sage"), ("adaptformer", "la"), ("lora", "ce"), ("head", "sage")],
)
def test_every_method_runs_and_leaves_all_files(
    command, clip_folder, tmp_path, capsys, monkeypatch, method, loss
):
    base = (clip_folder / "model.safetensors").read_bytes()
    monkeypatch.chdir(clip_folder.parent)  # the name of the model is relative to it
    command[1] = clip_folder.name
    results = main([*command, "--method", method, "--loss", loss])
    monkeypatch.chdir(tmp_path)
    assert (clip_folder / "model.safetensors").read_bytes() == base
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert "a fresh model with it predicts the same for 11 test images" in printed
    assert str(RunResults.load(out)) == str(results) and str(results) in printed
    assert results.class_counts == [*TRAIN_COUNTS.values()]
    assert len(results.validation) == 2 and results.kept_epoch in (1, 2)
    for name in ("report.html", "README.md", "long_tail.png", "adapter_config.json"):
        assert (out / name).is_file()
    page = (out / "report.html").read_text()
    has_mistakes = results.trained.overall < 100
    assert bool(re.search(r">\s*test/\w+/\w+\.png", page)) == has_mistakes
    assert "<h2>Worse than before training</h2>" in page
    weights = load_file(out / "adapter_model.safetensors")
    kinds = {"sage": "peft_sage_", "adaptformer": "peft_sage_", "lora": "lora_"}
    others = [name for name in weights if "class_head" not in name]
    assert all(kinds.get(method, "nothing") in name for name in others)
    assert not any("text_model" in name for name in weights)
    assert SageClassifier.from_pretrained(out).class_names == [*COLOURS]


def test_losses_are_one_formula(command):
    for loss, compensation, tau in (("sage", 1, 1), ("la", 0, 1), ("ce", 0, 0)):
        changed = finetune.LOSSES[loss]
        assert changed.get("compensation", 1) == compensation
        assert changed.get("tau", 1) == tau
    assert finetune.LOSSES["la"]["text_prior"] == 0


@pytest.mark.parametrize("method", ["sage", "adaptformer", "lora"])
@pytest.mark.parametrize(("last", "adapted"), [(None, {0, 1}), (1, {1}), (5, {0, 1})])
def test_last_blocks_of_the_vision_tower_are_adapted(command, method, last, adapted):
    flags = [] if last is None else ["--last-blocks", str(last)]
    _, args, _ = parse([*command, "--method", method, *flags])
    classifier = SageClassifier(CLIPModel.from_pretrained(args.model), torch.eye(2, 16))
    model = get_peft_model(classifier, finetune.peft_config(args, classifier))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    blocks = {n.split(".layers.")[1].split(".")[0] for n in trained if ".layers." in n}
    assert {*map(int, blocks)} == adapted
    assert not any("text_model" in name for name in trained)


def wait_for(path, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def start(argv, **kwargs):
    return subprocess.Popen([sys.executable, *map(str, argv)], text=True, **kwargs)


def test_killed_and_resumed_it_ends_where_an_undisturbed_run_does(
    command, monkeypatch, tmp_path
):
    # The order of sums, and so the last bit, depends on the number of threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    command += [
        "--epochs",
        "12",
        "--gradient-accumulation-steps",
        "2",
        "--checkpointing-steps",
        "1",
    ]
    command += ["--dataloader-num-workers", "0"]
    whole = main([*command, "--output-dir", str(tmp_path / "whole")])
    process = start([SCRIPT, *command], stdout=subprocess.DEVNULL)
    killed = tmp_path / "out"
    wait_for(killed / "checkpoint-7" / "trainer_state.json", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "adapter_model.safetensors").exists()
    resumed = main([*command, "--resume-from-checkpoint", "latest"])
    assert resumed.validation == whole.validation
    assert resumed.trained == whole.trained
    first, second = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "whole", killed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_killed_12_times_it_ends_where_an_undisturbed_run_does(command, tmp_path):
    """At any moment, saving included: what is complete can be read, and the same command continues from it."""
    command += ["--epochs", "6", "--checkpointing-steps", "1", "--method", "head"]
    whole = main([*command, "--output-dir", str(tmp_path / "whole")])
    again = [*command, "--resume-from-checkpoint", "latest"]
    generator = np.random
    for seed in range(12):
        process = start([SCRIPT, *again], stdout=subprocess.DEVNULL)
        time.sleep(generator.default_rng(seed).uniform(8, 20))
        process.kill()
        process.wait()
    last = main(again)
    assert last.trained == whole.trained and last.validation == whole.validation


def test_two_processes_agree_with_one(command, tmp_path):
    # Not Adam, which makes much of the rounding of gradients that are nearly zero.
    command += ["--augment", "none", "--epochs", "3", "--optim", "sgd"]
    one = main([*command, "--batch-size", "8", "--output-dir", str(tmp_path / "one")])
    argv = [sys.executable, *LAUNCH, str(SCRIPT), *command]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test accuracy, %") == 1
    two = RunResults.load(tmp_path / "out")
    assert two.trained.predictions == one.trained.predictions
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("one", "out")
    )
    for name in first:
        if not name.endswith("_extra_state"):
            torch.testing.assert_close(
                first[name], second[name], atol=1e-6, rtol=1e-5, msg=name
            )


@pytest.mark.slow
def test_a_run_continues_with_another_number_of_processes(command, tmp_path):
    command += [
        "--augment",
        "none",
        "--epochs",
        "4",
        "--checkpointing-steps",
        "2",
        "--method",
        "head",
    ]
    one = [*command, "--batch-size", "8"]
    whole = main([*one, "--output-dir", str(tmp_path / "whole")])
    main(one)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    argv = [*LAUNCH, str(SCRIPT), *command, "--resume-from-checkpoint", "latest"]
    done = start(argv)
    assert done.wait(300) == 0
    assert RunResults.load(tmp_path / "out").trained == whole.trained


def test_tracking_bf16_crops_imbalance_and_push(command, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(command_line.HfApi, "whoami", lambda self, token: {})
    monkeypatch.setattr(SageTrainer, "push_to_hub", lambda self: pushed.append(self))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    flags = (
        "--bf16 --use-cpu --report-to tensorboard --imbalance-ratio 5 --test-crops 5"
    )
    results = main([*command, *flags.split(), "--push-to-hub"])
    # int(11 * 0.2 ** (i / 3)), but no more than there are
    assert results.class_counts == [11, 6, 3, 2]
    assert [*(tmp_path / "logs").rglob("events*")] and len(pushed) == 1


def test_images_that_are_not_cached_give_the_same_result(command, tmp_path):
    cached = main(command)
    other = ["--cache-gib", "0", "--dataloader-num-workers", "1"]
    uncached = main([*command, *other, "--output-dir", str(tmp_path / "uncached")])
    assert cached.trained == uncached.trained and cached.zero_shot == uncached.zero_shot


def test_the_command_line_wins_over_yaml(command, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "learning_rate: 1e-3\nseed: null\nmethod: lora\nbf16: false\n"
        "batch-size: 7\nepochs: 3\nreport_to: [tensorboard]\nload_best_model_at_end: no\n"
    )
    data = ["--config", str(config), *command[:4]]
    _, model, args = parse([*data, "--method", "head"])
    assert (args.learning_rate, args.per_device_train_batch_size) == (0.001, 7)
    assert args.num_train_epochs == 3
    assert (model.method, args.seed, args.report_to) == ("head", 0, ["tensorboard"])
    assert args.load_best_model_at_end is False and args.bf16 is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed: 1", "unknown key 'speed'"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("method: magic", "invalid choice: 'magic'"),
        ("- lr", "must map flags to values"),
        (
            "learning_rate: 0",
            "`learning_rate` must be a number greater than 0, got 0.0",
        ),
        ("text_prior: much", "`text_prior` must be auto or a number"),
        ("guidance_rows: -1", "--guidance_rows must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(command, tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    error = fails(capsys, "--config", str(tmp_path / "run.yaml"), *command[:4])
    assert message in error and "Traceback" not in error


def test_mistyped_flags_and_names_are_answered_at_once(
    command, tmp_path, capsys, monkeypatch
):
    flags = [
        (
            ["--epoch", "3"],
            "unrecognized arguments: --epoch 3 (did you mean --epochs?)",
        ),
        (["--lr", "fast"], "invalid float value: 'fast'\n"),
        (["--r", "0"], "--r must be at least 1, got 0"),
        (["--model", "./clip"], "--model './clip' does not exist"),
        (["--push-to-hub", "--hub-model-id", "my name"], "my name"),
        (["--report-to", "neptun"], "not installed: pip install neptun"),
    ]
    for wrong, message in flags:
        error = fails(capsys, *command, *wrong)
        assert error.startswith("error: ") and message in error
    with Hub() as hub, monkeypatch.context() as patch:
        patch.setattr(finetune.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(finetune.constants, "ENDPOINT", hub.endpoint)
        error = fails(capsys, *command, "--model", "user/clipp")
        assert "--model 'user/clipp' is neither here nor on the Hub" in error
        patch.setattr(finetune.constants, "ENDPOINT", "http://127.0.0.1:9")
        error = fails(capsys, *command, "--model", "tiny_clip")
        assert "--model 'tiny_clip' does not exist here, and the Hub cannot" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="at least 1"):
        argv = [*command, "--r", "0", "--debug"]
        command_line.run(finetune.finetune, ARGUMENTS, "", argv)


def test_views_of_one_object_stay_together(command, tmp_path, capsys):
    """In the drawn splits and in the folds that choose the text prior; the report says so."""
    source = tmp_path / "views"
    rng = np.random.default_rng(0)
    draw(source, dict.fromkeys(COLOURS, 12), rng)
    for folder in source.iterdir():
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(folder / f"{'abcdef'[number // 2]}_{number % 2}.png")
    main([*command, "--dataset", str(source), "--method", "head", "--epochs", "1"])
    printed = capsys.readouterr()
    assert "48 images that share an object stayed together" in printed.out
    for name, end in (("report.html", ":"), ("README.md", ".")):
        assert f", grouped by file names{end}" in (tmp_path / "out" / name).read_text()


def test_bad_input_is_refused_before_training(command, clip_folder, tmp_path, capsys):
    descriptions = tmp_path / "descriptions.json"
    descriptions.write_text("{")
    cases = [
        (["--label-column", "species"], "species"),
        (["--test-split", "evaluation"], "no images in a split 'evaluation'"),
        (["--descriptions", str(descriptions)], "cannot be read"),
        (["--descriptions", "absent.json"], "'absent.json' is not a file"),
        (["--imbalance-ratio", "0.1"], "`imbalance_ratio` must lie in [1, 11]"),
        (["--push-to-hub"], "run `hf auth login`"),
    ]
    for flags, message in cases:
        error = fails(capsys, *command, *flags)
        assert "error: " in error and message in error
    assert not (tmp_path / "out").exists()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter" in fails(capsys, *command, "--model", str(tmp_path))


def test_the_folder_of_another_run_is_refused(
    command, clip_folder, image_folder, tmp_path, capsys, monkeypatch
):
    command += ["--method", "head"]
    main(command)
    error = fails(capsys, *command, "--lr", "0.5")
    assert "learning_rate: 0.01 -> 0.5" in error and "--overwrite-output-dir" in error
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    next((other / "train/red").iterdir()).unlink()
    assert "dataset: " in fails(capsys, *command, "--dataset", str(other))
    monkeypatch.chdir(clip_folder.parent)
    main([*command, "--model", clip_folder.name])  # the same one
    main([*command, "--lr", "0.5", "--overwrite-output-dir", "--epochs", "1"])
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-5"]


def test_a_script_alone_says_what_is_wrong_and_how_to_continue(command, tmp_path):
    shutil.copy(SCRIPT, tmp_path / "finetune.py")
    alone = [str(tmp_path / "finetune.py")]
    nothing = subprocess.run(
        [sys.executable, *alone], capture_output=True, text=True, cwd=tmp_path
    )
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.startswith("error: ") and "--dataset" in nothing.stderr
    process = start(
        [*alone, *command, "--epochs", "300", "--checkpointing-steps", "10"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wait_for(tmp_path / "out" / "checkpoint-10" / "trainer_state.json", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    *_, saved, command_line_ = error.strip().splitlines()
    assert saved.startswith("Interrupted; ") and "checkpoint-" in saved
    assert command_line_.startswith("Continue with: python ")
    assert command_line_.endswith("--resume_from_checkpoint latest")


def test_an_error_under_a_launcher_says_whose_lines_follow(
    command, monkeypatch, capsys
):
    command += ["--lr", "0"]
    assert "accelerate" not in fails(capsys, *command)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "`accelerate launch --quiet` omits it" in fails(capsys, *command)


def test_bfloat16_is_the_default_on_cpus_that_are_made_for_it(command, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "flags : avx512 amx_bf16")
    assert has_fast_bfloat16()
    command = command[: command.index("--bf16")]
    args = parse([*command, "--bf16"])[-1]
    assert args.mixed_precision == "bf16" and args.device.type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not has_fast_bfloat16()
    monkeypatch.undo()
    expected = "bf16" if has_fast_bfloat16() else "no"
    assert parse(command)[-1].mixed_precision == expected
    assert parse([*command, "--bf16", "false"])[-1].mixed_precision == "no"


def test_help_has_sections_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    order = [
        "Data:",
        "Model:",
        "Recipe and output:",
        "All other arguments of transform",
    ]
    places = [text.index(title) for title in order]
    assert places == sorted(places) and math.inf not in places
    recipe = text[places[2] : places[3]]
    assert "--text_prior" in recipe and "(default: auto)" in recipe
    assert "(default: None)" not in text
    parser = command_line.CommandLineParser(ARGUMENTS, "")
    assert all(action.help for action in parser._actions)


def test_unreadable_images_are_named_or_skipped(command, tmp_path, capsys):
    broken = tmp_path / "broken"
    rng = np.random.default_rng(0)
    draw(broken / "train", TRAIN_COUNTS, rng)
    draw(broken / "test", dict.fromkeys(COLOURS, 1), rng)
    bad = next((broken / "train" / "red").iterdir())
    bad.write_bytes(b"no image")
    command += ["--dataset", str(broken), "--epochs", "1"]
    assert f"red/{bad.name}" in fails(capsys, *command)
    results = main([*command, "--on-bad-image", "skip"])
    assert results.class_counts == [11, 6, 4, 1]
    assert bad.name in json.dumps(results.data["skipped"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Skipped 1 file in train that cannot be read" in page and bad.name in page
