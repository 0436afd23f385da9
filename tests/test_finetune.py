# SPDX-License-Identifier: Apache-2.0
"""The main job, `examples/finetune.py`, on a tiny random CLIP and a few generated images."""

import hashlib
import json
import math
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
)


EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
import image_data  # noqa: E402
from checkpoints import TrainingProgress  # noqa: E402

from peft_sage import SageClassifier  # noqa: E402


COLOURS = {
    "blue": (30, 40, 220),
    "green": (40, 200, 60),
    "grey": (120, 120, 120),
    "red": (220, 30, 40),
}
TRAIN_COUNTS = {"blue": 11, "green": 6, "grey": 4, "red": 2}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP with tokenizer and image processor, saved as users have it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    words = [
        "<pad>",
        "<bos>",
        "<eos>",
        "<unk>",
        "a",
        "photo",
        "of",
        ".",
        "thing",
        *COLOURS,
    ]
    text = CLIPTextConfig(
        **tower, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    vision = CLIPVisionConfig(**tower, image_size=16, patch_size=4)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    CLIPModel(config).half().save_pretrained(folder)

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    special = {
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
    }
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=16, **special
    ).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    return folder


def _draw(folder, counts, rng):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(
                rng.normal(COLOURS[name], 25, size=(20, 16, 3)), 0, 255
            ).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Noisy colours, a class each, in the layout of an image folder; 11 test images, which no batch size divides."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    _draw(folder / "train", TRAIN_COUNTS, rng)
    _draw(folder / "validation", dict.fromkeys(COLOURS, 2), rng)
    _draw(folder / "test", {"blue": 3, "green": 3, "grey": 3, "red": 2}, rng)
    return folder


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def command(clip_folder, image_folder, tmp_path):
    """The flags of a short run that leaves its files in `tmp_path/out`."""
    flags = f"--model {clip_folder} --dataset {image_folder} --output-dir {tmp_path / 'out'} --cpu-threads 1"
    return [
        *flags.split(),
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--r",
        "8",
        "--lr",
        "0.01",
    ]


def _folder_hash(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("sage", "sage"),
        ("adaptformer", "la"),
        ("lora", "ce"),
        ("head", "sage"),
        ("head", "la"),
        ("head", "ce"),
    ],
)
def test_every_method_runs_and_leaves_an_adapter(
    command, clip_folder, tmp_path, method, loss
):
    base = _folder_hash(clip_folder)
    returned = finetune.main([*command, "--method", method, "--loss", loss])

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert results["settings"]["method"] == method
    assert results["class_names"] == list(COLOURS)
    assert results["class_counts"] == list(TRAIN_COUNTS.values())
    assert len(results["validation"]) == 2 and 1 <= results["kept_epoch"] <= 2
    assert [entry["epoch"] for entry in results["validation"]] == [1, 2]
    assert results["validation"][results["kept_epoch"] - 1]["macro"] == max(
        e["macro"] for e in results["validation"]
    )
    for key in ("zero_shot", "trained"):
        scores = results[key]
        assert set(scores) == {
            "overall",
            "macro",
            "many",
            "medium",
            "few",
            "worst",
            "per_class",
            "num_classes",
        }
        assert scores["num_classes"] == {"many": 0, "medium": 0, "few": 4}
        assert scores["many"] is None and scores["medium"] is None
        assert scores["few"] == pytest.approx(scores["macro"])
        assert scores["macro"] == pytest.approx(np.mean(scores["per_class"]))
        assert scores["worst"] == min(scores["per_class"])
        images = np.array([3, 3, 3, 2])
        assert scores["overall"] == pytest.approx(
            images @ scores["per_class"] / images.sum()
        )

    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    kinds = {
        "sage": "peft_sage_",
        "adaptformer": "peft_sage_",
        "lora": "lora_",
        "head": None,
    }
    adapter = [name for name in weights if "head" not in name]
    assert any("head" in name for name in weights)
    assert (
        all(kinds[method] in name for name in adapter) if kinds[method] else not adapter
    )
    assert not any("text_model" in name for name in weights)
    assert _folder_hash(clip_folder) == base


