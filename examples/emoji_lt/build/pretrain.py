# SPDX-License-Identifier: Apache-2.0
"""Pretrains the tiny CLIP on what `pretraining_data.py` packed: image tower, text tower, or both joined.

    python pretrain.py vision --archive ARCHIVE --output vision.pt
    python pretrain.py text   --archive ARCHIVE --output text.pt       # independent of the first
    python pretrain.py join   --archive ARCHIVE --vision vision.pt --text text.pt --output tiny-clip

The image tower learns to match frozen sentence embeddings of captions, mapped into CLIP's space by a slowly learnt
linear map; the text tower learns to reproduce the same sentence embeddings. Training only looks at `validation`.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from archive import Archive, views
from datasets import load_dataset
from text_tower import build_tokenizer, tokenize
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from peft_sage import LongTailAccuracy


EMOJI_LT = Path(__file__).resolve().parents[1]
CONTEXT = 48
EMBEDDING = 128
SENTENCE = 384
VOCABULARY = 4000
NEGATIVES = 1500
LOG_EVERY = 100
GEOMETRY = {
    "size": {"height": 48, "width": 48},
    "do_center_crop": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}


def new_model(tokenizer: CLIPTokenizer | None = None) -> CLIPModel:
    """Return the tiny CLIP with random weights."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "gelu",
    }
    if tokenizer:
        text["vocab_size"] = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            text[name] = getattr(tokenizer, name)
    vision = {
        "image_size": 48,
        "patch_size": 8,
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=EMBEDDING
    )
    return CLIPModel(config)


def descriptions() -> dict[str, list[str]]:
    """Read the texts of the classes."""
    return json.loads((EMOJI_LT / "descriptions.json").read_text(encoding="utf-8"))


def encode_images(
    model: CLIPModel,
    pixels: Tensor,
    keep: float = 1.0,
) -> Tensor:
    """Encode images from a random share `keep` of their patches as unit embeddings (n, 128)."""
    vision = model.vision_model
    with torch.autocast(pixels.device.type, torch.bfloat16):
        tokens = vision.embeddings(pixels)
        if keep < 1:
            n, length, width = tokens.shape
            order = torch.rand(n, length - 1, device=tokens.device).argsort(dim=1) + 1
            chosen = order[:, : int((length - 1) * keep), None]
            kept = tokens.gather(1, chosen.expand(-1, -1, width))
            tokens = torch.cat([tokens[:, :1], kept], dim=1)
        hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(tokens))
        pooled = vision.post_layernorm(hidden.last_hidden_state[:, 0])
        encoded = model.visual_projection(pooled)
    return F.normalize(encoded.float(), dim=-1)


def principal_map(embeddings: Tensor) -> Tensor:
    """Return the leading principal directions (128, 384) of embeddings (n, 384)."""
    centred = embeddings - embeddings.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors
    return directions.flip(1)[:, :EMBEDDING].T.contiguous()


