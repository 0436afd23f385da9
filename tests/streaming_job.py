# SPDX-License-Identifier: Apache-2.0
"""Runs of the streaming example, and what each process trained on: `accelerate launch tests/streaming_job.py JSON`."""

import json
import os
import runpy
import sys
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator

from peft_sage import SageClassifier, SageLoss


SCRIPT = Path(__file__).parents[1] / "examples" / "by_feature" / "streaming.py"
#: For each epoch the images, by the value of their first pixel, with their labels.
seen: list[list] = []


def watch(
    owner: type,
    method: str,
    note,
) -> None:
    original = getattr(owner, method)

    def watched(self, *args, **kwargs):
        note(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(owner, method, watched)


def note_images(classifier, pixel_values):
    if classifier.training:
        processor = classifier.image_processor
        std = processor.image_std[0]
        mean = processor.image_mean[0]
        red = pixel_values[:, 0, 0, 0] * std + mean
        seen[-1].append((red * 255).round().int().tolist())


def note_labels(
    loss,
    outputs,
    labels,
):
    pairs = zip(seen[-1].pop(), labels.tolist(), strict=True)
    seen[-1].append([list(pair) for pair in pairs])


if __name__ == "__main__":
    watch(datasets.IterableDataset, "set_epoch", lambda *_: seen.append([]))
    watch(SageClassifier, "forward", note_images)
    watch(SageLoss, "forward", note_labels)
    # The runs of a process share its group.
    Accelerator.end_training = lambda accelerator: None
    for arguments in json.loads(sys.argv[1]):
        seen.clear()
        sys.argv = [str(SCRIPT), *arguments]
        names = runpy.run_path(str(SCRIPT), run_name="__main__")
        parameters = names["classifier"].named_parameters()
        weights = {name: p.detach() for name, p in parameters if p.requires_grad}
        found = (seen, weights, names["counts"], names["prior"].strength)
        torch.save(found, names["args"].output_dir / f"seen{names['rank']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # As in `distributed_job.py`.
        os._exit(0)
