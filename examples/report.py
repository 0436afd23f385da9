# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind for people: a page to look at (`report.html`), and a model card with its pictures."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from image_data import LabelledImages, PixelDataset, PixelTransform
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from peft_sage import attention_maps, plot_attention


GROUPS = ("many", "medium", "few")
SCORES = ("overall", "macro", *GROUPS, "worst")
#: How much of each kind the page shows.
WORST, EXAMPLES, PAIRS, PICTURES, GAINS = 10, 4, 15, 12, 10
#: Longest side of a small picture, and the number of classes whose names fit below an axis.
SIDE, NAMED = 144, 40
TEMPLATE = Path(__file__).with_name("report.html.jinja")

CARD = """
# {base_model} for {num_classes} classes with a long tail

Trained with `peft_sage` (`--method {method}`).

```python
from peft_sage import SageClassifier

classifier = SageClassifier.from_pretrained("{repo_id}")
print(classifier.predict("photo.jpg"))  # also a list of files, or a folder
```

## Results

{scores}{pictures}
## The worst classes

{worst}
## Settings

```yaml
{settings}
```

## Classes

{classes}
"""


def write_report(
    folder: Path,
    model: nn.Module,
    method: str,
    results: dict[str, Any],
    test: PixelDataset,
    predictions: Sequence[torch.Tensor],
    transform: PixelTransform,
    repo_id: str,
    train: LabelledImages | None = None,
    label_probability: torch.Tensor | None = None,
) -> None:
    """Write `report.html`, the pictures and the model card.

    Args:
        folder: Where the adapter was saved.
        model: The trained model.
        method: Its name in tables and legends.
        results: What goes into `results.json`.
        test: Test images.
        predictions: (n,) their predicted classes, and (n,) the probabilities of these.
        transform: What turns them into the model's input.
        repo_id: Where the adapter will be found.
        train: Training images, for the likely label errors.
        label_probability: (n,) held-out probability of the label of each training image, from [`TextPrior`].
    """
    model.eval()
    transform.eval()
    names = results["class_names"]
    counts = np.array(results["class_counts"])
    runs = {"zero-shot": results["zero_shot"], method: results["trained"]}
    pictures = {
        "long_tail.png": "Test accuracy, %: each class (points), running mean (lines), and the groups."
    }
    plot_long_tail(runs, counts, names).savefig(folder / "long_tail.png")
    if attention := plot_rarest(model, test, transform, counts, names):
        figure, caption = attention
        figure.savefig(folder / "attention.png")
        pictures["attention.png"] = caption
    create_model_card(results, method, repo_id, pictures).save(folder / "README.md")
    page = make_page(method, results, test.split, predictions, train, label_probability)
    (folder / "report.html").write_text(page, encoding="utf-8")


