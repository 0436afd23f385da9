# SPDX-License-Identifier: Apache-2.0
"""Pretrains the tiny CLIP on what `pretraining_data.py` packed: image tower, text tower, or both joined.

    python pretrain.py vision --archive ARCHIVE --output vision.pt
    python pretrain.py text   --archive ARCHIVE --output text.pt       # independent of the first, may run beside it
    python pretrain.py join   --archive ARCHIVE --vision vision.pt --text text.pt --output tiny-clip

The image tower learns to match frozen sentence embeddings of captions, carried into CLIP's space by a slowly learnt
linear map; the text tower learns to reproduce the same sentence embeddings. Only `validation.parquet` is looked at
while the towers train.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from evaluate_zero_shot import class_names_of, decode, group_accuracy
from text_tower import build_tokenizer, tokenize
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


HERE = Path(__file__).parent
CONTEXT = 48
EMBEDDING = 128
SENTENCE = 384
VOCABULARY = 4000
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)


def configuration(tokenizer: CLIPTokenizer | None = None) -> CLIPConfig:
    """Returns the configuration of the tiny CLIP."""
    text = {
        "vocab_size": len(tokenizer) if tokenizer else VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "gelu",
        "projection_dim": EMBEDDING,
        "bos_token_id": tokenizer.bos_token_id if tokenizer else 0,
        "eos_token_id": tokenizer.eos_token_id if tokenizer else 1,
        "pad_token_id": tokenizer.pad_token_id if tokenizer else 1,
    }
    vision = {
        "image_size": 48,
        "patch_size": 8,
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "hidden_act": "gelu",
        "projection_dim": EMBEDDING,
    }
    return CLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=EMBEDDING,
        logit_scale_init_value=3.0,
    )


class Archive:
    """The packed pretraining data: drawings by concept, and the embeddings of their captions.

    Emoji come first, icons after them; every concept has `captions[i]`, a range of rows of `embeddings`.

    Args:
        folder: Folder that `pretraining_data.py` filled.
        device: Device that holds the arrays.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        layout = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        emoji, styles, icons = (
            np.load(folder / f"{name}.npz") for name in ("emoji", "styles", "icons")
        )
        self.texts: list[str] = layout["texts"]
        self.embeddings = (
            torch.from_numpy(np.load(folder / "texts.npz")["embeddings"])
            .float()
            .to(device)
        )
        self.num_emoji = layout["emoji"] // layout["per_emoji"]
        num_icons = layout["icon"] // layout["per_icon"]
        self.pixels = torch.from_numpy(
            np.concatenate([emoji["pixels"], styles["pixels"], icons["pixels"]])
        ).to(device)
        concept = np.concatenate(
            [emoji["concept"], styles["concept"], icons["concept"] + self.num_emoji]
        )
        clutter = emoji["clutter"]
        self.clutter = torch.from_numpy(np.flatnonzero(clutter)).to(device)
        first = torch.arange(self.num_emoji) * layout["per_emoji"]
        self.first = torch.cat(
            [first, layout["emoji"] + torch.arange(num_icons) * layout["per_icon"]]
        ).to(device)
        sizes = [layout["per_emoji"]] * self.num_emoji + [
            layout["per_icon"]
        ] * num_icons
        owner = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(sizes)
        ).to(device)
        centres = torch.zeros(len(sizes), SENTENCE, device=device)
        self.centres = F.normalize(
            centres.index_add_(0, owner, self.embeddings[: len(owner)]), dim=-1
        )
        skip = np.pad(clutter, (0, len(concept) - len(clutter)))
        self.members = _members(concept, len(sizes), skip)
        self.drawn_emoji = np.array(
            [i for i in range(self.num_emoji) if len(self.members[i])]
        )
        self.drawn_icons = np.array(
            [i for i in range(self.num_emoji, len(sizes)) if len(self.members[i])]
        )

    def batch(
        self, size: int, icon_share: float, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draws two drawings of each of `size` / 2 concepts.

        Returns:
            Rows of `pixels` (size,) and concepts (size,), the halves aligned.
        """
        icons = int(size // 2 * icon_share)
        concepts = np.concatenate(
            [
                rng.choice(self.drawn_emoji, size // 2 - icons, replace=False),
                rng.choice(self.drawn_icons, icons),
            ]
        )
        rows = np.array(
            [rng.choice(self.members[c]) for _ in range(2) for c in concepts]
        )
        return torch.from_numpy(rows), torch.from_numpy(
            np.concatenate([concepts, concepts])
        )

    def caption(self, concepts: Tensor) -> Tensor:
        """Returns the mean sentence embedding of the captions of each concept (n, 384)."""
        return self.centres[concepts]


def _members(concept: np.ndarray, count: int, skip: np.ndarray) -> list[np.ndarray]:
    members: list[list[int]] = [[] for _ in range(count)]
    for row, (owner, skipped) in enumerate(zip(concept, skip, strict=True)):
        if not skipped:
            members[owner].append(row)
    return [np.array(rows) for rows in members]


def premultiplied(pixels: Tensor) -> Tensor:
    """Turns uint8 colours on white with alpha, (n, h, w, 4), into premultiplied colours and alpha, (n, 4, h, w)."""
    x = pixels.permute(0, 3, 1, 2).float() / 255
    return torch.cat([(x[:, :3] - (1 - x[:, 3:])).clamp_min(0), x[:, 3:]], dim=1)


def place(
    drawings: Tensor, scale: Tensor, shift: Tensor, angle: Tensor, size: int
) -> Tensor:
    """Draws premultiplied drawings on transparent canvases, scaled, turned, mirrored at random and moved.

    Args:
        drawings: (n, 4, h, w).
        scale: Width of the drawing over that of the canvas (n,).
        shift: Centre of the drawing in the canvas (n, 2), -1 to 1.
        angle: In radians (n,).
        size: Side of the canvas, in pixels.

    Returns:
        (n, 4, size, size).
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    mirror = torch.where(torch.rand_like(scale) < 0.3, -1.0, 1.0)
    matrix = torch.stack(
        [torch.stack([cos * mirror, sin * mirror], -1), torch.stack([-sin, cos], -1)],
        dim=1,
    )
    moved = -(matrix @ shift[..., None])
    grid = F.affine_grid(
        torch.cat([matrix, moved], -1),
        [len(drawings), 4, size, size],
        align_corners=False,
    )
    return F.grid_sample(drawings, grid, align_corners=False)


def recolour(drawings: Tensor) -> Tensor:
    """Jitters hue, brightness and contrast of premultiplied drawings; turns some of them grey."""
    colours, alpha = drawings[:, :3], drawings[:, 3:]
    n = len(drawings)
    mix = torch.eye(3, device=drawings.device) + 0.08 * torch.randn(
        n, 3, 3, device=drawings.device
    )
    grey = (torch.rand(n, device=drawings.device) < 0.1).float()[:, None, None]
    mix = mix * (1 - grey) + grey / 3
    colours = torch.einsum("nij,njhw->nihw", mix, colours)
    colours = colours + alpha * 0.06 * torch.randn(n, 1, 1, 1, device=drawings.device)
    return torch.cat([colours.clamp_min(0).minimum(alpha), alpha], dim=1)


def backgrounds(n: int, size: int, white: float, device: torch.device) -> Tensor:
    """Makes white, plain, graded or textured backgrounds (n, 3, size, size)."""
    plain = torch.rand(n, 3, 1, 1, device=device)
    coarse = (
        torch.randn(n, 3, 4, 4, device=device)
        * 0.3
        * torch.rand(n, 1, 1, 1, device=device)
    )
    fine = (
        torch.randn(n, 1, size, size, device=device)
        * 0.1
        * torch.rand(n, 1, 1, 1, device=device)
    )
    texture = plain + F.interpolate(coarse, size=size, mode="bilinear") + fine
    keep = torch.rand(n, 1, 1, 1, device=device)
    made = torch.where(
        keep < white,
        torch.ones_like(texture),
        torch.where(keep < (1 + white) / 2, plain, texture),
    )
    return made.clamp(0, 1)


def views(archive: Archive, rows: Tensor, scene_share: float, size: int) -> Tensor:
    """Makes augmented images: most show one drawing, some are scenes with a smaller one among clutter.

    Args:
        archive: Source of the drawings.
        rows: Rows of `archive.pixels` (n,).
        scene_share: Share of scenes.
        size: Side of the images, in pixels.

    Returns:
        (n, 3, size, size), normalised as the image processor does.
    """
    n, device = len(rows), rows.device
    scenes = max(1, int(n * scene_share))
    order = torch.randperm(n, device=device)
    scene = torch.zeros(n, dtype=torch.bool, device=device)
    scene[order[:scenes]] = True
    image = backgrounds(n, size, 0.85, device)
    image[scene] = backgrounds(scenes, size, 0.1, device)
    for _ in range(4):
        clutter = archive.pixels[
            archive.clutter[
                torch.randint(len(archive.clutter), (scenes,), device=device)
            ]
        ]
        scale = torch.empty(scenes, device=device).uniform_(0.25, 0.5)
        shift = torch.empty(scenes, 2, device=device).uniform_(-0.9, 0.9)
        layer = place(
            recolour(premultiplied(clutter)),
            scale,
            shift,
            0.5 * torch.randn(scenes, device=device),
            size,
        )
        image[scene] = layer[:, :3] + image[scene] * (1 - layer[:, 3:])
    uniform = torch.rand(n, device=device)
    scale = torch.where(scene, 0.35 + 0.35 * uniform, 0.65 + 0.45 * uniform)
    room = torch.where(scene, (1 - scale) * 1.1, (1 - scale).abs() + 0.08)
    shift = (2 * torch.rand(n, 2, device=device) - 1) * room[:, None]
    angle = 0.12 * torch.randn(n, device=device)
    layer = place(
        recolour(premultiplied(archive.pixels[rows])), scale, shift, angle, size
    )
    image = layer[:, :3] + image * (1 - layer[:, 3:])
    return (image - 0.5) / 0.5


def encode_images(model: CLIPModel, pixels: Tensor, keep: float) -> Tensor:
    """Encodes images from a random share `keep` of their patches; returns (n, 128), not normalised."""
    vision = model.vision_model
    tokens = vision.embeddings(pixels)
    if keep < 1:
        n, length, width = tokens.shape
        count = int((length - 1) * keep)
        chosen = (
            torch.rand(n, length - 1, device=tokens.device).topk(count, dim=1).indices
            + 1
        )
        kept = tokens.gather(1, chosen[..., None].expand(-1, -1, width))
        tokens = torch.cat([tokens[:, :1], kept], dim=1)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(tokens)).last_hidden_state
    return model.visual_projection(vision.post_layernorm(hidden[:, 0]))