def test_it_learns(command):
    results = finetune.main([*command, "--epochs", "15", "--lr", "0.02"])
    assert results["zero_shot"]["macro"] < 60
    assert results["trained"]["macro"] > 90


def test_losses_are_one_formula():
    def loss(*flags):
        return finetune.make_loss(
            finetune.parse_args(list(flags)), np.array([8, 2]), 0.5, 0.2
        )

    prior = torch.tensor([0.8, 0.2]).log() - math.log(0.5)
    torch.testing.assert_close(loss("--loss", "ce").adjustment, torch.zeros(2))
    torch.testing.assert_close(
        loss("--loss", "la", "--tau", "0.5").adjustment, 0.5 * prior
    )
    assert loss("--loss", "ce").compensation == loss("--loss", "la").compensation == 0
    sage = loss("--loss", "sage", "--tau", "2", "--compensation", "2")
    torch.testing.assert_close(sage.adjustment, 2 * prior)
    assert (sage.compensation, sage.text_prior, sage.text_guidance) == (2, 0.5, 0.2)


@pytest.mark.parametrize("method", ["sage", "adaptformer", "lora"])
@pytest.mark.parametrize(
    ("last", "adapted"), [(None, {1}), (0, {0, 1}), (1, {1}), (5, {0, 1})]
)
def test_last_blocks_of_the_vision_tower_are_adapted(command, method, last, adapted):
    flags = [] if last is None else ["--last-blocks", str(last)]
    args = finetune.parse_args([*command, "--method", method, *flags])
    classifier = SageClassifier(CLIPModel.from_pretrained(args.model), torch.eye(2, 16))
    model = get_peft_model(classifier, finetune.peft_config(args, classifier))
    trained = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and ".layers." in name
    ]
    assert {
        int(name.partition(".layers.")[2].partition(".")[0]) for name in trained
    } == adapted
    assert not any("text_model" in name for name in trained)


def test_many_classes_are_pooled_for_the_guidance_and_not_for_the_head(
    command, tmp_path
):
    finetune.main([*command, "--guidance-rows", "3", "--epochs", "1"])
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (guidance,) = (
        tensor for name, tensor in weights.items() if "peft_sage_guidance" in name
    )
    (head,) = (
        tensor
        for name, tensor in weights.items()
        if name.endswith(".class_head.weight")
    )
    assert (len(guidance), len(head)) == (3, 4)
    loaded = SageClassifier.from_pretrained(tmp_path / "out")
    assert loaded.class_names == list(COLOURS)
    assert loaded(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 4)


def test_the_text_terms_are_chosen_by_the_data_or_given(command, tmp_path, capsys):
    chosen = finetune.main(command)
    assert chosen["text_guidance"] == 0.4 * chosen["text_prior"]
    assert str(chosen["text_prior"]) in {
        str(float(key)) for key in chosen["text_prior_scores"]
    } | {
        "0",
        "1",
        "3",
        "10",
    }
    printed = capsys.readouterr().out
    assert (
        printed.index("Zero-shot")
        < printed.index("Chosen: text prior")
        < printed.index("Training ")
    )
    given = finetune.main([*command, "--text-prior", "2", "--text-guidance", "0.5"])
    assert (
        given["text_prior"],
        given["text_guidance"],
        given["text_prior_scores"],
    ) == (2, 0.5, None)
    assert given["class_descriptions"] == [[name] for name in COLOURS]
    for flags in (["--loss", "la"], ["--text-prior", "0", "--text-guidance", "0"]):
        off = finetune.main([*command, *flags])
        assert (off["text_prior"], off["text_guidance"]) == (0, 0)


def test_few_images_get_more_epochs(command, monkeypatch):
    monkeypatch.setattr(finetune, "MIN_STEPS", 60)
    flags = [*command[:-8], *command[-6:]]  # without --epochs
    results = finetune.main([*flags, "--method", "head"])
    assert results["validation"][-1]["epoch"] == 12  # of 5 steps each
    monkeypatch.setattr(finetune, "EPOCHS", 4)
    results = finetune.main([*flags, "--method", "head"])
    assert [entry["epoch"] for entry in results["validation"]] == [3, 6, 9, 12]
    monkeypatch.setattr(finetune, "MIN_STEPS", 5)
    assert len(finetune.main([*flags, "--method", "head"])["validation"]) == 4


