# SPDX-License-Identifier: Apache-2.0
"""The results of a run: the one object that `results.json`, the report, the model card and the console show."""

import dataclasses
import json
import math
import platform
import re
import shlex
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..metrics import LongTailAccuracy
from ..run_files import fingerprint, run_settings
from .statistics import calibration_error, confidence_threshold


GROUPS = ("many", "medium", "few", "none")
SCORES = ("overall", "macro", *GROUPS, "worst")
#: Above this calibration error on the validation images a temperature is fitted.
MAX_CALIBRATION_ERROR = 0.03
#: How many likely label errors are kept.
MAX_SUSPECTS = 12


@dataclass
class Evaluation:
    """Accuracies in percent (None where there is nothing to average) and the answers they come from.

    Attributes:
        per_class: (K,) accuracies.
        num_classes: From a group to its number of classes in the evaluation.
        predictions: (n,) predicted classes.
        confidences: (n,) probabilities of the predicted classes, in [0, 1].
    """

    overall: float | None
    macro: float | None
    many: float | None
    medium: float | None
    few: float | None
    none: float | None
    worst: float | None
    per_class: list[float | None]
    num_classes: dict[str, int]
    predictions: list[int]
    confidences: list[float]

    @classmethod
    def from_logits(
        cls, logits: torch.Tensor, labels: list[int], class_counts: list[int]
    ) -> "Evaluation":
        """Evaluate logits (n, K) against labels (n,), given the numbers of training images (K,)."""
        probabilities = logits.float().softmax(dim=-1)
        confidences, predictions = probabilities.max(dim=-1)
        # The predictions of all processes are here already.
        metric = LongTailAccuracy(class_counts, sync_on_compute=False)
        metric.update(predictions, torch.as_tensor(labels))
        scores = metric.compute()
        return cls(
            **{name: _percent(scores[name].item()) for name in SCORES},
            per_class=[_percent(score) for score in scores["per_class"].tolist()],
            num_classes={group: int(scores[f"num_{group}"]) for group in GROUPS},
            predictions=predictions.tolist(),
            confidences=[round(x, 6) for x in confidences.tolist()],
        )

    def answers(self, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the confidence of each answer, and whether it is right."""
        right = np.array(self.predictions) == np.array(labels)
        return np.array(self.confidences), right


@dataclass
class RunResults:
    """Everything that is known about a run after its evaluation on the test images.

    Attributes:
        class_names: K names.
        class_counts: (K,) numbers of training images, zeros included.
        texts: The texts of the classes, as `ImageData.texts` has them.
        method: Name of the trained model in tables and legends.
        settings: What the trained weights depend on, and `model` and `dataset` where they are known.
        data: Summary of the data, from `ImageData.to_dict`.
        labels: (n,) labels of the test images.
        zero_shot: Evaluation on the test images before training.
        trained: Evaluation on the test images after training.
        validation: From each evaluation while training its `epoch` and accuracies in percent.
        kept_epoch: The epoch whose weights were kept, if the best one was.
        text_prior: Strength of the text prior.
        text_guidance: Strength of the text guidance.
        text_prior_scores: From each strength that was tried to its held-out balanced accuracy, in [0, 1].
        adapter_scale: What the adapters' update was multiplied with after training.
        adapter_scale_scores: From each scale that was tried to its validation score, in [0, 1].
        absent: The number of images that a class without any is given in the loss; None: it is left out.
        suspects: Training images that held-out models take for another class, least likely label first: their
            `index`, `predicted` class and the `probability` of their label. None if there was no cross-validation.
        calibration_error: Expected calibration error on the test images, in [0, 1].
        temperature: What the logits are divided by; 1.0 if nothing was to be corrected.
        threshold: The confidence at and above which 95% of the answers on validation images are right; None if there
            is none.
        command: The command line.
        date: When the run ended (UTC).
        versions: From a package to its version.
    """

    class_names: list[str]
    class_counts: list[int]
    texts: dict[str, list[str]] | list[str]
    method: str
    settings: dict[str, Any]
    data: dict[str, Any]
    labels: list[int]
    zero_shot: Evaluation
    trained: Evaluation
    validation: list[dict[str, float]] = field(default_factory=list)
    kept_epoch: float | None = None
    text_prior: float = 0.0
    text_guidance: float = 0.0
    text_prior_scores: dict[str, float] | None = None
    adapter_scale: float = 1.0
    adapter_scale_scores: dict[str, float] | None = None
    absent: float | None = None
    suspects: list[dict[str, Any]] | None = None
    calibration_error: float = 0.0
    temperature: float = 1.0
    threshold: float | None = None
    command: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def collect(
        cls,
        trainer: Any,
        data: Any,
        *,
        method: str = "trained",
        settings: dict[str, Any] | None = None,
    ) -> "RunResults":
        """Evaluate a trained model and what it was before training. All processes must call this.

        Call it before the model is saved: where the calibration error on the validation images is above 0.03, the
        head gets a temperature that is fitted there.

        Args:
            trainer: A [`SageTrainer`] that has trained a [`SageClassifier`].
            data: The [`ImageData`] it was trained on.
            method: Name of the trained model in tables and legends.
            settings: What else the report and the card should list, such as `model` and `dataset`.

        Raises:
            ValueError: The trainer's model is not a `SageClassifier`.
        """
        if trainer.classifier is None:
            raise ValueError(
                "`trainer` must train a SageClassifier for a report, got a "
                f"{type(trainer.model).__name__}."
            )
        counts = list(data.class_counts)
        head = trainer.classifier.head
        threshold = _calibrate(trainer, data, counts)
        logits, labels = _predict(trainer, data.test)
        trained = Evaluation.from_logits(logits / head.temperature, labels, counts)
        with trainer.model.disable_adapter():
            zero_shot, _ = _predict(trainer, data.test)
        images = fingerprint(data.train["label"])
        run = run_settings(trainer.args, trainer.model, images)
        return cls(
            class_names=list(data.class_names),
            class_counts=counts,
            texts=data.texts,
            method=method,
            settings={
                **run,
                "patch_dropout": trainer.patch_dropout,
                **(settings or {}),
            },
            data=data.to_dict(),
            labels=labels,
            zero_shot=Evaluation.from_logits(zero_shot, labels, counts),
            trained=trained,
            calibration_error=calibration_error(*trained.answers(labels)),
            temperature=head.temperature,
            threshold=threshold,
            **_history(trainer),
            **_choices(trainer, data.train["label"]),
            **_origin(),
        )

    def save(self, folder: str | Path) -> None:
        """Write `results.json` into a folder, whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        # Numbers stand side by side. Within a string no line ends, so that texts are left alone.
        text = re.sub(r"\[\n[-+\d.eE,\snul]*\]", lambda m: " ".join(m[0].split()), text)
        unfinished = Path(folder, "results.json.unfinished")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(Path(folder, "results.json"))

    @classmethod
    def load(cls, folder: str | Path) -> "RunResults":
        """Read what `save` wrote."""
        saved = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
        for name in ("zero_shot", "trained"):
            saved[name] = Evaluation(**saved[name])
        return cls(**saved)

    @property
    def runs(self) -> dict[str, Evaluation]:
        """The two evaluations by the names that tables and legends give them."""
        return {"zero-shot": self.zero_shot, self.method: self.trained}

    @property
    def answers(self) -> tuple[np.ndarray, np.ndarray]:
        """The confidence of each answer after training, and whether it is right."""
        return self.trained.answers(self.labels)

    @property
    def shown_scores(self) -> list[str]:
        """The names of the scores; the group `none` only where there is such a class."""
        return [s for s in SCORES if s != "none" or self.trained.num_classes["none"]]

    @property
    def shown_settings(self) -> dict[str, Any]:
        """The settings that have a value, without where folders and files lie on this machine."""
        shown = {}
        for name, value in self.settings.items():
            if isinstance(value, str) and value and Path(value).exists():
                value = Path(value).name
            if value is not None:
                shown[name] = value
        return shown

    @property
    def num_tested(self) -> int:
        """The number of classes that have test images."""
        return sum(score is not None for score in self.trained.per_class)

    @property
    def worse_classes(self) -> list[int]:
        """The classes that are less accurate than before training."""
        pairs = zip(self.zero_shot.per_class, self.trained.per_class, strict=True)
        worse = []
        for k, (before, after) in enumerate(pairs):
            if (after or 0) < (before or 0):
                worse.append(k)
        return worse

    @property
    def worst_classes(self) -> list[int]:
        """At most ten and half of the classes, all below the mean, the least accurate first."""
        scores = enumerate(self.trained.per_class)
        tested = {k: score for k, score in scores if score is not None}
        mean = self.trained.macro or 0.0
        below = [k for k, score in tested.items() if score < mean]
        below.sort(key=lambda k: (tested[k], -self.class_counts[k]))
        return below[: min(10, len(tested) // 2)]

    @property
    def at_threshold(self) -> tuple[float, float] | None:
        """The share of test images with a confidence of at least `threshold`, and the accuracy on these."""
        confidences, right = self.answers
        if self.threshold is None or self.threshold > confidences.max():
            return None
        answered = confidences >= self.threshold
        share = answered.mean()
        accuracy = right[answered].mean()
        return float(share), float(accuracy)

    def __str__(self) -> str:
        names = self.shown_scores
        rows = [["test accuracy, %", *names]]
        for run, evaluation in self.runs.items():
            scores = [getattr(evaluation, name) for name in names]
            shown = ["-" if score is None else f"{score:.1f}" for score in scores]
            rows.append([run, *shown])
        sizes = self.trained.num_classes
        rows.append(["classes", *(str(sizes.get(name, "")) for name in names)])
        lines = []
        for first, *others in rows:
            cells = [f"{cell:>9}" for cell in others]
            lines.append(f"{first:<18}" + "".join(cells))
        if self.adapter_scale != 1:
            lines.append(
                f"Of the adapters' update {100 * self.adapter_scale:g}% is kept, by the validation images."
            )
        worse = len(self.worse_classes)
        lines.append(
            f"{worse} of {self.num_tested} classes {'is' if worse == 1 else 'are'} worse than before training; "
            f"calibration error {self.calibration_error:.3f}."
        )
        return "\n".join(lines)


def _choices(trainer: Any, labels: list[int]) -> dict[str, Any]:
    """Return what the training images and their labels (n,) decided, or the user."""
    loss = trainer.loss
    prior = trainer.text_prior
    kept = trainer.adapter_scale
    return {
        "text_prior": getattr(loss, "text_prior", 0.0),
        "text_guidance": getattr(loss, "text_guidance", 0.0),
        "absent": getattr(loss, "absent", None),
        "text_prior_scores": prior and _by_name(prior.scores),
        "suspects": prior and _suspects(prior, labels),
        "adapter_scale": 1.0 if kept is None else kept.scale,
        "adapter_scale_scores": kept and _by_name(kept.scores),
    }


def _by_name(scores: dict[float, float]) -> dict[str, float]:
    """Scores with keys that JSON can have."""
    return {f"{key:g}": score for key, score in scores.items()}


def _percent(fraction: float) -> float | None:
    return None if math.isnan(fraction) else 100 * fraction


def _calibrate(trainer: Any, data: Any, counts: list[int]) -> float | None:
    """Fit the temperature of the head, and return the threshold for 95% right answers, on validation images."""
    if data.validation is None:
        return None
    classifier = trainer.classifier
    classifier.head.temperature = 1.0
    logits, labels = _predict(trainer, data.validation)
    evaluation = Evaluation.from_logits(logits, labels, counts)
    if calibration_error(*evaluation.answers(labels)) > MAX_CALIBRATION_ERROR:
        logits = logits / classifier.fit_temperature(logits, labels)
        evaluation = Evaluation.from_logits(logits, labels, counts)
    return confidence_threshold(*evaluation.answers(labels))


def _predict(trainer: Any, dataset: Any) -> tuple[torch.Tensor, list[int]]:
    """Return the logits (n, K) and the labels."""
    logits = torch.as_tensor(trainer.predict(dataset).predictions)
    return logits.float(), list(dataset["label"])


def _history(trainer: Any) -> dict[str, Any]:
    """Return the validation curve and the epoch that was kept."""
    curve = []
    kept = None
    for entry in trainer.state.log_history:
        if "eval_macro" not in entry:
            continue
        scores = {
            "epoch": entry["epoch"],
            "overall": 100 * entry["eval_overall"],
            "macro": 100 * entry["eval_macro"],
        }
        curve.append(scores)
        if entry["step"] == trainer.state.best_global_step:
            kept = entry["epoch"]
    if not trainer.args.load_best_model_at_end:
        kept = None
    return {"validation": curve, "kept_epoch": kept}


def _suspects(prior: Any, labels: list[int]) -> list[dict[str, Any]]:
    """Return the images that are taken for another class, the least likely labels first."""
    probability = prior.label_probability
    predicted = prior.predicted_label
    held_out = predicted >= 0
    wrong = held_out & (predicted != torch.as_tensor(list(labels)))
    order = torch.where(wrong, probability, torch.inf).argsort(stable=True)
    suspects = []
    for index in order[: int(wrong.sum())][:MAX_SUSPECTS].tolist():
        suspect = {
            "index": index,
            "predicted": predicted[index].item(),
            "probability": probability[index].item(),
        }
        suspects.append(suspect)
    return suspects


def _command(argv: list[str]) -> str:
    """Return the command line without where the script lies and without tokens."""
    script, *arguments = argv
    line = shlex.join(["python", Path(script).name, *arguments])
    return re.sub(r"(--[\w-]*token[= ])\S+", r"\1***", line)


def _origin() -> dict[str, Any]:
    """Return what the results were made by, and when."""
    names = ("peft_sage", "peft", "transformers", "torch")
    versions = {name: str(sys.modules[name].__version__) for name in names}
    versions["python"] = platform.python_version()
    now = datetime.now(timezone.utc)
    return {
        "command": _command(sys.argv),
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions,
    }
