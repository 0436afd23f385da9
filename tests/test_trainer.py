# SPDX-License-Identifier: Apache-2.0
"""SageTrainer in one process, on a tiny CLIP and generated pictures. `test_finetune` runs it in two processes."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, Value
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    Siglip2ImageProcessorPil,
    TrainerCallback,
)

from peft_sage import (
    ImageCollator,
    SageClassifier,
    SageConfig,
    SageLoss,
    SageTrainer,
    SageTrainingArguments,
)
from peft_sage.adapter_scale import TOLERANCE
from peft_sage.run_files import check_saved_model, is_complete, latest_checkpoint
from tests.conftest import tiny_clip
from tests.test_classifier import naflex


NAMES = ["blue", "green", "red"]
COUNTS = [12, 6, 3]
COLOURS = [(30, 40, 220), (40, 200, 60), (220, 30, 40)]
TEXTS = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
LORA = LoraConfig(r=4, target_modules=["q_proj"], exclude_modules=".*text_model.*")


def pictures(counts, seed=0, groups=False):
    """Noisy colours, one per class, as a data set of `datasets`."""
    rng = np.random.default_rng(seed)
    labels = [k for k, count in enumerate(counts) for _ in range(count)]
    images = [
        PILImage.fromarray(
            np.clip(rng.normal(COLOURS[k], 30, (20, 16, 3)), 0, 255).astype(np.uint8)
        )
        for k in labels
    ]
    columns = {"image": images, "label": labels, "file": [f"{n}.png" for n in labels]}
    features = {
        "image": Image(),
        "label": ClassLabel(names=NAMES),
        "file": Value("string"),
    }
    if groups:
        columns["group"] = labels
        features["group"] = Value("int64")
    return Dataset.from_dict(columns, features=Features(features))


TRAIN = pictures(COUNTS)
VALIDATION = pictures([3, 3, 3], seed=1)


def tensors(dataset):
    """The same images as dictionaries of pixel values."""
    collator = ImageCollator(processor())
    return [
        {"pixel_values": collator([row])["pixel_values"][0], "labels": row["label"]}
        for row in dataset
    ]


def processor():
    return CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )


def classifier():
    return SageClassifier(tiny_clip(), TEXTS, NAMES, image_processor=processor())


def sage(**kwargs):
    config = SageConfig(guidance=torch.ones(3, 24).triu(), r=8, dropout=0.1, **kwargs)
    torch.manual_seed(0)
    return get_peft_model(classifier(), config)


def arguments(folder, **kwargs):
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 4}
    settings = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01}
    return SageTrainingArguments(str(folder), **{**defaults, **settings, **kwargs})


def trained(trainer):
    parameters = trainer.model.named_parameters()
    return {n: p.detach().clone() for n, p in parameters if p.requires_grad}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (SageConfig(guidance=TEXTS, r=8), "peft_sage_"),
        (SageConfig(guidance_rows=0, r=8), "peft_sage_"),
        (LORA, "lora_"),
        (None, None),
    ],
    ids=["sage", "adaptformer", "lora", "head"],
)
def test_it_learns_saves_and_comes_back(config, kind, tmp_path):
    model = classifier()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = arguments(tmp_path, num_train_epochs=12, learning_rate=0.02)
    trainer = SageTrainer(model, args, TRAIN, VALIDATION, peft_config=config)
    zero_shot = trainer.evaluate(VALIDATION)["eval_macro"]
    trainer.train()
    scores = trainer.evaluate(VALIDATION)
    assert scores["eval_macro"] > max(0.8, zero_shot)
    best = max(e.get("eval_macro", 0) for e in trainer.state.log_history)
    assert scores["eval_macro"] >= best - TOLERANCE
    assert trainer.classifier is model and trainer.class_counts == COUNTS
    for name, parameter in trainer.classifier.model.named_parameters():
        original = before.get(f"model.{name.replace('base_layer.', '')}")
        if original is not None:
            assert torch.equal(parameter, original)

    trainer.save_model(str(tmp_path / "saved"))
    names = [*load_file(tmp_path / "saved" / "adapter_model.safetensors")]
    others = [name for name in names if "class_head" not in name]
    assert all(kind in name for name in others) if kind else not others
    loaded = SageClassifier.from_pretrained(tmp_path / "saved", tiny_clip())
    images = list(VALIDATION["image"])
    assert loaded.class_names == NAMES
    assert loaded.predict(images) == trainer.classifier.predict(images)


@pytest.mark.parametrize(("gain", "kept"), [(-0.01, 1.0), (-0.003, 0.5), (0.1, 0.5)])
def test_the_adapters_are_halved_unless_validation_images_lose(gain, kept, tmp_path):
    """Only the half is evaluated: the score of the whole is the kept epoch's."""
    trainer = SageTrainer(sage(), arguments(tmp_path), TRAIN, VALIDATION)
    pixels = torch.stack([row["pixel_values"] for row in tensors(VALIDATION)])
    halved = []

    def answers(model):
        with torch.no_grad():
            return model(pixel_values=pixels).logits

    def evaluate(dataset):
        halved.append(answers(trainer.model))
        return SimpleNamespace(metrics={"test_macro": trainer.state.best_metric + gain})

    trainer.predict = evaluate
    trainer.train()
    best = trainer.state.best_metric
    scores = {1.0: best, 0.5: best + gain}
    assert (trainer.adapter_scale.scale, trainer.adapter_scale.scores) == (kept, scores)
    if kept == 1:
        assert trainer.evaluate()["eval_macro"] == best
    checkpoint = trainer.state.best_model_checkpoint
    trainer.save_model(str(tmp_path / "saved"))
    whole, saved = (
        answers(SageClassifier.from_pretrained(folder, tiny_clip()))
        for folder in (checkpoint, tmp_path / "saved")
    )
    assert len(halved) == 1 and (halved[0] - whole).abs().max() > 1e-4
    torch.testing.assert_close(saved, whole if kept == 1 else halved[0])


