# SPDX-License-Identifier: Apache-2.0
"""Images that fit no disk: every process reads its share of a stream, with Accelerate and `datasets`.

accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/by_feature/streaming.py

Without GPUs: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -- examples/by_feature/streaming.py
"""

import argparse
import json
import math
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from datasets import Image, load_dataset
from datasets.distributed import split_dataset_by_node
from demo import DEMO
from peft import get_peft_model
from torch.utils.data import DataLoader

from peft_sage import (
    SageClassifier,
    SageConfig,
    SageLoss,
    choose_text_prior,
    parameter_groups,
)
from peft_sage.pictures import decoding_side, read_image


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "--model",
    default=str(DEMO / "tiny-clip"),
    help="Hub id or folder of a CLIP-like model",
)
parser.add_argument(
    "--dataset", default=str(DEMO), help="Hub id or folder, with a split `train`"
)
parser.add_argument("--image-column", default="image")
parser.add_argument(
    "--label-column", default="label", help="a `ClassLabel`, whose names are the texts"
)
parser.add_argument(
    "--class-counts",
    help="JSON list of images per class; default: counted, of parquet files",
)
parser.add_argument(
    "--prior-images",
    type=int,
    default=2000,
    help="the first ones, which decide on the text prior",
)
parser.add_argument(
    "--buffer-size",
    type=int,
    default=1000,
    help="encoded images that are shuffled in memory",
)
parser.add_argument(
    "--num-workers", type=int, default=1, help="that read and decode, for each process"
)
parser.add_argument("--output-dir", default="streaming")
parser.add_argument(
    "--resume", help="go on from a folder `epoch-N` in the output folder"
)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=64, help="for each process")
parser.add_argument("--lr", type=float, default=0.002)
args = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator()
device, rank, processes = (
    accelerator.device,
    accelerator.process_index,
    accelerator.num_processes,
)
stream = load_dataset(args.dataset, split="train", streaming=True)
names = stream.features[args.label_column].names
classifier = SageClassifier.from_texts(args.model, names).to(device)

if args.class_counts:
    counts = torch.tensor(json.loads(Path(args.class_counts).read_text()))
else:  # a first pass over the labels, which in parquet files are read without the images
    labels = load_dataset(
        args.dataset, split="train", streaming=True, columns=[args.label_column]
    )
    counts = torch.zeros(len(names), dtype=torch.long)
    for rows in split_dataset_by_node(labels, rank, processes).iter(batch_size=10_000):
        counts += torch.bincount(
            torch.tensor(rows[args.label_column]), minlength=len(names)
        )
    counts = accelerator.reduce(counts.to(device), "sum").cpu()

# With one seed for all: they divide one shuffled stream, whole files where the number of files can be divided.
stream = stream.cast_column(args.image_column, Image(decode=False)).shuffle(
    seed=0, buffer_size=args.buffer_size
)
share = split_dataset_by_node(stream, rank, processes)
side = decoding_side(classifier.image_processor)


def collate(rows):
    images = [read_image(row[args.image_column], min_side=side) for row in rows]
    batch = dict(classifier.image_processor(images=images, return_tensors="pt"))
    return batch | {"labels": torch.tensor([row[args.label_column] for row in rows])}


def in_step():
    """Batches of this process and the number of images in those of all; one that has no more repeats an image, without
    a label, for as long as another has."""
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
        images = accelerator.reduce(
            torch.tensor(len(new["labels"]) if new else 0, device=device), "sum"
        ).item()
        if not images:
            return
        yield {name: value.to(device) for name, value in batch.items()}, images


loader = DataLoader(
    share, args.batch_size, collate_fn=collate, num_workers=args.num_workers
)
first = islice(loader, math.ceil(args.prior_images / args.batch_size / processes))
parts = gather_object(
    [(classifier.embed(iter([batch])), batch["labels"]) for batch in first]
)
embeds, labels = (torch.cat(part) for part in zip(*parts, strict=True))
prior = choose_text_prior(embeds, labels, classifier.text_embeds, class_counts=counts)
accelerator.print(prior)

model = get_peft_model(classifier, SageConfig())
optimizer = torch.optim.AdamW(parameter_groups(model, args.lr))
start, per_epoch = (
    int(args.resume.rpartition("-")[2]) if args.resume else 0,
    int(counts.sum()),
)
seen = start * per_epoch
# By images, because the number of steps depends on how the files are divided.
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer,
    lambda _: (1 + math.cos(math.pi * min(1, seen / (args.epochs * per_epoch)))) / 2,
)
loss_function = SageLoss(counts, text_prior=prior.strength, reduction="sum")
model, optimizer = accelerator.prepare(model, optimizer)
accelerator.register_for_checkpointing(loss_function)  # its moving average
if args.resume:
    accelerator.load_state(args.resume)

model.train()
for epoch in range(start, args.epochs):
    share.set_epoch(epoch)  # another order
    for batch, images in tqdm(in_step(), desc=f"epoch {epoch + 1} of {args.epochs}"):
        losses = loss_function(
            model(pixel_values=batch["pixel_values"]), batch["labels"]
        )
        accelerator.backward(
            losses * processes / images
        )  # DDP divides by the processes
        optimizer.step()
        optimizer.zero_grad()
        seen += images
        schedule.step()
    accelerator.save_state(Path(args.output_dir, f"epoch-{epoch + 1}"))

if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(args.output_dir)
accelerator.wait_for_everyone()
accelerator.end_training()
