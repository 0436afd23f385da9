# SPDX-License-Identifier: Apache-2.0
"""A folder of your own images, from the first line to the last, without any helper.

    photos/train/CLASS/*.jpg
    photos/test/CLASS/*.jpg

If there is only one folder a class, docs/own_data.md says how to part it.

python examples/by_feature/own_images.py --dataset photos --model openai/clip-vit-base-patch16 --lr 0.001
"""

import argparse

import torch
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from peft_sage import (
    LongTailAccuracy,
    SageClassifier,
    SageConfig,
    SageLoss,
    encode_class_descriptions,
    read_class_descriptions,
    templates,
)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", required=True)
parser.add_argument("--model", default="openai/clip-vit-base-patch16")
parser.add_argument("--output-dir", default="own_images")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=0.001)
args = parser.parse_args()
torch.manual_seed(0)

images = load_dataset("imagefolder", data_dir=args.dataset)
if not {"train", "test"} <= set(images):
    parser.error(f"`--dataset` must have the folders train/ and test/ with one folder a class, got {args.dataset!r}.")
class_label = images["train"].features["label"]
names = read_class_descriptions(class_label)
clip = AutoModel.from_pretrained(args.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(args.model)
processor = AutoImageProcessor.from_pretrained(args.model)


def collate(items):
    pixels = processor(images=[item["image"].convert("RGB") for item in items], return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([item["label"] for item in items])


embeddings = encode_class_descriptions(clip, tokenizer, names, templates.NATURAL)
config = SageConfig(class_descriptions=names, text_templates=templates.NATURAL)
model = get_peft_model(SageClassifier(clip, embeddings), config)
labels = images["train"]["label"][:]
loss_function = SageLoss.from_labels(labels, class_label.num_classes)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)

model.train()
for epoch in range(args.epochs):
    for pixel_values, targets in DataLoader(images["train"], args.batch_size, shuffle=True, collate_fn=collate):
        loss = loss_function(model(pixel_values=pixel_values), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
class_counts = torch.bincount(torch.tensor(labels), minlength=class_label.num_classes)
accuracy = LongTailAccuracy(class_counts)
with torch.no_grad():
    for pixel_values, targets in DataLoader(images["test"], args.batch_size, collate_fn=collate):
        accuracy.update(model(pixel_values=pixel_values).logits, targets)
results = accuracy.compute()
scores = {name: results[name].item() for name in ("overall", "macro", "many", "medium", "few", "worst")}
print(scores)

model.save_pretrained(args.output_dir)
