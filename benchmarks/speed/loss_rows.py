# SPDX-License-Identifier: Apache-2.0
"""`SageLoss` against `F.cross_entropy`, and `estimate_mismatch` against reading the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from settings import Measurement, Row, Settings
from timing import interleaved, row

from peft_sage import SageLoss, estimate_mismatch


LOSS_GOAL = 1.15
MISMATCH_GOAL = 2.0


def loss(settings: Settings) -> Measurement:
    """Time of forward and backward, and what is kept between them."""
    batch, num_classes = settings.loss_shape
    torch.manual_seed(0)
    logits = torch.randn(batch, num_classes, device=settings.device).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, num_classes, (batch,), device=settings.device)
    sage = SageLoss(torch.randint(1, 1000, (num_classes,))).to(settings.device)
    functions = {"sage": sage, "cross-entropy": F.cross_entropy}

    def forward_backward(name: str) -> None:
        logits.grad = None
        functions[name](logits, labels).backward()

    seconds = interleaved({name: lambda name=name: forward_backward(name) for name in functions}, settings)
    kept = {name: _bytes_kept(lambda name=name: functions[name](logits, labels)) for name in functions}
    size = f"B = {batch}, C = {num_classes:,}, bfloat16 logits"
    ratio = kept["sage"] / kept["cross-entropy"]
    return [
        row(
            f"`SageLoss` forward + backward / `F.cross_entropy`, {size}",
            seconds["sage"] / seconds["cross-entropy"],
            LOSS_GOAL,
        ),
        Row(f"bytes kept for the backward pass / `F.cross_entropy`'s, {size}", ratio, ratio, ratio, 1.01),
    ], []


def mismatch(settings: Settings) -> Measurement:
    """`estimate_mismatch` over one pass over the features, which a sum of all of them is."""
    images, width, num_classes = settings.features
    torch.manual_seed(0)
    features = torch.randn(images, width, device=settings.device)
    labels = torch.randint(0, num_classes, (images,), device=settings.device)
    runs = {
        "estimate": lambda: estimate_mismatch(features, labels, num_classes, scale=25.0),
        "pass": lambda: features.sum(),
    }
    seconds = interleaved(runs, settings)
    what = f"`estimate_mismatch`, {images:,} x {width} features, {num_classes:,} classes / one pass over the features"
    speed = features.nbytes / 1e9 / float(torch.tensor(seconds["pass"]).median())
    return [row(what, seconds["estimate"] / seconds["pass"], MISMATCH_GOAL, note=f"a pass reads {speed:.1f} GB/s")], []


def _bytes_kept(forward: object) -> int:
    """Return the bytes of all tensors that autograd keeps, the logits among them where it keeps those."""
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storages.values())
