# SPDX-License-Identifier: Apache-2.0
"""The flags of `finetune.py`. Nothing here takes time to import, so that a mistake in them is told at once."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import yaml


DEMO = Path(__file__).parent / "emoji_lt"
#: Where `--epochs` is not given: passes over the images, but no fewer steps than this.
EPOCHS, MIN_STEPS = 10, 300
#: Where `--batch-size` is not given, if there are so many training images.
BATCH_SIZE = 128
DESCRIPTION = """Fine-tune a CLIP-like model on long-tailed images.

Without flags it runs on the embedded demo, drawings and a small CLIP. On your own images, in
photos/train/CLASS/*.jpg and photos/test/CLASS/*.jpg, with any CLIP or SigLIP:

    accelerate launch examples/finetune.py --model openai/clip-vit-base-patch16 --dataset photos
"""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


def strength(text: str) -> float | str:
    """Parse `auto` or a number."""
    return text if text == "auto" else float(text)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults are one recipe for every data set."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", help="YAML file with values for these flags; the command line wins"
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        default=str(DEMO),
        help="image folder, folder of parquet or CSV files, or Hub id",
    )
    add(
        "--descriptions",
        help="JSON or CSV with texts for each class; default: descriptions.json in the data set",
    )
    add("--image-column", default="image")
    add("--label-column", default="label")
    add("--train-split", default="train")
    add(
        "--validation-split",
        default="validation",
        help="chooses the epoch, if the data set has it",
    )
    add("--test-split", default="test")
    add(
        "--on-bad-image",
        choices=["error", "skip"],
        default="error",
        help="what to do with unreadable images",
    )
    add(
        "--imbalance-ratio",
        type=float,
        help="thin the training set to an exponential tail: head over tail images",
    )
    add(
        "--num-workers",
        type=int,
        default=min(8, available_cores()),
        help="processes that decode uncached images",
    )
    add(
        "--cache-gib",
        type=float,
        default=2.0,
        help="decode a split once and keep it if it is no larger than this",
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        default=str(DEMO / "tiny-clip"),
        help="Hub id or folder of a CLIP-like model",
    )
    add("--r", type=int, default=16, help="width of adapter or LoRA")
    add(
        "--last-blocks",
        type=int,
        help="adapt so many blocks of the vision tower, from its end; default: half; 0: all",
    )
    add(
        "--guidance-rows",
        type=int,
        default=64,
        help="rows that the adapter attends to, at most (sage)",
    )

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=["sage", "adaptformer", "lora", "head"], default="sage")
    add(
        "--loss",
        choices=["sage", "la", "ce"],
        default="sage",
        help="la: logit adjustment, ce: cross-entropy",
    )
    add(
        "--text-prior",
        type=strength,
        default="auto",
        help="pull of the head to the class texts; auto: by the data",
    )
    add(
        "--text-guidance",
        type=strength,
        default="auto",
        help="pull of the tower to its view of the texts",
    )
    add(
        "--tau",
        type=float,
        default=1.0,
        help="strength of the prior correction (sage, la)",
    )
    add(
        "--compensation",
        type=float,
        default=1.0,
        help="strength of the mismatch compensation (sage)",
    )

    add = parser.add_argument_group("training").add_argument
    add(
        "--epochs",
        type=int,
        help=f"default: {EPOCHS}, or more, so that there are {MIN_STEPS} steps",
    )
    add("--lr", type=float, default=0.002, help="of the adapters")
    add(
        "--head-lr",
        type=float,
        help="of the head; default: 2.5 times that of the adapters",
    )
    add(
        "--batch-size",
        type=int,
        help=f"images per process and step; default: {BATCH_SIZE}, or fewer for few images",
    )
    add("--gradient-accumulation-steps", type=int, default=1)
    add("--optimizer", choices=["adamw", "sgd"], default="adamw")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add(
        "--lr-decay",
        choices=["step", "epoch"],
        default="step",
        help="how often the cosine lowers the learning rate",
    )
    add("--weight-decay", type=float, default=0.0)
    add(
        "--augmentation",
        choices=["crop-flip", "resized-crop-flip", "none"],
        default="crop-flip",
        help="crop-flip: random crops of the resized image, on the device; resized-crop-flip: of the original image",
    )
    add(
        "--crop-scale",
        type=float,
        default=0.5,
        help="smallest share of an image that a random crop keeps",
    )
    add(
        "--test-crops",
        type=int,
        choices=[1, 5],
        default=1,
        help="5: mean of the logits over centre and corners",
    )
    add(
        "--model-selection",
        choices=["best", "last"],
        default="best",
        help="best: epoch by validation macro accuracy",
    )
    add(
        "--mixed-precision",
        choices=["no", "fp16", "bf16"],
        help="default: what `accelerate launch` says",
    )
    add("--seed", type=int, default=0)
    add(
        "--cpu-threads",
        type=int,
        help="threads per process without a GPU; default: all cores, shared fairly",
    )

    add = parser.add_argument_group("output").add_argument
    add(
        "--output-dir",
        default="finetuned",
        help="adapter, results.json, checkpoints/ and logs/ go here",
    )
    add(
        "--checkpointing-steps",
        type=int,
        help="checkpoint every so many steps too, not only after an epoch",
    )
    add(
        "--resume-from-checkpoint",
        help="a checkpoint, or `latest` of the output folder",
    )
    add(
        "--with-tracking",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write TensorBoard logs",
    )
    add("--push-to-hub", action=argparse.BooleanOptionalAction, default=False)
    add("--hub-model-id", help="where to push: user/name")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, after the YAML file that it names."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    config = parser.parse_args(argv).config
    args = (
        parser.parse_args(_flags_from_yaml(parser, config) + argv)
        if config
        else parser.parse_args(argv)
    )
    least = {
        "epochs": 1,
        "batch_size": 1,
        "gradient_accumulation_steps": 1,
        "r": 1,
        "guidance_rows": 0,
    }
    least |= {
        "last_blocks": 0,
        "text_prior": 0,
        "text_guidance": 0,
        "compensation": 0,
        "cache_gib": 0,
    }
    for name, low in least.items():
        value = getattr(args, name)
        if isinstance(value, (int, float)) and not low <= value < math.inf:
            parser.error(
                f"`--{name.replace('_', '-')}` must be a number, at least {low}, got {value}."
            )
    for name in ("lr", "head_lr"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(
                f"`--{name.replace('_', '-')}` must be a number greater than 0, got {getattr(args, name)}."
            )
    if args.push_to_hub and not args.hub_model_id:
        parser.error("`--push-to-hub` needs `--hub-model-id`.")
    if args.descriptions is None and Path(args.dataset, "descriptions.json").is_file():
        args.descriptions = str(Path(args.dataset, "descriptions.json"))
    return args


def _flags_from_yaml(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """Turn a YAML file into flags, so that the rules of the command line hold for it too."""
    try:
        # Every scalar stays a string here: YAML itself would read `no` as false and 1e-3 as text.
        values = (
            yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
            or {}
        )
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"`--config` {path!r} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(
            f"`--config` {path!r} must map flags to values, got a {type(values).__name__}."
        )
    switches = {"with_tracking", "push_to_hub"}
    known = {name for name in vars(parser.parse_args([])) if name != "config"}
    flags = []
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            parser.error(
                f"`--config` {path!r} has the unknown key {key!r}; known are {sorted(known)}."
            )
        if name in switches and value not in ("true", "false"):
            parser.error(
                f"`--config` {path!r}: {key!r} must be true or false, got {value!r}."
            )
        flag = f"--{name.replace('_', '-')}"
        if name in switches:
            flags.append(flag if value == "true" else flag.replace("--", "--no-", 1))
        elif value not in ("", "null"):
            flags.append(f"{flag}={value}")
    return flags


def announce(args: argparse.Namespace) -> None:
    """Say what comes, in one process of several, before what takes seconds."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        model, data = Path(args.model).name, Path(args.dataset).name
        print(
            f"Fine-tuning {model} on {data} (--method {args.method}), into {args.output_dir}/",
            flush=True,
        )
        print("Loading PyTorch and transformers ...", flush=True)