class Validation:
    """Zero-shot macro accuracy on the validation split, with the frozen sentence encoder for the texts."""

    def __init__(self, archive: Archive, device: torch.device) -> None:
        emoji = load_dataset(str(EMOJI_LT))
        images = emoji["validation"].with_format("numpy")
        pixels = np.stack([image[..., :3] for image in images["image"]])
        pixels = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
        self.pixels = pixels.float() / 127.5 - 1
        self.labels = torch.tensor(emoji["validation"]["label"][:])
        self.counts = torch.tensor(emoji["train"]["label"][:]).bincount()
        row = {text: i for i, text in enumerate(archive.texts)}
        texts = descriptions().values()
        self.embeddings = [archive.embeddings[[row[t] for t in ts]] for ts in texts]

    @torch.no_grad()
    def macro(self, model: CLIPModel, mapping: Tensor) -> float:
        """Return the accuracy in percent, `mapping` (128, 384) applied to sentence embeddings."""
        mapped = [F.normalize(rows @ mapping.T, dim=-1) for rows in self.embeddings]
        classes = torch.stack([F.normalize(rows.mean(0), dim=-1) for rows in mapped])
        logits = encode_images(model, self.pixels) @ classes.T
        accuracy = LongTailAccuracy(self.counts)
        accuracy.update(logits.cpu(), self.labels)
        return 100 * float(accuracy.compute()["macro"])


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """Count steps, with a warm-up over 3% of them and then a cosine to zero."""

    def factor(step: int) -> float:
        warm_up = step / steps / 0.03
        return min(warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in trange(steps):
        yield step
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def train_vision(args: argparse.Namespace, device: torch.device) -> None:
    """Train the image tower and the map against frozen sentence embeddings."""
    archive = Archive(args.archive, device)
    validation = Validation(archive, device)
    rng = np.random.default_rng(args.seed)
    model = new_model().to(device)
    mapping = nn.Parameter(principal_map(archive.embeddings[: archive.caption_rows]))
    scale = nn.Parameter(torch.tensor(math.log(10.0), device=device))
    tower = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    groups = [
        {"params": [p for p in tower if p.ndim > 1], "weight_decay": 0.1},
        {"params": [*(p for p in tower if p.ndim <= 1), scale]},
        {"params": [mapping], "lr": args.lr * 0.1},
    ]
    options = {
        "lr": args.lr,
        "betas": (0.9, 0.98),
        "weight_decay": 0.0,
    }
    optimizer = torch.optim.AdamW(groups, fused=True, **options)
    drawn = np.concatenate([archive.drawn_emoji, archive.drawn_icons])
    for step in schedule(optimizer, args.steps):
        rows, concepts = archive.batch(args.batch_size, args.icon_share, rng)
        others = rng.choice(drawn, NEGATIVES, replace=False)
        others = torch.from_numpy(others).to(device)
        bank = torch.cat([concepts, others[~torch.isin(others, concepts)]])
        captions = archive.centres[bank]
        progress = step / args.steps
        share = args.scene_share * min(1.0, 2 * progress)
        keep = args.keep if progress < 0.85 else 1.0
        images = encode_images(model, views(archive, rows, share, 48), keep)

        # Against the captions: mostly the image's own, a fifth spread over similar ones.
        own = F.one_hot(torch.arange(len(concepts), device=device), len(bank))
        similar = F.softmax(20 * archive.centres[concepts] @ captions.T, dim=-1)
        targets = (0.8 * own + 0.2 * similar).repeat(2, 1)
        mapped = F.normalize(captions @ mapping.T, dim=-1)
        logits = scale.exp().clamp(max=60) * images @ mapped.T
        loss = F.cross_entropy(logits, targets)
        # Between the two views of each concept.
        first, second = images.chunk(2)
        between = 10 * first @ second.T
        same = torch.arange(len(first), device=device)
        mutual = F.cross_entropy(between, same) + F.cross_entropy(between.T, same)
        (loss + 0.15 * mutual).backward()
        nn.utils.clip_grad_norm_(tower, 1.0)
        if (step + 1) % LOG_EVERY == 0:
            macro = validation.macro(model, mapping.detach())
            print(f"step {step + 1}: loss {loss:.3f}, validation {macro:.1f}")
    state = {"model": model.state_dict(), "mapping": mapping.data.cpu()}
    torch.save({**state, "scale": scale.exp().clamp(max=60).item()}, args.output)


def train_text(args: argparse.Namespace, device: torch.device) -> None:
    """Train the text tower to reproduce the sentence embeddings."""
    archive = Archive(args.archive, device)
    tokenizer = build_tokenizer(archive.texts, VOCABULARY, CONTEXT)
    model = new_model(tokenizer).to(device)
    ids = tokenize(tokenizer, archive.texts, CONTEXT).to(device)
    lengths = (ids != tokenizer.pad_token_id).sum(1) + 1
    head = nn.Linear(model.config.text_config.hidden_size, SENTENCE, bias=False)
    head = head.to(device)
    embeddings = F.normalize(archive.embeddings, dim=-1)
    important = important_rows(archive).to(device)
    parameters = [*model.text_model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98))
    for step in schedule(optimizer, args.steps):
        rows = torch.randint(len(ids), (args.batch_size,), device=device)
        quarter = args.batch_size // 4
        chosen = torch.randint(len(important), (quarter,), device=device)
        rows[:quarter] = important[chosen]
        # Texts of like length together, so that little is padding.
        for part in rows[lengths[rows].argsort()].chunk(4):
            tokens = ids[part, : int(lengths[part].max())]
            with torch.autocast(device.type, torch.bfloat16):
                out = head(model.text_model(input_ids=tokens).pooler_output)
            cosines = F.normalize(out.float(), dim=-1) @ embeddings[part].T
            own = torch.arange(len(part), device=device)
            loss = (1 - cosines.diagonal()).mean()
            loss = loss + 0.1 * F.cross_entropy(20 * cosines, own)
            (loss / 4).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        if (step + 1) % LOG_EVERY == 0:
            print(f"step {step + 1}: loss {loss:.3f}")
    torch.save({"model": model.state_dict()}, args.output)
    tokenizer.save_pretrained(args.output.with_suffix(".tokenizer"))


