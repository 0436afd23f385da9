# SPDX-License-Identifier: Apache-2.0
"""Expected time and memory of each recipe on one GPU: an estimate, nothing was run.

    python benchmarks/paper/estimate.py

The operations of a training step and of a prediction, and the activations that a step keeps, are counted on the
recipe's model without weights (PyTorch's "meta" device). What is assumed are the flags: the GPU's speed, the share of
it that is reached, and how fast images are decoded. Time is that of the slower of computing and decoding.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from recipes import DATA, METHODS, MODELS, RECIPES, Recipe
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from peft_sage import SageClassifier, SageConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from finetune import parse_args  # noqa: E402


BATCH = 128
CONFIGS = {
    "b16": CLIPConfig(vision_config={"patch_size": 16}, projection_dim=512),
    "l14": CLIPConfig(
        text_config={
            "hidden_size": 768,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
        vision_config={
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "patch_size": 14,
        },
        projection_dim=768,
    ),
}


@dataclass(frozen=True)
class Cost:
    """What a recipe needs.

    Attributes:
        step: Floating-point operations of a training step, for an image.
        prediction: Those of a prediction, for an image.
        trained: Trained parameters, adapter and head.
        adapter: Those of the adapter alone.
        frozen: All other parameters.
        activations: Bytes that a step with 128 images keeps for the backward pass, in float16.
    """

    step: float
    prediction: float
    trained: int
    adapter: int
    frozen: int
    activations: int

    @property
    def memory(self) -> int:
        """Bytes: frozen weights in float32 and, for autocast, float16; four numbers a trained one; activations."""
        return 6 * self.frozen + 4 * 4 * self.trained + self.activations


def build(recipe: Recipe) -> PeftModel:
    """Return the model of a recipe, without weights."""
    with torch.device("meta"):
        clip = CLIPModel(CONFIGS[recipe.model])
    texts = torch.ones(DATA[recipe.data].classes, CONFIGS[recipe.model].projection_dim)
    guidance = (
        {"guidance": texts[: SageConfig.guidance_rows]}
        if recipe.method == "sage"
        else {"guidance_rows": 0}
    )
    config = SageConfig(r=recipe.r, modules_to_save=["class_head"], **guidance)
    return get_peft_model(SageClassifier(clip, texts), config).to("meta").half()


@cache
def cost(recipe: Recipe) -> Cost:
    """Count what a recipe needs."""
    model = build(recipe)
    images = torch.empty(BATCH, 3, 224, 224, dtype=torch.float16, device="meta")
    weights = {id(parameter) for parameter in model.parameters()}
    tokens = model.get_base_model().model.vision_model.embeddings.num_positions
    attention = [
        (tokens, tokens),
        (BATCH * tokens, min(SageConfig.guidance_rows, DATA[recipe.data].classes)),
    ]
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # The weights are there anyway, and a GPU's fused attention keeps no matrix of weights. Views share a storage.
        if id(tensor) not in weights and tensor.shape[-2:] not in attention:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
        return tensor

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(pixel_values=images)
    with (
        FlopCounterMode(display=False) as step,
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(pixel_values=images).logits.sum().backward()
    trained = {
        name: p.numel() for name, p in model.named_parameters() if p.requires_grad
    }
    return Cost(
        step=step.get_total_flops() / BATCH,
        prediction=forward.get_total_flops() / BATCH,
        trained=sum(trained.values()),
        adapter=sum(count for name, count in trained.items() if "peft_sage_" in name),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        activations=sum(storage.nbytes() for storage in kept.values()),
    )


def hours(
    recipe: Recipe, tflops: float, utilisation: float, images_per_second: float
) -> float:
    """Return the expected duration.

    Args:
        recipe: The recipe.
        tflops: 10^12 operations a second of the GPU in float16.
        utilisation: Share of them that is reached.
        images_per_second: Images that all worker processes together decode.
    """
    args = parse_args(recipe.flags)
    data, needs = DATA[recipe.data], cost(recipe)
    # Training; the test set before, after, and with the saved files; once for the text prior.
    phases = [
        (args.epochs * data.train_images, needs.step),
        (3 * data.test_images, args.test_crops * needs.prediction),
        (data.train_images if recipe.method == "sage" else 0, needs.prediction),
    ]
    speed = tflops * 1e12 * utilisation
    return (
        sum(
            images * max(operations / speed, 1 / images_per_second)
            for images, operations in phases
        )
        / 3600
    )


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=312.0,
        help="of the GPU, dense float16; 312: NVIDIA A100",
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.3, help="share of them that is reached"
    )
    parser.add_argument(
        "--images-per-second",
        type=float,
        default=800.0,
        help="decoded by all workers together",
    )
    args = parser.parse_args(argv)
    print(
        f"Estimates for one GPU of {args.tflops:g} TFLOP/s in float16, {100 * args.utilisation:g} % of which are "
        f"reached, and {args.images_per_second:g} decoded images a second; {BATCH} images a step. Not measured.\n"
    )
    print(
        "| data | CLIP | method | r | adapter + head parameters | GFLOP an image, training | hours | GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for recipe in RECIPES:
        needs = cost(recipe)
        duration = hours(recipe, args.tflops, args.utilisation, args.images_per_second)
        cells = [
            DATA[recipe.data].title,
            MODELS[recipe.model].title,
            METHODS[recipe.method],
            str(recipe.r),
            f"{needs.adapter:,} + {needs.trained - needs.adapter:,}",
            f"{needs.step / 1e9:.0f}",
            f"{duration:.1f}",
            f"{needs.memory / 2**30:.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