def test_resumed_after_a_kill_ends_with_the_same_weights(
    command, tmp_path, monkeypatch
):
    command = [
        *command,
        "--epochs",
        "30",
        "--gradient-accumulation-steps",
        "2",
        "--checkpointing-steps",
        "1",
    ]
    command += ["--augmentation", "resized-crop-flip", "--num-workers", "0"]
    finetune.main([*command, "--output-dir", str(tmp_path / "whole")])

    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "finetune.py"), *command],
        stdout=subprocess.DEVNULL,
    )
    killed = tmp_path / "out"
    deadline = time.monotonic() + 300
    while (
        not (killed / "checkpoints" / "step_7").exists()
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "adapter_model.safetensors").exists()
    done = len(list((killed / "checkpoints").glob("step_*")))
    assert 7 <= done < 60
    (killed / "checkpoints" / "unfinished_999").mkdir()

    steps = []
    monkeypatch.setattr(finetune, "seed_batch", _counted(finetune.seed_batch, steps))
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune.main([*command, "--resume-from-checkpoint", "latest"])
    assert len(steps) < 30 * 5 - 7  # it went on, and did not start anew
    whole, resumed = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "whole", killed)
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first, second = (
        json.loads((folder / "results.json").read_text())
        for folder in (tmp_path / "whole", killed)
    )
    assert all(
        first[key] == second[key] for key in ("trained", "validation", "kept_epoch")
    )


def _counted(function, calls):
    def wrapper(*args):
        calls.append(args)
        function(*args)

    return wrapper


def test_every_epoch_has_its_own_order(command, monkeypatch):
    batches = []
    forward = image_data.PixelTransform.forward

    def record(self, pixels):
        batches.extend([pixels] if self.training else [])
        return forward(self, pixels)

    monkeypatch.setattr(image_data.PixelTransform, "forward", record)
    finetune.main([*command, "--method", "head"])
    first, second = batches[:5], batches[5:]
    assert len(first) == len(second) == 5
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpoints_hold_only_what_is_trained_and_know_their_run(command, tmp_path):
    finetune.main(command)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_10", "step_5"]
    names = load_file(checkpoints / "step_5" / "trainable.safetensors").keys()
    assert names and all("peft_sage_" in name or "head" in name for name in names)
    assert not list(checkpoints.glob("*/model*.safetensors"))

    path = str(checkpoints / "step_5")
    with pytest.raises(ValueError, match=r"other settings: lr: 0.01 -> 0.5"):
        finetune.main([*command, "--lr", "0.5", "--resume-from-checkpoint", path])
    with pytest.raises(ValueError, match="is not a checkpoint"):
        finetune.main([*command, "--resume-from-checkpoint", str(tmp_path)])


def test_other_data_or_settings_are_refused_and_other_processes_are_not(
    command, image_folder, tmp_path
):
    finetune.main([*command, "--method", "head"])
    settings = json.loads(
        (tmp_path / "out/checkpoints/step_5/settings.json").read_text()
    )
    assert settings["global_batch_size"] == 4 and "batch_size" not in settings
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    (other / "train/red/0.png").unlink()
    again = [*command, "--method", "head", "--resume-from-checkpoint", "latest"]
    with pytest.raises(ValueError, match="other settings: dataset: .* data: "):
        finetune.main([*again, "--dataset", str(other)])
    with pytest.raises(ValueError, match="other settings: global_batch_size: 4 -> 8"):
        finetune.main([*again, "--batch-size", "8"])


def test_batches_fit_the_data(command, capsys):
    flags = [flag for flag in command if flag not in ("--batch-size", "4")]
    finetune.main([*flags, "--method", "head", "--epochs", "1"])
    assert "Batches of 23 images, because there are only 23" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`--batch-size` must be at most 23, got 24"):
        finetune.main([*command, "--batch-size", "24"])
    with pytest.raises(ValueError, match="`imbalance_ratio` must be at most 11"):
        finetune.main([*command, "--imbalance-ratio", "12"])


