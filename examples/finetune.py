# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a CLIP-like model on long-tailed images with a semantic-guided adapter.

Without arguments it runs on the embedded demo, Emoji-LT with a small CLIP:

    accelerate launch examples/finetune.py

On your own images (`photos/train/CLASS/*.jpg`, `photos/test/CLASS/*.jpg`) with any CLIP or SigLIP:

    accelerate launch examples/finetune.py --model openai/clip-vit-base-patch16 --dataset photos --lr 0.001

It prints the zero-shot accuracy, trains, prints the accuracy on classes with many, medium and few training images,
saves adapter and head, and checks that a fresh model with the saved files predicts the same.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any


# Has to come before torch. Without it, threads that wait spin, and a busy machine becomes several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import broadcast_object_list, set_seed, tqdm
from checkpoints import (
    TrainingProgress,
    checkpoint_trainable_only,
    find_checkpoint,
    load_trainable_weights,
    save_checkpoint,
)
from huggingface_hub import create_repo, upload_folder
from image_data import (
    FiveCropView,
    LabelledImages,
    PixelDataset,
    PixelTransform,
    ProcessorView,
    RandomCropView,
    find_unreadable,
    load_images,
    long_tailed_subset,
)
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from report import write_report
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, BaseImageProcessor, PreTrainedModel

from peft_sage import (
    LongTailAccuracy,
    SageClassifier,
    SageConfig,
    SageLoss,
    encode_class_descriptions,
    read_class_descriptions,
)
from peft_sage.towers import find_blocks


DEMO = Path(__file__).parent / "emoji_lt"
#: LoRA goes into the attention of the vision tower; the text tower stays as it is for every method.
LORA_TARGETS, TEXT_TOWER = ["q_proj", "v_proj", "query", "value"], r".*text_model.*"
#: Flags that say how a run is carried out, not what comes out of it: they may differ when a run goes on.
HOW = {"config", "output_dir", "resume_from_checkpoint", "checkpointing_steps", "num_workers", "cpu_threads"}
HOW |= {"cache_gib", "with_tracking", "push_to_hub", "hub_model_id"}
SCORES = ("overall", "macro", "many", "medium", "few", "worst")


def load_clip(name: str) -> PreTrainedModel:
    """Load the base model in float32, whatever its file holds; `--mixed-precision` makes it compute in less."""
    return AutoModel.from_pretrained(name, dtype=torch.float32)


def peft_config(args: argparse.Namespace, model: nn.Module, texts: list[str] | dict[str, Any]) -> PeftConfig:
    """Say what is trained: always the head, and with it what `--method` names in the last blocks of the tower."""
    common: dict[str, Any] = {"r": args.r, "modules_to_save": ["class_head"]}
    if args.method == "head":
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, **common)
    if args.last_blocks:
        depth = len(find_blocks(model))
        common["layers_to_transform"] = list(range(max(0, depth - args.last_blocks), depth))
    if args.method == "lora":
        return LoraConfig(lora_alpha=args.r, target_modules=LORA_TARGETS, exclude_modules=TEXT_TOWER, **common)
    if args.method == "adaptformer":
        return SageConfig(**common)
    return SageConfig(class_descriptions=texts, guidance_rows=args.guidance_rows, **common)


def make_loss(args: argparse.Namespace, class_counts: np.ndarray) -> SageLoss:
    """Return cross-entropy, the logit-adjusted loss or the Sage loss, which are one formula."""
    tau = 0.0 if args.loss == "ce" else args.tau
    compensation = args.compensation if args.loss == "sage" else 0.0
    return SageLoss(class_counts.tolist(), tau=tau, compensation=compensation)