def principal_map(embeddings: Tensor, dim: int) -> Tensor:
    """Returns the leading principal directions (dim, d) of centred embeddings."""
    centred = embeddings - embeddings.mean(0)
    return (
        torch.linalg.eigh(centred.T @ centred)
        .eigenvectors.flip(1)[:, :dim]
        .T.contiguous()
    )


def load_validation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns normalised validation images (n, 3, 48, 48) and labels (n,)."""
    table = pq.read_table(HERE / "validation.parquet")
    images = np.stack([decode(row["bytes"]) for row in table["image"].to_pylist()])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.to(device), torch.tensor(table["label"].to_pylist(), device=device)


def class_embeddings(archive: Archive, mapping: Tensor) -> Tensor:
    """Returns the class embeddings (86, 128) of the frozen sentence encoder under `mapping`."""
    descriptions = json.loads((HERE / "descriptions.json").read_text(encoding="utf-8"))
    row = {text: i for i, text in enumerate(archive.texts)}
    means = []
    for name in class_names_of(HERE / "validation.parquet"):
        mapped = F.normalize(
            archive.embeddings[[row[text] for text in descriptions[name]]] @ mapping.T,
            dim=-1,
        )
        means.append(F.normalize(mapped.mean(0), dim=-1))
    return torch.stack(means)


def schedule(progress: float) -> float:
    """Warm-up over 3 %, then cosine to zero."""
    return min(progress / 0.03, 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def train_vision(args: argparse.Namespace) -> None:
    """Trains the image tower and the map against frozen sentence embeddings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    archive = Archive(args.archive, device)
    model = CLIPModel._from_config(configuration(), attn_implementation="eager").to(
        device
    )
    begun = torch.load(args.begin, map_location=device) if args.begin else None
    captions = archive.embeddings[: archive.first[-1] + 1]
    mapping = nn.Parameter(principal_map(captions, EMBEDDING))
    scale = nn.Parameter(torch.tensor(math.log(10.0), device=device))
    if begun:
        model.load_state_dict(begun["model"])
        mapping.data.copy_(begun["mapping"])
        scale.data.fill_(math.log(begun["scale"]))
    towers = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    decay = [p for p in towers if p.ndim > 1]
    rest = [p for p in towers if p.ndim <= 1]
    groups = [
        {"params": decay, "lr": args.lr, "weight_decay": 0.1},
        {"params": rest, "lr": args.lr, "weight_decay": 0.0},
        {"params": [scale], "lr": args.lr, "weight_decay": 0.0},
        {"params": [mapping], "lr": args.lr * 0.1, "weight_decay": 0.0},
    ]
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    pixels, labels = load_validation(device)
    start, step, progress, losses = time.time(), 0, 0.0, []
    everything = np.concatenate([archive.drawn_emoji, archive.drawn_icons])
    while progress < 1:
        for group, base in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = base * schedule(progress)
        keep = args.keep if progress < 0.85 else 1.0
        scene_share = args.scene_share * min(1.0, 2 * progress)
        rows, concepts = (
            t.to(device) for t in archive.batch(args.batch_size, args.icon_share, rng)
        )
        own = concepts[: len(concepts) // 2]
        others = torch.from_numpy(
            rng.choice(everything, args.negatives, replace=False)
        ).to(device)
        others = others[~torch.isin(others, own)]
        bank = torch.cat([own, others])
        sentences = archive.caption(bank)
        images = views(archive, rows, scene_share, 48)
        with torch.autocast(device.type, torch.bfloat16):
            encoded = encode_images(model, images, keep)
        encoded = F.normalize(encoded.float(), dim=-1)
        mapped = F.normalize(sentences @ mapping.T, dim=-1)
        same = F.one_hot(
            torch.arange(len(own), device=device).repeat(2), len(bank)
        ).float()
        with torch.no_grad():
            near = F.softmax(archive.caption(own) @ sentences.T * 20, dim=-1).repeat(
                2, 1
            )
            target = 0.8 * same + 0.2 * near
        temperature = scale.exp().clamp(max=60)
        loss = F.cross_entropy(temperature * encoded @ mapped.T, target)
        first, second = encoded.chunk(2)
        between = 10 * first @ second.T
        diagonal = torch.arange(len(own), device=device)
        loss = loss + 0.15 * (
            F.cross_entropy(between, diagonal) + F.cross_entropy(between.T, diagonal)
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(towers, 1.0)
        optimizer.step()
        losses.append(loss.item())
        step += 1
        progress = max(step / args.steps, (time.time() - start) / (60 * args.minutes))
        if step % args.log_every == 0 or progress >= 1:
            macro, top5 = _validate(
                model, pixels, labels, class_embeddings(archive, mapping.detach())
            )
            mean = sum(losses[-args.log_every :]) / len(losses[-args.log_every :])
            print(
                f"step {step} ({progress:.0%}) loss {mean:.3f} validation {macro:.1f} top-5 {top5:.1f}",
                flush=True,
            )
            state = {
                "model": model.state_dict(),
                "mapping": mapping.detach().cpu(),
                "scale": temperature.item(),
            }
            torch.save(state, args.output)


@torch.no_grad()
def _validate(
    model: CLIPModel, pixels: Tensor, labels: Tensor, classes: Tensor
) -> tuple[float, float]:
    with torch.autocast(pixels.device.type, torch.bfloat16):
        encoded = encode_images(model, pixels, 1.0)
    result = group_accuracy(
        (F.normalize(encoded.float(), dim=-1) @ classes.T).cpu(), labels.cpu()
    )
    return result["macro"], result["top5"]


def train_text(args: argparse.Namespace) -> None:
    """Trains the text tower to reproduce the sentence embeddings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    archive = Archive(args.archive, device)
    tokenizer = build_tokenizer(archive.texts, VOCABULARY, CONTEXT)
    model = CLIPModel._from_config(
        configuration(tokenizer), attn_implementation="eager"
    ).to(device)
    ids = tokenize(tokenizer, archive.texts, CONTEXT).to(device)
    lengths = (ids != tokenizer.pad_token_id).sum(1) + 1
    head = nn.Linear(model.config.text_config.hidden_size, SENTENCE, bias=False).to(
        device
    )
    targets = F.normalize(archive.embeddings, dim=-1)
    important = _important_rows(archive)
    parameters = [*model.text_model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    start, step, progress, losses = time.time(), 0, 0.0, []
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(progress)
        rows = torch.randint(len(ids), (args.batch_size,), device=device)
        rows[: args.batch_size // 4] = important[
            torch.randint(len(important), (args.batch_size // 4,), device=device)
        ]
        order = lengths[rows].argsort()
        optimizer.zero_grad()
        for part in rows[order].chunk(4):
            tokens = ids[part, : int(lengths[part].max())]
            with torch.autocast(device.type, torch.bfloat16):
                out = head(model.text_model(input_ids=tokens).pooler_output)
            out = F.normalize(out.float(), dim=-1)
            rank = F.cross_entropy(
                20 * out @ targets[part].T, torch.arange(len(part), device=device)
            )
            loss = (1 - (out * targets[part]).sum(-1)).mean() + 0.1 * rank
            (loss / 4).backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        progress = max(step / args.steps, (time.time() - start) / (60 * args.minutes))
        if step % args.log_every == 0 or progress >= 1:
            mean = sum(losses[-4 * args.log_every :]) / len(
                losses[-4 * args.log_every :]
            )
            print(f"step {step} ({progress:.0%}) loss {mean:.3f}", flush=True)
            torch.save(
                {"model": model.state_dict(), "head": head.weight.detach().cpu()},
                args.output,
            )
            tokenizer.save_pretrained(args.output.with_suffix(".tokenizer"))


def _important_rows(archive: Archive) -> Tensor:
    """Rows of the class names and descriptions, which the classifier stands on."""
    descriptions = json.loads((HERE / "descriptions.json").read_text(encoding="utf-8"))
    wanted = {
        text
        for name, texts in descriptions.items()
        for text in (name, f"a photo of a {name}.", *texts)
    }
    return torch.tensor([i for i, text in enumerate(archive.texts) if text in wanted])


@torch.no_grad()
def fit_text_projection(
    model: CLIPModel, tokenizer: CLIPTokenizer, archive: Archive, mapping: Tensor
) -> Tensor:
    """Fits the text projection in closed form, so that texts land where the image tower expects them.

    Weighted ridge regression from the tower's pooled states to the mapped sentence embeddings, over the captions and,
    with a hundredfold weight, the class names and descriptions.

    Args:
        model: CLIP with a distilled text tower.
        tokenizer: Its tokenizer.
        archive: Texts and their sentence embeddings.
        mapping: (128, 384).

    Returns:
        (128, hidden).
    """
    important = _important_rows(archive)
    rows = torch.cat([important, torch.arange(0, len(archive.texts), 4)])
    weights = torch.ones(len(rows), 1)
    weights[: len(important)] = 100
    ids = tokenize(tokenizer, [archive.texts[row] for row in rows], CONTEXT)
    pooled = torch.cat(
        [model.text_model(input_ids=part).pooler_output for part in ids.split(512)]
    )
    targets = F.normalize(archive.embeddings[rows] @ mapping.T, dim=-1)
    gram = pooled.T @ (weights * pooled)
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, pooled.T @ (weights * targets)).T.contiguous()


def join(args: argparse.Namespace) -> None:
    """Joins both towers in one checkpoint, with the map from sentence embeddings within the text projection."""
    archive = Archive(args.archive, torch.device("cpu"))
    vision, text = torch.load(args.vision), torch.load(args.text)
    tokenizer = CLIPTokenizer.from_pretrained(args.text.with_suffix(".tokenizer"))
    model = CLIPModel._from_config(configuration(tokenizer)).eval()
    state = model.state_dict()
    state.update(
        {
            k: v
            for k, v in vision["model"].items()
            if k.startswith(("vision_model", "visual_projection"))
        }
    )
    state.update({k: v for k, v in text["model"].items() if k.startswith("text_model")})
    state["logit_scale"] = torch.tensor(math.log(vision["scale"]))
    model.load_state_dict(state)
    model.text_projection.weight.data = fit_text_projection(
        model, tokenizer, archive, vision["mapping"]
    )
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    processor = CLIPImageProcessorPil(
        size={"height": 48, "width": 48},
        do_center_crop=False,
        image_mean=MEAN,
        image_std=STD,
    )
    processor.save_pretrained(args.output)


def main() -> None:
    """Pretrains from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("vision", "text", "join"))
    parser.add_argument(
        "--archive",
        type=Path,
        required=True,
        help="folder that pretraining_data.py filled",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--vision", type=Path, help="result of the vision stage, for join"
    )
    parser.add_argument("--text", type=Path, help="result of the text stage, for join")
    parser.add_argument(
        "--begin", type=Path, help="earlier result of the vision stage to start from"
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e9,
        help="end after this time, the schedule fitted to it",
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument(
        "--keep",
        type=float,
        default=0.4,
        help="share of patches seen in the first 85 %",
    )
    parser.add_argument("--icon-share", type=float, default=0.35)
    parser.add_argument("--scene-share", type=float, default=0.2)
    parser.add_argument("--negatives", type=int, default=1500)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"vision": train_vision, "text": train_text, "join": join}[args.stage](args)


if __name__ == "__main__":
    main()