def test_fp16_needs_a_gpu(command):
    with pytest.raises(ValueError, match="`--mixed-precision` fp16 needs a GPU"):
        finetune.main([*command, "--mixed-precision", "fp16"])


def test_a_full_disk_leaves_earlier_checkpoints_alone(command, tmp_path, monkeypatch):
    save = finetune.Accelerator.save_state

    def full(self, folder):
        if "unfinished_10" in folder:
            Path(folder, "half.bin").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(self, folder)

    monkeypatch.setattr(finetune.Accelerator, "save_state", full)
    with pytest.raises(
        OSError, match=r"step_10.*No space left on device.*Earlier ones are whole"
    ):
        finetune.main([*command, "--method", "head"])
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == [
        "step_5"
    ]
    monkeypatch.undo()
    results = finetune.main(
        [*command, "--method", "head", "--resume-from-checkpoint", "latest"]
    )
    assert len(results["validation"]) == 2


@pytest.mark.slow
def test_killed_50_times_it_ends_where_an_undisturbed_run_does(command, tmp_path):
    """At any moment, saving included: what was saved is whole, and the same command goes on from it."""
    command = [
        *command,
        "--epochs",
        "6",
        "--checkpointing-steps",
        "1",
        "--method",
        "head",
        "--num-workers",
        "0",
    ]
    whole = finetune.main([*command, "--output-dir", str(tmp_path / "whole")])
    AcceleratorState._reset_state(reset_partial_state=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune"])
    generator = np.random.default_rng(0)
    for _ in range(50):
        process = context.Process(
            target=finetune.main,
            args=([*command, "--resume-from-checkpoint", "latest"],),
        )
        process.start()
        process.join(timeout=generator.uniform(0.2, 8))
        process.kill()
        process.join()
        for checkpoint in (tmp_path / "out").glob("checkpoints/step_*"):
            load_file(checkpoint / "trainable.safetensors")
            json.loads((checkpoint / "settings.json").read_text())
        if (tmp_path / "out/results.json").exists():
            json.loads((tmp_path / "out/results.json").read_text())
    last = finetune.main([*command, "--resume-from-checkpoint", "latest"])
    assert (
        last["trained"] == whole["trained"]
        and last["validation"] == whole["validation"]
    )


def test_latest_without_a_checkpoint_starts_anew(command, tmp_path, capsys):
    results = finetune.main([*command, "--resume-from-checkpoint", "latest"])
    assert "starting anew" in capsys.readouterr().out
    assert results["trained"]["macro"] is not None


def test_the_best_epoch_is_kept():
    model = torch.nn.Linear(1, 1, bias=False)
    progress = TrainingProgress()
    for epoch, score in enumerate([10.0, 30.0, 30.0, 20.0]):
        model.weight.data.fill_(epoch)
        progress.epoch = epoch
        progress.record({"macro": score}, model)
    assert (
        progress.best_epoch == 2
    )  # of two equals, the one that was trained for longer
    assert progress.best_weights["weight"].item() == 2

    restored = TrainingProgress()
    restored.load_state_dict(progress.state_dict())
    assert (
        restored.validation[2] == {"macro": 30.0, "epoch": 2}
        and restored.best_weights["weight"].item() == 2
    )


def test_two_processes_agree_with_one(command, tmp_path):
    command = [*command, "--augmentation", "none", "--lr", "0.001", "--epochs", "3"]
    one = finetune.main(
        [*command, "--batch-size", "8", "--output-dir", str(tmp_path / "one")]
    )
    # On a CPU `accelerate launch` starts several processes through MPI only; torchrun needs nothing.
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
    ]
    launched = [*launch, str(EXAMPLES / "finetune.py"), *command, "--batch-size", "4"]
    done = subprocess.run(launched, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        done.stdout.count("Zero-shot:")
        == done.stdout.count("epoch 1 of 3: validation")
        == 1
    )
    two = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert two["zero_shot"] == one["zero_shot"]
    assert two["trained"] == one["trained"]
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("one", "out")
    )
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], atol=1e-4, rtol=1e-3, msg=name
        )


