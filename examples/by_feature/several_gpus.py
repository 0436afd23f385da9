# SPDX-License-Identifier: Apache-2.0
"""Several GPUs, with Accelerate: each process trains on its share of a batch, and predictions are gathered.

accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/by_feature/several_gpus.py

Without GPUs: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/by_feature/several_gpus.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from demo import load, parse, report
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import CLIPVisionModelWithProjection

from peft_sage import (
    LongTailAccuracy,
    SageClassifier,
    SageConfig,
    SageLoss,
    parameter_groups,
)


args = parse(__doc__)
accelerator = Accelerator()
whole, splits, data = load(args)
counts = torch.as_tensor(data.class_counts())

# The texts are encoded, so the vision tower is enough: less to copy, and FSDP2 takes no scalars such as `logit_scale`.
vision = CLIPVisionModelWithProjection.from_pretrained(args.model, dtype=torch.float32)
model = get_peft_model(
    SageClassifier(vision, whole.text_embeds, whole.class_names), SageConfig()
)

model, optimizer, train, test = accelerator.prepare(
    model,
    torch.optim.AdamW(parameter_groups(model, args.lr)),
    DataLoader(splits["train"], args.batch_size, shuffle=True),
    DataLoader(splits["test"], 256),
)
loss_function = SageLoss(counts)  # it adds what it measures up over the processes
for _ in range(args.epochs):
    model.train()
    for batch in tqdm(train, desc="training"):
        loss = loss_function(model(pixel_values=batch["pixel_values"]), batch["labels"])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

model.eval()
accuracy = LongTailAccuracy(counts, sync_on_compute=False).to(accelerator.device)
for batch in test:
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
    accuracy.update(*accelerator.gather_for_metrics((logits, batch["labels"])))
scores = accuracy.compute()
if accelerator.is_main_process:
    report(
        f"{accelerator.num_processes} processes, {accelerator.distributed_type.value}",
        scores,
    )

state_dict = accelerator.get_state_dict(
    model
)  # by all processes, since some spread the weights
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, state_dict=state_dict
    )
accelerator.wait_for_everyone()
accelerator.end_training()
