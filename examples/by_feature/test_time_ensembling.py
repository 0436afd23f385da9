# SPDX-License-Identifier: Apache-2.0
"""Test-time ensembling: the mean of the logits over five crops, as in LIFT (224 in an image of 248).

python examples/by_feature/test_time_ensembling.py
"""

import torch
import torch.nn.functional as F
from demo import evaluate, load, parse, report, train
from peft import get_peft_model
from torch import nn

from peft_sage import SageConfig, SageLoss


class FiveCrops(nn.Module):
    """Scales an image up by 248 / 224 and averages the logits of its centre and its four corners."""

    def __init__(self, model: nn.Module, ratio: float = 248 / 224) -> None:
        super().__init__()
        self.model = model
        self.ratio = ratio

    def forward(self, pixel_values: torch.Tensor):
        size = pixel_values.shape[-1]
        large = round(self.ratio * size)
        margin = large - size
        # On real photographs, resize the original: the processor's output has lost what is enlarged here.
        images = F.interpolate(pixel_values, (large, large), mode="bicubic")
        corners = [(0, 0), (0, margin), (margin, 0), (margin, margin), (margin // 2, margin // 2)]
        crops = [images[..., top : top + size, left : left + size] for top, left in corners]
        outputs = self.model(pixel_values=torch.cat(crops))
        outputs.logits = outputs.logits.unflatten(0, (len(crops), -1)).mean(dim=0)
        return outputs


if __name__ == "__main__":
    args = parse(__doc__)
    demo = load(args)
    config = SageConfig(class_descriptions=demo.descriptions, modules_to_save=["class_head"])
    model = get_peft_model(demo.classifier(), config)
    train(model, demo.splits["train"], SageLoss(demo.class_counts), args)
    report("one crop", evaluate(model, demo.splits["test"], demo.class_counts))
    report("five crops", evaluate(FiveCrops(model), demo.splits["test"], demo.class_counts))
