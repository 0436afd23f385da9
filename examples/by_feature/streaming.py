# SPDX-License-Identifier: Apache-2.0
"""Images that do not fit on the disk: each process reads its share of a stream, with Accelerate and `datasets`.

accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/by_feature/streaming.py
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -- examples/by_feature/streaming.py        # without GPUs
"""

import argparse
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from datasets import Image, load_dataset
from datasets.distributed import split_dataset_by_node
from peft import get_peft_model
from torch.utils.data import DataLoader

from peft_sage import (
    ImageCollator,
    SageClassifier,
    SageConfig,
    SageLoss,
    choose_text_prior,
    parameter_groups,
)


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add = parser.add_argument
add("--model", default="examples/emoji_lt/tiny-clip", help="folder or Hub id of a CLIP")
add("--dataset", default="examples/emoji_lt", help="folder or Hub id with split train")
add("--image-column", default="image", help="default: image")
add("--label-column", default="label", help="a ClassLabel; its names are the texts")
add("--class-counts", type=Path, help="JSON list; default: counted in a first pass")
add(
    "--prior-images",
    type=int,
    default=2000,
    help="images that choose the text prior",
)
add(
    "--buffer-size",
    type=int,
    default=1000,
    help="images shuffled in memory",
)
add(
    "--num-workers",
    type=int,
    default=1,
    help="reading and decoding, per process",
)
add(
    "--output-dir",
    type=Path,
    default=Path("streaming"),
    help="model and checkpoints",
)
add("--resume", help="continue from a folder `epoch-N` in the output folder")
add(
    "--epochs",
    type=int,
    default=2,
    help="default: 2",
)
add(
    "--batch-size",
    type=int,
    default=64,
    help="per process (default: 64)",
)
add(
    "--lr",
    type=float,
    default=0.002,
    help="learning rate of the adapters",
)
args = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator()
device, rank = accelerator.device, accelerator.process_index
processes = accelerator.num_processes
options = {"split": "train", "streaming": True}
stream = load_dataset(args.dataset, **options)
names = stream.features[args.label_column].names
classifier = SageClassifier.from_texts(args.model, names).to(device)

if args.class_counts:
    counts = torch.tensor(json.loads(args.class_counts.read_text()))
else:  # in parquet files, labels are read without the images
    labels = load_dataset(args.dataset, columns=[args.label_column], **options)
    counts = torch.zeros(len(names), dtype=torch.long)
    for rows in split_dataset_by_node(labels, rank, processes).iter(batch_size=10_000):
        found = torch.tensor(rows[args.label_column])
        counts += torch.bincount(found, minlength=len(names))
    counts = accelerator.reduce(counts.to(device), "sum").cpu()
per_epoch = int(counts.sum())

# One seed for all: they divide one shuffled stream, by whole files if their number can be divided.
stream = stream.cast_column(args.image_column, Image(decode=False))
stream = stream.shuffle(seed=0, buffer_size=args.buffer_size)
share = split_dataset_by_node(stream, rank, processes)
collate = ImageCollator(
    classifier.image_processor,
    image_column=args.image_column,
    label_column=args.label_column,
)
loader = DataLoader(
    share, args.batch_size, collate_fn=collate, num_workers=args.num_workers
)


def in_step() -> Iterator[tuple[dict, int]]:
    """Yield batches of this process and the number of images in those of all.

    A process that has no images left repeats one, ignored by its label, for as long as another has some.
    """
    batches, batch = iter(loader), None
    while True:
        new = next(batches, None)
        if new is None and batch is None:
            raise RuntimeError(
                f"Process {rank} got none of {per_epoch} images: use fewer than {processes} processes."
            )
        batch = new or {
            "pixel_values": batch["pixel_values"][:1],
            "labels": torch.tensor([-100]),
        }
        count = torch.tensor(len(new["labels"]) if new else 0, device=device)
        total = accelerator.reduce(count, "sum").item()
        if not total:
            return
        yield {name: value.to(device) for name, value in batch.items()}, total


first = islice(loader, math.ceil(args.prior_images / args.batch_size / processes))
parts = [(classifier.embed(iter([batch])), batch["labels"]) for batch in first]
embeds, labels = map(torch.cat, zip(*gather_object(parts), strict=True))
prior = choose_text_prior(embeds, labels, classifier.text_embeds, class_counts=counts)
accelerator.print(prior)

model = get_peft_model(classifier, SageConfig())
optimizer = torch.optim.AdamW(parameter_groups(model, args.lr))
start = int(args.resume.rpartition("-")[2]) if args.resume else 0
seen = start * per_epoch


def cosine(_step: int) -> float:
    """Decay by images, because the number of steps depends on how the files are divided."""
    return (1 + math.cos(math.pi * min(1, seen / (args.epochs * per_epoch)))) / 2


schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
loss_function = SageLoss(counts, text_prior=prior.strength, reduction="sum")
model, optimizer = accelerator.prepare(model, optimizer)
accelerator.register_for_checkpointing(loss_function)  # its moving average
if args.resume:
    accelerator.load_state(args.resume)

model.train()
for epoch in range(start, args.epochs):
    share.set_epoch(epoch)  # another order
    for batch, images in tqdm(in_step(), desc=f"epoch {epoch + 1} of {args.epochs}"):
        outputs = model(pixel_values=batch["pixel_values"])
        # DDP divides by the number of processes.
        loss = loss_function(outputs, batch["labels"]) * processes / images
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen += images
        schedule.step()
    accelerator.save_state(args.output_dir / f"epoch-{epoch + 1}")

if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(args.output_dir)
accelerator.wait_for_everyone()
accelerator.end_training()