def test_a_run_goes_on_with_another_number_of_processes(command, tmp_path, monkeypatch):
    command = [
        *command,
        "--augmentation",
        "none",
        "--lr",
        "0.001",
        "--epochs",
        "4",
        "--method",
        "head",
    ]
    whole = finetune.main(
        [*command, "--batch-size", "8", "--output-dir", str(tmp_path / "whole")]
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    record = TrainingProgress.record

    def interrupted(self, *args):
        if self.epoch == 3:
            raise KeyboardInterrupt
        record(self, *args)

    monkeypatch.setattr(TrainingProgress, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.main([*command, "--batch-size", "8"])
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
    ]
    launched = [*launch, str(EXAMPLES / "finetune.py"), *command, "--batch-size", "4"]
    done = subprocess.run(
        [*launched, "--resume-from-checkpoint", "latest"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Going on from" in done.stdout
    resumed = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [entry["epoch"] for entry in resumed["validation"]] == [1, 2, 3, 4]
    assert resumed["trained"] == whole["trained"]
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("whole", "out")
    )
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], atol=1e-4, rtol=1e-3, msg=name
        )


def test_tracking_bf16_imbalance_and_push(command, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        finetune, "create_repo", lambda repo, exist_ok: pushed.append(repo)
    )
    monkeypatch.setattr(
        finetune,
        "upload_folder",
        lambda repo_id, folder_path, ignore_patterns: pushed.append(repo_id),
    )
    flags = "--mixed-precision bf16 --with-tracking --imbalance-ratio 5 --push-to-hub --hub-model-id me/mine"
    results = finetune.main([*command, *flags.split()])
    assert results["class_counts"] == [
        11,
        6,
        3,
        2,
    ]  # int(11 * 0.2 ** (i / 3)) but no more than there are
    assert list((tmp_path / "out" / "logs").glob("events*"))
    assert pushed == ["me/mine", "me/mine"]


def test_images_that_are_not_cached_give_the_same_result(command, tmp_path):
    cached = finetune.main(command)
    uncached = finetune.main([*command, "--cache-gib", "0", "--num-workers", "0"])
    assert (
        cached["trained"] == uncached["trained"]
        and cached["zero_shot"] == uncached["zero_shot"]
    )


def test_the_command_line_wins_over_yaml(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "lr: 1e-3\nbatch-size: 7\nmethod: lora\nmixed_precision: no\nwith_tracking: true\nseed: null\n"
    )
    args = finetune.parse_args(
        ["--config", str(config), "--method", "head", "--no-with-tracking"]
    )
    assert (args.lr, args.batch_size, args.mixed_precision) == (0.001, 7, "no")
    assert args.method == "head" and args.with_tracking is False
    assert args.seed == 0
    assert finetune.parse_args(["--config", str(config)]).with_tracking is True


def test_a_wrong_flag_is_refused_before_anything_slow_is_imported(tmp_path):
    code = "import sys, flags; flags.parse_args([]); assert not {'torch', 'numpy', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, check=True)
    script = [
        sys.executable,
        str(EXAMPLES / "finetune.py"),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    refused = subprocess.run([*script, "--lr", "0"], capture_output=True, text=True)
    assert (
        refused.returncode == 2
        and "greater than 0, got 0.0" in refused.stderr
        and not refused.stdout
    )


def test_the_first_line_says_what_comes_in_one_process_of_several(monkeypatch, capsys):
    args = finetune.parse_args(
        ["--model", "user/clip", "--dataset", "/a/photos/", "--method", "lora"]
    )
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        finetune.announce(args)
    printed = capsys.readouterr().out
    assert (
        printed.count("Fine-tuning clip on photos (--method lora), into finetuned/")
        == 1
    )


def test_the_frozen_tower_sees_batches(command, monkeypatch):
    seen = []
    embed = SageClassifier.embed
    monkeypatch.setattr(
        SageClassifier,
        "embed",
        lambda self, batches: embed(
            self, (seen.append(len(b["pixel_values"])) or b for b in batches)
        ),
    )
    finetune.main([*command, "--epochs", "1"])
    assert seen == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key 'learning_rate'"),
        ("lr: fast", "invalid float value: 'fast'"),
        ("method: magic", "invalid choice: 'magic'"),
        ("with_tracking: maybe", "must be true or false, got 'maybe'"),
        ("- lr", "must map flags to values"),
        ("epochs: 0", "`--epochs` must be a number, at least 1, got 0"),
        ("lr: 0", "`--lr` must be a number greater than 0, got 0.0"),
        ("text_prior: -1", "`--text-prior` must be a number, at least 0, got -1"),
        ("text_prior: much", "invalid strength value: 'much'"),
        ("guidance_rows: -1", "`--guidance-rows` must be a number, at least 0, got -1"),
        ("push_to_hub: true", "needs `--hub-model-id`"),
    ],
)
def test_bad_settings_are_refused(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit):
        finetune.parse_args(["--config", str(tmp_path / "run.yaml")])
    assert message in capsys.readouterr().err