def test_what_was_saved_is_compared_by_its_scores(tmp_path, capsys):
    """Classes that are alike may change places; another model is refused."""
    alike = TEXTS[[0, 0, 1]]
    model = SageClassifier(tiny_clip(), alike, NAMES, image_processor=processor())
    model.name_or_path = str(tmp_path / "clip")
    model.model.save_pretrained(model.name_or_path)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        model.head.weight[0] += 1e-6 * TEXTS[2]
    check_saved_model(model, tmp_path / "saved", VALIDATION)
    assert "predicts the same for 9 test images" in capsys.readouterr().out
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.roll(1, dims=0))
    with pytest.raises(RuntimeError, match="sees image 0 differently"):
        check_saved_model(model, tmp_path / "saved", VALIDATION)


def test_without_validation_images_the_adapters_are_kept(tmp_path):
    settings = [{}, {"load_best_model_at_end": False}, {"choose_adapter_scale": False}]
    for number, setting in enumerate(settings):
        args = arguments(tmp_path / str(number), num_train_epochs=1, **setting)
        trainer = SageTrainer(sage(), args, TRAIN, VALIDATION if setting else None)
        trainer.train()
        assert trainer.adapter_scale is None


def test_the_text_terms_are_chosen_by_the_data(tmp_path):
    trainer = SageTrainer(sage(), arguments(tmp_path, num_train_epochs=1), TRAIN)
    assert trainer.text_prior is None and trainer.loss.text_prior == 0
    trainer.train()
    strength = trainer.text_prior.strength
    assert trainer.loss.text_prior == strength
    assert trainer.loss.text_guidance == pytest.approx(0.4 * strength)
    expected = trainer.classifier.embed(list(TRAIN["image"]))
    torch.testing.assert_close(trainer.base_image_embeds, expected, atol=1e-4, rtol=0)

    head = SageTrainer(classifier(), arguments(tmp_path, num_train_epochs=1), TRAIN)
    head.train()
    assert head.loss.text_guidance == 0 and head.text_prior.strength == strength
    given = {"text_prior": 2, "text_guidance": 0.5, "num_train_epochs": 1}
    trainer = SageTrainer(sage(), arguments(tmp_path, **given), TRAIN)
    trainer.train()
    assert trainer.text_prior is None
    assert (trainer.loss.text_prior, trainer.loss.text_guidance) == (2, 0.5)
    # Of one group per class nothing can be held out.
    grouped = SageTrainer(sage(), arguments(tmp_path), pictures(COUNTS, groups=True))
    with pytest.raises(ValueError, match="two images"):
        grouped.train()