def make_page(
    method: str,
    results: dict[str, Any],
    test: LabelledImages,
    predictions: Sequence[torch.Tensor],
    train: LabelledImages | None = None,
    label_probability: torch.Tensor | None = None,
) -> str:
    """Return the report as one HTML file that asks for nothing else. The arguments are those of [`write_report`]."""
    names = results["class_names"]
    counts = np.array(results["class_counts"])
    trained, zero_shot = results["trained"], results["zero_shot"]
    labels, (predicted, confidence) = (
        np.asarray(test.labels),
        (part.numpy() for part in predictions),
    )
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]

    def mistake(row: int) -> dict[str, str]:
        truth, guess = names[labels[row]], names[predicted[row]]
        caption = f"{truth}, taken for {guess} ({100 * confidence[row]:.0f} %)"
        return small_picture(test, row, f"Test image: {caption}", caption)

    def class_row(k: int) -> dict[str, Any]:
        return {
            "name": names[k],
            "count": int(counts[k]),
            "accuracy": trained["per_class"][k],
            "before": zero_shot["per_class"][k],
        }

    tested = [
        k for k, accuracy in enumerate(trained["per_class"]) if accuracy is not None
    ]
    by_accuracy = sorted(tested, key=lambda k: (trained["per_class"][k], -counts[k]))
    worst = []
    for k in by_accuracy[:WORST]:
        taken_for = Counter(
            names[guess] for guess in predicted[wrong][labels[wrong] == k]
        )
        rows = [row for row in wrong if labels[row] == k][:EXAMPLES]
        worst.append(
            class_row(k)
            | {
                "taken_for": ", ".join(
                    f"{name} ({count})" for name, count in taken_for.most_common(3)
                ),
                "pictures": [mistake(row) for row in rows],
            }
        )
    runs = {"zero-shot": zero_shot, method: trained}
    tail, groups = (
        Figure((5.2, 3.6), layout="constrained"),
        Figure((5.2, 3.6), layout="constrained"),
    )
    draw_classes(tail.subplots(), runs, counts)
    draw_groups(groups.subplots(), runs)
    scores = [
        (name, trained["num_classes"].get(name), zero_shot[name], trained[name])
        for name in SCORES
    ]
    extra, gains = expected_gains(
        counts, trained["per_class"], np.bincount(labels, minlength=len(names))
    )
    suspects = []
    if label_probability is not None and train is not None:
        probability = label_probability.double().nan_to_num(2).numpy()
        for index in np.argsort(probability, kind="stable")[:PICTURES]:
            if probability[index] <= 1:
                caption = (
                    f"{names[train.labels[index]]}: {100 * probability[index]:.1g} %"
                )
                picture = small_picture(
                    train, index, f"Training image labelled {caption}", caption
                )
                suspects.append(picture | {"file": train.name(int(index))})
    tried = results.get("text_prior_scores") or {}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"{method} on {len(names)} classes",
        model=short(results["settings"]["model"]),
        dataset=short(results["settings"]["dataset"]),
        method=method,
        num_train=int(counts.sum()),
        num_test=len(test),
        scores=scores,
        text_prior=results.get("text_prior"),
        tried=", ".join(
            f"{strength}: {100 * score:.1f} %" for strength, score in tried.items()
        ),
        figures=[
            (
                png(tail),
                "Test accuracy of each class, most frequent class first, over the numbers of images.",
            ),
            (
                png(groups),
                "Test accuracy of the groups: "
                + "; ".join(group_text(n, s) for n, s in runs.items()),
            ),
        ],
        worst=worst,
        pairs=confused_pairs(labels, predicted, names)[:PAIRS],
        confident=[mistake(row) for row in wrong[:PICTURES]],
        suspects=suspects,
        looked_for_suspects=label_probability is not None,
        extra=extra,
        gains=[class_row(k) | {"gain": gain} for k, gain in gains[:GAINS]],
        classes=[class_row(k) for k in np.argsort(-counts, kind="stable")],
    )