def test_bad_input_is_refused_before_training(command, image_folder, tmp_path):
    incomplete = tmp_path / "descriptions.json"
    incomplete.write_text(json.dumps({"red": "a red thing", "blue": ["a blue thing"]}))
    _draw(
        tmp_path / "no_test" / "train", {"red": 1, "blue": 1}, np.random.default_rng(0)
    )
    cases = [
        (
            ["--image-column", "picture"],
            r"no column 'picture', only \['image', 'label'\].*`--image-column`",
        ),
        (["--label-column", "species"], r"no column 'species'"),
        (["--test-split", "evaluation"], r"no split 'evaluation', only"),
        (["--test-split", "train"], r"Three different splits"),
        (
            ["--descriptions", str(incomplete)],
            r"no entry for the classes \['green', 'grey'\]",
        ),
        (["--descriptions", str(tmp_path / "absent.json")], "cannot be read"),
        (["--dataset", "./nowhere"], "'./nowhere' is not a folder"),
        (["--dataset", str(tmp_path / "no_test")], "no split 'test'"),
        (["--imbalance-ratio", "0.1"], "`imbalance_ratio` must be at least 1"),
    ]
    for flags, message in cases:
        with pytest.raises(ValueError, match=message):
            finetune.main([*command, *flags])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(("ratio", "images"), [(10, 19573), (50, 12608), (100, 10847)])
def test_imbalance_gives_the_published_sizes_of_cifar_100_lt(ratio, images):
    labels = np.tile(np.arange(100), 500)
    kept = image_data.long_tailed_subset(labels, 100, ratio, seed=0)
    counts = np.bincount(labels[kept], minlength=100)
    assert len(kept) == images == len(set(kept))
    assert (
        counts[0] == 500
        and abs(counts[-1] - 500 / ratio) <= 1
        and (np.diff(counts) <= 0).all()
    )
    np.testing.assert_array_equal(
        kept, image_data.long_tailed_subset(labels, 100, ratio, seed=0)
    )
    assert not np.array_equal(
        kept, image_data.long_tailed_subset(labels, 100, ratio, seed=1)
    )


def test_the_subset_of_cifar_100_lt_is_the_published_one():
    """Class by class, in order, NumPy's global generator shuffles the images and the first ones stay."""
    labels = np.random.default_rng(0).permutation(np.tile(np.arange(10), 30))
    np.random.seed(0)
    expected = []
    for label in range(10):
        own = np.where(labels == label)[0]
        np.random.shuffle(own)
        expected.extend(own[: int(30 * 0.1 ** (label / 9))])
    assert image_data.long_tailed_subset(labels, 10, 10, seed=0).tolist() == sorted(
        expected
    )