@pytest.mark.parametrize("given", [{}, {"text_prior": 2}], ids=["auto", "given"])
def test_absent_classes_are_classes(given, tmp_path):
    args = arguments(tmp_path, num_train_epochs=1, **given)
    trainer = SageTrainer(sage(), args, pictures([12, 0, 3]))
    trainer.train()
    assert trainer.class_counts == [12, 0, 3]
    assert len(trainer.text_prior.scores) == (1 if given else 6)
    assert trainer.loss.text_prior == given.get(
        "text_prior", trainer.text_prior.strength
    )
    assert trainer.loss.absent == trainer.text_prior.absent
    assert "eval_none" in trainer.evaluate(VALIDATION)


def test_guidance_gets_the_embeddings_of_its_own_images(tmp_path):
    args = arguments(tmp_path, text_guidance=1.0, num_train_epochs=1)
    trainer = SageTrainer(sage(), args, TRAIN)
    trainer.train()
    embeds = trainer.base_image_embeds
    seen = []
    plain = trainer.classifier.embed(list(TRAIN["image"]))
    for batch in trainer.get_train_dataloader():
        seen.append(batch["base_image_embeds"])
        for row, label in zip(seen[-1], batch["labels"], strict=True):
            index = (embeds - row).abs().sum(dim=1).argmin()
            assert TRAIN[int(index)]["label"] == label
    assert len(torch.cat(seen)) == 20 and plain.shape == embeds.shape


def test_a_plain_module_gets_the_loss_and_the_groups(tmp_path):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 * 16 * 16, 3)

        def forward(self, pixel_values):
            return self.layer(pixel_values.flatten(1))

    args = arguments(tmp_path, num_train_epochs=4, learning_rate=0.001)
    trainer = SageTrainer(Linear(), args, tensors(TRAIN), tensors(VALIDATION))
    trainer.train()
    scores = trainer.evaluate()
    assert scores["eval_few"] == scores["eval_macro"] > 0.5
    assert isinstance(trainer.loss, SageLoss) and trainer.classifier is None


def cross_entropy(outputs, labels, num_items_in_batch=None):
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(outputs["logits"], labels, reduction=reduction)
    return loss / (1 if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize(
    "loss", [SageLoss(COUNTS, compensation=0), cross_entropy, None]
)
@pytest.mark.parametrize("as_tensors", [True, False])
def test_accumulation_equals_the_whole_batch(loss, as_tensors, tmp_path):
    """The compensation is left out, which each micro-batch measures for itself."""
    ends = []
    data = pictures([9, 6, 3])
    data = tensors(data) if as_tensors else data
    for size, steps in ((6, 1), (3, 2)):
        own = {"text_prior": 1.0, "compensation": 0.0} if loss is None else {}
        args = arguments(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            augment="none",
            optim="sgd",
            **own,
        )
        model = get_peft_model(classifier(), SageConfig(guidance=TEXTS, r=8))
        trainer = SageTrainer(model, args, data, compute_loss_func=loss)
        trainer.train()
        ends.append((trained(trainer), trainer.state.log_history[-1]["train_loss"]))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-5)


