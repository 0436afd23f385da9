# SPDX-License-Identifier: Apache-2.0
"""What each process does for the tests of the classifier: `torchrun -m tests.classifier_job FOLDER`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from peft_sage import SageClassifier, SageConfig
from tests.conftest import tiny_clip


KINDS = ["sage", "lora", "head", "plain"]


class OpenClipLayout(nn.Module):
    """A tower with the interface of open_clip, whose `encode_image` takes no further arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = tiny_clip()

    def encode_image(self, image: torch.Tensor, normalize: bool = False):
        features = self.visual.get_image_features(image).pooler_output
        return F.normalize(features, dim=-1) if normalize else features


def make_model(kind: str, tower: nn.Module | None = None) -> nn.Module:
    classifier = SageClassifier(tower or tiny_clip(), torch.eye(3, 16))
    configs = {
        "sage": SageConfig(),
        "lora": LoraConfig(
            target_modules=r".*vision_model.*q_proj", modules_to_save=["class_head"]
        ),
        "head": SageConfig(target_modules=[]),
    }
    torch.manual_seed(0)
    return get_peft_model(classifier, configs[kind]) if kind in configs else classifier


def make_images(count: int = 10) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(images)]


def trained_step(
    model: nn.Module, folder: Path, data: list[dict], **arguments
) -> tuple[float, list]:
    """The logged loss of one step of Trainer over all images, and the trained parameters after it."""
    args = TrainingArguments(
        str(folder),
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1.0)
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        optimizers=(
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1),
        ),
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], [p.detach().cpu() for p in parameters]


def by_hand(model: nn.Module, data: list[dict]) -> tuple[float, list]:
    """The same by autograd, over the whole batch."""
    images = torch.stack([item["pixel_values"] for item in data])
    labels = torch.stack([torch.as_tensor(item["labels"]) for item in data])
    loss = F.cross_entropy(model(pixel_values=images).logits, labels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, gradients, strict=True)
    moved = [p.detach() if g is None else (p - g).detach() for p, g in pairs]
    return loss.item(), moved


def own_loss(folder: Path) -> None:
    """One step of each kind: two processes of two micro-batches each."""
    for kind in KINDS:
        result = trained_step(
            make_model(kind),
            folder,
            make_images(12),
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            data_seed=0,
            ddp_find_unused_parameters=kind == "plain",
        )
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{kind}.pt")


def sharded_head(folder: Path) -> None:
    """FSDP2 with PEFT's own choice of units, which takes the head for one."""
    rank = dist.get_rank()
    processes = dist.get_world_size()
    sharded = make_model("sage")
    whole = make_model("sage")
    mesh = init_device_mesh("cpu", (processes,))
    units = []
    policy = fsdp_auto_wrap_policy(sharded)
    for name, module in sharded.named_modules():
        if name and policy(module, recurse=False, nonwrapped_numel=0):
            units.append(name)
            fully_shard(module, mesh=mesh)
    scalars = {p for p in sharded.parameters() if p.ndim == 0}
    fully_shard(sharded, mesh=mesh, ignored_params=scalars)
    data = make_images(8)
    images = torch.stack([item["pixel_values"] for item in data])
    labels = torch.tensor([item["labels"] for item in data])
    gradients = []
    for model, part in ((sharded, slice(rank, None, processes)), (whole, slice(None))):
        output = model(pixel_values=images[part])
        # The rows are used outside of the head, as by SageLoss.
        pull = (output.class_embeds * output.text_embeds).sum()
        (F.cross_entropy(output.logits, labels[part]) + pull).backward()
        weight: torch.Tensor = model.get_base_model().head.weight.grad
        gradients.append(getattr(weight, "full_tensor", lambda w=weight: w)())
    if rank == 0:
        torch.save((units, gradients), folder / "sharded.pt")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    own_loss(Path(sys.argv[1]))
    sharded_head(Path(sys.argv[1]))
    dist.barrier()
    os._exit(0)
