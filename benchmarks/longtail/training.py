# SPDX-License-Identifier: Apache-2.0
"""One run: from its specification to its figures.

Cheap, so that it can be repeated, and the same for every method: augmented views are drawn once for a task and kept as
the tokens that enter the first adapted block, since all before it is frozen. In bfloat16 autocast and with eager
attention, which with a few dozen tokens an image is twice as fast on a CPU as the usual choice.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from data import EMOJI_LT, Split, Task, load_task, long_tail
from designs import DesignLayer, SemanticHead, apply_design, sage_layers, semantic_start
from peft import LoraConfig, get_peft_model
from tokens import Tokens, image_embeddings, tower_of
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error
from transformers import AutoTokenizer, CLIPModel

from peft_sage import (
    CosineHead,
    LongTailAccuracy,
    SageClassifier,
    SageConfig,
    SageLoss,
    encode_class_descriptions,
    estimate_mismatch,
    mismatch_from_counts,
    pool_guidance,
)


DEFAULTS: dict[str, Any] = {
    "task": "concepts",
    "ratio": None,
    "method": "sage",
    "guidance": "descriptions",
    "guidance_rows": None,
    "swapped_rows": None,
    "design": {},
    "head": "cosine",
    "r": 16,
    "num_heads": 1,
    "layers": None,
    "loss": "la",
    "tau": 1.0,
    "compensation": 1.0,
    "mismatch": "counts",
    "effective_dim": 32.0,
    "base_mismatch": 2.0,
    "form": "target",
    "lr": 3e-3,
    "head_lr": 1.0,
    "weight_decay": 0.01,
    "head_decay": 0.0,
    "epochs": 6,
    "batch_size": 128,
    "views": 8,
    "episode": None,
    "teach": 0.0,
    "scale": 25.0,
    "train_classes": None,
    "gap": False,
    "split": "validation",
    "seed": 0,
}


class Bench:
    """What runs of one task share: images on the device, the tokenizer, class embeddings."""

    def __init__(self, device: str, styles: str | None = None, checkpoint: str | None = None) -> None:
        self.device = device
        self.styles = styles
        self.checkpoint = checkpoint or str(EMOJI_LT / "tiny-clip")
        self.tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        self.tasks: dict[str, Task] = {}
        self.prepared: dict[tuple[str, int], Tokens] = {}

    def clip(self) -> CLIPModel:
        """Return a fresh copy of the model."""
        model = CLIPModel.from_pretrained(self.checkpoint, dtype=torch.float32, attn_implementation="eager")
        return model.to(self.device).eval()

    def tokens(self, name: str, views: int) -> Tokens:
        if (name, views) not in self.prepared:
            self.prepared = {(name, views): Tokens(self.clip(), self.task(name), name, views)}
        return self.prepared[name, views]

    def task(self, name: str) -> Task:
        if name not in self.tasks:
            task = load_task(name, self.styles)
            task.splits = {key: split.to(self.device) for key, split in task.splits.items()}
            task.distractors = {key: images.to(self.device) for key, images in task.distractors.items()}
            self.tasks[name] = task
        return self.tasks[name]


def run(spec: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        spec: What differs from `DEFAULTS`.
        bench: Shared data.

    Returns:
        The figures (percent), one correctness bit an evaluated image as a hexadecimal string, and the time.
    """
    unknown = spec.keys() - DEFAULTS.keys()
    if unknown:
        raise ValueError(f"unknown fields in the specification: {sorted(unknown)}")
    spec = {**DEFAULTS, **spec}
    started = time.perf_counter()
    device, task = bench.device, bench.task(spec["task"])
    torch.manual_seed(spec["seed"])
    classes = torch.arange(len(task.names), device=device)
    clip = bench.clip()
    tokens = bench.tokens(spec["task"], spec["views"])
    first = first_block(spec, len(clip.vision_model.encoder.layers))
    embeddings = encode_class_descriptions(clip, bench.tokenizer, task.descriptions)
    train = long_tail(task.splits["train"], len(classes), spec["ratio"])
    held_out = task.splits[spec["split"]]

    seen = classes
    if spec["train_classes"]:
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(spec["seed"])).to(device)
        seen, unseen = order[: spec["train_classes"]].sort().values, order[spec["train_classes"] :].sort().values
        train, held_out = _restrict(train, seen), _restrict(held_out, unseen)
    counts = train.counts(len(seen))
    names = encode_class_descriptions(clip, bench.tokenizer, task.names) if spec["guidance"] == "names" else None
    guidance = make_guidance(spec, embeddings, names)
    guidance_seen = None if guidance is None else guidance[seen] if len(guidance) == len(classes) else guidance
    model = make_model(spec, clip, embeddings[seen], guidance_seen)
    if spec["method"] != "zero_shot":
        fit(spec, model, train, counts, tokens.train(first), first)
    if spec["train_classes"]:
        swap_classes(model, embeddings[unseen], None if guidance is None else guidance[unseen])
        counts = torch.full((len(unseen),), 50)
    with torch.no_grad():
        logits, report = predict(model, held_out, counts, tokens.evaluation(spec["split"], first), first)
    difference = {}
    if spec["swapped_rows"]:
        model.set_guidance(pool_guidance(guidance, spec["swapped_rows"]))
        exact = logits
        with torch.no_grad():
            logits, report = predict(model, held_out, counts, tokens.evaluation(spec["split"], first), first)
        difference["logit_difference"] = round((logits - exact).abs().max().item(), 4)
    figures = evaluate(logits, held_out.labels, counts) | difference
    if spec["gap"]:
        figures.update(bias(model, spec["scale"], train, tokens.train(first)[0], first, logits, held_out.labels))
    figures["attention"] = report
    figures["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    figures["seconds"] = round(time.perf_counter() - started, 2)
    return figures


def first_block(spec: dict[str, Any], num_blocks: int) -> int:
    """Return the index of the first block that a run changes; the number of blocks for none."""
    if spec["method"] in ("zero_shot", "head"):
        return num_blocks
    return 0 if spec["layers"] is None else min(layer % num_blocks for layer in spec["layers"])


def make_guidance(spec: dict[str, Any], embeddings: torch.Tensor, names: torch.Tensor | None) -> torch.Tensor | None:
    """Return the guidance of a run (M, e), or `None`."""
    if spec["method"] != "sage" or spec["guidance"] == "none":
        return None
    source, generator = spec["guidance"], torch.Generator(device="cpu").manual_seed(spec["seed"])
    if source in ("random", "learned"):
        rows = torch.randn(embeddings.shape, generator=generator).to(embeddings)
    elif source == "names":
        rows = names
    else:
        rows = embeddings
    if spec["design"].get("centre"):
        rows = rows - rows.mean(0)
    return pool_guidance(rows, spec["guidance_rows"] or len(rows))


def make_model(
    spec: dict[str, Any], clip: CLIPModel, embeddings: torch.Tensor, guidance: torch.Tensor | None
) -> nn.Module:
    """Return the model of a run; only what the method trains is trainable."""
    classifier = SageClassifier(clip, embeddings, spec["scale"])
    if spec["head"] not in ("cosine", "fixed"):
        kind, _, rank = spec["head"].partition("-")
        classifier.class_head = SemanticHead(embeddings, spec["scale"], int(rank), free=kind == "semantic")
    if spec["method"] == "zero_shot":
        return classifier.requires_grad_(False)
    if spec["method"] == "head":
        classifier.requires_grad_(False).class_head.requires_grad_(True)
        return classifier
    head = None if spec["head"] == "fixed" else ["class_head"]
    if spec["method"] == "lora":
        depth = len(clip.vision_model.encoder.layers)
        layers = "|".join(str(layer % depth) for layer in spec["layers"] or range(depth))
        targets = rf"model\.vision_model\..*layers\.({layers})\..*(q_proj|v_proj)"
        config = LoraConfig(r=spec["r"], lora_alpha=2 * spec["r"], target_modules=targets, modules_to_save=head)
        return get_peft_model(classifier, config)
    config = SageConfig(
        guidance=guidance,
        r=spec["r"],
        num_heads=spec["num_heads"],
        layers_to_transform=spec["layers"],
        modules_to_save=head,
    )
    model = get_peft_model(classifier, config)
    if guidance is not None and spec["design"]:
        apply_design(model, spec["design"], clip.visual_projection.weight.detach())
        if spec["design"].get("semantic"):
            semantic_start(model, guidance, clip, spec["design"]["semantic"])
    if spec["guidance"] == "learned":
        for layer in sage_layers(model):
            if "default" in layer.peft_sage_guidance:
                rows = nn.Parameter(layer.peft_sage_guidance["default"].clone())
                layer.learned_rows = rows
                layer.peft_sage_guidance["default"] = rows
    return model


def logits_of(model: nn.Module, hidden: torch.Tensor, first: int) -> torch.Tensor:
    """Return float32 logits (B, K) from the tokens that enter block `first`."""
    head = model.get_submodule("base_model.model.class_head" if hasattr(model, "peft_config") else "class_head")
    with torch.autocast(hidden.device.type, torch.bfloat16):
        embeddings = image_embeddings(tower_of(model), hidden.float(), first)
    return head(embeddings.float())


def fit(
    spec: dict[str, Any], model: nn.Module, train: Split, counts: torch.Tensor, tokens: torch.Tensor, first: int
) -> None:
    """Train adapters and head with AdamW and a cosine schedule.

    Args:
        spec: Of the run.
        model: To be trained.
        train: Which images.
        counts: Of them, of each class (K,).
        tokens: What enters block `first` for all views of all images of the task (views, n, N, d).
        first: Index of the block.
    """
    device = train.images.device
    generator = torch.Generator(device=device).manual_seed(spec["seed"])
    num_classes = len(counts)
    criterion = make_loss(spec, model, train, counts, tokens[0], first).to(device)
    head = [p for n, p in model.named_parameters() if p.requires_grad and "head" in n]
    adapter = [p for n, p in model.named_parameters() if p.requires_grad and "head" not in n]
    groups = [
        {"params": adapter, "lr": spec["lr"], "weight_decay": spec["weight_decay"]},
        {"params": head, "lr": spec["lr"] * spec["head_lr"], "weight_decay": spec["head_decay"]},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    batches = len(train.labels) // spec["batch_size"]
    steps = batches * spec["epochs"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    layers = [layer for layer in sage_layers(model) if isinstance(layer, DesignLayer)]
    model.train()
    for _ in range(spec["epochs"]):
        order = torch.randperm(len(train.labels), generator=generator, device=device)
        for index in order[: batches * spec["batch_size"]].view(batches, -1):
            labels = train.labels[index]
            view = torch.randint(len(tokens), index.shape, generator=generator, device=device)
            hidden = tokens[view, train.rows[index]]
            rows = None
            if spec["episode"]:
                rows = episode_classes(labels, num_classes, spec["episode"], generator)
            for layer in layers:
                layer.rows = rows
            logits = logits_of(model, hidden, first)
            if rows is None:
                loss = criterion(logits, labels)
            else:
                place = torch.full((num_classes,), -1, device=device)
                place[rows] = torch.arange(len(rows), device=device)
                loss = F.cross_entropy(logits[:, rows] + criterion.adjustment[rows], place[labels])
                labels = place[labels]
            if spec["teach"]:
                loss = loss + spec["teach"] * teaching_loss(layers, labels, len(index), criterion.adjustment, rows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    for layer in layers:
        layer.rows = None
    model.eval()


def episode_classes(labels: torch.Tensor, num_classes: int, extra: float, generator: torch.Generator) -> torch.Tensor:
    """Return the classes of a batch and a share `extra` of the others."""
    chosen = torch.rand(num_classes, generator=generator, device=labels.device) < extra
    chosen[labels] = True
    return chosen.nonzero().flatten()


def teaching_loss(
    layers: list[DesignLayer],
    labels: torch.Tensor,
    batch: int,
    adjustment: torch.Tensor,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """Cross-entropy of the CLS token's attention over the classes, prior-adjusted; the mean over blocks and heads."""
    adjustment = adjustment if rows is None else adjustment[rows]
    losses = []
    for layer in layers:
        scores = layer.last_scores  # (h, B N, M)
        cls = scores.view(len(scores), batch, -1, scores.shape[-1])[:, :, 0]
        losses += [F.cross_entropy(head + adjustment, labels) for head in cls]
    return torch.stack(losses).mean()


def make_loss(
    spec: dict[str, Any], model: nn.Module, train: Split, counts: torch.Tensor, tokens: torch.Tensor, first: int
) -> SageLoss:
    """Return cross-entropy, logit adjustment, or Sage's loss.

    `form` is `target` for the loss as it is, which compensates the right logit, or `all` for the variant that shifts
    the logits of every class by its mismatch, whatever the label.
    """
    if spec["loss"] == "ce":
        return SageLoss(counts, tau=0.0, compensation=0.0)
    if spec["loss"] == "la":
        return SageLoss(counts, tau=spec["tau"], compensation=0.0)
    if spec["mismatch"] == "counts":
        mismatch = mismatch_from_counts(counts, spec["effective_dim"])
    elif spec["mismatch"] == "none":
        mismatch = torch.zeros(len(counts))
    else:
        features = image_features(model, tokens[train.rows], first)
        groups = train.groups if spec["mismatch"] == "concepts" else None
        mismatch = estimate_mismatch(features, train.labels, len(counts), spec["scale"], groups=groups).cpu()
    if spec["form"] == "target":
        settings = {name: spec[name] for name in ("tau", "compensation", "base_mismatch")}
        return SageLoss(counts, mismatch=mismatch, **settings)
    loss = SageLoss(counts, tau=spec["tau"], compensation=0.0)
    loss.adjustment -= spec["compensation"] * mismatch
    return loss


@torch.no_grad()
def image_features(model: nn.Module, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Return image embeddings (n, e) from what enters block `first` (n, N, d)."""
    return torch.cat([image_embeddings(tower_of(model), part.float(), first) for part in tokens.split(512)])


def predict(
    model: nn.Module, split: Split, counts: torch.Tensor, tokens: torch.Tensor, first: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return logits (N, K), and what the CLS token attends to, for each block that attends."""
    layers = [layer for layer in sage_layers(model) if layer.guidance("default") is not None]
    parts: list[torch.Tensor] = []
    entropy = torch.zeros(len(layers))
    own = torch.zeros(len(layers))
    hooks = []
    for depth, layer in enumerate(layers):

        def watch(module: nn.Module, args: tuple, output: Any, depth: int = depth, layer: Any = layer) -> None:
            z = output.view(-1, output.shape[-2], output.shape[-1])[:, 0]
            heads = layer.num_heads["default"]
            query = z.view(len(z), heads, -1).transpose(0, 1)
            rows = layer.guidance("default")
            key = layer.peft_sage_key["default"](rows).view(len(rows), heads, -1).transpose(0, 1)
            if isinstance(layer, DesignLayer) and layer.design.get("cosine"):
                scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(1, 2)
                scores = scores * layer.peft_sage_temperature["default"].exp()
            else:
                scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
            weights = scores.softmax(-1)
            entropy[depth] += (-(weights.clamp(min=1e-9).log() * weights).sum(-1)).mean(0).sum().cpu()
            if weights.shape[-1] == len(counts):
                own[depth] += (weights.mean(0).argmax(-1) == current).sum().cpu()

        hooks.append(layer.peft_sage_down["default"].register_forward_hook(watch))
    model.eval()
    for index in torch.arange(len(split.labels), device=split.labels.device).split(512):
        current = split.labels[index]
        parts.append(logits_of(model, tokens[split.rows[index]], first))
    for hook in hooks:
        hook.remove()
    report = {
        "entropy": [round(v, 3) for v in (entropy / len(split.labels) / math.log(max(2, len(counts)))).tolist()],
        "own_class": [round(v, 3) for v in (own / len(split.labels)).tolist()],
    }
    return torch.cat(parts), report


def evaluate(logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> dict[str, Any]:
    """Figures in percent, and a bit for each image: whether it was classified rightly."""
    metric = LongTailAccuracy(counts.cpu())
    metric.update(logits.cpu(), labels.cpu())
    result = metric.compute()
    figures = {
        name: round(100 * result[name].item(), 3)
        for name in ("overall", "macro", "many", "medium", "few", "worst", "harmonic_mean")
    }
    figures["ece"] = round(100 * multiclass_calibration_error(logits.softmax(-1), labels, logits.shape[1]).item(), 3)
    right = (logits.argmax(-1) == labels).int().tolist()
    figures["right"] = hex(int("1" + "".join(map(str, right)), 2))
    return figures


@torch.no_grad()
def bias(
    model: nn.Module, scale: float, train: Split, tokens: torch.Tensor, first: int, logits: torch.Tensor, labels: Any
) -> dict[str, list[float]]:
    """What the compensation is to correct, and what estimates it.

    Args:
        model: Trained.
        scale: Of its head.
        train: Training images.
        tokens: What enters block `first`, for all images of the task (n, N, d).
        first: Index of the block.
        logits: Of the held-out images (N, K).
        labels: Of the held-out images (N,).

    Returns:
        For each class the mean right logit of training images minus that of held-out ones, `gap` (K,), and the
        mismatch measured from the training images alone, leaving out an image, `from_images` (K,), or all images of
        its concept, `from_concepts` (K,).
    """
    num_classes = logits.shape[1]
    hidden = tokens[train.rows]
    seen = torch.cat([logits_of(model, part, first) for part in hidden.split(512)])
    features = image_features(model, hidden, first)

    def right_logit(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        right = logits.gather(1, labels[:, None])[:, 0]
        total = torch.zeros(num_classes, device=logits.device).index_add_(0, labels, right)
        return total / torch.bincount(labels, minlength=num_classes)

    gap = right_logit(seen, train.labels) - right_logit(logits, labels)
    images = estimate_mismatch(features, train.labels, num_classes, scale)
    concepts = estimate_mismatch(features, train.labels, num_classes, scale, groups=train.groups)
    found = {"gap": gap, "from_images": images, "from_concepts": concepts}
    return {name: [round(v, 3) for v in values.tolist()] for name, values in found.items()}


def swap_classes(model: nn.Module, embeddings: torch.Tensor, guidance: torch.Tensor | None) -> None:
    """Give a trained model other classes, without training."""
    if guidance is not None:
        model.set_guidance(guidance)
    for module in model.modules():
        if isinstance(module, CosineHead):
            module.weight = nn.Parameter(embeddings.clone(), requires_grad=False)
        elif isinstance(module, SemanticHead):
            module.text, module.free = embeddings.clone(), None


def _restrict(split: Split, classes: torch.Tensor) -> Split:
    """Keep some classes, renumbered."""
    kept = split[torch.isin(split.labels, classes)]
    return replace(kept, labels=torch.searchsorted(classes, kept.labels))
