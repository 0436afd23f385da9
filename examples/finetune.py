# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a CLIP-like model on long-tailed images.

Without arguments it runs on the embedded demo, Emoji-LT with a small CLIP:

    accelerate launch examples/finetune.py

On your own images (`photos/train/CLASS/*.jpg`, `photos/test/CLASS/*.jpg`) with any CLIP or SigLIP:

    accelerate launch examples/finetune.py --model openai/clip-vit-base-patch16 --dataset photos

It embeds the training images with the frozen tower, prints the zero-shot accuracy and how far the class texts are
to be trusted, trains adapters and head, prints the accuracy on classes with many, medium and few training images,
saves what it trained, and checks that a fresh model with the saved files predicts the same.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flags import BATCH_SIZE, EPOCHS, MIN_STEPS, announce, available_cores, parse_args


# Has to come before torch. Without it, threads that wait spin, and a busy machine becomes several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__":
    announce(parse_args())  # what follows takes seconds to import

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import broadcast_object_list, gather_object, set_seed, tqdm
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
    ImageData,
    PixelDataset,
    PixelTransform,
    ProcessorView,
    RandomCropView,
    find_unreadable,
    load_images,
    long_tailed_subset,
)
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from report import write_report
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset
from transformers import BaseImageProcessor

from peft_sage import (
    LongTailAccuracy,
    SageClassifier,
    SageConfig,
    SageLoss,
    TextPrior,
    choose_text_prior,
    parameter_groups,
    read_class_descriptions,
)
from peft_sage.towers.mlps import find_mlps


#: LoRA goes into the attention of the vision tower; the text tower stays as it is for every method.
LORA_TARGETS, TEXT_TOWER = ["q_proj", "v_proj", "query", "value"], r".*text_model.*"
#: Flags that say how a run is carried out, not what comes out of it: they may differ when a run goes on.
HOW = {
    "config",
    "output_dir",
    "batch_size",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "num_workers",
    "cpu_threads",
}
HOW |= {"cache_gib", "with_tracking", "push_to_hub", "hub_model_id"}
SCORES = ("overall", "macro", "many", "medium", "few", "worst")
#: Where `--text-guidance` is not given: its share of the text prior, chosen on validation images (RESULTS.md).
GUIDANCE_SHARE = 0.4


def peft_config(args: argparse.Namespace, model: nn.Module) -> PeftConfig:
    """Say what is trained: always the head, and with it what `--method` names in the last blocks of the tower."""
    common: dict[str, Any] = {"r": args.r, "modules_to_save": ["class_head"]}
    if args.method == "head":
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, **common)
    depth = len(find_mlps(model))
    last = depth if args.last_blocks == 0 else args.last_blocks or math.ceil(depth / 2)
    common["layers_to_transform"] = list(range(max(0, depth - last), depth))
    if args.method == "lora":
        return LoraConfig(
            lora_alpha=args.r,
            target_modules=LORA_TARGETS,
            exclude_modules=TEXT_TOWER,
            **common,
        )
    return SageConfig(
        guidance_rows=0 if args.method == "adaptformer" else args.guidance_rows,
        **common,
    )


def make_loss(
    args: argparse.Namespace, class_counts: np.ndarray, prior: float, guidance: float
) -> SageLoss:
    """Return cross-entropy, the logit-adjusted loss or the Sage loss, which are one formula."""
    tau = 0.0 if args.loss == "ce" else args.tau
    compensation = args.compensation if args.loss == "sage" else 0.0
    return SageLoss(
        class_counts.tolist(),
        tau,
        compensation,
        text_prior=prior,
        text_guidance=guidance,
    )