def confused_pairs(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the pairs of classes that are taken for each other, the most often confused first."""
    tested = np.bincount(labels, minlength=len(names))
    mistakes = Counter(
        (int(a), int(b)) for a, b in zip(labels, predicted, strict=True) if a != b
    )
    pairs = Counter()
    for (a, b), count in mistakes.items():
        pairs[min(a, b), max(a, b)] += count
    rows = []
    for (a, b), count in pairs.most_common():
        a, b = sorted((a, b), key=lambda k: -mistakes[k, a + b - k])
        ways = [(a, b), (b, a)] if mistakes[b, a] else [(a, b)]
        text = [
            f"{mistakes[x, y]} of {tested[x]} {names[x]} taken for {names[y]}"
            for x, y in ways
        ]
        rows.append({"count": count, "text": "; ".join(text)})
    return rows


def expected_gains(
    counts: np.ndarray, per_class: Sequence[float | None], tested: np.ndarray
) -> tuple[int, list[tuple[int, float]]]:
    """Estimate what each class would gain from as many further training images as the median class has.

    A logistic regression of the accuracies on the logarithm of the number of training images, over the classes of this
    run, says how fast accuracy rises. Each class starts from its own accuracy, drawn towards the regression as if two
    more test images had been seen there.

    Args:
        counts: (K,) numbers of training images.
        per_class: (K,) accuracies in percent, `None` for classes that were not tested.
        tested: (K,) numbers of test images.

    Returns:
        The number of further images, and the classes with their gains in points, the greatest first; none where
        accuracy does not rise with the number of images.
    """
    extra = max(1, int(np.median(counts)))
    known = [
        k
        for k, accuracy in enumerate(per_class)
        if accuracy is not None and counts[k] > 0 and tested[k] > 0
    ]
    x = np.log(counts[known])
    if len(known) < 3 or np.ptp(x) == 0:
        return extra, []
    y, weight = (
        np.array([per_class[k] for k in known]) / 100,
        tested[known].astype(float),
    )
    design = np.stack([np.ones_like(x), x - x.mean()], axis=1)
    beta = np.zeros(2)
    for _ in range(25):
        p = _sigmoid(design @ beta)
        # A weak pull to zero keeps the slope finite where the classes are told apart perfectly.
        gradient = design.T @ (weight * (y - p)) - 0.1 * beta
        beta = beta + np.linalg.solve(
            (design.T * (weight * p * (1 - p))) @ design + 0.1 * np.eye(2), gradient
        )
    if not beta[1] > 0:
        return extra, []
    level = (weight * y + 2 * _sigmoid(design @ beta)) / (weight + 2)
    more = _sigmoid(
        np.log(level / (1 - level)) + beta[1] * np.log(1 + extra / counts[known])
    )
    gains = 100 * (more - level)
    return extra, [
        (known[i], float(gains[i])) for i in np.argsort(-gains, kind="stable")
    ]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def small_picture(
    images: LabelledImages, index: int, alt: str, caption: str
) -> dict[str, str]:
    """Return an image of a data set as a small JPEG within the page."""
    image = images.read(int(index), min_side=SIDE)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return {"source": _inline(file, "jpeg"), "alt": alt, "caption": caption}


def png(figure: Figure) -> str:
    """Return a figure as a PNG within the page."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return _inline(file, "png")


def _inline(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def group_text(run: str, scores: Mapping[str, Any]) -> str:
    """Say the accuracies of the groups in words."""
    return f"{run} " + ", ".join(
        f"{group} {scores[group]:.1f} %"
        for group in GROUPS
        if scores[group] is not None
    )


def plot_long_tail(
    runs: Mapping[str, Mapping[str, Any]], counts: Sequence[int], names: Sequence[str]
) -> Figure:
    """Draw the accuracies in percent of several runs: each class over its number of training images, and the groups.

    Args:
        runs: From the name of a run to its `many`, `medium`, `few` and `per_class` (K,); `None` where nothing was
            tested.
        counts: (K,) numbers of training images.
        names: Names of the classes, written below the axis where there are no more than 40.
    """
    counts = np.asarray(counts)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    classes, groups = figure.subplots(1, 2, width_ratios=[2, 1])
    draw_classes(classes, runs, counts)
    if len(names) <= NAMED:
        named = [names[k] for k in np.argsort(-counts, kind="stable")]
        turned = {
            "rotation": 45,
            "ha": "right",
            "rotation_mode": "anchor",
            "fontsize": 8,
        }
        classes.set_xticks(range(len(named)), named, parse_math=False, **turned)
    draw_groups(groups, runs)
    return figure


def draw_classes(
    axis: Axes, runs: Mapping[str, Mapping[str, Any]], counts: np.ndarray
) -> None:
    """Draw the numbers of training images, most frequent class first, and over them the accuracies of each run."""
    order = np.argsort(-counts, kind="stable")
    axis.fill_between(
        range(len(counts)),
        np.maximum(counts[order], 0.5),
        0.5,
        step="mid",
        color="0.88",
    )
    axis.set(
        yscale="log", xlabel="classes, most frequent first", ylabel="training images"
    )
    axis.set_ylim(bottom=0.5)
    accuracies = axis.twinx()
    for number, (run, scores) in enumerate(runs.items()):
        values = numbers(scores["per_class"])[order]
        accuracies.plot(values, ".", alpha=0.35, color=f"C{number}")
        accuracies.plot(running_mean(values), color=f"C{number}", label=run)
    accuracies.set_ylim(0, 102)
    accuracies.set_ylabel("test accuracy, %")
    accuracies.legend(loc="upper right", fontsize=9)


def draw_groups(axis: Axes, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the accuracies of classes with many, medium and few training images, one bar per run."""
    width = 0.8 / len(runs)
    for number, (run, scores) in enumerate(runs.items()):
        places = [
            place + (number - (len(runs) - 1) / 2) * width
            for place in range(len(GROUPS))
        ]
        bars = axis.bar(
            places,
            numbers([scores[group] for group in GROUPS]),
            width,
            color=f"C{number}",
            label=run,
        )
        axis.bar_label(bars, fmt="%.3g", fontsize=9)
    axis.set_xticks(range(len(GROUPS)), GROUPS)
    axis.set(xlabel="classes by number of training images", ylabel="test accuracy, %")
    axis.margins(y=0.25)
    axis.legend(loc="upper right", fontsize=9)


def numbers(values: Iterable[float | None]) -> np.ndarray:
    """Return floats, with NaN for `None`."""
    return np.array(
        [math.nan if value is None else value for value in values], dtype=float
    )


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over a tenth of the values around each, without the missing ones."""
    window = np.ones(max(1, len(values) // 10) // 2 * 2 + 1)
    known = ~np.isnan(values)
    sums = np.convolve(np.where(known, values, 0), window, mode="full")
    sizes = np.convolve(known, window, mode="full")
    middle = slice(len(window) // 2, len(window) // 2 + len(values))
    with np.errstate(invalid="ignore"):
        return sums[middle] / np.round(sizes[middle])


def plot_rarest(
    model: nn.Module,
    test: PixelDataset,
    transform: PixelTransform,
    counts: np.ndarray,
    names: Sequence[str],
) -> tuple[Figure, str] | None:
    """Show what the last adapter attends to in a test image of the rarest class, if it attends to anything."""
    config = getattr(model, "peft_config", {}).get("default")
    if not any(getattr(config, "guidance_shape", None) or ()):
        return None
    rarest = next(
        (
            k
            for k in np.argsort(counts, kind="stable")
            if counts[k] and k in test.split.labels
        ),
        None,
    )
    if rarest is None:
        return None
    pixels = test[int(np.flatnonzero(np.asarray(test.split.labels) == rarest)[0])][
        "pixel_values"
    ]
    images = transform(pixels[None].to(next(model.parameters()).device))
    figure = plot_attention(
        pixels.permute(1, 2, 0).numpy(),
        attention_maps(model, images)[0],
        config.row_names,
    )
    return (
        figure,
        f"What the last adapter attends to in a test image of the class `{names[rarest]}`.",
    )


def short(value: Any) -> Any:
    """Return the name of a folder or file without where it lies on this machine; anything else as it is."""
    return (
        Path(value).name
        if isinstance(value, str) and value and Path(value).exists()
        else value
    )


def create_model_card(
    results: Mapping[str, Any],
    method: str,
    repo_id: str,
    pictures: Mapping[str, str] | None = None,
) -> ModelCard:
    """Describe a trained model: how to load it, what it reaches, where it fails, how it was made.

    Args:
        results: What goes into `results.json`.
        method: Name of the run in the tables.
        repo_id: Where the model will be found.
        pictures: From file names beside the card to captions.
    """
    settings = {
        key: short(value)
        for key, value in results["settings"].items()
        if value is not None
    }
    base = results["settings"]["model"]
    names, counts = results["class_names"], results["class_counts"]
    runs = {"zero-shot": results["zero_shot"], method: results["trained"]}
    per_class = results["trained"]["per_class"]
    tested = sorted(
        (accuracy, k) for k, accuracy in enumerate(per_class) if accuracy is not None
    )
    worst = [[names[k], counts[k], accuracy] for accuracy, k in tested[:WORST]]
    # The Hub refuses a card whose base model is the path of a folder.
    known = base if base.count("/") < 2 and not Path(base).exists() else None
    tags = [
        "peft_sage",
        "long-tailed-recognition",
        *([f"base_model:adapter:{known}"] if known else []),
    ]
    data = ModelCardData(
        base_model=known,
        library_name="peft",
        pipeline_tag="image-classification",
        tags=tags,
    )
    shown = [name.replace("`", "'") for name in names[:100]]
    text = CARD.format(
        base_model=Path(base).name,
        num_classes=len(names),
        method=method,
        repo_id=repo_id,
        scores=table(
            ["test accuracy, %", *SCORES],
            [[run, *(runs[run][s] for s in SCORES)] for run in runs],
        ),
        pictures="".join(
            f"\n![{text}]({file})\n\n{text}\n"
            for file, text in (pictures or {}).items()
        ),
        worst=table(["class", "training images", "accuracy, %"], worst),
        settings="\n".join(f"{key}: {value}" for key, value in settings.items()),
        classes=", ".join(f"`{name}`" for name in shown)
        + f" and {len(names) - 100} more" * (len(names) > 100),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; numbers with four digits, and `-` for what is missing."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
    )
