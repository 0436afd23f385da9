# SPDX-License-Identifier: Apache-2.0
"""Prints the zero-shot accuracy of a CLIP model on a split of Emoji-LT.

    python evaluate_zero_shot.py --split test

The class embedding is the normalised mean of the embeddings of the class's descriptions. Groups of classes are those
of the long-tail field, by training images: many > 100, medium 20 to 100, few < 20. Intervals are bootstrapped over
concepts, since drawings of one concept are not independent.
"""

import argparse
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel


HERE = Path(__file__).parent


def decode(data: bytes) -> np.ndarray:
    """Decodes an image to (h, w, 3) uint8, on white."""
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def class_names_of(path: Path) -> list[str]:
    """Reads the class names from the features that `datasets` stored in a parquet file."""
    metadata = json.loads(pq.read_schema(path).metadata[b"huggingface"])
    return metadata["info"]["features"]["label"]["names"]


@torch.no_grad()
def encode_classes(
    model: CLIPModel, tokenizer: AutoTokenizer, descriptions: list[list[str]]
) -> Tensor:
    """Returns the class embeddings (K, e), normalised means over the texts of a class."""
    rows = []
    for texts in descriptions:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        pooled = model.text_model(**batch).pooler_output
        rows.append(F.normalize(model.text_projection(pooled), dim=-1).mean(0))
    return F.normalize(torch.stack(rows), dim=-1)


@torch.no_grad()
def encode_images(model: CLIPModel, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Returns normalised image embeddings (n, e)."""
    parts = [
        model.visual_projection(model.vision_model(part).pooler_output)
        for part in pixels.split(batch_size)
    ]
    return F.normalize(torch.cat(parts), dim=-1)


def group_accuracy(
    logits: Tensor, labels: Tensor, counts: Tensor | None = None
) -> dict[str, float]:
    """Computes accuracies in percent.

    Args:
        logits: (n, K).
        labels: (n,).
        counts: Training images of every class (K,), for many, medium and few.

    Returns:
        overall, macro, top5 (macro as well) and, with `counts`, many, medium and few. Classes without images do not
        count.
    """
    top = logits.topk(5, dim=-1).indices
    hit = (top[:, 0] == labels).float()
    hit5 = (top == labels[:, None]).any(-1).float()
    present = labels.unique()
    per_class = torch.stack([hit[labels == label].mean() for label in present])
    per_class5 = torch.stack([hit5[labels == label].mean() for label in present])
    result = {
        "overall": hit.mean(),
        "macro": per_class.mean(),
        "top5": per_class5.mean(),
    }
    if counts is not None:
        size = counts[present]
        groups = {
            "many": size > 100,
            "medium": (size >= 20) & (size <= 100),
            "few": size < 20,
        }
        result.update(
            {name: per_class[members].mean() for name, members in groups.items()}
        )
    return {name: 100 * value.item() for name, value in result.items()}


def bootstrap_macro(
    logits: Tensor, labels: Tensor, concepts: list[str], rounds: int, seed: int
) -> tuple[float, float]:
    """Returns the 95 % interval of macro accuracy, concepts redrawn within every class."""
    rng = np.random.default_rng(seed)
    hit = (logits.argmax(-1) == labels).double().numpy()
    groups: dict[int, dict[str, list[float]]] = {}
    for value, label, concept in zip(hit, labels.tolist(), concepts, strict=True):
        groups.setdefault(label, {}).setdefault(concept, []).append(value)
    totals = np.zeros(rounds)
    for members in groups.values():
        sums = np.array([(sum(values), len(values)) for values in members.values()])
        drawn = sums[rng.integers(len(sums), size=(rounds, len(sums)))].sum(1)
        totals += drawn[:, 0] / drawn[:, 1]
    low, high = np.percentile(100 * totals / len(groups), (2.5, 97.5))
    return float(low), float(high)


def main() -> None:
    """Evaluates from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=str(HERE / "tiny-clip"),
        help="CLIP model, a folder or a Hub id",
    )
    parser.add_argument(
        "--split",
        default="validation",
        help="train, validation or test, or a parquet file",
    )
    parser.add_argument("--descriptions", type=Path, default=HERE / "descriptions.json")
    args = parser.parse_args()
    path = (
        Path(args.split)
        if args.split.endswith(".parquet")
        else HERE / f"{args.split}.parquet"
    )

    model = CLIPModel.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    processor = AutoImageProcessor.from_pretrained(args.model)
    names = class_names_of(path)
    texts = json.loads(args.descriptions.read_text(encoding="utf-8"))
    classes = encode_classes(
        model, tokenizer, [[t] if isinstance(t := texts[n], str) else t for n in names]
    )
    table = pq.read_table(path)
    images = [
        Image.fromarray(decode(row["bytes"])) for row in table["image"].to_pylist()
    ]
    labels = torch.tensor(table["label"].to_pylist())
    train = torch.tensor(
        pq.read_table(HERE / "train.parquet", columns=["label"])["label"].to_pylist()
    )
    logits = (
        encode_images(model, processor(images, return_tensors="pt")["pixel_values"])
        @ classes.T
    )
    result = group_accuracy(logits, labels, train.bincount(minlength=len(names)))
    low, high = bootstrap_macro(logits, labels, table["concept"].to_pylist(), 2000, 0)
    print(f"{path.stem}: {len(labels)} images, {len(labels.unique())} classes")
    print(
        "| macro | 95 % interval | top-5 | many | medium | few | overall |\n|---|---|---|---|---|---|---|"
    )
    shown = [
        f"{result[key]:.1f}"
        for key in ("macro", "top5", "many", "medium", "few", "overall")
    ]
    print("| " + " | ".join([shown[0], f"{low:.1f} to {high:.1f}", *shown[1:]]) + " |")


if __name__ == "__main__":
    main()
