# SPDX-License-Identifier: Apache-2.0
"""What each process of a distributed test does: `[torchrun] -m tests.distributed_job FOLDER JOB...`."""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Trainer,
    TrainingArguments,
)

from peft_sage import (
    LongTailAccuracy,
    LongTailCallback,
    SageClassifier,
    SageConfig,
    SageLoss,
    SageTrainer,
    SageTrainingArguments,
    parameter_groups,
)
from tests.conftest import VISION, tiny_clip


COUNTS = [12, 6, 3]
GLOBAL_BATCH = 8


def make_data(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return [
        {"index": i, "pixel_values": image, "labels": i % 3}
        for i, image in enumerate(images)
    ]


def make_model() -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    classifier = SageClassifier(tiny_clip(), torch.randn(3, 16, generator=generator))
    guidance = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
    return get_peft_model(
        classifier, SageConfig(guidance=guidance, modules_to_save=["class_head"])
    )


def make_vision_model() -> PeftModel:
    """Without CLIP's `logit_scale`: DeepSpeed takes no scalars."""
    torch.manual_seed(0)
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**VISION, projection_dim=16)
    )
    config = SageConfig(guidance=torch.randn(3, 24), modules_to_save=["class_head"])
    return get_peft_model(SageClassifier(vision, torch.randn(3, 16)), config)


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = DataLoader(make_data(32), batch_size=GLOBAL_BATCH)
    return [(batch["pixel_values"], batch["labels"]) for batch in loader]


class LossOfOneProcess(SageLoss):
    """The reference, which each process computes for itself."""

    def forward(self, *args):
        with mock.patch.object(dist, "get_world_size", lambda: 1):
            return super().forward(*args)


def train(folder: Path) -> None:
    """The same global batches whatever the number of processes; then a state round trip."""
    accelerator = Accelerator(
        cpu=True,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
    )
    model = make_model()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2
    )
    loader = DataLoader(
        make_data(32), batch_size=GLOBAL_BATCH // accelerator.num_processes
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss = SageLoss(COUNTS)
    accelerator.register_for_checkpointing(loss)

    def epoch() -> None:
        for batch in loader:
            accelerator.backward(
                loss(model(pixel_values=batch["pixel_values"]), batch["labels"])
            )
            optimizer.step()
            optimizer.zero_grad()

    epoch()
    accelerator.save_state(str(folder / "state"))
    epoch()
    after = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    accelerator.load_state(str(folder / "state"))
    epoch()
    again = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(again, after)

    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        folder / "adapter", is_main_process=accelerator.is_main_process
    )


def train_by_trainer(folder: Path) -> None:
    """Four steps of two micro-batches in float64, resumed where the folder holds a checkpoint."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    model = make_model().double()
    data = make_data(64)
    embeds = torch.randn(64, 16, generator=torch.Generator().manual_seed(6))
    for k, (item, embed) in enumerate(zip(data, embeds.double(), strict=True)):
        # Whole shares of a process too.
        ignored = k % 5 == 0 or 16 <= k < 21
        item["labels"] = -100 if ignored else item["labels"]
        item["pixel_values"] = item["pixel_values"].double()
        item["base_image_embeds"] = embed
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        max_grad_norm=0,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
    )
    loss = SageLoss(COUNTS, text_prior=0.5, text_guidance=0.3)
    callback = LongTailCallback(loss, COUNTS)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.05), momentum=0.9)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        compute_loss_func=loss,
        callbacks=[callback],
        optimizers=(optimizer, None),
    )
    half = folder / "checkpoint-2"
    trainer.train(resume_from_checkpoint=str(half) if half.exists() else None)
    if trainer.is_world_process_zero():
        logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        result = get_peft_model_state_dict(model), loss.state_dict(), logged
        torch.save(result, folder / "run.pt")


def loss_outputs(step: int) -> tuple[dict, torch.Tensor]:
    """A batch of 13 images of 3 classes, as a classifier in training mode returns it, in float64."""
    generator = torch.Generator().manual_seed(step)
    images, rows = (
        torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (13, 3)
    )
    labels = torch.randint(0, 3, (13,), generator=generator)
    return {
        "logits": images @ rows.T,
        "image_embeds": images,
        "class_embeds": rows,
        "logit_scale": 1.0,
    }, labels


def loss_of_parts(folder: Path) -> None:
    """The losses of each image, with 7 images in one process and 6 in the other; then 13 in the other alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    processes = dist.get_world_size()
    function = SageLoss(COUNTS, reduction="none")
    losses = []
    accuracy = LongTailAccuracy(COUNTS)
    for step, kind in enumerate(["shared"] * 3 + ["soft", "ignored", "empty"]):
        outputs, labels = loss_outputs(step)
        part = slice(None)
        if kind == "shared":
            part = slice(rank, None, processes)
            accuracy.update(outputs["logits"][part], labels[part])
        elif kind == "empty" and rank == 0:
            part = slice(0)
        mine = {name: outputs[name][part] for name in ("logits", "image_embeds")}
        labels = labels[part]
        if kind == "soft" and rank == 0:
            labels = F.one_hot(labels, 3).double()
        if kind == "ignored" and rank == 0:
            labels = torch.full_like(labels, -100)
        losses.append(function(outputs | mine, labels))
    result = losses, function.state_dict(), accuracy.compute()
    torch.save(result, folder / f"loss{rank}.pt")


