# SPDX-License-Identifier: Apache-2.0
"""Predict with a saved adapter, on a model that has no text tower: neither texts nor tokenizer are needed.

python examples/by_feature/predict.py finetuned photos/new
"""

import argparse
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection, logging

from peft_sage import SageClassifier


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="folder or Hub id")
parser.add_argument("images", nargs="+", help="files, or folders with nothing else in them")
parser.add_argument("--top", type=int, default=3, help="classes to show")
args = parser.parse_args()

logging.set_verbosity_error()  # the file's text tower is not loaded, and that is all right
config = PeftConfig.from_pretrained(args.adapter)
tower = CLIPVisionModelWithProjection.from_pretrained(config.base_model_name_or_path, dtype=torch.float32)
model = PeftModel.from_pretrained(SageClassifier(tower, config.num_classes), args.adapter).eval()
processor = AutoImageProcessor.from_pretrained(config.base_model_name_or_path)

paths = [sorted(path.iterdir()) if path.is_dir() else [path] for path in map(Path, args.images)]
for path in sum(paths, []):
    inputs = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
    with torch.inference_mode():
        probabilities = model(**inputs).logits[0].softmax(dim=-1)
    best = probabilities.topk(min(args.top, config.num_classes))
    answers = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    print(f"{path}: " + ", ".join(f"{config.class_names[k]} {100 * p:.1f} %" for k, p in answers))