class Interrupt(TrainerCallback):
    """Stop as a kill does, at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_within_an_epoch_it_ends_where_an_undisturbed_run_does(
    accumulation, tmp_path
):
    settings = {
        "gradient_accumulation_steps": accumulation,
        "checkpointing_steps": 2,
        "dataloader_num_workers": 0,
        "per_device_train_batch_size": 2,
    }
    whole = SageTrainer(
        sage(), arguments(tmp_path / "a", **settings), TRAIN, VALIDATION
    )
    whole.train()
    args = arguments(tmp_path / "b", **settings)
    stopped = SageTrainer(sage(), args, TRAIN, VALIDATION, callbacks=[Interrupt(9)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    half = tmp_path / "b" / "checkpoint-99"
    shutil.copytree(tmp_path / "b" / "checkpoint-8", half)
    (half / "trainer_state.json").write_text('{"epoch": 1.')
    assert not is_complete(half)
    assert latest_checkpoint(tmp_path / "b").name == "checkpoint-8"

    torch.rand(7)
    resumed = SageTrainer(sage(), args, TRAIN, VALIDATION)
    resumed.train(resume_from_checkpoint="latest")
    torch.testing.assert_close(trained(resumed), trained(whole), atol=0, rtol=0)
    assert resumed.text_prior.strength == whole.text_prior.strength
    history = [
        [e["eval_macro"] for e in t.state.log_history if "eval_macro" in e]
        for t in (whole, resumed)
    ]
    assert history[0] == history[1] and len(history[0]) == 2
    torch.testing.assert_close(resumed.loss.state_dict(), whole.loss.state_dict())


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    args = arguments(tmp_path, num_train_epochs=1)
    SageTrainer(sage(), args, TRAIN).train()
    other = [
        (
            sage(),
            arguments(tmp_path, num_train_epochs=1, tau=2.0),
            TRAIN,
            "tau: 1.0 -> 2.0",
        ),
        (sage(), args, pictures([12, 6, 2]), "data: "),
        (sage(num_heads=2), args, TRAIN, r"default.num_heads: 1 -> 2"),
    ]
    for model, changed, data, message in other:
        with pytest.raises(ValueError, match=f"other settings: {message}"):
            SageTrainer(model, changed, data).train(resume_from_checkpoint=True)
    again = SageTrainer(sage(), arguments(tmp_path / "new"), TRAIN)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        again.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        again.train(resume_from_checkpoint=str(tmp_path / "new"))
    assert again.train(resume_from_checkpoint="latest").global_step == 10


def test_a_full_disk_leaves_earlier_checkpoints_alone(tmp_path, monkeypatch):
    trainer = SageTrainer(sage(), arguments(tmp_path), TRAIN)
    save = torch.save

    def full(thing, path, *args, **kwargs):
        if "checkpoint-10/optimizer" in str(path):
            raise RuntimeError("No space left on device")
        save(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-10.*No space left.*Earlier ones are"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-5"


@pytest.mark.parametrize("epochs", [None, 40])
def test_few_images_get_more_epochs_and_small_batches(tmp_path, epochs):
    """And ten evaluations, whether the epochs are given or follow from the steps."""
    args = arguments(
        tmp_path,
        num_train_epochs=epochs,
        min_steps=None if epochs else 40,
        per_device_train_batch_size=128,
        save_strategy="no",
    )
    trainer = SageTrainer(sage(), args, TRAIN, VALIDATION)
    trainer.train()
    assert (
        trainer.args.per_device_train_batch_size == 21 and args.train_batch_size == 128
    )
    assert trainer.state.global_step == trainer.state.num_train_epochs == 40
    evaluated = [e["epoch"] for e in trainer.state.log_history if "eval_macro" in e]
    assert evaluated == [4 * n for n in range(1, 11)]
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates == [0.01, 0.025]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_of_equal_epochs_the_last_is_kept(tmp_path):
    scores = iter([0.1, 0.3, 0.3, 0.2])
    trainer = SageTrainer(
        sage(),
        arguments(tmp_path, num_train_epochs=4, choose_adapter_scale=False),
        TRAIN,
        VALIDATION,
        compute_metrics=lambda _: {"macro": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_global_step == 15 and trainer.state.best_metric == 0.3


def test_trackers_and_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    args = arguments(tmp_path, report_to=["tensorboard"], bf16=True, test_crops=5)
    trainer = SageTrainer(sage(), args, TRAIN, VALIDATION)
    trainer.train()
    assert [*tmp_path.glob("logs/**/events*")]
    assert all(p.dtype == torch.float32 for p in trained(trainer).values())
    # Five crops of test images, averaged in float32, and one of validation images.
    one = trainer.get_eval_dataloader(VALIDATION).dataset.__getitems__([0])
    assert one["pixels"].shape == (1, 3, 16, 16)
    test = pictures([3, 3, 3], seed=1)
    five = torch.as_tensor(trainer.predict(test).predictions)
    batch = trainer.get_test_dataloader(test).dataset.__getitems__([0])
    pixels = ImageCollator(processor()).finish(batch["pixels"][0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = trainer.model(pixel_values=pixels).logits.float()
    assert batch["pixels"].shape == (1, 5, 3, 16, 16) and five.dtype == torch.float32
    torch.testing.assert_close(five[0], logits.mean(dim=0), atol=0.2, rtol=0)


def test_a_loss_of_ones_own_may_take_any_labels(tmp_path):
    soft = [{**row, "labels": [0.2, 0.3, 0.5]} for row in tensors(TRAIN)]
    args = arguments(tmp_path, max_steps=2)
    trainer = SageTrainer(sage(), args, soft, compute_loss_func=cross_entropy)
    assert trainer.train().global_step == 2
    assert len(SageTrainer(sage(), args).predict(VALIDATION).predictions) == 9


def test_what_is_given_wins(tmp_path):
    class Collator:
        def __call__(self, items):
            batch = ImageCollator(processor())(items)
            return {**batch, "labels": batch["labels"]}

    model = sage()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    loss = SageLoss(COUNTS, tau=0.5)
    trainer = SageTrainer(
        model,
        arguments(tmp_path, num_train_epochs=1),
        TRAIN,
        VALIDATION,
        data_collator=Collator(),
        compute_loss_func=loss,
        compute_metrics=lambda p: {"macro": 0.5},
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert trainer.loss is loss and trainer.text_prior is None
    assert trainer.optimizer.optimizer is optimizer
    assert trainer.evaluate()["eval_macro"] == 0.5


def test_what_is_pushed_shows_no_images_and_no_paths(tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl("me/birds"))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, **kwargs: pushed.update(kwargs)
    )
    args = arguments(tmp_path, num_train_epochs=1, hub_model_id="me/birds")
    trainer = SageTrainer(sage(), args, TRAIN)
    trainer.train()
    for name in ("report.html", "arguments.json", "README.md"):
        (tmp_path / name).write_text("a card")
    trainer.push_to_hub()
    files = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    sent = {*filter_repo_objects(files, allow_patterns=pushed["allow_patterns"])}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert sent == {*weights, "README.md", "preprocessor_config.json"}
    assert pushed["repo_id"] == "me/birds"
    assert (tmp_path / "README.md").read_text() == "a card"


class DropsLabels:
    def __call__(self, items):
        return {"pixel_values": torch.zeros(len(items), 3, 16, 16)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"eval_dataset": VALIDATION.remove_columns("label")},
            ValueError,
            "`eval_dataset` must have a column 'label'",
        ),
        (
            {"train_dataset": [{"pixel_values": 0, "labels": 3}]},
            ValueError,
            r"`labels` of `train_dataset\[0\]` must be an integer, .* most 2, got 3",
        ),
        (
            {"train_dataset": TRAIN.select([])},
            ValueError,
            "`train_dataset` must have images",
        ),
        (
            {"data_collator": DropsLabels()},
            ValueError,
            "`data_collator` must return a dictionary with `labels`",
        ),
        (
            {"compute_loss_func": cross_entropy, "args": {"tau": 2.0}},
            ValueError,
            "`tau` is of the loss that",
        ),
        (
            {"peft_config": LORA},
            ValueError,
            "`peft_config` needs a `model` that PEFT has not",
        ),
        (
            {"model": nn.Linear(2, 2), "args": {"text_prior": 1.0}},
            ValueError,
            "`text_prior` needs a SageClassifier",
        ),
        (
            {"model": get_peft_model(classifier(), SageConfig()).get_base_model()},
            ValueError,
            "`model` has the adapters .*is_trainable=True",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(
    change, error, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(SageClassifier, "forward", None)
    change = {
        "model": sage(),
        "train_dataset": TRAIN,
        "eval_dataset": VALIDATION,
        **change,
    }
    change["args"] = arguments(tmp_path / "out", **change.get("args", {}))
    with pytest.raises(error, match=message):
        SageTrainer(**change)
    assert not (tmp_path / "out").exists()


def test_classes_in_another_order_are_refused():
    model = SageClassifier(
        tiny_clip(), TEXTS, ["red", "green", "blue"], image_processor=processor()
    )
    with pytest.raises(ValueError, match="class 'blue' at index 0, the model at 2"):
        SageTrainer(model, train_dataset=TRAIN)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text_prior", "much", "auto or a number"),
        ("absent", 0, "greater than 0"),
        ("learning_rate", 0, "greater than 0"),
        ("min_steps", 0.5, "an integer"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("crop_scale", 1.5, r"lie in \(0, 1\]"),
        ("patch_dropout", 1, r"lie in \[0, 1\)"),
        ("augment", "blur", "one of"),
        ("label_smoothing_factor", 0.1, "compute_loss_func"),
    ],
)
def test_bad_arguments_name_their_field(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}` .*{message}"):
        SageTrainingArguments("out", **{name: value})


def test_a_tower_of_patches_gets_their_mask_before_training_too(tmp_path):
    ready = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=4)
    model = SageClassifier(naflex(), torch.eye(3, 32), NAMES, image_processor=ready)
    args = arguments(tmp_path, augment="none", max_steps=1, patch_dropout=0.5)
    trainer = SageTrainer(get_peft_model(model, SageConfig(r=4)), args, TRAIN)
    trainer.train()
    assert trainer.patch_dropout == 0  # of several lengths none can be left out
    expected = model.embed(TRAIN)
    torch.testing.assert_close(trainer.base_image_embeds, expected)