def make_trainer(folder: Path, batch_size: int, **kwargs) -> SageTrainer:
    arguments = SageTrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=batch_size,
        learning_rate=0.05,
        optim="sgd",  # Adam makes much of rounding
        text_prior=0.3,
        choose_adapter_scale=False,
        use_cpu=True,
        **kwargs,
    )
    if arguments.fsdp:
        # On what it knows to be CPUs, Accelerate leaves it out.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    data = make_data(32)
    return SageTrainer(make_vision_model(), arguments, data, data)


def fsdp2(folder: Path) -> None:
    blocks = {"transformer_layer_cls_to_wrap": ["CLIPEncoderLayer"]}
    trainer = make_trainer(folder, 4, fsdp=True, fsdp_config=blocks)
    trainer.train()
    assert all(isinstance(weight, DTensor) for weight in trainer.model.parameters())
    logits = torch.as_tensor(trainer.predict(trainer.eval_dataset).predictions)
    trainer.save_model(str(folder / "fsdp2"))
    if trainer.is_world_process_zero():
        torch.save(logits, folder / "fsdp2.pt")


def deepspeed(folder: Path) -> None:
    """Gradients and optimiser states spread by ZeRO stage 2, against the whole model on the whole batch."""
    from deepspeed import init_distributed, initialize

    init_distributed("gloo")
    rank = dist.get_rank()
    processes = dist.get_world_size()
    spread = make_vision_model()
    whole = make_vision_model()
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        for m in (spread, whole)
    ]
    settings = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // processes,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    engine, *_ = initialize(model=spread, optimizer=optimizers[0], config=settings)
    loss = SageLoss(COUNTS)
    alone = LossOfOneProcess(COUNTS)
    batches = make_batches()
    for images, labels in batches:
        engine.backward(
            loss(engine(pixel_values=images[rank::processes]), labels[rank::processes])
        )
        engine.step()
        alone(whole(pixel_values=images), labels).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    if rank == 0:
        states = [
            get_peft_model_state_dict(model)
            for model in (spread, whole, make_vision_model())
        ]
        torch.save((engine.zero_optimization_stage(), states), folder / "deepspeed.pt")


if __name__ == "__main__":
    jobs = {
        "train": train,
        "trainer": train_by_trainer,
        "loss": loss_of_parts,
        "fsdp2": fsdp2,
        "deepspeed": deepspeed,
    }
    for job in sys.argv[2:]:
        jobs[job](Path(sys.argv[1]))
    if dist.is_initialized():
        dist.barrier()
        # Everything is written. Taking the process groups apart now and then aborts a process ("terminate called
        # without an active exception"), when PyTorch's own threads are still there.
        os._exit(0)