def text_terms(
    args: argparse.Namespace,
    accelerator: Accelerator,
    classifier: SageClassifier,
    loader: DataLoader,
    transform: PixelTransform,
) -> tuple[float, float, TextPrior | None]:
    """Return the strengths of the text prior and of the guidance, and how the first was chosen if it was.

    The training images are embedded with the frozen tower for it, which goes with the batches from then on.
    """
    wanted = {name: getattr(args, name) for name in ("text_prior", "text_guidance")}
    if args.loss != "sage":
        return 0.0, 0.0, None
    if args.method == "head" and wanted["text_guidance"] == "auto":
        wanted["text_guidance"] = 0.0  # the tower stays frozen
    embeds = None
    if wanted["text_prior"] == "auto" or wanted["text_guidance"] != 0:
        embeds = embed_training_images(
            accelerator, classifier, loader, transform, args.batch_size
        )
    chosen: TextPrior | None = None
    if wanted["text_prior"] == "auto":
        if accelerator.is_main_process:
            labels = torch.as_tensor(loader.dataset.split.labels)
            chosen = choose_text_prior(
                embeds.to(classifier.device),
                labels,
                classifier.text_embeds,
                seed=args.seed,
            )
            accelerator.print(f"Chosen: {chosen}")
        chosen = broadcast_object_list([chosen])[
            0
        ]  # on a GPU two processes might not come to the same choice
        wanted["text_prior"] = chosen.strength
    if wanted["text_guidance"] == "auto":
        wanted["text_guidance"] = GUIDANCE_SHARE * wanted["text_prior"]
    if wanted["text_guidance"]:
        loader.dataset.base_image_embeds = embeds
    return wanted["text_prior"], wanted["text_guidance"], chosen


