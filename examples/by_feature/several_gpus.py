# SPDX-License-Identifier: Apache-2.0
"""Several GPUs with Accelerate, for those who have a loop of their own (`SageTrainer` needs nothing but the launcher).

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/by_feature/several_gpus.py
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/by_feature/several_gpus.py        # without GPUs

Each process trains on its share of a batch, and predictions are gathered.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import CLIPVisionModelWithProjection

from peft_sage import (
    ImageCollator,
    LongTailAccuracy,
    SageClassifier,
    SageConfig,
    SageLoss,
    parameter_groups,
)
from peft_sage.data import load_images


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
add = parser.add_argument
add("--model", default="examples/emoji_lt/tiny-clip", help="folder or Hub id of a CLIP")
add("--dataset", default="examples/emoji_lt", help="folder, table or Hub id")
add("--max-images", type=int, default=10**9, help="at most this many images per split")
add("--epochs", type=int, default=2, help="default: 2")
add("--batch-size", type=int, default=64, help="per process (default: 64)")
add("--lr", type=float, default=0.002, help="learning rate of the adapters")
add("--output-dir", default="several_gpus", help="for the adapter and the head")
args = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator()
images = load_images(args.dataset)
train, test = (
    split.shuffle(seed=0).select(range(min(len(split), args.max_images)))
    for split in (images.train, images.test)
)

# The texts are encoded, so the vision tower is enough: less to copy, and FSDP2 takes no scalars such as `logit_scale`.
whole = SageClassifier.from_texts(args.model, images.texts)
vision = CLIPVisionModelWithProjection.from_pretrained(args.model, dtype=torch.float32)
classifier = SageClassifier(vision, whole.text_embeds, whole.class_names)
model = get_peft_model(classifier, SageConfig())

collate = ImageCollator(whole.image_processor)
model, optimizer, train_loader, test_loader = accelerator.prepare(
    model,
    torch.optim.AdamW(parameter_groups(model, args.lr)),
    DataLoader(train, args.batch_size, shuffle=True, collate_fn=collate),
    DataLoader(test, 256, collate_fn=collate),
)
loss_function = SageLoss(images.class_counts)  # sums its statistics over the processes
model.train()
for epoch in range(args.epochs):
    for batch in tqdm(train_loader, desc=f"epoch {epoch + 1} of {args.epochs}"):
        loss = loss_function(model(pixel_values=batch["pixel_values"]), batch["labels"])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

model.eval()
accuracy = LongTailAccuracy(images.class_counts, sync_on_compute=False)
accuracy = accuracy.to(accelerator.device)
for batch in test_loader:
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
    accuracy.update(*accelerator.gather_for_metrics((logits, batch["labels"])))
accelerator.print(
    f"{accelerator.num_processes} processes, {accelerator.distributed_type.value}: "
    f"macro {100 * accuracy.compute()['macro']:.1f}%"
)

# By all processes, since some strategies shard the weights.
state_dict = accelerator.get_state_dict(model)
if accelerator.is_main_process:
    trained = accelerator.unwrap_model(model)
    trained.save_pretrained(args.output_dir, state_dict=state_dict)
accelerator.wait_for_everyone()
accelerator.end_training()
