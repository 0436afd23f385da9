# SPDX-License-Identifier: Apache-2.0
"""LoRA in the attention together with Sage at the MLP: both are trained, and each is saved in its own folder.

python examples/by_feature/lora_and_sage.py                  # in the clone: the demo
python lora_and_sage.py --model openai/clip-vit-base-patch16 --dataset photos
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm

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
add("--batch-size", type=int, default=64, help="default: 64")
add("--lr", type=float, default=0.002, help="learning rate of the adapters")
add("--output-dir", type=Path, default=Path("lora_and_sage"), help="for both adapters")
args = parser.parse_args()

torch.manual_seed(0)
images = load_images(args.dataset)
train, test = (
    split.shuffle(seed=0).select(range(min(len(split), args.max_images)))
    for split in (images.train, images.test)
)
classifier = SageClassifier.from_texts(args.model, images.texts)
collate = ImageCollator(classifier.image_processor)
sage = get_peft_model(classifier, SageConfig(), adapter_name="semantic")

# The second PeftModel wraps the model inside the first; the pattern leaves the text tower alone.
lora_config = LoraConfig(r=8, target_modules=r".*vision_model.*\.(q_proj|v_proj)")
both = get_peft_model(sage.get_base_model(), lora_config, adapter_name="attention")
# It has frozen everything but its own adapter.
sage.set_adapter("semantic")
for name, parameter in both.named_parameters():
    if "lora_" in name:
        parameter.requires_grad_(True)

loss_function = SageLoss(images.class_counts)
optimizer = torch.optim.AdamW(parameter_groups(both, args.lr))
loader = DataLoader(train, args.batch_size, shuffle=True, collate_fn=collate)
both.train()
for epoch in range(args.epochs):
    for batch in tqdm(loader, desc=f"epoch {epoch + 1} of {args.epochs}"):
        labels = batch.pop("labels")
        loss_function(both(**batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

both.eval()
accuracy = LongTailAccuracy(images.class_counts)
for batch in DataLoader(test, 256, collate_fn=collate):
    labels = batch.pop("labels")
    with torch.no_grad():
        accuracy.update(both(**batch).logits, labels)
print(f"LoRA and Sage: macro {100 * accuracy.compute()['macro']:.1f}%")

sage.save_pretrained(args.output_dir, selected_adapters=["semantic"])
both.save_pretrained(args.output_dir, selected_adapters=["attention"])

again = SageClassifier.from_texts(args.model, images.texts)
again = PeftModel.from_pretrained(
    again, args.output_dir / "semantic", adapter_name="semantic"
)
loaded = PeftModel.from_pretrained(
    again.get_base_model(), args.output_dir / "attention", adapter_name="attention"
)
again.set_adapter("semantic")  # loading the second adapter has switched the head off
batch = collate(test["image"][:1])
with torch.no_grad():
    difference = loaded.eval()(**batch).logits - both(**batch).logits
print(f"loaded equals saved: {difference.abs().max() < 1e-4}")