def embed_training_images(
    accelerator: Accelerator,
    classifier: SageClassifier,
    loader: DataLoader,
    transform: PixelTransform,
    size: int,
) -> torch.Tensor:
    """Return the frozen tower's embeddings (N, e) of the plain training images, `size` at a time.

    Each process embeds its share.
    """
    images = whole_images(loader.dataset, classifier.image_processor)
    transform.eval()

    def batches(indices: list[int]) -> Iterator[dict[str, torch.Tensor]]:
        workers = 0 if images.pixels is not None else loader.num_workers
        for batch in DataLoader(
            Subset(images, indices), batch_size=size, num_workers=workers
        ):
            bar.update(len(batch["labels"]))
            yield {
                "pixel_values": transform(batch["pixel_values"].to(accelerator.device))
            }

    with (
        accelerator.split_between_processes(list(range(len(images)))) as share,
        accelerator.autocast(),
    ):
        bar = tqdm(
            total=len(share),
            desc="embedding training images",
            unit="image",
            leave=False,
        )
        embeds = (
            classifier.embed(batches(share))
            if share
            else classifier.text_embeds[:0].cpu()
        )
        bar.close()
    return torch.cat(gather_object([embeds]))


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, or SGD with momentum; the head learns faster than the adapters."""
    groups = parameter_groups(model, args.lr, args.head_lr)
    if args.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)


def cosine(done: float) -> float:
    """Return the factor of the learning rate after the share `done` of the training: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_loaders(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data: ImageData,
    processor: BaseImageProcessor,
) -> dict[str, DataLoader]:
    """Return a prepared loader a split; a split that fits into memory is decoded once."""
    views = dict.fromkeys(data.splits, ProcessorView(processor))
    if args.augmentation == "resized-crop-flip":
        views["train"] = RandomCropView(processor, args.crop_scale, args.seed)
    if args.test_crops == 5:
        views["test"] = FiveCropView(processor)
    loaders = {}
    for name, split in data.splits.items():
        pixels = PixelDataset(split, views[name])
        pixels.cache_if_small(
            int(args.cache_gib * 2**30), progress=accelerator.is_local_main_process
        )
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
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    transform: PixelTransform,
    class_counts: np.ndarray,
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return the accuracies in percent (`None` where there is no such class), the predicted classes, and how likely.

    Where the loader gives several crops of an image, (B, crops, 3, H, W), their logits are averaged.
    """
    model.eval()
    transform.eval()
    # The predictions of all processes are gathered here, so the metric must not add them up again.
    metric = LongTailAccuracy(class_counts.tolist(), sync_on_compute=False).to(
        accelerator.device
    )
    predictions, confidence = [], []
    for batch in loader:
        pixels = batch["pixel_values"]
        with accelerator.autocast():
            logits = model(pixel_values=transform(pixels.flatten(0, -4))).logits
        logits = logits.unflatten(0, (len(pixels), -1)).mean(dim=1)
        probability = logits.float().softmax(dim=-1).amax(dim=-1)
        found = accelerator.gather_for_metrics(
            (logits.argmax(dim=-1), probability, batch["labels"])
        )
        predicted, probability, labels = found
        metric.update(predicted, labels)
        predictions.append(predicted.cpu())
        confidence.append(probability.cpu())
    scores = {name: score.double().cpu() for name, score in metric.compute().items()}
    percent = {name: _percent(scores[name].item()) for name in SCORES}
    percent["per_class"] = [_percent(score) for score in scores["per_class"].tolist()]
    percent["num_classes"] = {
        name: int(scores[f"num_{name}"]) for name in ("many", "medium", "few")
    }
    return percent, torch.cat(predictions), torch.cat(confidence)


def _percent(fraction: float) -> float | None:
    return None if math.isnan(fraction) else 100 * fraction


def seed_batch(seed: int, epoch: int, batch: int, process: int) -> None:
    """Make augmentation and dropout depend on where the run is only, and not on how it got there."""
    set_seed(
        int(np.random.SeedSequence([seed, epoch, batch, process]).generate_state(1)[0])
    )


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    loss_function: SageLoss,
    loaders: dict[str, DataLoader],
    transform: PixelTransform,
    class_counts: np.ndarray,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train, with a checkpoint after every epoch; end with the weights of the best epoch on the validation split."""
    model, optimizer = accelerator.prepare(model, make_optimizer(args, model))
    # Not prepared: it counts optimizer steps, however many processes and however large the gradient accumulation.
    steps_per_epoch = math.ceil(
        len(loaders["train"]) / args.gradient_accumulation_steps
    )
    epochs = args.epochs or max(EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch))
    every = (
        1 if args.epochs else epochs // EPOCHS
    )  # epochs of few steps are not each worth a validation
    total_steps = epochs * steps_per_epoch
    decay_every = steps_per_epoch if args.lr_decay == "epoch" else 1
    scheduler = LambdaLR(
        optimizer, lambda step: cosine(step // decay_every * decay_every / total_steps)
    )
    loss_function.to(accelerator.device)
    progress = TrainingProgress()
    accelerator.register_for_checkpointing(scheduler, progress, loss_function)
    checkpoint_trainable_only(accelerator)

    folder = Path(args.output_dir, "checkpoints")
    settings = result_settings(args) | {
        "global_batch_size": args.batch_size * accelerator.num_processes
    }
    settings["data"] = fingerprint(loaders)
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(args.resume_from_checkpoint, folder, settings)
        if checkpoint is not None:
            accelerator.load_state(str(checkpoint))
        accelerator.print(
            f"Going on from {checkpoint}"
            if checkpoint
            else "No checkpoint yet: starting anew"
        )

    bar = tqdm(total=total_steps, initial=progress.step, desc="training", unit="step")
    while progress.epoch < epochs:
        transform.train()
        for loss in train_epoch(
            args,
            accelerator,
            model,
            optimizer,
            loss_function,
            loaders["train"],
            transform,
            progress,
        ):
            scheduler.step()
            progress.step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
            accelerator.log(
                {"loss": loss, "lr": scheduler.get_last_lr()[0]}, step=progress.step
            )
            if (
                args.checkpointing_steps
                and progress.step % args.checkpointing_steps == 0
            ):
                save_checkpoint(accelerator, folder, progress.step, settings)
        progress.batch = 0
        progress.epoch += 1
        if progress.epoch % every and progress.epoch < epochs:
            continue
        if "validation" in loaders:
            scores, *_ = evaluate(
                accelerator, model, loaders["validation"], transform, class_counts
            )
            progress.record(
                {name: scores[name] for name in SCORES}, accelerator.unwrap_model(model)
            )
            accelerator.log({"validation_macro": scores["macro"]}, step=progress.step)
            # tqdm writes in every process, even where the bar is hidden.
            if accelerator.is_main_process:
                bar.write(
                    f"epoch {progress.epoch} of {epochs}: validation {format_scores(scores)}"
                )
        save_checkpoint(accelerator, folder, progress.step, settings)
    bar.close()
    kept_epoch = epochs
    if args.model_selection == "best" and progress.best_weights:
        load_trainable_weights(accelerator.unwrap_model(model), progress.best_weights)
        kept_epoch = progress.best_epoch
        accelerator.print(
            f"Keeping epoch {kept_epoch}, the best on the validation split"
        )
    return model, {"validation": progress.validation, "kept_epoch": kept_epoch}


def train_epoch(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_function: SageLoss,
    loader: DataLoader,
    transform: PixelTransform,
    progress: TrainingProgress,
) -> Iterator[float]:
    """Train for what is left of an epoch, and give the loss after every optimizer step."""
    model.train()
    # The loader without the first batches is another one, which must be told the epoch itself.
    loader = skip_first_batches(loader, progress.batch)
    loader.set_epoch(progress.epoch)
    loader.dataset.set_epoch(progress.epoch)
    for batch in loader:
        seed_batch(args.seed, progress.epoch, progress.batch, accelerator.process_index)
        with accelerator.accumulate(model):
            outputs = model(
                **batch | {"pixel_values": transform(batch["pixel_values"])}
            )
            loss = loss_function(outputs, batch["labels"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        progress.batch += 1
        if accelerator.sync_gradients:
            yield loss.item()


def training_function(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole job and return what is written to `results.json`."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=args.seed
        ),
        log_with="tensorboard" if args.with_tracking else None,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError("`--mixed-precision` fp16 needs a GPU; use bf16 or no.")
    if accelerator.device.type == "cpu":
        # `accelerate launch` leaves a CPU process one thread unless told otherwise.
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(
            args.cpu_threads or max(1, available_cores() // local_processes)
        )
    set_seed(args.seed)

    data = load_images(
        args.dataset,
        args.image_column,
        args.label_column,
        args.train_split,
        args.validation_split,
        args.test_split,
        args.on_bad_image,
        args.seed,
        unreadable=lambda tables: check_once(accelerator, tables),
    )
    if args.imbalance_ratio is not None:
        labels = data.splits["train"].labels
        kept = long_tailed_subset(
            labels, len(data.class_names), args.imbalance_ratio, args.seed
        )
        data.splits["train"] = data.splits["train"].select(kept)
    accelerator.print(data.summary())
    args.batch_size = batch_size(args, accelerator, len(data.splits["train"]))
    class_counts = data.class_counts()
    texts = read_class_descriptions(
        args.descriptions or data.class_names, data.class_names
    )
    with accelerator.main_process_first():
        classifier = SageClassifier.from_texts(
            args.model, texts, cache_dir=Path(args.output_dir, "text_embeds")
        )
    classifier.to(accelerator.device)
    processor = classifier.image_processor
    loaders = make_loaders(args, accelerator, data, processor)
    augmentation = (
        "flip" if args.augmentation == "resized-crop-flip" else args.augmentation
    )
    transform = PixelTransform(processor, augmentation, args.crop_scale).to(
        accelerator.device
    )
    results: dict[str, Any] = {
        "settings": vars(args),
        "num_processes": accelerator.num_processes,
        "data": data.as_dict(),
        "class_names": data.class_names,
        "class_descriptions": list_of_texts(texts),
        "class_counts": class_counts.tolist(),
    }
    results["zero_shot"], *_ = evaluate(
        accelerator, classifier, loaders["test"], transform, class_counts
    )
    accelerator.print(f"Zero-shot: {format_scores(results['zero_shot'])}")
    prior, guidance, chosen = text_terms(
        args, accelerator, classifier, loaders["train"], transform
    )
    results |= {"text_prior": prior, "text_guidance": guidance}
    results["text_prior_scores"] = None if chosen is None else chosen.scores
    if args.with_tracking:
        accelerator.init_trackers(
            "logs",
            {key: value for key, value in vars(args).items() if value is not None},
        )

    model = get_peft_model(classifier, peft_config(args, classifier))
    trained, total = model.get_nb_trainable_parameters()
    images = len(data.splits["train"])
    accelerator.print(
        f"Training {trained:,} of {total:,} parameters on {images:,} images"
    )
    loss_function = make_loss(args, class_counts, prior, guidance)
    model, history = train(
        args, accelerator, model, loss_function, loaders, transform, class_counts
    )
    results |= history
    results["trained"], *predictions = evaluate(
        accelerator, model, loaders["test"], transform, class_counts
    )
    accelerator.print(format_table(results, args.method))
    if args.with_tracking:
        scores = {f"test_{name}": results["trained"][name] for name in SCORES}
        accelerator.log(
            {name: score for name, score in scores.items() if score is not None}
        )
        accelerator.end_training()
    save(args, accelerator, model, results, predictions, loaders, transform, chosen)
    verify_saved_model(
        args,
        accelerator,
        loaders["test"],
        transform,
        class_counts,
        results["trained"],
        predictions[0],
    )
    return results


def save(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: nn.Module,
    results: dict[str, Any],
    predictions: list[torch.Tensor],
    loaders: dict[str, DataLoader],
    transform: PixelTransform,
    chosen: TextPrior | None,
) -> None:
    """Write what was trained, the results and the report, and push all but the report if that was asked for."""
    trained = accelerator.unwrap_model(model)
    folder = Path(args.output_dir)
    if accelerator.is_main_process:
        # Beside, and then renamed: a kill or a full disk leaves whole what a run before had saved here.
        with tempfile.TemporaryDirectory(
            dir=folder, prefix="unfinished_"
        ) as unfinished:
            trained.save_pretrained(unfinished)
            trained.image_processor.save_pretrained(unfinished)
            text = json.dumps(results, indent=2, ensure_ascii=False)
            Path(unfinished, "results.json").write_text(text, encoding="utf-8")
            for file in Path(unfinished).iterdir():
                file.replace(folder / file.name)
        repo_id = args.hub_model_id or args.output_dir
        test = whole_images(loaders["test"].dataset, trained.image_processor)
        training, probability = (
            loaders["train"].dataset.split,
            None if chosen is None else chosen.label_probability,
        )
        write_report(
            folder,
            trained,
            args.method,
            results,
            test,
            predictions,
            transform,
            repo_id,
            training,
            probability,
        )
        if args.push_to_hub:
            create_repo(repo_id, exist_ok=True)
            # The report shows many of the images.
            ignored = [
                "checkpoints/*",
                "logs/*",
                "text_embeds/*",
                "unfinished_*",
                "report.html",
            ]
            upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=ignored)
    accelerator.wait_for_everyone()


def batch_size(args: argparse.Namespace, accelerator: Accelerator, images: int) -> int:
    """Return the images per process and step; the default shrinks with the data.

    Raises:
        ValueError: If a size was given that the training images do not fill.
    """
    most = max(1, images // accelerator.num_processes)
    if args.batch_size is None:
        if most < BATCH_SIZE:
            accelerator.print(
                f"Batches of {most} images, because there are only {images}"
            )
        return min(BATCH_SIZE, most)
    if args.batch_size > most:
        raise ValueError(
            f"`--batch-size` must be at most {most}, got {args.batch_size}: there are {images} training images for "
            f"{accelerator.num_processes} processes."
        )
    return args.batch_size


def check_once(
    accelerator: Accelerator, tables: dict[str, Any]
) -> dict[str, dict[int, str]]:
    """Look for unreadable images in one process and tell the others."""
    found = [find_unreadable(tables) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def list_of_texts(texts: list[str] | dict[str, list[str]]) -> list[list[str]]:
    """Return the texts of each class, in class order; a bare name stands for itself."""
    return (
        list(texts.values()) if isinstance(texts, dict) else [[name] for name in texts]
    )


def whole_images(pixels: PixelDataset, processor: BaseImageProcessor) -> PixelDataset:
    """Return the same images as the processor gives them, where they were seen in random or several crops."""
    return (
        pixels
        if type(pixels.view) is ProcessorView
        else PixelDataset(pixels.split, ProcessorView(processor))
    )


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
    loaded = SageClassifier.from_pretrained(args.output_dir, device=accelerator.device)
    loaded_scores, loaded_predictions, _ = evaluate(
        accelerator, loaded, loader, transform, class_counts
    )
    different = (loaded_predictions != predictions).sum().item()
    if different or loaded_scores != scores:
        raise RuntimeError(
            f"The model loaded from {args.output_dir!r} predicts {different} images differently."
        )
    accelerator.print(
        f"Saved to {args.output_dir}; a fresh model with it predicts the same for all {len(predictions)} test images."
    )
    accelerator.print(
        f"Look at {Path(args.output_dir, 'report.html')}, and name images that are in no class folder:"
    )
    accelerator.print(f"python examples/by_feature/predict.py {args.output_dir} FOLDER")


def fingerprint(loaders: dict[str, DataLoader]) -> str:
    """Return what changes with the labels of the images, their number and their order."""
    labels = {
        name: loader.dataset.split.labels.tolist() for name, loader in loaders.items()
    }
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:16]


def result_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the result depends on."""
    return {key: value for key, value in vars(args).items() if key not in HOW}


def format_scores(scores: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {scores[name]:.1f} %" for name in SCORES if scores[name] is not None
    )


def format_table(results: dict[str, Any], method: str) -> str:
    """Return the accuracies before and after training, one row each, with the numbers of classes in the groups."""
    rows = [["test accuracy, %", *SCORES]]
    for title, key in (("zero-shot", "zero_shot"), (method, "trained")):
        scores = [results[key][name] for name in SCORES]
        rows.append(
            [title, *("-" if score is None else f"{score:.1f}" for score in scores)]
        )
    sizes = results["trained"]["num_classes"]
    rows.append(["classes", *(str(sizes.get(name, "")) for name in SCORES)])
    return "\n".join(
        f"{row[0]:<18}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the script with a command line."""
    args = parse_args(argv)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return training_function(args)


if __name__ == "__main__":
    main()