def test_random_crops_of_the_original_image(clip_folder):
    processor = AutoImageProcessor.from_pretrained(clip_folder)
    ramp = Image.fromarray(
        np.linspace(0, 255, 100)
        .round()
        .astype(np.uint8)[None, :, None]
        .repeat(40, 0)
        .repeat(3, 2)
    )
    view = image_data.RandomCropView(processor, scale=0.1, seed=0)
    state = torch.get_rng_state()
    crops = torch.stack([view(ramp, index) for index in range(50)]).float()
    assert torch.equal(torch.get_rng_state(), state)
    assert crops.shape == (50, 3, 16, 16)
    left, right = crops[:, 0, :, 0].mean(1), crops[:, 0, :, -1].mean(1)
    # A crop of the share s of 100 x 40 pixels and aspect a is sqrt(4000 s a) wide: 17 to 73 of the ramp's pixels.
    width = (right - left) / 2.55 * 16 / 15
    assert (width > 15).all() and (width < 75).all() and width.std() > 5
    assert left.min() < 40 and right.max() > 215  # from one end to the other
    assert torch.equal(view(ramp, 3), crops[3].byte())
    view.epoch = 1
    assert not torch.equal(view(ramp, 3), crops[3].byte())
    whole = image_data.RandomCropView(processor, scale=1.0, seed=0)(
        Image.new("RGB", (30, 30), (9, 8, 7)), 0
    )
    assert (whole == torch.tensor([9, 8, 7])[:, None, None]).all()


def test_five_crops_are_the_centre_and_the_corners_of_the_enlarged_image(clip_folder):
    processor = AutoImageProcessor.from_pretrained(clip_folder)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, size=(40, 60, 3), dtype=np.uint8))
    crops = image_data.FiveCropView(processor)(image, 0)
    assert crops.shape == (5, 3, 16, 16) and crops.dtype == torch.uint8
    enlarged = np.array(image.resize((27, 18), Image.BICUBIC))
    for crop, (top, left) in zip(
        crops, [(1, 5), (0, 0), (0, 11), (2, 0), (2, 11)], strict=True
    ):
        np.testing.assert_array_equal(
            crop.permute(1, 2, 0), enlarged[top : top + 16, left : left + 16]
        )


def test_logits_of_several_crops_are_averaged(clip_folder, image_folder, command):
    args = finetune.parse_args([*command, "--test-crops", "5"])
    processor = AutoImageProcessor.from_pretrained(clip_folder)
    data = image_data.load_images(str(image_folder))
    splits, accelerator = data.splits, finetune.Accelerator()
    loaders = finetune.make_loaders(args, accelerator, data, processor)
    transform = image_data.PixelTransform(processor, "none", 1.0)

    class Head(torch.nn.Module):
        """Logits that differ between crops, and whose mean is not what any single crop says."""

        def forward(self, pixel_values):
            return SimpleNamespace(logits=pixel_values[:, :, 0, :4].abs().sum(dim=1))

    _, predictions, confidence = finetune.evaluate(
        accelerator, Head(), loaders["test"], transform, np.array([1, 1, 1, 1])
    )
    view = image_data.FiveCropView(processor)
    images = [view(splits["test"].read(i), 0) for i in range(len(splits["test"]))]
    logits = [Head()(transform.eval()(crops)).logits for crops in images]
    mean = torch.stack([row.mean(dim=0) for row in logits])
    expected = mean.argmax(dim=-1)
    assert torch.equal(predictions, expected)
    torch.testing.assert_close(confidence, mean.softmax(dim=-1).amax(dim=-1))
    assert not torch.equal(
        expected, torch.stack([row[0] for row in logits]).argmax(dim=-1)
    )
    assert loaders["validation"].dataset[0]["pixel_values"].shape == (3, 16, 16)


