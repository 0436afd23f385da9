# SPDX-License-Identifier: Apache-2.0
"""Learning rates: a head that starts from texts learns faster than the adapters below it."""

from typing import Any

from torch import nn

from .validation import check_number


def parameter_groups(
    model: nn.Module, lr: float, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for an optimizer: `torch.optim.AdamW(parameter_groups(model, 0.002))`.

    With Trainer: `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 0.002)), None))`.

    Args:
        model: A model with a `class_head`, wrapped or not.
        lr: Learning rate of everything but the head.
        head_lr: Learning rate of the `class_head`; 2.5 times `lr` when None.

    Raises:
        ValueError: A learning rate is not a number, at least 0, or nothing is trainable.
    """
    lr = check_number("lr", lr, 0)
    head_lr = 2.5 * lr if head_lr is None else check_number("head_lr", head_lr, 0)
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": rate} for rate in (lr, head_lr)
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["class_head" in name.split(".")]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("`model` must have trainable parameters, got none.")
    return groups