def important_rows(archive: Archive) -> Tensor:
    """Return the rows of the class names and descriptions, which the classifier is made from."""
    wanted = {text for texts in descriptions().values() for text in texts}
    for name in descriptions():
        wanted |= {name, f"a photo of a {name}."}
    return torch.tensor([i for i, text in enumerate(archive.texts) if text in wanted])


@torch.no_grad()
def fit_text_projection(
    model: CLIPModel, tokenizer: CLIPTokenizer, archive: Archive, mapping: Tensor
) -> Tensor:
    """Fit the text projection (128, hidden) in closed form, to the image tower's space.

    Ridge regression from the pooled states to the mapped sentence embeddings, over a quarter of the texts and, with
    a hundredfold weight, the class names and descriptions.
    """
    important = important_rows(archive)
    rows = torch.cat([important, torch.arange(0, len(archive.texts), 4)])
    weights = torch.ones(len(rows), 1)
    weights[: len(important)] = 100
    ids = tokenize(tokenizer, [archive.texts[row] for row in rows], CONTEXT)
    parts = [model.text_model(input_ids=part).pooler_output for part in ids.split(512)]
    pooled = torch.cat(parts)
    targets = F.normalize(archive.embeddings[rows] @ mapping.T, dim=-1)
    gram = pooled.T @ (weights * pooled)
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, pooled.T @ (weights * targets)).T.contiguous()


def join(args: argparse.Namespace, device: torch.device) -> None:
    """Join both towers in one checkpoint, with the map from sentence embeddings in the text projection."""
    archive = Archive(args.archive, torch.device("cpu"))
    vision, text = torch.load(args.vision), torch.load(args.text)
    tokenizer = CLIPTokenizer.from_pretrained(args.text.with_suffix(".tokenizer"))
    model = new_model(tokenizer).eval()
    seen = {k: v for k, v in vision["model"].items() if k.startswith("visi")}
    read = {k: v for k, v in text["model"].items() if k.startswith("text_model")}
    model.load_state_dict(
        {
            **model.state_dict(),
            **seen,
            **read,
        }
    )
    model.logit_scale.data.fill_(math.log(vision["scale"]))
    projection = fit_text_projection(model, tokenizer, archive, vision["mapping"])
    model.text_projection.weight.data = projection
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    CLIPImageProcessorPil(**GEOMETRY).save_pretrained(args.output)


def main() -> None:
    """Pretrain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    stages = {
        "vision": train_vision,
        "text": train_text,
        "join": join,
    }
    add("stage", choices=stages)
    add(
        "--archive",
        type=Path,
        required=True,
        help="what pretraining_data.py packed",
    )
    add("--output", type=Path, required=True)
    add("--vision", type=Path, help="result of the vision stage, for join")
    add("--text", type=Path, help="result of the text stage, for join")
    add("--steps", type=int, default=4000)
    add("--batch-size", type=int, default=256)
    add("--lr", type=float, default=1.5e-3)
    add(
        "--keep",
        type=float,
        default=0.4,
        help="share of patches in the first 85%%",
    )
    add(
        "--icon-share",
        type=float,
        default=0.35,
        help="share of icons in a batch",
    )
    add(
        "--scene-share",
        type=float,
        default=0.2,
        help="share of scenes with clutter",
    )
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages[args.stage](args, device)


if __name__ == "__main__":
    main()