def test_random_crops_do_not_depend_on_workers_and_change_every_epoch(
    command, monkeypatch
):
    command = [*command, "--augmentation", "resized-crop-flip", "--crop-scale", "0.08"]
    alone = finetune.main([*command, "--num-workers", "0"])
    AcceleratorState._reset_state(reset_partial_state=True)
    with_workers = finetune.main([*command, "--num-workers", "1", "--cache-gib", "0"])
    assert (
        alone["validation"] == with_workers["validation"]
        and alone["trained"] == with_workers["trained"]
    )

    epochs = []
    crop = image_data.RandomCropView.__call__
    monkeypatch.setattr(
        image_data.RandomCropView,
        "__call__",
        lambda self, *image: (epochs.append(self.epoch), crop(self, *image))[1],
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune.main([*command, "--num-workers", "0", "--method", "head"])
    assert (
        set(epochs[:20]) == {0}
        and set(epochs[-20:]) == {1}
        and epochs == sorted(epochs)
    )


def test_sgd_with_momentum_is_the_textbooks():
    args = finetune.parse_args(
        [
            "--optimizer",
            "sgd",
            "--lr",
            "0.1",
            "--momentum",
            "0.5",
            "--weight-decay",
            "0.2",
        ]
    )
    model = torch.nn.Linear(1, 1, bias=False)
    weight = model.weight
    torch.nn.init.constant_(weight, 2.0)
    optimizer = finetune.make_optimizer(args, model)
    expected, velocity = 2.0, 0.0
    for gradient in (1.0, -3.0, 0.5):
        weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        velocity = 0.5 * velocity + gradient + 0.2 * expected
        expected -= 0.1 * velocity
    assert weight.item() == pytest.approx(expected)
    assert isinstance(
        finetune.make_optimizer(finetune.parse_args([]), model), torch.optim.AdamW
    )


@pytest.mark.parametrize("decay", ["step", "epoch"])
def test_the_learning_rate_falls_as_a_cosine(command, monkeypatch, decay):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *_: (rates.append(self.param_groups[0]["lr"]), step(self)),
    )
    finetune.main(
        [
            *command,
            *f"--method head --optimizer sgd --epochs 4 --head-lr 0.1 --lr-decay {decay}".split(),
        ]
    )
    done = np.arange(20) // 5 / 4 if decay == "epoch" else np.arange(20) / 20
    np.testing.assert_allclose(rates, 0.05 * (1 + np.cos(np.pi * done)))


def test_pixels_are_those_of_the_models_own_processor(clip_folder, image_folder):
    processor = AutoImageProcessor.from_pretrained(clip_folder)
    splits = image_data.load_images(str(image_folder)).splits
    split = splits["test"]
    pixels = image_data.PixelDataset(split, image_data.ProcessorView(processor))
    transform = image_data.PixelTransform(processor, "crop-flip", crop_scale=0.5)
    batch = torch.stack([pixels[i]["pixel_values"] for i in range(len(split))])
    expected = processor(
        images=[split.read(i) for i in range(len(split))], return_tensors="pt"
    )["pixel_values"]
    torch.testing.assert_close(transform.eval()(batch), expected, atol=1e-5, rtol=0)

    transform.train()
    finetune.seed_batch(0, 1, 2, 0)
    first = transform(batch)
    torch.rand(7)
    finetune.seed_batch(0, 1, 2, 0)
    assert torch.equal(first, transform(batch))
    finetune.seed_batch(0, 1, 3, 0)
    assert not torch.equal(first, transform(batch))
    assert not torch.equal(first, expected)


def test_a_model_that_takes_patches_is_refused():
    with pytest.raises(
        ValueError,
        match="`--model` must take images as pixels, its Siglip2ImageProcessorPil cuts",
    ):
        image_data.ProcessorView(
            Siglip2ImageProcessorPil(patch_size=8, max_num_patches=4)
        )


def test_images_that_cannot_be_read_are_named_or_skipped(
    command, image_folder, tmp_path
):
    broken = tmp_path / "broken"
    _draw(broken / "train", TRAIN_COUNTS, np.random.default_rng(0))
    _draw(broken / "test", dict.fromkeys(COLOURS, 1), np.random.default_rng(1))
    (broken / "train" / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"red/0.png', split 'train' cannot be read"):
        finetune.main([*command, "--dataset", str(broken)])
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune.main(
        [*command, "--dataset", str(broken), "--on-bad-image", "skip", "--epochs", "1"]
    )
    data = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    assert data["splits"]["train"]["images_per_class"] == {**TRAIN_COUNTS, "red": 1}
    assert "red/0.png" in data["skipped"]["train"]["unreadable"][0]


def test_a_cpu_process_uses_all_cores_unless_told_otherwise(command, monkeypatch):
    monkeypatch.setattr(finetune, "available_cores", lambda: 2)
    before = torch.get_num_threads()
    try:
        finetune.main([*command, "--epochs", "1"])
        assert torch.get_num_threads() == 1  # `--cpu-threads 1`
        AcceleratorState._reset_state(reset_partial_state=True)
        finetune.main([*command[:6], "--method", "head", "--epochs", "1"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