def make_optimizer(args: argparse.Namespace, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW, or SGD with momentum, over the parameters."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    return torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)


def cosine(done: float) -> float:
    """Return the factor of the learning rate after the share `done` of the training: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_loaders(
    args: argparse.Namespace,
    accelerator: Accelerator,
    splits: dict[str, LabelledImages],
    processor: BaseImageProcessor,
) -> dict[str, DataLoader]:
    """Return a prepared loader a split; a split that fits into memory is decoded once."""
    views = dict.fromkeys(splits, ProcessorView(processor))
    if args.augmentation == "resized-crop-flip":
        views["train"] = RandomCropView(processor, args.crop_scale, args.seed)
    if args.test_crops == 5:
        views["test"] = FiveCropView(processor)
    loaders = {}
    for name, split in splits.items():
        pixels = PixelDataset(split, views[name])
        pixels.cache_if_small(int(args.cache_gib * 2**30), progress=accelerator.is_local_main_process)
        full_batch = len(split) >= args.batch_size * accelerator.num_processes
        loaders[name] = DataLoader(
            pixels,
            batch_size=args.batch_size,
            shuffle=name == "train",
            drop_last=name == "train" and full_batch,
            num_workers=0 if pixels.pixels is not None else args.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    prepared = accelerator.prepare(*loaders.values())
    return dict(zip(loaders, prepared, strict=True))


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, transform: PixelTransform, class_counts: np.ndarray
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the accuracies in percent (`None` where there is no such class) and the predicted classes.

    Where the loader gives several crops of an image, (B, crops, 3, H, W), their logits are averaged.
    """
    model.eval()
    transform.eval()
    # The predictions of all processes are gathered here, so the metric must not add them up again.
    metric = LongTailAccuracy(class_counts.tolist(), sync_on_compute=False).to(accelerator.device)
    predictions = []
    for batch in loader:
        pixels = batch["pixel_values"]
        with accelerator.autocast():
            logits = model(pixel_values=transform(pixels.flatten(0, -4))).logits
        logits = logits.unflatten(0, (len(pixels), -1)).mean(dim=1)
        predicted, labels = accelerator.gather_for_metrics((logits.argmax(dim=-1), batch["labels"]))
        metric.update(predicted, labels)
        predictions.append(predicted.cpu())
    scores = {name: score.double().cpu() for name, score in metric.compute().items()}
    percent = {name: _percent(scores[name].item()) for name in SCORES}
    percent["per_class"] = [_percent(score) for score in scores["per_class"].tolist()]
    percent["num_classes"] = {name: int(scores[f"num_{name}"]) for name in ("many", "medium", "few")}
    return percent, torch.cat(predictions)


def _percent(fraction: float) -> float | None:
    return None if math.isnan(fraction) else 100 * fraction


def seed_batch(seed: int, epoch: int, batch: int, process: int) -> None:
    """Make augmentation and dropout depend on where the run is only, and not on how it got there."""
    set_seed(int(np.random.SeedSequence([seed, epoch, batch, process]).generate_state(1)[0]))


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    loaders: dict[str, DataLoader],
    transform: PixelTransform,
    class_counts: np.ndarray,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train, with a checkpoint after every epoch; end with the weights of the best epoch on the validation split."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(args, trainable)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Not prepared: it counts optimiser steps, however many processes and however large the gradient accumulation.
    steps_per_epoch = math.ceil(len(loaders["train"]) / args.gradient_accumulation_steps)
    total_steps = args.epochs * steps_per_epoch
    decay_every = steps_per_epoch if args.lr_decay == "epoch" else 1
    scheduler = LambdaLR(optimizer, lambda step: cosine(step // decay_every * decay_every / total_steps))
    loss_function = make_loss(args, class_counts).to(accelerator.device)
    progress = TrainingProgress()
    accelerator.register_for_checkpointing(scheduler, progress)
    checkpoint_trainable_only(accelerator)

    folder = Path(args.output_dir, "checkpoints")
    settings = result_settings(args) | {"processes": accelerator.num_processes}
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(args.resume_from_checkpoint, folder, settings)
        if checkpoint is not None:
            accelerator.load_state(str(checkpoint))
        accelerator.print(f"Going on from {checkpoint}" if checkpoint else "No checkpoint yet: starting anew")

    bar = tqdm(total=total_steps, initial=progress.step, desc="training", unit="step")
    while progress.epoch < args.epochs:
        model.train()
        transform.train()
        # The loader without the first batches is another one, which must be told the epoch itself.
        loader = skip_first_batches(loaders["train"], progress.batch)
        loader.set_epoch(progress.epoch)
        loader.dataset.set_epoch(progress.epoch)
        for batch in loader:
            seed_batch(args.seed, progress.epoch, progress.batch, accelerator.process_index)
            with accelerator.accumulate(model):
                logits = model(pixel_values=transform(batch["pixel_values"])).logits
                loss = loss_function(logits, batch["labels"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            progress.batch += 1
            if accelerator.sync_gradients:
                scheduler.step()
                progress.step += 1
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
                accelerator.log({"loss": loss.item(), "lr": scheduler.get_last_lr()[0]}, step=progress.step)
                if args.checkpointing_steps and progress.step % args.checkpointing_steps == 0:
                    save_checkpoint(accelerator, folder, progress.step, settings)
        if "validation" in loaders:
            scores, _ = evaluate(accelerator, model, loaders["validation"], transform, class_counts)
            progress.record({name: scores[name] for name in SCORES}, accelerator.unwrap_model(model))
            accelerator.log({"validation_macro": scores["macro"]}, step=progress.step)
            # tqdm writes in every process, even where the bar is hidden.
            if accelerator.is_main_process:
                bar.write(f"epoch {progress.epoch + 1}: validation macro accuracy {scores['macro']:.1f} %")
        progress.epoch += 1
        progress.batch = 0
        save_checkpoint(accelerator, folder, progress.step, settings)
    bar.close()
    kept_epoch = args.epochs
    if args.model_selection == "best" and progress.best_weights:
        load_trainable_weights(accelerator.unwrap_model(model), progress.best_weights)
        kept_epoch = progress.best_epoch + 1
        accelerator.print(f"Keeping epoch {kept_epoch}, the best on the validation split")
    return model, {"validation": progress.validation, "kept_epoch": kept_epoch}


def training_function(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole job and return what is written to `results.json`."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with="tensorboard" if args.with_tracking else None,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.device.type == "cpu":
        # `accelerate launch` leaves a CPU process one thread unless told otherwise.
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(args.cpu_threads or max(1, available_cores() // local_processes))
    set_seed(args.seed)

    data = load_images(
        args.dataset,
        args.image_column,
        args.label_column,
        args.train_split,
        args.validation_split,
        args.test_split,
        on_bad_image=args.on_bad_image,
        seed=args.seed,
        unreadable=lambda tables: check_once(accelerator, tables),
    )
    accelerator.print(data.summary())
    splits, class_names = data.splits, data.class_names
    if args.imbalance_ratio is not None:
        kept = long_tailed_subset(splits["train"].labels, len(class_names), args.imbalance_ratio, args.seed)
        splits["train"] = splits["train"].select(kept)
    class_counts = np.bincount(splits["train"].labels, minlength=len(class_names))
    texts = read_class_descriptions(args.descriptions or class_names, class_names)

    processor = AutoImageProcessor.from_pretrained(args.model)
    clip = load_clip(args.model).to(accelerator.device)
    embeddings = encode_class_descriptions(clip, AutoTokenizer.from_pretrained(args.model), texts)
    classifier = SageClassifier(clip, embeddings).to(accelerator.device)
    loaders = make_loaders(args, accelerator, splits, processor)
    augmentation = "flip" if args.augmentation == "resized-crop-flip" else args.augmentation
    transform = PixelTransform(processor, augmentation, args.crop_scale).to(accelerator.device)

    results: dict[str, Any] = {
        "settings": vars(args),
        "num_processes": accelerator.num_processes,
        "class_names": class_names,
        "class_counts": class_counts.tolist(),
        "data": data.as_dict(),
    }
    results["zero_shot"], _ = evaluate(accelerator, classifier, loaders["test"], transform, class_counts)
    accelerator.print(f"Zero-shot: {format_scores(results['zero_shot'])}")
    if args.with_tracking:
        accelerator.init_trackers("logs", {key: value for key, value in vars(args).items() if value is not None})

    model = get_peft_model(classifier, peft_config(args, classifier, texts))
    counts = [
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.parameters()),
    ]
    accelerator.print(f"Training {counts[0]:,} of {counts[1]:,} parameters on {len(splits['train']):,} images")
    model, history = train(args, accelerator, model, loaders, transform, class_counts)

    results |= history
    results["trained"], predictions = evaluate(accelerator, model, loaders["test"], transform, class_counts)
    accelerator.print(format_table(results, args.method))
    if args.with_tracking:
        accelerator.log(
            {f"test_{name}": results["trained"][name] for name in SCORES if results["trained"][name] is not None}
        )
        accelerator.end_training()

    trained = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        trained.save_pretrained(args.output_dir)
        folder = Path(args.output_dir)
        (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False))
        pixels = whole_images(loaders["test"].dataset, processor)
        repo_id = args.hub_model_id or args.output_dir
        write_report(folder, trained, args.method, results, pixels, transform, repo_id)
        if args.push_to_hub:
            create_repo(repo_id, exist_ok=True)
            upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=["checkpoints/*", "logs/*"])
    accelerator.wait_for_everyone()
    verify_saved_model(args, accelerator, loaders["test"], transform, class_counts, results["trained"], predictions)
    return results


def check_once(accelerator: Accelerator, tables: dict[str, Any]) -> dict[str, dict[int, str]]:
    """Look for unreadable images in one process and tell the others."""
    found = [find_unreadable(tables) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def whole_images(pixels: PixelDataset, processor: BaseImageProcessor) -> PixelDataset:
    """Return the same images as the processor gives them, where they were seen in random or several crops."""
    return pixels if type(pixels.view) is ProcessorView else PixelDataset(pixels.split, ProcessorView(processor))


def verify_saved_model(
    args: argparse.Namespace,
    accelerator: Accelerator,
    loader: DataLoader,
    transform: PixelTransform,
    class_counts: np.ndarray,
    scores: dict[str, Any],
    predictions: torch.Tensor,
) -> None:
    """Load the saved files into a fresh model, as a user would, and compare.

    Raises:
        RuntimeError: If a prediction or an accuracy differs.
    """
    blank = SageClassifier(load_clip(args.model), len(class_counts))
    loaded = PeftModel.from_pretrained(blank, args.output_dir).to(accelerator.device)
    loaded_scores, loaded_predictions = evaluate(accelerator, loaded, loader, transform, class_counts)
    different = (loaded_predictions != predictions).sum().item()
    if different or loaded_scores != scores:
        raise RuntimeError(f"The model loaded from {args.output_dir!r} predicts {different} images differently.")
    accelerator.print(
        f"Saved to {args.output_dir}; a fresh model with it predicts the same for all {len(predictions)} test images."
    )


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def result_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the result depends on."""
    return {key: value for key, value in vars(args).items() if key not in HOW}


def format_scores(scores: dict[str, Any]) -> str:
    return ", ".join(f"{name} {scores[name]:.1f} %" for name in SCORES if scores[name] is not None)


def format_table(results: dict[str, Any], method: str) -> str:
    """Return the accuracies before and after training, one row each, with the numbers of classes in the groups."""
    rows = [["test accuracy, %", *SCORES]]
    for title, key in (("zero-shot", "zero_shot"), (method, "trained")):
        scores = [results[key][name] for name in SCORES]
        rows.append([title, *("-" if score is None else f"{score:.1f}" for score in scores)])
    sizes = results["trained"]["num_classes"]
    rows.append(["classes", *(str(sizes.get(name, "")) for name in SCORES)])
    return "\n".join(f"{row[0]:<18}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults are those of the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", help="YAML file with values for these flags; the command line wins")
    add("--model", default=str(DEMO / "tiny-clip"), help="Hub id or folder of a CLIP-like model")
    add("--dataset", default=str(DEMO), help="image folder, folder of parquet files, or Hub id")
    add("--image-column", default="image")
    add("--label-column", default="label")
    add("--train-split", default="train")
    add("--validation-split", default="validation", help="chooses the epoch, if the data set has it")
    add("--test-split", default="test")
    add(
        "--on-bad-image",
        choices=["error", "skip"],
        default="error",
        help="skip: leave out unreadable images, and list them",
    )
    add("--imbalance-ratio", type=float, help="thin the training set to an exponential tail: head over tail images")
    add("--descriptions", help="JSON: class name to text or list of texts; default: descriptions.json in the data set")
    add("--method", choices=["sage", "adaptformer", "lora", "head"], default="sage")
    add("--loss", choices=["sage", "la", "ce"], default="sage", help="la: logit adjustment, ce: cross-entropy")
    add("--tau", type=float, default=1.2, help="strength of the prior correction (sage, la)")
    add("--compensation", type=float, default=1.0, help="strength of the mismatch compensation (sage)")
    add("--r", type=int, default=16, help="width of adapter or LoRA")
    add("--last-blocks", type=int, default=2, help="adapt so many blocks of the vision tower, from its end; 0 for all")
    add("--guidance-rows", type=int, help="pool the descriptions of more classes to so many, which is faster (sage)")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--lr", type=float, default=0.005)
    add("--lr-decay", choices=["step", "epoch"], default="step", help="how often the cosine lowers the learning rate")
    add("--weight-decay", type=float, default=0.0)
    add("--epochs", type=int, default=16)
    add("--batch-size", type=int, default=128, help="images a process and step")
    add("--gradient-accumulation-steps", type=int, default=1)
    add(
        "--augmentation",
        choices=["crop-flip", "resized-crop-flip", "none"],
        default="crop-flip",
        help="crop-flip: random crops of the resized image, on the device; resized-crop-flip: of the original image",
    )
    add("--crop-scale", type=float, default=0.5, help="smallest share of an image that a random crop keeps")
    add("--test-crops", type=int, choices=[1, 5], default=1, help="5: mean of the logits over centre and corners")
    add("--model-selection", choices=["best", "last"], default="best", help="best: epoch by validation macro accuracy")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: what `accelerate launch` says")
    add("--seed", type=int, default=0)
    add("--output-dir", default="finetuned", help="adapter, results.json, checkpoints/ and logs/ go here")
    add("--checkpointing-steps", type=int, help="checkpoint every so many steps too, not only after an epoch")
    add("--resume-from-checkpoint", help="a checkpoint, or `latest` of the output folder")
    add("--with-tracking", action=argparse.BooleanOptionalAction, default=False, help="write TensorBoard logs")
    add("--push-to-hub", action=argparse.BooleanOptionalAction, default=False)
    add("--hub-model-id", help="where to push: user/name")
    add("--num-workers", type=int, default=min(8, available_cores()), help="processes that decode uncached images")
    add("--cache-gib", type=float, default=2.0, help="decode a split once and keep it if it is no larger than this")
    add("--cpu-threads", type=int, help="threads a process without a GPU; default: all cores, shared fairly")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, after the YAML file that it names."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    config = parser.parse_args(argv).config
    args = parser.parse_args(_flags_from_yaml(parser, config) + argv) if config else parser.parse_args(argv)
    for name in ("epochs", "batch_size", "gradient_accumulation_steps", "r", "guidance_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"`--{name.replace('_', '-')}` must be at least 1, got {value}.")
    if args.last_blocks < 0:
        parser.error(f"`--last-blocks` must be at least 0, got {args.last_blocks}.")
    if args.push_to_hub and not args.hub_model_id:
        parser.error("`--push-to-hub` needs `--hub-model-id`.")
    if args.descriptions is None and Path(args.dataset, "descriptions.json").is_file():
        args.descriptions = str(Path(args.dataset, "descriptions.json"))
    return args


def _flags_from_yaml(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """Turn a YAML file into flags, so that the rules of the command line hold for it too."""
    try:
        # Every scalar stays a string here: YAML itself would read `no` as false and 1e-3 as text.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"`--config` {path!r} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"`--config` {path!r} must map flags to values, got a {type(values).__name__}.")
    switches = {"with_tracking", "push_to_hub"}
    known = {name for name in vars(parser.parse_args([])) if name != "config"}
    flags = []
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            parser.error(f"`--config` {path!r} has the unknown key {key!r}; known are {sorted(known)}.")
        if name in switches and value not in ("true", "false"):
            parser.error(f"`--config` {path!r}: {key!r} must be true or false, got {value!r}.")
        flag = f"--{name.replace('_', '-')}"
        if name in switches:
            flags.append(flag if value == "true" else flag.replace("--", "--no-", 1))
        elif value not in ("", "null"):
            flags.append(f"{flag}={value}")
    return flags


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the script with a command line."""
    args = parse_args(argv)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return training_function(args)


if __name__ == "__main__":
    main()
